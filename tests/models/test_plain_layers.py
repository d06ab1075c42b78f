"""Layers whose work a parent does by their parameters are called once more than that is to happen."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from models import deployment
from models.folding import fold_batch_norms
from models.layers.depthwise import DepthwiseConv2d
from models.layers.linear import Linear
from models.layers.plain import is_plain
from tests.golden_tools import relative_error
from tests.models.test_contract import CHOOSING, images, small, total
from tests.small_models import SMALL

FAMILIES = sorted({**SMALL, **CHOOSING})


def multiplying(model):
    """Linear layers and convolutions by path."""
    kinds = (nn.Linear, nn.Conv2d)
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, kinds)}


class Adapted(nn.Module):
    """What libraries of adapters put in the place of a layer: a module with a forward of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.more = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.layer(x) * self.more


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_weights_count_in_evaluation_and_in_every_step(family):
    model, x = small(family), images()
    for layer in multiplying(model).values():
        prune.l1_unstructured(layer, "weight", amount=0.3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        total(model(x)).backward()
        optimizer.step()
    assert not [path for path, p in model.named_parameters() if p.grad is None]
    with torch.no_grad():
        pruned = model.eval()(x)
        for layer in multiplying(model).values():
            prune.remove(layer, "weight")
        assert relative_error(model(x), pruned) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_adapters_are_called(family):
    model, x = small(family), images()
    for path, layer in multiplying(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Adapted(layer))
    with torch.enable_grad():
        total(model.train()(x)).backward()
    adapted = model.eval()(x)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Adapted):
            layer.layer.weight *= layer.more
            if layer.layer.bias is not None:
                layer.layer.bias *= layer.more
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.layer)
    assert relative_error(model(x), adapted) < 1e-4


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_every_layer_are_called(family, training):
    model, called = small(family).train(training), set()
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if not list(layer.children()) and list(layer.parameters())
    }
    for path, layer in layers.items():
        layer.register_forward_hook(lambda *_, path=path: called.add(path))
    with torch.set_grad_enabled(training):
        model(images())
    assert not set(layers) - called


@pytest.mark.parametrize("family", ["swin", "dilateformer", "dfvt", "dhvt"])
@torch.no_grad()
def test_copies_for_inference_keep_normalised_weights(family):
    model, x = small(family), images()
    for layer in multiplying(model).values():
        parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.mul_(1.5)
    assert relative_error(deployment.deploy(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("first", [nn.Conv2d(3, 4, 1), DepthwiseConv2d(3, 3)])
@torch.no_grad()
def test_pruned_convolutions_keep_their_norm(first):
    prune.l1_unstructured(first, "weight", amount=0.5)
    first.weight = first.weight.detach()
    norm = nn.BatchNorm2d(first.out_channels)
    norm.running_mean.fill_(0.5)
    layers, x = nn.Sequential(first, norm).eval(), images((8, 8))
    assert relative_error(fold_batch_norms(layers)(x), layers(x)) < 1e-6


def test_norms_that_do_more_are_not_folded():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    layers, x = nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4)).eval(), images((8, 8))
    assert torch.equal(fold_batch_norms(layers)(x), layers(x))


def test_a_layer_is_plain_until_something_is_hung_on_it():
    layer = Linear(3, 4)
    assert is_plain(layer, Linear)
    assert not is_plain(layer, nn.Linear)
    handle = layer.register_full_backward_hook(lambda *_: None)
    assert not is_plain(layer, Linear)
    handle.remove()
    assert is_plain(layer, Linear)
