"""Attention within (shifted) windows of a map of any size.

Papers:     Swin, arXiv:2103.14030, Sec. 3.2; Swin V2, arXiv:2111.09883, Sec. 3.2 and 3.3
Shapes:     B batch, C channels, H/W map, w window side, N = w*w tokens of a window, n windows,
            h heads, d head dim; maps are (B, H, W, C)

Maps that are no multiple of the window are padded (`window_partition`), and padded keys get weight 0.
Window and shift follow the map at hand, so a model runs at any size as if it had been built for it, its
bias table resized.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .biased_attention import biased_attention
from .checks import check_heads
from .eager import is_captured, is_transformed
from .linear import Linear, linear
from .packed import PackedWeight, can_pack
from .plain import is_plain
from .precision import autocast_dtype
from .resize import precise_dtype, resize_bias_table
from .table_cache import Constants, state_of
from .token_maps import attention_probabilities
from .window_partition import (
    effective_window,
    relative_coords_table,
    relative_position_index,
    window_mask,
    window_partition,
    window_reverse,
)

# The largest additive tensor in bytes that one block keeps between evaluation forwards, and the largest mask
# that all blocks share.
CACHE_LIMIT = 32 * 2**20

# Four stages have two masks each: that of shifted windows, and that of padding.
_TABLES, _MASKS = Constants(limit=16), Constants(limit=8, max_bytes=CACHE_LIMIT)


class Windowed(nn.Module):
    """Attention within windows; subclasses say what the relative position bias is.

    Relative bias, shift mask and padding mask are one tensor for the fused kernel. Evaluation without
    gradients keeps the last one while map size, dtype, device and the weights behind it stay the
    same; a write through `.data`, which PyTorch cannot see, shows after the next `eval()`.

    Args:
        grid: map size (H, W) that the parameters are made for.
        window_size, shift: of the configuration; see `effective_window`.
        scale: factor on the logits; None takes head_dim ** -0.5.
        fixed_windows: never shrink the window and let padding take part as ordinary keys, as the
            detection backbone of DFvT does.
    """

    reads_weights_of = ("qkv",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window_size: int,
        shift: int,
        scale: float | None,
        qkv_bias: bool,
        proj_drop: float,
        fixed_windows: bool = False,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        if window_size < 1:
            raise ValueError(f"window_size={window_size} must be at least 1")
        if not 0 <= shift < window_size:
            raise ValueError(
                f"shift={shift} must be at least 0 and less than window_size={window_size}"
            )
        self.num_heads = num_heads
        self.grid = grid
        self.window_size = window_size
        self.shift = shift
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.fixed_windows = fixed_windows
        self.window, _ = self.windows_on(grid)
        self.register_buffer("relative_position_index", relative_position_index(self.window))
        self.qkv = Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self._cache: tuple[Any, Tensor, list[Tensor]] | None = None
        self.packed_qkv: PackedWeight | None = None

    def bias_sources(self) -> list[Tensor]:
        """The parameters that `relative_bias` reads."""
        raise NotImplementedError

    def bias_table(self, window: int) -> Tensor:
        """Bias per head for each offset within windows of side `window`: ((2w-1)**2, h)."""
        raise NotImplementedError

    def projection_bias(self) -> Tensor | None:
        """Bias of the projection to q, k, v: (3C,)."""
        return self.qkv.bias

    def call_projection(self, x: Tensor) -> Tensor:
        """(..., C) -> q, k, v (..., 3C), by a call of the layer."""
        return self.qkv(x)

    def windows_on(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Window side and shift on a map (H, W)."""
        if self.fixed_windows:
            return self.window_size, self.shift
        return effective_window(self.window_size, self.shift, grid)

    def shift_mask(self) -> Tensor | None:
        """The published buffer `attn_mask`: `window_mask` at the built size of a shifted block."""
        window, shift = self.windows_on(self.grid)
        return window_mask(self.grid, window, shift) if shift and not self.fixed_windows else None

    def constants(self) -> dict[str, Tensor]:
        """The buffers that follow from the arguments, made anew."""
        return {"relative_position_index": relative_position_index(self.window)}

    def forward(self, x: Tensor, shift_mask: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); `shift_mask` is a kept copy of `self.shift_mask()`."""
        x = x.to(autocast_dtype(x))  # before it is padded and cut, not after
        grid = (x.shape[1], x.shape[2])
        window, shift = self.windows_on(grid)
        padded = any(side % window for side in grid) and not self.fixed_windows
        masked = bool(shift) or padded
        # With masks all windows of an image share one batch entry, so that one mask per window
        # broadcasts over the batch.
        qkv = self.project(window_partition(x, window, shift, by_image=masked))
        bias = self._additive(grid, masked, shift_mask if grid == self.grid else None, qkv[0])
        x = biased_attention(qkv, bias, self.scale)
        return self.proj_drop(self.proj(window_reverse(x, grid, window, shift, self.num_heads)))

    def attention_maps(self, x: Tensor, shift_mask: Tensor | None = None) -> dict[str, Tensor]:
        """What `forward` gets -> `attention` (B, h, H, W) to each position, the mean over its window's."""
        grid = (x.shape[1], x.shape[2])
        window, shift = self.windows_on(grid)
        q, k, _ = self.project(window_partition(x, window, shift, by_image=True))  # B n*h N d
        bias = self._build_additive(grid, True, shift_mask if grid == self.grid else None, q)
        # Padding asks no questions: the mean is over the real positions of a window.
        real = window_partition(x.new_ones(1, *grid, 1), window, shift, by_image=True)  # 1 N n 1
        real = real.expand(-1, -1, -1, self.num_heads).flatten(2).transpose(1, 2)[..., None]
        received = (attention_probabilities(q, k, self.scale, bias) * real).sum(-2) / real.sum(-2)
        received = window_reverse(received[..., None], grid, window, shift, self.num_heads)
        return {"attention": received.permute(0, 3, 1, 2)}  # B h H W

    def project(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Windows (G, N, M, C) -> q, k, v (3, G, M*h, N, d), a view of one matrix product."""
        heads = self.num_heads
        if not is_plain(self.qkv, Linear):
            x = self.call_projection(x).unflatten(3, (3, heads, -1))  # G N M 3 h d
            return x.permute(3, 0, 2, 4, 1, 5).flatten(2, 3)
        weight, bias = self.qkv.weight, self.projection_bias()
        packed = self.packed_qkv
        packed = packed if packed is not None and packed.suits(x, weight) else None
        if x.shape[2] == 1 and packed is None:
            x = linear(x[:, :, 0], weight, bias).unflatten(2, (3, heads, -1))  # G N 3 h d
            return x.permute(2, 0, 3, 1, 4)
        bias = None if bias is None else self._by_head(bias)
        x = packed.product(x, weight, bias) if packed else linear(x, self._by_head(weight), bias)
        return x.unflatten(3, (heads, 3, -1)).flatten(2, 3).permute(3, 0, 2, 1, 4)

    def pack_weights(self) -> None:
        """Lay out the weight of queries, keys and values for inference."""
        if is_plain(self.qkv, Linear) and can_pack(self.qkv.weight):
            self.packed_qkv = PackedWeight(self.qkv.weight, self._by_head)

    def _by_head(self, rows: Tensor) -> Tensor:
        """Rows (q | k | v, head, d) -> (head, q | k | v, d): windows and heads then merge without a copy."""
        return rows.unflatten(0, (3, self.num_heads, -1)).transpose(0, 1).flatten(0, 2)

    def relative_bias(self, window: int) -> Tensor:
        """What relative positions add to the logits of windows of side `window`: (h, N, N)."""
        table, index = self.bias_table(window), self.relative_position_index
        if window != self.window:
            index = _once(relative_position_index, window, table.device)
        # Not `table[index]`: the gradient of that is a sort on a GPU, and takes longer on a CPU too. The sums
        # of this one are in the table's type, of which half precision is too coarse.
        bias = table.to(precise_dtype(table)).index_select(0, index.flatten())
        return bias.unflatten(0, index.shape).permute(2, 0, 1)

    def _additive(
        self, grid: tuple[int, int], masked: bool, mask: Tensor | None, like: Tensor
    ) -> Tensor:
        """`_build_additive`, or the kept result of the last call."""
        sources = self.bias_sources()
        if (
            torch.compiler.is_compiling()
            or self.training
            or torch.is_grad_enabled()
            or any(tensor.is_inference() or is_transformed(tensor) for tensor in sources)
        ):
            return self._build_additive(grid, masked, mask, like)
        key = (grid, like.dtype, like.device, [state_of(tensor) for tensor in sources])
        kept = self._cache  # read once: another thread may replace it
        if kept is not None and kept[0] == key:
            return kept[1]
        bias = self._build_additive(grid, masked, mask, like)
        # Only plain tensors: those of a fake or functional mode or of a CUDA graph must not outlive it.
        fits = type(bias) is Tensor and bias.numel() * bias.element_size() <= CACHE_LIMIT
        fits = fits and not is_captured(bias)
        # The sources stay alive, so that no other table can come to lie at their addresses.
        alive = [tensor.detach() for tensor in sources]
        self._cache = (key, bias, alive) if fits else None
        return bias

    def _build_additive(
        self, grid: tuple[int, int], masked: bool, mask: Tensor | None, like: Tensor
    ) -> Tensor:
        """Relative bias, (1, h, N, N), or with masks, (1, n*h, N, N), in the dtype of `like`."""
        window, shift = self.windows_on(grid)
        bias = self.relative_bias(window)
        if masked:
            if mask is None:
                where = (grid, window, shift, not self.fixed_windows, like.device)
                mask = _once(window_mask, *where, kept=_MASKS)
            bias = (bias + mask[:, None]).flatten(0, 1)
        if like.dtype == torch.float16:
            # `PADDING` would be -inf, and a block of such keys nan in some fused kernels.
            bias = bias.clamp(min=torch.finfo(torch.float16).min)
        bias = bias.to(like.dtype)
        if like.is_cuda:
            # Rows of a multiple of 16 elements; otherwise the fused kernel copies them at each call.
            tokens = bias.shape[-1]
            bias = F.pad(bias, (0, -tokens % 16))[..., :tokens]
        return bias[None]

    def train(self, mode: bool = True) -> "Windowed":
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}


class WindowAttention(Windowed):
    """Multi-head attention within windows, with a learned bias per offset (Swin, Eq. 4).

    Shapes: (B, H, W, C) -> (B, H, W, C), any H and W.

    Args:
        qk_scale: replaces the factor head_dim ** -0.5 on the logits.
        others: see `Windowed`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window_size: int,
        shift: int = 0,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        fixed_windows: bool = False,
    ):
        super().__init__(
            dim, num_heads, grid, window_size, shift, qk_scale, qkv_bias, proj_drop, fixed_windows
        )
        table = torch.empty((2 * self.window - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.02))

    def bias_sources(self) -> list[Tensor]:
        return [self.relative_position_bias_table]

    def set_fixed_windows(self, fixed: bool) -> None:
        """Change `fixed_windows`; where that changes the window, the bias table is resized."""
        self.fixed_windows = fixed
        self._cache = None
        old, (window, _) = self.relative_position_bias_table, self.windows_on(self.grid)
        if window != self.window:
            table = resize_bias_table(old.detach(), (self.window, self.window), (window, window))
            self.relative_position_bias_table = nn.Parameter(table, old.requires_grad)
            self.relative_position_index = relative_position_index(window, old.device)
            self.window = window

    def bias_table(self, window: int) -> Tensor:
        return resize_bias_table(
            self.relative_position_bias_table, (self.window, self.window), (window, window)
        )


class CosineWindowAttention(Windowed):
    """Scaled cosine attention with a bias computed from log-spaced offsets (Swin V2, Eq. 2-4).

    Shapes: (B, H, W, C) -> (B, H, W, C), any H and W.

    Args:
        pretrained_window: window that the bias network was trained with; 0 takes the one at hand.
        others: see `Windowed`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window_size: int,
        shift: int = 0,
        *,
        qkv_bias: bool = True,
        pretrained_window: int = 0,
        proj_drop: float = 0.0,
    ):
        # The factor on the logits is learned and applied to q.
        super().__init__(dim, num_heads, grid, window_size, shift, 1.0, False, proj_drop)
        self.pretrained_window = pretrained_window
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False)
        )
        self.register_buffer(
            "relative_coords_table", relative_coords_table(self.window, pretrained_window)
        )
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def constants(self) -> dict[str, Tensor]:
        table = relative_coords_table(self.window, self.pretrained_window)
        return super().constants() | {"relative_coords_table": table}

    def bias_sources(self) -> list[Tensor]:
        return [*self.cpb_mlp.parameters(), *self.cpb_mlp.buffers()]

    def bias_table(self, window: int) -> Tensor:
        coords = self.relative_coords_table
        if window != self.window:
            coords = _once(relative_coords_table, window, self.pretrained_window, coords.device)
        table = self.cpb_mlp(coords.to(self.logit_scale.dtype))
        return 16 * table.flatten(0, 2).sigmoid()

    def projection_bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])

    def call_projection(self, x: Tensor) -> Tensor:
        bias = self.projection_bias()  # the layer has none
        return self.qkv(x) if bias is None else self.qkv(x) + bias

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows (G, N, M, C) -> q and k of length one, q times the scale, and v: (G, M*h, N, d)."""
        q, k, v = super().project(x)
        scale = self.logit_scale.clamp(max=math.log(100)).exp().repeat(x.shape[2], 1, 1)
        # Under autocast the norms are float32; the kernel wants one dtype.
        q = (_unit(q) * scale).to(v.dtype)
        return q, _unit(k).to(v.dtype), v


def _unit(x: Tensor) -> Tensor:
    """Vectors (..., d) of length one, and 0 for 0: the usual least length, 1e-12, is 0 in float16."""
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


def _once(make: Callable[..., Tensor], *args: Any, kept: Constants = _TABLES) -> Tensor:
    """`make(*args)`, computed once for all blocks."""
    return kept.get((make, *args), lambda: make(*args))
