"""Constants are made once, and nothing is kept that a later pass could not use."""

import pytest
import torch

from models.layers import resize, table_cache
from models.layers.resize import resize_complex_filter
from models.layers.table_cache import Constants, TableCache
from tests.models.test_contract import images, small, total
from tests.operators import Operators


def test_a_constant_is_made_once_per_key_and_all_are_forgotten_at_the_limit():
    constants, made = Constants(limit=2), []

    def get(key):
        return constants.get(key, lambda: made.append(key) or torch.arange(key))

    assert get(3) is get(3)
    assert get(4).equal(torch.arange(4))
    assert made == [3, 4]
    get(5)
    get(3)
    assert made == [3, 4, 5, 3]


def test_what_is_larger_than_the_limit_is_made_each_time():
    constants = Constants(limit=9, max_bytes=16)
    for length, kept in ((4, True), (5, False)):
        first, second = (constants.get(length, lambda n=length: torch.zeros(n)) for _ in range(2))
        assert (first is second) == kept


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # PyTorch's own
def test_what_a_transform_makes_is_not_kept():
    constants = Constants(limit=9)

    def function(x):
        return (x * constants.get("table", lambda: torch.arange(3.0))).sum()

    x = torch.randn(3)
    expected = torch.arange(3.0)
    torch.testing.assert_close(torch.func.grad(function)(x), expected)
    torch.func.jvp(function, (x,), (x,))
    with torch.inference_mode():
        function(x)
    table = constants.get("table", lambda: pytest.fail("it was not kept"))
    assert table.data_ptr()
    function(x.requires_grad_()).backward()
    torch.testing.assert_close(x.grad, expected)


def test_what_a_cuda_graph_records_is_not_kept(monkeypatch):
    """A capture is a stand-in: where no GPU is, there is none."""
    constants, cache, table = Constants(limit=9), TableCache(), torch.ones(2)
    for captured in (True, False):
        monkeypatch.setattr(table_cache, "is_captured", lambda _, now=captured: now)
        pairs = [
            [constants.get("table", lambda: torch.arange(3)) for _ in range(2)],
            [cache.get("table", table, (2, 1), torch.clone) for _ in range(2)],
        ]
        assert [first is second for first, second in pairs] == [not captured] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filters_are_resized_by_matrices_that_are_made_once(dtype, monkeypatch):
    monkeypatch.setattr(resize, "_MATRICES", Constants(limit=9))
    filters = torch.randn(5, 4, 3, 2, dtype=dtype, requires_grad=True)
    first = resize_complex_filter(filters, (8, 6))
    with Operators() as operators:
        second = resize_complex_filter(filters, (8, 6))
    assert not {name for name in operators.names if "upsample" in name or name == "eye"}
    assert second.dtype == dtype
    assert first.equal(second)
    second.sum().backward()
    assert filters.grad.isfinite().all()


def test_a_copy_does_not_outlive_a_step_of_a_fused_optimizer():
    """It writes without raising the version of what it writes to."""
    table = torch.nn.Parameter(torch.ones(2, 2))
    optimizer, cache = torch.optim.AdamW([table], lr=0.1, fused=True), TableCache()

    def doubled():
        return cache.get("table", table, (2, 2), lambda t: 2 * t)

    with torch.no_grad():
        assert doubled() is doubled()
    doubled().sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(doubled(), 2 * table)


@pytest.mark.parametrize("family", ["pvt", "swin", "swinv2", "dfformer", "dfvt"])
def test_what_is_kept_is_made_anew_after_a_fused_step(family):
    """It writes without a trace, here after a pass without gradients."""
    model, x = small(family), images((96, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    loss = total(model(x))
    with torch.no_grad():
        model(x)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        found = model(x)
        torch.testing.assert_close(found, model.train().eval()(x), rtol=1e-5, atol=1e-5)
