"""MetaFormer: one frame for token mixers; DFFormer, CDFFormer, GFFormer and AFNO are settings of it.

Papers:     MetaFormer, arXiv:2111.11418 (frame) and arXiv:2210.13452 (StarReLU, bias-free, residual scale);
            DFFormer, arXiv:2303.03932, Sec. 3 and Table 1 (variants)
Reference:  github.com/okojoalg/dfformer, models of the classification release
Deviations: any input size: maps are ceil(H / stride), filters are resampled as by the official loader
Shapes:     B batch, C width of a stage, H/W map
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from utils.spelling import choose

from .backbone import Backbone
from .layers.activations import ACTIVATIONS, SquaredReLU
from .layers.daff import DAFF
from .layers.init import LAYER_NORM_EPS, drop_path_rates
from .layers.layer_norm import LayerNorm
from .layers.mlp import Mlp
from .layers.tokens import pad_to_multiple, to_pair
from .mixers import MixerContext, QueryMixer, build_mixer
from .mixers.queries import KeptTokens
from .registry import register

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": partial(LayerNorm, eps=LAYER_NORM_EPS),
    "layer_norm_no_bias": partial(LayerNorm, eps=LAYER_NORM_EPS, bias=False),
    "rms_norm": partial(nn.RMSNorm, eps=LAYER_NORM_EPS),
}
STEMS = {
    "conv7": dict(kernel_size=7, stride=4, padding=2),
    "patch4": dict(kernel_size=4, stride=4, padding=0),
}
DOWNSAMPLES = {
    "conv3": dict(kernel_size=3, stride=2, padding=1),
    "conv2": dict(kernel_size=2, stride=2, padding=0),
}


class Downsampling(nn.Module):
    """Norm, strided convolution, norm: (B, H, W, C) -> (B, ceil(H/stride), ceil(W/stride), C')."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        conv: dict[str, int],
        pre_norm: nn.Module | None = None,
        post_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.pre_norm = pre_norm or nn.Identity()
        self.conv = nn.Conv2d(in_dim, dim, **conv)
        self.stride = conv["stride"]
        self.post_norm = post_norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_norm(x).permute(0, 3, 1, 2)
        # Zeros at the right and the bottom: without them conv7's map is a row short for 4k + 1 and 4k + 2.
        x = self.conv(pad_to_multiple(x, self.stride))
        return self.post_norm(x.permute(0, 2, 3, 1))


class ResScale(nn.Module):
    """Learned factor per channel on the residual branch (baselines, Sec. 2.4)."""

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class MetaFormerBlock(nn.Module):
    """x <- r1(x) + mixer(norm1 x); x <- r2(x) + feed_forward(norm2 x) (arXiv:2111.11418, Eq. 2-3).

    Shapes: (B, H, W, C) -> (B, H, W, C); r1 and r2 are the identity or a `ResScale`. A `QueryMixer` decides
    itself for which rows the block runs.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        feed_forward: nn.Module,
        norm: Callable[[int], nn.Module],
        drop_path: float = 0.0,
        res_scale: float | None = None,
    ):
        super().__init__()

        def residual() -> nn.Module:
            return nn.Identity() if res_scale is None else ResScale(dim, res_scale)

        self.norm1 = norm(dim)
        self.token_mixer = mixer
        self.res_scale1 = residual()
        self.norm2 = norm(dim)
        self.mlp = feed_forward
        self.res_scale2 = residual()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.token_mixer, QueryMixer):
            return self.token_mixer(x, self.norm1, self.update)
        return self.update(x, self.token_mixer)

    def mixing(self, x: Tensor) -> tuple[nn.Module, tuple[Tensor]]:
        """The mixer, and what it gets for a map (B, H, W, C)."""
        return self.token_mixer, (self.norm1(x),)

    def update(self, x: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """The two equations, with `mix` as the mixer: (..., C) -> (..., C)."""
        x = self.res_scale1(x) + self.drop_path(mix(self.norm1(x)))
        return self.res_scale2(x) + self.drop_path(self.mlp(self.norm2(x)))


class MapDAFF(DAFF):
    """DHVT's feed-forward network without its class token; the original has GELU."""

    def __init__(self, dim: int, ratio: float, act: type[nn.Module], drop: float = 0.0):
        super().__init__(dim, ratio, act, class_gate=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class MlpHead(nn.Module):
    """Two layers with relu^2 and LayerNorm between them (baselines, Sec. 3.1): (B, C) -> (B, classes)."""

    def __init__(self, dim: int, num_classes: int, ratio: float = 4.0, drop: float = 0.0):
        super().__init__()
        hidden = int(ratio * dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = SquaredReLU()
        self.norm = LayerNorm(hidden)  # eps 1e-5 here, 1e-6 everywhere else: visible in float32
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.norm(self.act(self.fc1(x)))))


@register("metaformer", node="METAFORMER")
class MetaFormer(Backbone):
    """Four stages (or any number) at strides 4, 8, ..., each with its own token mixer.

    Args:
        mixers: one per stage, `name` or `name(option=value, ...)`; see `models/mixers`.
        embed_dims: width of each stage.
        head_dim: channels per head, for mixers with heads.
        feed_forward: what follows the mixer in a block: "mlp", or DHVT's "daff" with its convolution (and
            with act "gelu", to be DHVT's).
        act: activation of the feed-forward networks and inside the mixers that have one.
        stem: "conv7" overlaps, "patch4" does not.
        downsample: between stages; "conv3" overlaps, "conv2" does not.
        res_scale: per stage, initial factor on the residual branch; None keeps it plain.
        head: "mlp" or "linear".
        img_size: fixes the native grid of each stage, which is the size of its tables (not of the input).
        drop_rate: dropout in feed-forward networks, after the mixers and in the head.
    """

    def __init__(
        self,
        *,
        mixers: Sequence[str] = ("dynamic_filter",) * 4,
        depths: Sequence[int] = (3, 3, 9, 3),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        head_dim: int = 32,
        feed_forward: str = "mlp",
        mlp_ratio: float = 4.0,
        act: str = "star_relu",
        norm: str = "layer_norm_no_bias",
        stem: str = "conv7",
        downsample: str = "conv3",
        res_scale: Sequence[float | None] = (None, None, 1.0, 1.0),
        head: str = "mlp",
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        per_stage = dict(MIXERS=mixers, DEPTHS=depths, EMBED_DIMS=embed_dims, RES_SCALE=res_scale)
        if len({len(values) for values in per_stage.values()}) != 1:
            raise ValueError(
                "MODEL.METAFORMER: one entry per stage is needed in each of "
                f"{ {key: list(values) for key, values in per_stage.items()} }"
            )
        norm_layer = choose("MODEL.METAFORMER.NORM", norm, NORMS)
        act_layer = choose("MODEL.METAFORMER.ACT", act, ACTIVATIONS)
        make_feed_forward = choose("MODEL.METAFORMER.FEED_FORWARD", feed_forward, FEED_FORWARDS)
        self._make_head = choose("MODEL.METAFORMER.HEAD", head, HEADS)
        self.drop_rate = drop_rate
        self.feature_info = [
            dict(channels=dim, stride=4 * 2**stage) for stage, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]

        conv = choose("MODEL.METAFORMER.STEM", stem, STEMS)
        self.downsample_layers = nn.ModuleList(
            [Downsampling(in_chans, embed_dims[0], conv, post_norm=norm_layer(embed_dims[0]))]
        )
        conv = choose("MODEL.METAFORMER.DOWNSAMPLE", downsample, DOWNSAMPLES)
        for before, after in pairwise(embed_dims):
            self.downsample_layers.append(
                Downsampling(before, after, conv, pre_norm=norm_layer(before))
            )

        height, width = to_pair(img_size)
        rates = drop_path_rates(drop_path_rate, list(depths))
        self.stages = nn.ModuleList()
        for stage, dim in enumerate(embed_dims):
            stride = self.feature_info[stage]["stride"]
            context = partial(
                MixerContext,
                num_heads=max(1, dim // head_dim),
                grid=(-(-height // stride), -(-width // stride)),
                stage=stage,
                act=act_layer,
                drop=drop_rate,
            )
            blocks = [
                MetaFormerBlock(
                    dim,
                    build_mixer(mixers[stage], dim, context(index=index)),
                    make_feed_forward(dim, mlp_ratio, act=act_layer, drop=drop_rate),
                    norm_layer,
                    rates[stage][index],
                    res_scale[stage],
                )
                for index in range(depths[stage])
            ]
            self.stages.append(nn.Sequential(*blocks))
        _check_feed_forward(self.mixers(), mixers, feed_forward)
        for blocks in self.stages:
            self.watch(*(block for block in blocks[-1:] if _shows_attention(block.token_mixer)))

        self.norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()
        self._reset_classifier(num_classes)
        self.apply(_init_)
        for mixer in self.mixers():
            if hasattr(mixer, "init_"):
                mixer.init_()
        if not num_classes:
            # Batches of dense tasks are padded with zeros. With a bias of zeros nothing would vary there in
            # the norm after the stem, and gradients from scratch would be 10^4 times as large. Other
            # families' stems start like this.
            first = self.downsample_layers[0].conv
            bound = first.weight[0].numel() ** -0.5
            nn.init.uniform_(first.bias, -bound, bound)

    @property
    def cost_depends_on_images(self) -> bool:
        """Whether some stage asks grained queries."""
        return any(
            mixer.cost_depends_on_images for mixer in self.mixers() if isinstance(mixer, QueryMixer)
        )

    def mixers(self) -> list[nn.Module]:
        """The token mixers of all blocks, from the stem to the head."""
        return [block.token_mixer for blocks in self.stages for block in blocks]

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> last map (B, C, ceil(H/32), ceil(W/32)); the norm follows the pooling."""
        return self._stage_maps(x)[-1].permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x.mean(dim=(2, 3)))  # B C
        return x if pre_logits else self.head(x)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage, y in enumerate(self._stage_maps(x)):
            norm = getattr(self, f"norm{stage}", None)
            maps.append((y if norm is None else norm(y)).permute(0, 3, 1, 2))
        return maps

    def map_layers(self, index: int) -> tuple[str, ...]:
        return (f"norm{index}",)

    def _stage_maps(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> output (B, H/s, W/s, C) of each stage."""
        maps = []
        x = x.permute(0, 2, 3, 1)
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = self.run_blocks(blocks, downsample(x))
            maps.append(x)
        return maps

    def get_classifier(self) -> nn.Module:
        return self.head

    def _reset_classifier(self, num_classes: int) -> None:
        """A dense task normalises each map in place of the pooled features, so the norms of the one come when
        those of the other go, and no parameter is there unused.
        """
        self.num_classes = num_classes
        like = next(self.parameters())
        for stage, info in enumerate(self.feature_info):
            name = f"norm{stage}"
            if num_classes and hasattr(self, name):
                delattr(self, name)
            elif not num_classes and not hasattr(self, name):
                self.add_module(name, LayerNorm(info["channels"], eps=LAYER_NORM_EPS).to(like))
        if not num_classes:
            self.norm, self.head = nn.Identity(), nn.Identity()
            return
        if isinstance(self.norm, nn.Identity):
            self.norm = LayerNorm(self.num_features, eps=LAYER_NORM_EPS).to(like)
        self.head = self._make_head(self.num_features, num_classes, drop=self.drop_rate)
        self.head.apply(_init_).to(like)

    def dense_differences(self) -> tuple[str, ...]:
        return ("norm", "head", *(f"norm{i}" for i in range(len(self.stages))))

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        prefixes: list[tuple[str, ...]] = [("downsample_layers.0",)]
        for stage, blocks in enumerate(self.stages):
            for index in range(len(blocks)):
                first = (f"downsample_layers.{stage}",) if stage and index == 0 else ()
                prefixes.append((*first, f"stages.{stage}.{index}"))
        return prefixes

    def aux_losses(self) -> dict[str, Tensor]:
        """Losses of the mixers that have one, the mean over those of one name."""
        losses: dict[str, list[Tensor]] = {}
        for mixer in self.mixers():
            if hasattr(mixer, "aux_losses"):
                for name, loss in mixer.aux_losses().items():
                    losses.setdefault(name, []).append(loss)
        return {name: torch.stack(found).mean() for name, found in losses.items()}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Fourier transforms as such: matrix products in their place would be counted as products."""
        ways = [(mixer, mixer.fourier) for mixer in self.mixers() if hasattr(mixer, "fourier")]
        try:
            for mixer, _ in ways:
                mixer.fourier = "fft"
            yield
        finally:
            for mixer, way in ways:
                mixer.fourier = way

    def set_keep_rate(self, keep_rate: float | None = None) -> None:
        """Run another share of the tokens from now on, without rebuilding, in training and evaluation.

        It holds for the stages that were built with keep_rate < 1; all others run all of their tokens.
        `set_progress` leaves the rate alone: there is no schedule like EViT's.

        Args:
            keep_rate: share of the tokens that run a block; 1 runs all, and None returns to the shares that
                the stages were built with.

        Raises:
            ValueError: outside (0, 1], or no stage was built to keep a share.
        """
        mixers = [mixer for mixer in self.mixers() if isinstance(mixer, KeptTokens)]
        if not mixers:
            raise ValueError(
                f"set_keep_rate({keep_rate}): no stage of this model keeps a share of its tokens; build one "
                'with MODEL.METAFORMER.MIXERS "attention(keep_rate=0.7)", for example'
            )
        for mixer in mixers:
            mixer.set_keep_rate(keep_rate)

    def token_maps(self) -> dict[str, Tensor]:
        """`stages.<i>` of a stage whose mixers have maps: those, stacked over its blocks.

        They are kept tokens (blocks, B, H, W), granularities (blocks, B, rows, columns) or amplitudes of
        filters, which need no forward. An attention of all tokens has its own names, for the last block of
        its stage; see `Backbone.token_maps`, and `attention_maps` of the layers in `models/layers`.
        """
        maps = super().token_maps()
        for stage, blocks in enumerate(self.stages):
            mixers = [b.token_mixer for b in blocks if hasattr(b.token_mixer, "token_map")]
            found = [m for m in (mixer.token_map() for mixer in mixers) if m is not None]
            if found:
                maps[f"stages.{stage}"] = torch.stack(found)
        return maps


def _shows_attention(mixer: nn.Module) -> bool:
    """Whether the mixer attends from all tokens, and tells what to."""
    return hasattr(mixer, "attention_maps") and not isinstance(mixer, QueryMixer)


def _linear_head(dim: int, num_classes: int, drop: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Dropout(drop), nn.Linear(dim, num_classes))


FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {
    "daff": MapDAFF,
    "mlp": partial(Mlp, bias=False),
}
HEADS: dict[str, Callable[..., nn.Module]] = {"linear": _linear_head, "mlp": MlpHead}


def _check_feed_forward(
    built: Sequence[nn.Module], mixers: Sequence[str], feed_forward: str
) -> None:
    """ValueError where a block for some of the tokens would have a convolution over all of them."""
    if feed_forward == "daff" and any(isinstance(mixer, QueryMixer) for mixer in built):
        raise ValueError(
            "MODEL.METAFORMER.FEED_FORWARD='daff' has a convolution over the map, and of MIXERS="
            f"{list(mixers)} some run the block for chosen tokens only; set FEED_FORWARD 'mlp', or leave "
            "keep_rate and grained out"
        )


def _init_(module: nn.Module) -> None:
    """Linear and convolutions N(0, 0.02) cut at +-2, bias 0; norms and free tables keep their own start."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
