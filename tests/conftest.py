"""What every test gets: the same random numbers, and one thread so that sums have one order.

What a run of main.py leaves in its process goes after the test: determinism, and where the log goes.
"""

import logging
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.processes import time_briefly

# Already here for the fixtures of modules, which are made before those of tests.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _brief_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        time_briefly(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "is_mixlab", False)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.WARNING)
