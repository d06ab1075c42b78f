"""Published weights into a model: any container, name prefix, image size, channel and class count.

What was loaded, resized, remapped and left out is reported; what does not fit is an error, unless asked for.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from utils.checkpoint_files import fetch, load_file
from utils.names import is_under_any
from utils.spelling import nearest
from utils.wrappers import unwrap

from ..backbone import CONSTANT_BUFFERS, Backbone
from ..layers.grained import GrainedQueries
from ..layers.tokens import to_pair
from .classifier import classifier_names, remap_classifier, replace_classifier
from .containers import find_weights, has_averaged_weights, has_both_weights, strip_prefixes
from .dense import DENSE_PARTS, backbone_in, dense_differences, fit_dense_head, placed_in_dense
from .imagenet import imagenet_1k_rows
from .report import LoadReport, short
from .stem import adapt_channels, first_conv
from .tables import resized

__all__ = [
    "LoadReport",
    "find_weights",
    "has_averaged_weights",
    "has_both_weights",
    "imagenet_1k_rows",
    "load_pretrained",
    "strip_prefixes",
]

_LOG = logging.getLogger(__name__)

# Last name components of buffers that a file may lack: the model's own are as good.
_OPTIONAL = ("num_batches_tracked", "splits")


@dataclass
class _Misfits:
    """Tensors of a file that the model cannot take: what is wrong by name, and the reasons, each once."""

    names: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def explain(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


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
        model: may be wrapped (DDP, torch.compile); one on the meta device takes the file's own tensors, and
            makes its constants. What else the file lacks stays there, such as a classifier of other classes.
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
    content, name = _read(source, name)
    weights, where = find_weights(content, use_ema, name)
    report = LoadReport(f"{name}{where}")
    backbone = backbone_in(model)
    own = {n: t for n, t in model.state_dict().items() if not _is_constant(n)}
    weights = strip_prefixes(weights, own, name, keep_backbone=backbone is not None)
    weights = {n: t for n, t in weights.items() if not _is_constant(n)}
    if backbone is not None:
        weights = placed_in_dense(weights, report)
    if own and not weights.keys() & own.keys():
        raise ValueError(
            f"{name} has no tensor of this model: it has {short(sorted(weights), 3)}, "
            f"{type(model).__name__} has {short(sorted(own), 3)}"
        )
    if backbone is not None:
        head_problem = fit_dense_head(weights, own, report)
    else:
        head = classifier_names(model)
        if new_head:
            remap_classifier(weights, own, head, report)
        head_problem = replace_classifier(weights, own, head, report)
    misfits = _Misfits()
    _refuse_splits(model, weights, misfits)
    _fit_shapes(model, weights, own, _image_size(content), resize, new_head, report, misfits)
    _compare_names(weights, own, report, dense=backbone is not None)
    head_problem = "" if new_head else head_problem
    differences = dense_differences(model, backbone)
    _refuse_misfits(report, misfits, allow_partial, head_problem, differences)
    # Strictness is settled above; the constants that a backbone keeps by itself are not in `weights`.
    fitting = {k: weights[k] for k in own.keys() & weights.keys()}
    on_meta = any(tensor.is_meta for tensor in own.values())
    model.load_state_dict(fitting, strict=False, assign=on_meta)
    if on_meta:
        _make_buffers(model, next((t.device for t in fitting.values()), torch.device("cpu")))
    _LOG.info("%s", report)
    return report


def _read(source: str | Path | Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], str]:
    """The content of `source`, and what messages call it."""
    content = source
    if isinstance(source, str | Path):
        content, name = load_file(fetch(str(source))), name or str(source)
    name = name or "the given state"
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds a {type(content).__name__}, not a dict of weights")
    return content, name


def _fit_shapes(
    model: nn.Module,
    weights: dict[str, Tensor],
    own: Mapping[str, Tensor],
    image: tuple[int, int] | None,
    resize: bool,
    new_head: bool,
    report: LoadReport,
    misfits: _Misfits,
) -> None:
    """Give tensors of `weights` the shapes of `own`; what cannot have it leaves them for `misfits`.

    Args:
        image: size that the weights were trained at, where the file says so.
        resize, new_head: as in `load_pretrained`.
    """
    stem = first_conv(model)
    grids = model.position_tables() if isinstance(model, Backbone) else {}
    for key in sorted(weights.keys() & own.keys()):
        old = weights[key]
        shapes = (tuple(old.shape), tuple(own[key].shape))
        owner = model.get_submodule(key.rpartition(".")[0])
        adapted = None
        if new_head and stem in own and shapes[0] != shapes[1]:
            adapted = adapt_channels(owner, key == stem, old, shapes[1], own[stem].shape[1])
        if adapted is not None:
            weights[key] = adapted
            report.adapted[key] = shapes
            continue
        try:
            table = resized(owner, key, old, shapes[1], grids.get(key), image)
        except ValueError as error:
            table = None
            if resize:
                misfits.explain(str(error))
        if table is old:
            continue
        if table is not None and resize:
            weights[key] = table
            report.resized[key] = shapes
        else:
            misfits.names[key] = f"{key} {shapes[0]} instead of {shapes[1]}"
            del weights[key]


def _compare_names(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], report: LoadReport, dense: bool
) -> None:
    """Tell `report` which names are in both, in the model only and in the file only."""
    optional = {name for name in own if name.rsplit(".", 1)[-1] in _OPTIONAL}
    lacking = own.keys() - weights.keys() - optional
    report.missing = sorted(lacking - set(report.head_replaced))
    if dense:
        report.fresh_head = sorted(name for name in lacking if is_under_any(name, DENSE_PARTS))
    report.unexpected = sorted(weights.keys() - own.keys())
    report.loaded = len(own.keys() & weights.keys())


def _make_buffers(model: nn.Module, device: torch.device) -> None:
    """Give a model from the meta device what it knows without a file: constants, and counters from 0."""
    for module in model.modules():
        with device:
            made = module.constants() if hasattr(module, "constants") else {}
            made = {"num_batches_tracked": torch.tensor(0), **made}
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name in made:
                setattr(module, name, made[name])


def _is_constant(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in CONSTANT_BUFFERS


def _refuse_splits(model: nn.Module, weights: dict[str, Tensor], misfits: _Misfits) -> None:
    """Take out of `weights` the routers that choose among other granularities, and say why."""
    for path, module in model.named_modules():
        splits = weights.get(f"{path}.splits")
        if not isinstance(module, GrainedQueries) or splits is None:
            continue
        if problem := module.splits_problem(splits):
            for name in [name for name in weights if is_under_any(name, [path])]:
                misfits.names[name] = f"{name} of SPLITS={splits.tolist()}"
                del weights[name]
            misfits.explain(problem)


def _image_size(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width that a run was for, by the configuration that it saved beside its weights."""
    config = content.get("config")
    try:
        config = yaml.safe_load(config) if isinstance(config, str) else config
        return to_pair(config["DATA"]["IMG_SIZE"])
    except (yaml.YAMLError, TypeError, LookupError, ValueError):
        return None  # not a configuration of this lineage


def _refuse_misfits(
    report: LoadReport,
    misfits: _Misfits,
    allow_partial: bool,
    head_problem: str,
    differences: Iterable[str] = (),
) -> None:
    """ValueError that names everything that does not fit at once, unless it was asked for.

    Names under the prefixes `differences` may be on one side only.
    """
    problems = []
    if misfits.names and not allow_partial:
        problems += [f"other shapes: {short(misfits.names.values())}", *misfits.reasons]
    missing = [
        name
        for name in report.missing
        if name not in misfits.names and not is_under_any(name, differences)
    ]
    unexpected = [name for name in report.unexpected if not is_under_any(name, differences)]
    if missing and not allow_partial:
        problems.append(f"missing {len(missing)}: {short(missing)}")
    if unexpected and not allow_partial:
        problems.append(f"unexpected {len(unexpected)}: {short(unexpected)}")
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
    if misfits.names and not report.loaded:
        raise ValueError(
            f"{report.source}: no tensor fits the model; {short(misfits.names.values())}"
        )
