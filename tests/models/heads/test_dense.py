"""A backbone with a head keeps the contract of a backbone, whatever the two are."""

import copy

import pytest
import torch
from torch import nn

from models import create_model, list_models
from models.heads import DenseModel, find_head, head_entries
from models.heads.dense import pyramid_of
from optimizer import param_groups
from tests.golden_tools import SkipInit
from tests.small_models import SMALL

DENSE = sorted(set(SMALL) - {"evit", "evit without fusion"})
HEADS = [entry.name for entry in head_entries()]
NARROW = dict(fpn_channels=16, channels=16, fc_dim=32, num_convs=1)


def build(kind="pvt", head="semantic_fpn", classes=3, **overrides):
    name, options = SMALL[kind]
    backbone = create_model(name, **(options | overrides), num_classes=0)
    entry = next(entry for entry in head_entries() if entry.name == head)
    pyramid, features = pyramid_of(backbone)
    narrow = {name: value for name, value in NARROW.items() if name in entry.fields}
    return DenseModel(backbone, pyramid, entry.cls(features, classes, **narrow), entry.task)


def batch(task, boxes=True, size=(64, 96)):
    height, width = size
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    targets = []
    for number in range(2):
        target = dict(size=(height, width), original_size=(height, width), image_id=number)
        if task == "segmentation":
            target["mask"] = torch.arange(height * width).reshape(height, width) // 7 % 3
        else:
            corners = torch.tensor([[4.0, 6, 40, 50], [20, 10, 90, 60]] if boxes else [])
            target["boxes"] = corners.reshape(-1, 4)
            target["labels"] = torch.arange(len(target["boxes"])) + 1
            masks = torch.zeros(len(target["boxes"]), height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, target["boxes"].long(), strict=True):
                mask[y0:y1, x0:x1] = True
            target["masks"] = masks
        targets.append(target)
    return images, targets


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["pvt", "swin", "dfvt", "deit"])
def test_every_trained_parameter_gets_a_finite_gradient(kind, head):
    """DDP stops at a parameter without gradient; RetinaNet, for one, leaves the finest map out."""
    model = build(kind, head).train()
    for boxes in (True, False):
        model.zero_grad(set_to_none=True)
        losses = model(*batch(model.task, boxes))
        assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values()), losses
        sum(losses.values()).backward()
        bad = [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
        ]
        assert not bad


@pytest.mark.parametrize("kind", DENSE)
def test_every_backbone_makes_a_segmenter(kind):
    model = build(kind).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 64, 96))
    assert logits.shape[:2] == (1, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", DENSE)
def test_padding_does_not_rule_the_first_step_from_scratch(kind):
    """Where nothing varies, a layer norm multiplies gradients by 1000, and clipping shrinks all others."""
    norms = []
    for padded in (False, True):
        torch.manual_seed(0)
        model = build(kind, "retinanet").train()
        images, targets = batch("detection")
        if padded:
            images[..., 64:] = 0  # the right third
            for target in targets:
                target |= dict(size=(64, 64), boxes=target["boxes"].clamp(max=64))
        sum(model(images, targets).values()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(nn.utils.get_total_norm(grads).item())
    assert norms[1] < 3 * norms[0]


def test_a_model_that_drops_tokens_is_refused_with_the_reason():
    name, options = SMALL["evit"]
    with pytest.raises(ValueError, match=r"drops tokens, so no feature map.*keep rate of 1"):
        pyramid_of(create_model(name, **options, num_classes=0))
    kept = create_model(name, **(options | dict(keep_rate=1.0)), num_classes=0)
    assert pyramid_of(kept)[1][0]["stride"] == 4


def test_a_classifier_is_refused():
    name, options = SMALL["pvt"]
    with pytest.raises(ValueError, match=r"classifier of 7 classes.*num_classes=0"):
        DenseModel(create_model(name, **options, num_classes=7), None, nn.Identity(), "detection")


def test_names_are_those_of_published_detectors():
    parts = {name.split(".")[0] for name in build("pvt").state_dict()}
    assert parts == {"backbone", "head"}
    assert {name.split(".")[0] for name in build("deit").state_dict()} == {
        "backbone", "pyramid", "head",
    }  # fmt: skip


def test_what_the_optimizer_asks_is_the_backbones_own():
    model = build("dfvt")
    assert model.lr_multipliers() == {
        f"backbone.{name}": factor for name, factor in model.backbone.lr_multipliers().items()
    }
    scales = {
        name: group["lr_scale"]
        for group in param_groups(model, 0.05, layer_decay=0.5)
        for name, _ in group["params"]
    }
    assert {s for name, s in scales.items() if name.startswith("head.")} == {1.0}
    depths = [model.layer_id(name) for name, _ in model.named_parameters()]
    assert min(depths) == 0
    assert max(depths) == model.num_layers() - 1
    bare = model.backbone
    for name, _ in bare.named_parameters():
        assert model.layer_id(f"backbone.{name}") == bare.layer_id(name)


@pytest.mark.parametrize("kind", ["pvt", "swin", "deit"])
def test_names_without_weight_decay_exist(kind):
    model = build(kind)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_a_frozen_backbone_leaves_the_head_to_train():
    model = build("dfvt")
    model.freeze(["backbone"])
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head"}


def test_frozen_batch_norms_are_the_backbones():
    model = build("dfvt")
    model.freeze_batch_norms()
    model.train()
    own = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    heads = [m for m in model.head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert own
    assert not any(norm.training or norm.weight.requires_grad for norm in own)
    assert heads
    assert all(norm.training and norm.weight.requires_grad for norm in heads)


def test_a_copy_evaluates_and_keeps_its_own_weights():
    model = build("swin").eval()
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(twin(images), expected)
        for parameter in model.parameters():
            parameter.zero_()
        assert not torch.equal(model(images), expected)
        assert torch.equal(twin(images), expected)


def test_gradient_checkpointing_reaches_the_backbone():
    model = build("pvt")
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing


def test_the_backbone_is_timed_beside_the_whole():
    model = build("pvt").eval()
    (part,) = model.timed_parts().values()
    with torch.no_grad():
        maps = part(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [info["channels"] for info in model.feature_info]


@pytest.mark.parametrize("kind", ["pvt", "deit"])
def test_the_pyramid_matches_feature_info(kind):
    model = build(kind).eval()
    with torch.no_grad():
        maps = model.forward_pyramid(torch.randn(1, 3, 64, 96))
    found = [dict(channels=m.shape[1], stride=64 // m.shape[2]) for m in maps]
    assert found == model.feature_info
    assert [info["stride"] for info in model.feature_info] == [4, 8, 16, 32]


@pytest.mark.parametrize("kind", ["pvt", "pvt_dge", "deit_dge"])
def test_the_cost_depends_on_images_where_that_of_the_backbone_does(kind):
    assert build(kind).cost_depends_on_images is ("dge" in kind)


@pytest.mark.parametrize("kind", ["deit", "swin", "dfvt", "pvt_dge", "dfformer"])
def test_token_maps_have_the_names_of_the_whole_model(kind):
    model = build(kind).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
    maps, own = model.token_maps(), model.backbone.token_maps()
    assert maps
    assert [name.replace("backbone.", "") for name in maps] == list(own)
    layers = {name for name, _ in model.named_modules()}
    assert all(name.split("::")[1] in layers for name in maps if "::" in name)
    assert all("backbone." in name for name in maps)


@pytest.mark.parametrize("alone", [False, True])
def test_inputs_of_the_last_forward_do_not_outlive_the_next_one(alone, monkeypatch):
    """Both at once would raise the peak of memory."""
    model = build("pvt").eval()
    (backbone,) = model.timed_parts().values()
    run = backbone if alone else model
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        run(images)
        kept = []
        inner = model.backbone.forward_pyramid
        monkeypatch.setattr(
            model.backbone,
            "forward_pyramid",
            lambda x: (kept.append(dict(model.backbone.token_maps())), inner(x))[1],
        )
        run(images)
    assert kept == [{}]
    assert model.token_maps()


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("forward_features", torch.zeros(1, 3, 64, 64)),
        ("forward_head", torch.zeros(1, 32, 2, 2)),
        ("reset_classifier", 5),
    ],
)
def test_what_only_a_classifier_has_is_refused_by_name(method, argument):
    with pytest.raises(NotImplementedError, match=rf"^{method}: a model for segm.*num_classes="):
        getattr(build("pvt"), method)(argument)


def test_no_head_is_no_head_of_another_task():
    with pytest.raises(ValueError, match=r"MODEL.HEAD.TYPE='retinanet' is no head for TASK='segm"):
        find_head("retinanet", "segmentation")
    with pytest.raises(ValueError, match="did you mean 'semantic_fpn'"):
        find_head("semantic_fnp", "segmentation")


@pytest.mark.parametrize("name", list_models())
def test_layers_of_a_map_exist(name):
    with torch.device("meta"), SkipInit():
        model = create_model(name, num_classes=0)
    for index in range(len(model.feature_info) - 1):
        for layer in model.map_layers(index):
            model.get_submodule(layer)
