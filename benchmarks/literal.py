"""The yardstick: models whose mixers compute what the papers write, one operation per term.

`literal(model)` copies a model and replaces what MixLab computes in another way than its paper states it:
softmax attention with the whole matrix of logits, windows with a bias looked up and a mask added at each
call, dilated windows by unfolding keys and values, a complex filter for every image, position and channel,
stems in the default layout, batch norms of their own. Three models are written out as a whole:
DHVT is a sequence with a class token, cut apart and joined in every block, DFvT goes back and forth between
sequences and maps, and DilateFormer's blocks hand on maps of planes. In the others everything else (layout
between blocks) stays as it is, so that a ratio is the gain of the fast paths alone.

The loops over pixels in tests/reference say the same in the slowest way; they are for proofs, not for clocks.

Shapes: B batch, C channels, H/W map, N tokens, h heads, d head dim, M expanded channels, K filters of a bank
"""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import dfvt, dhvt, dilateformer, evit, metaformer, pvt, swin, vit
from models.layers import conv_stem as conv_stem_of_dhvt
from models.layers import window as windows
from models.layers.activations import GELU, SiLU, StarReLU
from models.layers.attention import Attention, MapAttention, merge_heads, split_heads
from models.layers.daff import DAFF
from models.layers.dilated import DilatedAttention
from models.layers.head_interaction import HIAttention
from models.layers.linear import Linear
from models.layers.mlp import Mlp
from models.layers.precision import without_autocast
from models.layers.spatial_reduction import SpatialReductionAttention
from models.layers.tokens import pad_to_multiple, to_map, to_tokens
from models.mixers import attention as attentions
from models.mixers import convolution, plain
from models.mixers import fourier as filters

# Architectures of which every mixer has a literal form, by the class that is built.
FAMILIES = (
    dfvt.DFvT,
    dhvt.DHVT,
    dilateformer.DilateFormer,
    evit.EViT,
    metaformer.MetaFormer,
    pvt.PVT,
    swin.Swin,
    swin.SwinV2,
    vit.VisionTransformer,
)


def literal(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same weights and the literal mixers.

    Raises:
        ValueError: the model is of an architecture, or has a mixer, without a literal form.
    """
    if type(model) not in FAMILIES:
        raise ValueError(
            f"{type(model).__name__} has no literal form; choose another baseline (timm-swin-t, self or a "
            f"model's name), or one of {[family.__name__ for family in FAMILIES]}"
        )
    if isinstance(model, metaformer.MetaFormer):
        known = (*FORMS, *AS_WRITTEN)
        missing = sorted({type(m).__name__ for m in model.mixers() if type(m) not in known})
        if missing:
            raise ValueError(
                f"the mixers {missing} have no literal form; choose another baseline (timm-swin-t, self or a "
                "model's name)"
            )
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) in FORMS:
            module.__class__ = _literal_class(type(module))
        elif type(module) is nn.LayerNorm and module.bias is None:
            module.__class__ = BiasFreeNorm
    return twin


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
    x = windows.cut_windows(x, window, shift, by_image=False)[:, :, 0]  # B*n N C
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
            mask = windows.window_mask(grid, window, shift, not attn.fixed_windows, x.device)
        logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    y = attn.proj_drop(attn.proj(merge_heads(logits.softmax(-1).to(v.dtype) @ v)))  # B*n N C
    return windows.join_windows(y[:, None], grid, window, shift, heads=1)


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


# -- whole models whose papers keep tokens and maps in other shapes than ours ---------------------


def dhvt_model(model: dhvt.DHVT, x: Tensor) -> Tensor:
    """DHVT, Sec. 3: class token and patches are one sequence, of which DAFF makes a map and back."""
    x = model.patch_embed(x)
    size = (x.shape[2], x.shape[3])
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), to_tokens(x)], dim=1)
    for block in model.blocks:
        x = x + block.drop_path(head_interaction(block.attn, block.norm1(x)))
        y = block.norm2(x)
        cls, y = y[:, :1], to_map(y[:, 1:], size)
        y = _daff(block.mlp, y)
        cls = block.mlp.reweight(cls, y.permute(0, 2, 3, 1))
        x = x + block.drop_path(torch.cat([cls, to_tokens(y)], dim=1))
    return model.head(model.norm(x)[:, 0])


def dilateformer_block(block: dilateformer.Block, x: Tensor) -> Tensor:
    """Between blocks a map is (B, C, H, W), as its convolutions want it."""
    x = (x + block.pos_embed(x)).permute(0, 2, 3, 1)
    x = x + block.drop_path(block.attn(block.norm1(x)))
    x = x + block.drop_path(block.mlp(block.norm2(x)))
    return x.permute(0, 3, 1, 2)


def dilateformer_model(model: dilateformer.DilateFormer, x: Tensor) -> Tensor:
    """DilateFormer, Sec. 3.3."""
    x = model.patch_embed(x)
    for stage in model.stages:
        for block in stage.blocks:
            x = block(x)
        x = stage.downsample(x)
    return model.forward_head(model.norm(to_tokens(x)))


def dfvt_model(model: dfvt.DFvT, x: Tensor) -> Tensor:
    """DFvT, Sec. 3: attention sees sequences, convolutions views of them as maps."""
    x = model._stem(x)
    for i, level in enumerate(model.layers):
        convs = model.convlayers[i]
        detail = convs.conv1x1_1(x)
        context = convs.conv1x1_2(convs.conv1(detail))
        y = x
        if i < len(model.multiresolution_conv):
            x = F.max_pool2d(x, 3, 2, 1)
            parts = pad_to_multiple(detail, 2)
            parts = [parts[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            y = model.multiresolution_conv[i](torch.cat(parts, dim=1))
        size = (x.shape[2], x.shape[3])
        x, y = to_tokens(x) + to_tokens(context), to_tokens(y)
        for block in level.blocks:
            u = block.norm1(x).unflatten(1, size)
            x = x + block.drop_path(block.attn(u, block.attn_mask).flatten(1, 2))
            x = gate(block.select, x, y)
            x = x + block.drop_path(block.mlp(block.norm2(x)))
        x = to_map(level.downsample(x), size)
    return model.head(model.norm(to_tokens(x)).mean(1))


def gate(dane: dfvt.Dane, x: Tensor, y: Tensor) -> Tensor:
    """DFvT's gate (DANE) of sequences (B, N, C)."""
    spatial = dane.fc_spatial(y)  # B N 1
    channel = dane.fc_channel(x.mean(1, keepdim=True))  # B 1 C
    weight = (spatial + channel).sigmoid().to(x.dtype)
    return y * weight + x * (1 - weight)


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


# -- between the mixers, where we fuse ------------------------------------------------------------


def star_relu(act: StarReLU, x: Tensor) -> Tensor:
    return act.scale.to(x.dtype) * F.relu(x) ** 2 + act.bias.to(x.dtype)


def silu(act: SiLU, x: Tensor) -> Tensor:
    """In place, as DFvT's release has it."""
    return F.silu(x, inplace=True)


def gelu(act: GELU, x: Tensor) -> Tensor:
    return F.gelu(x)


def linear(layer: Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def mlp(module: Mlp, x: Tensor) -> Tensor:
    """All tokens at once."""
    x = module.drop(module.act(module.fc1(x)))
    return module.drop(module.fc2(x))


def daff(module: DAFF, x: Tensor) -> Tensor:
    return _daff(module, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _daff(module: DAFF, x: Tensor) -> Tensor:
    """DHVT's feed-forward network on (B, C, H, W): three convolutions, each with a batch norm of its own."""
    x = module.act(module.bn1(module.conv1(x)))
    x = x + module.act(module.bn2(module.conv2(x)))
    return module.bn3(module.conv3(x))


def conv_stem(stem: dilateformer.ConvStem, x: Tensor) -> Tensor:
    """In PyTorch's default layout."""
    return stem.proj(pad_to_multiple(x, 4) if isinstance(stem.proj, nn.Conv2d) else x)


def dhvt_stem(stem: conv_stem_of_dhvt.ConvStem, x: Tensor) -> Tensor:
    """All images at once."""
    return stem.post_affine(stem.proj(stem.pre_affine(x)))


def separable_convolution(mixer: convolution.SepConv, x: Tensor) -> Tensor:
    """All images at once."""
    return mixer.mix(x)


def dfvt_stem(stem: dfvt.ConvStem, x: Tensor) -> Tensor:
    """In PyTorch's default layout."""
    x = stem.act(stem.norm1(stem.proj1(pad_to_multiple(x, 4))))
    return stem.act(stem.norm(stem.proj2(x)))


def dropped_daff(module: metaformer.MapDAFF, x: Tensor) -> Tensor:
    return module.drop(daff(module, x))


class BiasFreeNorm(nn.LayerNorm):
    """Layer norm by its definition, as the MetaFormer releases write it."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred * (variance + self.eps).rsqrt() * self.weight


# By exact class: what inherits its parent's `forward` or calls it must be named itself.
FORMS: dict[type[nn.Module], Callable[..., Any]] = {
    Attention: attention,
    MapAttention: attention_on_map,
    SpatialReductionAttention: reduced_attention,
    attentions.ReducedAttention: reduced_attention_on_map,
    attentions.HeadTokenAttention: head_interaction_on_map,
    evit.ReorganisingBlock: reorganising_block,
    windows.WindowAttention: window_attention,
    windows.CosineWindowAttention: window_attention,
    attentions.LocalWindowAttention: window_attention,
    attentions.ShiftedWindowAttention: window_attention,
    DilatedAttention: dilated_attention,
    attentions.MultiScaleDilatedAttention: dropped_dilated_attention,
    filters.DynamicFilter: dynamic_filter,
    filters.GlobalFilter: global_filter,
    filters.AFNO: afno,
    StarReLU: star_relu,
    SiLU: silu,
    GELU: gelu,
    Linear: linear,
    Mlp: mlp,
    DAFF: daff,
    metaformer.MapDAFF: dropped_daff,
    dilateformer.ConvStem: conv_stem,
    dilateformer.Block: dilateformer_block,
    dilateformer.DilateFormer: dilateformer_model,
    conv_stem_of_dhvt.ConvStem: dhvt_stem,
    dhvt.DHVT: dhvt_model,
    convolution.SepConv: separable_convolution,
    dfvt.ConvStem: dfvt_stem,
    dfvt.DFvT: dfvt_model,
}

# Mixers that MixLab computes as their papers state them.
AS_WRITTEN = (plain.Identity, plain.Pooling, plain.RandomMixing)


@cache
def _literal_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with the literal `forward`; a real class, so that copying and compiling see nothing unusual."""
    form = FORMS[cls]

    def forward(self: nn.Module, *args: Any) -> Any:
        return form(self, *args)

    return type(f"Literal{cls.__name__}", (cls,), {"forward": forward})
