"""Anchors, matching, sampling, encoding and candidates against tables and slow literal loops."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from models.heads.boxes import (
    BACKGROUND,
    IGNORED,
    AnchorGrid,
    Part,
    best_candidates,
    clip,
    decode,
    encode,
    first_map,
    image_sizes,
    map_shapes,
    match,
    sample,
)
from tests.operators import Operators

# RetinaNet's anchors by hand: side 4 strides times 1, 2^(1/3), 2^(2/3), areas kept at ratios 0.5, 1, 2.
SIDES = {8: [32.0, 40.3175, 50.7968], 128: [512.0, 645.0796, 812.7493]}
ROOT = 1.4142136


def random_boxes(n: int, side: float = 100) -> torch.Tensor:
    corner = torch.rand(n, 2) * side * 0.7
    return torch.cat((corner, corner + 1 + torch.rand(n, 2) * side * 0.3), dim=1)


@pytest.mark.parametrize(("level", "stride"), [(0, 8), (4, 128)])
def test_retinanet_anchors_are_those_of_the_table(level, stride):
    scales = [4 * 2 ** (i / 3) for i in range(3)]
    grid = AnchorGrid([8, 16, 32, 64, 128], 32, scales, [0.5, 1.0, 2.0])
    maps = [torch.zeros(1, 1, math.ceil(800 / s), math.ceil(1344 / s)) for s in grid.strides]
    anchors = grid(maps)
    assert [len(a) // 9 for a in anchors] == [100 * 168, 50 * 84, 25 * 42, 13 * 21, 7 * 11]
    table = []
    for ratio in (ROOT / 2, 1.0, ROOT):  # root of height over width
        for side in SIDES[stride]:
            w, h = side / ratio, side * ratio
            table.append([-w / 2, -h / 2, w / 2, h / 2])
    table = torch.tensor(table)
    torch.testing.assert_close(anchors[level][:9], table, rtol=1e-5, atol=1e-3)
    # One step right, then one row down: by the stride itself, also where 800 / 7 rows would be 114.
    width = maps[level].shape[-1]
    right, down = torch.tensor([stride, 0.0] * 2), torch.tensor([0.0, stride] * 2)
    torch.testing.assert_close(anchors[level][9:18], table + right, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(anchors[level][9 * width :][:9], table + down, rtol=1e-5, atol=1e-3)


def test_anchors_are_float32_under_maps_of_any_type():
    grid = AnchorGrid([8], 32, [4], [1.0])
    (anchors,) = grid([torch.zeros(1, 1, 2, 200, dtype=torch.bfloat16)])
    assert anchors.dtype == torch.float32
    assert anchors[-1].tolist() == [199 * 8 - 16, -8, 199 * 8 + 16, 24]


@pytest.mark.parametrize(
    ("size", "columns", "rows"), [((64, 96), 12, 8), ((33, 70), 12, 8), ((1, 32), 4, 4)]
)
def test_valid_anchors_are_those_of_the_image_padded_alone(size, columns, rows):
    grid = AnchorGrid([8], 32, [4 / 3], [0.7])
    (anchors,) = grid([torch.zeros(1, 1, 20, 20)])
    valid = grid.is_valid(anchors, size).view(20, 20)
    assert valid[:rows, :columns].all()
    assert valid.sum() == rows * columns


@pytest.mark.parametrize("size", [(96, 160), (64, 96), (33, 70), (90, 1), (1, 160)])
def test_parts_are_the_valid_anchors_of_each_level(size):
    grid = AnchorGrid([4, 8, 16, 32, 64], 32, [8, 16], [0.5, 1.0, 2.0])
    maps = [torch.zeros(1, 1, math.ceil(96 / s), math.ceil(160 / s)) for s in grid.strides]
    anchors, parts = grid(maps), grid.valid_parts(map_shapes(maps), size)
    for level, part in zip(anchors, parts, strict=True):
        valid = grid.is_valid(level, size)
        assert part.of(level).equal(level[valid])
        index = torch.arange(len(part.of(level)))
        assert part.in_level(index).equal(torch.where(valid)[0])


def literal_match(boxes, anchors, positive, negative, low_quality):
    iou = box_iou(boxes, anchors).tolist()
    result = []
    for a in range(len(anchors)):
        column = [row[a] for row in iou]
        best = max(column)
        below = BACKGROUND if best < negative else IGNORED
        result.append(column.index(best) if best >= positive else below)
    if low_quality is not None:
        for b, row in enumerate(iou):
            if max(row) >= low_quality and max(row) > 0:
                for a, value in enumerate(row):
                    if value == max(row):
                        result[a] = b
    return result


@pytest.mark.parametrize("low_quality", [None, 0.0, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_match_equals_a_literal_loop(seed, low_quality):
    torch.manual_seed(seed)
    boxes, anchors = random_boxes(6), random_boxes(80)
    anchors[:36] = boxes.repeat(6, 1) + torch.randn(36, 4) * 4  # some of each kind
    anchors[40:76] = anchors[:36]  # equally good ones
    boxes[5] = torch.tensor([500.0, 500.0, 510.0, 510.0])  # overlaps nothing
    found = match(boxes, anchors, positive=0.5, negative=0.4, low_quality=low_quality)
    assert found.tolist() == literal_match(boxes, anchors, 0.5, 0.4, low_quality)
    assert {BACKGROUND, IGNORED} < set(found.tolist())
    assert 5 not in found


def test_an_anchor_goes_to_the_box_it_is_best_for_though_it_overlaps_another_more():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 6.0]])
    anchors = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 10.0]])
    found = match(boxes, anchors, positive=0.5, negative=0.4, low_quality=0.0)
    assert found.tolist() == [1, 0]


def test_invalid_anchors_are_ignored_and_never_the_best():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 3.0], [50.0, 0.0, 60.0, 9.0]])
    valid = torch.tensor([False, True, True])
    options = dict(positive=0.5, negative=0.4, low_quality=0.0, valid=valid)
    assert match(boxes, anchors, **options).tolist() == [IGNORED, 0, BACKGROUND]
    assert match(boxes[:0], anchors, **options).tolist() == [IGNORED, BACKGROUND, BACKGROUND]


def test_encode_gives_the_hand_computed_deltas_and_decode_inverts_it():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    boxes = torch.tensor([[5.0, 0.0, 25.0, 10.0]])
    deltas = encode(boxes, anchors, (10, 10, 5, 5))
    hand = [[10 * 10 / 10, 10 * -5 / 20, 5 * math.log(2), 5 * math.log(0.5)]]
    torch.testing.assert_close(deltas, torch.tensor(hand))
    torch.testing.assert_close(decode(deltas, anchors, (10, 10, 5, 5)), boxes)
    boxes, anchors = random_boxes(50), random_boxes(50)
    again = decode(encode(boxes, anchors, (1,) * 4), anchors, (1,) * 4)
    torch.testing.assert_close(again, boxes, rtol=1e-4, atol=1e-3)


def test_decoded_boxes_grow_by_a_thousand_sixteenths_at_most():
    box = decode(torch.tensor([0.0, 0.0, 100.0, 100.0]), torch.tensor([0.0, 0, 16, 16]), (1,) * 4)
    torch.testing.assert_close(box[2:] - box[:2], torch.tensor([1000.0, 1000.0]))


def test_clip_cuts_x_at_the_width_and_y_at_the_height():
    box = torch.tensor([[-5.0, -6.0, 300.0, 400.0]])
    assert clip(box, (100, 200)).tolist() == [[0, 0, 200, 100]]


def test_best_candidates_equals_a_literal_loop():
    anchors = [random_boxes(30), random_boxes(10)]
    logits = [torch.randn(30, 3), torch.randn(10, 3)]
    deltas = [torch.randn(30, 4), torch.randn(10, 4)]
    deltas[0][3] = torch.tensor([100.0, 0, 0, 0])  # out of the image
    parts = [Part(rows=4, columns=5, width=6), Part(2, 5, 5)]
    valid = [torch.tensor([i < 24 and i % 6 < 5 for i in range(30)]), torch.tensor([True] * 10)]
    boxes, scores, classes, levels = best_candidates(
        logits, deltas, anchors, parts, (60, 80), limit=12, threshold=0.4
    )
    expected = []
    for level in range(2):
        rows = [
            (logits[level][i, k].sigmoid().item(), i, k)
            for i in range(len(anchors[level]))
            for k in range(3)
            if valid[level][i] and logits[level][i, k].sigmoid() > 0.4
        ]
        for score, i, k in sorted(rows, reverse=True)[:12]:
            box = clip(decode(deltas[level][i], anchors[level][i], (1,) * 4), (60, 80)).tolist()
            if box[2] > box[0] and box[3] > box[1]:
                expected.append((score, k, level, *box))
    found = [
        (s, k, level, *box)
        for s, k, level, box in zip(
            scores.tolist(), classes.tolist(), levels.tolist(), boxes.tolist(), strict=True
        )
    ]
    assert len(found) > 12
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, 4), (1.0, 0)])
def test_a_threshold_of_zero_keeps_all_candidates_and_of_one_none(threshold, kept):
    logits = torch.tensor([[-200.0], [-3.0], [0.0], [200.0]])
    found = best_candidates(
        [logits],
        [torch.zeros(4, 4)],
        [random_boxes(4)],
        [Part(2, 2, 2)],
        (99, 99),
        limit=9,
        threshold=threshold,
    )
    assert [len(column) for column in found] == [kept] * 4


def test_what_is_no_number_is_no_candidate_and_takes_no_place():
    nan, infinity = torch.nan, torch.inf
    logits = torch.tensor([nan, 1.0, -infinity, 0.0, infinity, nan])[:, None]
    boxes = random_boxes(6)
    for limit, expected in ((2, [4, 1]), (9, [4, 1, 3])):
        found, scores, *_ = best_candidates(
            [logits], [torch.zeros(6, 4)], [boxes], [Part(1, 6, 6)], (99, 99), limit=limit
        )
        torch.testing.assert_close(found, boxes[expected])
        assert scores.equal(logits[expected, 0].sigmoid())


def test_candidates_wait_for_the_device_once():
    grid = AnchorGrid([4, 8, 16], 32, [8], [1.0, 2.0])
    maps = [torch.zeros(1, 1, 64 // s, 96 // s) for s in grid.strides]
    anchors = grid(maps)
    outputs = [[torch.randn(len(a), width) for a in anchors] for width in (1, 4)]
    with Operators() as operators:
        anchors = grid(maps)
        parts = grid.valid_parts(map_shapes(maps), (40, 70))
        best_candidates(*outputs, anchors, parts, (40, 70), limit=50)
    assert operators.waits == 1


def test_sizes_are_whole_images_without_targets():
    images = torch.zeros(2, 3, 32, 64)
    assert image_sizes(images, None) == [(32, 64)] * 2
    assert image_sizes(images, [dict(size=(30, 60)), dict(size=(32, 5))]) == [(30, 60), (32, 5)]


@pytest.mark.parametrize("num_maps", [0, 5])
def test_more_maps_than_there_are_or_none_are_refused(num_maps):
    features = [dict(channels=8, stride=4 * 2**i) for i in range(4)]
    with pytest.raises(ValueError, match=rf"NUM_MAPS={num_maps} .* 1 to 4"):
        first_map(features, num_maps)


@pytest.mark.parametrize(
    ("positives", "background", "expected"),
    [(50, 200, (8, 24)), (3, 200, (3, 29)), (50, 10, (8, 10)), (0, 0, (0, 0))],
)
def test_sampling_fills_up_with_background(positives, background, expected):
    matched = torch.cat(
        (
            torch.arange(positives) % 5,
            torch.full((background,), BACKGROUND),
            torch.full((40,), IGNORED),
        )
    )
    matched = matched[torch.randperm(len(matched))]
    found, empty = sample(matched, 32, 0.25)
    assert (len(found), len(empty)) == expected
    assert (matched[found] >= 0).all()
    assert (matched[empty] == BACKGROUND).all()
    assert len(torch.cat((found, empty)).unique()) == sum(expected)


def test_sampling_is_random():
    matched = torch.zeros(100, dtype=torch.int64)
    first, second = sample(matched, 40, 0.5)[0], sample(matched, 40, 0.5)[0]
    assert set(first.tolist()) != set(second.tolist())
