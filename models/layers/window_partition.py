"""Windows of a map of any size: how it is cut into them, and what tells their tokens apart.

Papers:     Swin, arXiv:2103.14030, Sec. 3.2; Swin V2, arXiv:2111.09883, Sec. 3.3
Shapes:     B batch, C channels, H/W map, w window side, N = w*w tokens of a window, n windows,
            h heads, d head dim; maps are (B, H, W, C)

Maps that are no multiple of the window are padded at the right and the bottom.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to the logits of keys in another region of a shifted window; finite in the released models.
OTHER_REGION = -100.0

# Added to the logits of padded keys, whose weight is then 0. Finite, because masks are in the state dict, and
# moving averages, timm's for one, make NaN of two times -inf.
PADDING = -1e30


def effective_window(window_size: int, shift: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Window side and shift on a map (H, W): a window never exceeds the shorter side."""
    return (window_size, shift) if min(grid) > window_size else (min(grid), 0)


def relative_position_index(window: int, device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each (query, key) of a window: (N, N), int64."""
    place = torch.arange(window, device=device)
    row, column = place.repeat_interleave(window), place.repeat(window)
    rows = row[:, None] - row + window - 1
    columns = column[:, None] - column + window - 1
    return rows * (2 * window - 1) + columns


def relative_coords_table(
    window: int, pretrained_window: int = 0, device: torch.device | None = None
) -> Tensor:
    """Log-spaced offsets (1, 2w-1, 2w-1, 2), rows first (Swin V2, Eq. 4), 8 px = 1.

    Args:
        pretrained_window: window that the offsets are measured in; 0 takes `window`.
    """
    # A window of one token has the offset 0 only, which stays 0 in any unit.
    unit = max((pretrained_window or window) - 1, 1)
    offset = torch.arange(1 - window, window, device=device, dtype=torch.float32) * 8 / unit
    offset = offset.sign() * torch.log2(offset.abs() + 1) / 3
    return torch.stack(torch.meshgrid(offset, offset, indexing="ij"), dim=-1)[None]


def window_mask(
    grid: tuple[int, int],
    window: int,
    shift: int,
    hide_padding: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """What is added to the logits of each window: (n, N, N), float32.

    0 where query and key come from one region of the map, `OTHER_REGION` where the cyclic shift
    brought them together, `PADDING` at padded keys (every window has a real one, and every query sees it).
    """
    regions, padding = [], []
    for size in grid:
        length = size + -size % window
        place = torch.arange(length, device=device)
        region = (place >= length - window).long() + (place >= length - shift).long()
        regions.append(region if shift else torch.zeros_like(place))
        padding.append((place + shift) % length >= size)
    region = _partition_labels(3 * regions[0][:, None] + regions[1], window)  # n N
    mask = torch.where(region[:, :, None] == region[:, None, :], 0.0, OTHER_REGION)
    if hide_padding:
        padded = _partition_labels(padding[0][:, None] | padding[1], window)
        mask = mask.masked_fill(padded[:, None, :], PADDING)
    return mask


def _partition_labels(x: Tensor, window: int) -> Tensor:
    """(H, W) -> (n, N)."""
    x = x.unflatten(1, (-1, window)).unflatten(0, (-1, window))
    return x.transpose(1, 2).reshape(-1, window * window)


def window_partition(x: Tensor, window: int, shift: int, by_image: bool) -> Tensor:
    """(B, H, W, C) -> padded, shifted windows (B*n, N, 1, C), or (B, N, n, C) if `by_image`."""
    height, width = x.shape[1:3]
    if height % window or width % window:
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # B H/w w W/w w C
    if by_image:
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(0, 2)[:, :, None]


def window_reverse(x: Tensor, grid: tuple[int, int], window: int, shift: int, heads: int) -> Tensor:
    """Attention output (B*n, h, N, d) or (B, n*h, N, d) -> map (B, H, W, C), padding cut off."""
    height, width = grid
    rows, columns = -(-height // window), -(-width // window)
    x = x.unflatten(2, (window, window))
    x = x.reshape(-1, rows, columns, heads, window, window, x.shape[-1])
    x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
    if shift:
        x = x.roll((shift, shift), (1, 2))
    return x[:, :height, :width]
