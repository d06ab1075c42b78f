"""Plain patch embedding: one strided convolution."""

from torch import Tensor, nn

from .layer_norm import LayerNorm
from .tokens import pad_to_multiple


class PatchEmbed(nn.Module):
    """Project non-overlapping patches linearly (ViT, arXiv:2010.11929, Eq. 1).

    Shapes: (B, in_chans, H, W) -> (B, embed_dim, ceil(H/p), ceil(W/p)). Sides that are no multiple
    of p are padded with zeros at the right and the bottom.

    Args:
        norm_eps: adds a LayerNorm over the channels with this epsilon (Swin, PVT); the result is
            then laid out channels last in memory.
    """

    def __init__(
        self, in_chans: int, embed_dim: int, patch_size: int, norm_eps: float | None = None
    ):
        super().__init__()
        self.in_chans, self.embed_dim, self.patch_size = in_chans, embed_dim, patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        # Identity owns no key, so one class serves the state dicts with and without `norm`.
        self.norm = nn.Identity() if norm_eps is None else LayerNorm(embed_dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(pad_to_multiple(x, self.patch_size))
        if isinstance(self.norm, nn.Identity):
            return x
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
