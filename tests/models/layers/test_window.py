"""Windows of any map: equal to loops over pixels, masks as published, and never a stale bias."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from models.layers import biased_attention as module
from models.layers import window
from models.layers.biased_attention import biased_attention
from models.layers.table_cache import Constants
from models.layers.tokens import space_to_depth
from models.layers.window import CosineWindowAttention, WindowAttention
from models.layers.window_mlp import WindowMlp
from models.layers.window_partition import (
    PADDING,
    relative_coords_table,
    relative_position_index,
    window_mask,
)
from tests.operators import Operators
from tests.reference.window_attention import window_attention

# Map, configured window, shift, windows as in DFvT's detection backbone.
CASES = [
    ((6, 6), 3, 0, False),
    ((6, 6), 3, 1, False),
    ((5, 7), 3, 0, False),
    ((5, 7), 3, 1, False),
    ((7, 5), 4, 2, False),
    ((3, 7), 4, 2, False),
    ((1, 5), 4, 2, False),
    ((5, 7), 3, 1, True),
    ((2, 5), 3, 1, True),
]


def attention(cls, grid, window_size, shift, fixed_windows=False):
    kwargs = dict(fixed_windows=True) if fixed_windows else {}
    module = cls(8, 2, grid, window_size, shift, **kwargs)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def literal(module, x):
    """`module(x)` by loops, in float32."""
    q, k, v, *plan = projected(module, x)
    x = window_attention(q, k, v, *plan)
    return F.linear(x, module.proj.weight.float(), module.proj.bias.float())


def projected(module, x):
    """What `window_attention` takes for `module(x)`."""
    heads, size = module.num_heads, tuple(x.shape[1:3])
    if module.fixed_windows:
        window, shift = module.window_size, module.shift
    elif min(size) <= module.window_size:
        window, shift = min(size), 0
    else:
        window, shift = module.window_size, module.shift
    x = F.pad(x.float(), (0, 0, 0, -size[1] % window, 0, -size[0] % window))
    bias = module.projection_bias()
    x = F.linear(x, module.qkv.weight.float(), None if bias is None else bias.float())
    q, k, v = x.unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 1, 2, 5)
    if isinstance(module, CosineWindowAttention):
        scale = module.logit_scale.float().clamp(max=math.log(100)).exp()
        q, k = F.normalize(q, dim=-1) * scale[..., None], F.normalize(k, dim=-1)
        first, _, last = module.cpb_mlp
        coords = relative_coords_table(window, module.pretrained_window)
        hidden = F.linear(coords, first.weight.float(), first.bias.float()).relu()
        table = 16 * F.linear(hidden, last.weight.float()).sigmoid()[0].permute(2, 0, 1)
    else:
        q = q * module.scale
        table = module.bias_table(window).float().t().unflatten(1, (2 * window - 1, -1))
    return q, k, v, table, size, window, shift, not module.fixed_windows


@pytest.mark.parametrize("cls", [WindowAttention, CosineWindowAttention])
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients_equal_loops_over_pixels(cls, case):
    grid, window_size, shift, fixed = case
    if fixed and cls is CosineWindowAttention:
        pytest.skip("Swin V2 always shrinks its windows")
    module = attention(cls, (6, 6), window_size, shift, fixed)
    x = torch.randn(1, *grid, 8, requires_grad=True)
    inputs = [x, *module.parameters()]
    ours, theirs = module(x), literal(module, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(x), theirs, rtol=1e-4, atol=1e-5)
    target = torch.randn_like(ours)
    ours = torch.autograd.grad(ours, inputs, target)
    theirs = torch.autograd.grad(theirs, inputs, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cls", [WindowAttention, CosineWindowAttention])
@pytest.mark.parametrize("case", CASES)
def test_a_map_shows_what_each_position_gets_from_its_window(cls, case):
    (height, width), window_size, shift, fixed = case
    if fixed and cls is CosineWindowAttention:
        pytest.skip("Swin V2 always shrinks its windows")
    module = attention(cls, (6, 6), window_size, shift, fixed)
    x = torch.randn(2, height, width, 8)
    q, k, _, table, size, window, shift, hidden = projected(module, x)
    # With one-hot values each position gathers its own row of the attention matrix.
    places = q.shape[2] * q.shape[3]
    values = torch.eye(places).view(1, 1, *q.shape[2:4], places).expand(2, 2, -1, -1, -1)
    rows = window_attention(q, k, values, table, size, window, shift, hidden)
    total = rows.unflatten(-1, (2, *q.shape[2:4])).sum((1, 2))[..., :height, :width]  # B h H W
    row, column = (
        (torch.arange(n) - shift) % length // window
        for n, length in zip(size, q.shape[2:4], strict=True)
    )
    label = row[:, None] * places + column
    asking = (label[:, :, None, None] == label).sum((0, 1))  # positions in the window of each
    maps = module.attention_maps(x)
    assert maps.keys() == {"attention"}
    torch.testing.assert_close(maps["attention"], total / asking, rtol=1e-4, atol=1e-6)
    if not fixed:  # padding gets nothing
        for part in label.unique():
            inside = maps["attention"][..., label == part].sum(-1)
            torch.testing.assert_close(inside, torch.ones_like(inside))


@pytest.mark.parametrize("cls", [WindowAttention, CosineWindowAttention])
@pytest.mark.parametrize("case", [((6, 6), 3, 1), ((5, 7), 3, 1)])
def test_attention_in_bfloat16_stays_close_to_loops_in_float32(cls, case):
    grid, window_size, shift = case
    module = attention(cls, (6, 6), window_size, shift).bfloat16()
    x = torch.randn(2, *grid, 8).bfloat16().requires_grad_()
    target = torch.randn(2, *grid, 8)
    results = []
    for forward in (module, lambda x: literal(module, x)):
        out = forward(x).float()
        (grad,) = torch.autograd.grad(out, x, target)
        results.append((out, grad.float()))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_the_mask_of_padding_is_finite_in_float16():
    module = attention(WindowAttention, (6, 6), 4, 2)
    x = torch.randn(2, 6, 5, 8)
    expected = module.eval()(x)
    module.half()
    q = torch.empty(0, dtype=torch.float16)
    assert module._build_additive((6, 5), True, None, q).isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(module(x.half()).float(), expected, rtol=1e-2, atol=1e-2)


def test_attention_works_under_autocast():
    for cls in (WindowAttention, CosineWindowAttention):
        module = attention(cls, (6, 6), 3, 1)
        x = torch.randn(2, 5, 7, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x).float()
        assert (out - literal(module, x)).norm() < 0.03 * out.norm(), cls


def test_mask_keeps_regions_apart_by_minus_100():
    mask = window_mask((4, 4), window=2, shift=1)
    assert mask.shape == (4, 4, 4)
    assert mask[0].eq(0).all()
    apart = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]])
    torch.testing.assert_close(mask[1], -100.0 * apart)  # left and right column
    torch.testing.assert_close(mask[3], -100.0 * (1 - torch.eye(4)))


@pytest.mark.parametrize("shift", [0, 2])
def test_mask_hides_padded_keys_only_and_no_row_is_empty(shift):
    mask = window_mask((6, 5), window=4, shift=shift)
    hidden = mask == PADDING
    # Of the 8x8 padded map 30 tokens are real, and each is a key in all 16 rows of its window.
    assert (~hidden).sum() == 30 * 16
    assert (hidden == hidden[:, :1]).all()
    assert (~hidden).any(-1).all()
    assert not (window_mask((6, 5), 4, shift, hide_padding=False) == PADDING).any()


def test_relative_position_index_counts_rows_then_columns():
    index = relative_position_index(2)
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_coords_are_logarithmic_in_units_of_the_pretrained_window():
    table = relative_coords_table(8)
    assert table.shape == (1, 15, 15, 2)
    assert table[0, 7, 7].tolist() == [0, 0]
    torch.testing.assert_close(table[0, 14, 0], torch.tensor([1, -1]) * math.log2(9) / 3)
    larger = relative_coords_table(16, pretrained_window=12)
    torch.testing.assert_close(larger[0, -1, 0, 0].item(), math.log2(8 * 15 / 11 + 1) / 3)
    assert relative_coords_table(1).tolist() == [[[[0, 0]]]]


def test_space_to_depth_orders_neighbours_down_then_right():
    x = torch.tensor([[1.0, 2, 5], [3, 4, 6]])[None, :, :, None]
    assert space_to_depth(x).tolist() == [[[[1, 3, 2, 4], [5, 6, 0, 0]]]]


def ema_step(module, other):
    for ours, theirs in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.lerp_(theirs, 0.5)


@pytest.mark.parametrize("cls", [WindowAttention, CosineWindowAttention])
@pytest.mark.parametrize(
    "change",
    [
        lambda module, other: module.load_state_dict(other.state_dict()),
        lambda module, other: module.load_state_dict(other.state_dict(), assign=True),
        ema_step,
        lambda module, other: [p.mul_(2) for p in module.parameters()],
        lambda module, other: module.bfloat16().float(),
        lambda module, other: [setattr(p, "data", p * 2) for p in module.parameters()],
        lambda module, other: [p.data.mul_(2) for p in module.eval().parameters()],
    ],
)
def test_the_kept_bias_is_never_stale(cls, change):
    module, other = (attention(cls, (6, 6), 3, 1).eval() for _ in range(2))
    x = torch.randn(1, 6, 6, 8)
    with torch.no_grad():
        module(x)
        change(module, other)
        kept = module(x)
    module.train()
    with torch.no_grad():
        torch.testing.assert_close(kept, module(x))


def test_the_bias_is_kept_between_evaluation_forwards_only():
    module = attention(WindowAttention, (6, 6), 3, 1)
    x = torch.randn(1, 6, 6, 8)
    module(x)
    assert module._cache is None
    module.eval()
    module(x)
    assert module._cache is None, "gradients flow to the table while they are enabled"
    with torch.no_grad():
        module(x)
        first = module._cache[1]
        module(x)
        assert module._cache[1] is first
        module(torch.randn(1, 9, 6, 8))
        assert module._cache[1].shape == (1, 6 * 2, 9, 9)
    assert copy.deepcopy(module)._cache is None


def test_the_bias_of_a_cuda_graph_is_not_kept(monkeypatch):
    monkeypatch.setattr(window, "is_captured", lambda x: True)
    module = attention(WindowAttention, (6, 6), 3, 1).eval()
    with torch.no_grad():
        module(torch.randn(1, 6, 6, 8))
    assert module._cache is None


def test_a_bias_kept_under_inference_mode_does_not_break_training():
    module = attention(WindowAttention, (6, 6), 3, 1).eval()
    x = torch.randn(1, 6, 6, 8)
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert module.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.parametrize("cls", [WindowAttention, CosineWindowAttention])
def test_blocks_of_a_stage_share_mask_and_tables_in_training(cls, monkeypatch):
    made = []
    monkeypatch.setattr(window, "_MASKS", Constants(8))
    for name in ("window_mask", "relative_position_index", "relative_coords_table"):
        make = getattr(window, name)
        monkeypatch.setattr(window, name, lambda *a, f=make: made.append(f.__name__) or f(*a))
    blocks = [attention(cls, (6, 6), 4, shift) for shift in (0, 2, 0, 2)]
    made.clear()
    for _ in range(2):
        for grid in ((7, 9), (3, 9)):  # padded, and with smaller windows
            x = torch.randn(1, *grid, 8)
            for block in blocks:
                torch.testing.assert_close(block(x), literal(block, x), rtol=1e-4, atol=1e-5)
    assert made.count("window_mask") == 2  # shifted and padded
    assert made.count("relative_position_index") == 1
    assert made.count("relative_coords_table") <= 1


def test_a_large_mask_is_not_kept(monkeypatch):
    made = []
    monkeypatch.setattr(window, "window_mask", lambda *a: made.append(a) or window_mask(*a))
    monkeypatch.setattr(window, "_MASKS", Constants(8, max_bytes=4 * 6 * 9**2 - 1))
    module = attention(WindowAttention, (6, 6), 3, 1)
    for grid in ((6, 6), (6, 6), (6, 7), (6, 7)):
        module(torch.randn(1, *grid, 8))
    assert [a[0] for a in made] == [(6, 6), (6, 7), (6, 7)]


def test_no_sort_is_needed_for_the_gradient_of_the_bias_table():
    """On a GPU that of advanced indexing is one."""
    module = attention(WindowAttention, (6, 6), 3, 1)
    table = module.relative_position_bias_table
    bias, expected = module.relative_bias(3), table[module.relative_position_index]
    torch.testing.assert_close(bias, expected.permute(2, 0, 1), rtol=0, atol=0)
    direction = torch.randn_like(bias)
    with Operators() as operators:
        (gradient,) = torch.autograd.grad(bias, table, direction)
    assert "index_add" in operators.names or "index_add_" in operators.names
    (reference,) = torch.autograd.grad(expected.permute(2, 0, 1), table, direction)
    torch.testing.assert_close(gradient, reference)


def test_the_gradient_of_a_table_in_bfloat16_is_summed_in_float32():
    module = attention(WindowAttention, (12, 12), 12, 0).bfloat16()
    bias = module.relative_bias(12)
    direction = torch.rand_like(bias)
    (gradient,) = torch.autograd.grad(bias, module.relative_position_bias_table, direction)
    wide = torch.zeros_like(gradient, dtype=torch.float64)
    rows = direction.double().permute(1, 2, 0).flatten(0, 1)
    wide.index_add_(0, module.relative_position_index.flatten(), rows)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, wide.bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("cls", [WindowAttention, CosineWindowAttention])
def test_compiled_attention_is_one_graph_on_maps_of_its_own_size_and_others(cls):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    module = attention(cls, (6, 6), 4, 2)
    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
    for grid in ((6, 6), (7, 9), (6, 6), (7, 9)):
        x = torch.randn(1, *grid, 8)
        torch.testing.assert_close(compiled(x), module(x))
        assert compiled(x).grad_fn is not None
    assert len(graphs) == 2
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("size", "shifted"), [((6, 6), False), ((6, 6), True), ((5, 7), True), ((2, 5), True)]
)
def test_window_mlp_equals_loops_over_heads_and_windows(size, shifted):
    window, heads = 3, 2
    module = WindowMlp(heads, (6, 6), window, shifted)
    x = torch.randn(2, *size, 8)
    start = 2 if shifted and min(size) > window else 0
    right, bottom = -(size[1] + start) % window, -(size[0] + start) % window
    padded = F.pad(x, (0, 0, start, right, start, bottom))
    out = torch.zeros_like(padded)
    weight, bias = module.weight.view(heads, 9, 9), module.bias.view(heads, 9)
    for top in range(0, padded.shape[1], window):
        for left in range(0, padded.shape[2], window):
            tokens = padded[:, top : top + window, left : left + window].reshape(2, 9, heads, 4)
            for h in range(heads):
                mixed = weight[h] @ tokens[:, :, h] + bias[h][:, None]
                out[:, top : top + window, left : left + window, 4 * h : 4 * h + 4] = mixed.view(
                    2, window, window, 4
                )
    out = out[:, start : start + size[0], start : start + size[1]]
    torch.testing.assert_close(module(x), out)
    with torch.no_grad():
        torch.testing.assert_close(module(x), out)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:FutureWarning"
)  # PyTorch's own, of forward mode
@pytest.mark.parametrize(("size", "shifted"), [((6, 6), False), ((5, 7), True)])
def test_window_mlp_has_the_derivatives_of_its_formula(size, shifted):
    module = WindowMlp(2, (6, 6), 3, shifted).double()
    names = ("weight", "bias")

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(2, *size, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, module.weight, module.bias)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    batch = torch.randn(3, 2, *size, 4, dtype=torch.float64, requires_grad=True)
    mapped = torch.vmap(module)(batch)
    torch.testing.assert_close(mapped, torch.stack([module(x) for x in batch]))
    batch = batch.detach()
    _, along = torch.func.jvp(torch.vmap(module), (batch,), (batch.cos(),))
    torch.testing.assert_close(along, torch.stack([module(x) for x in batch.cos()]) - module(0 * x))
    directions = torch.randn(3, 2, *size, 4, dtype=torch.float64)
    found = torch.autograd.grad(module(x), inputs, directions, is_grads_batched=True)
    for i, direction in enumerate(directions):
        expected = torch.autograd.grad(module(x), inputs, direction)
        torch.testing.assert_close([gradient[i] for gradient in found], list(expected))


def test_window_mlp_under_autocast_keeps_half_precision_and_gives_gradients_in_full():
    module = WindowMlp(2, (6, 6), 3, shifted=True)
    x = torch.randn(2, 5, 7, 8, requires_grad=True)
    inputs = (x, *module.parameters())
    expected = torch.autograd.grad(module(x).sum(), inputs)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert {x.dtype for x in kept if x.shape == (2, 5, 7, 8)} == {torch.bfloat16}
    for gradient, reference in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 2e-2 * reference.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert module.double()(x.double()).dtype == torch.float64  # which autocast leaves alone


SHAPES = [(1, 2, 4, 4), (5, 2, 4, 4), (4, 4)]


def formula(q, k, v, bias, scale):
    return (scale * q @ k.transpose(-2, -1) + bias).softmax(-1) @ v


@pytest.fixture
def pieces(monkeypatch):
    """Pieces of two batch entries; the list grows with each attention that is cut."""
    cut = []
    monkeypatch.setattr(module, "piece", lambda values: cut.append(values) or 2)
    return cut


@pytest.mark.parametrize("bias_shape", SHAPES)
def test_attention_in_pieces_equals_the_formula(bias_shape, pieces):
    qkv = torch.randn(3, 5, 4, 2, 3).transpose(2, 3)  # 5 windows, 2 heads, 4 tokens
    bias = torch.randn(bias_shape)
    expected = formula(*qkv, bias, 0.3)
    with torch.no_grad():
        torch.testing.assert_close(biased_attention(qkv, bias, 0.3), expected)
        torch.testing.assert_close(biased_attention(tuple(qkv), bias, 0.3), expected)
    # Any other bias may belong to entries of the batch, and is not cut.
    assert bool(pieces) == (bias_shape == (1, 2, 4, 4))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias_shape", SHAPES)
def test_attention_with_a_learned_bias_has_the_gradients_of_the_formula(bias_shape, packed, pieces):
    qkv = torch.randn(3, 5, 4, 2, 3, dtype=torch.float64).transpose(2, 3)
    parts = [qkv] if packed else list(qkv.clone())
    inputs = [x.requires_grad_() for x in (*parts, torch.randn(bias_shape, dtype=torch.float64))]
    expected = formula(*(qkv if packed else parts), inputs[-1], 0.3)
    out = biased_attention(qkv if packed else tuple(parts), inputs[-1], 0.3)
    direction = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out, inputs, direction)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, direction))
    shared = bias_shape == (1, 2, 4, 4)
    assert len(pieces) == (2 if shared else 0)
    if shared:
        assert gradients[0].stride() == inputs[0].stride()  # the layout of the projection


@pytest.mark.parametrize("cls", [WindowAttention, CosineWindowAttention, WindowMlp])
def test_no_images_are_no_error(cls):
    module = WindowMlp(2, (6, 6), 3) if cls is WindowMlp else attention(cls, (6, 6), 3, 1)
    x = torch.randn(0, 6, 6, 8, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert module.eval()(x).shape == x.shape


def packed_inputs():
    """q, k and v as `WindowAttention.project` lays them out, and a bias; 5 windows, 2 heads, 4 tokens."""
    qkv = torch.randn(5, 4, 2, 3, 3, dtype=torch.float64).permute(3, 0, 2, 1, 4)
    return qkv, torch.randn(1, 2, 4, 4, dtype=torch.float64)


def test_several_gradients_at_once_are_those_of_the_formula():
    inputs = [x.requires_grad_() for x in packed_inputs()]
    out, expected = biased_attention(*inputs, 0.3), formula(*inputs[0], inputs[1], 0.3)
    directions = torch.randn(3, *out.shape, dtype=out.dtype)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, directions, is_grads_batched=True),
        torch.autograd.grad(expected, inputs, directions, is_grads_batched=True),
    )
    one = torch.autograd.grad(biased_attention(*inputs, 0.3), inputs, directions[0])
    assert one[0].stride() == inputs[0].stride()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func's own
@pytest.mark.parametrize("grad", [False, True])
def test_transforms_of_functions_go_through_attention(grad):
    inputs = packed_inputs()
    inputs = tuple(x.float().requires_grad_(grad) for x in inputs)
    tangents = tuple(x.detach().cos() for x in inputs)

    def ours(qkv, bias):
        return biased_attention(qkv, bias, 0.3)

    def plain(qkv, bias):
        return formula(*qkv, bias, 0.3)

    with torch.set_grad_enabled(grad):
        found, expected = (torch.func.jvp(f, inputs, tangents) for f in (ours, plain))
        torch.testing.assert_close(found, expected)
        stacked = tuple(torch.stack([x, 2 * x]) for x in inputs)
        torch.testing.assert_close(torch.vmap(ours)(*stacked), torch.vmap(plain)(*stacked))
        found, expected = (
            torch.func.grad(lambda *x, f=f: f(*x).square().sum(), (0, 1))(*inputs)
            for f in (ours, plain)
        )
        torch.testing.assert_close(found, expected)


def test_derivatives_carried_forward_are_not_lost_in_evaluation():
    qkv, bias = (x.float() for x in packed_inputs())
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(qkv, qkv.cos())
        found, expected = biased_attention(dual, bias, 0.3), formula(*dual, bias, 0.3)
        for part in (0, 1):
            unpacked = (torch.autograd.forward_ad.unpack_dual(y)[part] for y in (found, expected))
            torch.testing.assert_close(*unpacked)


@pytest.mark.parametrize("grad", [False, True])
def test_the_default_device_is_not_asked(grad):
    module = attention(WindowAttention, (6, 6), 3, 1)
    x = torch.randn(1, 6, 6, 8)
    with torch.set_grad_enabled(grad):
        expected = module(x)
        with torch.device("meta"):
            out = module(x)
            if grad:
                out.sum().backward()
    torch.testing.assert_close(out, expected)


def test_a_learned_bias_in_bfloat16_gets_the_gradient_of_the_formula_in_float32():
    """It sums over all windows: what each of them rounds away adds up."""
    inputs = [torch.randn(64, 2, 9, 4) for _ in range(3)] + [torch.randn(1, 2, 9, 9)]
    inputs = [x.bfloat16().requires_grad_() for x in inputs]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    expected = formula(*wide, 0.5)
    direction = torch.randn_like(expected).bfloat16()
    out = biased_attention(tuple(inputs[:3]), inputs[3], 0.5)
    gradients = torch.autograd.grad(out, inputs, direction)
    references = torch.autograd.grad(expected, wide, direction.float())
    for gradient, reference in zip(gradients, references, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - reference).norm() < 5e-3 * reference.norm()


def test_a_bias_that_learns_alone_gets_its_gradient():
    q, k, v = torch.randn(3, 4, 2, 9, 8)
    for shape in ((1, 2, 9, 9), (4, 2, 9, 9)):
        bias, target = torch.randn(shape, requires_grad=True), torch.randn(4, 2, 9, 8)
        out = biased_attention((q, k, v), bias, 0.5)
        expected = (0.5 * q @ k.transpose(2, 3) + bias).softmax(-1) @ v
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        grads = (torch.autograd.grad(y, bias, target)[0] for y in (out, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_many_windows_are_attended_in_parts():
    q, k, v = torch.randn(3, 7, 2, 9, 8)
    bias = torch.randn(1, 2, 9, 9)
    found = module._fused_in_parts(q, k, v, bias, 0.5, length=3)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.5)
    torch.testing.assert_close(found, expected)
