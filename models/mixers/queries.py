"""Attentions that compute a block for some of its tokens only, so that the map stays whole.

Papers:     EViT, arXiv:2202.07800; Dynamic Grained Encoder, arXiv:2301.03831
Deviations: a frame of maps has no class token, and its later stages need every position. So a token that
            EViT would remove keeps its value here and skips the block; each block chooses anew.
Shapes:     B batch, H/W map, N = H*W tokens, C channels, m kept tokens, T candidate queries, L rows
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.attention import Attention, merge_heads, split_heads
from ..layers.grained import GrainedQueries, Routing, ragged_attention
from ..layers.spatial_reduction import SpatialReductionAttention
from .registry import QueryMixer, Update

Size = tuple[int, int]


class SplitAttention(Attention):
    """`Attention`, with its parameters, in steps: queries may be others than the tokens."""

    def q(self, x: Tensor) -> Tensor:
        """(..., C) -> queries (..., C), heads merged."""
        return self._part(x, slice(0, self.proj.in_features))

    def keys_values(self, x: Tensor, size: Size) -> tuple[Tensor, ...]:
        """Tokens (B, N, C) -> keys and values, each (B, heads, N, C / heads)."""
        kv = self._part(x, slice(self.proj.in_features, None))
        return split_heads(kv, self.num_heads, 2)

    def project(self, x: Tensor) -> Tensor:
        """Output projection of merged heads, (..., C) -> (..., C)."""
        return self.proj_drop(self.proj(x))

    def attend(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Normalised queries (B, m, C) to the keys and values of their image -> (B, m, C)."""
        (q,) = split_heads(self.q(x), self.num_heads, 1)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.project(merge_heads(x))

    def _part(self, x: Tensor, rows: slice) -> Tensor:
        bias = self.qkv.bias
        return F.linear(x, self.qkv.weight[rows], None if bias is None else bias[rows])


class KeptTokenAttention(QueryMixer, SplitAttention):
    """Global attention whose block runs for the most attended tokens: the lab's analogue of EViT.

    The score of a token is what the mean query of the map pays it, averaged over the heads: EViT's score
    with the mean in the place of the class token. All tokens are keys and values; the ceil(keep_rate * N)
    tokens of the highest scores are queries, and go through the feed-forward network. There are no
    parameters beyond those of `attention`, so weights trained with one keep rate run at any other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        keep_rate: float,
        qkv_bias: bool,
        attn_drop: float,
        drop: float,
    ):
        super().__init__(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.keep_rate = keep_rate
        self._kept: Tensor | None = None

    def forward(self, x: Tensor, norm: Callable[[Tensor], Tensor], update: Update) -> Tensor:
        size = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        normed = norm(tokens)
        k, v = self.keys_values(normed, size)
        kept = self.choose(normed, k)  # B m
        rows = kept[..., None].expand(-1, -1, tokens.shape[2])
        changed = update(tokens.gather(1, rows), partial(self.attend, k=k, v=v))
        if not self.training:
            mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=x.device)
            self._kept = mask.scatter(1, kept, True).unflatten(1, size)
        return tokens.to(changed.dtype).scatter(1, rows, changed).unflatten(1, size)

    @torch.no_grad()
    def choose(self, x: Tensor, k: Tensor) -> Tensor:
        """Normalised tokens (B, N, C), keys (B, h, N, d) -> the tokens of the highest scores (B, m)."""
        (q,) = split_heads(self.q(x.mean(dim=1, keepdim=True)), self.num_heads, 1)
        logits = (q @ k.transpose(-2, -1))[:, :, 0] * self.scale  # B h N
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).mean(1)
        return scores.topk(math.ceil(self.keep_rate * x.shape[1]), dim=1).indices

    def token_map(self) -> Tensor | None:
        """(B, H, W), True where the last evaluation forward ran the block."""
        return self._kept


class GrainedMixer(QueryMixer):
    """Queries are patch means, in each region as fine as its router says; all tokens are keys.

    What the block changes in a query is added to all tokens that it stands for. Training computes all
    granularities and weights them by the gates; evaluation computes the chosen ones only. A mixin before an
    attention with the steps `q`, `keys_values` and `project`.
    """

    cost_depends_on_images = True
    q: Callable[[Tensor], Tensor]
    keys_values: Callable[[Tensor, Size], tuple[Tensor, ...]]
    project: Callable[[Tensor], Tensor]

    def set_grains(
        self, dim: int, splits: Sequence[int], budget: float, budget_weight: float
    ) -> None:
        """Make the router.

        Args:
            splits: granularities to choose from, as queries per side of a region; the largest is the side
                of a region in tokens.
            budget: share of the tokens' number that training aims at with its queries.
            budget_weight: weight of that loss; 0 leaves it out.
        """
        if not 0 <= budget <= 1:
            raise ValueError(f"grained attention: budget={budget} must be in [0, 1]")
        self.dge = GrainedQueries(dim, splits)
        self.budget, self.budget_weight = budget, budget_weight
        self._last: tuple[Routing, Size, bool] | None = None

    def init_(self) -> None:
        self.dge.router.init_()

    def forward(self, x: Tensor, norm: Callable[[Tensor], Tensor], update: Update) -> Tensor:
        size = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        k, v = self.keys_values(norm(tokens), size)
        candidates, routing = self.dge(tokens, size)  # B T C
        self._last = (routing, size, self.training)
        if self.training:
            lengths = None
            rows = candidates.flatten(0, 1)
        else:
            chosen = self.dge.select(routing.gates, size, extra=0)
            lengths = chosen.lengths
            rows = candidates.flatten(0, 1).index_select(0, chosen.candidates)  # L C

        def mix(queries: Tensor) -> Tensor:
            return self.project(ragged_attention(self.q(queries), k, v, lengths))

        change = update(rows, mix) - rows
        if self.training:
            change = change.unflatten(0, candidates.shape[:2])
            change = self.dge.spread_all(change, routing.gates, size)
        else:
            change = change[chosen.row_of_token]
        return (tokens + change).unflatten(1, size)

    def aux_losses(self) -> dict[str, Tensor]:
        """`grain_budget`: weight * (queries / tokens - budget)^2 of the last training forward."""
        if self._last is None or not self._last[2] or not self.budget_weight:
            return {}
        routing, size, _ = self._last
        share = self.dge.num_queries(routing.gates, size, extra=0).mean() / math.prod(size)
        return {"grain_budget": (self.budget_weight * (share - self.budget).square()).float()}

    def token_map(self) -> Tensor | None:
        """(B, rows, columns): index into `splits` per region, of the last evaluation forward."""
        if self._last is None or self._last[2]:
            return None
        return self._last[0].logits.detach().argmax(-1)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles do not need the last forward pass, and its graph cannot be copied.
        return {**self.__dict__, "_last": None}


class GrainedAttention(GrainedMixer, SplitAttention):
    """Global attention with grained queries."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        drop: float,
        splits: Sequence[int],
        budget: float,
        budget_weight: float,
    ):
        super().__init__(dim, num_heads, qkv_bias, proj_drop=drop)
        self.set_grains(dim, splits, budget, budget_weight)


class GrainedReducedAttention(GrainedMixer, SpatialReductionAttention):
    """Spatial-reduction attention with grained queries."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int,
        qkv_bias: bool,
        drop: float,
        splits: Sequence[int],
        budget: float,
        budget_weight: float,
    ):
        super().__init__(dim, num_heads, reduction, qkv_bias, drop)
        self.set_grains(dim, splits, budget, budget_weight)
