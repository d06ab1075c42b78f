"""Files in models for dense tasks (`models/heads/dense.py`): a backbone, and where it fits a head."""

from collections.abc import Mapping

from torch import Tensor, nn

from utils.names import is_under_any

from ..backbone import Backbone
from .classifier import CLASSIFIER_NAMES
from .report import LoadReport, short

# Parts of a model for dense tasks: what classification weights start, and the rest.
BACKBONE = "backbone"
DENSE_PARTS = ("pyramid", "head")


def backbone_in(model: nn.Module) -> Backbone | None:
    """The backbone of a model for dense tasks; None if the model is no such."""
    inner = getattr(model, BACKBONE, None)
    return inner if isinstance(model, Backbone) and isinstance(inner, Backbone) else None


def dense_differences(model: nn.Module, backbone: Backbone | None) -> tuple[str, ...]:
    """Name prefixes of the model that classification weights may lack, or have beyond it."""
    if backbone is not None:
        prefixes = (f"{BACKBONE}.{prefix}" for prefix in backbone.dense_differences())
        return (*prefixes, *DENSE_PARTS)
    return model.dense_differences() if getattr(model, "num_classes", 1) == 0 else ()


def placed_in_dense(weights: dict[str, Tensor], report: LoadReport) -> dict[str, Tensor]:
    """Any file's tensors by the names of a model for dense tasks; parts with no place there are left out.

    A classifier's names are those of the backbone alone, and its classifier is dropped.
    """
    if not any(is_under_any(name, [BACKBONE]) for name in weights):
        weights = {f"{BACKBONE}.{name}": tensor for name, tensor in weights.items()}
    classifier = [f"{BACKBONE}.{name}" for name in CLASSIFIER_NAMES]
    report.head_replaced = sorted(name for name in weights if is_under_any(name, classifier))
    parts = (BACKBONE, *DENSE_PARTS)
    report.other_head = sorted(name for name in weights if not is_under_any(name, parts))
    dropped = {*report.head_replaced, *report.other_head}
    return {name: tensor for name, tensor in weights.items() if name not in dropped}


def fit_dense_head(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], report: LoadReport
) -> str:
    """Drop what does not fit of the file's pyramid and head: another kind, and layers of other classes.

    A head is of the same kind if one of both has all names of the other, as Mask R-CNN has those of Faster
    R-CNN.

    Returns:
        Why the model could not be evaluated now, and what to do; empty if nothing is fresh.
    """
    other, resized = [], set()
    for part in DENSE_PARTS:
        ours = {name for name in own if is_under_any(name, [part])}
        theirs = {name for name in weights if is_under_any(name, [part])}
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
        if is_under_any(name, DENSE_PARTS) and name not in weights and not of_classes
    )
    if of_classes:
        problem = (
            f"the classifier does not fit: {short(sorted(of_classes))}; set MODEL.NUM_CLASSES to that "
            "of the file and use data with these classes, or "
        )
    elif fresh:
        problem = (
            f"the file does not have this head, {short(fresh)}; set MODEL.HEAD.TYPE to that of the "
            "file, or "
        )
    else:
        return ""
    return problem + "train a new one first, with --pretrained and without --eval"


def _differ_in_rows(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors differ in nothing but the number of their rows."""
    return bool(old.ndim) and old.shape[0] != new.shape[0] and old.shape[1:] == new.shape[1:]
