"""Attention to a few points per query, at learned positions between the pixels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_heads
from .eager import are_plain, is_eager
from .linear import Linear

# The published models slow the learning of the positions down by this factor.
OFFSET_GRADIENT_SCALE = 0.1


class PointSampledAttention(nn.Module):
    """Each query and head averages P bilinear samples of its value map.

    Deformable DETR, arXiv:2010.04159, Eq. 2, with one scale and coordinates in pixels. Offsets from
    the query's own pixel and the P weights are linear in the query; there are no keys.
    Shapes: (B, N, C) tokens of a map -> (B, N, C).
    """

    def __init__(self, dim: int, num_heads: int, num_points: int = 4, proj_drop: float = 0.0):
        super().__init__()
        check_heads(dim, num_heads)
        if num_points < 1:
            raise ValueError(f"num_points={num_points} must be at least 1 per query and head")
        self.num_heads = num_heads
        self.num_points = num_points
        self.v = Linear(dim, dim)
        self.attn_weight = Linear(dim, num_heads * num_points)
        self.offsets = Linear(dim, num_heads * num_points * 2)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        values = self.v(x).unflatten(-1, (self.num_heads, -1))  # B N h d
        points, weights = self.samples(x, size)
        sample = sample_rows if gathers_rows(x.device) else sample_maps
        x = sample(values.to(points.dtype), points, weights, size).to(values.dtype)
        return self.proj_drop(self.proj(x))

    def samples(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) of a map -> points (B, N, h, P, 2) and weights (B, N, h, P), see `sample_maps`."""
        per_point = (self.num_heads, self.num_points)
        # Half precision cannot hold pixel coordinates: 300.5 has no bfloat16.
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = self.attn_weight(x).unflatten(-1, per_point).to(wide).softmax(-1)
        offsets = self.offsets(x).unflatten(-1, (*per_point, 2)).to(wide)
        return pixel_positions(size, offsets)[:, None, None] + slow_gradient(offsets), weights

    def attention_maps(self, x: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """`points` (B, h, P, H, W, 2) of the query at each position, and their weights `attention`."""
        points, weights = (part.movedim(1, 3).unflatten(3, size) for part in self.samples(x, size))
        return {"points": points, "attention": weights}

    def init_ring_(self) -> None:
        """Start with the points on rays around the query, head j in the direction 2 pi j / heads."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)  # h 2
        distance = torch.arange(1, self.num_points + 1)
        with torch.no_grad():
            self.offsets.weight.zero_()
            self.offsets.bias.copy_((ray[:, None] * distance[:, None]).flatten())


def pixel_positions(size: tuple[int, int], like: Tensor) -> Tensor:
    """(H*W, 2): x and y of each pixel in raster order, in the type and on the device of `like`."""
    y, x = (torch.arange(n, dtype=like.dtype, device=like.device) for n in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def slow_gradient(x: Tensor) -> Tensor:
    """x, exactly; its gradient is multiplied by `OFFSET_GRADIENT_SCALE`."""
    return torch.lerp(x.detach(), x, OFFSET_GRADIENT_SCALE)


def gathers_rows(device: torch.device) -> bool:
    """Whether to take `sample_rows`: 2 to 4 times as fast on the CPU, unless a compiler looks on.

    On a GPU, `sample_maps` is faster, but its gradient has no deterministic kernel.
    """
    if torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled():
        return True
    if are_plain():
        return True  # `F.grid_sample` has no second derivatives
    return device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def sample_maps(values: Tensor, points: Tensor, weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Weighted sums of bilinear samples; a neighbour outside the map counts as zero.

    Args:
        values: (B, H*W, h, d), float32 or float64, as points and weights.
        points: (B, N, h, P, 2), x and y in pixels, the centre of the first pixel at (0, 0).
        weights: (B, N, h, P).
        size: (H, W).

    Returns:
        (B, N, h*d).
    """
    maps = values.permute(0, 2, 3, 1).unflatten(-1, size).flatten(0, 1)  # B*h d H W
    # One pixel per side has no extent to normalise by; a column of zeros beside it changes nothing.
    if 1 in size:
        maps = F.pad(maps, (0, size[1] == 1, 0, size[0] == 1))
    height, width = maps.shape[2:]
    x, y = points.unbind(-1)
    points = torch.stack([x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1], -1)
    points = points.transpose(1, 2).flatten(0, 1)  # B*h N P 2
    samples = F.grid_sample(maps, points, "bilinear", "zeros", align_corners=True)  # B*h d N P
    result = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # B*h d N
    return result.unflatten(0, (values.shape[0], values.shape[2])).permute(0, 3, 1, 2).flatten(2)


def sample_rows(values: Tensor, points: Tensor, weights: Tensor, size: tuple[int, int]) -> Tensor:
    """The same as `sample_maps`, as sums of 4P weighted rows of values: no sample is stored."""
    batch, length, heads, dim = values.shape
    height, width = size
    corners = points.detach().floor()
    right, down = (points - corners).unbind(-1)  # B N h P
    columns, rows = corners.long().unbind(-1)
    indices, factors = [], []
    for dx, x_factor in enumerate((1 - right, right)):
        for dy, y_factor in enumerate((1 - down, down)):
            x, y = columns + dx, rows + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            indices.append(y.clamp(0, height - 1) * width + x.clamp(0, width - 1))
            factors.append(x_factor * y_factor * weights * inside)
    image = torch.arange(batch, device=values.device).view(-1, 1, 1, 1, 1)
    head = torch.arange(heads, device=values.device).view(-1, 1, 1)
    indices = (image * length + torch.stack(indices, -1)) * heads + head  # B N h P 4
    indices, values = indices.flatten(0, 2).flatten(1), values.flatten(0, 2)  # B*N*h 4P, B*H*W*h d
    factors = torch.stack(factors, -1).flatten(0, 2).flatten(1)  # B*N*h 4P
    if is_eager(values, factors):
        result = F.embedding_bag(indices, values, mode="sum", per_sample_weights=factors)
    else:
        rows = values.index_select(0, indices.flatten()).unflatten(0, indices.shape)
        result = (rows * factors[..., None]).sum(1)
    return result.view(*points.shape[:2], heads * dim)
