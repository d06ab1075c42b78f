"""Attentions that compute a block for some of its tokens only, so that the map stays whole.

Papers:     EViT, arXiv:2202.07800; Dynamic Grained Encoder, arXiv:2301.03831
Deviations: a frame of maps has no class token, and its later stages need every position. So a token that
            EViT would remove keeps its value here and skips the block; each block chooses anew.
Shapes:     B batch, H/W map, N = H*W tokens, C channels, h heads, m kept tokens, M keys, L rows
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.attention import Attention, merge_heads, split_heads
from ..layers.eager import may_keep
from ..layers.grained import GrainedQueries, Routing, coarser_cells, ragged_attention
from ..layers.head_interaction import HIAttention
from ..layers.linear import Linear, linear
from ..layers.plain import is_plain
from ..layers.spatial_reduction import SpatialReductionAttention
from ..layers.token_maps import attention_probabilities
from ..layers.tokens import Size
from .registry import QueryMixer, Update


class SplitAttention(Attention):
    """`Attention`, with its parameters, in steps: queries may be others than the tokens."""

    def q(self, x: Tensor) -> Tensor:
        """(..., C) -> queries (..., C), heads merged."""
        return self._part(x, slice(0, self.dim))

    def keys_values(self, x: Tensor, size: Size) -> tuple[Tensor, ...]:
        """Tokens (B, N, C) -> keys and values, each (B, heads, N, C / heads)."""
        kv = self._part(x, slice(self.dim, None))
        return split_heads(kv, self.num_heads, 2)

    def project(self, x: Tensor) -> Tensor:
        """Output projection of merged heads, (..., C) -> (..., C)."""
        return self.proj_drop(self.proj(x))

    def _part(self, x: Tensor, rows: slice) -> Tensor:
        if not is_plain(self.qkv, Linear):
            return self.qkv(x)[..., rows]
        bias = self.qkv.bias
        return linear(x, self.qkv.weight[rows], None if bias is None else bias[rows])


class SplitHeadTokenAttention(SplitAttention, HIAttention):
    """`HIAttention` in steps: the head tokens, pooled from all tokens, are keys and values of any query."""

    def keys_values(self, x: Tensor, size: Size) -> tuple[Tensor, ...]:
        """Tokens (B, N, C) -> keys and values, each (B, heads, N + heads, C / heads)."""
        return super().keys_values(self._with_head_tokens(x, None), size)


class _Steps(QueryMixer):
    """A mixin before an attention over global keys that has the steps `q`, `keys_values` and `project`."""

    num_heads: int
    q: Callable[[Tensor], Tensor]
    keys_values: Callable[[Tensor, Size], tuple[Tensor, ...]]
    project: Callable[[Tensor], Tensor]


class KeptTokens(_Steps):
    """Runs the block for the most attended tokens: the lab's analogue of EViT.

    The score of a token is what the mean query of the map pays its key, averaged over the heads: EViT's score
    with the mean in the place of the class token. All tokens are keys and values; the ceil(keep_rate * N)
    tokens of the highest scores are queries, and go through the feed-forward network. There are no
    parameters beyond those of the attention, so weights trained with one keep rate run at any other.

    Args:
        keep_rate: share of the tokens that run the block.
        others: of the attention.
    """

    attn_drop = 0.0  # for attentions without it

    def __init__(self, *others: Any, keep_rate: float, **keywords: Any):
        super().__init__(*others, **keywords)
        self.built_rate = keep_rate
        self.set_keep_rate(keep_rate)
        self._kept: Tensor | None = None

    def set_keep_rate(self, keep_rate: float | None) -> None:
        """Another share from now on; None returns to the one that it was built with."""
        self.keep_rate = self.built_rate if keep_rate is None else check_keep_rate(keep_rate)

    def forward(self, x: Tensor, norm: Callable[[Tensor], Tensor], update: Update) -> Tensor:
        size = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        normed = norm(tokens)
        k, v = self.keys_values(normed, size)
        kept = self.choose(normed, k, size)  # B m
        rows = kept[..., None].expand(-1, -1, tokens.shape[2])
        changed = update(tokens.gather(1, rows), partial(self.attend, k=k, v=v))
        if not self.training and may_keep():
            mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=x.device)
            self._kept = mask.scatter(1, kept, True).unflatten(1, size)
        return tokens.to(changed.dtype).scatter(1, rows, changed).unflatten(1, size)

    def attend(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Normalised queries (B, m, C) to the keys and values of their image -> (B, m, C)."""
        (q,) = split_heads(self.q(x), self.num_heads, 1)
        dropout = self.attn_drop if self.training else 0.0
        return self.project(merge_heads(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)))

    @torch.no_grad()
    def choose(self, x: Tensor, k: Tensor, size: Size) -> Tensor:
        """Normalised tokens (B, N, C), keys (B, h, M, d) -> the tokens of the highest scores (B, m)."""
        (q,) = split_heads(self.q(x.mean(dim=1, keepdim=True)), self.num_heads, 1)
        scores = attention_probabilities(q, k, k.shape[-1] ** -0.5).mean((1, 2))  # B M
        scores = self.token_scores(scores, size)
        # Whole numbers with the place in their last digits, so that none are equal: of tokens with one
        # score the first are taken, on every device, in any batch and in exported files.
        length = scores.shape[1]
        ranks = (scores / scores.amax(1, keepdim=True) * 2**24).round().long() * length
        ranks = ranks - torch.arange(length, device=x.device)
        return ranks.topk(math.ceil(self.keep_rate * length), dim=1).indices

    def token_scores(self, scores: Tensor, size: Size) -> Tensor:
        """Scores of the keys (B, M) -> of the tokens (B, N); keys beyond the tokens have none."""
        return scores[:, : size[0] * size[1]]

    def token_map(self) -> Tensor | None:
        """(B, H, W), True where the last evaluation forward ran the block."""
        return self._kept

    def train(self, mode: bool = True) -> "KeptTokens":
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # a copy has had no forward pass


def check_keep_rate(keep_rate: float) -> float:
    """The same; ValueError outside (0, 1]."""
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate={keep_rate} must be in (0, 1]; 1 keeps all tokens")
    return keep_rate


class GrainedMixer(_Steps):
    """Queries are patch means, in each region as fine as its router says; all tokens are keys.

    What the block changes in a query is added to all tokens that it stands for, see `GrainedQueries`.

    Args:
        splits: granularities to choose from, as queries per side of a region; the largest is the side of
            a region in tokens.
        budget: share of the tokens' number that training aims at with its queries.
        budget_weight: weight of that loss; 0 leaves it out.
        dim, others: of the attention.
    """

    cost_depends_on_images = True

    def __init__(
        self,
        dim: int,
        *others: Any,
        splits: Sequence[int],
        budget: float,
        budget_weight: float,
        **keywords: Any,
    ):
        super().__init__(dim, *others, **keywords)
        if keywords.get("attn_drop"):
            raise ValueError(
                f"grained=True excludes attn_drop={keywords['attn_drop']}: leave one of them out"
            )
        if not 0 <= budget <= 1:
            raise ValueError(f"budget={budget} must be in [0, 1], a share of the tokens")
        if budget_weight < 0:
            raise ValueError(f"budget_weight={budget_weight} must be 0 or more; 0 sets no budget")
        self.dge = GrainedQueries(dim, splits)
        self.budget, self.budget_weight = budget, budget_weight
        self._last: tuple[Routing, Size, bool] | None = None

    def init_(self) -> None:
        self.dge.router.init_()

    def forward(self, x: Tensor, norm: Callable[[Tensor], Tensor], update: Update) -> Tensor:
        size = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        k, v = self.keys_values(norm(tokens), size)

        def change(rows: Tensor, lengths: Tensor | None) -> Tensor:
            def mix(queries: Tensor) -> Tensor:
                return self.project(ragged_attention(self.q(queries), k, v, lengths))

            return update(rows, mix) - rows

        tokens, routing = self.dge.ask(tokens, size, change)
        if may_keep(compiled=True):  # the budget is for compiled training too
            self._last = (routing, size, self.training)
        return tokens.unflatten(1, size)

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

    def train(self, mode: bool = True) -> "GrainedMixer":
        self._last = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles do not need the last forward pass, and its graph cannot be copied.
        return {**self.__dict__, "_last": None}


class KeptTokenAttention(KeptTokens, SplitAttention):
    """Global attention for the most attended tokens."""


class KeptHeadTokenAttention(KeptTokens, SplitHeadTokenAttention):
    """Head-interacted attention for the most attended tokens; head tokens take a share of the attention."""


class KeptReducedAttention(KeptTokens, SpatialReductionAttention):
    """Spatial-reduction attention for the most attended tokens; those of one key have one score."""

    def token_scores(self, scores: Tensor, size: Size) -> Tensor:
        return scores[:, coarser_cells(size, self.reduction, scores.device)]


class GrainedAttention(GrainedMixer, SplitAttention):
    """Global attention with grained queries."""


class GrainedHeadTokenAttention(GrainedMixer, SplitHeadTokenAttention):
    """Head-interacted attention with grained queries; the head tokens are pooled from the tokens."""


class GrainedReducedAttention(GrainedMixer, SpatialReductionAttention):
    """Spatial-reduction attention with grained queries."""
