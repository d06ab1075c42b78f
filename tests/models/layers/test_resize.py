"""Tables of another size: with deterministic algorithms the same numbers, by products."""

import pytest
import torch
import torch.nn.functional as F

from models.layers.resize import (
    pooled,
    resize_bias_table,
    resize_complex_filter,
    resize_position_grid,
)
from utils.seeding import set_deterministic


def bias_table(table, size):
    return resize_bias_table(table, (3, 4), (size, size + 1))


def position_grid(table, size, mode="bicubic"):
    return resize_position_grid(table, 1, (5, 7), (size, size + 2), mode)


def bilinear_grid(table, size):
    return position_grid(table, size, "bilinear")


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield lambda: set_deterministic(True)
    set_deterministic(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize(
    ("resize", "shape"),
    [
        (bias_table, (35, 3)),
        (position_grid, (1, 36, 4)),
        (bilinear_grid, (1, 36, 4)),
        (pooled, (2, 3, 7, 10)),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_gradients_are_the_same_by_products(resize, shape, size, deterministic):
    x = torch.randn(shape, requires_grad=True)
    results = []
    for enable in (lambda: None, deterministic):
        enable()
        y = resize(x, size)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), grad))
    (plain, plain_grad), (product, product_grad) = results
    torch.testing.assert_close(product, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(product_grad, plain_grad, rtol=1e-4, atol=1e-4)


def test_deterministic_runs_pool_by_products(deterministic):
    x = torch.randn(2, 3, 7, 10, requires_grad=True)
    assert "Pool" in pooled(x, 3).grad_fn.name()
    deterministic()
    assert "Pool" not in pooled(x, 3).grad_fn.name()


def test_filters_in_double_precision_are_resized_in_it():
    filters = torch.randn(8, 5, 3, 2, dtype=torch.float64)
    grid = filters.flatten(2).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, (12, 7), mode="bicubic", align_corners=True)
    found = resize_complex_filter(filters, (12, 7)).flatten(2).permute(2, 0, 1)[None]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
