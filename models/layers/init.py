"""Initial weights and drop-path schedules."""

import torch
from timm.layers import trunc_normal_
from torch import nn

# Of the norms of blocks and before the head in ViT and its relatives; PyTorch's own is 1e-5.
LAYER_NORM_EPS = 1e-6


def init_vit_(module: nn.Module) -> None:
    """For `model.apply`: Linear N(0, 0.02) cut at +-2 and bias 0, norms 1 and 0.

    Convolutions keep PyTorch's default.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def new_classifier(num_features: int, num_classes: int) -> nn.Module:
    """Linear head with ViT initialisation, or Identity for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(num_features, num_classes)
    init_vit_(head)
    return head


def drop_path_rates(rate: float, depths: list[int]) -> list[list[float]]:
    """Per stage and block, rising linearly from 0 at the first block to `rate` at the last one."""
    rates = torch.linspace(0, rate, sum(depths), device="cpu").tolist()
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
