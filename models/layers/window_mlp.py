"""The token mixer of Swin-MLP: matrices over the positions of windows.

Reference:  github.com/microsoft/Swin-Transformer, models/swin_mlp.py
Shapes:     B batch, C channels, H/W map, w window side, N = w*w tokens of a window, n windows,
            h heads, d head dim; maps are (B, H, W, C)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    height, width = x.shape[1:3]
    heads = len(bias) // window**2
    start = window - window // 2 if shifted and min(height, width) > window > 1 else 0
    right, bottom = -(width + start) % window, -(height + start) % window
    x = F.pad(x, (0, 0, start, right, start, bottom))
    # Heads first and windows beside the channels: one batched product for all windows.
    x = x.unflatten(3, (heads, -1)).unflatten(2, (-1, window)).unflatten(1, (-1, window))
    x = x.permute(5, 2, 4, 0, 1, 3, 6)  # h w w B H/w W/w d
    shape = x.shape
    x = x.flatten(3).flatten(1, 2)  # h N B*n*d
    x = torch.baddbmm(bias.view(heads, -1, 1), weight.view(heads, -1, window**2), x).view(shape)
    x = x.permute(3, 4, 1, 5, 2, 0, 6).flatten(5).flatten(3, 4).flatten(1, 2)
    return x[:, start : start + height, start : start + width]
