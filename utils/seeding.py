"""Random number generators: seeding, their state as plain data, bit-exact runs."""

import logging
import os
import random
from typing import Any

import numpy as np
import torch

_LOG = logging.getLogger(__name__)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy and PyTorch (all devices) with `seed + rank`, as the seeds' recipes do."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def rng_state() -> dict[str, Any]:
    """The state of all generators of this process: tensors, numbers and lists only.

    `torch.load(weights_only=True)` therefore loads a checkpoint that holds it.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        # uint32 has no full support in torch, int64 holds every value of it.
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        # Not where a GPU is only there: to ask would make a run on a CPU start it.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue all generators from a `rng_state()`.

    A state of another number of GPUs leaves the GPUs' generators alone, with a warning.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    visible = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    if len(state["cuda"]) == visible:
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])
    else:
        _LOG.warning(
            "the saved random state is of %d GPUs and %d are visible: their generators keep their seed",
            len(state["cuda"]),
            visible,
        )


def set_deterministic(enabled: bool, sizes_vary: bool = False) -> None:
    """The same bits on every run of one machine, slower; or, disabled, cuDNN's fastest kernels.

    Args:
        sizes_vary: from batch to batch; cuDNN then takes the convolutions that it expects to be fast, since
            it would time all of them again for each size, and no attention, which it plans for each size.

    Raises:
        RuntimeError: later, from an operation that has no deterministic version.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = not enabled and not sizes_vary
    torch.backends.cuda.enable_cudnn_sdp(not sizes_vary)
