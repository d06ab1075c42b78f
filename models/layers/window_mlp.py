"""The token mixer of Swin-MLP: matrices over the positions of windows.

Reference:  github.com/microsoft/Swin-Transformer, models/swin_mlp.py
Shapes:     B batch, C channels, H/W map, w window side, N = w*w tokens of a window, n windows,
            h heads, d head dim; maps are (B, H, W, C)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eager import is_eager
from .precision import autocast_dtype
from .resize import FileGrid


class WindowMlp(nn.Conv1d):
    """One matrix over the tokens of a window per head (Swin-MLP): parameters of a grouped Conv1d.

    Shapes: (B, H, W, C) -> (B, H, W, C). The map is padded with zeros, which a linear map ignores; a
    shift moves the windows by padding at the left and the top.

    Args:
        grid: map size (H, W) that the parameters are made for. The window is the same on every map.
    """

    def __init__(
        self, num_heads: int, grid: tuple[int, int], window_size: int, shifted: bool = False
    ):
        window = min(window_size, *grid)
        channels = num_heads * window**2
        super().__init__(channels, channels, kernel_size=1, groups=num_heads)
        self.grid = grid
        self.window = window
        self.shifted = shifted

    def forward(self, x: Tensor) -> Tensor:
        return mix_windows(x, self.weight, self.bias, self.window, self.shifted)

    def resize_table(self, name: str, old: Tensor, file_grid: FileGrid) -> Tensor | None:
        """`weight` or `bias` of another window -> this window's, where it is the whole map.

        What the file's windows do on that map is then one matrix: the top left corner of a larger one, or
        a block per smaller window and 0 between them. So a model built at the file's size and this one
        compute the same at this one's size.

        Raises:
            ValueError: the map has several windows, which no one matrix can serve.
        """
        own, heads = self.get_parameter(name), self.groups
        window = math.isqrt(old.shape[0] // heads) if old.ndim else 0
        area = window**2
        if old.shape != (heads * area, area, 1)[: own.ndim]:
            return None
        if window == self.window:
            return old
        if self.grid != (self.window, self.window):
            raise ValueError(
                f"Swin-MLP mixes windows of {window}x{window} in the file and of "
                f"{self.window}x{self.window} on this model's map of {self.grid[0]}x{self.grid[1]}; "
                "only for one window that is the whole map there are such weights: build the model with "
                "DATA.IMG_SIZE and WINDOW_SIZE of the file, it runs at any size"
            )
        if name == "weight":  # a map for each position, 1 there and 0 elsewhere
            x = torch.eye(self.window**2, dtype=old.dtype, device=old.device)
            x = x.view(-1, *self.grid, 1).expand(-1, -1, -1, heads)
            x = mix_windows(x, old, old.new_zeros(len(old)), window, self.shifted)
        else:
            x = old.new_zeros(1, *self.grid, heads)
            x = mix_windows(x, old.new_zeros(len(old), area), old, window, self.shifted)
        return x.permute(3, 1, 2, 0).reshape(own.shape)


def mix_windows(x: Tensor, weight: Tensor, bias: Tensor, window: int, shifted: bool) -> Tensor:
    """`WindowMlp` with parameters for windows of side `window`: (B, H, W, C) -> (B, H, W, C).

    A map that fits into one window is not shifted.
    """
    area = window**2
    weight, bias = weight.view(-1, area, area), bias.view(-1, area)  # h N N, h N
    start = window - window // 2 if shifted and min(x.shape[1:3]) > window > 1 else 0
    x = x.to(autocast_dtype(x))  # before it is padded and cut, not after
    if is_eager(x, weight, bias) and torch.is_grad_enabled():
        return _MixWindows.apply(x, weight, bias, window, start)
    return _mix(x, weight, bias, window, start)


class _MixWindows(torch.autograd.Function):
    """`_mix`; keeps the map and not its windows, which have padding, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, window: int, start: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.cut = (window, start)
        return _mix(x, weight, bias, window, start)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        # To cut a map into windows and to put them together are each other's transposes.
        grad_windows = _to_windows(grad, len(weight), *ctx.cut)
        grad_x = grad_weight = None
        if need_x:
            transposed = weight.to(grad.dtype).transpose(1, 2)
            grad_x = _from_windows(transposed @ grad_windows, x.shape, *ctx.cut)
        if need_weight:
            windows = _to_windows(x, len(weight), *ctx.cut)
            grad_weight = (grad_windows @ windows.transpose(1, 2)).to(weight.dtype)
        grad_bias = grad_windows.sum(2).to(weight.dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _mix(x: Tensor, weight: Tensor, bias: Tensor, window: int, start: int) -> Tensor:
    """One batched product for all windows; weight (h, N, N), bias (h, N).

    Args:
        start: how far the map begins below and right of the first window's corner.
    """
    windows = _to_windows(x, len(weight), window, start)
    mixed = torch.baddbmm(bias[..., None], weight, windows)
    return _from_windows(mixed, x.shape, window, start)


def _to_windows(x: Tensor, heads: int, window: int, start: int) -> Tensor:
    """(B, H, W, C) -> (h, N, B*n*d): heads first and windows beside the channels, zeros around the map."""
    height, width = x.shape[1:3]
    right, below = -(width + start) % window, -(height + start) % window
    if start or right or below:  # padding by nothing would be a copy
        x = F.pad(x, (0, 0, start, right, start, below))
    batch, height, width, channels = x.shape
    grid = (height // window, window, width // window, window)
    x = x.reshape(batch, *grid, heads, channels // heads)
    return x.permute(5, 2, 4, 0, 1, 3, 6).reshape(heads, window**2, -1)  # h w w B H/w W/w d


def _from_windows(x: Tensor, shape: torch.Size, window: int, start: int) -> Tensor:
    """(h, N, B*n*d) -> (B, H, W, C), without what lies around the map."""
    batch, height, width, channels = shape
    rows, columns = (-(-(side + start) // window) for side in (height, width))
    x = x.view(len(x), window, window, batch, rows, columns, channels // len(x))
    x = x.permute(3, 4, 1, 5, 2, 0, 6)  # B H/w w W/w w h d
    x = x.reshape(batch, rows * window, columns * window, channels)
    return x.narrow(1, start, height).narrow(2, start, width)
