"""Batches of dense tasks: padding, normalisation, and the same samples whatever made them."""

import numpy as np
import pytest
import torch

from config import load_config
from data import build_data, build_loader
from data.build import check_data
from data.dense.loader import pad_to_batch
from tests.data.coco_files import write_coco
from tests.data.segmentation_files import write_ade


def sample(height, width, **target):
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    return image, dict(size=(height, width), **target)


def test_images_and_masks_are_padded_together():
    small = sample(20, 40, masks=torch.ones(2, 20, 40, dtype=torch.bool))
    large = sample(33, 30, masks=torch.ones(1, 33, 30, dtype=torch.bool))
    images, targets = pad_to_batch([small, None, large], size_divisor=32)
    assert images.shape == (2, 3, 64, 64)
    assert images.dtype == torch.uint8
    assert images[0, :, :20, :40].eq(200).all()
    assert images[0].count_nonzero() == 3 * 20 * 40
    assert [t["masks"].shape for t in targets] == [(2, 64, 64), (1, 64, 64)]
    assert [int(t["masks"].sum()) for t in targets] == [2 * 20 * 40, 33 * 30]


def test_labels_are_ignored_in_the_padding():
    images, (target,) = pad_to_batch([sample(20, 40, mask=torch.zeros(20, 40).long())], 32)
    assert target["mask"].shape == images.shape[2:] == (32, 64)
    assert target["mask"][:20, :40].eq(0).all()
    assert target["mask"].eq(255).sum() == 32 * 64 - 800


def test_a_mask_of_the_stored_size_is_left_alone():
    for size in ((10, 20), (20, 40)):  # also one that happens to be the image's
        stored = sample(20, 40, mask=torch.zeros(size).long())
        _, (target,) = pad_to_batch([stored], 32, training=False)
        assert target["mask"].shape == size


def test_no_sample_is_no_batch():
    assert pad_to_batch([None]) is None


@pytest.fixture
def coco(tmp_path):
    write_coco(tmp_path, num_images=5)
    return load(tmp_path, "detection", "mask_rcnn", "coco")


@pytest.fixture
def ade(tmp_path):
    write_ade(tmp_path, val=4)
    return load(tmp_path, "segmentation", "semantic_fpn", "ade20k")


def load(root, task, head, dataset, *opts):
    opts = [
        *("TASK", task, "MODEL.HEAD.TYPE", head, "DATA.DATASET", dataset),
        *("DATA.DATA_PATH", str(root), "DATA.BATCH_SIZE", "2", "DATA.NUM_WORKERS", "0"),
        *("AUG.DETECTION.SHORT_SIDES", "[40, 56]", "AUG.DETECTION.LONG_SIDE", "80"),
        *("TEST.DETECTION.SHORT_SIDE", "48", "TEST.DETECTION.LONG_SIDE", "80"),
        *("AUG.SEGMENTATION.RESIZE", "[128, 48]", "AUG.SEGMENTATION.CROP", "[40, 48]"),
        *("TEST.SEGMENTATION.RESIZE", "[128, 48]"),
        *opts,
    ]
    return load_config("configs/_base_/dense.yaml", opts)


@pytest.mark.parametrize("kind", ["coco", "ade"])
def test_batches_are_normalised_and_zero_in_the_padding(kind, request):
    config = request.getfixturevalue(kind)
    loader = build_loader(config, "train")
    loader.set_position(0)
    for images, targets in loader:
        assert images.dtype == torch.float32
        assert images.shape[0] == len(targets) == 2
        assert images.shape[2] % 32 == images.shape[3] % 32 == 0
        for image, target in zip(images, targets, strict=True):
            height, width = target["size"]
            assert image[:, height:].eq(0).all()
            assert image[:, :, width:].eq(0).all()
            assert image[:, :height, :width].std() > 0


@pytest.mark.parametrize("kind", ["coco", "ade"])
def test_evaluation_takes_each_image_alone_and_once(kind, request):
    config = request.getfixturevalue(kind)
    whole = [targets[0]["image_id"] for _, targets in build_loader(config, "val")]
    assert len(set(whole)) == len(whole) > 2
    shares = [build_loader(config, "val", rank=rank, world_size=3) for rank in range(3)]
    found = [targets[0]["image_id"] for loader in shares for _, targets in loader]
    assert sorted(map(str, found)) == sorted(map(str, whole))


@pytest.mark.parametrize("kind", ["coco", "ade"])
def test_workers_change_no_sample(kind, request):
    config = request.getfixturevalue(kind)
    batches = []
    for workers in (0, 2):
        opts = load(
            config.DATA.DATA_PATH, config.TASK, config.MODEL.HEAD.TYPE, config.DATA.DATASET,
            "DATA.NUM_WORKERS", str(workers),
        )  # fmt: skip
        loader = build_loader(opts, "train")
        loader.set_position(1)
        batches.append(list(loader))
    for (images, targets), (others, theirs) in zip(*batches, strict=True):
        assert torch.equal(images, others)
        for mine, other in zip(targets, theirs, strict=True):
            assert mine.keys() == other.keys()
            for key, value in mine.items():
                equal = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                assert equal(value, other[key]), key


def test_classes_come_along(coco, ade):
    assert build_data(coco).classes == ["disc", "square", "triangle"]
    assert build_data(coco).val.dataset.dataset.category_ids == [3, 7, 20]
    assert build_data(ade).num_classes == len(build_data(ade).classes) == 3


def test_formats_are_known_per_task(tmp_path):
    config = load(tmp_path, "segmentation", "semantic_fpn", "coco")
    with pytest.raises(
        ValueError, match="'coco' is not a known format for TASK 'segmentation'; it is one"
    ):
        build_data(config)


def test_keys_of_classification_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"TEST.TTA='flip' is for classification.*leave it 'none'"):
        load(tmp_path, "detection", "retinanet", "coco", "TEST.TTA", "flip")
    with pytest.raises(ValueError, match=r"no head for TASK='detection'"):
        load(tmp_path, "detection", "upernet", "coco")


def test_an_unreadable_image_is_named(coco):
    dataset = build_loader(coco, "val").dataset
    path = dataset.dataset.describe(1)
    np.zeros(3).tofile(path)
    with pytest.raises(OSError, match=f"cannot read {path}.*take the image out of the data"):
        list(build_loader(coco, "val"))


def test_fewer_images_than_a_batch_are_known_before_training(coco):
    config = load(coco.DATA.DATA_PATH, "detection", "mask_rcnn", "coco", "DATA.BATCH_SIZE", "6")
    with pytest.raises(ValueError, match="5 images, and one batch needs 6"):
        check_data(config)
    with pytest.raises(ValueError, match="one batch needs 6"):
        check_data(coco, world_size=3)
