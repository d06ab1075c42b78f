"""Filtering in the Fourier domain: both ways equal the sums over frequencies, at any size and type."""

import pytest
import torch

from models.layers.fourier import FOURIER_WAYS, fourier_filter, spectral_mlp
from models.layers.resize import resize_complex_filter
from tests.reference.fourier_filter import filtered

SIZES = [(1, 1), (1, 6), (2, 3), (4, 4), (5, 7), (7, 8), (6, 5)]


def tensors(size, channels=3, bank=None, batch=2, dtype=torch.float64):
    """Map, filters and routing (None without a bank) that take gradients."""
    height, width = size
    x = torch.randn(batch, height, width, channels, dtype=dtype, requires_grad=True)
    shape = (height, width // 2 + 1, bank or channels, 2)
    filters = torch.randn(shape, dtype=dtype, requires_grad=True)
    routing = torch.rand(batch, bank, channels, dtype=dtype, requires_grad=True) if bank else None
    return x, filters, routing


def gradients(out, inputs):
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return torch.autograd.grad((out * direction).sum(), [t for t in inputs if t is not None])


def assert_equal(values, references, tolerance):
    for value, reference in zip(values, references, strict=True):
        error = (value.double() - reference.double()).norm() / reference.double().norm()
        assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("way", FOURIER_WAYS)
@pytest.mark.parametrize("bank", [None, 4])
@pytest.mark.parametrize("size", SIZES)
def test_filtering_equals_the_sum_over_frequencies(size, bank, way):
    x, filters, routing = inputs = tensors(size, bank=bank)
    out = fourier_filter(x, filters, routing, way)
    expected = filtered(x, torch.view_as_complex(filters), routing)
    assert_equal([out], [expected], 1e-12)
    assert_equal(gradients(out, inputs), gradients(expected, inputs), 1e-12)


@pytest.mark.parametrize("bank", [None, 4])
@pytest.mark.parametrize("size", [(14, 14), (25, 42), (31, 17)])
def test_matrix_products_equal_the_fft_in_float32(size, bank):
    inputs = tensors(size, channels=8, bank=bank, dtype=torch.float32)
    fft, matmul = (fourier_filter(*inputs, way) for way in FOURIER_WAYS)
    assert_equal([matmul], [fft], 1e-5)
    assert_equal(gradients(matmul, inputs), gradients(fft, inputs), 1e-5)


@pytest.mark.parametrize("way", FOURIER_WAYS)
def test_imaginary_parts_of_the_outer_columns_are_ignored(way):
    x = torch.randn(1, 1, 6, 2)
    filters = torch.zeros(1, 4, 2, 2)
    filters[:, [0, 3], :, 1] = 1.0  # i times a real coefficient
    assert fourier_filter(x, filters, way=way).abs().max() < 1e-6
    filters[:, 1, :, 1] = 1.0
    assert fourier_filter(x, filters, way=way).abs().max() > 0.1


@pytest.mark.parametrize("way", FOURIER_WAYS)
def test_filtering_stays_in_float32_under_autocast(way):
    x, filters, routing = tensors((7, 14), channels=8, bank=4, dtype=torch.float32)
    x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = fourier_filter(x, filters, routing, way)
    assert out.dtype == torch.float32
    assert_equal([out], [fourier_filter(x.float(), filters, routing, way)], 1e-6)


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 7), (8, 3)])
def test_spectral_mlp_is_the_same_both_ways(size):
    x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    layers = [
        (
            torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True),
            torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True),
        )
        for _ in range(2)
    ]
    inputs = [x, *layers[0], *layers[1]]
    fft, matmul = (spectral_mlp(x, layers, 0.01, way) for way in FOURIER_WAYS)
    assert_equal([matmul], [fft], 1e-12)
    assert_equal(gradients(matmul, inputs), gradients(fft, inputs), 1e-12)


def test_tables_made_in_inference_mode_serve_a_later_training_step():
    size = (13, 19)  # no other test has made tables of these sizes
    with torch.inference_mode():
        fourier_filter(*tensors(size), way="matmul")
    inputs = tensors(size)
    grads = gradients(fourier_filter(*inputs, way="matmul"), inputs)
    assert all(g.isfinite().all() for g in grads)


def test_wrong_filter_sizes_and_ways_are_named():
    x, filters, _ = tensors((4, 6))
    with pytest.raises(ValueError, match=r"\(4, 4\) do not fit the half spectrum \(6, 3\)"):
        fourier_filter(x.transpose(1, 2), filters)
    with pytest.raises(ValueError, match="fourier='dct' is unknown"):
        fourier_filter(x, filters, way="dct")


@pytest.mark.parametrize("new", [(16, 9), (1, 1), (7, 12)])
def test_resampled_filters_equal_bicubic_interpolation_with_aligned_corners(new):
    filters = torch.randn(14, 8, 5, 2)
    planes = filters.permute(2, 3, 0, 1)
    planes = torch.nn.functional.interpolate(planes, new, mode="bicubic", align_corners=True)
    assert_equal([resize_complex_filter(filters, new)], [planes.permute(2, 3, 0, 1)], 1e-5)
