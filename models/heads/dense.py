"""A backbone with a head for detection or segmentation, which keeps the contract of a backbone."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any, NoReturn

from torch import Tensor, nn

from models.backbone import Backbone

from .simple_pyramid import SimplePyramid


class DenseModel(Backbone):
    """Backbone -> maps of several strides -> head.

    The one map of a plain ViT becomes a pyramid first (`SimplePyramid`). Names in the state dict are
    `backbone.*`, as in the detectors of mmdet, `pyramid.*` and `head.*`.

    Args:
        backbone: built without a classifier.
        pyramid: as of `pyramid_of(backbone)`.
        head: called with maps of those features; its `unused_maps` are the indices of maps it leaves out.
        task: what the head is for.

    Raises:
        ValueError: the backbone has a classifier.
    """

    def __init__(
        self, backbone: Backbone, pyramid: SimplePyramid | None, head: nn.Module, task: str
    ):
        super().__init__()
        if backbone.num_classes:
            raise ValueError(
                f"{type(backbone).__name__} has a classifier of {backbone.num_classes} classes, which "
                "dense tasks would leave without gradients: build it with num_classes=0"
            )
        self.backbone, self.pyramid, self.head, self.task = backbone, pyramid, head, task
        self.num_features = backbone.num_features
        self.feature_info = backbone.feature_info if pyramid is None else pyramid.features
        self.num_classes = head.num_classes
        self.min_batch = getattr(head, "min_batch", 1)
        # Trained, they would get no gradient, which DDP refuses.
        for index in getattr(head, "unused_maps", ()):
            resting = [backbone.get_submodule(layer) for layer in backbone.map_layers(index)]
            for layer in resting if pyramid is None else [pyramid.branches[index]]:
                layer.requires_grad_(False)

    def forward(self, images: Tensor, targets: list[dict[str, Any]] | None = None) -> Any:
        """Images (B, C, H, W), padded at the right and the bottom, and targets of `tasks/` -> the head's.

        Training: losses by name. Evaluation: detections, or logits (B, num_classes, h, w); targets say with
        `size` which part of an image is no padding, and nothing else.
        """
        maps = self.forward_pyramid(images)
        return self.head(maps, images, targets)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """Images -> the maps that the head gets, fine to coarse."""
        self.backbone.forget_inputs()
        maps = self.backbone.forward_pyramid(x)
        return maps if self.pyramid is None else self.pyramid(maps[0])

    def forward_features(self, x: Tensor) -> NoReturn:
        raise self._no_classifier("forward_features")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> NoReturn:
        raise self._no_classifier("forward_head")

    def reset_classifier(self, num_classes: int) -> NoReturn:
        raise self._no_classifier("reset_classifier")

    def _no_classifier(self, method: str) -> NotImplementedError:
        return NotImplementedError(
            f"{method}: a model for {self.task} has no classifier of whole images. Call forward or "
            "forward_pyramid, or the method of its `backbone`; for other classes build a new one, with "
            "build_model(config, num_classes=...)"
        )

    @property
    def cost_depends_on_images(self) -> bool:
        """That of the backbone; a head costs the same for all images where papers count."""
        return self.backbone.cost_depends_on_images

    def timed_parts(self) -> dict[str, nn.Module]:
        return {"backbone": _Maps(self.backbone)}

    def get_classifier(self) -> nn.Module:
        """All that classification weights do not have."""
        return nn.ModuleList([part for part in (self.pyramid, self.head) if part is not None])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def lr_multipliers(self) -> dict[str, float]:
        return {f"backbone.{name}": f for name, f in self.backbone.lr_multipliers().items()}

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        """Those of the backbone, whose norms after the last block have a depth below the head's."""
        below = self.backbone.layer_prefixes()
        named = [tuple(f"backbone.{prefix}" for prefix in depth) for depth in below]
        return [*named, ("backbone",)]

    def freeze_batch_norms(self) -> None:
        """Those of the backbone, as detectors do; the head's train."""
        self.backbone.freeze_batch_norms()

    def aux_losses(self) -> dict[str, Tensor]:
        return self.backbone.aux_losses()

    def log_values(self) -> dict[str, Tensor | float]:
        return self.backbone.log_values()

    def image_values(self) -> dict[str, Tensor]:
        return self.backbone.image_values()

    def conditions(self) -> dict[str, float]:
        return self.backbone.conditions()

    def set_progress(
        self, step: int, total_steps: int, warmup_steps: int, steps_per_epoch: int | None = None
    ) -> None:
        self.backbone.set_progress(step, total_steps, warmup_steps, steps_per_epoch)

    def token_maps(self) -> dict[str, Tensor]:
        """Those of the backbone: `kind::path` becomes `kind::backbone.path`, and `name` `backbone.name`."""
        maps = {}
        for name, result in self.backbone.token_maps().items():
            kind, separator, path = name.rpartition("::")
            maps[f"{kind}{separator}backbone.{path}"] = result
        return maps

    def position_tables(self) -> dict[str, tuple[int, tuple[int, int], str]]:
        tables = self.backbone.position_tables()
        return {f"backbone.{name}": table for name, table in tables.items()}

    def counting(self) -> AbstractContextManager[None]:
        """Head and backbone run what papers count: neither proposals nor suppression depend on images."""
        stack = ExitStack()
        stack.enter_context(self.backbone.counting())
        if hasattr(self.head, "counting"):
            stack.enter_context(self.head.counting())
        return stack


class _Maps(nn.Module):
    """A backbone as a module that makes its pyramid, to be timed alone."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        self.backbone.forget_inputs()
        return self.backbone.forward_pyramid(images)


def pyramid_of(backbone: Backbone) -> tuple[SimplePyramid | None, list[dict[str, int]]]:
    """What stands between a backbone and its head, and the maps (channels, stride) that the head gets.

    Raises:
        ValueError: the backbone really drops tokens, so that there are no maps.
    """
    if backbone.drops_tokens:
        raise ValueError(
            f"{type(backbone).__name__} drops tokens, so no feature map is left for detection or "
            "segmentation: choose another backbone, or a keep rate of 1.0 (MODEL.EVIT.KEEP_RATE)"
        )
    if len(backbone.feature_info) > 1:
        return None, backbone.feature_info
    (info,) = backbone.feature_info
    pyramid = SimplePyramid(info["channels"], info["stride"])
    return pyramid, pyramid.features
