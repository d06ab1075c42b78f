"""Attention probabilities by their definition, and what a layer of a model was given."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def probabilities(q: Tensor, k: Tensor, num_heads: int, scale: float) -> Tensor:
    """Merged heads (B, Q, C) and (B, M, C) -> (B, num_heads, Q, M), each row positive and of sum 1."""
    width = q.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.einsum("bqc,bmc->bqm", q[..., part] * scale, k[..., part]).exp()
        heads.append(weights / weights.sum(-1, keepdim=True))
    return torch.stack(heads, 1)


def packed_probabilities(attn: nn.Module, tokens: Tensor) -> Tensor:
    """Of an attention with one projection `qkv` for tokens (B, N, C): (B, heads, N, N)."""
    q, k, _ = attn.qkv(tokens).chunk(3, dim=-1)
    return probabilities(q, k, attn.num_heads, (q.shape[-1] // attn.num_heads) ** -0.5)


def inputs_of(layer: nn.Module, run: Callable[[], object]) -> tuple:
    """Positional arguments of the last call of `layer` while `run()` is running."""
    calls = []
    handle = layer.register_forward_pre_hook(lambda _, args: calls.append(args))
    run()
    handle.remove()
    return calls[-1]
