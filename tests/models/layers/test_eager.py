"""What modes of execution are told apart by."""

import pytest
import torch
from torch import Tensor, nn

from models.layers import eager
from models.layers.eager import compiled_for_cpu, is_exporting, may_keep
from tests.models.test_contract import images, small


class Flags(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        flags = (is_exporting(), compiled_for_cpu(x), may_keep(), may_keep(compiled=True))
        return x + sum(2**i for i, flag in enumerate(flags) if flag)


def test_compilers_exporters_and_eager_mode_are_told_apart():
    """PyTorch 2.11's compiler takes its own question for True always: no kernel would run compiled."""
    model, x = Flags(), torch.zeros(2)
    assert model(x).tolist() == [12, 12]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(x).tolist() == [10, 10]


@torch.compiler.disable
def uncompiled(x: Tensor) -> Tensor:
    return x + 1


def test_they_are_told_apart_between_two_graphs_too():
    """A loop with a break in it runs as it is, and the compiler looks at each function that it calls."""

    def several(x: Tensor) -> Tensor:
        for _ in range(2):
            x = uncompiled(x)
            if not may_keep(compiled=True):
                x = x + 100
        return x

    assert torch.compile(several, backend="eager")(torch.zeros(1)).tolist() == [2]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_no_compiled_one(strict):
    program = torch.export.export(Flags(), (torch.zeros(2),), strict=strict)
    assert program.module()(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize("family", ["dhvt", "dfvt", "dilateformer"])
@pytest.mark.parametrize("way", ["training", "no running statistics"])
def test_norms_that_take_statistics_of_the_batch_see_all_of_it(family, way, monkeypatch):
    monkeypatch.setattr(eager, "PIECE", 1)
    monkeypatch.setattr(eager, "POSITIONS", 1)
    model, x = small(family), images(batch=5)
    for norm in model.modules():
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        if way == "training":
            norm.train()
            norm.momentum = 0.0
        else:
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
