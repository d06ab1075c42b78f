"""DPVT: PVT's pyramid with attention to a few learned points per query.

Paper:      Dynamic Grained Encoder, arXiv:2301.03831 (one of its baselines); point sampling as in
            Deformable DETR, arXiv:2010.04159, Eq. 2, within one map
Reference:  the Dynamic Grained Encoder release, trained at 256 px
Deviations: any input size, see `pvt.py`
Shapes:     B batch, C width of a stage, N tokens of a map; there is no class token
"""

from collections.abc import Sequence

from torch import nn

from .layers.point_sampling import PointSampledAttention
from .pvt import PyramidBlock, PyramidTransformer
from .registry import register


@register("dpvt")
class DPVT(PyramidTransformer):
    """Four stages of blocks with point-sampled attention; the mean of the last tokens is classified.

    `token_maps`: of the last block of each stage the `points` (B, heads, P, H, W, 2) that a position samples,
    x and y in pixels of the stage's map, the centre of the first pixel at (0, 0), and their weights
    `attention` (B, heads, P, H, W). In pixels of the image that is (p + 0.5) * stride - 0.5.

    Args:
        num_points: samples per query and head, for each stage.
        ring_offsets: start with the points on rays around the query. The published models start with
            all of them near it: their ring was overwritten by the initialisation of the whole model.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_points: Sequence[int] = (4, 4, 4, 4),
        ring_offsets: bool = False,
    ):
        def make_block(stage: int, drop_path: float) -> nn.Module:
            dim = embed_dims[stage]
            attn = PointSampledAttention(dim, num_heads[stage], num_points[stage], drop_rate)
            return PyramidBlock(dim, attn, mlp_ratios[stage], drop_rate, drop_path)

        super().__init__(
            "DPVT",
            make_block,
            dict(
                EMBED_DIMS=embed_dims,
                NUM_HEADS=num_heads,
                MLP_RATIOS=mlp_ratios,
                DEPTHS=depths,
                NUM_POINTS=num_points,
            ),
            patch_size,
            False,
            img_size,
            in_chans,
            num_classes,
            drop_rate,
            drop_path_rate,
        )
        if ring_offsets:
            for module in self.modules():
                if isinstance(module, PointSampledAttention):
                    module.init_ring_()
