"""From a config to loaders."""

import logging
from itertools import chain
from pathlib import Path

import pytest
import torch
from torchvision import transforms

from config import load_config
from data import build_data, build_dataset, build_loader, dataset_num_classes
from data.build import check_num_classes
from models import create_model

EMPTY = Path(__file__).with_name("empty.yaml")

DEFAULTS = dict(
    DATA__DATASET="synthetic",
    DATA__BATCH_SIZE=8,
    DATA__IMG_SIZE=24,
    DATA__NUM_WORKERS=0,
    DATA__MEAN=[0.5],
    DATA__STD=[0.25],
    DATA__SYNTHETIC__TRAIN_SIZE=40,
    DATA__SYNTHETIC__VAL_SIZE=11,
    DATA__SYNTHETIC__NUM_CLASSES=7,
)


def make_config(**overrides):
    """The defaults with small synthetic data; overrides are written DATA__BATCH_SIZE=4."""
    pairs = [(key.replace("__", "."), value) for key, value in (DEFAULTS | overrides).items()]
    return load_config(EMPTY, list(chain.from_iterable(pairs)))


def real_images(tmp_path, write_images):
    write_images(tmp_path, {"ant": 9, "bee": 8, "cat": 3}, "train", size=(24, 24))
    write_images(tmp_path, {"ant": 4, "bee": 2, "cat": 5}, "val", size=(24, 24))
    return dict(DATA__DATASET="imagenet", DATA__DATA_PATH=str(tmp_path), DATA__BATCH_SIZE=2)


def assert_same(loader, other):
    batches, others = list(loader), list(other)
    assert len(batches) == len(others) > 0
    for batch, expected in zip(batches, others, strict=True):
        assert all(a.equal(b) for a, b in zip(batch, expected, strict=True))


def test_both_loaders_and_the_classes_come_from_the_config():
    data = build_data(make_config())
    assert (data.num_classes, data.classes[0]) == (7, "class_0")
    images, labels = next(iter(data.train))
    assert (images.shape, images.dtype, labels.shape) == ((8, 3, 24, 24), torch.float32, (8,))
    assert sum(len(labels) for _, labels in data.val) == 11
    assert (len(data.train), len(data.val)) == (5, 2)


def test_evaluation_builds_without_training_images(tmp_path, write_images):
    """Trap: `--eval` must need nothing that it does not read."""
    write_images(tmp_path, {"ant": 1, "bee": 2}, "val")
    config = make_config(DATA__DATASET="imagenet", DATA__DATA_PATH=str(tmp_path))
    data = build_data(config, splits=("val",))
    assert data.train is None
    assert data.classes == ["ant", "bee"]
    assert dataset_num_classes(config) == 2


@pytest.mark.parametrize("size", [[16, 40], [40, 24], 16])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_digits_load_at_any_size_and_number_of_channels(size, in_chans):
    """Trap 6: fixed input size, non-square."""
    config = make_config(
        DATA__DATASET="digits", DATA__IMG_SIZE=size, MODEL__IN_CHANS=in_chans, DATA__BATCH_SIZE=64
    )
    data = build_data(config)
    height, width = (size, size) if isinstance(size, int) else size
    for loader in (data.train, data.val):
        images, _ = next(iter(loader))
        assert images.shape == (64, in_chans, height, width)
        assert images.isfinite().all()
    assert (data.num_classes, len(data.train)) == (10, 1437 // 64)


def test_digits_do_not_flip_when_flipping_is_off():
    off = dict(
        AUG__HFLIP=0.0, AUG__COLOR_JITTER=0.0, AUG__AUTO_AUGMENT="none", AUG__REPROB=0.0,
        AUG__SCALE=[1.0, 1.0],
    )  # fmt: skip
    config = make_config(DATA__DATASET="digits", DATA__IMG_SIZE=8, DATA__BATCH_SIZE=1437, **off)
    images, _ = next(iter(build_loader(config, "train")))
    stored = build_dataset(config, "train")
    pixels = torch.stack([torch.from_numpy(stored[i][0]) for i in range(len(stored))])
    loaded = ((images[:, 0] * 0.25 + 0.5) * 255).round().to(torch.uint8)
    assert sorted(loaded.flatten(1).tolist()) == sorted(pixels.flatten(1).tolist())


def test_a_number_of_classes_that_the_data_does_not_have_is_an_error():
    """Trap 5, and Swin's: MODEL.NUM_CLASSES in YAML is overwritten by the dataset builder."""
    message = r"MODEL.NUM_CLASSES=1000, but DATA.DATASET='synthetic'.* has 7 classes: set .* to 7"
    config = make_config(MODEL__NUM_CLASSES=1000)
    with pytest.raises(ValueError, match=message):
        build_data(config)
    with pytest.raises(ValueError, match=message):
        dataset_num_classes(config)
    assert build_data(make_config(MODEL__NUM_CLASSES=7)).num_classes == 7
    check_num_classes(None, 3, "anything")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("cache_mode", ["no", "full", "part"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_zip_mode_gives_the_batches_of_the_folder(
    tmp_path, write_images, write_zip, world_size, cache_mode, num_workers
):
    """Trap 11, zip mode: any cache mode, and several workers, on each process."""
    options = real_images(tmp_path, write_images)
    for split in ("train", "val"):
        write_zip(tmp_path, split)
    folder = make_config(**options)
    zipped = make_config(
        **options, DATA__ZIP_MODE=True, DATA__CACHE_MODE=cache_mode, DATA__NUM_WORKERS=num_workers
    )
    share = dict(rank=world_size - 1, world_size=world_size)
    data, expected = build_data(zipped, **share), build_data(folder, **share)
    assert data.classes == expected.classes == ["ant", "bee", "cat"]
    assert_same(data.val, expected.val)
    data.train.set_position(3)
    expected.train.set_position(3)
    if cache_mode == "part" and world_size == 2:
        shares = [key.index for batch in data.train.batch_sampler for key in batch]
        assert {index % 2 for index in shares} == {1}
        assert sum(len(labels) for _, labels in data.train) == 10
    else:
        assert_same(data.train, expected.train)


def test_zip_mode_of_a_format_without_zip_files_is_an_error():
    with pytest.raises(ValueError, match=r"DATA.ZIP_MODE=True.*'synthetic' has no zip files"):
        build_dataset(make_config(DATA__ZIP_MODE=True), "train")


def test_repeated_augmentation_shows_each_drawn_image_three_times():
    loader = build_loader(make_config(AUG__REPEATED_AUG=True, DATA__BATCH_SIZE=9), "train")
    (keys, *_), (images, labels) = list(loader.batch_sampler), next(iter(loader))
    assert len({key.index for key in keys}) == 3
    assert labels.view(3, 3).eq(labels.view(3, 3)[:, :1]).all()
    assert not images[0].equal(images[1])


def test_a_loader_continues_from_a_saved_position():
    """Trap 16: resuming in the middle of an epoch."""
    loader, resumed = (build_loader(make_config(), "train") for _ in range(2))
    loader.set_position(2)
    batches = list(loader)
    assert resumed.load_state(loader.state(next_batch=3)) == (2, 3)
    assert all(a.equal(b) for (a, _), (b, _) in zip(resumed, batches[3:], strict=True))


def test_a_default_number_of_workers_on_a_small_machine_warns_and_works(caplog):
    """Trap 11: workers are per process."""
    with caplog.at_level(logging.WARNING):
        data = build_data(make_config(DATA__NUM_WORKERS=3), local_world_size=500)
    assert "DATA.NUM_WORKERS=3 is per process: 1500 workers" in caplog.text
    assert len(list(data.val)) == 2


def test_unreadable_images_are_counted_on_the_loader(tmp_path, write_images):
    options = real_images(tmp_path, write_images)
    (tmp_path / "val" / "bee" / "0.png").write_bytes(b"damaged")
    with pytest.raises(OSError, match=r"bee/0.png.*DATA.ON_ERROR skip"):
        list(build_loader(make_config(**options), "val"))
    loader = build_loader(make_config(**options, DATA__ON_ERROR="skip"), "val")
    assert sum(len(labels) for _, labels in loader) == 10
    assert loader.skipped == 1


@pytest.mark.parametrize("in_chans", [1, 3])
def test_evaluation_gives_the_logits_of_floats_made_by_the_worker(tmp_path, write_images, in_chans):
    """The pipeline of the six lines: resize, centre crop, ToTensor, Normalize."""
    write_images(tmp_path, {"ant": 2, "bee": 3}, "val", size=(60, 80))
    mean, std = [0.485, 0.456, 0.406][:in_chans], [0.229, 0.224, 0.225][:in_chans]
    config = make_config(
        DATA__DATASET="imagenet", DATA__DATA_PATH=str(tmp_path), DATA__IMG_SIZE=48,
        DATA__MEAN=mean, DATA__STD=std, MODEL__IN_CHANS=in_chans,
    )  # fmt: skip
    literal = transforms.Compose(
        [
            transforms.Resize(int(48 * 256 / 224), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(48),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    stored = build_dataset(config, "val")
    mode = "L" if in_chans == 1 else "RGB"
    expected = torch.stack([literal(stored[i][0].convert(mode)) for i in range(5)])
    ((images, _),) = build_loader(config, "val")
    assert (images - expected).abs().max() < 1e-6
    model = create_model(
        "dhvt_tiny_cifar_patch4", embed_dim=32, num_heads=2, depth=2, img_size=48, in_chans=in_chans
    ).eval()
    with torch.no_grad():
        logits, before = model(images), model(expected)
    assert (logits - before).abs().max() < 1e-5 * before.std()
