"""Running means that leave values on the device, statistics over images, and memory figures."""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .distributed import all_gather_object


class Mean:
    """Mean since the last `read` and mean since the start, of 0-D tensors that stay on the device.

    `add` never waits for the device; `drain` and `read` do.
    """

    def __init__(self) -> None:
        self._pending: Tensor | float = 0.0
        self._num_pending = 0
        self._window, self._num_window = 0.0, 0
        self._total, self._num_total = 0.0, 0

    def add(self, value: Tensor | float) -> None:
        """Count one value in."""
        self._pending = self._pending + (value.detach() if isinstance(value, Tensor) else value)
        self._num_pending += 1

    def drain(self) -> float:
        """Fetch what is on the device; returns the sum since the last `read`."""
        # Summed on the host in double precision: an epoch of float32 additions would drift.
        value = float(self._pending)
        self._window += value
        self._num_window += self._num_pending
        # One overflow must not make the mean of the whole epoch infinite.
        if math.isfinite(value):
            self._total += value
            self._num_total += self._num_pending
        self._pending, self._num_pending = 0.0, 0
        return self._window

    def read(self) -> tuple[float, float]:
        """(mean since the last read, mean since the start); nan where there was nothing."""
        self.drain()
        window = self._window / self._num_window if self._num_window else float("nan")
        total = self._total / self._num_total if self._num_total else float("nan")
        self._window, self._num_window = 0.0, 0
        return window, total


class ImageStatistics:
    """Mean, 5th and 95th percentile of numbers that each image has, over the images of all processes."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count a batch in: (B,) by name, which stay on their device."""
        for name, batch in values.items():
            self._values.setdefault(name, []).append(batch.detach())

    def compute(self) -> dict[str, float]:
        """`<name>_mean`, `<name>_p5` and `<name>_p95`, the same in all processes, which all call this."""
        own = {name: torch.cat(batches).tolist() for name, batches in self._values.items()}
        parts = all_gather_object(own)
        result = {}
        for name in sorted({name for part in parts for name in part}):
            # Sorted, so that sums have one order, whatever the number of processes.
            values = np.sort([value for part in parts for value in part.get(name, [])])
            low, high = np.percentile(values, (5, 95))
            result |= {
                f"{name}_mean": float(values.mean()),
                f"{name}_p5": float(low),
                f"{name}_p95": float(high),
            }
        return result


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated tensors on a GPU, else the resident memory of this process.

    The second holds the interpreter and all libraries, and never falls. It is 0 on Windows, which has
    no such figure in Python's standard library.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return 0.0
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its figure is inherited from the process that started this one.
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if peak:
            return int(peak[1]) / 2**10
    import resource

    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB where it is not macOS
    return peak_rss / (2**20 if sys.platform == "darwin" else 2**10)
