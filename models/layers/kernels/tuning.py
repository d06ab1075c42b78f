"""Which block sizes and numbers of warps a kernel runs with."""

from collections.abc import Sequence
from typing import Any

import torch
import triton


class Tuned:
    """A kernel with the fastest of some configurations, measured once per value of its arguments `key`.

    Block sizes and warps decide in which order a GPU adds, so that deterministic runs take the first
    configuration, and so does Triton's interpreter, which has nothing to measure.
    """

    def __init__(self, kernel: Any, configs: Sequence[triton.Config], key: Sequence[str]):
        self.kernel = kernel
        self.configs = list(configs)
        self._first = triton.autotune(self.configs[:1], list(key))(kernel)
        self._fastest = triton.autotune(self.configs, list(key))(kernel)

    def __getitem__(self, grid: Any) -> Any:
        fixed = torch.are_deterministic_algorithms_enabled() or triton.knobs.runtime.interpret
        return (self._first if fixed else self._fastest)[grid]


def tuned(configs: Sequence[triton.Config], key: Sequence[str]) -> Any:
    """Decorates a kernel: `Tuned` among `configs`."""
    return lambda kernel: Tuned(kernel, configs, key)


def work_class(values: int) -> int:
    """A small number for `values` of the same order; a key that separates small maps from large ones."""
    return min(values, 2**24).bit_length()
