"""Derivatives of any order, per image and of several models at once, as PyTorch's transforms give them."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from models import plain_operators
from models.layers.grained import set_dense_evaluation
from tests.golden_tools import relative_error
from tests.models.test_contract import CHOOSING, images, small, total
from tests.small_models import SMALL

FAMILIES = sorted({**SMALL, **CHOOSING})
# The gradient of sampling points is scaled on purpose; which tokens are chosen has no gradient.
SMOOTH = [name for name in FAMILIES if name not in ("dpvt", "keep_rate=0.6", "grained=True")]

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script"),  # PyTorch's own, in `jvp`
]


@pytest.fixture(params=FAMILIES)
def model(request):
    model = small(request.param)
    set_dense_evaluation(model, True)  # packed rows are as many as the images ask for
    return model


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss(model, x):
    """Parameters -> loss, of evaluation."""
    return lambda p: total(functional_call(model, p, (x,)))


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def test_functional_gradients_are_those_of_backward(model):
    x = images()
    found = flat(grad(loss(model, x))(parameters(model)).values())
    total(model(x)).backward()
    zeros = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert relative_error(found, flat(zeros)) < 1e-4


def test_gradients_per_image_are_those_of_each_image(model):
    x = images()
    found = vmap(lambda p, image: grad(loss(model, image[None]))(p), (None, 0))(
        parameters(model), x
    )
    one = flat(grad(loss(model, x[1:]))(parameters(model)).values())
    assert relative_error(flat(g[1] for g in found.values()), one) < 1e-4


@torch.no_grad()
def test_images_and_models_can_be_mapped_over(model):
    x = images()
    expected = model(x)
    assert relative_error(vmap(lambda image: model(image[None])[0])(x), expected) < 1e-5
    several = {name: torch.stack([p, 1.01 * p]) for name, p in parameters(model).items()}
    found = vmap(lambda p: functional_call(model, p, (x,)))(several)
    assert relative_error(found[0], expected) < 1e-5
    assert relative_error(found[1], expected) > 1e-4


@pytest.mark.parametrize("family", SMOOTH)
def test_first_and_second_derivatives_are_those_of_differences(family):
    model, x = small(family).double(), images().double()
    along, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double(), 1e-6

    def gradient(x, **options):
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(total(model(x)), x, **options)
        return x, found

    with plain_operators():
        _, forward = jvp(model, (x,), (along,))
        again, first = gradient(x, create_graph=True)
        (second,) = torch.autograd.grad((first * along).sum(), again)
    with torch.no_grad():
        difference = model(x + step * along) - model(x - step * along)
    assert relative_error(forward, difference / (2 * step)) < 1e-5
    after, before = (gradient(x + sign * step * along)[1] for sign in (1, -1))
    assert relative_error(second, (after - before) / (2 * step)) < 1e-4
