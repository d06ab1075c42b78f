"""From the config to loaders: the only file of this package that sees it."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.layers.tokens import to_pair

from . import formats  # noqa: F401  importing it registers every format
from .loader import Loader, Samples, warn_of_too_many_workers
from .registry import ImageDataset, check_same_classes, create_dataset, dataset_options
from .samplers import EvalBatchSampler, TrainBatchSampler
from .transforms import Transform, eval_transform, train_transform

_LOG = logging.getLogger(__name__)

# Repetitions of an image in repeated augmentation, as in DeiT's recipe.
REPEATS = 3


@dataclass(frozen=True)
class Data:
    """Loaders of the splits that were asked for (None: was not), and their classes by label."""

    train: Loader | None
    val: Loader | None
    classes: list[str]

    @property
    def num_classes(self) -> int:
        """Number of classes in the data."""
        return len(self.classes)


def build_data(
    config: Any, *, rank: int = 0, world_size: int = 1, splits: Sequence[str] = ("train", "val")
) -> Data:
    """Loaders of `splits` for one process of `world_size`; the other splits' images need not exist.

    Raises:
        ValueError: unknown format, damaged data, classes that disagree between splits or with
            MODEL.NUM_CLASSES, fewer images than a batch.
        FileNotFoundError: files of the format are missing.
    """
    loaders = {
        split: build_loader(config, split, rank=rank, world_size=world_size) for split in splits
    }
    found = [loader.classes for loader in loaders.values()]
    check_same_classes(found[0], found[-1], f"DATA.DATA_PATH='{config.DATA.DATA_PATH}'")
    check_num_classes(config.MODEL.NUM_CLASSES, len(found[0]), _source(config))
    if rank == 0:
        # Set by torchrun; other launchers do not say how many processes this machine has.
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        warn_of_too_many_workers(config.DATA.NUM_WORKERS, local_processes)
    return Data(loaders.get("train"), loaders.get("val"), found[0])


def build_loader(config: Any, split: str, *, rank: int = 0, world_size: int = 1) -> Loader:
    """Batches of "train" (shuffled, augmented) or "val" (in order, exact) for one process."""
    training = split == "train"
    dataset = build_dataset(config, split)
    share = dict(rank=rank, world_size=world_size)
    cache_mode = config.DATA.CACHE_MODE if config.DATA.ZIP_MODE else "no"
    if training:
        sampler = TrainBatchSampler(
            len(dataset),
            config.DATA.BATCH_SIZE,
            seed=config.SEED,
            repeats=REPEATS if config.AUG.REPEATED_AUG else 1,
            fixed_shards=cache_mode == "part",
            **share,
        )
    else:
        sampler = EvalBatchSampler(len(dataset), config.DATA.BATCH_SIZE, **share)
    if cache_mode != "no":
        dataset.cache(sampler.indices())
    samples = Samples(
        dataset,
        build_transform(config, training),
        in_chans=config.MODEL.IN_CHANS,
        seed=config.SEED,
        training=training,
        on_error=config.DATA.ON_ERROR,
    )
    return Loader(
        samples,
        sampler,
        num_workers=config.DATA.NUM_WORKERS,
        pin_memory=config.DATA.PIN_MEMORY,
    )


def build_dataset(config: Any, split: str) -> ImageDataset:
    """The stored images of one split."""
    data = config.DATA
    accepted = dataset_options(data.DATASET)
    options = dict(
        img_size=to_pair(data.IMG_SIZE), in_chans=config.MODEL.IN_CHANS, zip_mode=data.ZIP_MODE
    )
    if data.ZIP_MODE and "zip_mode" not in accepted:
        raise ValueError(
            f"DATA.ZIP_MODE=True: the format DATA.DATASET='{data.DATASET}' has no zip files; "
            "set DATA.ZIP_MODE False, or DATA.DATASET imagenet"
        )
    own = data.get(data.DATASET.upper()) or {}
    options |= {name.lower(): value for name, value in own.items()}
    options = {name: value for name, value in options.items() if name in accepted}
    return create_dataset(data.DATASET, data.DATA_PATH, split, **options)


def build_transform(config: Any, training: bool) -> Transform:
    """PIL image -> normalised tensor, augmented in training."""
    data, aug = config.DATA, config.AUG
    common = dict(
        size=to_pair(data.IMG_SIZE),
        in_chans=config.MODEL.IN_CHANS,
        mean=data.MEAN,
        std=data.STD,
        interpolation=data.INTERPOLATION,
    )
    if not training:
        return eval_transform(**common, crop=config.TEST.CROP)
    return train_transform(
        **common,
        scale=aug.SCALE,
        ratio=aug.RATIO,
        hflip=aug.HFLIP,
        vflip=aug.VFLIP,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=aug.AUTO_AUGMENT,
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
        re_count=aug.RECOUNT,
    )


def check_data(config: Any, splits: Sequence[str] = ("train", "val")) -> int:
    """What can be wrong with the data's keys and files before an image is read -> number of classes.

    Raises:
        ValueError, FileNotFoundError: as in `build_data`; that files can be read is found out there.
    """
    for split in splits:
        build_transform(config, split == "train")
        build_dataset(config, split)
    return dataset_num_classes(config)


def dataset_num_classes(config: Any) -> int:
    """Classes of the validation split, checked against MODEL.NUM_CLASSES; reads no image."""
    found = len(build_dataset(config, "val").classes)
    check_num_classes(config.MODEL.NUM_CLASSES, found, _source(config))
    return found


def check_num_classes(configured: int | None, found: int, source: str) -> None:
    """ValueError if MODEL.NUM_CLASSES is set and the data has another number of classes."""
    if configured is not None and configured != found:
        raise ValueError(
            f"MODEL.NUM_CLASSES={configured}, but {source} has {found} classes: set MODEL.NUM_CLASSES "
            f"to {found} or to None (taken from the data), or correct DATA.DATA_PATH"
        )


def _source(config: Any) -> str:
    return f"DATA.DATASET='{config.DATA.DATASET}' in DATA.DATA_PATH='{config.DATA.DATA_PATH}'"
