import argparse
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from yacs.config import CfgNode

from models import Backbone, create_model, registry
from models.layers.conv_stem import Affine
from models.layers.resize import (
    resize_bias_table,
    resize_complex_filter,
    resize_position_grid,
)
from models.mixers.plain import _resize_columns
from models.pretrained import (
    LoadReport,
    find_weights,
    has_averaged_weights,
    has_both_weights,
    load_pretrained,
)
from tests.golden_tools import fill_module_
from tests.small_models import SMALL


class Tables(nn.Module):
    """Tables with a spatial meaning, as the lineage calls them."""

    def __init__(self, grid=4, window=4, num_special=1):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, num_special + grid**2, 6))
        self.pos_embed1 = nn.Parameter(torch.randn(1, grid**2, 6))
        self.absolute_pos_embed = nn.Parameter(torch.randn(1, grid**2, 6))
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, 3))
        self.complex_weights = nn.Parameter(torch.randn(grid, grid // 2 + 1, 5, 2))
        self.register_buffer("relative_position_index", torch.full((window**2, 2), window))


class Toy(Backbone):
    def __init__(self, num_classes=5, grids=None, **sizes):
        super().__init__()
        self.num_classes = num_classes
        self.tables = Tables(**sizes)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, num_classes) if num_classes else nn.Identity()
        self.grids = grids or {}

    def get_classifier(self):
        return self.head

    def position_tables(self):
        return self.grids


@pytest.fixture
def trained():
    torch.manual_seed(1)
    return Toy().state_dict()


def is_loaded(model, state, but=()):
    own = model.state_dict()
    return all(torch.equal(own[n], t) for n, t in state.items() if not n.startswith(but))


def prefixed(state, prefix):
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


@pytest.mark.parametrize("container", ["model", "state_dict", None])
@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "encoder.",
        "backbone.",
        "module._orig_mod.",
        "_orig_mod.module.encoder.",
        "model.",
        "backbone.bottom_up.model.",
    ],
)
def test_every_container_and_prefix_loads(tmp_path, trained, container, prefix):
    """Traps 9 and 16: MoBY's `encoder.`, torch.compile's `_orig_mod.`, DDP's `module.`, detectors'."""
    state = prefixed(trained, prefix)
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "x.pth")
    model = Toy()
    report = load_pretrained(model, tmp_path / "x.pth")
    assert is_loaded(model, trained)
    assert report.loaded == len(trained) - 1, "the index is the model's own"
    assert report == LoadReport(report.source, report.loaded), "nothing missing, resized, left out"


@pytest.mark.parametrize("content", [[{"w": torch.ones(1)}], torch.ones(1), None])
def test_a_file_that_holds_no_dict_says_so(tmp_path, trained, content):
    torch.save(content, tmp_path / "list.pth")
    kind = type(content).__name__
    with pytest.raises(ValueError, match=rf"list\.pth holds a {kind}, not a dict of weights"):
        load_pretrained(trained, tmp_path / "list.pth")
    with pytest.raises(ValueError, match=f"given state holds a {kind}, not a dict"):
        load_pretrained(trained, content)


def test_checkpoints_with_their_configs_inside_load(tmp_path, trained):
    """Trap 10: torch >= 2.6 rejects old checkpoints."""
    config = CfgNode({"MODEL": {"TYPE": "toy"}})
    for extra in (
        {"config": config, "max_accuracy": np.float64(81.3), "lr_scheduler": {"t": 1}},
        {"args": argparse.Namespace(lr=0.1, opt_betas=None), "scaler": {}},
    ):
        torch.save({"model": trained} | extra, tmp_path / "x.pth")
        model = Toy()
        load_pretrained(model, tmp_path / "x.pth")
        assert is_loaded(model, trained)


def test_safetensors_load(tmp_path, trained):
    save_file(trained, tmp_path / "x.safetensors")
    model = Toy()
    load_pretrained(model, tmp_path / "x.safetensors")
    assert is_loaded(model, trained)


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema"])
def test_averaged_weights_are_taken_on_request_only(trained, key):
    averaged = {name: tensor + 1 for name, tensor in trained.items()}
    content = {"model": trained, key: {"module": averaged} if key == "ema" else averaged}
    model = Toy()
    load_pretrained(model, content)
    assert is_loaded(model, trained)
    report = load_pretrained(model, content, use_ema=True, name="file.pth")
    assert is_loaded(model, averaged, but=("tables.relative_position_index",))
    assert report.source.startswith(f"file.pth [{key}]")
    assert has_averaged_weights(content)
    assert not has_averaged_weights({"model": trained, key: None})
    for plain in ("model", "state_dict"):
        assert has_both_weights({plain: trained, key: averaged})
    assert not has_both_weights({key: averaged})
    with pytest.raises(ValueError, match=r"no averaged weights.*MODEL\.PRETRAINED_EMA False"):
        load_pretrained(model, {"model": trained}, use_ema=True)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_averaged_weights_without_plain_ones_are_taken_and_it_is_said(trained, key, caplog):
    caplog.set_level("INFO")
    model = Toy()
    report = load_pretrained(model, {key: trained, "epoch": 3}, name="x.pth")
    assert is_loaded(model, trained)
    assert report.source == f"x.pth [{key}]"
    assert f"x.pth has averaged weights only: taking '{key}'" in caplog.text


def test_wrapped_models_are_loaded_inside(trained):
    model = Toy()
    load_pretrained(nn.DataParallel(torch.compile(model, backend="eager")), trained)
    assert is_loaded(model, trained)


def test_tables_of_another_size_are_resampled(trained, caplog):
    """Trap 6: fixed input size."""
    caplog.set_level("INFO")
    model = Toy(grid=6, window=5)
    report = load_pretrained(model, {"model": trained})
    t = {name.removeprefix("tables."): tensor for name, tensor in trained.items()}
    expected = {
        "pos_embed": resize_position_grid(t["pos_embed"], 1, (4, 4), (6, 6)),
        "pos_embed1": resize_position_grid(t["pos_embed1"], 0, (4, 4), (6, 6), "bilinear"),
        "absolute_pos_embed": resize_position_grid(t["absolute_pos_embed"], 0, (4, 4), (6, 6)),
        "relative_position_bias_table": resize_bias_table(
            t["relative_position_bias_table"], (4, 4), (5, 5)
        ),
        "complex_weights": resize_complex_filter(t["complex_weights"], (6, 4)),
    }
    for name, table in expected.items():
        assert torch.equal(model.tables.state_dict()[name], table), name
        assert report.resized[f"tables.{name}"][1] == tuple(table.shape)
    assert len(report.resized) == len(expected)
    assert model.tables.relative_position_index[0, 0] == 5, "constants follow the model"
    assert "resized 5: tables.absolute_pos_embed" in caplog.text
    with pytest.raises(ValueError, match=r"other shapes: .*pos_embed \(1, 16, 6\) instead of"):
        load_pretrained(Toy(grid=6), trained, resize=False)


@pytest.mark.parametrize("num_special", [0, 1, 2])
def test_special_tokens_keep_their_place(num_special):
    state = Toy(num_special=num_special).state_dict()
    model = Toy(num_special=num_special, grid=8)
    load_pretrained(model, state)
    old, new = state["tables.pos_embed"], model.tables.pos_embed
    assert torch.equal(new[:, :num_special], old[:, :num_special])


def test_a_grid_that_is_not_square_is_asked_of_the_model(trained):
    model = Toy(grids={"tables.pos_embed": (1, (2, 16), "bilinear")})
    model.tables.pos_embed = nn.Parameter(torch.zeros(1, 33, 6))
    load_pretrained(model, trained)
    expected = resize_position_grid(trained["tables.pos_embed"], 1, (4, 4), (2, 16), "bilinear")
    assert torch.equal(model.tables.pos_embed, expected)
    model.grids = {}
    with pytest.raises(ValueError, match="pos_embed"):
        load_pretrained(model, trained)


@pytest.mark.parametrize("name", ["swin", "swinv2", "dfvt"])
def test_absolute_positions_follow_images_that_are_not_square(name):
    sizes = dict(embed_dim=24, depths=(1, 1), num_heads=(2, 2), window_size=2, ape=True)
    if name == "swinv2":
        sizes["pretrained_window_sizes"] = (0, 0)
    build = registry.find(name).cls
    source = build(img_size=64, **sizes)
    # The second has as many positions as the source: only the file's config tells the grids apart.
    for size, grid, beside in (
        ([32, 64], (8, 16), {}),
        ([32, 128], (8, 32), {"config": "DATA: {IMG_SIZE: 64}"}),
    ):
        model = build(img_size=size, **sizes)
        load_pretrained(model, {"model": source.state_dict()} | beside)
        expected = resize_position_grid(source.absolute_pos_embed, 0, (16, 16), grid)
        torch.testing.assert_close(model.absolute_pos_embed, expected)
    again = build(img_size=size, **sizes)
    load_pretrained(again, {"model": model.state_dict(), "config": f"DATA: {{IMG_SIZE: {size}}}"})
    assert torch.equal(again.absolute_pos_embed, model.absolute_pos_embed)
    assert build(img_size=64, **sizes | {"ape": False}).position_tables() == {}


@pytest.mark.parametrize("form", [dict, str], ids=["of the lineage", "of MixLab"])
@pytest.mark.parametrize("grid", [(2, 8), (2, 6)], ids=["as many as 4x4", "no square"])
def test_a_grid_that_is_not_square_is_read_from_the_files_config(trained, grid, form):
    positions = torch.randn(1, 1 + grid[0] * grid[1], 6)
    wide = dict(trained) | {"tables.pos_embed": positions}
    config = {"DATA": {"IMG_SIZE": [16 * grid[0], 16 * grid[1]]}}
    model = Toy(grid=5)
    with pytest.raises(ValueError, match=r"pos_embed1 .* nor one of DATA\.IMG_SIZE"):
        load_pretrained(
            model,
            {"model": wide | {"tables.pos_embed1": torch.randn(1, 7, 6)}, "config": form(config)},
        )
    load_pretrained(model, {"model": wide, "config": form(config)})
    expected = resize_position_grid(positions, 1, grid, (5, 5))
    torch.testing.assert_close(model.tables.pos_embed, expected)


def test_a_grid_that_is_neither_square_nor_known_is_refused(trained):
    wide = dict(trained) | {"tables.pos_embed": torch.randn(1, 13, 6)}
    for config in ({}, {"config": "A: ["}, {"config": None}, {"config": {"DATA": {}}}):
        with pytest.raises(ValueError, match=r"tables\.pos_embed \(1, 13, 6\) .* DATA\.IMG_SIZE"):
            load_pretrained(Toy(), {"model": wide} | config)


def random_mixing(img_size):
    """One stage at stride 4 whose mixer is a fixed random matrix."""
    sizes = dict(mixers=("random",), depths=(1,), embed_dims=(8,), res_scale=(None,), num_classes=3)
    torch.manual_seed(sum(img_size))
    return registry.find("metaformer").cls(img_size=img_size, **sizes).eval()


MATRIX = "stages.0.0.token_mixer.random_matrix"


@pytest.mark.parametrize("built", [(32, 32), (12, 12), (20, 44)])
@pytest.mark.parametrize("size", [(24, 24), (16, 40), (64, 16)])
def test_a_random_matrix_follows_the_size_as_it_does_at_run_time(built, size):
    """The last size has as many positions as the first: only the file's config tells the grids apart."""
    source, model = random_mixing(built), random_mixing(size)
    config = {"config": {"DATA": {"IMG_SIZE": list(built)}}}
    report = load_pretrained(model, {"model": source.state_dict()} | config)
    assert list(report.resized) == [MATRIX]
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(random_mixing(size)(x), source(x), atol=1e-4)
    with pytest.raises(ValueError, match=rf"other shapes: {MATRIX}"):
        load_pretrained(model, {"model": source.state_dict()} | config, resize=False)


def test_a_random_matrix_of_an_unknown_grid():
    wide = random_mixing((20, 44)).state_dict()
    for size in ((24, 24), (44, 16)):
        with pytest.raises(ValueError, match=r"neither square nor one of DATA\.IMG_SIZE .* save"):
            load_pretrained(random_mixing(size), wide)
    # As many positions as this model's, and nothing says that they lie otherwise.
    assert load_pretrained(random_mixing((20, 44)), wide).resized == {}
    with pytest.raises(ValueError, match=rf"{MATRIX} \(3,\) instead of") as error:
        load_pretrained(random_mixing((24, 24)), wide | {MATRIX: torch.zeros(3)})
    assert "neither square" not in str(error.value)


def test_other_token_or_head_counts_are_not_resampled(trained):
    with pytest.raises(ValueError, match=r"pos_embed \(1, 17, 6\) instead of \(1, 18, 6\)"):
        load_pretrained(Toy(num_special=2), trained)
    wide = Toy(window=5)
    wide.tables.relative_position_bias_table = nn.Parameter(torch.zeros(81, 4))
    with pytest.raises(ValueError, match="relative_position_bias_table"):
        load_pretrained(wide, trained)


def test_a_classifier_of_other_classes_stays_fresh(trained, caplog):
    """Trap 5: number of classes is hard-coded."""
    caplog.set_level("INFO")
    model = Toy(num_classes=7)
    fresh = model.head.weight.clone()
    report = load_pretrained(model, trained)
    assert torch.equal(model.head.weight, fresh)
    assert is_loaded(model, trained, but=("head",))
    assert report.head_replaced == ["head.bias", "head.weight"]
    assert "classifier not taken from the file: head.bias, head.weight" in caplog.text
    with pytest.raises(
        ValueError,
        match=r"not fit: head\.bias.*has 5 classes, the model's 7; set MODEL.NUM_CLASSES 5",
    ):
        load_pretrained(model, trained, new_head=False)


def rows_are_numbered(model, name="head"):
    """The weights of a model whose classifier has row i filled with i."""
    numbers = torch.arange(float(model.num_classes))
    weight = numbers[:, None].expand(-1, 6).clone()
    return model.state_dict() | {f"{name}.weight": weight, f"{name}.bias": numbers}


def test_a_classifier_for_imagenet_22k_gives_the_rows_of_imagenet_1k(caplog):
    caplog.set_level("INFO")
    model = Toy(num_classes=1000)
    report = load_pretrained(model, rows_are_numbered(Toy(num_classes=21841)))
    assert report.remapped == {
        "head.bias": ((21841,), (1000,)),
        "head.weight": ((21841, 6), (1000, 6)),
    }
    assert report.head_replaced == []
    all_names = ImageNetInfo("imagenet-22k").label_names()
    names = ImageNetInfo("imagenet-1k").label_names()
    taken = [all_names[int(row)] for row in model.head.bias]
    assert torch.equal(model.head.weight, model.head.bias[:, None].expand(-1, 6))
    different = {own: other for own, other in zip(names, taken, strict=True) if own != other}
    assert different == {"n04399382": "n03013580"}, "the teddy bear, which ImageNet-22k lacks"
    # As in Swin's published list; after these that one counts classes that the file does not have.
    assert [int(model.head.bias[i]) for i in (0, 1, 717, 850)] == [359, 368, 9204, 5564]
    assert "remapped to the rows of ImageNet-1k: head.bias, head.weight; the one" in caplog.text
    assert "ImageNet-22k lacks, n04399382, has that of n03013580" in caplog.text


def test_of_a_classifier_for_imagenet_22k_with_hidden_layers_the_last_is_remapped():
    def deep(num_classes):
        model = Toy(num_classes)
        model.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, num_classes))
        return model

    state, model = rows_are_numbered(deep(21841), "head.1"), deep(1000)
    report = load_pretrained(model, state)
    assert list(report.remapped) == ["head.1.bias", "head.1.weight"]
    assert torch.equal(model.head[0].weight, state["head.0.weight"])
    assert model.head[1].bias[0] == 359


@pytest.mark.parametrize(("theirs", "ours"), [(21841, 999), (21843, 1000), (1000, 21841)])
def test_no_other_class_counts_are_remapped(theirs, ours):
    model = Toy(num_classes=ours)
    fresh = model.head.weight.clone()
    report = load_pretrained(model, rows_are_numbered(Toy(num_classes=theirs)))
    assert (report.remapped, report.head_replaced) == ({}, ["head.bias", "head.weight"])
    assert torch.equal(model.head.weight, fresh)


def test_the_two_classifiers_of_a_distilled_student_are_not_remapped():
    sizes = dict(img_size=16, embed_dim=8, depth=1, num_heads=2, distilled=True)
    build = registry.find("deit").cls
    model = build(num_classes=1000, **sizes)
    report = load_pretrained(model, build(num_classes=21841, **sizes).state_dict())
    assert report.remapped == {}
    assert {name.split(".")[0] for name in report.head_replaced} == {"head", "head_dist"}


def test_a_classifier_is_not_remapped_for_evaluation():
    state = rows_are_numbered(Toy(num_classes=21841))
    with pytest.raises(ValueError, match=r"has 21841 classes, the model's 1000; set MODEL"):
        load_pretrained(Toy(num_classes=1000), state, new_head=False)


def test_of_a_classifier_with_hidden_layers_only_the_last_tells_its_classes(trained):
    def deep(num_classes):
        model = Toy()
        model.head = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, num_classes))
        return model

    with pytest.raises(ValueError, match=r"has 4 classes, the model's 7; set MODEL\.NUM_CLASSES 4"):
        load_pretrained(deep(7), deep(4).state_dict(), new_head=False)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_first_convolution_for_rgb_serves_other_channels(channels, caplog):
    """Grey images give what the same images in three channels give."""
    caplog.set_level("INFO")
    sizes = dict(embed_dim=8, depths=(1,), num_heads=(2,), window_size=2, img_size=16)
    source = registry.find("swin").cls(**sizes).eval()
    model = registry.find("swin").cls(**sizes, in_chans=channels).eval()
    report = load_pretrained(model, {"model": source.state_dict()})
    name = "patch_embed.proj.weight"
    assert report.adapted == {name: ((8, 3, 4, 4), (8, channels, 4, 4))}
    assert f"adapted to the channels of the images: {name}" in caplog.text
    old, new = source.patch_embed.proj.weight, model.patch_embed.proj.weight
    if channels == 1:
        x = torch.rand(2, 1, 16, 16)
        torch.testing.assert_close(model(x), source(x.expand(-1, 3, -1, -1)))
    else:
        expected = torch.cat([old, old], dim=1)[:, :channels] * 3 / channels
        torch.testing.assert_close(new, expected)
    with pytest.raises(
        ValueError, match=r"proj\.weight \(8, 3, 4, 4\) instead of.*MODEL\.IN_CHANS"
    ):
        load_pretrained(model, source.state_dict(), new_head=False)


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_an_affine_map_before_the_first_convolution_serves_other_channels(channels):
    sizes = dict(embed_dim=8, depth=1, num_heads=2, patch_size=4, num_classes=5)
    build = registry.find("dhvt").cls
    source, model = build(**sizes).eval(), build(**sizes, in_chans=channels).eval()
    affine, stem = "patch_embed.pre_affine.", "patch_embed.proj.0.0.weight"
    with torch.no_grad():
        source.patch_embed.pre_affine.alpha.fill_(0.7)
        source.patch_embed.pre_affine.beta.fill_(-0.3)
    report = load_pretrained(model, source.state_dict())
    assert set(report.adapted) == {affine + "alpha", affine + "beta", stem}
    if channels == 1:
        x = torch.rand(2, 1, 16, 16)
        torch.testing.assert_close(model(x), source(x.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r"pre_affine\.alpha \(1, 3, 1, 1\) instead of"):
        load_pretrained(model, source.state_dict(), new_head=False)
    with torch.no_grad():
        source.patch_embed.pre_affine.alpha.copy_(torch.tensor([1.0, 2, 6]).view(1, 3, 1, 1))
    load_pretrained(model, source.state_dict())
    expected = {1: [3], 4: [1, 2, 6, 1], 7: [1, 2, 6, 1, 2, 6, 1]}[channels]
    assert model.patch_embed.pre_affine.alpha.flatten().tolist() == expected


def test_no_other_affine_map_is_adapted():
    source, model = (nn.Sequential(nn.Conv2d(3, 4, 1), Affine(dim)) for dim in (3, 5))
    with pytest.raises(ValueError, match=r"1\.alpha \(1, 3, 1, 1\) instead of \(1, 5, 1, 1\)"):
        load_pretrained(model, source.state_dict())


@pytest.mark.parametrize("distilled", [False, True])
def test_another_number_of_special_tokens_is_named(distilled):
    build = partial(registry.find("deit").cls, img_size=64, embed_dim=8, depth=1, num_heads=2)
    ours, theirs = 1 + distilled, 2 - distilled
    with pytest.raises(
        ValueError,
        match=rf"file's table has {theirs} before its grid, the model's {ours} .*DEIT\.DISTILLED",
    ) as error:
        load_pretrained(build(distilled=distilled), build(distilled=not distilled).state_dict())
    assert "neither square" not in str(error.value)


def test_a_file_may_lack_the_counts_of_batch_norms():
    source, model = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    source(torch.rand(2, 3, 4, 4))
    state = {n: t for n, t in source.state_dict().items() if "num_batches" not in n}
    report = load_pretrained(model, state)
    assert (report.missing, report.loaded) == ([], len(state))
    torch.testing.assert_close(model[1].running_mean, source[1].running_mean)
    with pytest.raises(ValueError, match=r"missing 1: 1\.running_mean"):
        load_pretrained(model, {n: t for n, t in state.items() if "mean" not in n})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_resized_tables_keep_the_digits_of_their_type(dtype):
    third = torch.full((64, 1), 1 / 3, dtype=dtype)
    for table in (
        resize_position_grid(third[None], 0, (8, 8), (13, 13)),
        resize_bias_table(third[:49], (4, 4), (7, 7)),
        _resize_columns(third.t(), (8, 8), (13, 13)).to(dtype),
    ):
        assert table.dtype == dtype
        expected = third[0].expand(table.shape)
        torch.testing.assert_close(table, expected, rtol=16 * torch.finfo(dtype).eps, atol=0)


def test_only_rgb_stems_of_the_same_kernel_are_adapted():
    build = registry.find("swin").cls
    sizes = dict(embed_dim=8, depths=(1,), num_heads=(2,), window_size=2, img_size=16)
    for changes in (dict(in_chans=4), dict(patch_size=2)):
        with pytest.raises(ValueError, match=r"other shapes: patch_embed\.proj\.weight"):
            load_pretrained(build(**sizes, in_chans=1), build(**sizes | changes).state_dict())


def test_a_file_without_classifier_starts_a_fresh_one(trained):
    body = {name: t for name, t in trained.items() if not name.startswith("head")}
    assert load_pretrained(Toy(), body).head_replaced == ["head.bias", "head.weight"]
    with pytest.raises(
        ValueError, match=r"classifier does not fit.*has none; train a new one first"
    ):
        load_pretrained(Toy(), body, new_head=False)


def test_a_model_without_classifier_leaves_the_files_out(trained):
    model = Toy(num_classes=0)
    report = load_pretrained(model, trained, new_head=False)
    assert is_loaded(model, trained, but=("head",)) is True
    assert report.head_replaced == ["head.bias", "head.weight"]


def test_names_that_do_not_match_are_refused_unless_asked_for(trained):
    """Trap 9: silent strict=False hides that pretrained keys do not match."""
    state = dict(trained)
    state["norm.w3ight"] = state.pop("norm.weight")
    model = Toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"missing 1: norm\.weight.*unexpected 1: norm\.w3ight.*"
        r"meant to be one of \['norm\.weight'\]\. Check .*PARTIAL True",
    ):
        load_pretrained(model, state)
    assert is_loaded(model, before), "nothing is loaded before everything fits"
    report = load_pretrained(model, state, allow_partial=True)
    assert (report.missing, report.unexpected) == (["norm.weight"], ["norm.w3ight"])
    assert is_loaded(model, trained, but=("norm.weight",))
    assert "not in the file, fresh: norm.weight" in str(report)


def test_other_shapes_are_refused_unless_asked_for(trained):
    state = dict(trained) | {"norm.weight": torch.ones(9)}
    with pytest.raises(ValueError, match=r"other shapes: norm\.weight \(9,\) instead of \(6,\)"):
        load_pretrained(Toy(), state)
    report = load_pretrained(Toy(), state, allow_partial=True)
    assert report.missing == ["norm.weight"]


def test_a_file_of_another_model_is_refused_even_if_partial_loads_are_asked_for():
    with pytest.raises(ValueError, match=r"no tensor of this model: it has conv1\.weight"):
        load_pretrained(Toy(), {"conv1.weight": torch.ones(1)}, allow_partial=True)
    with pytest.raises(ValueError, match="no tensor fits"):
        load_pretrained(Toy(), {"norm.weight": torch.ones(1)}, allow_partial=True)


def test_files_without_weights_say_what_they_have():
    averaged = {"w": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"only ema, epoch, model_ema; MODEL\.PRETRAINED_EMA True takes the first"
    ):
        load_pretrained(Toy(), {"epoch": 1, "model_ema": averaged, "ema": averaged})
    with pytest.raises(ValueError, match="no tensor, only "):
        load_pretrained(Toy(), {"model": {}})
    with pytest.raises(ValueError, match=r"\['student', 'teacher'\] hold tensors: choose one"):
        load_pretrained(Toy(), {"teacher": averaged, "student": averaged, "epoch": 1})
    with pytest.raises(ValueError, match="holds a list"):
        find_weights([torch.ones(1)])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("convert", "kind"),
    [
        (Tensor.to_sparse, "torch.sparse_coo"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "quantized"),
    ],
)
def test_numbers_in_other_forms_are_named(trained, convert, kind):
    name = next(name for name, tensor in trained.items() if tensor.is_floating_point())
    with pytest.raises(ValueError, match=f"{name} is {kind}, models hold plain numbers"):
        load_pretrained(Toy(), trained | {name: convert(trained[name])})


def test_two_tensors_with_one_name_are_refused(trained):
    both = prefixed(trained, "encoder.") | prefixed(trained, "backbone.")
    with pytest.raises(ValueError, match=r"are both 'tables\.pos_embed' without their prefixes"):
        load_pretrained(Toy(), both)


def test_a_momentum_encoder_beside_the_encoder_is_left_out(trained):
    """Trap 9: MoBY saves `encoder.` and `encoder_k.` side by side."""
    both = prefixed(trained, "encoder.") | prefixed(trained, "encoder_k.")
    with pytest.raises(ValueError, match=r"unexpected \d+: encoder_k\."):
        load_pretrained(Toy(), both)
    model = Toy()
    load_pretrained(model, both, allow_partial=True)
    assert is_loaded(model, trained)


def test_half_precision_weights_become_the_models(trained):
    model = Toy()
    load_pretrained(
        model, {n: t.half() if t.is_floating_point() else t for n, t in trained.items()}
    )
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.tables.pos_embed, trained["tables.pos_embed"].half().float())


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "deit_dge_s124_tiny_patch16_256",
        "dfformer_s18",
        "pvt_tiny_256",
    ],
)
def test_a_model_without_memory_tells_what_does_not_fit_and_warns_of_nothing(name):
    """What main.py does before a run."""
    state = create_model(name).state_dict()
    with torch.device("meta"):
        model, other = create_model(name), create_model(name, num_classes=7)
    assert load_pretrained(model, dict(state), new_head=False).loaded > 50
    with pytest.raises(ValueError, match="the classifier does not fit"):
        load_pretrained(other, dict(state), new_head=False)
    with pytest.raises(ValueError, match="unexpected 1: surplus"):
        load_pretrained(other, state | {"surplus": torch.zeros(1)})
    assert load_pretrained(other, dict(state)).head_replaced


@pytest.mark.parametrize("family", ["swin", "swinv2", "dfvt", "deit_dge"])
def test_a_model_without_memory_runs_with_the_tensors_of_the_file(family):
    name, sizes = SMALL[family]
    source = fill_module_(create_model(name, **sizes))
    counters = ("num_batches_tracked", "splits")  # a file may lack them
    state = {n: t for n, t in source.state_dict().items() if not n.endswith(counters)}
    with torch.device("meta"):
        model = create_model(name, **sizes)
        load_pretrained(model, dict(state))
    learned = [name for name, _ in source.named_parameters()]
    assert all(model.get_parameter(n).data_ptr() == state[n].data_ptr() for n in learned)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 3, sizes["img_size"], sizes["img_size"])
    for training in (True, False):
        outputs = []
        for net in (source, model):
            torch.manual_seed(0)
            outputs.append(net.train(training)(x))
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
