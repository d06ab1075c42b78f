"""Boxes of anchor-based detectors: anchors, matching, encoding, and the best candidates of all levels.

Boxes are (x1, y1, x2, y2) in pixels, without the "+1" of the oldest detectors. Everything here computes in
float32, whatever autocast is on: bfloat16 tells positions beyond 256 pixels apart by 2 at best.

Like mmdet 2, which the published recipes used. torchvision's `AnchorGenerator` rounds the corners of anchors
to whole pixels, makes them in the type of the maps, and takes the quotient of image and map as a level's
stride, which is wrong for the coarsest ones (114 instead of 128 at a side of 800); its `Matcher` gives the
anchor nearest to a box to another box if it overlaps that one more.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ..layers.table_cache import Constants

# The largest factor by which a box grows, as in all these detectors.
MAX_LOG_SCALE = math.log(1000 / 16)

BACKGROUND, IGNORED = -1, -2  # what `match` says where there is no box

# To copy a few numbers to a GPU waits for it.
_NUMBERS = Constants(limit=64)


class Part(NamedTuple):
    """The valid anchors of a level: of each row of `width` anchors the first `columns`, in `rows` rows."""

    rows: int
    columns: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """What belongs to the level's anchors, (n, ...) -> to these, (rows * columns, ...)."""
        rows = x[: self.rows * self.width].unflatten(0, (self.rows, self.width))
        return rows[:, : self.columns].flatten(0, 1)

    def in_level(self, index: Tensor) -> Tensor:
        """Indices of these -> of all anchors of the level."""
        skipped = self.width - self.columns
        return index + index // self.columns * skipped if skipped else index


class AnchorGrid:
    """Anchors around the positions of all levels, the first one centred at the image's corner (0, 0).

    Args:
        strides: of the levels, in pixels.
        multiple: of pixels that any image is padded to.
        scales: sides of the square anchors, in strides.
        ratios: height over width; all anchors of one scale have one area.
    """

    def __init__(
        self,
        strides: Sequence[int],
        multiple: int,
        scales: Sequence[float],
        ratios: Sequence[float],
    ) -> None:
        self.strides, self.multiple = list(strides), multiple
        self.shapes = [
            (scale / math.sqrt(ratio), scale * math.sqrt(ratio))
            for ratio in ratios
            for scale in scales
        ]  # (width, height) in strides

    @property
    def num_anchors(self) -> int:
        """Anchors per position."""
        return len(self.shapes)

    def __call__(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, h, w) of the levels -> their anchors, (h * w * num_anchors, 4) each, row by row."""
        anchors = []
        for stride, level in zip(self.strides, maps, strict=True):
            h, w = level.shape[-2:]
            like = dict(device=level.device, dtype=torch.float32)
            half = _numbers(self.shapes, **like) * (stride / 2)
            y, x = torch.meshgrid(
                torch.arange(h, **like) * stride, torch.arange(w, **like) * stride, indexing="ij"
            )
            centres = torch.stack((x, y), dim=-1)[:, :, None]  # (h, w, 1, 2)
            anchors.append(torch.cat((centres - half, centres + half), dim=-1).reshape(-1, 4))
        return anchors

    def is_valid(self, anchors: Tensor, size: tuple[int, int]) -> Tensor:
        """Which anchors (n, 4) are not centred in what an image of `size` (h, w) was padded by -> (n,) bool.

        Only in what it would not be padded by alone: neither training nor evaluation reads the others, so
        that no image depends on the sizes of others in its batch.
        """
        h, w = self._padded(size)
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        # Centres are whole numbers; half a pixel keeps clear of rounding.
        return (centres[:, 0] < w - 0.5) & (centres[:, 1] < h - 0.5)

    def valid_parts(self, shapes: Sequence[tuple[int, int]], size: tuple[int, int]) -> list[Part]:
        """What `is_valid` of the anchors of levels of `shapes` (h, w), known without asking the device."""
        h, w = self._padded(size)
        return [
            Part(
                min(rows, math.ceil(h / stride)),
                min(columns, math.ceil(w / stride)) * self.num_anchors,
                columns * self.num_anchors,
            )
            for stride, (rows, columns) in zip(self.strides, shapes, strict=True)
        ]

    def _padded(self, size: tuple[int, int]) -> tuple[int, int]:
        h, w = (math.ceil(side / self.multiple) * self.multiple for side in size)
        return h, w


def flatten_level(x: Tensor, width: int) -> Tensor:
    """Outputs of a convolution (B, A * width, h, w) -> (B, h * w * A, width) float32, ordered as anchors."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width).float()


def image_sizes(images: Tensor, targets: list[dict[str, Any]] | None) -> list[tuple[int, int]]:
    """Height and width of each image (B, C, H, W) without its padding."""
    if targets is None:
        return [(images.shape[-2], images.shape[-1])] * images.shape[0]
    return [(int(target["size"][0]), int(target["size"][1])) for target in targets]


def map_shapes(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Height and width of each map (B, C, h, w)."""
    return [(x.shape[-2], x.shape[-1]) for x in maps]


def match(
    boxes: Tensor,
    anchors: Tensor,
    *,
    positive: float,
    negative: float,
    low_quality: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The box that each anchor is to find -> (n,) index into `boxes` (m, 4), BACKGROUND or IGNORED.

    Args:
        boxes: (m, 4), m may be 0.
        anchors: (n, 4).
        positive: IoU from which on an anchor is given the box that it overlaps most.
        negative: IoU below which it is background; in between it is ignored.
        low_quality: the anchors that overlap a box most are given it if that is at least this much (and more
            than nothing), whatever else they overlap; None leaves that out.
        valid: (n,) bool, the others are ignored.
    """
    if valid is None:
        valid = torch.ones(len(anchors), dtype=torch.bool, device=anchors.device)
    if not len(boxes):
        return torch.where(valid, BACKGROUND, IGNORED)
    iou = box_iou(boxes.float(), anchors) * valid  # (m, n)
    best, index = iou.max(dim=0)
    matched = torch.where(best < negative, BACKGROUND, IGNORED)
    matched = torch.where(best >= positive, index, matched)
    if low_quality is not None:
        most = iou.amax(dim=1, keepdim=True)
        wanted = (iou == most) & (most >= low_quality) & (most > 0)
        number = torch.arange(len(boxes), device=boxes.device)[:, None]
        last = torch.where(wanted, number, -1).amax(dim=0)  # of two boxes, the later one
        matched = torch.where(last >= 0, last, matched)
    return torch.where(valid, matched, IGNORED)


def sample(matched: Tensor, batch: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of a random choice of positives and background among `matched` (n,), as of `match`.

    At most `batch` in all and that fraction positive; where positives are missing, background fills up.
    """
    (positive,) = torch.where(matched >= 0)
    (negative,) = torch.where(matched == BACKGROUND)
    num_positive = min(len(positive), int(batch * positive_fraction))
    num_negative = min(len(negative), batch - num_positive)
    positive = positive[torch.randperm(len(positive), device=matched.device)[:num_positive]]
    negative = negative[torch.randperm(len(negative), device=matched.device)[:num_negative]]
    return positive, negative


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """What a detector has to predict at `anchors` (n, 4) for `boxes` (n, 4) -> (n, 4).

    Centre's shift in anchor sides and logarithm of the growth, times `weights` (x, y, width, height).
    """
    centres, sides = _centres(boxes)
    from_centres, from_sides = _centres(anchors)
    deltas = torch.cat(((centres - from_centres) / from_sides, (sides / from_sides).log()), dim=-1)
    return deltas if _are_ones(weights) else deltas * _numbers_like(deltas, weights)


def decode(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Inverse of `encode`: (..., 4) at anchors of a shape that broadcasts -> boxes (..., 4)."""
    if not _are_ones(weights):
        deltas = deltas / _numbers_like(deltas, weights)
    centres, sides = _centres(anchors)
    centres = centres + deltas[..., :2] * sides
    half = sides * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat((centres - half, centres + half), dim=-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) cut at the borders of an image of `size` (h, w)."""
    h, w = size
    return torch.stack(
        (
            boxes[..., 0].clamp(0, w),
            boxes[..., 1].clamp(0, h),
            boxes[..., 2].clamp(0, w),
            boxes[..., 3].clamp(0, h),
        ),
        dim=-1,
    )


def has_area(boxes: Tensor) -> Tensor:
    """Which boxes (n, 4) have any -> (n,) bool."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def best_candidates(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    valid: Sequence[Part],
    size: tuple[int, int],
    *,
    limit: int,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The most probable boxes of each level of one image; waits for the device once, if `threshold` is 0.

    Args:
        logits: (n_l, K) per level, of classes that do not exclude one another.
        deltas: (n_l, 4) per level.
        anchors: (n_l, 4) per level.
        valid: per level, anchors that may propose anything.
        size: (h, w) that boxes are clipped to; those that are left without area are dropped.
        limit: candidates per level.
        threshold: probability that a candidate must exceed.

    Returns:
        boxes (n, 4), probabilities (n,), classes (n,) and levels (n,), not sorted.
    """
    bound = _logit(threshold)
    found = []
    for level, (logit, delta, anchor, part) in enumerate(
        zip(logits, deltas, anchors, valid, strict=True)
    ):
        num_classes = logit.shape[-1]
        score = part.of(logit).flatten()
        if bound > -torch.inf:
            (chosen,) = torch.where(score > bound)
            score, order = score[chosen].topk(min(limit, len(chosen)))
            chosen = chosen[order]
        else:
            # What is not above the bound comes last, as nan would not, and is dropped with what has no area.
            score = score.nan_to_num(nan=bound, posinf=torch.inf, neginf=bound)
            score, chosen = score.topk(min(limit, len(score)))
        position = part.in_level(chosen // num_classes)
        columns = (delta[position], anchor[position], score > bound, score.sigmoid())
        found.append((*columns, chosen % num_classes, torch.full_like(chosen, level)))
    delta, anchor, likely, *others = map(torch.cat, zip(*found, strict=True))
    boxes = clip(decode(delta, anchor, (1.0,) * 4), size)
    (kept,) = torch.where(has_area(boxes) & likely)
    scores, classes, levels = (column[kept] for column in others)
    return boxes[kept], scores, classes, levels


def count_nan(outputs: Iterable[Tensor]) -> Tensor:
    """How many rows of outputs (n, ...) hold a nan: 0-D, on their device.

    Comparisons with nan are false, so that such rows become no detections at all.
    """
    return sum(x.flatten(1).isnan().any(dim=1).sum() for x in outputs)


def first_map(features: list[dict[str, int]], num_maps: int) -> int:
    """Index of the first of the `num_maps` coarsest maps; ValueError if there are not so many."""
    if not 0 < num_maps <= len(features):
        raise ValueError(
            f"NUM_MAPS={num_maps} of the detection head must be from 1 to {len(features)}, the number of "
            f"maps of this backbone (strides {[f['stride'] for f in features]})"
        )
    return len(features) - num_maps


def check_overlaps(negative: float, positive: float, prefix: str = "") -> None:
    """ValueError unless the IoU below which anchors are background is at most that of what they are to find.

    Args:
        prefix: what the two keywords begin with.
    """
    if negative > positive:
        raise ValueError(
            f"{prefix}NEGATIVE_IOU={negative} of the detection head must be at most "
            f"{prefix}POSITIVE_IOU={positive}: an anchor cannot be both background and an object"
        )


def _are_ones(weights: Sequence[float]) -> bool:
    return all(weight == 1 for weight in weights)


def _numbers_like(x: Tensor, numbers: Sequence[float]) -> Tensor:
    return _numbers(numbers, device=x.device, dtype=x.dtype)


def _numbers(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`torch.tensor`, copied to the device once; must not be written to."""
    numbers = tuple(numbers)
    key = (numbers, device, dtype)
    return _NUMBERS.get(key, lambda: torch.tensor(numbers, device=device, dtype=dtype))


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (..., 4) -> centres (..., 2) and sides (..., 2), both x first."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.log(probability / (1 - probability)) if probability < 1 else math.inf
