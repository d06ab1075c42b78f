"""A grid of small runs in processes of their own: continued, left out, reported, compared."""

import csv
import json
import math
import os
import shlex
import sys

import pytest
import torch

import main as program
from config import load_config, output_dir
from models import CONFIG_DIR, create_model
from tests.processes import interrupted_after_saving
from tools import sweep
from utils.arguments import parse_args

SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")
# Two epochs of two steps; what is timed at the end is one patch.
SHORT = ["--opts", "DATA.SYNTHETIC.TRAIN_SIZE", "16", "THROUGHPUT_SIZE", "[4,4]"]
GRID = ["--grid", "TRAIN.OPTIMIZER.NAME=adamw,sgdd,sgd"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Folder of three points: one was interrupted before, one fails, and one is new -> (folder, output)."""
    root = tmp_path_factory.mktemp("sweep")
    first = [*SHORT, "TRAIN.OPTIMIZER.NAME", "adamw", "--output", str(root), "--tag", "NAME=adamw"]
    with interrupted_after_saving(step=2):
        program.main(["--cfg", SMOKE, *first])
    printed = root / "printed.txt"
    with pytest.MonkeyPatch.context() as patch, printed.open("w") as file:
        patch.setattr(sys, "stdout", file)
        patch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(SystemExit) as stop:
            sweep.main(["--cfg", SMOKE, *GRID, "--output", str(root), "--", *SHORT])
    assert stop.value.code == 1, "a point failed"
    return root / "smoke_cls", printed.read_text()


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        sweep.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_an_interrupted_point_goes_on_and_a_new_one_starts(swept):
    folder, printed = swept
    for tag, start in (("adamw", "continuing"), ("sgd", "starting from scratch")):
        point = folder / f"NAME={tag}"
        log = (point / "log_rank0.txt").read_text()
        assert f"weights: {start}" in log
        assert log.count("Train: [0/2][0/2]") == 1, "no epoch is trained twice"
        state = torch.load(point / "checkpoints" / "last.pth", weights_only=True)
        assert state["progress"]["step"] == 4
    assert f"[1/3] NAME=adamw: runs, see {folder / 'NAME=adamw' / 'log_rank0.txt'}" in printed
    assert "[3/3] NAME=sgd: finished" in printed


def test_a_point_that_fails_is_reported_with_the_end_of_its_output_and_the_others_go_on(swept):
    folder, printed = swept
    report = printed.split("[2/3] NAME=sgdd: failed with status 2; its output ends with")[1]
    assert "TRAIN.OPTIMIZER.NAME='sgdd'" in report.split("[3/3]")[0]
    assert not (folder / "NAME=sgdd").exists(), "main.py writes nothing before its checks"


def test_the_table_and_both_files_have_all_points_the_best_first(swept):
    folder, printed = swept
    records = json.loads((folder / "sweep.json").read_text())
    assert [record["status"] for record in records] == ["finished", "finished", "failed"]
    assert records[0]["best"] >= records[1]["best"]
    assert records[2] | {"minutes": None} == dict(
        values={"TRAIN.OPTIMIZER.NAME": "sgdd"},
        metric="acc1",
        best=None,
        last=None,
        params=records[0]["params"],
        minutes=None,
        status="failed",
        folder=str(folder / "NAME=sgdd"),
    )
    model = create_model(SMOKE, num_classes=10)
    for record in records[:2]:
        point = folder / f"NAME={record['values']['TRAIN.OPTIMIZER.NAME']}"
        assert record["best"] == json.loads((point / "eval.json").read_text())["acc1"]
        lines = (point / "metrics.jsonl").read_text().splitlines()
        assert record["last"] == json.loads(lines[-1])["acc1"]
        assert record["params"] == sum(p.numel() for p in model.parameters())
        assert 0 < record["minutes"] < 10
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["TRAIN.OPTIMIZER.NAME"] for row in rows] == [
        record["values"]["TRAIN.OPTIMIZER.NAME"] for record in records
    ]
    assert [float(row["best"]) for row in rows[:2]] == [record["best"] for record in records[:2]]
    assert rows[2]["best"] == ""
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert table[0] == (
        "| TRAIN.OPTIMIZER.NAME | best acc1 | last acc1 | params M | minutes | status |"
    )
    assert table[2].startswith(f"| {rows[0]['TRAIN.OPTIMIZER.NAME']} | {records[0]['best']:.2f} |")
    assert table[4].startswith("| sgdd | - | - | 0.037 |")


def test_what_is_finished_is_left_out(swept, monkeypatch, capsys):
    folder, _ = swept
    monkeypatch.setattr(sweep.subprocess, "run", None)
    # Not what a run is about: how often it prints.
    rest = ["--", *SHORT, "PRINT_FREQ", "7"]
    grid = ["--grid", "TRAIN.OPTIMIZER.NAME=sgd,adamw"]
    before = {r["folder"]: r for r in json.loads((folder / "sweep.json").read_text())}
    records = sweep.main(["--cfg", SMOKE, *grid, "--output", str(folder.parent), *rest])
    assert len(records) == 2
    for record in records:
        assert record == before[record["folder"]] | dict(status="skipped")
    out = capsys.readouterr().out
    assert f"[1/2] NAME=sgd: skipped, {folder / 'NAME=sgd'} is finished" in out


def test_a_folder_with_a_run_of_other_settings_is_refused(swept, capsys):
    folder, _ = swept
    command = ["--cfg", SMOKE, "--grid", "TRAIN.OPTIMIZER.NAME=sgd", "--output", str(folder.parent)]
    error = refused(capsys, *command, "--", *SHORT, "TRAIN.EPOCHS", "3")
    assert f"{folder / 'NAME=sgd'} has a run of other settings: TRAIN.EPOCHS (2 there, 3 here)" in (
        error.replace("\n", " ")
    )


def test_only_the_results_of_the_whole_run_make_a_point_finished(tmp_path):
    (point,) = sweep.make_points(SMOKE, {"SEED": ["1"]}, (), str(tmp_path))
    assert point.folder == tmp_path / "smoke_cls" / "SEED=1"
    assert (point.best(), point.last()) == (None, None)
    (point.folder / "checkpoints").mkdir(parents=True)
    last, results = point.folder / "checkpoints" / "last.pth", point.folder / "eval.json"
    results.write_text(json.dumps(dict(acc1=50.0, images=20)))
    last.touch()
    (point.folder / "metrics.jsonl").touch()
    assert point.last() is None, "stopped at its first batch"
    assert point.best() is None, "of --eval, while training is not at its end"
    results.write_text('{"epoch": 1, "acc')
    assert point.best() is None, "killed while it wrote"
    results.write_text(json.dumps(dict(epoch=1, acc1=50.0)))
    assert point.best() == 50.0
    os.utime(results, (1, 1))
    assert point.best() is None, "training went on since"
    lines = [
        dict(kind="eval", step=0, acc1=90.0),  # of --pretrained, before training
        dict(kind="eval", step=2, epoch=0, acc1=60.0),
        dict(kind="train", step=3, epoch=1, loss=1.0),
        dict(kind="eval", step=4, epoch=1, acc1=55.0),
    ]
    metrics = point.folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert point.last() == 55.0
    metrics.write_text(json.dumps(lines[3] | dict(acc1="NaN")) + "\n")
    assert point.last() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "TRAIN.BASE_LR=1e-3,much"], "TRAIN.BASE_LR='much' in --opts must be float"),
        (["--grid", "MODEL.DROP_PATH_RATE=0,1.5"], "MODEL.DROP_PATH_RATE=1.5 must be within"),
        (["--grid", "TRAIN.BASELR=1"], "did you mean one of ['TRAIN.BASE_LR'"),
        (["--grid", "MODEL.DHVT.NUM_HEADS=2,3"], "MODEL.DHVT"),
        (["--grid", "TRAIN.BASE_LR"], "--grid TRAIN.BASE_LR must be KEY=VALUE,VALUE"),
        (["--grid", "SEED=1", "--grid", "seed=2"], "--grid seed is given twice"),
        (["--grid", "SEED=1,1"], "--grid SEED=1,1 has a value twice"),
        (["--grid", "TAG=a,b"], "--grid TAG: points are trained, each with a TAG made of its"),
        (["--grid", "TRAIN.FREEZE=[a/b],[a b]"], "would have one folder"),
        (["--grid", "DATA.BATCH_SIZE=4,8", "--", "--batch-size", "4"], "['DATA.BATCH_SIZE'] are set by"),
        (["--grid", "SEED=1", "--", "--eval"], "EVAL_MODE: points of a grid are trained"),
        (["--grid", "SEED=1", "--", "--cfg", SMOKE], "--cfg comes before --"),
        (["--grid", "SEED=1", "--", "--batchsize", "4"], "did you mean one of ['--batch-size'"),
        (["--grid", "SEED=1", "--", "--opts", "TRAIN.AUTO_RESUME", "False"], "TRAIN.AUTO_RESUME=False"),
    ],
)  # fmt: skip
def test_mistakes_in_any_point_stop_before_the_first_run(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.subprocess, "run", None)
    assert message in refused(capsys, "--cfg", SMOKE, *arguments)
    assert not any(tmp_path.iterdir())


def test_a_dry_run_prints_commands_that_give_the_points_their_values(tmp_path, capsys):
    grid = ["--grid", "TRAIN.BASE_LR=1e-3,2e-3", "--grid", "AUG.SCALE=[0.1, 1],[1,1]"]
    rest = ["--", "--tag", "new", "--opts", "SEED", "3"]
    assert sweep.main(["--cfg", SMOKE, *grid, "--output", str(tmp_path), "--dry-run", *rest]) == []
    lines = capsys.readouterr().out.splitlines()
    configs = []
    for line in lines:
        python, file, *arguments = shlex.split(line)
        assert (python, file) == (sys.executable, str(CONFIG_DIR.parent / "main.py"))
        _, own, flags = parse_args(arguments)
        configs.append(load_config(own.cfg, own.opts, flags))
    assert [(c.TRAIN.BASE_LR, c.AUG.SCALE) for c in configs] == [
        (1e-3, [0.1, 1.0]),
        (1e-3, [1.0, 1.0]),
        (2e-3, [0.1, 1.0]),
        (2e-3, [1.0, 1.0]),
    ]
    assert {c.SEED for c in configs} == {3}
    assert output_dir(configs[0]) == tmp_path / "smoke_cls" / "new,BASE_LR=1e-3,SCALE=0.1-1"
    assert len({output_dir(c) for c in configs}) == 4
    assert not any(tmp_path.iterdir())


def test_values_are_split_at_commas_outside_brackets():
    assert sweep.split_values("1e-4, 5e-4") == ["1e-4", "5e-4"]
    assert sweep.split_values("None,[0.2,0.8],[[1,2],3]") == ["None", "[0.2,0.8]", "[[1,2],3]"]
    assert sweep.split_values("[window(window_size=7, a=1),identity]") == [
        "[window(window_size=7, a=1),identity]"
    ]
    assert sweep.split_values(",adamw") == ["", "adamw"]


def test_tags_can_be_read_and_are_names_of_folders():
    assert sweep.tag_of({"TRAIN.BASE_LR": "1e-4", "MODEL.DROP_PATH_RATE": "0"}) == (
        "BASE_LR=1e-4,DROP_PATH_RATE=0"
    )
    assert sweep.tag_of({"TRAIN.FREEZE": "['a/b', c]"}, "mine") == "mine,FREEZE=a-b-c"
    assert sweep.tag_of({"MODEL.DHVT.DEPTH": "2", "MODEL.DEIT.DEPTH": "3"}) == (
        "MODEL.DHVT.DEPTH=2,MODEL.DEIT.DEPTH=3"
    )


def test_points_without_a_score_are_last_in_the_table():
    record = dict(values={"SEED": "1"}, metric="mIoU", params=2_500_000, minutes=None)
    record |= dict(folder="x", status="failed", best=None, last=math.pi)
    row = sweep.to_table([record]).splitlines()[2]
    assert row == "| 1 | - | 3.14 | 2.500 | - | failed |"
