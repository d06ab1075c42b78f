"""When a parent may compute what a layer does from the parameters of that layer."""

from torch import nn


def is_plain(layer: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether calling `layer` is no more than what one of `types` does with its parameters.

    Pruning and weight normalisation make the weight in a hook of the layer, other hooks read or change its
    results, quantised weights are tensors of a type of their own, and adapters take the place of the layer:
    then it has to be called.
    """
    if type(layer) not in types or has_hooks(layer):
        return False
    return type(layer.weight) is nn.Parameter


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to see or change what `module` is called with, its results or its gradients."""
    forward = module._forward_pre_hooks or module._forward_hooks
    return bool(forward or module._backward_pre_hooks or module._backward_hooks)
