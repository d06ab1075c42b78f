"""Batch norms folded into the convolutions before them: a copy of a model for inference only."""

import copy
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .layers.batch_norm import MAP_NORMS
from .layers.depthwise import MAP_CONVOLUTIONS
from .layers.plain import is_plain


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that computes the same without batch norms, up to rounding.

    A norm that follows a convolution in an `nn.Sequential` is folded; a module that calls the two by name
    lists them in its attribute `conv_norm_pairs`. Folded norms become `nn.Identity`, so the copy has another
    state dict: load weights first. The model itself is not changed.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        names = getattr(module, "conv_norm_pairs", ())
        if isinstance(module, nn.Sequential):
            names = pairwise(module._modules)  # those that are there twice, too
        for first, second in names:
            conv, norm = module.get_submodule(first), module.get_submodule(second)
            if is_plain(conv, *MAP_CONVOLUTIONS) and is_plain(norm, *MAP_NORMS):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity().eval())
    return model
