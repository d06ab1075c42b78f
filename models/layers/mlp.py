"""Token-wise feed-forward network."""

from torch import Tensor, nn

from .activations import made_inplace
from .checks import hidden_width
from .eager import in_pieces_if_idle
from .linear import Linear, activated


class Mlp(nn.Module):
    """Linear, activation, Linear over the last dimension (ViT, arXiv:2010.11929, Sec. 3.1).

    In evaluation without gradients, eager on a CPU, large inputs go through it in pieces; hooks on its
    layers see those.

    Shapes: (..., C) -> (..., C), or (..., out_dim) if that is given; hidden width int(C * ratio).
    """

    def __init__(
        self,
        dim: int,
        ratio: float = 4.0,
        act: type[nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        out_dim: int | None = None,
    ):
        super().__init__()
        self.hidden = hidden = hidden_width(dim, ratio, "mlp_ratio")
        self.fc1 = Linear(dim, hidden, bias=bias)
        self.act = made_inplace(act())
        self.fc2 = Linear(hidden, dim if out_dim is None else out_dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2:
            return self._layers(x)
        # Two maps as wide as the hidden one, or one where the activation works in place.
        values = self.hidden // 2
        y = in_pieces_if_idle(self, self._layers, x.flatten(0, -2), values, positions=1)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _layers(self, x: Tensor) -> Tensor:
        x = self.drop(activated(self.fc1, self.act, x))
        return self.drop(self.fc2(x))
