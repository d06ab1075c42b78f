"""Copies of models for inference: batch norms folded, weights laid out for the processor."""

from torch import nn

from .folding import fold_batch_norms
from .layers.linear import Linear, PointwiseConv2d, multiplies_by_onednn
from .layers.packed import PackedWeight, can_pack


def deploy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that computes the same, up to rounding, and faster; the model is not changed.

    Batch norms are folded (`fold_batch_norms`), and on a CPU where oneDNN multiplies best, linear layers and
    1x1 convolutions get a second copy of their weights in its layout (`pack_weights`). No weight of the copy
    requires gradients. Load weights first, and call it outside of `torch.inference_mode()`, whose copies have
    plain weights. On another device or in another type the copy computes by its plain weights; so it does
    after a write to them, but for one through `.data`, which PyTorch cannot see.
    """
    model = fold_batch_norms(model).requires_grad_(False)
    if multiplies_by_onednn():
        pack_weights(model)
    return model


def pack_weights(model: nn.Module) -> None:
    """Lay out the weights of `model` for inference on a CPU, in place, for while they require no gradients.

    Plain `nn.Linear` and 1x1 `nn.Conv2d` change their class. A module that multiplies by weights of its
    children itself names them in `reads_weights_of`, and may have a `pack_weights` of its own.
    """
    taken: set[nn.Module] = set()
    for module in model.modules():
        taken |= {module.get_submodule(name) for name in getattr(module, "reads_weights_of", ())}
        if pack := getattr(module, "pack_weights", None):
            pack()
        if module in taken:
            continue
        if type(module) in (nn.Linear, Linear) and can_pack(module.weight):
            module.__class__ = Linear
        elif (
            type(module) in (nn.Conv2d, PointwiseConv2d)
            and _is_pointwise(module)
            and can_pack(module.weight)
        ):
            module.__class__ = PointwiseConv2d
        else:
            continue
        module.packed = PackedWeight(module.weight)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether it is one linear layer for all positions."""
    return (
        conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
    )
