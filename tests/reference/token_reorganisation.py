"""EViT's block with the whole attention matrix and an explicit list of the dropped tokens."""

import torch
from torch import Tensor, nn


def attention_maps(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C) -> output (B, N, C) and probabilities (B, heads, N, N)."""
    batch, length, dim = x.shape
    heads, head_dim = attn.num_heads, dim // attn.num_heads
    q, k, v = attn.qkv(x).reshape(batch, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    maps = ((q @ k.transpose(2, 3)) * head_dim**-0.5).softmax(-1)
    out = (maps @ v).transpose(1, 2).reshape(batch, length, dim)
    return attn.proj(out), maps


def reorganise(x: Tensor, scores: Tensor, num_kept: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """Tokens (B, 1 + M, C), scores (B, M) -> [class, kept, fused], and kept indices (B, m)."""
    sequences, kept = [], []
    for tokens, score in zip(x, scores, strict=True):
        order = score.argsort(descending=True)
        best = order[:num_kept].tolist()
        others = [j for j in range(len(score)) if j not in best]
        rows = [tokens[0], *(tokens[1 + j] for j in best)]
        if fuse:
            rows.append(sum(score[j] * tokens[1 + j] for j in others))
        sequences.append(torch.stack(rows))
        kept.append(order[:num_kept])
    return torch.stack(sequences), torch.stack(kept)


def block(module: nn.Module, x: Tensor, num_kept: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """What `ReorganisingBlock` does, without drop path."""
    update, maps = attention_maps(module.attn, module.norm1(x))
    scores = maps.mean(1)[:, 0, 1:]
    x, kept = reorganise(x + update, scores, num_kept, fuse)
    return x + module.mlp(module.norm2(x)), kept
