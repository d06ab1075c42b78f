"""Published weights into a model: any container, name prefix, image size, channel and class count.

What was loaded, resized, remapped and left out is reported; what does not fit is an error, unless asked for.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from timm.data import ImageNetInfo
from timm.models import adapt_input_conv
from torch import Tensor, nn

from utils.checkpoint import fetch, load_file
from utils.names import is_under
from utils.spelling import nearest
from utils.wrappers import unwrap

from .backbone import CONSTANT_BUFFERS, Backbone
from .layers.conv_stem import Affine
from .layers.grained import GrainedQueries
from .layers.resize import (
    ResizesTables,
    resize_bias_table,
    resize_complex_filter,
    resize_position_grid,
)
from .layers.tokens import to_pair

_LOG = logging.getLogger(__name__)

_CONTAINERS = ("model", "state_dict", "module")
_EMA_CONTAINERS = ("ema", "model_ema", "state_dict_ema")
# DDP, torch.compile, contrastive and masked pre-training (MoBY, SimMIM), detectors.
_PREFIXES = ("module", "_orig_mod", "encoder", "backbone")
# Where a model without classes has no classifier to ask for its name.
_HEAD_NAMES = ("head", "head_dist", "aux_head", "classifier", "fc")
# Parts of a model for dense tasks (models/heads/dense.py): what classification weights start, and the rest.
_BACKBONE = "backbone"
_DENSE_PARTS = ("pyramid", "head")

# Last name components of buffers that a file may lack: the model's own are as good.
_OPTIONAL = ("num_batches_tracked", "splits")

# ImageNet-22k lacks one class of ImageNet-1k, the teddy bear. In its place Swin's list
# (data/map22kto1k.txt) has the garment that is called "teddy" too.
_STAND_INS = {"n04399382": "n03013580"}

_UNKNOWN_GRID = (
    "a grid of the file is neither square nor one of DATA.IMG_SIZE in its config: save the weights as "
    "{'model': weights, 'config': {'DATA': {'IMG_SIZE': [height, width]}}}"
)


@dataclass
class LoadReport:
    """What became of the tensors of a file and of a model.

    Attributes:
        source: the file, and the container in it.
        loaded: tensors of the model that came from the file, resized ones included.
        missing: names in the model that the file lacks; they keep their fresh values.
        unexpected: names in the file that the model lacks.
        resized: name -> (shape in the file, shape in the model).
        adapted: the same of a first convolution, and an affine map before it, whose images have other
            channels.
        remapped: the same of a classifier, whose rows for the classes of ImageNet-1k were taken from one for
            ImageNet-22k.
        head_replaced: names of the model's classifier that stayed fresh, or of the file's that a model
            without classifier left out.
        other_head: names of the file's neck and head that a model for dense tasks has no place for.
        fresh_head: names of a model's pyramid and head for dense tasks that keep their fresh values.
    """

    source: str
    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    adapted: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    remapped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    head_replaced: list[str] = field(default_factory=list)
    other_head: list[str] = field(default_factory=list)
    fresh_head: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.loaded} tensors loaded"]
        if self.resized:
            sizes = sorted({f"{old} -> {new}" for old, new in self.resized.values()})
            lines.append(f"  resized {len(self.resized)}: {_short(self.resized)}; {_short(sizes)}")
        for name, (old, new) in self.adapted.items():
            lines.append(f"  adapted to the channels of the images: {name}; {old} -> {new}")
        if self.remapped:
            places = ", ".join(f"{name}, has that of {like}" for name, like in _STAND_INS.items())
            lines.append(
                f"  remapped to the rows of ImageNet-1k: {_short(self.remapped)}; the one class that "
                f"ImageNet-22k lacks, {places}"
            )
        if self.head_replaced:
            lines.append(f"  classifier not taken from the file: {_short(self.head_replaced)}")
        if self.other_head:
            lines.append(f"  of another head, left out: {_short(self.other_head)}")
        if self.missing:
            lines.append(f"  not in the file, fresh: {_short(self.missing)}")
        if self.unexpected:
            lines.append(f"  not in the model, left out: {_short(self.unexpected)}")
        return "\n".join(lines)


def load_pretrained(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    name: str = "",
    allow_partial: bool = False,
    use_ema: bool = False,
    resize: bool = True,
    new_head: bool = True,
) -> LoadReport:
    """Load published weights into `model`, in place, and log what happened.

    Position tables, bias tables and Fourier filters of another size are resampled by their papers'
    recipes. A first convolution for RGB is summed for grey images, and repeated and rescaled for other
    channels; an affine map before it is averaged, or repeated. Of a classifier for
    the 21841 classes of ImageNet-22k, a model of 1000 classes takes the rows of ImageNet-1k. One of any
    other class count, or one that the file lacks, stays as the model built it: call this before training,
    on a fresh model.

    A model for dense tasks takes its backbone from a classifier's file, from one of ours for dense tasks, or
    from a detector's or segmenter's whose names begin with `backbone.`, as those of mmdet do; its head from
    one of ours with the same head, but for layers with a row per class where the classes are others.

    Args:
        model: may be wrapped (DDP, torch.compile); one on the meta device takes the file's own tensors.
        source: a file, an http(s) URL, or the content of a file.
        name: what messages call the source; its path if empty.
        allow_partial: tolerate missing and unexpected names and, for those, other shapes.
        use_ema: take the averaged weights that the file has beside the plain ones; those of a file
            with nothing else are taken anyway.
        resize: False refuses tables of another size.
        new_head: False refuses a file whose classifier or first convolution does not fit: for
            evaluation.

    Raises:
        ValueError: there is no such file, it is unsafe or damaged, it has no (EMA) weights, or names or
            shapes do not fit; never loads a part before it raises.
    """
    model = unwrap(model)
    if isinstance(source, Mapping):
        content = source
    else:
        content = load_file(fetch(str(source)))
        name = name or str(source)
    name = name or "the given state"
    weights, where = find_weights(content, use_ema, name)
    report = LoadReport(f"{name}{where}")
    backbone = _backbone_in(model)
    own = {n: t for n, t in model.state_dict().items() if not _is_constant(n)}
    weights = {
        n: t
        for n, t in strip_prefixes(weights, own, name, keep_backbone=backbone is not None).items()
        if not _is_constant(n)
    }
    if backbone is not None:
        weights = _placed_in_dense(weights, report)
    if own and not weights.keys() & own.keys():
        raise ValueError(
            f"{name} has no tensor of this model: it has {_short(sorted(weights), 3)}, "
            f"{type(model).__name__} has {_short(sorted(own), 3)}"
        )
    if backbone is not None:
        head_problem = _fit_dense_head(weights, own, report)
    else:
        head = _head_prefixes(model)
        if new_head:
            _remap_head(weights, own, head, report)
        head_problem = _replace_head(weights, own, head, report)
    misfits, reasons = _refuse_splits(model, weights)
    stem = _first_conv(model)
    image = _image_size(content)
    grids = model.position_tables() if isinstance(model, Backbone) else {}
    for key in sorted(weights.keys() & own.keys()):
        old, new = weights[key], own[key]
        shapes = (tuple(old.shape), tuple(new.shape))
        owner = model.get_submodule(key.rpartition(".")[0])
        adapted = None
        if new_head and stem in own and shapes[0] != shapes[1]:
            adapted = _adapt_channels(owner, key == stem, old, shapes[1], own[stem].shape[1])
        if adapted is not None:
            weights[key] = adapted
            report.adapted[key] = shapes
            continue
        try:
            table = _resize(owner, key, old, shapes[1], grids.get(key), image)
        except ValueError as error:
            table = None
            if resize and str(error) not in reasons:
                reasons.append(str(error))
        if table is old:
            continue
        if table is not None and resize:
            weights[key] = table
            report.resized[key] = shapes
        else:
            misfits[key] = f"{key} {shapes[0]} instead of {shapes[1]}"
            del weights[key]
    fresh_head = set(report.head_replaced)
    optional = {name for name in own if name.rsplit(".", 1)[-1] in _OPTIONAL}
    report.missing = sorted(own.keys() - weights.keys() - fresh_head - optional)
    if backbone is not None:
        fresh = own.keys() - weights.keys() - optional
        report.fresh_head = sorted(n for n in fresh if _is_under(n, _DENSE_PARTS))
    report.unexpected = sorted(weights.keys() - own.keys())
    report.loaded = len(own.keys() & weights.keys())
    head_problem = "" if new_head else head_problem
    _refuse_misfits(
        report, misfits, reasons, allow_partial, head_problem, _dense_differences(model, backbone)
    )
    # Strictness is settled above; the constants that a backbone keeps by itself are not in `weights`.
    fitting = {k: weights[k] for k in own.keys() & weights.keys()}
    on_meta = any(tensor.is_meta for tensor in own.values())
    model.load_state_dict(fitting, strict=False, assign=on_meta)
    _LOG.info("%s", report)
    return report


def has_averaged_weights(content: Any) -> bool:
    """Whether a checkpoint's content has averaged weights, so that `use_ema` would find them."""
    return isinstance(content, Mapping) and any(
        isinstance(content.get(key), Mapping) for key in _EMA_CONTAINERS
    )


def find_weights(
    content: Any, use_ema: bool = False, name: str = "the checkpoint"
) -> tuple[dict[str, Tensor], str]:
    """The state dict inside a checkpoint's content, and where it was (` [model]`).

    Averaged weights are taken without `use_ema` if they are the only ones.

    Raises:
        ValueError: there is none, no averaged one although `use_ema`, or several averaged ones only.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds a {type(content).__name__}, not a dict of tensors")
    keys = _EMA_CONTAINERS if use_ema else _CONTAINERS
    for key in keys:
        if isinstance(content.get(key), Mapping):
            # The averaged weights can be wrapped once more, as in {"model_ema": {"module": ...}}.
            inner, where = find_weights(content[key], False, name)
            return inner, f" [{key}]{where}"
    if use_ema:
        raise ValueError(
            f"{name} has no averaged weights under any of {list(keys)}; "
            f"it has {_short(sorted(map(str, content)))}: set MODEL.PRETRAINED_EMA False"
        )
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        averaged = [key for key in _EMA_CONTAINERS if isinstance(content.get(key), Mapping)]
        if len(averaged) == 1:
            _LOG.info("%s has averaged weights only: taking '%s'", name, averaged[0])
            return find_weights(content, True, name)
        hint = (
            f"; MODEL.PRETRAINED_EMA True takes the first of the averaged ones, {averaged}"
            if averaged
            else ""
        )
        raise ValueError(
            f"{name} has no weights: none of {list(keys)} and no tensor, "
            f"only {_short(sorted(map(str, content)))}{hint}"
        )
    return tensors, ""


def strip_prefixes(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Any],
    name: str = "the checkpoint",
    *,
    keep_backbone: bool = False,
) -> dict[str, Tensor]:
    """Take wrappers' prefixes off names, as often as they are there, until the model knows the name.

    Args:
        keep_backbone: `backbone.` is a part of the model, and no wrapper.

    Raises:
        ValueError: two tensors end up with one name.
    """
    prefixes = set(_PREFIXES) - ({_BACKBONE} if keep_backbone else set())
    stripped: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, tensor in weights.items():
        short = key
        while short not in own and short.split(".", 1)[0] in prefixes and "." in short:
            short = short.split(".", 1)[1]
        if short in stripped:
            raise ValueError(
                f"{name}: {key} and {origin[short]} are both '{short}' without their prefixes; "
                "save the part that you want into a file of its own"
            )
        stripped[short], origin[short] = tensor, key
    return stripped


def _is_constant(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in CONSTANT_BUFFERS


def _head_prefixes(model: nn.Module) -> list[str]:
    """Names of the modules that the model calls its classifier; it may have several (DeiT distilled)."""
    if not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()
    heads = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    return [name for name, module in model.named_modules() if any(module is h for h in heads)]


def _is_under(name: str, prefixes: Iterable[str]) -> bool:
    return any(is_under(name, prefix) for prefix in prefixes)


def _replace_head(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], head: list[str], report: LoadReport
) -> str:
    """Drop the file's classifier where it does not fit, as a whole: half of one is no use.

    Returns:
        Why the model could not be evaluated now, and what to do; empty if nothing is fresh.
    """
    ours = {name for name in own if _is_under(name, head)}
    if ours:
        if all(name in weights and weights[name].shape == own[name].shape for name in ours):
            return ""
        report.head_replaced = sorted(ours)
        dropped = [name for name in weights if _is_under(name, head)]
    else:
        dropped = [
            name
            for name in weights
            if _is_under(name, {*head, *_HEAD_NAMES} - {""}) and name not in own
        ]
        report.head_replaced = sorted(dropped)
    # Of a classifier with hidden layers, only the last has a row per class.
    counts = {
        (*weights[name].shape[:1], *own[name].shape[:1])
        for name in set(dropped) & ours
        if weights[name].ndim and weights[name].shape[:1] != own[name].shape[:1]
    }
    for name in dropped:
        del weights[name]
    if not ours:
        return ""
    problem = f"the classifier does not fit: {_short(report.head_replaced)}; "
    if not dropped:
        problem += "the file has none; "
    elif len(counts) == 1:
        theirs, mine = counts.pop()
        problem += (
            f"the file's has {theirs} classes, the model's {mine}; set MODEL.NUM_CLASSES {theirs} and use "
            "data with these classes, or "
        )
    return problem + "train a new one first, with --pretrained and without --eval"


def _backbone_in(model: nn.Module) -> Backbone | None:
    """The backbone of a model for dense tasks; None if the model is no such."""
    inner = getattr(model, _BACKBONE, None)
    return inner if isinstance(model, Backbone) and isinstance(inner, Backbone) else None


def _dense_differences(model: nn.Module, backbone: Backbone | None) -> tuple[str, ...]:
    """Name prefixes of the model that classification weights may lack, or have beyond it."""
    if backbone is not None:
        prefixes = (f"{_BACKBONE}.{prefix}" for prefix in backbone.dense_differences())
        return (*prefixes, *_DENSE_PARTS)
    return model.dense_differences() if getattr(model, "num_classes", 1) == 0 else ()


def _placed_in_dense(weights: dict[str, Tensor], report: LoadReport) -> dict[str, Tensor]:
    """Any file's tensors by the names of a model for dense tasks; parts with no place there are left out.

    A classifier's names are those of the backbone alone, and its classifier is dropped.
    """
    if not any(_is_under(name, [_BACKBONE]) for name in weights):
        weights = {f"{_BACKBONE}.{name}": tensor for name, tensor in weights.items()}
    classifier = [f"{_BACKBONE}.{name}" for name in _HEAD_NAMES]
    report.head_replaced = sorted(name for name in weights if _is_under(name, classifier))
    parts = (_BACKBONE, *_DENSE_PARTS)
    report.other_head = sorted(name for name in weights if not _is_under(name, parts))
    dropped = {*report.head_replaced, *report.other_head}
    return {name: tensor for name, tensor in weights.items() if name not in dropped}


def _fit_dense_head(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], report: LoadReport
) -> str:
    """Drop what does not fit of the file's pyramid and head: another kind, and layers of other classes.

    A head is of the same kind if one of both has all names of the other, as Mask R-CNN has those of Faster
    R-CNN.

    Returns:
        Why the model could not be evaluated now, and what to do; empty if nothing is fresh.
    """
    other, resized = [], set()
    for part in _DENSE_PARTS:
        ours = {name for name in own if _is_under(name, [part])}
        theirs = {name for name in weights if _is_under(name, [part])}
        both = ours & theirs if ours <= theirs or theirs <= ours else set()
        other += theirs - both
        resized |= {name for name in both if _differ_in_rows(weights[name], own[name])}
    layers = {name.rpartition(".")[0] for name in resized}
    of_classes = [name for name in weights if name.rpartition(".")[0] in layers]
    for name in (*other, *of_classes):
        del weights[name]
    report.other_head = sorted([*report.other_head, *other])
    report.head_replaced += sorted(of_classes)
    fresh = sorted(
        name
        for name in own
        if _is_under(name, _DENSE_PARTS) and name not in weights and not of_classes
    )
    if of_classes:
        problem = (
            f"the classifier does not fit: {_short(sorted(of_classes))}; set MODEL.NUM_CLASSES to that "
            "of the file and use data with these classes, or "
        )
    elif fresh:
        problem = (
            f"the file does not have this head, {_short(fresh)}; set MODEL.HEAD.TYPE to that of the "
            "file, or "
        )
    else:
        return ""
    return problem + "train a new one first, with --pretrained and without --eval"


def _differ_in_rows(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors differ in nothing but the number of their rows."""
    return bool(old.ndim) and old.shape[0] != new.shape[0] and old.shape[1:] == new.shape[1:]


def _remap_head(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], head: list[str], report: LoadReport
) -> None:
    """Turn the file's classifier into one for ImageNet-1k, if it is for ImageNet-22k and otherwise fits.

    A model with several classifiers (DeiT distilled) keeps them as it built them.
    """
    ours = {name: own[name] for name in sorted(own) if _is_under(name, head)}
    if len(head) != 1 or not ours.keys() <= weights.keys():
        return
    other = {n: t for n, t in ours.items() if weights[n].shape != t.shape}
    if not other or any(
        weights[name].shape != (21841, *tensor.shape[1:]) or tensor.shape[:1] != (1000,)
        for name, tensor in other.items()
    ):
        return
    rows = imagenet_1k_rows()
    for name, tensor in other.items():
        report.remapped[name] = (tuple(weights[name].shape), tuple(tensor.shape))
        weights[name] = weights[name][rows]


def imagenet_1k_rows() -> list[int]:
    """Row of each class of ImageNet-1k among the 21841 of ImageNet-22k, both sorted by synset.

    Swin's own list counts two synsets that are not among the 21841, so that 281 of its rows are those of the
    next class or the one after it. From the first of the two on, TinyViT's list agrees with this one.
    """
    rows = {synset: row for row, synset in enumerate(ImageNetInfo("imagenet-22k").label_names())}
    return [rows[_STAND_INS.get(name, name)] for name in ImageNetInfo("imagenet-1k").label_names()]


def _first_conv(model: nn.Module) -> str | None:
    """Name of the weight that sees the images: that of the model's first convolution."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return f"{name}.weight".lstrip(".")
    return None


def _adapt_channels(
    owner: nn.Module, is_stem: bool, old: Tensor, new: tuple[int, ...], in_chans: int
) -> Tensor | None:
    """A tensor that meets RGB images -> the same for images of `in_chans` channels; None if it is neither.

    Grey images give what they give in three channels, if an affine map treats all three alike.
    """
    if is_stem and _differ_in_rgb_only(tuple(old.shape), new):
        return adapt_input_conv(in_chans, old)
    if isinstance(owner, Affine) and (tuple(old.shape), new) == ((1, 3, 1, 1), (1, in_chans, 1, 1)):
        if in_chans == 1:
            return old.mean(dim=1, keepdim=True)
        return old[:, [channel % 3 for channel in range(in_chans)]]
    return None


def _refuse_splits(
    model: nn.Module, weights: dict[str, Tensor]
) -> tuple[dict[str, str], list[str]]:
    """Take out of `weights` the routers that choose among other granularities, and say why."""
    misfits, reasons = {}, []
    for path, module in model.named_modules():
        splits = weights.get(f"{path}.splits")
        if not isinstance(module, GrainedQueries) or splits is None:
            continue
        if problem := module.splits_problem(splits):
            for name in [name for name in weights if _is_under(name, [path])]:
                misfits[name] = f"{name} of SPLITS={splits.tolist()}"
                del weights[name]
            if problem not in reasons:
                reasons.append(problem)
    return misfits, reasons


def _differ_in_rgb_only(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether convolution `old` is for images of three channels, and `new` differs in nothing else."""
    return len(old) == len(new) == 4 and old[1] == 3 and (old[0], *old[2:]) == (new[0], *new[2:])


def _image_size(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width that a run was for, by the configuration that it saved beside its weights."""
    config = content.get("config")
    try:
        config = yaml.safe_load(config) if isinstance(config, str) else config
        return to_pair(config["DATA"]["IMG_SIZE"])
    except (yaml.YAMLError, TypeError, LookupError, ValueError):
        return None  # not a configuration of this lineage


def _resize(
    owner: nn.Module,
    key: str,
    old: Tensor,
    new: tuple[int, ...],
    grid: tuple[int, tuple[int, int], str] | None,
    image: tuple[int, int] | None,
) -> Tensor | None:
    """Tensor `old` of the file as the model has it: itself if it fits; None if it is no table.

    The file's grid is that of its images' size, if known and fitting, else square. The model's is
    square, unless it says otherwise: `grid` is (special tokens, (h, w), interpolation mode).

    Raises:
        ValueError: it is such a table and cannot be resized; says why.
    """
    leaf = key.rsplit(".", 1)[-1]
    if isinstance(owner, ResizesTables):
        return owner.resize_table(leaf, old, partial(_file_grid, image))
    if _same_layout(tuple(old.shape), new, grid, image):
        return old
    if _is_position_table(key):
        if old.ndim != 3 or len(new) != 3 or old.shape[2] != new[2]:
            return None
        # PVT resamples bilinearly and calls its tables pos_embed1 to pos_embed4; ViT and Swin bicubically.
        mode = "bilinear" if leaf[-1].isdigit() else "bicubic"
        choices = [(grid[0], grid[1])] if grid else _square_grids(new[1])
        for num_special, size in choices:
            side = _root(old.shape[1] - num_special)
            square = (side, side) if side else None
            before = _image_grid(old.shape[1] - num_special, image) or square
            if before and num_special + size[0] * size[1] == new[1]:
                mode = grid[2] if grid else mode
                return resize_position_grid(old, num_special, before, size, mode)
        raise ValueError(_special_tokens(old.shape[1], [n for n, _ in choices]) or _UNKNOWN_GRID)
    if leaf == "relative_position_bias_table":
        if old.ndim != 2 or len(new) != 2 or old.shape[1] != new[1]:
            return None
        before = _root(old.shape[0])
        after = grid[1] if grid else (((_root(new[0]) or 0) + 1) // 2,) * 2
        if not before or before % 2 == 0 or (2 * after[0] - 1) * (2 * after[1] - 1) != new[0]:
            return None
        return resize_bias_table(old, ((before + 1) // 2,) * 2, after)
    if leaf == "complex_weights" and old.ndim == len(new) == 4 and tuple(old.shape[2:]) == new[2:]:
        return resize_complex_filter(old, new[:2])
    return None


def _is_position_table(key: str) -> bool:
    leaf = key.rsplit(".", 1)[-1]
    return leaf == "absolute_pos_embed" or leaf.rstrip("1234") == "pos_embed"


def _same_layout(
    old: tuple[int, ...],
    new: tuple[int, ...],
    grid: tuple[int, tuple[int, int], str] | None,
    image: tuple[int, int] | None,
) -> bool:
    """Whether a tensor has the model's shape and, if it is a table of a known grid, that grid."""
    if old != new or not grid or len(old) != 3:
        return old == new
    return _image_grid(old[1] - grid[0], image) in (None, grid[1])  # 8x8 has as many as 4x16


def _file_grid(image: tuple[int, int] | None, length: int, own: tuple[int, int]) -> tuple[int, int]:
    """Grid (h, w) of `length` patches in the file: of its images, else the model's `own`, else square.

    Raises:
        ValueError: none of these has so many.
    """
    side = _root(length)
    square = (side, side) if side else None
    grid = _image_grid(length, image) or (own if math.prod(own) == length else square)
    if grid is None:
        raise ValueError(_UNKNOWN_GRID)
    return grid


def _image_grid(length: int, image: tuple[int, int] | None) -> tuple[int, int] | None:
    """Grid (h, w) of `length` patches of an image, or None if there is none."""
    for stride in range(1, max(image) + 1) if image else ():
        grid = (-(-image[0] // stride), -(-image[1] // stride))
        if grid[0] * grid[1] == length:  # a larger stride gives fewer patches: no other grid fits
            return grid
    return None


def _special_tokens(length: int, ours: list[int]) -> str:
    """What to do about a table of `length` entries with other special tokens; empty if it has none such."""
    theirs = [n for n in (0, 1, 2) if n not in ours and _root(length - n)]
    if not theirs or not ours:
        return ""
    return (
        f"special tokens: the file's table has {theirs[0]} before its grid, the model's "
        f"{' or '.join(map(str, ours))} (1: class token, 2: a distillation token too); choose the variant "
        "that the file is of, for DeiT with or without distillation (MODEL.DEIT.DISTILLED)"
    )


def _square_grids(length: int) -> list[tuple[int, tuple[int, int]]]:
    """(special tokens, square grid) that make up a table of `length` entries."""
    sides = [(num_special, _root(length - num_special)) for num_special in (0, 1, 2)]
    return [(num_special, (side, side)) for num_special, side in sides if side]


def _root(number: int) -> int | None:
    """Integer square root of a positive square number, else None."""
    side = math.isqrt(max(number, 0))
    return side if side and side * side == number else None


def _refuse_misfits(
    report: LoadReport,
    misfits: Mapping[str, str],
    reasons: Iterable[str],
    allow_partial: bool,
    head_problem: str,
    differences: Iterable[str] = (),
) -> None:
    """ValueError that names everything that does not fit at once, unless it was asked for.

    Names under the prefixes `differences` may be on one side only.
    """
    problems = []
    if misfits and not allow_partial:
        problems += [f"other shapes: {_short(misfits.values())}", *reasons]
    missing = [
        name for name in report.missing if name not in misfits and not _is_under(name, differences)
    ]
    unexpected = [name for name in report.unexpected if not _is_under(name, differences)]
    if missing and not allow_partial:
        problems.append(f"missing {len(missing)}: {_short(missing)}")
    if unexpected and not allow_partial:
        problems.append(f"unexpected {len(unexpected)}: {_short(unexpected)}")
        if missing:
            close = nearest(unexpected[0], missing)[:3]
            problems.append(f"perhaps '{unexpected[0]}' is meant to be one of {close}")
    advice = ""
    if problems:
        advice = (
            ". Check MODEL.TYPE, its sizes and MODEL.IN_CHANS, or set MODEL.PRETRAINED_PARTIAL True to "
            "load what fits"
        )
    if head_problem:
        problems.append(head_problem)
    if problems:
        raise ValueError(f"{report.source} does not fit the model; {'; '.join(problems)}{advice}")
    if misfits and not report.loaded:
        raise ValueError(f"{report.source}: no tensor fits the model; {_short(misfits.values())}")


def _short(names: Iterable[str], count: int = 8) -> str:
    """The first `count` names, and how many more there are."""
    names = list(names)
    more = f", and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
