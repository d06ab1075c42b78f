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
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import literal_mixers as mixers
from models import dfvt, dge, dhvt, dilateformer, dpvt, evit, metaformer, pvt, swin, vit
from models.layers import conv_stem as conv_stem_of_dhvt
from models.layers import window as windows
from models.layers.activations import GELU, SiLU, StarReLU
from models.layers.attention import Attention, MapAttention
from models.layers.batch_norm import BatchNorm2d
from models.layers.daff import DAFF
from models.layers.depthwise import DepthwiseConv2d
from models.layers.dilated import DilatedAttention
from models.layers.layer_norm import LayerNorm
from models.layers.linear import Linear
from models.layers.mlp import Mlp
from models.layers.point_sampling import PointSampledAttention
from models.layers.spatial_reduction import SpatialReductionAttention
from models.layers.tokens import pad_to_multiple, to_map, to_tokens
from models.layers.window_mlp import WindowMlp
from models.mixers import attention as attentions
from models.mixers import convolution, plain
from models.mixers import fourier as filters

# Architectures of which every mixer has a literal form, by the class that is built.
FAMILIES = (
    dfvt.DFvT,
    dge.DeiTDGE,
    dge.PVTDGE,
    dhvt.DHVT,
    dilateformer.DilateFormer,
    dpvt.DPVT,
    evit.EViT,
    metaformer.MetaFormer,
    pvt.PVT,
    swin.Swin,
    swin.SwinMlp,
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
        if isinstance(module, nn.LayerNorm) and module.bias is None:
            module.__class__ = BiasFreeNorm
        elif type(module) in FORMS:
            module.__class__ = _literal_class(type(module))
    return twin


# -- whole models whose papers keep tokens and maps in other shapes than ours ---------------------


def dhvt_model(model: dhvt.DHVT, x: Tensor) -> Tensor:
    """DHVT, Sec. 3: class token and patches are one sequence, of which DAFF makes a map and back."""
    x = model.patch_embed(x)
    size = (x.shape[2], x.shape[3])
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), to_tokens(x)], dim=1)
    for block in model.blocks:
        x = x + block.drop_path(mixers.head_interaction(block.attn, block.norm1(x)))
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
    Attention: mixers.attention,
    MapAttention: mixers.attention_on_map,
    SpatialReductionAttention: mixers.reduced_attention,
    attentions.ReducedAttention: mixers.reduced_attention_on_map,
    attentions.HeadTokenAttention: mixers.head_interaction_on_map,
    evit.ReorganisingBlock: mixers.reorganising_block,
    windows.WindowAttention: mixers.window_attention,
    windows.CosineWindowAttention: mixers.window_attention,
    WindowMlp: mixers.window_mlp,
    attentions.LocalWindowAttention: mixers.window_attention,
    attentions.ShiftedWindowAttention: mixers.window_attention,
    DilatedAttention: mixers.dilated_attention,
    attentions.MultiScaleDilatedAttention: mixers.dropped_dilated_attention,
    PointSampledAttention: mixers.point_attention,
    attentions.PointAttention: mixers.point_attention_on_map,
    dge.GrainedBlock: mixers.grained_block,
    filters.DynamicFilter: mixers.dynamic_filter,
    filters.GlobalFilter: mixers.global_filter,
    filters.AFNO: mixers.afno,
    StarReLU: star_relu,
    SiLU: silu,
    GELU: gelu,
    Linear: linear,
    BatchNorm2d: nn.BatchNorm2d.forward,
    LayerNorm: nn.LayerNorm.forward,
    DepthwiseConv2d: nn.Conv2d.forward,
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
