"""What meets the images, for images of other channels."""

from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..layers.conv_stem import Affine


def first_conv(model: nn.Module) -> str | None:
    """Name of the weight that sees the images: that of the model's first convolution."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return f"{name}.weight".lstrip(".")
    return None


def adapt_channels(
    owner: nn.Module, is_stem: bool, old: Tensor, new: tuple[int, ...], in_chans: int
) -> Tensor | None:
    """A tensor that meets RGB images -> the same for images of `in_chans` channels; None if it is neither.

    Grey images give what they give in three channels, if an affine map treats all three alike.
    """
    if is_stem and _differ_in_rgb_only(tuple(old.shape), new):
        return adapt_input_conv(in_chans, old)
    if isinstance(owner, Affine) and (tuple(old.shape), new) == ((1, 3, 1, 1), (1, in_chans, 1, 1)):
        if in_chans == 1:
            return old.mean(dim=1, keepdim=True)
        return old[:, [channel % 3 for channel in range(in_chans)]]
    return None


def _differ_in_rgb_only(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether convolution `old` is for images of three channels, and `new` differs in nothing else."""
    return len(old) == len(new) == 4 and old[1] == 3 and (old[0], *old[2:]) == (new[0], *new[2:])
