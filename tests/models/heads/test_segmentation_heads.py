"""Heads for segmentation: shapes, gradients, literal versions, published sizes, and their loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.heads.fcn import FCNHead
from models.heads.pixels import pixel_loss, resized
from models.heads.semantic_fpn import SemanticFPN
from models.heads.upernet import UPerNet

WIDTHS, STRIDES = (8, 12, 16, 24), (4, 8, 16, 32)
FEATURES = [dict(channels=c, stride=s) for c, s in zip(WIDTHS, STRIDES, strict=True)]
HEADS = {
    "semantic_fpn": (SemanticFPN, dict(fpn_channels=16, channels=8)),
    "upernet": (UPerNet, dict(channels=8, aux_channels=8)),
    "fcn": (FCNHead, dict(channels=8, num_convs=2)),
}


def build(name, classes=5, **options):
    cls, small = HEADS[name]
    return cls(FEATURES, classes, **(small | options))


def some_maps(size, batch=2, features=FEATURES):
    return [
        torch.randn(batch, f["channels"], *(math.ceil(side / f["stride"]) for side in size))
        for f in features
    ]


def some_targets(size, batch=2, classes=5):
    return [dict(mask=torch.randint(classes, size)) for _ in range(batch)]


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (100, 70), (33, 47)])
@pytest.mark.parametrize("name", HEADS)
def test_logits_have_the_size_of_the_finest_map_that_is_used(name, size):
    head, maps = build(name).eval(), some_maps(size)
    finest = maps[-1] if name == "fcn" else maps[0]
    assert head(maps, torch.rand(2, 3, *size)).shape == (2, 5, *finest.shape[-2:])
    alone = head([x[:1] for x in maps], None)
    torch.testing.assert_close(alone, head(maps, None)[:1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (70, 101)])
@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_gets_a_finite_gradient(name, size):
    head = build(name, dropout=0.0)
    maps = [x.requires_grad_() for x in some_maps(size)]
    losses = head(maps, None, some_targets(size))
    assert set(losses) == ({"seg", "aux"} if name == "upernet" else {"seg"})
    assert all(loss.shape == () for loss in losses.values())
    sum(losses.values()).backward()
    bad = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad, f"no finite gradient: {bad}"
    unused = getattr(head, "unused_maps", ())
    assert [i for i, x in enumerate(maps) if x.grad is None] == list(unused)


@pytest.mark.parametrize("name", HEADS)
def test_a_batch_whose_pixels_are_all_ignored_gives_zeros(name):
    head = build(name)
    targets = [dict(mask=torch.full((64, 64), 255)) for _ in range(2)]
    losses = head(some_maps((64, 64)), None, targets)
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_batch_norms_can_be_synchronised_and_counted_without_memory(name):
    head = nn.SyncBatchNorm.convert_sync_batchnorm(build(name))
    kinds = {type(module) for module in head.modules()}
    assert nn.SyncBatchNorm in kinds
    assert nn.BatchNorm2d not in kinds
    with torch.device("meta"):
        assert build(name).eval()(some_maps((64, 64)), None).is_meta


def test_semantic_fpn_is_the_sum_of_its_levels_brought_to_stride_4():
    """Fig. 3 of the paper, level by level, with doublings for sides that are multiples of 32."""
    head = build("semantic_fpn").eval()
    for norm in (module for module in head.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
    maps = some_maps((64, 96))
    levels = head.fpn(maps)

    def block(chain, step, x):
        conv, norm, _ = head.chains[chain][step]
        x = F.conv2d(x, conv.weight, padding=1)
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[
            :, None, None
        ]
        return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)

    def twice(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    total = block(0, 0, levels[0])
    total = total + twice(block(1, 0, levels[1]))
    total = total + twice(block(2, 1, twice(block(2, 0, levels[2]))))
    x = levels[3]
    for step in range(3):
        x = twice(block(3, step, x))
    expected = torch.einsum("bchw,kc->bkhw", total + x, head.classifier.weight[:, :, 0, 0])
    expected = expected + head.classifier.bias[:, None, None]
    torch.testing.assert_close(head(maps, None), expected, rtol=1e-4, atol=1e-5)


def test_upernet_pools_the_last_map_and_fuses_all_levels():
    """Fig. 4 of the paper, written out with slices for the cells of the pooling."""
    head = build("upernet").eval()
    maps = some_maps((192, 192))  # the last map is 6x6, so that cells of 1, 2, 3 and 6 fit
    pooling = head.pooling
    parts = [maps[3]]
    for scale, branch in zip((1, 2, 3, 6), pooling.branches, strict=True):
        side = 6 // scale
        cells = torch.zeros(2, WIDTHS[3], scale, scale)
        for i in range(scale):
            for j in range(scale):
                rows, columns = (slice(k * side, (k + 1) * side) for k in (i, j))
                cells[:, :, i, j] = maps[3][:, :, rows, columns].mean((2, 3))
        parts.append(resized(branch(cells), (6, 6)))
    top = pooling.fuse(torch.cat(parts, 1))
    third = head.laterals[2](maps[2]) + resized(top, (12, 12))
    second = head.laterals[1](maps[1]) + resized(third, (24, 24))
    first = head.laterals[0](maps[0]) + resized(second, (48, 48))
    outputs = [f(x) for f, x in zip(head.outputs, (first, second, third), strict=True)]
    fused = head.fuse(torch.cat([resized(x, (48, 48)) for x in [*outputs, top]], 1))
    torch.testing.assert_close(head(maps, None), head.classifier(fused), rtol=1e-4, atol=1e-6)


def test_the_auxiliary_head_learns_from_its_stage_with_its_weight():
    maps, targets = some_maps((64, 64)), some_targets((64, 64))
    head = build("upernet", dropout=0.0, aux_weight=0.25, aux_stage=2)
    logits = head.auxiliary.classifier(head.auxiliary.convs(maps[1]))
    expected = 0.25 * pixel_loss(logits, torch.stack([t["mask"] for t in targets]))
    torch.testing.assert_close(head(maps, None, targets)["aux"], expected)
    without = build("upernet", aux_weight=0.0)
    assert set(without(maps, None, targets)) == {"seg"}
    assert not any("auxiliary" in name for name in without.state_dict())


def test_published_sizes():
    """Parameters in M and GMACs: those of the papers, less the backbone's."""
    widths = dict(resnet18=(64, 128, 256, 512), swin_tiny=(96, 192, 384, 768))
    features = {
        name: [dict(channels=c, stride=s) for c, s in zip(sides, STRIDES, strict=True)]
        for name, sides in widths.items()
    }
    # ResNet-18 + semantic FPN has 15.5 M in PVT's Table 5, and 11.18 M are the backbone's; Swin-T + UPerNet
    # has 60 M and 945 G at 512 x 2048 in Swin's Table 3, of which the backbone has 27.5 M and 94 G.
    with torch.device("meta"):
        fpn = SemanticFPN(features["resnet18"], 150)
        upernet = UPerNet(features["swin_tiny"], 150).eval()
        maps = some_maps((512, 2048), 1, features["swin_tiny"])
    assert sum(p.numel() for p in fpn.parameters()) / 1e6 == pytest.approx(15.5 - 11.18, abs=0.1)
    assert sum(p.numel() for p in upernet.parameters()) / 1e6 == pytest.approx(60 - 27.5, abs=0.5)
    with FlopCounterMode(display=False) as counter:
        upernet(maps, None)
    assert counter.get_total_flops() / 2e9 == pytest.approx(945 - 94, rel=0.01)


def test_upernet_needs_two_images_or_norms_at_rest():
    head = build("upernet")
    with pytest.raises(ValueError, match=r"DATA.BATCH_SIZE to 2 or more"):
        head(some_maps((64, 64), 1), None, some_targets((64, 64), 1))
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert head(some_maps((64, 64), 1), None, some_targets((64, 64), 1))["seg"].isfinite()


def test_upernet_says_how_many_images_it_needs():
    assert build("upernet").min_batch == 2
    assert build("upernet", pool_scales=[2, 3]).min_batch == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("upernet", dict(aux_stage=5), "aux_stage=5 must be from 1 to 4"),
        ("upernet", dict(aux_weight=-0.1), "aux_weight=-0.1 must be at least 0"),
        ("fcn", dict(num_convs=0), "num_convs=0 must be at least 1"),
        ("semantic_fpn", dict(dropout=1.5), "between 0 and 1"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def literal_loss(logits, masks):
    """Bilinear resizing between the centres of pixels and cross entropy, pixel by pixel."""
    (batch, classes, height, width), sides = logits.shape, masks.shape[-2:]
    losses = []
    for b in range(batch):
        for row in range(sides[0]):
            for column in range(sides[1]):
                label = masks[b, row, column].item()
                if label == 255:
                    continue
                y = min(max((row + 0.5) * height / sides[0] - 0.5, 0), height - 1)
                x = min(max((column + 0.5) * width / sides[1] - 0.5, 0), width - 1)
                top, left = int(y), int(x)
                bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
                v, u = y - top, x - left
                scores = [
                    (1 - v) * (1 - u) * logits[b, k, top, left].item()
                    + (1 - v) * u * logits[b, k, top, right].item()
                    + v * (1 - u) * logits[b, k, bottom, left].item()
                    + v * u * logits[b, k, bottom, right].item()
                    for k in range(classes)
                ]
                losses.append(math.log(sum(map(math.exp, scores))) - scores[label])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("sides", [(12, 20), (11, 18), (3, 5)])
def test_the_loss_is_the_mean_over_the_pixels_that_count(sides):
    logits = torch.randn(2, 4, 3, 5)
    masks = torch.randint(4, (2, *sides))
    masks[torch.rand(masks.shape) < 0.3] = 255
    masks[1, 0, 0] = 3
    assert pixel_loss(logits, masks).item() == pytest.approx(literal_loss(logits, masks), rel=1e-5)


def test_the_loss_is_computed_in_float32_under_autocast():
    logits, masks = torch.randn(2, 4, 8, 8) * 5, torch.randint(4, (2, 32, 32))
    half = logits.bfloat16()
    expected = pixel_loss(half.float(), masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pixel_loss(half, masks)
        head = build("semantic_fpn")
        assert head(some_maps((64, 64)), None, some_targets((64, 64)))["seg"].dtype == torch.float32
    assert torch.equal(loss, expected)
