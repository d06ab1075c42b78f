"""What every test gets: the same random numbers, and one thread so that sums have one order."""

import random

import numpy as np
import pytest
import torch

# Already here for the fixtures of modules, which are made before those of tests.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
