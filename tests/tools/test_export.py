"""Exported files give the numbers of the model they were made of, at batch sizes they were not made with.

Networks are shallow and images small: exporters take seconds per block, and blocks are alike. Export and
TorchScript are checked for every architecture; ONNX, ten times slower, for those that are built from
different operations.
"""

import copy
import json

import pytest
import torch

from models import create_model, registry
from models.layers.fourier import set_fourier_way
from models.layers.grained import GrainedQueries, Router
from models.metaformer import MetaFormer
from tests.golden_tools import fill_module_, relative_error
from tools import export

# A published variant, what makes it small, and the image size; one per architecture and Fourier mixer.
ONE_BLOCK = dict(depths=(1, 1, 1, 1))
TWO_STAGES = dict(depths=(1, 1), embed_dims=(32, 64), res_scale=(None, 1.0))
CASES = {
    "deit_tiny_distilled_patch16_224": (dict(depth=1), 64),
    "evit_tiny_r07_fuse": (dict(depth=2, drop_loc=(0, 1)), 64),
    "dhvt_tiny_cifar_patch4": (dict(depth=1), 32),
    "deit_dge_s124_tiny_patch16_256": (dict(depth=1), 96),
    "pvt_tiny_256": (ONE_BLOCK, 64),
    "pvt_dge_s124_tiny_256": (ONE_BLOCK, 64),
    "dpvt_tiny_256": (ONE_BLOCK, 64),
    "dilateformer_tiny": (ONE_BLOCK, 64),
    "dfvt_tiny": (dict(depths=(2, 1), num_heads=(3, 6)), 64),
    "swin_tiny_patch4_window7_224": (dict(depths=(2, 1), num_heads=(3, 6)), 64),
    "swinv2_tiny_patch4_window8_256": (
        dict(depths=(2, 1), num_heads=(3, 6), pretrained_window_sizes=(0, 0)),
        64,
    ),
    "swin_mlp_tiny_c6_patch4_window8_256": (dict(depths=(2, 1), num_heads=(16, 32)), 64),
    "dfformer_s18": (dict(**TWO_STAGES, mixers=("dynamic_filter",) * 2), 64),
    "gfformer_s18": (dict(**TWO_STAGES, mixers=("global_filter",) * 2), 64),
    "dfformer_s18_afno": (dict(**TWO_STAGES, mixers=("afno",) * 2), 64),
}
ONNX_CASES = (
    "dhvt_tiny_cifar_patch4",  # folded norms, depth-wise convolutions, head tokens
    "evit_tiny_r07_fuse",  # top-k, gather, scatter
    "deit_dge_s124_tiny_patch16_256",  # gates, index tables
    "dpvt_tiny_256",  # bilinear samples
    "swin_tiny_patch4_window7_224",  # roll, windows, masks
    "gfformer_s18",  # Fourier transforms
)


def build(name, **others):
    overrides, size = CASES[name]
    model = create_model(name, num_classes=7, img_size=size, **{**overrides, **others})
    return fill_module_(model).eval()


def example(name):
    size = CASES[name][1]
    return torch.zeros(2, 3, size, size)


def test_every_architecture_is_checked():
    types = {type(build(name)) for name in CASES}
    assert types == {entry.cls for entry in registry.entries()}


@pytest.mark.parametrize("name", CASES)
def test_program_and_torchscript_give_the_models_logits_at_other_batch_sizes(name, tmp_path):
    if name.startswith("swin_mlp") and torch.__version__.startswith("2.11"):
        pytest.skip("PyTorch 2.11 wants to know which of 6 and 48 times the batch is the smaller")
    report = export.export_model(
        build(name), example(name), ["export", "torchscript"], tmp_path, name
    )
    for entry in report["formats"].values():
        assert entry["relative_error"] < 1e-5
        assert [shape[0] for shape in entry["checked"]] == [1, 3]
        assert entry["size_mib"] == pytest.approx(
            (tmp_path / entry["file"]).stat().st_size / 2**20, abs=1e-3
        )
    assert json.loads((tmp_path / "export.json").read_text()) == report


@pytest.mark.slow
@pytest.mark.parametrize("name", ONNX_CASES)
def test_onnx_gives_the_models_logits_at_other_batch_sizes(name, tmp_path):
    pytest.importorskip("onnxruntime")
    report = export.export_model(build(name), example(name), ["onnx"], tmp_path, name)
    assert report["formats"]["onnx"]["relative_error"] < 1e-4
    assert (tmp_path / f"{name}.onnx").is_file()


# Mixers that run a block for other rows than all tokens.
LAB_MIXERS = [
    f"{mixer}({option})"
    for mixer in ("attention", "head_token", "spatial_reduction")
    for option in ("keep_rate=0.6", "grained=True")
]


def lab_frame(mixer):
    """One stage of two blocks on 8x8 tokens, whose routers choose several granularities."""
    torch.manual_seed(0)
    model = MetaFormer(
        mixers=[mixer], depths=(2,), embed_dims=(16,), head_dim=8, res_scale=(1.0,), img_size=32
    )
    fill_module_(model)
    for router in (m for m in model.modules() if isinstance(m, Router)):
        router.gate.weight.data.mul_(50)
        router.gate.bias.data.zero_()
    return model.eval()


@pytest.mark.parametrize("mixer", LAB_MIXERS)
def test_lab_mixers_with_chosen_queries_are_exported(mixer, tmp_path):
    model = lab_frame(mixer)
    report = export.export_model(
        model, torch.zeros(2, 3, 32, 32), ["export", "torchscript"], tmp_path
    )
    for entry in report["formats"].values():
        assert entry["relative_error"] < 1e-5
    model(torch.randn(3, 3, 32, 32))
    (chosen,) = model.token_maps().values()
    assert len(chosen.unique()) > 1, "the blocks must choose, or nothing is compared"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer",
    ["attention(grained=True)", "head_token(keep_rate=0.6)", "spatial_reduction(keep_rate=0.6)"],
)
def test_lab_mixers_with_chosen_queries_are_exported_to_onnx(mixer, tmp_path):
    pytest.importorskip("onnxruntime")
    report = export.export_model(lab_frame(mixer), torch.zeros(2, 3, 32, 32), ["onnx"], tmp_path)
    assert report["formats"]["onnx"]["relative_error"] < 1e-4


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_distilled_patch16_224", "dhvt_tiny_cifar_patch4", "pvt_tiny_256"],
)
def test_files_for_any_size_take_the_models_own_and_others(name, tmp_path):
    model = build(name)
    report = export.export_model(
        model, example(name), ["export", "torchscript"], tmp_path, name, dynamic_size=True
    )
    step, size = report["size_multiple_of"], CASES[name][1]
    program = torch.export.load(tmp_path / f"{name}.pt2").module()
    for sides in [(size, size), (size + 2 * step, size), (2 * step, 3 * step)]:
        images = torch.randn(2, 3, *sides)
        assert relative_error(program(images), model(images).detach()) < 1e-5


@pytest.mark.slow
def test_onnx_for_any_size_resizes_the_positions(tmp_path):
    pytest.importorskip("onnxruntime")
    name = "deit_tiny_distilled_patch16_224"
    report = export.export_model(
        build(name), example(name), ["onnx"], tmp_path, name, dynamic_size=True
    )
    entry = report["formats"]["onnx"]
    assert len({tuple(shape[2:]) for shape in entry["checked"]}) == 2
    assert entry["relative_error"] < 1e-4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("evit_tiny_r07_fuse", "drops tokens"),
        ("swin_tiny_patch4_window7_224", "WindowAttention"),
        ("swin_mlp_tiny_c6_patch4_window8_256", "WindowMlp"),
        ("deit_dge_s124_tiny_patch16_256", "GrainedQueries"),
        ("dpvt_tiny_256", "PointSampledAttention"),
        ("gfformer_s18", "GlobalFilter"),
    ],
)
def test_a_model_that_is_planned_per_size_refuses_any_size(name, reason, tmp_path):
    with pytest.raises(ValueError, match=f"{reason}.*DATA.IMG_SIZE"):
        export.export_model(
            build(name), example(name), ["export"], tmp_path, name, dynamic_size=True
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mixer", LAB_MIXERS)
def test_chosen_queries_refuse_any_size(mixer, tmp_path):
    reason = "how many tokens it keeps" if "keep_rate" in mixer else "GrainedQueries.*index tables"
    with pytest.raises(ValueError, match=f"{reason}.*DATA.IMG_SIZE"):
        export.export_model(
            lab_frame(mixer), torch.zeros(2, 3, 32, 32), ["export"], tmp_path, dynamic_size=True
        )


def test_the_model_itself_is_not_changed(tmp_path):
    name = "deit_dge_s124_tiny_patch16_256"
    model = build(name).train()
    before = copy.deepcopy(model.state_dict())
    export.export_model(model, example(name), ["export"], tmp_path)
    assert model.training
    assert not any(m.dense_evaluation for m in model.modules() if isinstance(m, GrainedQueries))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deit_dge_s124_tiny_patch16_256", "pvt_dge_s124_tiny_256"])
def test_all_candidates_weighted_by_the_gates_give_the_sparse_logits(name):
    model, images = build(name), torch.randn(3, 3, 96, 96)
    sparse = model(images)
    grains = torch.cat([g.flatten() for k, g in model.token_maps().items() if k[:5] == "grain"])
    assert len(grains.unique()) > 1, (
        "the routers must choose several grains, or nothing is compared"
    )
    dense = export.prepare(model)
    assert relative_error(dense(images), sparse) < 1e-5


def test_a_wrong_file_is_reported_with_its_error(tmp_path, monkeypatch):
    name = "gfformer_s18"

    def forget_a_filter(model, way):
        set_fourier_way(model, way)
        with torch.no_grad():
            model.stages[0][0].token_mixer.complex_weights.zero_()

    monkeypatch.setattr(export, "set_fourier_way", forget_a_filter)
    with pytest.raises(export.ExportError, match="differs from the model"):
        export.export_model(build(name), example(name), ["torchscript"], tmp_path)


@pytest.mark.parametrize(
    ("formats", "batch", "message"),
    [(["coreml"], 2, "coreml.*torchscript"), ([], 2, "choose"), (["export"], 1, "two images")],
)
def test_requests_that_cannot_be_met_are_named(formats, batch, message, tmp_path):
    model = build("dhvt_tiny_cifar_patch4")
    with pytest.raises(ValueError, match=message):
        export.export_model(model, torch.zeros(batch, 3, 32, 32), formats, tmp_path)


def test_missing_onnx_packages_come_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        export.export_model(
            build("dhvt_tiny_cifar_patch4"), torch.zeros(2, 3, 32, 32), ["onnx"], tmp_path
        )


def test_the_program_exports_the_weights_it_is_given(tmp_path, capsys):
    model = fill_module_(create_model("dhvt_tiny_cifar_patch4", depth=1)).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    words = "--cfg configs/dhvt/dhvt_tiny_cifar_patch4.yaml --format export --resume"
    opts = ["--opts", "MODEL.DHVT.DEPTH", "1", "MODEL.NUM_CLASSES", str(model.num_classes)]
    folder = ["--output", str(tmp_path)]
    export.main([*words.split(), str(tmp_path / "weights.pth"), *folder, *opts])
    (path,) = tmp_path.glob("*.pt2")
    assert path.name in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.load(path).module()
    assert relative_error(program(images).detach(), model(images).detach()) < 1e-5
    assert "export" in json.loads((tmp_path / "export.json").read_text())["formats"]


def test_the_program_says_why_it_refuses(tmp_path, capsys):
    words = "--cfg configs/swin/swin_tiny_patch4_window7_224.yaml --dynamic-size --format export --output"
    opts = ["--opts", "MODEL.SWIN.EMBED_DIM", "12", "MODEL.SWIN.DEPTHS", "[1,1,1,1]"]
    with pytest.raises(SystemExit, match="2"):
        export.main([*words.split(), str(tmp_path), *opts])
    assert "any size" in capsys.readouterr().err


def test_a_detector_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        export.main(["--cfg", "configs/_base_/smoke_det.yaml", "--output", str(tmp_path / "files")])
    assert "TASK='detection' must be 'classification'" in capsys.readouterr().err
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize("fold", [False, True])
def test_folded_files_hold_no_batch_norm(fold, tmp_path):
    name = "dfvt_tiny"
    report = export.export_model(build(name), example(name), ["export"], tmp_path, name, fold=fold)
    program = torch.export.load(tmp_path / f"{name}.pt2")
    assert ("batch_norm" in str(program.graph)) != fold
    assert report["folded"] is fold
    assert report["formats"]["export"]["relative_error"] < 1e-5
