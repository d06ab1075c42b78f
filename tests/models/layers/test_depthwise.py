"""One filter per channel: PyTorch's grouped convolution, whose compiled gradients stay channels-last."""

import pytest
import torch
from torch import nn

from models.layers.depthwise import DepthwiseConv2d


def convolutions(stride, bias):
    ours = DepthwiseConv2d(6, 3, stride, bias=bias)
    plain = nn.Conv2d(6, 6, 3, stride, 1, groups=6, bias=bias)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return ours, plain


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("stride", "bias"), [(1, True), (2, False)])
def test_it_is_a_grouped_convolution(stride, bias, layout, compiled):
    ours, plain = convolutions(stride, bias)
    torch.compiler.reset()
    run = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=layout).requires_grad_()
    y, expected = run(x), plain(x)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, *ours.parameters()), direction),
        torch.autograd.grad(expected, (x, *plain.parameters()), direction),
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_has_the_strides_of_the_weight(layout):
    """DistributedDataParallel warns of others, and copies."""
    ours, _ = convolutions(1, False)
    ours.to(memory_format=layout)
    for of_map in (torch.contiguous_format, torch.channels_last):
        ours.weight.grad = None
        ours(torch.randn(2, 6, 5, 7).contiguous(memory_format=of_map)).sum().backward()
        assert ours.weight.grad.stride() == ours.weight.stride()


def test_compilers_are_told_that_its_weight_is_channels_last():
    ours, _ = convolutions(1, False)
    strides = []

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if "conv2d" in str(node.target):
                strides.append(node.args[1].meta["example_value"].stride())
        return graph

    torch.compiler.reset()
    torch.compile(ours, backend=backend, fullgraph=True)(torch.randn(2, 6, 5, 7))
    assert strides == [(9, 1, 3, 1)]
