"""torch.compile sees every model as one graph, and makes at most one more for other numbers of images."""

import pytest
import torch
from torch import nn

from models import create_model
from models.layers.grained import set_dense_evaluation
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
    assert backend.graphs <= 2


@pytest.mark.slow
def test_training_with_dilated_attention_is_one_graph_for_any_number_of_images():
    name, overrides = SMALL["dilateformer"]
    model = create_model(name, num_classes=10, **overrides).train()
    run, backend = compiled(model)
    for batch in (4, 3, 2, 5):
        run(torch.randn(batch, 3, overrides["img_size"], overrides["img_size"])).sum().backward()
    assert backend.graphs <= 2
