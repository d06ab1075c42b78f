"""Which block sizes and numbers of warps a kernel runs with."""

from collections.abc import Callable, Sequence
from typing import Any

import triton


def tuned(configs: Sequence[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """Decorates a kernel: the fastest of `configs` is measured once per value of the arguments `key`.

    Triton's interpreter has nothing to measure and takes the first one.
    """
    interpreted = triton.knobs.runtime.interpret
    return triton.autotune(list(configs)[: 1 if interpreted else None], key)
