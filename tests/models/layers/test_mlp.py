"""Feed-forward networks and StarReLU: pieces and shortcuts give the numbers of the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from models.layers import activations, eager
from models.layers.activations import StarReLU
from models.layers.eager import in_pieces, piece
from models.layers.mlp import Mlp


def star_relu(x, scale, bias):
    return scale * F.relu(x) ** 2 + bias


def make_star_relu(dtype=torch.float64):
    act = StarReLU().to(dtype)
    with torch.no_grad():
        act.scale.fill_(1.3)
        act.bias.fill_(-0.4)
    return act


@pytest.mark.parametrize("shape", [(7,), (3, 5, 11), (0, 4)])
def test_star_relu_equals_its_formula(shape):
    act = make_star_relu()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, act.scale, act.bias]
    out, expected = act(x), star_relu(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
    )
    with torch.no_grad():
        torch.testing.assert_close(act(x), expected)


def test_star_relu_in_several_pieces(monkeypatch):
    monkeypatch.setattr(activations, "_PIECE", 5)
    act = make_star_relu()
    x = torch.randn(4, 6, dtype=torch.float64).t().requires_grad_()  # not contiguous
    inputs = (x, act.scale, act.bias)
    assert torch.autograd.gradcheck(lambda *_: act(x), inputs)
    torch.testing.assert_close(act(x), star_relu(*inputs))


def test_star_relu_keeps_the_type_of_bfloat16():
    x = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
    act = make_star_relu(torch.float32)
    out = act(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert act.scale.grad.dtype == torch.float32
    expected = star_relu(x.float(), act.scale, act.bias)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("act", [StarReLU, torch.nn.GELU, torch.nn.SiLU])
def test_an_activation_overwrites_only_for_its_owner_and_without_gradients(act):
    x = torch.randn(9)
    before = x.clone()
    inplace = activations.made_inplace(act())
    with torch.no_grad():
        expected = act()(x)
        assert x.equal(before)
    inplace(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        assert x.equal(before)
        assert inplace(x).equal(x)
    torch.testing.assert_close(x.detach(), expected)


def test_other_activations_stay_as_they_are():
    approximate = torch.nn.GELU("tanh")
    assert activations.made_inplace(approximate) is approximate


@pytest.mark.parametrize("act", [torch.nn.GELU, StarReLU])
@pytest.mark.parametrize("shape", [(4,), (10, 4), (2, 3, 5, 4), (0, 3, 4)])
def test_a_network_in_pieces_equals_it_at_once(shape, act, monkeypatch):
    mlp = Mlp(4, 2.0, act, out_dim=6).eval()
    x = torch.randn(shape)
    expected = mlp(x)
    sizes = []
    mlp.fc1.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    monkeypatch.setattr(eager, "PIECE", 12)  # 3 rows of 8 hidden values
    monkeypatch.setattr(eager, "POSITIONS", 1)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)
    assert max(sizes) <= 4


def test_dropout_is_drawn_for_all_rows_at_once(monkeypatch):
    mlp = Mlp(4, 2.0, drop=0.5).train()
    monkeypatch.setattr(eager, "PIECE", 12)
    monkeypatch.setattr(eager, "POSITIONS", 1)
    x, outputs = torch.randn(10, 4), []
    for grad in (True, False):  # as a reentrant checkpoint and its second pass
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            outputs.append(mlp(x))
    assert outputs[0].equal(outputs[1])


@pytest.mark.parametrize("length", [1, 3, 7, 8])
def test_pieces_come_back_in_order(length):
    x = torch.arange(14.0).view(7, 2)
    assert in_pieces(lambda part: part.sum(1), x, length).equal(x.sum(1))


def test_pieces_of_a_channels_last_map_give_one():
    x = torch.randn(5, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    y = in_pieces(torch.nn.Conv2d(3, 8, 1), x, 2)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_piece_has_a_row_at_least():
    assert piece(0) == eager.PIECE
    assert piece(eager.PIECE // 4) == 4
    assert piece(10 * eager.PIECE) == 1


@torch.no_grad()
def test_a_piece_has_enough_rows_for_the_weights_to_be_worth_their_layout(monkeypatch):
    mlp, sizes = Mlp(4, 2.0).eval(), []
    mlp.fc1.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    monkeypatch.setattr(eager, "PIECE", 12)
    monkeypatch.setattr(eager, "POSITIONS", 5)
    mlp(torch.randn(12, 4))
    assert sizes == [4, 4, 4]  # even pieces of 5 rows at most


@pytest.mark.parametrize("name", ["dfvt_tiny", "dilateformer_tiny"])
@torch.no_grad()
def test_a_stem_in_pieces_equals_it_at_once(name, monkeypatch):
    model = create_model(name, num_classes=3).eval()
    x = torch.randn(3, 3, 64, 64)
    monkeypatch.setattr(eager, "PIECE", 2**30)
    expected = model(x)
    sizes = []
    first = next(m for m in model.patch_embed.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    monkeypatch.setattr(eager, "PIECE", 1)
    monkeypatch.setattr(eager, "POSITIONS", 1)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert sizes == [1, 1, 1]
