import io
import random

import numpy as np
import pytest
import torch

from utils.seeding import rng_state, seed_everything, set_deterministic, set_rng_state


def draws():
    return [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]


@pytest.fixture(autouse=True)
def keep_generators():
    before = rng_state()
    yield
    set_rng_state(before)


def test_one_seed_gives_the_same_numbers_and_each_rank_its_own():
    seed_everything(3, rank=0)
    first = draws()
    seed_everything(3, rank=0)
    assert draws() == first
    seed_everything(3, rank=1)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_a_state_that_went_through_a_safe_file_continues_all_generators():
    """Trap 16: a resume that does not restore everything."""
    seed_everything(0)
    random.gauss(0, 1)  # leaves half of a pair behind, in Python's and NumPy's generator
    np.random.randn()
    file = io.BytesIO()
    torch.save(rng_state(), file)
    expected = draws()
    draws()
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True))
    assert draws() == expected


def test_a_state_of_other_gpus_warns_and_restores_the_rest(caplog):
    state = rng_state()
    expected = draws()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    set_rng_state(state)
    assert draws() == expected
    assert "GPUs" in caplog.text


def test_deterministic_mode_is_switched_on_and_off(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        set_deterministic(False)
        torch.backends.cudnn.benchmark = False
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("deterministic", "sizes_vary", "benchmark"),
    [(False, False, True), (False, True, False), (True, False, False)],
)
def test_convolutions_are_timed_only_where_sizes_repeat(deterministic, sizes_vary, benchmark):
    try:
        set_deterministic(deterministic, sizes_vary)
        assert torch.backends.cudnn.benchmark is benchmark
    finally:
        set_deterministic(False)
        torch.backends.cudnn.benchmark = False
