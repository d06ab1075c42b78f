"""Activations, by name, and the two squared ones of the MetaFormer line."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StarReLU(nn.Module):
    """s * relu(x)^2 + b, s and b learned scalars (MetaFormer baselines, arXiv:2210.13452, Sec. 2.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        # Both scalars in the input's type: under autocast float32 ones would widen the whole map.
        scale, bias = self.scale.to(x.dtype), self.bias.to(x.dtype)
        return torch.addcmul(bias, F.relu(x).square(), scale)


class SquaredReLU(nn.Module):
    """relu(x)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "squared_relu": SquaredReLU,
    "star_relu": StarReLU,
}
