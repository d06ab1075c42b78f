"""What the papers write of token mixers, one operation per term; see `literal.py`, which puts it into models.

Each function takes the mixer whose parameters it computes with, and what its `forward` takes.

Shapes: B batch, C channels, H/W map, N tokens, h heads, d head dim, M expanded channels, K filters of a bank,
        P points, T candidate queries of an image, S granularities
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models import dge, evit, vit
from models.layers import point_sampling
from models.layers import window as windows
from models.layers.attention import Attention, merge_heads, split_heads
from models.layers.dilated import DilatedAttention
from models.layers.grained import Routing
from models.layers.head_interaction import HIAttention
from models.layers.precision import without_autocast
from models.layers.spatial_reduction import SpatialReductionAttention
from models.layers.tokens import pad_to_multiple, to_map, to_tokens
from models.layers.window_mlp import WindowMlp
from models.layers.window_partition import window_mask, window_partition, window_reverse
from models.mixers import attention as attentions
from models.mixers import fourier as filters

# -- attention over all tokens -------------------------------------------------------------------


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T scale) v for (B, h, N, d), merged: (B, N, C)."""
    maps = (q @ k.transpose(-2, -1) * scale).softmax(-1)
    return merge_heads(F.dropout(maps, dropout, dropout > 0) @ v)


def attention(attn: Attention, x: Tensor) -> Tensor:
    q, k, v = split_heads(attn.qkv(x), attn.num_heads, 3)
    dropout = attn.attn_drop if attn.training else 0.0
    return attn.proj_drop(attn.proj(softmax_attention(q, k, v, attn.scale, dropout)))


def attention_on_map(attn: Attention, x: Tensor) -> Tensor:
    return attention(attn, x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def reduced_attention(attn: SpatialReductionAttention, x: Tensor, size: tuple[int, int]) -> Tensor:
    """PVT, Eq. 1-3."""
    (q,) = split_heads(attn.q(x), attn.num_heads, 1)
    if attn.reduction > 1:
        x = attn.norm(to_tokens(attn.sr(pad_to_multiple(to_map(x, size), attn.reduction))))
    k, v = split_heads(attn.kv(x), attn.num_heads, 2)
    return attn.project(softmax_attention(q, k, v, q.shape[-1] ** -0.5))


def reduced_attention_on_map(attn: attentions.ReducedAttention, x: Tensor) -> Tensor:
    size = (x.shape[1], x.shape[2])
    return reduced_attention(attn, x.flatten(1, 2), size).unflatten(1, size)


def head_interaction(attn: HIAttention, x: Tensor, class_token: bool = True) -> Tensor:
    """DHVT: class token, patches and head tokens in one sequence, all of them queries."""
    length, heads = x.shape[1], attn.num_heads
    pooled = attn.ht_proj(x.mean(1).unflatten(1, (heads, -1)))  # B h C
    pooled = F.gelu(attn.ht_norm(pooled.unflatten(2, (heads, -1)))).flatten(2) + attn.pos_embed
    q, k, v = split_heads(attn.qkv(torch.cat([x, pooled], dim=1)), heads, 3)
    dropout = attn.attn_drop if attn.training else 0.0
    y = attn.proj(softmax_attention(q, k, v, attn.scale, dropout))
    if class_token:
        first = y[:, :1] + y[:, length:].mean(dim=1, keepdim=True)
        y = torch.cat([first, y[:, 1:length]], dim=1)
    return attn.proj_drop(y[:, :length])


def head_interaction_on_map(attn: HIAttention, x: Tensor) -> Tensor:
    return head_interaction(attn, x.flatten(1, 2), class_token=False).unflatten(1, x.shape[1:3])


def reorganising_block(
    block: evit.ReorganisingBlock, x: Tensor, num_kept: int | None = None, fuse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """EViT, Sec. 3.2 and 3.3: the class token's row of the whole matrix, and an index of the others."""
    if num_kept is None:
        return vit.Block.forward(block, x), None
    update, scores = _attend_and_score(block.attn, block.norm1(x))
    x = x + block.drop_path(update)
    order = scores.argsort(dim=1, descending=True)
    kept, others = order[:, :num_kept], order[:, num_kept:]
    parts = [x[:, :1], _take(x[:, 1:], kept)]
    if fuse:
        weights = scores.gather(1, others)[..., None]
        parts.append((_take(x[:, 1:], others) * weights).sum(1, keepdim=True))
    x = torch.cat(parts, dim=1)
    return x + block.drop_path(block.mlp(block.norm2(x))), kept


def _attend_and_score(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, N, C), and the class token's attention to the patches (B, N - 1)."""
    q, k, v = split_heads(attn.qkv(x), attn.num_heads, 3)
    maps = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)  # B h N N
    return attn.proj_drop(attn.proj(merge_heads(maps @ v))), maps[:, :, 0, 1:].mean(1)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens (B, N, C), indices (B, m) -> (B, m, C)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


# -- attention within windows --------------------------------------------------------------------


def window_attention(attn: windows.Windowed, x: Tensor, shift_mask: Tensor | None = None) -> Tensor:
    """Swin, Sec. 3.2; V2, Sec. 3.3, has cosines and another `relative_bias`."""
    grid = (x.shape[1], x.shape[2])
    window, shift = attn.windows_on(grid)
    x = window_partition(x, window, shift, by_image=False)[:, :, 0]  # B*n N C
    qkv = F.linear(x, attn.qkv.weight, attn.projection_bias())
    q, k, v = split_heads(qkv, attn.num_heads, 3)  # B*n h N d
    if isinstance(attn, windows.CosineWindowAttention):
        temperature = attn.logit_scale.clamp(max=math.log(100)).exp()  # h 1 1
        q, k = F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1)
    else:
        q = q * attn.scale
    logits = q @ k.transpose(-2, -1) + attn.relative_bias(window)
    if shift or (any(side % window for side in grid) and not attn.fixed_windows):
        mask = shift_mask if grid == attn.grid else None
        if mask is None:
            mask = window_mask(grid, window, shift, not attn.fixed_windows, x.device)
        logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    y = attn.proj_drop(attn.proj(merge_heads(logits.softmax(-1).to(v.dtype) @ v)))  # B*n N C
    return window_reverse(y[:, None], grid, window, shift, heads=1)


def window_mlp(mlp: WindowMlp, x: Tensor) -> Tensor:
    """Swin-MLP: a grouped convolution over the tokens of each window, heads first."""
    height, width = x.shape[1:3]
    w, heads = mlp.window, mlp.groups
    start = w - w // 2 if mlp.shifted and min(height, width) > w > 1 else 0
    x = F.pad(x, (0, 0, start, -(width + start) % w, start, -(height + start) % w))
    rows, columns = x.shape[1] // w, x.shape[2] // w
    x = window_partition(x, w, 0, by_image=False)[:, :, 0]  # B*n N C
    x = x.unflatten(2, (heads, -1)).transpose(1, 2).flatten(1, 2)  # B*n h*N d
    x = F.conv1d(x, mlp.weight, mlp.bias, groups=heads).unflatten(1, (heads, -1))  # B*n h N d
    x = window_reverse(x, (rows * w, columns * w), w, 0, heads=heads)
    return x[:, start : start + height, start : start + width]


def dilated_attention(attn: DilatedAttention, x: Tensor) -> Tensor:
    """DilateFormer, Sec. 3.1: keys and values of each k x k window, unfolded; zeros outside the image."""
    height, width = x.shape[1:3]
    qkv = attn.qkv(x.permute(0, 3, 1, 2))
    groups = len(attn.dilation)
    parts = qkv.unflatten(1, (3, groups, -1))  # B 3 groups C/groups H W
    outputs = []
    for i, r in enumerate(attn.dilation):
        q, k, v = parts[:, :, i].unbind(1)
        heads = attn.num_heads // groups
        border = r * (attn.kernel_size // 2)
        k, v = (
            F.unfold(t, attn.kernel_size, dilation=r, padding=border).unflatten(
                1, (heads, -1, attn.kernel_size**2)
            )  # B h d k*k HW
            for t in (k, v)
        )
        q = q.flatten(2).unflatten(1, (heads, 1, -1)).permute(0, 1, 4, 2, 3)  # B h HW 1 d
        logits = q @ k.permute(0, 1, 4, 2, 3) * attn.scale  # B h HW 1 k*k
        y = logits.softmax(-1) @ v.permute(0, 1, 4, 3, 2)  # B h HW 1 d
        outputs.append(y.squeeze(3).transpose(1, 2).flatten(2))  # B HW C/groups
    return attn.proj(torch.cat(outputs, dim=2)).unflatten(1, (height, width))


def dropped_dilated_attention(attn: attentions.MultiScaleDilatedAttention, x: Tensor) -> Tensor:
    return attn.proj_drop(dilated_attention(attn, x))


# -- a few points, a few queries -----------------------------------------------------------------


def point_attention(
    attn: point_sampling.PointSampledAttention, x: Tensor, size: tuple[int, int]
) -> Tensor:
    """DPVT: every sample is made of the four pixels around it, then the samples are summed."""
    values = attn.v(x).unflatten(-1, (attn.num_heads, -1))  # B N h d
    points, weights = attn.samples(x, size)  # B N h P 2 and B N h P
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    head = torch.arange(attn.num_heads, device=x.device).view(-1, 1)
    first = points.detach().floor()
    right, down = (points - first).unbind(-1)
    columns, rows = first.long().unbind(-1)
    samples: Tensor | float = 0.0
    for column, x_factor in ((columns, 1 - right), (columns + 1, right)):
        for row, y_factor in ((rows, 1 - down), (rows + 1, down)):
            inside = (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0])
            pixel = row.clamp(0, size[0] - 1) * size[1] + column.clamp(0, size[1] - 1)
            factor = (x_factor * y_factor * inside)[..., None]
            samples = samples + factor * values[image, pixel, head]  # B N h P d
    y = (weights[..., None] * samples).sum(3).flatten(2).to(values.dtype)
    return attn.proj_drop(attn.proj(y))


def point_attention_on_map(attn: attentions.PointAttention, x: Tensor) -> Tensor:
    size = (x.shape[1], x.shape[2])
    return point_attention(attn, x.flatten(1, 2), size).unflatten(1, size)


def grained_block(
    block: dge.GrainedBlock, x: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Routing]:
    """Dynamic Grained Encoder, Sec. 3.1: all granularities in training, else each image's own queries."""
    candidates, routing = block.dge(x, size)  # B T C
    k, v = block.attn.keys_values(block.norm1(x), size)
    if block.training:
        rows = candidates.flatten(0, 1)
        images = zip(candidates, k, v, strict=True)
    else:
        chosen = block.dge.select(routing.gates, size, x.shape[1] - size[0] * size[1])
        rows = candidates.flatten(0, 1)[chosen.candidates]
        images = zip(rows.split(chosen.lengths.tolist()), k, v, strict=True)
    mixed = [_attend(block, queries, *keys) for queries, *keys in images]
    mixed = block.drop_path(block.attn.project(torch.cat(mixed)))
    change = mixed + block.drop_path(block.mlp(block.norm2(rows + mixed)))
    if block.training:
        change = change.unflatten(0, candidates.shape[:2])
        return x + block.dge.spread_all(change, routing.gates, size), routing
    return x + change[chosen.row_of_token], routing


def _attend(block: dge.GrainedBlock, rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries (Q, C) of an image to its keys and values (h, M, d) -> (Q, C)."""
    (q,) = split_heads(block.attn.q(block.norm1(rows))[None], block.attn.num_heads, 1)
    return softmax_attention(q, k[None], v[None], q.shape[-1] ** -0.5)[0]


# -- Fourier domain ------------------------------------------------------------------------------


def dynamic_filter(mixer: filters.DynamicFilter, x: Tensor) -> Tensor:
    """DFFormer, Sec. 3: the bank weighted by the routing is a filter (B, H, F, M), then one product."""
    y = mixer.act1(mixer.pwconv1(x))
    routing = mixer.reweight(x.mean(dim=(1, 2))).unflatten(1, (-1, mixer.hidden_dim)).softmax(1)
    with without_autocast(x):
        bank = torch.view_as_complex(mixer.filters(y).float().contiguous())  # H F K
        weight = torch.einsum("hfk,bkm->bhfm", bank, routing.to(bank.dtype))
        y = _filtered(y.float(), weight)
    return mixer.drop(mixer.pwconv2(y.to(x.dtype)))


def global_filter(mixer: filters.GlobalFilter, x: Tensor) -> Tensor:
    """GFNet: one complex factor per frequency and channel."""
    y = mixer.act1(mixer.pwconv1(x))
    with without_autocast(x):
        weight = torch.view_as_complex(mixer.filters(y).float().contiguous())
        y = _filtered(y.float(), weight)
    return mixer.drop(mixer.pwconv2(y.to(x.dtype)))


def afno(mixer: filters.AFNO, x: Tensor) -> Tensor:
    """AFNO: a complex two-layer perceptron per block of channels, at every frequency."""
    y = mixer.act1(mixer.pwconv1(x))
    with without_autocast(x):
        y = y.float()
        z = torch.fft.rfft2(y, dim=(1, 2), norm="ortho").unflatten(-1, (len(mixer.b1[0]), -1))
        w1, b1, w2, b2 = (torch.complex(*p) for p in (mixer.w1, mixer.b1, mixer.w2, mixer.b2))
        z = torch.einsum("bhfni,nio->bhfno", z, w1) + b1
        z = torch.complex(F.relu(z.real), F.relu(z.imag))
        z = torch.einsum("bhfni,nio->bhfno", z, w2) + b2
        z = torch.complex(F.softshrink(z.real, mixer.shrink), F.softshrink(z.imag, mixer.shrink))
        y = y + torch.fft.irfft2(z.flatten(-2), s=y.shape[1:3], dim=(1, 2), norm="ortho")
    return mixer.drop(mixer.pwconv2(y.to(x.dtype)))


def _filtered(y: Tensor, weight: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(y, dim=(1, 2), norm="ortho")
    return torch.fft.irfft2(spectrum * weight, s=y.shape[1:3], dim=(1, 2), norm="ortho")
