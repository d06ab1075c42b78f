"""From the config to samples of dense tasks: the only file of this folder that sees it."""

from collections.abc import Callable
from typing import Any

from data.decoders import make_decoder
from data.registry import DenseDataset
from models.heads import find_head

from . import detection, segmentation
from .loader import DenseSamples


def build_dense_samples(config: Any, dataset: DenseDataset, training: bool) -> DenseSamples:
    """Augmented samples of `dataset`, whose decoder is set to DATA.DECODER."""
    data = config.DATA
    dataset.decode = make_decoder(data.DECODER, in_chans=config.MODEL.IN_CHANS)
    return DenseSamples(
        dataset,
        _TRANSFORMS[config.TASK](config, training),
        in_chans=config.MODEL.IN_CHANS,
        seed=config.SEED,
        training=training,
        size_divisor=data.SIZE_DIVISOR,
    )


def wants_masks(config: Any) -> bool:
    """Whether the head of a detector learns masks."""
    return find_head(config.MODEL.HEAD.TYPE, config.TASK).needs_masks


def _build_detection(config: Any, training: bool) -> Callable[..., Any]:
    aug, test = config.AUG.DETECTION, config.TEST.DETECTION
    if training:
        transform = detection.train_transform(
            short_sides=aug.SHORT_SIDES,
            long_side=aug.LONG_SIDE,
            hflip=config.AUG.HFLIP,
            crop=aug.CROP,
            crop_short_sides=aug.CROP_SHORT_SIDES,
            crop_sides=aug.CROP_SIDES,
            photometric=aug.PHOTOMETRIC,
        )
    else:
        transform = detection.eval_transform(short_side=test.SHORT_SIDE, long_side=test.LONG_SIDE)
    return detection.DetectionSample(transform, training, wants_masks(config))


def _build_segmentation(config: Any, training: bool) -> Callable[..., Any]:
    aug = config.AUG.SEGMENTATION
    if training:
        transform = segmentation.train_transform(
            resize=aug.RESIZE,
            ratios=aug.RATIOS,
            crop=aug.CROP,
            max_class_share=aug.MAX_CLASS_SHARE,
            hflip=config.AUG.HFLIP,
            photometric=aug.PHOTOMETRIC,
        )
    else:
        transform = segmentation.eval_transform(resize=config.TEST.SEGMENTATION.RESIZE)
    return segmentation.SegmentationSample(transform, training)


_TRANSFORMS = {"detection": _build_detection, "segmentation": _build_segmentation}
