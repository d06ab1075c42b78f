"""Queries of several granularities from one token grid, and which of them to ask.

Paper:      Dynamic Grained Encoder, arXiv:2301.03831, Sec. 3
Deviations: any grid. Regions and patches at the right and bottom border may be cut off by it; their
            means are over the tokens that exist, every patch has one, and every token stays covered.
Shapes:     B batch, E extra tokens (class token) before the map, N = E + H*W tokens, R regions,
            S granularities, T candidate queries of an image: the extra tokens, then for each
            granularity all its patches in raster order; L rows: the queries of all images
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from . import kernels
from .attention import merge_heads, split_heads
from .eager import is_transformed
from .table_cache import Constants
from .tokens import Size, to_map, to_tokens

# What a block adds to queries (L, C): `change(rows, lengths)`, with `lengths` as in `ragged_attention`.
Change = Callable[[Tensor, Tensor | None], Tensor]

# How probable the first granularity is before training.
FIRST_PROB = 0.95

_LAYOUTS = Constants(limit=64)


class Routing(NamedTuple):
    """What a router says about the regions of a map, in raster order."""

    logits: Tensor  # (B, rows, columns, S)
    gates: Tensor  # (B, R, S), one-hot; in training with the gradient of the Gumbel softmax


class Router(nn.Module):
    """One linear layer from the mean of a region to a logit per granularity (Sec. 3.2)."""

    def __init__(self, dim: int, num_splits: int):
        super().__init__()
        self.gate = nn.Linear(dim, num_splits)
        self.init_()

    def init_(self) -> None:
        """Start with the first granularity nearly everywhere; again after a model-wide initialisation."""
        trunc_normal_(self.gate.weight, std=0.01)
        others = self.gate.out_features - 1
        # exp(2 * half) = FIRST_PROB / (1 - FIRST_PROB) * others; alone it needs no advantage.
        half = 0.5 * math.log(FIRST_PROB * others / (1 - FIRST_PROB)) if others else 0.0
        nn.init.constant_(self.gate.bias, -half)
        with torch.no_grad():
            self.gate.bias[0] = half

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


class GrainedQueries(nn.Module):
    """Makes the candidate queries of a map, routes its regions, and spreads results over the tokens.

    Training computes all granularities and weights them by the gates; evaluation computes the chosen
    queries only. Both agree where the gates are one-hot.

    Args:
        splits: patches per side of a region, for each granularity; the largest is the side of a region in
            tokens. The published models choose among (4, 2, 1).

    Attributes:
        dense_evaluation: evaluate as in training, see `set_dense_evaluation`.
    """

    dense_evaluation = False

    def __init__(self, dim: int, splits: Sequence[int] = (4, 2, 1)):
        super().__init__()
        self.dim = dim
        self.region = max(splits, default=0)
        if not splits or any(split < 1 or self.region % split for split in splits):
            raise ValueError(
                f"SPLITS={list(splits)} must be positive numbers that each divide the largest one, "
                "such as [4, 2, 1]"
            )
        self.steps = [self.region // split for split in splits]
        # Part of published checkpoints; the computation reads `steps`, which no device has to be asked for.
        self.register_buffer("splits", torch.tensor(list(splits), dtype=torch.int64))
        self.router = Router(dim, len(splits))
        self.register_load_state_dict_pre_hook(_check_splits)

    def constants(self) -> dict[str, Tensor]:
        """The buffers that follow from the arguments, made anew."""
        return {"splits": torch.tensor([self.region // step for step in self.steps])}

    def splits_problem(self, splits: Tensor) -> str:
        """Why weights whose buffer `splits` is this one do not fit; empty if they do."""
        theirs, ours = splits.tolist(), [self.region // step for step in self.steps]
        if theirs == ours:
            return ""
        return (
            f"the weights choose among the granularities SPLITS={theirs}, this model among {ours}, and the "
            f"routers' outputs have that order: build the model with SPLITS {theirs}"
        )

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Routing]:
        """Tokens (B, N, C) -> candidate queries (B, T, C), and the routing of the regions."""
        extra = x.shape[1] - size[0] * size[1]
        levels = [mean_patches(x[:, extra:], size, step) for step in self.steps]
        if self.region in self.steps:
            means = levels[self.steps.index(self.region)]
        else:
            means = mean_patches(x[:, extra:], size, self.region)
        logits = self.router(means.unflatten(1, _cells(size, self.region)))
        flat = logits.flatten(1, 2).float()  # B R S
        if self.training:
            gates = F.gumbel_softmax(flat, tau=1.0, hard=True)
        else:
            # Not `F.one_hot`, which looks at the numbers: `torch.vmap` has none.
            grains = torch.arange(flat.shape[-1], device=flat.device)
            gates = (flat.argmax(-1, keepdim=True) == grains).to(flat.dtype)
        return torch.cat([x[:, :extra], *levels], dim=1), Routing(logits, gates)

    def ask(self, x: Tensor, size: Size, change: Change) -> tuple[Tensor, Routing]:
        """Tokens (B, N, C) plus what `change` adds to the queries that stand for them, and the routing."""
        candidates, routing = self(x, size)
        # Transforms such as `torch.vmap` have no number of rows that depends on what images show.
        everything = self.training or self.dense_evaluation or is_transformed(x)
        ask = self.ask_all if everything else self.ask_chosen
        return ask(x, candidates, routing.gates, size, change), routing

    def ask_all(
        self, x: Tensor, candidates: Tensor, gates: Tensor, size: Size, change: Change
    ) -> Tensor:
        """Tokens (B, N, C) plus the changes of all candidates (B, T, C), weighted by gates (B, R, S)."""
        changes = change(candidates.flatten(0, 1), None).unflatten(0, candidates.shape[:2])
        return x + self.spread_all(changes, gates, size)

    # The number of rows is known only when the routers have spoken: compilers leave this part as it is,
    # instead of making a graph for each number.
    @torch.compiler.disable
    def ask_chosen(
        self, x: Tensor, candidates: Tensor, gates: Tensor, size: Size, change: Change
    ) -> Tensor:
        """Tokens (B, N, C) plus the changes of the candidates that one-hot gates (B, R, S) choose."""
        chosen = self.select(gates, size, extra=x.shape[1] - size[0] * size[1])
        rows = candidates.flatten(0, 1).index_select(0, chosen.candidates)  # L C
        return x + change(rows, chosen.lengths)[chosen.row_of_token]

    def num_queries(self, gates: Tensor, size: Size, extra: int) -> Tensor:
        """Gates (B, R, S) -> queries per image (B,), differentiable."""
        patches = self.layout(size, extra, gates.device).patches
        # Counts are small whole numbers, exact in float32, which every device has.
        return extra + (gates.float() * patches).sum((1, 2))

    def spread_all(self, change: Tensor, gates: Tensor, size: Size) -> Tensor:
        """Changes (B, T, C) of all candidates -> (B, N, C), summed per token with the gates as weights."""
        rows, columns = size
        counts = [math.prod(_cells(size, step)) for step in self.steps]
        extra = change.shape[1] - sum(counts)
        layout = self.layout(size, extra, change.device)
        weights = gates.flatten(1)[:, layout.gate_of_candidate].to(change.dtype)  # B T-E
        first, *levels = change.split([extra, *counts], dim=1)
        total: Tensor | int = 0
        for step, level, weight in zip(
            self.steps, levels, weights.split(counts, dim=1), strict=True
        ):
            patches = to_map(level * weight[..., None], _cells(size, step))
            if step > 1:
                patches = F.interpolate(patches, scale_factor=step, mode="nearest")
            total = total + patches[..., :rows, :columns]
        return torch.cat([first, to_tokens(total)], dim=1)

    def select(self, gates: Tensor, size: Size, extra: int) -> "Selection":
        """One-hot gates (B, R, S) -> the chosen candidates of all images, packed."""
        layout = self.layout(size, extra, gates.device)
        choice = gates.argmax(-1)  # B R
        chosen = choice[:, layout.region_of_candidate] == layout.level_of_candidate  # B T-E
        chosen = F.pad(chosen, (extra, 0), value=True)  # B T
        covering = choice[:, layout.region_of_token] * layout.region_of_token.shape[0]
        covering = covering + torch.arange(covering.shape[1], device=covering.device)
        covering = layout.cover.flatten()[covering]  # B H*W, as candidates
        first = torch.arange(extra, device=covering.device).expand(covering.shape[0], -1)
        row_of_candidate = chosen.flatten().cumsum(0).view_as(chosen) - 1
        return Selection(
            candidates=chosen.flatten().nonzero()[:, 0],
            lengths=chosen.sum(1),
            row_of_token=row_of_candidate.gather(1, torch.cat([first, covering], dim=1)),
        )

    def layout(self, size: Size, extra: int, device: torch.device) -> "Layout":
        """The index tables for maps of `size` after `extra` tokens; blocks of a stage share them."""
        key = (size, self.region, tuple(self.steps), extra, device)
        return _LAYOUTS.get(key, lambda: _make_layout(*key))


def set_dense_evaluation(model: nn.Module, enable: bool) -> None:
    """Let all grained queries of `model` be computed in evaluation too, weighted by the one-hot gates.

    The outputs stay the same up to rounding, the work is that of training, and no shape depends on what
    the images show: graphs can be exported.
    """
    for module in model.modules():
        if isinstance(module, GrainedQueries):
            module.dense_evaluation = enable


def _check_splits(
    module: GrainedQueries,
    state_dict: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before loading: other granularities are an error, and a state dict may lack them."""
    key = prefix + "splits"
    if key not in state_dict:
        state_dict[key] = module.splits
    elif problem := module.splits_problem(state_dict[key]):
        errors.append(f"{key}: {problem}")


class Selection(NamedTuple):
    """The chosen candidates of a batch as rows, image after image."""

    candidates: Tensor  # (L,) into the flattened (B, T)
    lengths: Tensor  # (B,) rows per image
    row_of_token: Tensor  # (B, N), the row that covers each token


class Layout(NamedTuple):
    """Index tables of a map size; candidates and tokens are counted without the extra tokens."""

    region_of_candidate: Tensor  # (T - E,)
    level_of_candidate: Tensor  # (T - E,)
    gate_of_candidate: Tensor  # (T - E,) into the flattened (R, S)
    region_of_token: Tensor  # (H*W,)
    cover: Tensor  # (S, H*W), the candidate that covers a token, extra tokens counted
    patches: Tensor  # (R, S) float32, patches of a region


def _make_layout(
    size: Size, region: int, steps: tuple[int, ...], extra: int, device: torch.device
) -> Layout:
    num_regions = math.prod(_cells(size, region))
    region_of, level_of, cover, patches = [], [], [], []
    start = extra
    for level, step in enumerate(steps):
        cells = _cells(size, step)
        region_of.append(coarser_cells(cells, region // step, device))
        level_of.append(torch.full_like(region_of[-1], level))
        cover.append(start + coarser_cells(size, step, device))
        counts = torch.zeros(num_regions, device=device)
        ones = torch.ones_like(region_of[-1], dtype=counts.dtype)
        patches.append(counts.index_add(0, region_of[-1], ones))
        start = start + math.prod(cells)  # not in place: a tracer counts with tensors
    region_of_candidate, level_of_candidate = torch.cat(region_of), torch.cat(level_of)
    return Layout(
        region_of_candidate,
        level_of_candidate,
        region_of_candidate * len(steps) + level_of_candidate,
        coarser_cells(size, region, device),
        torch.stack(cover),
        torch.stack(patches, dim=1),
    )


def _cells(size: Size, step: int) -> Size:
    """Rows and columns of a map in patches of `step` tokens per side, cut patches included."""
    return (-(-size[0] // step), -(-size[1] // step))


def coarser_cells(size: Size, factor: int, device: torch.device) -> Tensor:
    """(H*W,): for each cell of a map the index of its cell in the map that is `factor` times coarser."""
    rows, columns = (torch.arange(n, device=device) // factor for n in size)
    return (rows[:, None] * _cells(size, factor)[1] + columns).flatten()


def mean_patches(x: Tensor, size: Size, step: int) -> Tensor:
    """Tokens (B, H*W, C) -> means over patches of `step` tokens per side, (B, cells, C)."""
    if step == 1:
        return x
    # With ceil_mode a patch that the border cuts is divided by the tokens it has.
    return to_tokens(F.avg_pool2d(to_map(x, size), step, ceil_mode=True, count_include_pad=False))


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """Attention of packed rows to the keys of their own image.

    Args:
        q: (L, C), image after image; k, v: (B, heads, M, C / heads).
        lengths: (B,) rows per image, L together; None says that all images have as many.

    Returns:
        (L, C).
    """
    if lengths is not None and kernels.available(q, k.shape[-1]):
        # The lengths stay on the device. Who packed the rows has waited for it: `select` counts them.
        return kernels.ragged_attention(q, k, v, lengths)
    rows = None if lengths is None else lengths.tolist()
    if rows is None or len(set(rows)) <= 1:
        per_image = -1 if k.shape[0] else 0  # of no images any number would do
        return _attend(q.unflatten(0, (k.shape[0], per_image)), k, v).flatten(0, 1)
    if splits_rows(q.device):
        images = zip(q.split(rows), k.split(1), v.split(1), strict=True)
        return torch.cat([_attend(part[None], *kv)[0] for part, *kv in images])
    # One launch on accelerators: rows are padded to the longest image, and queries need no mask.
    image = torch.arange(len(rows), device=q.device).repeat_interleave(lengths, output_size=len(q))
    slot = torch.arange(len(q), device=q.device) - (lengths.cumsum(0) - lengths)[image]
    padded = q.new_zeros(len(rows), max(rows), q.shape[1])
    padded = padded.index_put((image, slot), q)
    return _attend(padded, k, v)[image, slot]


def splits_rows(device: torch.device) -> bool:
    """Whether images of different lengths are attended one by one there, instead of padded to one batch."""
    return device.type == "cpu"


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries (B, Q, C) with merged heads, keys and values with split ones -> (B, Q, C)."""
    (q,) = split_heads(q, k.shape[1], 1)
    return merge_heads(F.scaled_dot_product_attention(q, k, v))
