"""Say what a classifier sees in images, and draw where it looks.

    python tools/predict.py --cfg configs/evit/evit_small_r07_fuse.yaml --resume best.pth cat.jpg dog.png
    python tools/predict.py --cfg my_experiment.yaml --resume best.pth photos/*.jpg --draw looks

Prints the most probable classes of each image, by the names that the checkpoint holds, or ImageNet's. With
--draw it writes a picture for each image: what the model was given, resized and cropped as in evaluation, and
over it each map of `token_maps` that has the image's positions: attention, gates, granularities, and patches
that were kept. One map's brightest place is its largest number; heads are averaged, and dropped patches dark.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from PIL import UnidentifiedImageError
from timm.data import ImageNetInfo
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import check_is_classifier, load_config, output_dir  # noqa: E402  found through the line above
from data.build import build_finish, build_transform  # noqa: E402
from data.registry import decode_image  # noqa: E402
from models import Backbone  # noqa: E402
from modes.build import build_placed, known_classes, load_weights, source_of  # noqa: E402
from utils.arguments import add_opts  # noqa: E402
from utils.checkpoint import fetch, load_file  # noqa: E402
from utils.distributed import choose_device, read_launch  # noqa: E402
from utils.pictures import save_picture, side_by_side  # noqa: E402

# Share of a map in what is drawn of it and the image.
ALPHA = 0.6

COLOURS = "inferno"


class Prediction(NamedTuple):
    """Of one image: classes by falling probability, pixels (C, H, W) uint8, and maps (H', W') by name."""

    path: Path
    classes: list[tuple[str, float]]
    pixels: Tensor
    maps: dict[str, Tensor]


class Predictor:
    """A trained classifier with its evaluation transform and the names of its classes.

    Raises:
        ValueError: the task is another one, or there are no weights.
        FileNotFoundError: the weights are not there.
    """

    def __init__(self, config: Any):
        check_is_classifier(config, "a class is predicted")
        source = source_of(config, "throughput", output_dir(config) / "checkpoints" / "last.pth")
        if source.kind == "scratch":
            raise ValueError("the weights are fresh and would guess: give --resume")
        content = load_file(fetch(source.path), mapped=True)
        names = content.get("classes") if isinstance(content, Mapping) else None
        names = list(names) if isinstance(names, Sequence) else []
        self.device = choose_device(config.DEVICE, read_launch({}), torch.cuda.device_count())
        num_classes = len(names) or known_classes(config)
        self.model: Backbone = build_placed(config, num_classes, self.device).eval()
        load_weights(config, self.model, source)
        self.transform = build_transform(config, training=False)
        self.finish = build_finish(config)
        self.names = names

    @torch.inference_mode()
    def __call__(self, path: Path, top: int = 5) -> Prediction:
        """The `top` classes of an image file, and where the model looked.

        Raises:
            ValueError: the file is no image.
        """
        try:
            image = decode_image(path.read_bytes())
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        pixels = torch.from_numpy(np.array(self.transform(image))).permute(2, 0, 1)
        logits = self.model(self.finish(pixels[None].to(self.device)))[0]
        probs, labels = logits.float().softmax(-1).topk(min(top, len(logits)))
        names = [self.name(label, len(logits)) for label in labels.tolist()]
        maps = map_positions(self.model.token_maps())
        return Prediction(path, list(zip(names, probs.tolist(), strict=True)), pixels, maps)

    def name(self, label: int, num_classes: int) -> str:
        """Of a class: the checkpoint's, ImageNet's for 1000 of them, or its number."""
        if label < len(self.names):
            return str(self.names[label])
        if num_classes == _imagenet().num_classes():
            return _imagenet().index_to_description(label)
        return f"class {label}"


@cache
def _imagenet() -> ImageNetInfo:
    """Reads its names from files, so once and not for each class."""
    return ImageNetInfo()


def map_positions(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of `token_maps` for one image, what has a number for each position: (H', W') float32, on the CPU.

    Attention is the mean over the heads; of a stage's blocks the last one is taken. What has other axes is
    left out: indices, points, filters, and attention to neighbours.
    """
    found = {}
    for name, values in maps.items():
        kind = name.split("::")[0]
        if kind == "attention" and values.ndim == 4:
            found[name] = values[0].float().mean(0)
        elif kind.startswith("stages.") and values.ndim == 4 and values.shape[1] == 1:
            found[name] = values[-1, 0].float()
        elif kind.startswith(("gate", "grain", "kept_mask")) and values.ndim == 3:
            found[name] = values[0].float()
    return {name: values.cpu() for name, values in found.items()}


def draw(prediction: Prediction) -> Tensor:
    """The image, and beside it the image under each of its maps: (3, H, W) uint8."""
    picture = prediction.pixels.expand(3, -1, -1)
    return side_by_side(picture, *(_overlay(picture, m) for m in prediction.maps.values()))


def _overlay(picture: Tensor, values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    # A map of one number only shows nothing: neither dark nor bright.
    shares = (values - low) / (high - low) if high > low else torch.full_like(values, 0.5)
    shares = F.interpolate(shares[None, None], picture.shape[1:], mode="nearest-exact")[0, 0]
    colours = torch.from_numpy(mpl.colormaps[COLOURS](shares.numpy())[..., :3]).float()
    mixed = (1 - ALPHA) * picture + ALPHA * 255 * colours.permute(2, 0, 1)
    return mixed.round().clamp(0, 255).byte()


def main(argv: Sequence[str] | None = None) -> list[Prediction]:
    """Command line -> the predictions, which are printed too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files")
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the experiment's YAML file")
    parser.add_argument(
        "--resume", metavar="FILE", help="checkpoint; without one the run's last is taken"
    )
    parser.add_argument("--top", type=int, default=5, help="classes of each image")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="for pictures of the maps")
    add_opts(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    flags = {"MODEL.RESUME": args.resume} if args.resume else {}
    try:
        if args.top < 1:
            raise ValueError(f"--top {args.top} must be at least 1")
        if missing := [str(path) for path in args.images if not path.is_file()]:
            raise FileNotFoundError(f"there are no files {missing[:5]}")
        predictor = Predictor(load_config(args.cfg, args.opts, flags))
        predictions = [predictor(path, args.top) for path in args.images]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for number, prediction in enumerate(predictions):
        chances = ", ".join(f"{100 * chance:.1f} % {name}" for name, chance in prediction.classes)
        print(f"{prediction.path}: {chances}")
        if args.draw:
            # Numbered: files of two folders may have one name.
            target = args.draw / f"{number}_{prediction.path.stem}.png"
            save_picture(draw(prediction), target)
            print(f"  {target}: image, {', '.join(prediction.maps) or 'no maps'}")
    return predictions


if __name__ == "__main__":
    main()
