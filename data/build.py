"""From the config to loaders: the only file of this package that sees it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from models.layers.tokens import to_pair

from . import formats  # noqa: F401  importing it registers every format
from .decoders import make_decoder
from .dense.build import build_dense_samples, wants_masks
from .dense.loader import DenseLoader, DenseSamples
from .evaluation_sets import (
    EvaluationSet,
    imagenet_names,
    open_set,
    parse_entry,
    uses_validation,
)
from .finish import Finish, RandomErasing
from .label_maps import LabelMaps
from .loader import Loader, Samples, warn_of_too_many_workers
from .on_device import DeviceLoader, check_on_device
from .registry import (
    CLASSIFICATION,
    DenseDataset,
    ImageDataset,
    check_same_classes,
    create_dataset,
    dataset_node,
    dataset_options,
    published_num_classes,
    published_train_size,
)
from .samplers import EvalBatchSampler, TrainBatchSampler
from .transforms import Transform, channel_stats, eval_transform, train_transform

_LOG = logging.getLogger(__name__)

# Repetitions of an image in repeated augmentation, as in DeiT's recipe.
REPEATS = 3


@dataclass(frozen=True)
class Data:
    """Loaders of the splits that were asked for (None: was not), and their classes by label."""

    train: Loader | DeviceLoader | None
    val: Loader | DeviceLoader | None
    classes: list[str]

    @property
    def num_classes(self) -> int:
        """Number of classes in the data."""
        return len(self.classes)


def build_data(
    config: Any,
    *,
    rank: int = 0,
    world_size: int = 1,
    splits: Sequence[str] = ("train", "val"),
    device: torch.device | None = None,
    local_world_size: int = 1,
) -> Data:
    """Loaders of `splits` for one process of `world_size`; the other splits' images need not exist.

    Args:
        device: where batches are wanted, and normalised; None is the CPU.
        local_world_size: processes on this machine, each with workers of its own.

    Raises:
        ValueError: unknown format, damaged data, classes that disagree between splits or with
            MODEL.NUM_CLASSES, fewer images than a batch.
        FileNotFoundError: files of the format are missing.
    """
    share = dict(rank=rank, world_size=world_size, device=device)
    loaders = {split: build_loader(config, split, **share) for split in splits}
    found = [loader.classes for loader in loaders.values()]
    check_same_classes(found[0], found[-1], _source(config))
    check_num_classes(config.MODEL.NUM_CLASSES, len(found[0]), _source(config))
    if rank == 0:
        warn_of_too_many_workers(config.DATA.NUM_WORKERS, local_world_size)
    return Data(loaders.get("train"), loaders.get("val"), found[0])


def build_loader(
    config: Any,
    split: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    dataset: ImageDataset | None = None,
) -> Loader | DeviceLoader:
    """Batches of "train" (shuffled, augmented) or "val" (in order, exact) for one process.

    Args:
        dataset: images to load instead of the split's own.
    """
    training = split == "train"
    if dataset is None:
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
        # Padded beside a larger one, an image of a dense task would not give the same as alone.
        size = config.DATA.BATCH_SIZE if config.TASK == CLASSIFICATION else 1
        sampler = EvalBatchSampler(len(dataset), size, **share)
    if cache_mode != "no":
        dataset.cache(sampler.indices())
    samples, finish = build_samples(config, dataset, training), build_finish(config)
    if config.DATA.ON_DEVICE:
        return DeviceLoader(samples, sampler, finish, device=device)
    loader = Loader if config.TASK == CLASSIFICATION else DenseLoader
    return loader(
        samples,
        sampler,
        finish,
        device=device,
        num_workers=config.DATA.NUM_WORKERS,
        pin_memory=config.DATA.PIN_MEMORY,
    )


def build_samples(config: Any, dataset: ImageDataset, training: bool) -> Samples | DenseSamples:
    """Augmented uint8 samples of `dataset`, whose decoder is set to DATA.DECODER."""
    if config.TASK != CLASSIFICATION:
        return build_dense_samples(config, dataset, training)
    data, aug = config.DATA, config.AUG
    dataset.decode = make_decoder(
        data.DECODER, in_chans=config.MODEL.IN_CHANS, min_side=data.DECODE_MIN_SIDE
    )
    transform, maps = build_transform(config, training), None
    if training and config.TRAIN.TOKEN_LABELS.ENABLE and config.TRAIN.TOKEN_LABELS.MAPS:
        maps = LabelMaps(config.TRAIN.TOKEN_LABELS.MAPS, len(dataset.classes))
    return Samples(
        dataset,
        transform,
        in_chans=config.MODEL.IN_CHANS,
        seed=config.SEED,
        training=training,
        on_error=data.ON_ERROR,
        arrays=training,  # evaluation resizes by PIL itself, whatever has decoded the image
        erasing=RandomErasing(aug.REPROB, aug.RECOUNT) if training else None,
        maps=maps,
    )


def build_finish(config: Any) -> Finish:
    """What makes normalised floats of uint8 batches."""
    data = config.DATA
    mean, std = channel_stats(data.MEAN, data.STD, config.MODEL.IN_CHANS)
    return Finish(mean, std, config.AUG.REMODE)


def build_dataset(config: Any, split: str) -> ImageDataset:
    """The stored images of one split."""
    data = config.DATA
    accepted = dataset_options(data.DATASET, config.TASK)
    options = dict(
        img_size=to_pair(data.IMG_SIZE), in_chans=config.MODEL.IN_CHANS, zip_mode=data.ZIP_MODE
    )
    if config.TASK != CLASSIFICATION:
        options["masks"] = wants_masks(config)
    if data.ZIP_MODE and "zip_mode" not in accepted:
        raise ValueError(
            f"DATA.ZIP_MODE=True: the format DATA.DATASET='{data.DATASET}' has no zip files; "
            "set DATA.ZIP_MODE False, or DATA.DATASET imagenet"
        )
    own = data.get(dataset_node(data.DATASET, config.TASK)) or {}
    options |= {name.lower(): value for name, value in own.items()}
    options = {name: value for name, value in options.items() if name in accepted}
    return create_dataset(data.DATASET, data.DATA_PATH, split, config.TASK, **options)


def build_transform(config: Any, training: bool) -> Transform:
    """Decoded image -> uint8 array, augmented in training."""
    data, aug = config.DATA, config.AUG
    common = dict(
        size=to_pair(data.IMG_SIZE),
        in_chans=config.MODEL.IN_CHANS,
        interpolation=data.INTERPOLATION,
    )
    if not training:
        test = config.TEST
        return eval_transform(
            **common,
            crop=test.CROP,
            crop_ratio=test.CROP_RATIO,
            crop_mode=test.CROP_MODE,
            colour=data.MEAN,
            margin=config.EVAL_MODE and test.TTA in ("five", "ten"),
        )
    return train_transform(
        **common,
        mean=channel_stats(data.MEAN, data.STD, config.MODEL.IN_CHANS)[0],
        crop=aug.CROP,
        scale=aug.SCALE,
        ratio=aug.RATIO,
        hflip=aug.HFLIP,
        vflip=aug.VFLIP,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=aug.AUTO_AUGMENT,
    )


class Checked(NamedTuple):
    """What a look at the data found.

    Attributes:
        classes: their names.
        labels: for `masks.check_labels`, what this process's share of the masks of each split holds.
    """

    classes: list[str]
    labels: dict[str, set[int]]


def check_data(
    config: Any,
    splits: Sequence[str] = ("train", "val"),
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Checked:
    """What can be wrong with the data's keys and files; masks are read, of images with boxes the heads.

    Of masks, and of images with boxes, each process looks at its share. Only an evaluation whose results are
    recorded may do without objects or labels, as those of a test set are not known.

    Raises:
        ValueError, FileNotFoundError: as in `build_data`; that files can be read is found out there.
    """
    build_finish(config)
    found, labels = [], {}
    known = not (config.EVAL_MODE and config.TEST.REPORT)
    for split in splits:
        dataset = build_dataset(config, split)
        samples = build_samples(config, dataset, split == "train")
        if config.DATA.ON_DEVICE:
            check_on_device(samples)
        if isinstance(dataset, DenseDataset):
            if known:
                dataset.check_objects()
            seen = dataset.check(rank, world_size)
            if known:
                labels[split] = seen
        if split == "train" and not dataset.holds(config.DATA.BATCH_SIZE * world_size):
            train_batches(config, len(dataset), world_size)  # says what is missing
        found.append(dataset.classes)
    check_same_classes(found[0], found[-1], _source(config))
    check_num_classes(config.MODEL.NUM_CLASSES, len(found[0]), _source(config))
    return Checked(found[0], labels)


def build_evaluation_sets(config: Any) -> tuple[list[str], list[EvaluationSet]]:
    """Names of the model's classes, and what TEST.SETS lists; reads no image.

    The names are those of the data, or where it is not there, and no set needs it, of ImageNet's classes.

    Raises:
        ValueError: an entry that is no set, is listed twice, or has classes that the model has not.
        FileNotFoundError: the data, or a set, is not there.
    """
    entries = config.TEST.SETS
    names = [parse_entry(entry)[0] for entry in entries]
    if not entries or len(set(names)) < len(names):
        raise ValueError(f"TEST.SETS={entries} must name at least one set, and none twice")
    validation = None
    try:
        validation = build_dataset(config, "val")
    except FileNotFoundError:
        if any(uses_validation(entry) for entry in entries):
            raise
    if validation is None:
        count = config.MODEL.NUM_CLASSES or published_num_classes(config.DATA.DATASET) or 1000
        classes = imagenet_names(count) or [str(label) for label in range(count)]
    else:
        classes = validation.classes
        check_num_classes(config.MODEL.NUM_CLASSES, len(classes), _source(config))
    return classes, [open_set(entry, classes, validation) for entry in entries]


def check_evaluation(config: Any, *, rank: int = 0, world_size: int = 1) -> Checked:
    """What can be wrong with the keys and files of an evaluation; the classes are the model's.

    Raises:
        ValueError, FileNotFoundError: as in `build_evaluation_sets`, or a transform that cannot be.
    """
    if config.TASK != CLASSIFICATION:
        return check_data(config, ["val"], rank=rank, world_size=world_size)
    build_finish(config)
    classes, sets = build_evaluation_sets(config)
    for dataset in (part for found in sets for part in found.parts.values()):
        samples = build_samples(config, dataset, training=False)
        if config.DATA.ON_DEVICE:
            check_on_device(samples)
    return Checked(classes, {})


def dataset_num_classes(config: Any) -> int:
    """Classes of the validation split, checked against MODEL.NUM_CLASSES; reads no image."""
    found = len(build_dataset(config, "val").classes)
    check_num_classes(config.MODEL.NUM_CLASSES, found, _source(config))
    return found


def train_size(config: Any) -> tuple[int, str]:
    """Training images, and in words where the number comes from: the data, PLAN.TRAIN_SIZE, its name.

    Lists the images of folders, reads none.

    Raises:
        ValueError: the data is not there, and nobody says how much it is.
    """
    try:
        return len(build_dataset(config, "train")), "counted"
    except FileNotFoundError as error:
        if config.PLAN.TRAIN_SIZE:
            return config.PLAN.TRAIN_SIZE, "of PLAN.TRAIN_SIZE: the data is not here"
        published = published_train_size(config.DATA.DATASET, config.TASK)
        if published is None:
            raise ValueError(
                f"{error}; without it, set PLAN.TRAIN_SIZE to the number of training images"
            ) from error
        return published, f"published for '{config.DATA.DATASET}': the data is not here"


def train_batches(config: Any, num_images: int, world_size: int) -> int:
    """Batches of one process in an epoch over so many images; ValueError if they are less than one."""
    return len(TrainBatchSampler(num_images, config.DATA.BATCH_SIZE, world_size=world_size))


def check_num_classes(configured: int | None, found: int, source: str) -> None:
    """ValueError if MODEL.NUM_CLASSES is set and the data has another number of classes."""
    if configured is not None and configured != found:
        raise ValueError(
            f"MODEL.NUM_CLASSES={configured}, but {source} has {found} classes: set MODEL.NUM_CLASSES "
            f"to {found} or to None (taken from the data), or correct DATA.DATA_PATH"
        )


def _source(config: Any) -> str:
    return f"DATA.DATASET='{config.DATA.DATASET}' in DATA.DATA_PATH='{config.DATA.DATA_PATH}'"
