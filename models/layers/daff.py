"""Dynamic aggregation feed forward (DAFF) of DHVT."""

import torch.nn.functional as F
from torch import Tensor, nn

from .activations import made_inplace
from .batch_norm import MAP_NORMS, BatchNorm2d
from .checks import hidden_width
from .depthwise import MAP_CONVOLUTIONS, DepthwiseConv2d
from .eager import add_owned, in_pieces_if_idle
from .linear import PointwiseConv2d, linear
from .plain import has_hooks, is_plain


class DAFF(nn.Module):
    """Inverted bottleneck with a depthwise convolution, whose pooled output re-weights the class token.

    DHVT, arXiv:2210.05958, Sec. 3, "Dynamic Aggregation Feed Forward".

    Shapes: a map (B, H, W, C) -> (B, H, W, C); `reweight` treats a class token.

    Args:
        ratio: hidden width int(C * ratio).
        act: after the first two convolutions and in the squeeze of a class token; one module for all.
        class_gate: with the squeeze and excitation of a class token; without one it has no use.
    """

    conv_norm_pairs = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self,
        dim: int,
        ratio: float = 4.0,
        act: type[nn.Module] = nn.GELU,
        class_gate: bool = True,
    ):
        super().__init__()
        self.dim, self.hidden = dim, hidden_width(dim, ratio, "mlp_ratio")
        hidden = self.hidden
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.bn1 = BatchNorm2d(hidden)
        self.conv2 = DepthwiseConv2d(hidden, 3)
        self.bn2 = BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, dim, 1)
        self.bn3 = BatchNorm2d(dim)
        self.act = made_inplace(act())
        self.set_class_gate(class_gate)

    def set_class_gate(self, enable: bool) -> None:
        """Make the layers of `reweight` anew, or remove them."""
        dim = self.dim
        self.compress = nn.Linear(dim, dim // 4) if enable else None
        self.excitation = nn.Linear(dim // 4, dim) if enable else None

    def forward(self, x: Tensor) -> Tensor:
        positions = x.shape[1] * x.shape[2]
        values = positions * self.hidden
        return in_pieces_if_idle(self, self._layers, x, values, positions)

    def _layers(self, x: Tensor) -> Tensor:
        x = _conv_norm(x, self.conv1, self.bn1, self.act)  # B H W 4C
        x = add_owned(_conv_norm(x, self.conv2, self.bn2, self.act), x)
        return _conv_norm(x, self.conv3, self.bn3)  # B H W C

    def reweight(self, cls: Tensor, x: Tensor) -> Tensor:
        """Class token (B, 1, C) times channel weights from the output map `x` (B, H, W, C)."""
        assert self.compress is not None, "built with class_gate=False"
        assert self.excitation is not None
        # No sigmoid: the released weights were trained without one.
        weights = self.excitation(self.act(self.compress(x.mean(dim=(1, 2)))))  # B C
        return cls * weights[:, None]


def _conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module, act: nn.Module | None = None) -> Tensor:
    """Convolution, batch norm (or none) and activation of a map (B, H, W, C); norms merge in evaluation."""
    folded = type(norm) is nn.Identity
    if (
        norm.training
        or not is_plain(conv, *MAP_CONVOLUTIONS)
        or not (folded or (is_plain(norm, *MAP_NORMS) and norm.running_var is not None))
    ):
        x = norm(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return x if act is None else act(x)
    if folded and isinstance(conv, PointwiseConv2d) and not (act and has_hooks(act)):
        return conv.on_map(x, act)
    weight, bias = conv.weight, conv.bias
    if not folded:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = weight * scale[:, None, None, None]
        bias = (bias - norm.running_mean) * scale + norm.bias
    if conv.kernel_size == (1, 1):
        x = linear(x, weight[:, :, 0, 0], bias)
    else:
        # As a permuted view the map is in channels_last format: nothing is copied.
        x = x.permute(0, 3, 1, 2)
        x = F.conv2d(x, weight, bias, padding=conv.padding, groups=conv.groups)
        x = x.permute(0, 2, 3, 1)
    return x if act is None else act(x)
