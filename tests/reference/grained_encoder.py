"""A grained block as a list of patches: one query per patch, image by image, in double loops."""

import torch
from torch import Tensor, nn


def patches_of(
    choice: Tensor, splits: list[int], size: tuple[int, int], extra: int
) -> list[list[int]]:
    """Choices (rows, columns) of one image -> the tokens that each query stands for."""
    height, width = size
    region = max(splits)
    patches = [[token] for token in range(extra)]
    for y0 in range(0, height, region):
        for x0 in range(0, width, region):
            step = region // splits[choice[y0 // region, x0 // region].item()]
            for y in range(y0, y0 + region, step):
                for x in range(x0, x0 + region, step):
                    covered = [
                        extra + row * width + column
                        for row in range(y, min(y + step, height))
                        for column in range(x, min(x + step, width))
                    ]
                    if covered:
                        patches.append(covered)
    return patches


def grained_block(
    block: nn.Module, x: Tensor, size: tuple[int, int], splits: list[int]
) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens (B, N, C) -> tokens, choices (B, rows, columns) and queries per image."""
    height, width = size
    region = max(splits)
    extra = x.shape[1] - height * width
    images, choices, counts = [], [], []
    for tokens in x:
        grid = tokens[extra:].reshape(height, width, -1)
        means = [
            [grid[y : y + region, x0 : x0 + region].mean((0, 1)) for x0 in range(0, width, region)]
            for y in range(0, height, region)
        ]
        logits = block.dge.router.gate(torch.stack([torch.stack(row) for row in means]))
        choice = logits.argmax(-1)
        keys = tokens_for_keys(block.attn, block.norm1(tokens), size)
        changed = tokens.clone()
        patches = patches_of(choice, splits, size, extra)
        for covered in patches:
            before = tokens[covered].mean(0)
            after = before + attend(block.attn, block.norm1(before), keys)
            after = after + block.mlp(block.norm2(after))
            for token in covered:
                changed[token] = tokens[token] + after - before
        images.append(changed)
        choices.append(choice)
        counts.append(len(patches))
    return torch.stack(images), torch.stack(choices), counts


def tokens_for_keys(attn: nn.Module, u: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalised tokens (N, C) -> what keys and values are taken from, (M, C)."""
    step = attn.reduction
    if step == 1:
        return u
    height, width = size
    grid = u.reshape(height, width, -1)
    rows = []
    for y in range(0, height, step):
        for x in range(0, width, step):
            patch = u.new_zeros(step, step, u.shape[1])
            part = grid[y : y + step, x : x + step]
            patch[: part.shape[0], : part.shape[1]] = part
            rows.append(torch.einsum("yxc,ocyx->o", patch, attn.sr.weight) + attn.sr.bias)
    return attn.norm(torch.stack(rows))


def attend(attn: nn.Module, query: Tensor, source: Tensor) -> Tensor:
    """One normalised query (C,) to the keys and values of `source` (M, C) -> (C,)."""
    dim = query.shape[0]
    head_dim = dim // attn.num_heads
    q, kv = attn.q(query), attn.kv(source)
    parts = []
    for j in range(attn.num_heads):
        head = slice(j * head_dim, (j + 1) * head_dim)
        k, v = kv[:, :dim][:, head], kv[:, dim:][:, head]
        parts.append((k @ q[head] * head_dim**-0.5).softmax(0) @ v)
    return attn.proj(torch.cat(parts))
