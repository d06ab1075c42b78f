"""Pictures of what models say: boxes, masks, labels and numbers on images, coloured label maps, side by side.

A picture is a uint8 tensor (3, H, W) on the CPU. Colours are those of `palette`, the same in every picture:
class k of every image, ground truth and prediction has colour k.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

Colour = tuple[int, int, int]

_WHITE, _INK = (255, 255, 255), (0, 0, 0)

# Colours beyond it would be too near to one another to tell apart.
_DISTINCT = 512


def palette(count: int) -> tuple[Colour, ...]:
    """`count` RGB colours that are as far from each other as can be; the first ones stay when it grows.

    Each is the one of a grid of 2197 that is farthest from those before it, black and white included, in
    OKLab (Ottosson, 2020), where distances are those that people see. After 512 they begin again.
    """
    colours = _distinct_colours(min(count, _DISTINCT))
    return tuple(colours[label % _DISTINCT] for label in range(count))


@lru_cache
def _distinct_colours(count: int) -> tuple[Colour, ...]:
    steps = np.linspace(0, 255, 13).round()
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    seen = _oklab(grid)
    nearest = np.minimum(
        *(np.linalg.norm(seen - _oklab(np.array(c)), axis=1) for c in (_INK, _WHITE))
    )
    chosen: list[Colour] = []
    for _ in range(count):
        index = int(nearest.argmax())
        chosen.append(tuple(int(value) for value in grid[index]))
        nearest = np.minimum(nearest, np.linalg.norm(seen - seen[index], axis=1))
    return tuple(chosen)


def to_picture(
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    size: Sequence[int] | None = None,
    original_size: Sequence[int] | None = None,
) -> Tensor:
    """A normalised image (C, H, W) with C = 1 or 3, as the model saw it -> a picture.

    Args:
        mean, std: that it was normalised with, one number or one per channel, of values in [0, 1].
        size: (h, w) without padding, which is at the right and at the bottom.
        original_size: (h, w) of the picture, if it is another one.
    """
    if size is not None:
        image = image[:, : size[0], : size[1]]
    image = image.detach().float().cpu()
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (mean, std))
    image = image * std + mean
    if original_size is not None and tuple(original_size) != tuple(image.shape[1:]):
        image = F.interpolate(
            image[None], tuple(original_size), mode="bilinear", antialias=True, align_corners=False
        )[0]
    return (image * 255).round().clamp(0, 255).byte().expand(3, -1, -1).contiguous()


def draw_objects(
    picture: Tensor,
    boxes: Tensor,
    labels: Sequence[int] | Tensor,
    *,
    classes: Sequence[str] = (),
    scores: Sequence[float] | Tensor | None = None,
    masks: Tensor | None = None,
    alpha: float = 0.5,
) -> Tensor:
    """The picture with an outline around each object, its class and score, and its mask.

    The first object is the uppermost one, so detections go in by falling score.

    Args:
        picture: (3, H, W), uint8; it stays as it is.
        boxes: (N, 4), xyxy in pixels; an outline encloses just the pixels that its box touches.
        labels: class of each, which gives its colour.
        classes: names of the classes; without them their numbers are written.
        scores: in [0, 1], written as percent.
        masks: (N, H, W), bool.
        alpha: share of the colour where a mask is.
    """
    labels = [int(label) for label in labels]
    if not labels:
        return picture.clone()
    colours = palette(max(labels) + 1)
    if masks is not None:
        owner = torch.full(picture.shape[1:], -1)
        # A map of one owner per pixel: torchvision's draw_segmentation_masks blackens where masks overlap.
        for index in reversed(range(len(labels))):
            owner[masks[index].cpu()] = labels[index]
        picture = _blend(picture, owner, colours, alpha)
    texts = [classes[label] if classes else str(label) for label in labels]
    if scores is not None:
        texts = [f"{text} {100 * float(s):.0f}" for text, s in zip(texts, scores, strict=True)]
    canvas = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    places = _outlines(boxes, picture.shape[1:]).tolist()
    for index in reversed(range(len(labels))):
        _draw_box(ImageDraw.Draw(canvas), places[index], texts[index], colours[labels[index]])
    return pil_to_tensor(canvas)


def draw_labels(
    picture: Tensor, labels: Tensor, *, alpha: float = 0.6, ignored: int = 255
) -> Tensor:
    """The picture under the colours of a label map.

    Args:
        picture: (3, H, W), uint8; it stays as it is.
        labels: (H, W), integers; the picture shows through unchanged where they are `ignored`.
        alpha: share of the colour.
    """
    labels = labels.cpu().long()
    labels = labels.masked_fill(labels == ignored, -1)
    return _blend(picture, labels, palette(int(labels.max()) + 1), alpha)


def draw_values(
    picture: Tensor, values: Tensor, *, alpha: float = 0.6, colours: str = "inferno"
) -> Tensor:
    """The picture under the colours of a map of numbers, stretched to its size without smoothing.

    Args:
        picture: (3, H, W), uint8; it stays as it is.
        values: (h, w); the smallest gets the first colour and the largest the last one. A map of one number
            only, which shows nothing, gets the colour between.
        alpha: share of the colours.
        colours: name of a colour map of matplotlib.
    """
    values = values.detach().float().cpu()
    low, high = values.min(), values.max()
    shares = (values - low) / (high - low) if high > low else torch.full_like(values, 0.5)
    shares = F.interpolate(shares[None, None], picture.shape[1:], mode="nearest-exact")[0, 0]
    colour = torch.from_numpy(matplotlib.colormaps[colours](shares.numpy())[..., :3])
    return _mixed(picture, 255 * colour.permute(2, 0, 1).float(), alpha)


def legend(labels: Sequence[int], classes: Sequence[str], height: int) -> Tensor:
    """Colours and names of the classes that `labels` holds, as a picture of at least this height."""
    labels = sorted({int(label) for label in labels})
    font = ImageFont.truetype(_font_file(), _font_size(height))
    row = round(1.5 * font.size)
    width = 2 * row + round(max((font.getlength(classes[k]) for k in labels), default=0))
    canvas = Image.new("RGB", (width, max(height, row * len(labels))), _WHITE)
    draw = ImageDraw.Draw(canvas)
    colours = palette(max(labels, default=-1) + 1)
    for place, label in enumerate(labels):
        top = place * row
        swatch = (row // 4, top + row // 4, row, top + row - 1)
        draw.rectangle(swatch, fill=colours[label], outline=_INK)
        draw.text((1.25 * row, top + row / 4), classes[label], fill=_INK, font=font)
    return pil_to_tensor(canvas)


def side_by_side(*pictures: Tensor, gap: int = 8) -> Tensor:
    """Pictures from left to right, aligned at the top, on white."""
    height = max(picture.shape[1] for picture in pictures)
    columns = []
    for picture in pictures:
        pad = (0, gap, 0, height - picture.shape[1])  # left, right, top, bottom
        columns.append(F.pad(picture, pad, value=255))
    return torch.cat(columns, dim=2)[:, :, : -gap or None]


def save_picture(picture: Tensor, path: str | Path) -> None:
    """Write (3, H, W) uint8 to a file whose suffix names the format; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(path)


def remove_pictures(folder: str | Path) -> None:
    """Remove the PNG files in a folder of results and below it, so that those of two runs never mix."""
    for path in Path(folder).rglob("*.png"):
        path.unlink()


def _draw_box(draw: ImageDraw.ImageDraw, place: list[int], text: str, colour: Colour) -> None:
    """An outline, and a label above it, or inside where the picture ends; never outside the picture.

    torchvision's draw_bounding_boxes writes inside, where the text hides small objects.
    """
    width, height = draw.im.size
    short = min(width, height)
    line = max(1, round(short / 240))
    draw.rectangle(place, outline=colour, width=line)
    font = ImageFont.truetype(_font_file(), _font_size(short))
    right, bottom = draw.textbbox((0, 0), text, font=font)[2:]
    left = max(min(place[0], width - right - 2), 0)
    top = place[1] - bottom - 2
    if top < 0:
        top = place[1]
    draw.rectangle((left, top, left + right + 1, top + bottom + 1), fill=colour)
    draw.text((left + 1, top + 1), text, fill=_readable_on(colour), font=font)


def _blend(picture: Tensor, labels: Tensor, colours: Sequence[Colour], alpha: float) -> Tensor:
    """Colour k where `labels` (H, W) are k >= 0, mixed with the picture."""
    if not colours:
        return picture.clone()
    table = torch.tensor(colours, dtype=torch.float32)
    colour = table[labels.clamp(min=0)].permute(2, 0, 1)  # (3, H, W)
    return torch.where(labels >= 0, _mixed(picture, colour, alpha), picture)


def _mixed(picture: Tensor, colour: Tensor, alpha: float) -> Tensor:
    """Picture and colours (3, H, W) in [0, 255], `alpha` the share of the latter -> uint8."""
    return ((1 - alpha) * picture + alpha * colour).round().byte()


def _outlines(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """First and last row and column of each box, within a picture of (H, W)."""
    boxes = boxes.detach().float().cpu()
    height, width = size
    limit = torch.tensor([width - 1, height - 1])
    first = boxes[:, :2].floor().clamp(min=0).minimum(limit)
    last = (boxes[:, 2:].ceil() - 1).minimum(limit)
    return torch.cat([first, last.maximum(first)], dim=1).int()


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in [0, 255] -> OKLab: bottosson.github.io/posts/oklab."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_cones.T) @ to_lab.T


def _readable_on(colour: Colour) -> Colour:
    """Black or white, whichever stands out."""
    return _INK if _oklab(np.array(colour))[0] > 0.6 else _WHITE


def _font_size(height: int) -> int:
    """Points: readable in a picture of that height, and small against its objects."""
    return min(max(height // 36, 9), 28)


def _font_file() -> str:
    """A font that every installation has and that knows more than ASCII: the one that matplotlib brings."""
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
