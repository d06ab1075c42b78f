"""Keep rates through the program: the schedule in training, any rate in evaluation, and the tool's table."""

import json
import math
from pathlib import Path

import pytest

import main as program
from models import CONFIG_DIR
from tools import keep_rates

SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")
SMALL = [
    *("MODEL.TYPE", "evit", "MODEL.EVIT.PATCH_SIZE", "8", "MODEL.EVIT.EMBED_DIM", "16"),
    *("MODEL.EVIT.DEPTH", "3", "MODEL.EVIT.NUM_HEADS", "2", "MODEL.EVIT.DROP_LOC", "[1]"),
    *("MODEL.EVIT.SHRINK_START_EPOCH", "1", "MODEL.EVIT.SHRINK_EPOCHS", "2"),
    *("MODEL.EVIT.KEEP_RATE", "0.5"),
]
START, LENGTH, STEPS_PER_EPOCH = 1, 2, 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Output folder of a run of four epochs, four steps each."""
    folder = tmp_path_factory.mktemp("evit")
    program.main(["--cfg", SMOKE, "--output", str(folder), "--opts", "TRAIN.EPOCHS", "4", *SMALL])
    return folder / "smoke_cls" / "default"


def command(trained: Path, output: Path, *rates: str) -> list[str]:
    best = str(trained / "checkpoints" / "last.pth")
    return [
        "--cfg", SMOKE, "--resume", best, "--rates", *rates, "--output", str(output), "--opts", *SMALL,
    ]  # fmt: skip


def test_the_keep_rate_of_each_step_is_that_of_the_formula(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    rates = [line["keep_rate"] for line in lines if line["kind"] == "train"]
    assert len(rates) == 16
    for step, rate in enumerate(rates):
        along = (step - START * STEPS_PER_EPOCH) / (LENGTH * STEPS_PER_EPOCH)
        along = min(max(along, 0.0), 1.0)
        assert rate == pytest.approx(0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * along)))


def test_one_checkpoint_is_scored_at_any_rate(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records = keep_rates.main(command(trained, tmp_path / "rates.json", "1", "0.5", "0.25"))
    assert json.loads((tmp_path / "rates.json").read_text()) == records
    assert [r["keep_rate"] for r in records] == [1.0, 0.5, 0.25]
    assert records[0]["gmacs"] > records[1]["gmacs"] > records[2]["gmacs"]
    assert len({r["loss"] for r in records}) == 3
    assert all(r["img_per_s"] > 0 and r["images"] == 20 for r in records)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    # The same through main.py, without the tool.
    last = str(trained / "checkpoints" / "last.pth")
    flags = ["--cfg", SMOKE, "--output", "out", "--eval", "--resume", last]
    program.main([*flags, "--opts", *SMALL, "MODEL.EVIT.KEEP_RATE", "0.25"])
    scored = json.loads(Path("out/smoke_cls/default/eval.json").read_text())
    assert scored["loss"] == records[2]["loss"]
    assert scored["acc1"] == records[2]["acc1"]


def test_models_and_rates_that_cannot_be_are_refused(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        keep_rates.main(command(trained, tmp_path / "x.json", "0"))
    assert "keep_rate=0.0 must be in (0, 1]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        keep_rates.main(["--cfg", SMOKE, "--resume", str(trained / "checkpoints" / "last.pth")])
    assert "MODEL.TYPE='dhvt' keeps all tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        keep_rates.main([*command(trained, tmp_path / "x.json", "1"), "TEST.TTA", "flip"])
    assert "TEST.TTA='flip' must be 'none'" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
