"""Say what a detector or a segmenter finds in images of which nothing is known, and draw it.

    python tools/predict_dense.py --cfg configs/pvt/pvt_small_256_retinanet.yaml --resume best.pth street.jpg
    python tools/predict_dense.py --cfg my_run.yaml --resume best.pth photos/*.jpg --draw out --json out.json

Prints the objects of each image, the surest first, as class, score and box (x1, y1, x2, y2) in pixels of the
file, or the classes that cover most of it; by the names that the checkpoint holds. Images are resized, looked
at and scored as in evaluation (TEST). --draw writes a picture for each: the image, and beside it what was
found. --json writes all of it: boxes as in COCO's results, masks as run lengths, labels as shares of pixels.

For files as a benchmark wants them: --eval with TEST.REPORT True, see docs/dense.md.
"""

import argparse
import io
import json
import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import load_config  # noqa: E402  found through the line above
from data import build_loader  # noqa: E402
from data.decoders import is_turned  # noqa: E402
from data.formats.coco import stored_target  # noqa: E402
from data.masks import IGNORED  # noqa: E402
from data.registry import CLASSIFICATION, DenseDataset, read_image  # noqa: E402
from data.transforms import channel_stats  # noqa: E402
from engine.train import to_device  # noqa: E402
from modes.build import load_trained  # noqa: E402
from modes.dense_evaluation import Drawing  # noqa: E402
from tasks import build_task  # noqa: E402
from utils.amp import Amp  # noqa: E402
from utils.arguments import add_opts  # noqa: E402
from utils.distributed import own_device  # noqa: E402
from utils.files import check_files, check_output  # noqa: E402

_LOG = logging.getLogger(__name__)

# Objects of an image that are printed, and classes.
SHOWN = 10


class Photographs(DenseDataset):
    """Image files without objects and labels, for either of the dense tasks; ids are their places."""

    def __init__(self, files: Sequence[Path], classes: Sequence[str] = ()) -> None:
        self.files, self.classes = list(files), list(classes)

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> tuple[bytes, dict[str, Any]]:
        content = self.files[index].read_bytes()
        with Image.open(io.BytesIO(content)) as image:  # reads the header only
            size = image.size[::-1]
        record = dict(id=index, size=size, annotations=[])
        target = stored_target(record, self.describe(index), masks=False)
        return content, target | dict(mask=np.full(size, IGNORED, np.uint8))

    def check_image(self, index: int) -> Collection[int]:
        """ValueError if a file is no image; warns of one that viewers turn."""
        if is_turned(read_image(self.files[index])):
            _LOG.warning(
                "%s is taken as it is stored, and its EXIF orientation ignored: viewers turn it (to save it "
                "turned: PIL's ImageOps.exif_transpose)",
                self.files[index],
            )
        return ()


def find(
    config: Any, files: Sequence[Path], threshold: float = 0.3, folder: Path | None = None
) -> list[dict[str, Any]]:
    """What the config's model finds in each file.

    Args:
        threshold: score from which on an object counts.
        folder: for pictures; None draws none.

    Returns:
        Per file dict(file, height, width), with `objects`, the surest first: dict(class, label, score, bbox
        (x, y, width, height), and segmentation where the model makes masks); or with `labels`, the largest
        first: dict(class, label, share of the pixels). With pictures their `picture`.

    Raises:
        ValueError: the task is classification, a file is no image, there are no weights, or they do not fit.
    """
    if config.TASK == CLASSIFICATION:
        raise ValueError(
            "TASK='classification' must be detection or segmentation: tools/predict.py says classes of images"
        )
    Photographs(files).check()
    device = own_device(config.DEVICE)
    amp = Amp(device, config.AMP_DTYPE, config.AMP_ENABLE, config.AMP_OPT_LEVEL)
    amp.set_float32_precision()
    model, names = load_trained(config, device)
    model, _ = amp.prepare(model)
    names = names or [f"class {label}" for label in range(model.num_classes)]
    task = build_task(config, len(names))
    mean, std = channel_stats(config.DATA.MEAN, config.DATA.STD, config.MODEL.IN_CHANS)
    shown = dict(threshold=threshold) if config.TASK == "detection" else {}
    drawing = folder and Drawing(model, task, amp, names, mean, std, folder, **shown)
    results = []
    for batch in build_loader(config, "val", device=device, dataset=Photographs(files, names)):
        batch = to_device(batch, device, config.CHANNELS_LAST)
        with torch.inference_mode(), amp.autocast():
            (found,) = task.predict(model, batch)
        (target,) = batch[1]
        height, width = target["original_size"]
        result = dict(file=target["file"], height=height, width=width)
        if config.TASK == "detection":
            result["objects"] = _objects(found, names, threshold)
        else:
            result["labels"] = _shares(found, names)
        if drawing:
            result["picture"] = str(drawing(batch, len(results), found))
        results.append(result)
    return results


def _objects(found: dict[str, Any], names: Sequence[str], threshold: float) -> list[dict[str, Any]]:
    objects = []
    for index in found["scores"].argsort(descending=True).tolist():
        score, label = found["scores"][index].item(), found["labels"][index].item()
        if score < threshold:
            break
        left, top, right, bottom = found["boxes"][index].tolist()
        entry = {"class": names[label], "label": label, "score": round(score, 5)}
        entry["bbox"] = [round(value, 2) for value in (left, top, right - left, bottom - top)]
        if "masks" in found:
            entry["segmentation"] = found["masks"][index]
        objects.append(entry)
    return objects


def _shares(found: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    counts = torch.bincount(found.flatten().long().cpu(), minlength=len(names))[: len(names)]
    return [
        {"class": names[label], "label": label, "share": round(count / found.numel(), 5)}
        for count, label in sorted(zip(counts.tolist(), range(len(names)), strict=True))[::-1]
        if count
    ]


def describe(result: dict[str, Any]) -> str:
    """One line on what `find` gives for a file."""
    if "labels" in result:
        parts = [f"{100 * entry['share']:.1f} % {entry['class']}" for entry in result["labels"]]
    else:
        parts = [
            f"{entry['class']} {entry['score']:.2f} ({x:.0f}, {y:.0f}, {x + w:.0f}, {y + h:.0f})"
            for entry in result["objects"]
            for x, y, w, h in [entry["bbox"]]
        ]
    more = f", and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return f"{result['file']}: {', '.join(parts[:SHOWN]) or 'nothing'}{more}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Command line -> what `find` gives, which is printed too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files")
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the experiment's YAML file")
    parser.add_argument(
        "--resume", metavar="FILE", help="checkpoint; needed unless the config names one"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="least score of objects (default: 0.3)"
    )
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="for pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for all that is found")
    add_opts(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    flags = {"MODEL.RESUME": args.resume} if args.resume else {}
    try:
        if not 0 <= args.threshold <= 1:
            raise ValueError(f"--threshold {args.threshold} must be within [0, 1]")
        check_files(args.images)
        if args.json:
            check_output(args.json, "--json")
        if args.draw:
            check_output(args.draw, "--draw", is_folder=True)
        config = load_config(args.cfg, args.opts, flags)
        results = find(config, args.images, args.threshold, args.draw)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for result in results:
        print(describe(result))
        if "picture" in result:
            print(f"  {result['picture']}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
