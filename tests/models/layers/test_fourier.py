"""Filtering in the Fourier domain: both ways equal the sums over frequencies, at any size and type."""

import pytest
import torch

from models.layers import eager, fourier
from models.layers.fourier import FOURIER_WAYS, fourier_filter, spectral_mlp
from models.layers.quads import filter_quads, from_quads, quad_table, to_quads
from models.layers.resize import resize_complex_filter
from models.mixers.fourier import AFNO, DynamicFilter, GlobalFilter
from tests.reference.fourier_filter import filtered

SIZES = [(1, 1), (1, 6), (2, 1), (2, 2), (2, 3), (4, 4), (5, 7), (7, 8), (6, 5)]


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
    fft, matmul = (fourier_filter(*inputs, way) for way in ("fft", "matmul"))
    assert_equal([matmul], [fft], 1e-5)
    assert_equal(gradients(matmul, inputs), gradients(fft, inputs), 1e-5)


@pytest.mark.parametrize("piece", [1, 3 * 42 * 2, 2**19])
@pytest.mark.parametrize("bank", [None, 4])
def test_pieces_of_a_batch_equal_the_plain_operations(bank, piece, monkeypatch):
    x, filters, routing = inputs = tensors((6, 7), bank=bank, batch=5)
    plain = from_quads(filter_quads(to_quads(x), quad_table(filters), routing), (6, 7))
    monkeypatch.setattr(eager, "PIECE", piece)
    out = fourier_filter(*inputs, "matmul")
    assert_equal([out], [plain], 1e-12)
    assert_equal(gradients(out, inputs), gradients(plain, inputs), 1e-12)
    with torch.no_grad():
        assert_equal([fourier_filter(*inputs, "matmul")], [plain], 1e-12)


def test_a_frozen_table_leaves_the_other_gradients():
    x, filters, routing = tensors((4, 5), bank=2)
    grads = gradients(fourier_filter(x, filters.detach(), routing, "matmul"), [x, routing])
    expected = gradients(fourier_filter(x, filters, routing, "fft"), [x, routing])
    assert_equal(grads, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", FOURIER_WAYS)
def test_low_precision_maps_give_gradients_of_their_own_type(way, dtype):
    x, filters, routing = tensors((7, 6), channels=8, bank=4, dtype=torch.float32)
    low = x.detach().to(dtype).requires_grad_()
    grads = gradients(fourier_filter(low, filters, routing, way), [low, filters, routing])
    exact = [t.detach().double().requires_grad_() for t in (low, filters, routing)]
    expected = filtered(exact[0], torch.view_as_complex(exact[1]), exact[2])
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5  # rounding of the map's gradient itself
    assert_equal(grads, gradients(expected, exact), tolerance)


def test_a_table_at_hand_is_used():
    x, filters, routing = tensors((4, 6), bank=3)
    doubled = fourier_filter(x, filters, routing, "matmul", lambda: 2 * quad_table(filters))
    assert_equal([doubled], [2 * fourier_filter(x, filters, routing, "matmul")], 1e-12)


class TestChoice:
    """The way "auto": by size for training, measured once where no gradient is needed."""

    @pytest.fixture(autouse=True)
    def _nothing_measured(self, monkeypatch):
        monkeypatch.setattr(fourier, "_CHOICES", {})

    @staticmethod
    def runs(monkeypatch, seconds):
        """The ways that are run from now on; each takes so many seconds of a clock of its own."""
        ways, now = [], [0.0]

        def stub(way):
            def run(x, *_):
                ways.append(way)
                now[0] += seconds[way]
                return x

            return run

        monkeypatch.setattr(fourier, "_filter_by_fft", stub("fft"))
        monkeypatch.setattr(fourier, "filter_by_quads", stub("matmul"))
        monkeypatch.setattr(fourier, "_clock", lambda device: now[0])
        return ways

    @pytest.mark.parametrize(
        ("fft", "matmul", "chosen"), [(0.5, 1.0, "fft"), (0.95, 1.0, "matmul"), (2, 1, "matmul")]
    )
    def test_is_measured_once_and_changes_for_a_clear_gain(self, fft, matmul, chosen, monkeypatch):
        ways = self.runs(monkeypatch, dict(fft=fft, matmul=matmul))
        x, filters, _ = tensors((40, 41))
        with torch.no_grad():
            fourier_filter(x, filters)
            assert set(ways) == {"fft", "matmul"}
            del ways[:]
            fourier_filter(x, filters)
        assert ways == [chosen]

    @pytest.mark.parametrize(("size", "way"), [((40, 41), "matmul"), ((110, 120), "fft")])
    def test_never_looks_at_a_clock_in_training(self, size, way, monkeypatch):
        ways = self.runs(monkeypatch, dict(fft=1.0, matmul=1.0))
        fourier_filter(*tensors(size)[:2])
        assert ways == [way]

    def test_never_looks_at_a_clock_for_small_maps_or_determinism(self, monkeypatch):
        ways = self.runs(monkeypatch, dict(fft=0.1, matmul=1.0))
        with torch.no_grad():
            fourier_filter(*tensors((14, 14))[:2])
            monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
            fourier_filter(*tensors((40, 41))[:2])
        assert ways == ["matmul", "matmul"]

    def test_is_not_measured_while_a_cuda_graph_is_captured(self, monkeypatch):
        monkeypatch.setattr(fourier, "is_captured", lambda x: True)
        ways = self.runs(monkeypatch, dict(fft=0.1, matmul=1.0))
        with torch.no_grad():
            fourier_filter(*tensors((40, 41))[:2])
        assert ways == ["matmul"]

    def test_is_matrix_products_where_a_compiler_records(self):
        class Filter(torch.nn.Module):
            def forward(self, x):
                return fourier_filter(x, filters)

        x, filters, _ = (t if t is None else t.detach() for t in tensors((110, 120), channels=1))
        graph = torch.export.export(Filter(), (x,)).graph_module.code
        assert "matmul" in graph
        assert "fft" not in graph

    def test_is_made_on_the_meta_device(self):
        x, filters, routing = (t.detach().to("meta") for t in tensors((40, 41), bank=2))
        assert fourier_filter(x, filters, routing).shape == x.shape


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
    fft, matmul = (spectral_mlp(x, layers, 0.01, way) for way in ("fft", "matmul"))
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


@pytest.mark.parametrize("size", [(6, 5), (7, 8)])
@pytest.mark.parametrize("mixer", [DynamicFilter, GlobalFilter, AFNO])
def test_mixers_compile_without_a_break_at_any_size(mixer, size):
    torch.compiler.reset()
    layer = mixer(8, **({} if mixer is AFNO else dict(grid=(6, 5)))).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, *size, 8)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_equal([compiled(x)], [layer(x)], 1e-5)
