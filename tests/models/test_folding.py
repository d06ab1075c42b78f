"""Folded batch norms: the same numbers, without the norms, in a copy."""

import pytest
import torch
from torch import nn

from models import create_model, list_models
from models.backbone import BATCH_NORMS
from models.folding import fold_batch_norms
from tests.golden_tools import SkipInit, fill_module_, relative_error


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]


@pytest.mark.parametrize("name", ["dilateformer_tiny", "dfvt_tiny", "dhvt_tiny_cifar_patch4"])
@torch.no_grad()
def test_a_folded_model_computes_the_same(name):
    model = fill_module_(create_model(name, num_classes=10)).eval()
    folded = fold_batch_norms(model)
    x = torch.randn(2, 3, 64, 64)
    assert norms(model)
    assert relative_error(folded(x), model(x)) < 1e-5


@torch.no_grad()
def test_the_model_itself_keeps_its_norms_and_its_mode():
    model = create_model("dhvt_tiny_cifar_patch4", num_classes=10).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_batch_norms(model)
    assert model.training
    assert not folded.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", list_models())
def test_no_variant_keeps_a_batch_norm(name):
    with torch.device("meta"), SkipInit():
        folded = fold_batch_norms(create_model(name))
    assert not norms(folded)


def test_a_norm_that_follows_no_convolution_stays():
    layers = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    assert norms(fold_batch_norms(layers)) == ["0", "3"]


def test_every_part_of_a_folded_model_is_in_evaluation_mode():
    folded = fold_batch_norms(create_model("dhvt_tiny_cifar_patch4", num_classes=10))
    assert not [name for name, module in folded.named_modules() if module.training]


@torch.no_grad()
def test_an_activation_that_is_there_twice_stands_between_convolution_and_norm():
    act = nn.ReLU()
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.BatchNorm2d(4))
    layers.extend([nn.Conv2d(4, 4, 1), act, nn.BatchNorm2d(4)])
    for norm in (layers[2], layers[5]):
        norm.running_mean.fill_(0.5)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fold_batch_norms(layers)(x), layers.eval()(x))
