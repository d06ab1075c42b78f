"""Draw training samples as a model gets them: boxes with masks and labels, or classes of pixels in colour.

    python tools/contact_sheet.py --cfg configs/_base_/mask_rcnn_1x_coco.yaml --data-path /data/coco
    python tools/contact_sheet.py --cfg my_experiment.yaml --split val --images 8 --draws 1 --output sheet.png

Each row is one image, drawn from the split at equal distances; each column is one epoch's augmentation of it.
Writes `contact_sheet.png` into the run's folder, or to --output. Boxes that lie elsewhere, classes that are
mixed up and masks that are shifted show here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import load_config, output_dir  # noqa: E402  found through the line above
from data import build_dataset  # noqa: E402
from data.build import build_samples  # noqa: E402
from data.dense.loader import IGNORED  # noqa: E402
from data.registry import SPLITS  # noqa: E402
from data.samplers import Key  # noqa: E402
from utils.arguments import add_opts  # noqa: E402
from utils.files import check_output  # noqa: E402
from utils.pictures import (  # noqa: E402
    draw_labels,
    draw_objects,
    legend,
    save_picture,
    side_by_side,
)

_GAP = 8  # pixels between pictures


def contact_sheet(
    config: Any, split: str = "train", images: int = 4, draws: int = 3, side: int = 480
) -> Tensor:
    """A picture (3, H, W) of augmented samples, and the names of the classes beside label maps.

    Args:
        images: how many of the split; `draws`: samples of each.
        side: of a sample in pixels, at most.

    Raises:
        ValueError: the task has no boxes, masks or label maps; a number is no number of pictures; the data's
            own errors.
        FileNotFoundError: the data is not there.
    """
    if config.TASK not in _DRAW:
        raise ValueError(
            f"TASK='{config.TASK}' has nothing to draw; it must be one of {sorted(_DRAW)}"
        )
    if min(images, draws, side) < 1:
        raise ValueError(f"--images {images}, --draws {draws} and --side {side} must be at least 1")
    dataset = build_dataset(config, split)
    dataset.check()
    # Augmented, whatever the split: evaluation's masks are those of the stored image.
    samples = build_samples(config, dataset, training=True)
    indices = np.unique(np.linspace(0, len(dataset) - 1, images).round().astype(int)).tolist()
    rows, labels = [], set()
    for index in indices:
        row = []
        for epoch in range(draws):
            image, target = samples[Key(epoch, index)]
            picture = image.expand(3, -1, -1).contiguous()
            row.append(_fitted(_DRAW[config.TASK](picture, target, dataset.classes), side))
            found = target["labels"] if "labels" in target else target["mask"].unique()
            labels.update(found.tolist())
        rows.append(side_by_side(*row, gap=_GAP))
    width = max(row.shape[2] for row in rows)
    padded = [F.pad(row, (0, width - row.shape[2], 0, _GAP), value=255) for row in rows]
    names = legend(sorted(labels - {IGNORED}), dataset.classes, side)
    return side_by_side(torch.cat(padded, dim=1), names, gap=_GAP)


def _objects(picture: Tensor, target: dict[str, Any], classes: Sequence[str]) -> Tensor:
    return draw_objects(
        picture, target["boxes"], target["labels"], classes=classes, masks=target.get("masks")
    )


def _label_map(picture: Tensor, target: dict[str, Any], classes: Sequence[str]) -> Tensor:
    return draw_labels(picture, target["mask"], ignored=IGNORED)


_DRAW = {"detection": _objects, "segmentation": _label_map}


def _fitted(picture: Tensor, side: int) -> Tensor:
    """A picture (3, H, W), no side of it longer than `side` pixels."""
    scale = side / max(picture.shape[1:])
    if scale >= 1:
        return picture
    size = [max(1, round(length * scale)) for length in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def main(argv: Sequence[str] | None = None) -> Path:
    """Command line -> the file that was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the experiment's YAML file")
    parser.add_argument("--data-path", default=None, help="root folder of the dataset")
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose images")
    parser.add_argument("--images", type=int, default=4, help="rows")
    parser.add_argument("--draws", type=int, default=3, help="augmentations of each, columns")
    parser.add_argument("--side", type=int, default=480, help="pixels of a sample, at most")
    parser.add_argument("--output", type=Path, help="picture file, instead of the run's folder")
    add_opts(parser)
    args = parser.parse_args(argv)
    flags = {} if args.data_path is None else {"DATA.DATA_PATH": args.data_path}
    try:
        config = load_config(args.cfg, args.opts, flags)
        path = args.output or output_dir(config) / "contact_sheet.png"
        check_output(path, "--output")
        sheet = contact_sheet(config, args.split, args.images, args.draws, args.side)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    save_picture(sheet, path)
    print(path)
    return path


if __name__ == "__main__":
    main()
