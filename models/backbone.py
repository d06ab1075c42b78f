"""The contract that every architecture keeps; engine, tasks and tools rely on nothing else.

A backbone takes plain keyword arguments (see `registry.py`), loads the published state dict with
`strict=True`, and accepts any input size that the paper's arithmetic allows.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.names import is_under, is_under_any
from utils.spelling import nearest

from .layers.eager import may_keep
from .layers.token_maps import LastInputs

# Last name components of constants of the architecture: recomputed, never taken from a file. The method
# `constants` of the modules that have them makes them anew.
CONSTANT_BUFFERS = ("attn_mask", "relative_position_index", "relative_coords_table")

# What stands for all parameters but the classifier's among the prefixes of `freeze`.
ALL_BUT_CLASSIFIER = "backbone"

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Backbone(nn.Module):
    """Base class of all architectures.

    Attributes:
        feature_info: one `dict(channels, stride)` per map of `forward_pyramid`.
        num_features: width of the features that the classifier reads.
        num_classes: 0 builds without a classifier (dense tasks).
    """

    feature_info: list[dict[str, int]]
    num_features: int
    num_classes: int
    # True where tokens are really dropped, so that no feature map is left for dense tasks.
    drops_tokens: bool = False
    # True where routing decides how much is computed, so that two images can cost differently.
    cost_depends_on_images: bool = False
    # What `forward` gives in training mode: logits alone, or a tuple with those of a distillation token
    # ("distilled"), or with those of each position of the last map ("tokens", (B, h * w, num_classes)).
    training_outputs: tuple[str, ...] = ("logits",)
    task: str = "classification"  # what `forward` is for, as TASK names it
    min_batch: int = 1  # images that batch norms must see in training, so that they have a variance
    settled: bool = True  # False while shapes inside change from step to step: nothing to compile
    # Modules whose batch norms TRAIN.SYNC_BN synchronises; none: all.
    synchronised: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self._watched: set[nn.Module] = set()
        self._last_inputs = LastInputs()
        # What `reset_classifier` has taken off, by full name; a plain dict stays out of the state dict.
        self._set_aside: dict[str, Tensor] = {}
        self._frozen_norms: list[nn.Module] = []  # a list registers no modules
        self.register_load_state_dict_pre_hook(_keep_constant_buffers)

    # -- the two halves of forward ---------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        self.forget_inputs()
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised features, in the layout of the paper."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of `forward_features` -> logits (B, num_classes), or features (B, num_features)."""
        raise NotImplementedError

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """Images -> one (B, C_i, ceil(H/s_i), ceil(W/s_i)) map per entry of `feature_info`."""
        raise NotImplementedError

    def map_layers(self, index: int) -> tuple[str, ...]:
        """Layers that only map `index` of the pyramid needs, such as its norm; without that map they rest."""
        return ()

    # -- as in timm ------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """The module that turns features into logits (Identity when num_classes is 0)."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one for `num_classes` classes; 0 makes the dense build.

        In most families the dense build also lacks, or has, other layers (`dense_differences`), so that what
        it gives as features is not what the classifier reads (PVT and MetaFormer: not normalised; DHVT: the
        mean of the map). `forward_head(..., pre_logits=True)` of a model with classifier is that.

        A classifier is always fresh. Other layers that go come back as they were, unless a state dict was
        loaded in between; those that come for the first time are fresh. New layers train or evaluate as the
        model does.
        """
        layers, old = set(self.modules()), _tensors(self)
        classifier = _ids(_tensors(self.get_classifier()))
        self._reset_classifier(num_classes)
        new = _tensors(self)
        for layer in self.modules():
            if layer not in layers:
                layer.train(self.training)
        with torch.no_grad():
            for name in new.keys() & self._set_aside.keys():
                kept = self._set_aside.pop(name)
                if id(new[name]) not in _ids(old):  # else it only changed its name
                    new[name].copy_(kept)
        moved = _ids(new) | classifier
        for name in old.keys() - new.keys():
            if id(old[name]) not in moved:
                self._set_aside[name] = old[name].detach().clone()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    # -- what the optimizer asks -----------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay, beyond biases and 1-D tensors."""
        return set()

    def lr_multipliers(self) -> dict[str, float]:
        """Name prefix -> factor on the learning rate; an unnamed parameter has factor 1."""
        return {}

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        """Name prefixes per depth for layer-wise decay, stem first; the rest is the last depth."""
        raise NotImplementedError

    def num_layers(self) -> int:
        """Number of depths: `layer_id` is in range(num_layers())."""
        return len(self.layer_prefixes()) + 1

    def layer_id(self, name: str) -> int:
        """Depth of parameter `name`: 0 is the stem, num_layers() - 1 the last norm and the head."""
        prefixes = self.layer_prefixes()
        matches = [
            (len(prefix), depth)
            for depth, group in enumerate(prefixes)
            for prefix in group
            if is_under(name, prefix)
        ]
        return max(matches)[1] if matches else len(prefixes)

    def freeze(self, prefixes: Iterable[str] = (), depth: int = 0) -> list[str]:
        """Take parameters out of training -> their names.

        Batch norms among them keep to their running statistics, in eval mode while the rest trains. Call it
        before the model is copied, wrapped, or given to an optimizer.

        Args:
            prefixes: of parameter names, such as "patch_embed" or "blocks.0"; "backbone" stands for all but
                the classifier.
            depth: how many of the depths of `layer_id`, from the stem on.

        Raises:
            ValueError: a prefix that no parameter has, or a depth that would leave nothing to train.
        """
        prefixes = tuple(prefixes)
        names = [name for name, _ in self.named_parameters()]
        for prefix in prefixes:
            if prefix != ALL_BUT_CLASSIFIER and not any(is_under(name, prefix) for name in names):
                known = {path for path, _ in self.named_modules() if path}
                raise ValueError(
                    f"TRAIN.FREEZE={list(prefixes)}: no parameter is named {prefix!r} or {prefix}.*; did "
                    f"you mean one of {nearest(prefix, known)[:3]}, or {ALL_BUT_CLASSIFIER!r}?"
                )
        if depth and not 0 < depth < self.num_layers():
            raise ValueError(
                f"TRAIN.FREEZE_DEPTH={depth} must be from 0 to {self.num_layers() - 1}: "
                f"{type(self).__name__} has {self.num_layers()} depths, the classifier's included"
            )
        head = _ids(_tensors(self.get_classifier()))
        spared = {name for name, tensor in _tensors(self).items() if id(tensor) in head}

        def is_frozen(name: str) -> bool:
            return (
                (ALL_BUT_CLASSIFIER in prefixes and name not in spared)
                or is_under_any(name, prefixes)
                or (depth > 0 and self.layer_id(name) < depth)
            )

        frozen = [name for name in names if is_frozen(name)]
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)
        for path, module in self.named_modules():
            if isinstance(module, BATCH_NORMS) and is_frozen(f"{path}.weight"):
                self._frozen_norms.append(module.eval())
        return frozen

    def freeze_batch_norms(self) -> None:
        """Take all batch norms out of training: weights and running statistics stay what they are."""
        for module in self.modules():
            if isinstance(module, BATCH_NORMS):
                module.requires_grad_(False)
                self._frozen_norms.append(module.eval())

    # -- what the engine and the tools ask -------------------------------------------------------

    def aux_losses(self) -> dict[str, Tensor]:
        """Weighted extra losses of the last training forward, by name; empty for most models."""
        return {}

    def log_values(self) -> dict[str, Tensor | float]:
        """Numbers of the last training forward to log beside the losses, by name; empty for most models."""
        return {}

    def image_values(self) -> dict[str, Tensor]:
        """Numbers of each image of the last evaluation forward, (B,) by name; empty for most models.

        Evaluation reports their mean and percentiles.
        """
        return {}

    def conditions(self) -> dict[str, float]:
        """What scores depend on beside weights and images, such as a keep rate; recorded with them."""
        return {}

    def set_progress(
        self, step: int, total_steps: int, warmup_steps: int, steps_per_epoch: int | None = None
    ) -> None:
        """How far training has come, for schedules inside the model; called before each step."""

    def token_maps(self) -> dict[str, Tensor]:
        """What an explanation tool draws of the last evaluation forward, by name; see each class.

        There is nothing before a forward, on a copy, or after `train()` and `eval()`; only learned filters
        need no forward. A training forward adds nothing. Exported and traced forwards are not seen, nor are
        compiled ones, except by grained queries, whose budget needs them.

        Attention is not kept, but computed here, in float32 at least, with the weights of the moment, from
        what the blocks under `watch` were given. Its names are `kind::path of the layer`:

        - `attention`: probabilities, (B, heads, ...); what for is said by each class.
        - `filters`: learned matrices or amplitudes, the same for all images.
        - `points`: positions of samples, x and y in pixels of the layer's map, the centre of the first pixel
          at (0, 0), (B, heads, points, H, W, 2).
        """
        maps = {}
        paths = {module: path for path, module in self.named_modules()}
        like = next(self.parameters())
        with torch.no_grad():
            for block in paths:
                inputs = self._last_inputs.get(block, like)
                if inputs is not None:
                    layer, inputs = block.mixing(*inputs)
                    for kind, result in layer.attention_maps(*inputs).items():
                        maps[f"{kind}::{paths[layer]}"] = result
        return maps

    def forget_inputs(self) -> None:
        """Let go of what `token_maps` would describe; together with those of the next batch they would raise
        the peak of memory.
        """
        if may_keep():
            self._last_inputs.clear()

    def position_tables(self) -> dict[str, tuple[int, tuple[int, int], str]]:
        """Full name of a position table -> (special tokens, (h, w), interpolation mode).

        Only for tables whose grid (for a bias table: window) is not square, or not resampled as usual:
        `models/pretrained` finds all others by name and shape.
        """
        return {}

    def dense_differences(self) -> tuple[str, ...]:
        """Name prefixes that only one build has: with a classifier, or for dense tasks (0 classes).

        Classification weights that start a dense model may lack, or have, these and no others.
        """
        return ()

    def timed_parts(self) -> dict[str, nn.Module]:
        """Parts that `--throughput` times beside the whole, by name; each takes the same images."""
        return {}

    def counting(self) -> AbstractContextManager[None]:
        """While it is entered, `forward` runs the operations that papers count, whatever is faster here."""
        return nullcontext()

    def train(self, mode: bool = True) -> "Backbone":
        self._last_inputs.clear()
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    # -- for subclasses --------------------------------------------------------------------------

    def _reset_classifier(self, num_classes: int) -> None:
        """What `reset_classifier` does to this architecture; sets `num_classes` too."""
        raise NotImplementedError

    def watch(self, *blocks: nn.Module) -> None:
        """Let `token_maps` describe these blocks, which must run through `run_block`.

        `block.mixing(*inputs)` gives the layer that mixes the tokens and its inputs, and
        `layer.attention_maps(*inputs)` what it attends to with them, by kind.
        """
        self._watched.update(blocks)

    def remember(self, block: nn.Module, *inputs: Any) -> None:
        """Keep references to inputs of an evaluation forward that `block.mixing` takes, for `token_maps`."""
        if not self.training and may_keep():
            self._last_inputs.keep(block, inputs)

    def run_block(self, block: Callable[..., Any], *args: Any) -> Any:
        """`block(*args)`, recomputed in the backward pass when gradient checkpointing is on."""
        if may_keep() and block in self._watched:
            self.remember(block, *args)
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            if torch.compiler.is_compiling():  # buffers change once there, and contexts are refused
                return checkpoint(block, *args, use_reentrant=False)
            owner = block if isinstance(block, nn.Module) else self
            norms = [m for m in owner.modules() if isinstance(m, BATCH_NORMS)]
            return checkpoint(
                block,
                *args,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), _frozen_statistics(norms)),
            )
        return block(*args)

    def run_blocks(self, blocks: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """Apply `blocks` in turn through `run_block`."""
        for block in blocks:
            x = self.run_block(block, x)
        return x


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by full name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _ids(tensors: dict[str, Tensor]) -> set[int]:
    return {id(tensor) for tensor in tensors.values()}


@contextmanager
def _frozen_statistics(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Batch norms use the statistics of the batch, but do not count it a second time."""
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in kept:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _keep_constant_buffers(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Before loading: keep the model's own constants, whatever size the file was trained at."""
    module._set_aside.clear()  # the layers of other weights
    own = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name.rsplit(".", 1)[-1] in CONSTANT_BUFFERS
    }
    for key in [
        k for k in state_dict if k.startswith(prefix) and k.rsplit(".", 1)[-1] in CONSTANT_BUFFERS
    ]:
        if key.removeprefix(prefix) not in own:
            del state_dict[key]
    state_dict.update({prefix + name: tensor for name, tensor in own.items()})
