"""Convolution with a filter of its own for each channel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eager import compiled_for_cpu
from .linear import PointwiseConv2d


class DepthwiseConv2d(nn.Conv2d):
    """A k x k filter per channel, k odd: (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).

    Parameters are those of `nn.Conv2d` with as many groups as channels. Its weights read the same in both
    memory layouts, and what compilers make of a training step then goes through copies in PyTorch's default
    layout: gradients of CDFFormer-S18's filters took 405 ms of a step, in channels-last, as the maps are, 142
    (batch 8, two cores, torch 2.14). So compiled code for CPUs is told that the weights are channels-last.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, bias: bool = True):
        padding = kernel_size // 2
        super().__init__(
            channels, channels, kernel_size, stride, padding, groups=channels, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        if compiled_for_cpu(x):
            weight = self.weight.reshape(self.groups, *self.kernel_size, 1).permute(0, 3, 1, 2)
        elif torch.is_grad_enabled() and self.weight.stride(1) > 1:
            # The gradient then has these strides too, which DDP warns of else: PyTorch gives it the map's.
            weight = self.weight.squeeze(1).unsqueeze(1)
        else:
            weight = self.weight
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


# Convolutions of maps that do nothing more, as classes derived from them elsewhere may.
MAP_CONVOLUTIONS = (nn.Conv2d, PointwiseConv2d, DepthwiseConv2d)
