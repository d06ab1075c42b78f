"""Batches: the same for any number of workers, and honest about unreadable images."""

import logging
import pickle
import random
import time
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from data import build_dataset  # noqa: F401  registers the formats
from data.batch_memory import BatchMemory
from data.decoders import DECODERS, make_decoder
from data.finish import Finish, RandomErasing
from data.loader import (
    Loader,
    Samples,
    UnreadableImageError,
    preserved_rng,
    seed_rng,
    seeded,
    warn_of_too_many_workers,
)
from data.registry import ImageDataset, create_dataset
from data.samplers import EvalBatchSampler, Key, TrainBatchSampler
from data.transforms import eval_transform, train_transform

FINISH = Finish([0.5], [0.25])


def noise(size=40, per_class=4, side=24):
    options = dict(img_size=(side, side), train_size=size, num_classes=size // per_class)
    return create_dataset("synthetic", "", "train", **options)


def train_loader(dataset, batch_size=8, num_workers=0, repeats=1, **options):
    transform = train_transform(
        (24, 24),
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="random",
    )
    erasing = RandomErasing(0.5, count=2)
    samples = Samples(dataset, transform, seed=3, training=True, erasing=erasing, **options)
    sampler = TrainBatchSampler(len(dataset), batch_size, seed=3, repeats=repeats)
    return Loader(samples, sampler, FINISH, num_workers=num_workers)


def eval_loader(dataset, batch_size=4, num_workers=0, rank=0, world_size=1, **options):
    samples = Samples(dataset, eval_transform((24, 24)), **options)
    sampler = EvalBatchSampler(len(dataset), batch_size, rank=rank, world_size=world_size)
    return Loader(samples, sampler, FINISH, num_workers=num_workers)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True):
        assert images.equal(other_images)
        assert labels.equal(other_labels)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_batches_are_the_same_for_any_number_of_workers_and_any_start(num_workers):
    """Trap 16: after a resume the same batches must come as without it."""
    alone = train_loader(noise())
    loader = train_loader(noise(), num_workers=num_workers)
    for epoch, start in ((0, 0), (1, 2), (7, 0)):
        alone.set_position(epoch)
        expected = list(alone)
        loader.set_position(epoch, start)
        assert_same(list(loader), expected[start:])
        assert len(loader) == len(expected) == 5


def test_an_epoch_that_was_left_early_does_not_leak_into_the_next():
    loader = train_loader(noise(), num_workers=2)
    for _ in loader:
        break
    loader.set_position(1)
    alone = train_loader(noise())
    alone.set_position(1)
    assert_same(list(loader), list(alone))


def test_a_sample_is_augmented_differently_in_every_epoch_and_copy():
    samples = train_loader(noise()).dataset
    images = [samples[key].pixels for key in (Key(0, 5), Key(1, 5), Key(0, 5, copy=1), Key(0, 5))]
    assert np.array_equal(images[0], images[3])
    assert not any(np.array_equal(images[0], other) for other in images[1:3])


def test_what_is_erased_of_a_sample_depends_on_its_key_alone():
    """Whatever is in its batch: a resumed run, or one with other workers, erases the same."""
    samples = train_loader(noise()).dataset
    keys = [Key(epoch, index) for epoch in range(2) for index in range(20)]
    erasures = [samples[key].erasures for key in keys]
    batch = samples.__getitems__(keys[::-1])
    expected = [(i, *erasure) for i, drawn in enumerate(erasures[::-1]) for erasure in drawn]
    assert batch.erasures.tolist() == [list(row) for row in expected]
    drawn = [tuple(erasure) for sample in erasures for erasure in sample]
    assert len(set(drawn)) == len(drawn) > 15


def test_workers_deliver_bytes():
    loader = train_loader(noise(), num_workers=1)
    raw = next(loader.raw_batches())
    assert (raw.images.shape, raw.images.dtype) == ((8, 3, 24, 24), torch.uint8)
    assert raw.erasures.shape[1] == 6
    images, labels = next(iter(train_loader(noise())))
    assert images.dtype == torch.float32
    assert images.equal(FINISH(raw.images, raw.erasures))
    assert labels.equal(raw.labels)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_write_into_a_few_slots_and_never_over_a_batch_in_use(num_workers):
    """Each batch is looked at only after the workers had time for all that they may do ahead."""
    own, theirs = train_loader(noise()), train_loader(noise(), num_workers=num_workers)
    for epoch in range(3):
        own.set_position(epoch), theirs.set_position(epoch)
        expected = list(own.raw_batches())
        for batch, received in zip(expected, theirs.raw_batches(), strict=True):
            time.sleep(0.05)
            assert received.images.equal(batch.images)
    assert len(expected) * 3 > 3 * num_workers == len(theirs.memory)


class Flaky(ImageDataset):
    """Images that cannot be read while a file is there."""

    def __init__(self, dataset, flag):
        self.dataset, self.classes, self.flag = dataset, dataset.classes, flag

    def __len__(self):
        return len(self.dataset)

    def read(self, index):
        if self.flag.exists() and index % 4:
            raise OSError("the disk is gone")
        return self.dataset.read(index)


def test_a_loader_goes_on_after_batches_that_failed(tmp_path):
    """A slot of a batch that failed on the way was never sent."""
    flag = tmp_path / "flag"
    flag.touch()
    loader = train_loader(Flaky(noise(), flag), num_workers=1)
    for _ in range(2):
        with pytest.raises(UnreadableImageError):
            list(loader)
    flag.unlink()
    assert_same(list(loader), list(train_loader(noise())))


def test_two_loaders_of_the_same_samples_do_not_mix_their_batches():
    loader = train_loader(noise(), num_workers=1)
    other = Loader(loader.dataset, EvalBatchSampler(40, 8), FINISH, num_workers=1)
    for (images, _), (others, _) in zip(loader, other, strict=True):
        assert not images.equal(others)
    alone = train_loader(noise())
    assert_same(list(loader), list(alone))
    assert_same(list(other), list(Loader(alone.dataset, EvalBatchSampler(40, 8), FINISH)))


def test_workers_may_be_started_afresh():
    """Python's default from 3.14 on; nothing is inherited then."""
    loader = train_loader(noise(), num_workers=1)
    context = loader.multiprocessing_context = torch.multiprocessing.get_context("spawn")
    loader.dataset._skipped = context.Value("q", 0)  # would be, where this is the default
    assert_same(list(loader), list(train_loader(noise())))


def test_slots_grow_with_their_batches():
    """Evaluation ends with a smaller batch; nothing says that one is not followed by a larger one."""
    memory = BatchMemory(slots=2)
    for size in (2, 1, 3, 3, 1, 2):
        slot = memory.take(worker=0, shape=(size, 4))
        slot.images.fill_(size)
        arrived = pickle.loads(ForkingPickler.dumps(slot))
        assert arrived.shape == (size, 4)
        assert arrived.eq(size).all()


@pytest.mark.parametrize("key", [(3, 0, 5, 1), (0,)])
def test_a_generator_of_its_own_draws_what_the_global_one_does(key):
    with preserved_rng():
        seed_rng(*key)
        expected = [random.random() for _ in range(5)]
    rng = seeded(*key)
    assert [rng.random() for _ in range(5)] == expected


def test_loading_leaves_the_generators_of_the_process_alone():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(2).tolist(), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    list(train_loader(noise()))
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected


def test_seeded_generators_are_put_back_after_an_error():
    state = torch.get_rng_state()
    with suppress(RuntimeError), preserved_rng():
        seed_rng(1, 2)
        raise RuntimeError
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_101_images_once_in_the_same_batches(world_size):
    """Trap 13: distributed evaluation counts duplicates."""
    dataset = noise(101, per_class=1)
    whole = list(eval_loader(dataset, batch_size=8))
    for rank in range(world_size):
        part = list(eval_loader(dataset, 8, rank=rank, world_size=world_size))
        assert_same(part, whole[rank::world_size])
    assert torch.cat([labels for _, labels in whole]).tolist() == list(range(101))
    assert whole[-1][0].shape == (5, 3, 24, 24)
    assert whole[0][1].dtype == torch.int64


def needed(decoder):
    """Skip where the optional package of a decoder is missing."""
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")


# -- unreadable images ----------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Twelve JPEG files, the third truncated and the eighth no image at all."""
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "train" / f"{i // 6}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{i:02d}.jpg"
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path)
        if i == 2:
            path.write_bytes(path.read_bytes()[:-200])
        if i == 7:
            path.write_bytes(b"<html>not found</html>")
    return create_dataset("imagenet", str(tmp_path), "train")


def test_truncated_images_are_not_accepted_anywhere():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("make", [train_loader, eval_loader])
@pytest.mark.parametrize("decoder", DECODERS)
def test_an_unreadable_image_raises_an_error_that_names_the_file(
    damaged, make, num_workers, decoder
):
    """Trap: OpenCV fills what is missing of a JPEG with gray, and says nothing."""
    needed(decoder)
    damaged.decode = make_decoder(decoder)
    with pytest.raises(UnreadableImageError, match=r"cannot read .*train/(0/02|1/07).jpg: "):
        list(make(damaged, batch_size=6, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_can_leave_unreadable_images_out(damaged, num_workers, caplog):
    with caplog.at_level(logging.WARNING):
        loader = eval_loader(damaged, batch_size=4, num_workers=num_workers, on_error="skip")
        batches = list(loader)
    assert [len(images) for images, _ in batches] == [3, 3, 4]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 5 + [1] * 5
    assert loader.skipped == 2
    if not num_workers:
        assert "02.jpg" in caplog.text
        assert "07.jpg" in caplog.text


def test_a_batch_without_any_readable_image_is_left_out(damaged):
    loader = eval_loader(damaged, batch_size=1, on_error="skip")
    assert [len(images) for images, _ in loader] == [1] * 10


def test_training_replaces_unreadable_images_by_the_same_ones_in_every_run(damaged):
    loader = train_loader(damaged, batch_size=6, on_error="skip")
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [6, 6]
    assert loader.skipped == 2
    workers = train_loader(damaged, batch_size=6, num_workers=2, on_error="skip")
    assert_same(list(workers), batches)
    assert workers.skipped == 2
    plain = Samples(damaged, eval_transform((24, 24)), training=True, on_error="skip")
    assert np.array_equal(plain[Key(0, 2)].pixels, plain[Key(0, 3)].pixels)


def test_skipping_gives_up_when_nothing_can_be_read(tmp_path):
    path = tmp_path / "train" / "a" / "x.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    dataset = create_dataset("imagenet", str(tmp_path), "train")
    with pytest.raises(UnreadableImageError, match="100 unreadable images in a row"):
        list(train_loader(dataset, batch_size=1, on_error="skip"))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("content", "label", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), 2, r"image \d of 4: label 2 must be in 0 ... 1"),
        (np.zeros((8, 8, 3), np.uint8), -1, "label -1 must be in 0 ... 1"),
        (np.zeros((8, 8, 3), np.uint8), "cat", "label 'cat' is no whole number"),
        (np.zeros((8, 8, 3)), 0, r"image \d of 4: an array of float64, where"),
        ("a.png", 0, "str, where a PIL image or an array of uint8 is expected"),
    ],
)
def test_a_format_that_gives_something_else_is_told(content, label, message, num_workers):
    class Wrong(ImageDataset):
        classes: ClassVar[list[str]] = ["cat", "dog"]

        def __len__(self):
            return 4

        def read(self, index):
            return content, label

    with pytest.raises((TypeError, IndexError), match=message):
        next(iter(eval_loader(Wrong(), num_workers=num_workers)))


def test_an_unknown_way_to_treat_errors_is_an_error():
    with pytest.raises(ValueError, match=r"DATA.ON_ERROR='ignore' must be one of"):
        eval_loader(noise(), on_error="ignore")


def test_too_many_workers_are_warned_of_with_the_number_per_process(caplog):
    """Trap 11: NUM_WORKERS is per process, and too many of them slow each other down."""
    with caplog.at_level(logging.WARNING):
        warn_of_too_many_workers(0)
        assert not caplog.records
        warn_of_too_many_workers(10_000, local_processes=2)
    assert "DATA.NUM_WORKERS=10000 is per process: 20000 workers" in caplog.text


@pytest.mark.parametrize(("device", "pins"), [(None, False), ("cpu", False), ("cuda:1", True)])
def test_memory_is_pinned_for_a_gpu_only(device, pins, monkeypatch):
    """Pinning makes a CUDA context, which a run with DEVICE cpu must not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    samples = Samples(noise(), eval_transform((24, 24)))
    sampler = EvalBatchSampler(40, 4)
    device = torch.device(device) if device else None
    loader = Loader(samples, sampler, FINISH, device=device, pin_memory=True)
    assert loader.pin_memory == pins
