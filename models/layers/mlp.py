"""Token-wise feed-forward network."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, activation, Linear over the last dimension (ViT, arXiv:2010.11929, Sec. 3.1).

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
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim if out_dim is None else out_dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))
