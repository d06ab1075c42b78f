"""The checkpoint tool on files of ours, of the lineage, and of others."""

import argparse
import hashlib
import json
import os

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

import main as program
from models import CONFIG_DIR, create_model
from tests.small_models import SMALL
from tools import checkpoints as tool
from utils.checkpoint_files import load_file, save_checkpoint, save_safetensors

SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")


def save(path, **tensors):
    save_checkpoint(path, {"model": tensors})
    return str(path)


def refused(capsys, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        tool.main([str(arg) for arg in args])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of a run with averaged weights."""
    folder = tmp_path_factory.mktemp("trained")
    opts = ["TRAIN.EMA.ENABLE", "True", "TRAIN.EMA.DECAY", "0.5"]
    program.main(["--cfg", SMOKE, "--output", str(folder), "--opts", *opts])
    return folder / "smoke_cls" / "default" / "checkpoints"


# -- average ---------------------------------------------------------------------------------------


def test_an_average_is_the_mean_of_fractions_and_the_last_of_counts(tmp_path):
    paths = []
    for index, value in enumerate((1.0, 2.0, 6.0)):
        count = torch.tensor(10 * index)
        flags = torch.tensor([index == 2])
        path = tmp_path / f"{index}.pth"
        paths.append(save(path, w=torch.full((2,), value), n=count, flag=flags))
    weights, _ = tool.average(paths)
    assert weights["w"].tolist() == [3.0, 3.0]
    assert weights["w"].dtype == torch.float32
    assert (weights["n"].item(), weights["flag"].item()) == (20, True)


def test_an_average_of_half_precision_numbers_is_summed_in_double_precision(tmp_path):
    paths = [
        save(tmp_path / f"{i}.pth", w=torch.tensor([60000.0, 1.0 + i / 1024]).half())
        for i in range(3)
    ]
    weights, _ = tool.average(paths)
    assert weights["w"].tolist() == [60000.0, 1.0 + 1 / 1024]
    assert weights["w"].dtype == torch.float16


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(w=torch.ones(3), b=torch.ones(1)), r"b.pth does not fit .*a.pth: w .*\[3\].*\[2\]"),
        (dict(w=torch.ones(2)), "lacks b, and has none"),
        (dict(w=torch.ones(2), b=torch.ones(1), c=torch.ones(1)), "lacks none, and has c"),
        (dict(w=torch.ones(2), b=torch.ones(1).half()), r"b \(float16"),
    ],
)
def test_files_of_other_shapes_are_refused_by_name(tmp_path, other, message):
    first = save(tmp_path / "a.pth", w=torch.ones(2), b=torch.ones(1))
    with pytest.raises(ValueError, match=message):
        tool.average([first, save(tmp_path / "b.pth", **other)])


def test_averages_of_a_run_take_the_averaged_weights_if_asked(trained, tmp_path, capsys):
    files = [str(trained / f"epoch_{epoch}.pth") for epoch in (0, 1)]
    for flags, part in (([], "model"), (["--ema"], "ema")):
        out = tmp_path / f"{part}.pth"
        assert tool.main(["average", *files, "--output", str(out), *flags]) == 0
        a, b = (load_file(path)[part] for path in files)
        mean = load_file(out)["model"]
        assert mean.keys() == a.keys()
        for name, tensor in mean.items():
            if tensor.is_floating_point():
                assert torch.allclose(tensor, (a[name] + b[name]) / 2, atol=1e-7), name
            else:
                assert torch.equal(tensor, b[name]), name
    plain, second = (save(tmp_path / f"{i}.pth", w=torch.ones(1)) for i in range(2))
    assert "no averaged weights: leave --ema out" in refused(
        capsys, "average", plain, second, "--ema", "--output", tmp_path / "x.pth"
    )
    assert "two files at least" in refused(capsys, "average", plain, "--output", tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["average", "a.pth", "b.pth", "--output", "./b.pth"], "b.pth would be written over"),
        (["average", "a.pth", "b.pth", "./a.pth", "--output", "x.pth"], "is given more than once"),
        (["strip", "a.pth", "--output", "a.pth"], "a.pth would be written over"),
        (["convert", "a.pth", "a.pth"], "a.pth would be written over"),
    ],
)
def test_no_input_is_written_over_or_counted_twice(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pth", "b.pth"):
        save(name, w=torch.ones(1))
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert message in refused(capsys, *words)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_averaged_weights_that_are_not_taken_are_mentioned(trained, tmp_path, capsys):
    last, other = str(trained / "last.pth"), str(trained / "epoch_0.pth")
    for words in (
        ["strip", last, "--output", str(tmp_path / "a.pth")],
        ["convert", last, str(tmp_path / "a.safetensors")],
        ["diff", last, other],
    ):
        for flags, said in (([], True), (["--ema"], False)):
            tool.main([*words, *flags])
            assert ("has averaged weights too" in capsys.readouterr().out) == said


# -- strip -----------------------------------------------------------------------------------------


def test_a_release_holds_weights_classes_and_config_only_and_evaluates_alike(
    trained, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "release.pth"
    tool.main(["strip", str(trained / "last.pth"), "--output", str(out), "--ema"])
    printed = capsys.readouterr().out
    assert hashlib.sha256(out.read_bytes()).hexdigest() in printed
    assert "MiB" in printed
    content = torch.load(out, weights_only=True)
    assert set(content) == {"model", "config", "classes"}
    assert len(content["classes"]) == 10
    assert "EMBED_DIM: 32" in content["config"]
    assert out.stat().st_size < (trained / "last.pth").stat().st_size / 3
    monkeypatch.chdir(tmp_path)
    program.main(["--cfg", SMOKE, "--eval", "--resume", str(out)])
    evaluation = json.loads((tmp_path / "output/smoke_cls/default/eval.json").read_text())
    recorded = load_file(trained / "last.pth")["metrics"]
    assert evaluation["loss"] == pytest.approx(recorded["loss"], abs=1e-6)


def test_half_precision_and_the_hash_in_the_name(trained, tmp_path, capsys):
    out = tmp_path / "half.safetensors"
    tool.main(["strip", str(trained / "last.pth"), "--output", str(out), "--half", "--hash"])
    (path,) = tmp_path.iterdir()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"half-{digest[:8]}.safetensors"
    assert digest in capsys.readouterr().out
    weights = load_file(path)["model"]
    kinds = {t.dtype for t in weights.values() if t.is_floating_point()}
    assert kinds == {torch.float16}
    assert any(t.dtype == torch.int64 for t in weights.values()), "counts stay whole numbers"


def test_a_number_that_half_precision_cannot_hold_is_named(tmp_path, capsys):
    path = save(tmp_path / "a.pth", ok=torch.ones(1), norm=torch.tensor([1e6]))
    out = tmp_path / "b.pth"
    assert "half-precision number: norm" in refused(
        capsys, "strip", path, "--half", "--output", out
    )
    assert not out.exists()


def test_a_release_of_a_view_does_not_bring_its_storage_along(tmp_path):
    path = save(tmp_path / "a.pth", w=torch.zeros(1_000_000)[:2])
    tool.main(["strip", path, "--output", str(tmp_path / "b.pth")])
    assert (tmp_path / "b.pth").stat().st_size < 10_000


# -- convert ---------------------------------------------------------------------------------------


def test_a_checkpoint_survives_safetensors_and_back(trained, tmp_path, capsys):
    there, back = tmp_path / "a.safetensors", tmp_path / "b.pth"
    tool.main(["convert", str(trained / "last.pth"), str(there)])
    assert "left out: best, ema" in capsys.readouterr().out
    tool.main(["convert", str(there), str(back)])
    before, after = load_file(trained / "last.pth"), load_file(back)
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(before["model"][k], after["model"][k]) for k in after["model"])
    assert (after["config"], after["classes"]) == (before["config"], before["classes"])
    assert tool.main(["diff", str(trained / "last.pth"), str(there)]) == 0


def test_a_safetensors_file_of_ours_starts_an_evaluation(trained, tmp_path, monkeypatch):
    there = tmp_path / "a.safetensors"
    tool.main(["convert", str(trained / "last.pth"), str(there), "--ema"])
    monkeypatch.chdir(tmp_path)
    program.main(["--cfg", SMOKE, "--eval", "--resume", str(there)])
    evaluation = json.loads((tmp_path / "output/smoke_cls/default/eval.json").read_text())
    recorded = load_file(trained / "last.pth")["metrics"]
    assert evaluation["loss"] == pytest.approx(recorded["loss"], abs=1e-6)


def test_shared_tensors_are_complete_for_others_and_share_again_here(tmp_path):
    from safetensors.torch import load_file as load_foreign

    table = torch.arange(6.0).reshape(2, 3)
    weights = dict(
        encoder=table, decoder=table, turned=table.T, part=table[:1], alone=torch.ones(2)
    )
    path = tmp_path / "a.safetensors"
    save_safetensors(path, weights, {"config": "A: 1"})
    foreign = load_foreign(path)
    assert foreign.keys() == weights.keys()
    assert all(torch.equal(foreign[name], weights[name]) for name in weights)
    content = load_file(path)
    own = content["model"]
    assert content["config"] == "A: 1"
    assert own["encoder"].data_ptr() == own["decoder"].data_ptr()
    assert own["turned"].data_ptr() != own["encoder"].data_ptr()
    tool.main(["convert", str(path), str(tmp_path / "b.pth")])
    back = load_file(tmp_path / "b.pth")["model"]
    assert back["encoder"].data_ptr() == back["decoder"].data_ptr()


def test_a_header_that_lies_is_a_damaged_file(tmp_path):
    from safetensors.torch import save_file

    for facts in ("no json", "[1]", '{"shared": {"b": "missing"}}'):
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"mixlab": facts})
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged: its header"):
            load_file(tmp_path / "a.safetensors")


def test_foreign_safetensors_become_weights_that_load(tmp_path):
    from safetensors.torch import save_file

    name, overrides = SMALL["deit"]
    model = create_model(name, num_classes=3, **overrides)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    tool.main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "a.pth")])
    weights, expected = load_file(tmp_path / "a.pth")["model"], model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    create_model(name, num_classes=3, **overrides).load_state_dict(weights)


def test_the_suffix_is_the_format(tmp_path, capsys):
    path = save(tmp_path / "a.pth", w=torch.ones(1))
    assert "must end in one of" in refused(capsys, "convert", path, tmp_path / "a.bin")


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_says_what_a_run_of_ours_left(trained, capsys):
    report = tool.inspect(trained / "last.pth")
    assert report["kind"] == "MixLab, training checkpoint of format 1"
    assert (report["epoch"], report["step"], report["classes"]) == (2, 8, 10)
    assert report["metrics"]["images"] == 20
    assert report["versions"]["torch"] == str(torch.__version__)
    assert "TYPE: dhvt" in report["config"]
    model = load_file(trained / "last.pth")["model"]
    for key in ("weights", "averaged_weights"):
        assert report[key]["tensors"] == len(model)
        assert report[key]["numbers"] == sum(t.numel() for t in model.values())
        assert report[key]["keys"]["cls_token"] == [[1, 1, 32], "float32"]
    assert tool.main(["inspect", str(trained / "last.pth"), "--keys", "--config"]) == 0
    printed = capsys.readouterr().out
    assert "    cls_token [1, 1, 32] float32" in printed
    assert "weights [model]: " in printed
    assert "EMBED_DIM: 32" in printed
    tool.main(["inspect", str(trained / "last.pth"), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["epoch"] == 2


def test_inspect_knows_the_files_of_the_lineage(tmp_path):
    w = {"layers.0.w": torch.ones(2, 3)}
    files = {
        "Swin": dict(
            model=w, optimizer={}, lr_scheduler={}, max_accuracy=81.2, epoch=299,
            config=CfgNode({"MODEL": {"TYPE": "swin"}}),
        ),
        "DeiT family": dict(
            model=w, model_ema=w, epoch=299, args=argparse.Namespace(model="deit_tiny", lr=0.1),
        ),
        "timm": dict(state_dict=w, state_dict_ema=w, arch="dfformer_s18", version=2, epoch=5),
        "state dict": w,
        "dict": dict(model=w),
    }  # fmt: skip
    reports = {}
    for kind, content in files.items():
        torch.save(content, tmp_path / "x.pth")
        reports[kind] = tool.inspect(tmp_path / "x.pth")
        assert reports[kind]["kind"] == kind
        assert reports[kind]["weights"]["numbers"] == 6
        assert ("averaged_weights" in reports[kind]) == (kind in ("DeiT family", "timm"))
    assert (reports["Swin"]["max_accuracy"], reports["Swin"]["epoch"]) == (81.2, 299)
    assert "TYPE: swin" in reports["Swin"]["config"]
    assert "model: deit_tiny" in reports["DeiT family"]["config"]
    assert reports["timm"]["arch"] == "dfformer_s18"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_no_command_runs_what_is_in_a_file(tmp_path, capsys):
    target, path = tmp_path / "hacked", tmp_path / "evil.pth"
    torch.save({"model": {"w": torch.ones(1)}, "evil": Evil(str(target))}, path)
    save(tmp_path / "plain.pth", w=torch.ones(1))
    for command in (
        ["inspect", path],
        ["strip", path, "--output", tmp_path / "o.pth"],
        ["convert", path, tmp_path / "o.safetensors"],
        ["average", path, tmp_path / "plain.pth", "--output", tmp_path / "o.pth"],
        ["diff", path, path],
    ):
        assert "would run code" in refused(capsys, *command)
    assert not target.exists()


# -- diff ------------------------------------------------------------------------------------------


def test_diff_of_equal_files_is_zero_and_of_others_one(tmp_path, capsys):
    a = save(tmp_path / "a.pth", near=torch.zeros(2), far=torch.zeros(2), shape=torch.zeros(2),
             kind=torch.zeros(2), gone=torch.zeros(1), nan=torch.tensor([float("nan"), 1.0]))  # fmt: skip
    b = save(tmp_path / "b.pth", near=torch.tensor([0.0, 0.25]), far=torch.tensor([-3.0, 1.0]),
             shape=torch.zeros(3), kind=torch.zeros(2).half(), new=torch.zeros(1),
             nan=torch.tensor([float("nan"), 1.0]))  # fmt: skip
    assert tool.main(["diff", a, a]) == 0
    capsys.readouterr()
    assert tool.main(["diff", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"only in {a}: gone",
        f"only in {b}: new",
        "kind: float32 and float16",
        "shape: [2] and [3]",
        "3.000e+00  far",
        "2.500e-01  near",
        "2 tensors agree within 0, 2 do not",
    ]
    only_a, only_b, unlike, gaps = tool.compare(a, b)
    assert (only_a, only_b, len(unlike)) == (["gone"], ["new"], 2)
    assert gaps == [("far", 3.0), ("near", 0.25), ("kind", 0.0), ("nan", 0.0)]


def test_diff_has_a_tolerance_and_sees_numbers_that_are_not_finite(tmp_path):
    a = save(tmp_path / "a.pth", w=torch.tensor([1.0, 2.0]))
    b = save(tmp_path / "b.pth", w=torch.tensor([1.0, 2.125]))
    c = save(tmp_path / "c.pth", w=torch.tensor([1.0, float("nan")]))
    assert tool.main(["diff", a, b]) == 1
    assert tool.main(["diff", a, b, "--tolerance", "0.125"]) == 0
    assert tool.main(["diff", a, c, "--tolerance", "1e9"]) == 1
    assert tool.compare(a, c)[3] == [("w", float("inf"))]


def test_diff_looks_through_the_prefixes_of_wrappers(tmp_path):
    """Trap 16: module. and _orig_mod. in the names."""
    plain = nn.Linear(2, 2).state_dict()
    a = save(tmp_path / "a.pth", **plain)
    b = save(tmp_path / "b.pth", **{f"module._orig_mod.{k}": v for k, v in plain.items()})
    assert tool.main(["diff", a, b]) == 0
    assert tool.main(["diff", b, a]) == 0
