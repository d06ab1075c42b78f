"""Say what a classifier sees in images, and draw where it looks.

    python tools/predict.py --cfg configs/evit/evit_small_r07_fuse.yaml --resume best.pth cat.jpg dog.png
    python tools/predict.py --cfg my_experiment.yaml --resume best.pth photos/*.jpg --draw looks
    python tools/predict.py --cfg my_experiment.yaml --resume best.pth cat.jpg --draw looks --cam

Prints the most probable classes of each image, by the names that the checkpoint holds, or ImageNet's. With
--draw it writes a picture for each image: what the model was given, resized and cropped as in evaluation, and
over it each map of `token_maps` that has the image's positions: attention, gates, granularities, and patches
that were kept. One map's brightest place is its largest number; heads are averaged, and dropped patches dark.

Detectors and segmenters: tools/predict_dense.py.

With --cam there is Grad-CAM too, for every architecture: where the last map speaks for the predicted class,
or for that of --class.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import check_is_classifier, load_config  # noqa: E402  found through the line above
from data.build import build_finish, build_transform  # noqa: E402
from data.registry import DamagedImageError, read_image  # noqa: E402
from models import Backbone  # noqa: E402
from models.evit import kept_patches  # noqa: E402
from models.layers.tokens import Size  # noqa: E402
from modes.build import load_trained  # noqa: E402
from utils.arguments import add_opts  # noqa: E402
from utils.distributed import own_device  # noqa: E402
from utils.files import check_files, check_output  # noqa: E402
from utils.pictures import draw_values, save_picture, side_by_side  # noqa: E402
from utils.spelling import nearest  # noqa: E402


class Prediction(NamedTuple):
    """Of one image: classes by falling probability, pixels (C, H, W) uint8, and maps (H', W') by name."""

    path: Path
    classes: list[tuple[str, float]]
    pixels: Tensor
    maps: dict[str, Tensor]


class Predictor:
    """A trained classifier with its evaluation transform and the names of its classes.

    Raises:
        ValueError: the task is another one, there are no weights, or they do not fit.
    """

    def __init__(self, config: Any):
        check_is_classifier(config, "a class is predicted (tools/predict_dense.py finds more)")
        self.device = own_device(config.DEVICE)
        self.model, self.names = load_trained(config, self.device)
        self.transform = build_transform(config, training=False)
        self.finish = build_finish(config)

    def __call__(
        self, path: Path, top: int = 5, cam: bool = False, target: str | None = None
    ) -> Prediction:
        """The `top` classes of an image file, and where the model looked.

        Args:
            cam: with Grad-CAM, as the first of the maps.
            target: name or number of its class; None is the predicted one.

        Raises:
            ValueError: the file is no image, there is no such class, or the model has no last map.
        """
        image = read_image(path)
        pixels = torch.from_numpy(np.array(self.transform(image))).permute(2, 0, 1)
        images = self.finish(pixels[None].to(self.device))
        # Not in inference mode: a table that a model keeps from it could not be used by Grad-CAM.
        with torch.no_grad():
            logits = self.model(images)[0]
            maps = map_positions(self.model.token_maps())
        probs, labels = logits.float().softmax(-1).topk(min(top, len(logits)))
        names = [self.name(label, len(logits)) for label in labels.tolist()]
        if cam:
            label = int(labels[0]) if target is None else self.label(target, len(logits))
            name = f"Grad-CAM of {self.name(label, len(logits))}"
            maps = {name: grad_cam(self.model, images, label), **maps}
        return Prediction(path, list(zip(names, probs.tolist(), strict=True)), pixels, maps)

    def label(self, target: str, num_classes: int) -> int:
        """Of a class by its name or number; of ImageNet's names one synonym is enough.

        Raises:
            ValueError: there is no such class, or several have this name.
        """
        names = (self.name(label, num_classes) for label in range(num_classes))
        known = [(name, *name.split(", ")) for name in names]
        found = [
            label
            for label, spellings in enumerate(known)
            if target.lower() in map(str.lower, spellings)
        ]
        if len(found) > 1:
            raise ValueError(f"--class '{target}' is a name of classes {found}: give one's number")
        if found:
            return found[0]
        if target.isdecimal() and int(target) < num_classes:
            return int(target)
        raise ValueError(
            f"--class '{target}' must be the name of a class, or a number from 0 to {num_classes - 1}; did "
            f"you mean one of {nearest(target, {word for words in known for word in words})[:3]}?"
        )

    def name(self, label: int, num_classes: int) -> str:
        """Of a class: the checkpoint's, ImageNet's for 1000 of them, or its number."""
        if label < len(self.names):
            return self.names[label]
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


def grad_cam(model: Backbone, images: Tensor, label: int) -> Tensor:
    """Grad-CAM of a class (arXiv:1610.02391, Eq. 1 and 2): images (1, C, H, W) -> (h, w), on the CPU.

    The map is what the classifier reads. Where that is special tokens only, it is what they attend to last,
    the input of the last block. Patches that were dropped before have 0.

    Args:
        model: in eval mode; its `token_maps` are of these images then.

    Raises:
        ValueError: the model has no map of the size that its contract says.
    """
    inputs: list[tuple[Any, ...]] = []  # of the last block, the map first

    def begin_graph(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs[:] = [(args[0].detach().requires_grad_(), *args[1:])]
        return inputs[0]

    layers = dict(model.named_modules())
    last = [layers[name] for name in model.layer_prefixes()[-1] if name in layers]
    hooks = [layer.register_forward_pre_hook(begin_graph) for layer in last]
    try:
        with torch.enable_grad():
            features = model.forward_features(images)
            logit = model.forward_head(features)[0, label]
    finally:
        for hook in hooks:
            hook.remove()
    assert inputs, f"nothing of the last depth {model.layer_prefixes()[-1]} has run"
    (given, *rest), stride = inputs[0], model.feature_info[-1]["stride"]
    size = (-(-images.shape[2] // stride), -(-images.shape[3] // stride))
    kept = _kept(model, size)
    # An EViT block that drops patches itself is told how many to keep.
    kept_before = kept[:-1] if kept and rest[0] is not None else kept
    slopes = torch.autograd.grad(logit, [features, given], materialize_grads=True)
    for x, slope, patches in zip(
        (features, given), slopes, (kept[-1:], kept_before[-1:]), strict=True
    ):
        values, weights = _on_grid(x, size, *patches), _on_grid(slope, size, *patches)
        if weights.any():
            return torch.einsum("chw,c->hw", values, weights.mean((1, 2))).relu()
    return torch.zeros(size)


def _kept(model: Backbone, size: Size) -> list[Tensor]:
    """Of each block of the last forward that dropped patches the (m,) that it kept, -1 for a fused token."""
    if not model.drops_tokens:
        return []
    maps = model.token_maps()
    indices = [values for name, values in maps.items() if name.startswith("kept_idx_")]
    return [kept[0] for kept in kept_patches(indices, size[0] * size[1], model.fuse_token)]


def _on_grid(x: Tensor, size: Size, patches: Tensor | None = None) -> Tensor:
    """Of one image a map (1, C, h, w) or (1, h, w, C), or tokens (1, N, C) -> (C, h, w), on the CPU.

    Special tokens come first, and are left out.

    Args:
        patches: (m,) that the tokens after the class token are, -1 for none; None: all, in raster order.

    Raises:
        ValueError: another shape.
    """
    x = x.detach()[0].float().cpu()
    num_patches = size[0] * size[1]
    if x.ndim == 3 and x.shape[:2] == size:
        return x.permute(2, 0, 1)
    if x.ndim == 3 and x.shape[1:] == size:
        return x
    if x.ndim == 2 and patches is not None:
        # One row more takes the fused tokens, which are no patch.
        rows = x.new_zeros(num_patches + 1, x.shape[1])
        rows[patches.cpu()] = x[1 : 1 + len(patches)]
        return rows[:-1].T.unflatten(1, size)
    if x.ndim == 2 and len(x) >= num_patches:
        return x[len(x) - num_patches :].T.unflatten(1, size)
    raise ValueError(
        f"Grad-CAM needs a map of {size[0]}x{size[1]} positions, as feature_info says, and the model gives "
        f"{tuple(x.shape)}: leave --cam out"
    )


def draw(prediction: Prediction) -> Tensor:
    """The image, and beside it the image under each of its maps: (3, H, W) uint8."""
    picture = prediction.pixels.expand(3, -1, -1)
    return side_by_side(picture, *(draw_values(picture, m) for m in prediction.maps.values()))


def main(argv: Sequence[str] | None = None) -> list[Prediction]:
    """Command line -> the predictions, printed one by one; status 1 or 2 if some or all are damaged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files")
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the experiment's YAML file")
    parser.add_argument(
        "--resume", metavar="FILE", help="checkpoint; needed unless the config names one"
    )
    parser.add_argument("--top", type=int, default=5, help="classes of each image")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="for pictures of the maps")
    parser.add_argument("--cam", action="store_true", help="--draw: Grad-CAM too")
    parser.add_argument(
        "--class",
        dest="target",
        metavar="NAME",
        help="--cam: class (name or number), instead of the first",
    )
    add_opts(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    flags = {"MODEL.RESUME": args.resume} if args.resume else {}
    try:
        if args.top < 1:
            raise ValueError(f"--top {args.top} must be at least 1")
        if args.cam and not args.draw:
            raise ValueError("--cam is drawn: give --draw FOLDER")
        if args.target is not None and not args.cam:
            raise ValueError(f"--class '{args.target}' is the class of --cam: give --cam too")
        check_files(args.images)
        if args.draw:
            check_output(args.draw, "--draw", is_folder=True)
        predictor = Predictor(load_config(args.cfg, args.opts, flags))
        predictions = []
        for number, path in enumerate(args.images):
            try:
                predictions.append(predictor(path, args.top, args.cam, args.target))
            except DamagedImageError as error:  # the others are told all the same
                print(error, file=sys.stderr)
                continue
            show(predictions[-1], number, args.draw)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if len(predictions) < len(args.images):
        sys.exit(1 if predictions else 2)
    return predictions


def show(prediction: Prediction, number: int, folder: Path | None) -> None:
    """Print the classes, and draw the maps into a folder if there is one."""
    chances = ", ".join(f"{100 * chance:.1f} % {name}" for name, chance in prediction.classes)
    print(f"{prediction.path}: {chances}")
    if folder:
        # Numbered: files of two folders may have one name.
        target = folder / f"{number}_{prediction.path.stem}.png"
        save_picture(draw(prediction), target)
        print(f"  {target}: image, {', '.join(prediction.maps) or 'no maps'}")


if __name__ == "__main__":
    main()
