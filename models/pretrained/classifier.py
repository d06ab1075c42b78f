"""A file's classifier in a model: kept, taken from ImageNet-22k's, or left fresh."""

from collections.abc import Mapping

from torch import Tensor, nn

from utils.names import is_under_any

from .imagenet import imagenet_1k_rows
from .report import LoadReport, short

# Where a model without classes has no classifier to ask for its name.
CLASSIFIER_NAMES = ("head", "head_dist", "aux_head", "classifier", "fc")


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the modules that the model calls its classifier; it may have several (DeiT distilled)."""
    if not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()
    heads = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    return [name for name, module in model.named_modules() if any(module is h for h in heads)]


def replace_classifier(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], head: list[str], report: LoadReport
) -> str:
    """Drop the file's classifier where it does not fit, as a whole: half of one is no use.

    Returns:
        Why the model could not be evaluated now, and what to do; empty if nothing is fresh.
    """
    ours = {name for name in own if is_under_any(name, head)}
    if ours:
        if all(name in weights and weights[name].shape == own[name].shape for name in ours):
            return ""
        report.head_replaced = sorted(ours)
        dropped = [name for name in weights if is_under_any(name, head)]
    else:
        dropped = [
            name
            for name in weights
            if is_under_any(name, {*head, *CLASSIFIER_NAMES} - {""}) and name not in own
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
    problem = f"the classifier does not fit: {short(report.head_replaced)}; "
    if not dropped:
        problem += "the file has none; "
    elif len(counts) == 1:
        theirs, mine = counts.pop()
        problem += (
            f"the file's has {theirs} classes, the model's {mine}; set MODEL.NUM_CLASSES {theirs} and use "
            "data with these classes, or "
        )
    return problem + "train a new one first, with --pretrained and without --eval"


def remap_classifier(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], head: list[str], report: LoadReport
) -> None:
    """Turn the file's classifier into one for ImageNet-1k, if it is for ImageNet-22k and otherwise fits.

    A model with several classifiers (DeiT distilled) keeps them as it built them.
    """
    ours = {name: own[name] for name in sorted(own) if is_under_any(name, head)}
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
