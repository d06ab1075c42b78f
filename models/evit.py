"""EViT: a vision transformer that drops the patches its class token attends to least.

Paper:      arXiv:2202.07800, Sec. 3.2 (attentive tokens), Sec. 3.3 (fusion), Sec. 4 (training, keep rates)
Reference:  the EViT release; its state dict is DeiT's, the reorganisation adds no parameter
Deviations: any input size, as in `vit.py` (the release lets its convolution floor H/16 and W/16;
            nothing changes at multiples of 16). No distillation token: the release's is broken.
            `kept_patches` shows a kept fused token as -1, not as patch 0.
Shapes:     B batch, C channels, M patch tokens of a layer, m kept ones, N = M + 1 with class token
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers.attention import merge_heads, split_heads
from .layers.eager import may_keep
from .layers.precision import without_autocast
from .registry import register
from .vit import Block, VisionTransformer


class ReorganisingBlock(Block):
    """Pre-norm block that can shorten its sequence between attention and MLP."""

    def forward(
        self, x: Tensor, num_kept: int | None = None, fuse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, 1 + M, C) -> the sequence [class, m kept, fused] and the kept indices (B, m).

        Args:
            num_kept: m; None keeps everything, and then there are no indices.
            fuse: append the sum of the other tokens, weighted by the scores and not normalised.
        """
        if num_kept is None:
            return super().forward(x), None
        update, scores = self._attend(self.norm1(x))
        x = x + self.drop_path(update)
        # By decreasing score, as the release has it: later layers see this order.
        kept = scores.topk(num_kept, dim=1).indices  # B m
        x = reorganise(x, scores, kept, fuse)
        return x + self.drop_path(self.mlp(self.norm2(x))), kept

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Self-attention (B, N, C), and how much the class token attends to each patch (B, M)."""
        attn = self.attn
        q, k, v = split_heads(attn.qkv(x), attn.num_heads, 3)
        out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        # One row of the attention matrix is all that the ranking needs.
        row = (q[:, :, :1] @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32))
        row = row.mul(attn.scale).softmax(-1)  # B h 1 N
        scores = row[:, :, 0, 1:].mean(1)
        return attn.proj_drop(attn.proj(merge_heads(out))), scores


def reorganise(x: Tensor, scores: Tensor, kept: Tensor, fuse: bool) -> Tensor:
    """Tokens (B, 1 + M, C), scores (B, M), indices (B, m) -> [class, kept, fused] (Sec. 3.3)."""
    rows = F.pad(kept + 1, (1, 0))[..., None].expand(-1, -1, x.shape[2])  # 0 is the class token
    sequence = x.gather(1, rows)
    if not fuse:
        return sequence
    # Zero weights for the kept tokens: no complement index, and no difference of two large sums.
    weights = scores.scatter(1, kept, 0.0)[:, None]  # B 1 M
    with without_autocast(x):
        fused = weights.to(x.dtype) @ x[:, 1:]
    return torch.cat([sequence, fused], dim=1)


@register("evit", node="EVIT")
class EViT(VisionTransformer):
    """DeiT whose blocks `drop_loc` keep a part of the patches and drop or fuse the others.

    In training the keep rate falls from 1 to its final value: 1 before epoch `shrink_start_epoch`,
    then along half a cosine over `shrink_epochs` (Sec. 4). Evaluation uses the rate that training
    has reached; a model that was never trained uses the final one.

    Attributes:
        final_rates, keep_rates: one keep rate per block, as built and as in force.

    Args:
        img_size: size that `pos_embed` is stored for; other sizes are accepted.
        keep_rate: share of the patches kept by each block of `drop_loc`, or one share for each.
        drop_loc: blocks that drop patches, counted from 0.
        fuse_token: replace the dropped patches of a block by one token.
        shrink_start_epoch: epochs with all patches.
        shrink_epochs: epochs in which the rate falls; 0 switches at once.
    """

    block_type = ReorganisingBlock

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        keep_rate: float | Sequence[float] = 0.7,
        drop_loc: Sequence[int] = (3, 6, 9),
        fuse_token: bool = True,
        shrink_start_epoch: int = 10,
        shrink_epochs: int = 100,
    ):
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
        )
        self.drop_loc = set(drop_loc)
        self.final_rates = _rates_per_block(keep_rate, drop_loc, depth)
        self.fuse_token = fuse_token
        self.shrink_start_epoch, self.shrink_epochs = shrink_start_epoch, shrink_epochs
        self.keep_rates = list(self.final_rates)
        self._tokens: int | None = None
        self._kept: list[Tensor] = []
        self._last_grid = self.grid

    @property
    def drops_tokens(self) -> bool:
        """Whether some block keeps less than everything at the rates in force."""
        return self._tokens is not None or any(rate < 1 for rate in self.keep_rates)

    def set_keep_rate(self, keep_rate: float | None = None, tokens: int | None = None) -> None:
        """Keep another share of the patches from now on, without rebuilding.

        Args:
            keep_rate: share for the blocks of `drop_loc`; 1 keeps everything, and None returns to the
                shares that they were built with.
            tokens: every block, whatever it was built for, keeps at most this many patches.
        """
        if keep_rate is not None and not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate={keep_rate} must be in (0, 1]; 1 keeps all patches")
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens={tokens} must be at least 1")
        self.keep_rates = [
            final if keep_rate is None or block not in self.drop_loc else keep_rate
            for block, final in enumerate(self.final_rates)
        ]
        self._tokens = tokens

    def set_progress(
        self, step: int, total_steps: int, warmup_steps: int, steps_per_epoch: int | None = None
    ) -> None:
        """Set the keep rate of training step `step`; an unknown epoch is 1/300 of the training."""
        epoch = (total_steps / 300 if steps_per_epoch is None else steps_per_epoch) or 1
        start, length = self.shrink_start_epoch * epoch, self.shrink_epochs * epoch
        if step < start:
            self.keep_rates = [1.0] * len(self.blocks)
        elif step >= start + length:
            self.keep_rates = list(self.final_rates)
        else:
            left = 0.5 * (1 + math.cos(math.pi * (step - start) / length))
            self.keep_rates = [final + (1 - final) * left for final in self.final_rates]

    @property
    def settled(self) -> bool:
        """Whether the keep rates are those before or after the shrinking, see `Backbone`."""
        return self.keep_rates in ([1.0] * len(self.blocks), self.final_rates)

    def log_values(self) -> dict[str, Tensor | float]:
        """`keep_rate`: the smallest in force."""
        return {"keep_rate": min(self.keep_rates)}

    def conditions(self) -> dict[str, float]:
        """The `keep_rate` again, and `tokens` where their number is set."""
        tokens = {} if self._tokens is None else {"tokens": self._tokens}
        return self.log_values() | tokens

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, 1 + m, C) of the last block."""
        grid = self.grid_of(x)
        x, kept = self.embed(x), []
        for block, rate in zip(self.blocks, self.keep_rates, strict=True):
            num_kept = self._num_kept(x.shape[1] - 1, rate)
            if block is self.blocks[-1] and not kept:
                self.remember(block, x, grid)
            x, index = self.run_block(block, x, num_kept, self.fuse_token)
            if index is not None:
                kept.append(index)
        if not self.training and may_keep():
            self._kept, self._last_grid = kept, grid
        return self.norm(x)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """Images -> one map as of `VisionTransformer`, at a keep rate of 1.

        Raises:
            ValueError: patches are dropped, so that no map is left.
        """
        if self.drops_tokens:
            raise ValueError(
                f"MODEL.EVIT.KEEP_RATE={min(self.keep_rates)} drops tokens, so no feature map is left for "
                "dense tasks; set MODEL.EVIT.KEEP_RATE 1.0, or call set_keep_rate(1.0)"
            )
        return super().forward_pyramid(x)

    def token_maps(self) -> dict[str, Tensor]:
        """Of the last evaluation forward, for its i-th dropping block:

        `kept_idx_i` (B, m): kept tokens by decreasing score, as positions in the block's own sequence
        without the class token; `kept_mask_i` (B, h, w): True where an image's patch is still there. Where
        nothing was dropped, the attention of `VisionTransformer`.
        """
        if not self._kept:
            return super().token_maps()
        height, width = self._last_grid
        maps = {f"kept_idx_{i}": index for i, index in enumerate(self._kept)}
        for i, patches in enumerate(kept_patches(self._kept, height * width, self.fuse_token)):
            # One column more takes the fused tokens, which are no patch.
            mask = patches.new_zeros(len(patches), height * width + 1, dtype=torch.bool)
            mask = mask.scatter(1, patches % (height * width + 1), True)[:, :-1]
            maps[f"kept_mask_{i}"] = mask.unflatten(1, (height, width))
        return maps

    def train(self, mode: bool = True) -> "EViT":
        self._kept = []
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": []}  # a copy has had no forward pass

    def _num_kept(self, num_patches: int, rate: float) -> int | None:
        """How many of a block's patches stay (Sec. 3.2), None if all of them do."""
        if self._tokens is not None:
            num_kept = min(self._tokens, num_patches)
        else:
            num_kept = math.ceil(rate * num_patches)
        return num_kept if num_kept < num_patches else None


def kept_patches(kept: Sequence[Tensor], num_patches: int, fuse_token: bool) -> list[Tensor]:
    """Indices in each block's own sequence -> patches of the image, -1 for a fused token.

    Args:
        kept: `kept_idx_0`, `kept_idx_1`, ... of `EViT.token_maps`, each (B, m_i).
        num_patches: patches of the image, in raster order.
        fuse_token: whether the blocks appended a fused token.

    Returns:
        One (B, m_i) per block.
    """
    patches = []
    for index in kept:
        if patches:
            previous = F.pad(patches[-1], (0, 1), value=-1) if fuse_token else patches[-1]
        else:
            previous = torch.arange(num_patches, device=index.device).expand(len(index), -1)
        patches.append(previous.gather(1, index))
    return patches


def _rates_per_block(
    keep_rate: float | Sequence[float], drop_loc: Sequence[int], depth: int
) -> list[float]:
    """One keep rate per block, 1 where nothing is dropped."""
    given = [keep_rate] * len(drop_loc) if isinstance(keep_rate, int | float) else list(keep_rate)
    if len(given) != len(drop_loc):
        raise ValueError(
            f"MODEL.EVIT.KEEP_RATE={given} must be one number, or one per block of "
            f"MODEL.EVIT.DROP_LOC={list(drop_loc)}"
        )
    if not all(0 < rate <= 1 for rate in given):
        raise ValueError(f"MODEL.EVIT.KEEP_RATE={keep_rate} must be in (0, 1]; 1 keeps all patches")
    if len(set(drop_loc)) < len(drop_loc) or not set(drop_loc) <= set(range(depth)):
        raise ValueError(
            f"MODEL.EVIT.DROP_LOC={list(drop_loc)} must be different blocks of 0..{depth - 1}"
        )
    rates = [1.0] * depth
    for block, rate in zip(drop_loc, given, strict=True):
        rates[block] = float(rate)
    return rates
