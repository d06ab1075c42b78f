"""Weights of classifiers, of other people's detectors and of our own start a model for dense tasks."""

import pytest
import torch
from torch import nn

from models import create_model
from models.backbone import CONSTANT_BUFFERS
from models.heads import DenseModel
from models.heads.dense import pyramid_of
from models.layers.resize import (
    resize_bias_table,
    resize_complex_filter,
    resize_position_grid,
)
from models.pretrained import load_pretrained
from tests.small_models import SMALL

# Those with one map, with several, with position tables, bias tables, filters, class tokens, batch norms.
FAMILIES = [
    "deit",
    "dhvt",
    "dilateformer",
    "dfvt",
    "swin",
    "swinv2",
    "pvt",
    "dpvt",
    "pvt_dge",
    "dfformer",
]


class Head(nn.Module):
    """One convolution per map, and a classifier with `rows` rows per class."""

    needs_masks = False

    def __init__(self, features, num_classes, rows=1, branch=False, width=8):
        super().__init__()
        self.num_classes = num_classes
        self.laterals = nn.ModuleList(nn.Conv2d(info["channels"], width, 1) for info in features)
        self.classifier = nn.Conv2d(width, rows * num_classes, 1)
        if branch:
            self.branch = nn.Conv2d(width, width, 1)


class OtherHead(Head):
    def __init__(self, features, num_classes):
        super().__init__(features, num_classes)
        self.tower = nn.Conv2d(8, 8, 1)
        del self.laterals[0]


def small(name, **keywords):
    variant, sizes = SMALL[name]
    return create_model(variant, **(sizes | keywords))


def dense(name, num_classes=3, head=Head, seed=1, options=(), **keywords):
    torch.manual_seed(seed)
    backbone = small(name, num_classes=0, **keywords)
    pyramid, features = pyramid_of(backbone)
    return DenseModel(backbone, pyramid, head(features, num_classes, **dict(options)), "detection")


def classifier(name, **keywords):
    torch.manual_seed(2)
    return small(name, num_classes=7, **keywords)


def is_constant(name):
    return name.rpartition(".")[2] in CONSTANT_BUFFERS


def under(state, *prefixes):
    return {name for name in state if name.startswith(prefixes)}


def equal(model, state, names):
    own = model.state_dict()
    return all(torch.equal(own[name], state[name]) for name in names)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifier_starts_the_backbone(name, caplog):
    caplog.set_level("INFO")
    model, weights = dense(name), classifier(name).state_dict()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load_pretrained(model, weights)
    own = model.state_dict()
    shared = {key for key in weights if f"backbone.{key}" in own and not is_constant(key)}
    assert report.loaded == len(shared)
    # DFvT's windows are not made smaller on small maps of dense tasks.
    resized = {key.removeprefix("backbone.") for key in report.resized}
    assert bool(resized) is (name == "dfvt")
    assert all(torch.equal(own[f"backbone.{key}"], weights[key]) for key in shared - resized)
    heads = under(own, "head.", "pyramid.")
    assert equal(model, before, heads)
    assert heads <= set(report.missing)
    assert report.fresh_head == sorted(heads)
    assert report.head_replaced
    assert all(key.startswith("backbone.head") for key in report.head_replaced)
    differing = tuple(f"backbone.{prefix}" for prefix in model.backbone.dense_differences())
    assert all(key.startswith(differing) for key in set(report.missing) - heads)
    assert "classifier not taken from the file: backbone.head" in caplog.text
    assert "not in the file, fresh:" in caplog.text


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.module.{}", "encoder.{}", "backbone.{}"])
def test_prefixes_of_wrappers_come_off(wrap):
    model, weights = dense("dfvt"), classifier("dfvt").state_dict()
    report = load_pretrained(model, {wrap.format(key): tensor for key, tensor in weights.items()})
    assert torch.equal(model.backbone.patch_embed.norm.weight, weights["patch_embed.norm.weight"])
    plain = load_pretrained(dense("dfvt"), weights)
    assert report.loaded == plain.loaded > 250


def test_tables_follow_the_images_of_the_task():
    sizes = dict(img_size=[128, 192])
    state = classifier("deit").state_dict()
    model = dense("deit", **sizes)
    report = load_pretrained(model, state)
    positions = resize_position_grid(state["pos_embed"], 1, (4, 4), (8, 12))
    assert torch.equal(model.backbone.pos_embed, positions)
    assert report.resized == {"backbone.pos_embed": ((1, 17, 32), (1, 97, 32))}

    state = classifier("pvt").state_dict()
    model = dense("pvt", **sizes)
    load_pretrained(model, state)
    for stage, side in enumerate((16, 8, 4), 1):
        own = model.backbone.get_parameter(f"pos_embed{stage}")
        grid = (128 // 2 ** (stage + 1), 192 // 2 ** (stage + 1))
        old = state[f"pos_embed{stage}"]
        assert torch.equal(own, resize_position_grid(old, 0, (side, side), grid, "bilinear"))
    last = resize_position_grid(state["pos_embed4"], 1, (2, 2), (4, 6), "bilinear")
    assert torch.equal(model.backbone.pos_embed4, last)

    state = classifier("dfformer").state_dict()
    model = dense("dfformer", **sizes)
    report = load_pretrained(model, state)
    filters = {key: tensor for key, tensor in state.items() if key.endswith("complex_weights")}
    assert len(filters) == 5
    for key, old in filters.items():
        own = model.backbone.get_parameter(key)
        assert torch.equal(own, resize_complex_filter(old, own.shape[:2]))
    assert model.backbone.stages[0][0].token_mixer.complex_weights.shape[:2] == (32, 25)
    assert report.resized.keys() == {f"backbone.{key}" for key in filters}


def test_bias_tables_follow_the_window():
    state = classifier("swin").state_dict()
    model = dense("swin", window_size=5)
    load_pretrained(model, state)
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    own = model.backbone.get_parameter(key)
    assert torch.equal(own, resize_bias_table(state[key], (3, 3), (5, 5)))


def test_grids_of_a_file_that_are_not_square_are_known_by_its_config():
    file = dense("deit", img_size=[64, 128])
    model = dense("deit", img_size=[128, 128], seed=3)
    config = "DATA: {IMG_SIZE: [64, 128]}"
    load_pretrained(model, {"model": file.state_dict(), "config": config})
    positions = resize_position_grid(file.backbone.pos_embed, 1, (4, 8), (8, 8))
    assert torch.equal(model.backbone.pos_embed, positions)
    with pytest.raises(ValueError, match=r"neither square nor one of DATA\.IMG_SIZE"):
        load_pretrained(dense("deit", img_size=[128, 128]), file.state_dict())


def detectors_file(name):
    """What mmdet saves: the dense backbone, and its own neck and heads."""
    torch.manual_seed(4)
    backbone = small(name, num_classes=0).state_dict()
    others = {
        "neck.lateral_convs.0.conv.weight": torch.zeros(8, 16, 1, 1),
        "rpn_head.rpn_cls.weight": torch.zeros(3, 8, 1, 1),
        "roi_head.bbox_head.fc_cls.weight": torch.zeros(81, 8),
        "decode_head.conv_seg.weight": torch.zeros(150, 8, 1, 1),
    }
    weights = {f"backbone.{key}": tensor for key, tensor in backbone.items()} | others
    return weights, sorted(others)


@pytest.mark.parametrize("wrap", ["", "module."])
@pytest.mark.parametrize("name", ["dfvt", "dfformer", "swin"])
def test_a_detector_of_mmdet_gives_its_backbone(name, wrap, caplog):
    caplog.set_level("INFO")
    weights, others = detectors_file(name)
    content = {"meta": {"epoch": 12}, "state_dict": {wrap + k: t for k, t in weights.items()}}
    model = dense(name)
    report = load_pretrained(model, content)
    assert equal(model, weights, under(weights, "backbone."))
    assert report.other_head == others
    assert report.missing == sorted(under(model.state_dict(), "head."))
    assert (report.unexpected, report.head_replaced) == ([], [])
    assert "of another head, left out: decode_head.conv_seg.weight, neck." in caplog.text


def test_our_own_file_gives_backbone_pyramid_and_head():
    file, model = dense("deit", seed=5), dense("deit", seed=6)
    report = load_pretrained(model, {"model": file.state_dict()})
    assert equal(model, file.state_dict(), file.state_dict())
    assert report.missing == report.unexpected == report.head_replaced == report.other_head == []
    assert report.fresh_head == []
    assert report.loaded == len(file.state_dict())
    load_pretrained(dense("deit", seed=7), {"model": file.state_dict()}, new_head=False)


@pytest.mark.parametrize("rows", [1, 9])
def test_only_layers_with_rows_per_class_are_fresh_for_other_classes(rows):
    file = dense("dilateformer", 3, seed=5, options=dict(rows=rows))
    model = dense("dilateformer", 4, seed=6, options=dict(rows=rows))
    fresh = model.head.classifier.weight.clone()
    state = file.state_dict()
    report = load_pretrained(model, state)
    replaced = {"head.classifier.bias", "head.classifier.weight"}
    assert set(report.head_replaced) == set(report.fresh_head) == replaced
    assert torch.equal(model.head.classifier.weight, fresh)
    assert equal(model, state, state.keys() - replaced)
    with pytest.raises(
        ValueError,
        match=r"not fit: head\.classifier\.bias, .*weight; set MODEL\.NUM_CLASSES to that",
    ):
        load_pretrained(model, state, new_head=False)


def test_a_head_with_a_branch_more_starts_from_one_without_and_back():
    """As Mask R-CNN starts from Faster R-CNN."""
    plain, more = (
        dense("dilateformer", seed=seed, options=dict(branch=branch))
        for seed, branch in ((5, False), (6, True))
    )
    branch = {"head.branch.bias", "head.branch.weight"}
    state = plain.state_dict()
    report = load_pretrained(more, state)
    assert equal(more, state, state)
    assert set(report.missing) == branch
    with pytest.raises(
        ValueError, match=r"does not have this head, head\.branch.*MODEL\.HEAD\.TYPE"
    ):
        load_pretrained(more, state, new_head=False)
    report = load_pretrained(dense("dilateformer", seed=8), more.state_dict())
    assert set(report.other_head) == branch
    assert report.missing == []


def test_of_another_head_nothing_is_taken_but_the_backbone_and_the_pyramid():
    file = dense("deit", seed=5, head=OtherHead)
    model = dense("deit", seed=6)
    fresh = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load_pretrained(model, file.state_dict())
    assert equal(model, file.state_dict(), under(fresh, "backbone.", "pyramid."))
    assert equal(model, fresh, under(fresh, "head."))
    assert set(report.other_head) == under(file.state_dict(), "head.")
    assert set(report.missing) == under(fresh, "head.")


def test_a_head_of_another_width_is_refused_unless_asked_for():
    file = dense("dilateformer", options=dict(width=6))
    model = dense("dilateformer")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"other shapes: head\.classifier\.weight \(3, 6, 1, 1\)"):
        load_pretrained(model, file.state_dict())
    assert equal(model, before, before), "nothing is loaded before everything fits"
    load_pretrained(model, file.state_dict(), allow_partial=True)
    assert equal(model, file.state_dict(), under(before, "backbone."))


def test_a_classifier_cannot_be_evaluated_as_a_detector():
    with pytest.raises(ValueError, match=r"does not have this head, head\..*train a new one first"):
        load_pretrained(dense("swin"), classifier("swin").state_dict(), new_head=False)


def test_another_backbone_is_refused():
    model = dense("dilateformer")
    with pytest.raises(ValueError, match="no tensor of this model: it has backbone"):
        load_pretrained(model, {"conv1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"does not fit the model; .*missing"):
        load_pretrained(model, dense("dfvt").state_dict())
    weights = classifier("dilateformer").state_dict()
    weights["stages.0.blocks.0.norm1.w3ight"] = weights.pop("stages.0.blocks.0.norm1.weight")
    with pytest.raises(ValueError, match=r"missing 1: backbone\.stages.*unexpected 1: backbone"):
        load_pretrained(model, weights)


def test_averaged_weights_of_a_dense_run_are_found():
    file, average, model = (dense("dilateformer", seed=seed) for seed in (5, 6, 7))
    content = {"model": file.state_dict(), "ema": average.state_dict()}
    load_pretrained(model, content, use_ema=True)
    assert equal(model, average.state_dict(), average.state_dict())


def test_grey_images_and_a_detectors_rgb_backbone():
    weights, _ = detectors_file("dfvt")
    model = dense("dfvt", in_chans=1)
    report = load_pretrained(model, weights)
    (name,) = report.adapted
    assert torch.allclose(model.state_dict()[name], weights[name].sum(1, keepdim=True))
