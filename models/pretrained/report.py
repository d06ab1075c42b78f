"""What became of a file's tensors, in numbers and in words."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from .imagenet import STAND_INS


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
            lines.append(f"  resized {len(self.resized)}: {short(self.resized)}; {short(sizes)}")
        for name, (old, new) in self.adapted.items():
            lines.append(f"  adapted to the channels of the images: {name}; {old} -> {new}")
        if self.remapped:
            places = ", ".join(f"{name}, has that of {like}" for name, like in STAND_INS.items())
            lines.append(
                f"  remapped to the rows of ImageNet-1k: {short(self.remapped)}; the one class that "
                f"ImageNet-22k lacks, {places}"
            )
        if self.head_replaced:
            lines.append(f"  classifier not taken from the file: {short(self.head_replaced)}")
        if self.other_head:
            lines.append(f"  of another head, left out: {short(self.other_head)}")
        if self.missing:
            lines.append(f"  not in the file, fresh: {short(self.missing)}")
        if self.unexpected:
            lines.append(f"  not in the model, left out: {short(self.unexpected)}")
        return "\n".join(lines)


def short(names: Iterable[str], count: int = 8) -> str:
    """The first `count` names, and how many more there are."""
    names = list(names)
    more = f", and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
