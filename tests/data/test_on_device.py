"""Small datasets on the device: the batches of the loader with workers."""

import pytest
import torch

from data import build_data, build_dataset, build_loader
from data.build import check_data
from data.on_device import DeviceLoader
from tests.data.test_build import make_config, real_images

PLAIN = dict(AUG__AUTO_AUGMENT="none", AUG__COLOR_JITTER=0.0)


def both(**overrides):
    return [make_config(**(PLAIN | overrides), DATA__ON_DEVICE=on) for on in (True, False)]


def assert_same(loader, other):
    batches, others = list(loader), list(other)
    assert len(batches) == len(others) == len(loader) > 0
    for batch, expected in zip(batches, others, strict=True):
        assert all(a.equal(b) for a, b in zip(batch, expected, strict=True))


@pytest.mark.parametrize("size", [32, [16, 24]])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        dict(AUG__VFLIP=0.5, AUG__REPROB=0.5, AUG__RECOUNT=2),
        dict(AUG__CROP="simple", AUG__REPEATED_AUG=True),
        dict(AUG__SCALE=[1.0, 1.0], AUG__HFLIP=0.5),
        dict(AUG__SCALE=[1.0, 1.0], AUG__HFLIP=0.0, AUG__REPROB=0.0),
    ],
    ids=["shift", "simple", "flip", "nothing"],
)
def test_batches_equal_those_of_workers(size, in_chans, options):
    shape = dict(DATA__DATASET="digits", DATA__IMG_SIZE=size, MODEL__IN_CHANS=in_chans)
    here, there = (
        build_loader(config, "train", rank=1, world_size=2)
        for config in both(DATA__BATCH_SIZE=90, **shape, **options)
    )
    assert isinstance(here, DeviceLoader)
    for epoch, start in ((0, 0), (3, 5)):
        here.set_position(epoch, start)
        there.set_position(epoch, start)
        images, others = (torch.cat([images for images, _ in loader]) for loader in (here, there))
        assert images.equal(others)
    assert len(here) == len(there) == 1437 // 180


@pytest.mark.parametrize("size", [20, [48, 40]])
def test_evaluation_equals_that_of_workers(size):
    here, there = (
        build_loader(config, "val", rank=1, world_size=2)
        for config in both(DATA__DATASET="digits", DATA__IMG_SIZE=size, DATA__BATCH_SIZE=64)
    )
    assert_same(here, there)
    assert here.classes == there.classes


def test_a_resumed_epoch_continues_on_the_device():
    """Trap 16: resuming in the middle of an epoch."""
    data = build_data(both(DATA__DATASET="digits", DATA__BATCH_SIZE=300)[0])
    data.train.set_position(2)
    batches = list(data.train)
    resumed = build_data(both(DATA__DATASET="digits", DATA__BATCH_SIZE=300)[0]).train
    assert resumed.load_state(data.train.state(next_batch=2)) == (2, 2)
    for batch, expected in zip(resumed, batches[2:], strict=True):
        assert batch[0].equal(expected[0])
    assert data.train.skipped == 0


def test_files_do_not_fit_on_the_device(tmp_path, write_images):
    options = real_images(tmp_path, write_images)
    config = both(**options)[0]
    with pytest.raises(ValueError, match=r"DATA.ON_DEVICE=True: the dataset reads files"):
        check_data(config)
    with pytest.raises(ValueError, match=r"DATA.ON_DEVICE=True: the dataset reads files"):
        build_loader(config, "val")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (dict(AUG__AUTO_AUGMENT="rand-m9"), "RandAugment"),
        (dict(AUG__COLOR_JITTER=0.4), "ColorJitter"),
        (dict(DATA__IMG_SIZE=40), "RandomCropResize"),
    ],
)
def test_augmentation_that_cannot_run_there_is_an_error_that_names_it(override, named):
    with pytest.raises(ValueError, match=rf"DATA.ON_DEVICE=True: {named} cannot run there.*AUG"):
        check_data(both(**override)[0])


def test_large_images_can_be_on_the_device_with_the_simple_crop():
    here, there = both(DATA__IMG_SIZE=40, AUG__CROP="simple")
    assert_same(build_loader(here, "train"), build_loader(there, "train"))
    assert build_dataset(here, "train").read(0)[0].shape == (40, 40, 3)
