"""torch.compile sees every model as one graph, and makes at most one more for other numbers of images."""

import shutil

import pytest
import torch
from torch import nn

from models import create_model
from models.folding import fold_batch_norms
from models.layers.grained import Router, set_dense_evaluation
from tests.small_models import SMALL


class CountingBackend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        return module.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module):
    backend = CountingBackend()
    return torch.compile(model, backend=backend, fullgraph=True), backend


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_a_model_is_one_graph_for_any_number_of_images(family):
    name, overrides = SMALL[family]
    model = create_model(name, num_classes=10, **overrides).eval()
    set_dense_evaluation(model, True)  # packed queries have as many rows as the images ask for
    run, backend = compiled(model)
    for batch in (4, 3, 2, 5):
        x = torch.randn(batch, 3, overrides["img_size"], overrides["img_size"])
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert 1 <= backend.graphs <= 2


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
@pytest.mark.parametrize("family", ["dhvt"])
@torch.no_grad()
def test_what_inductor_makes_of_a_deployed_model_equals_it(family):
    name, overrides = SMALL[family]
    model = create_model(name, num_classes=10, **overrides).eval()
    x = torch.randn(2, 3, overrides["img_size"], overrides["img_size"])
    run = torch.compile(fold_batch_norms(model), fullgraph=True)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_queries_make_no_graph_of_their_own():
    name, overrides = SMALL["deit_dge"]
    model = create_model(name, num_classes=10, **overrides).eval()
    backend = CountingBackend()
    run = torch.compile(model, backend=backend)
    asked, graphs = set(), []
    for bias in (-1.0, 0.0, 1.0, 2.0, 3.0, 4.0):
        for module in model.modules():
            if isinstance(module, Router):
                module.gate.weight.normal_(std=1.0)
                module.gate.bias.copy_(torch.tensor([0.0, bias, -bias]))
        x = torch.randn(3, 3, overrides["img_size"], overrides["img_size"])
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
        asked.add(float(model.complexity().dynamic.sum()))
        graphs.append(backend.graphs)
    assert len(asked) > 3
    assert graphs[-1] == graphs[0] > 0


def test_a_shrinking_keep_rate_makes_few_graphs():
    name, overrides = SMALL["evit"]
    model = create_model(name, num_classes=10, **overrides).train()
    backend = CountingBackend()
    run = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(2, 3, overrides["img_size"], overrides["img_size"])
    for percent in range(100, 40, -4):
        model.set_keep_rate(percent / 100)
        run(x).sum().backward()
    assert 1 <= backend.graphs <= 3


@pytest.mark.slow
def test_training_with_dilated_attention_is_one_graph_for_any_number_of_images():
    name, overrides = SMALL["dilateformer"]
    model = create_model(name, num_classes=10, **overrides).train()
    run, backend = compiled(model)
    for batch in (4, 3, 2, 5):
        run(torch.randn(batch, 3, overrides["img_size"], overrides["img_size"])).sum().backward()
    assert 1 <= backend.graphs <= 2
