"""Stored labels of positions: files, what the workers make of them, and how they are cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import load_config
from data.build import build_loader, check_data
from data.label_maps import LabelMaps, MappedLabels
from data.transforms import WHOLE
from models import CONFIG_DIR
from tasks.token_labels import cut_maps

SMOKE = CONFIG_DIR / "_base_" / "smoke_cls.yaml"
CLASSES = ("cat", "dog", "emu")


def label_map(best, k=2, size=4):
    """Map (2, k, size, size) whose best class at each position is `best`."""
    classes = torch.stack([torch.full((size, size), (best + i) % len(CLASSES)) for i in range(k)])
    scores = torch.arange(k, 0, -1.0)[:, None, None].expand(k, size, size)
    return torch.stack([scores, classes]).half()


@pytest.fixture
def folders(tmp_path) -> Path:
    """Images of three classes in two splits, and the training images' maps."""
    for label, name in enumerate(CLASSES):
        for split in ("train", "val"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(4):
                noise = np.random.default_rng(number).integers(0, 255, (50, 70, 3), np.uint8)
                Image.fromarray(noise).save(tmp_path / "data" / split / name / f"{number}.a.png")
        (tmp_path / "maps" / name).mkdir(parents=True)
        for number in range(4):
            torch.save(label_map(label), tmp_path / "maps" / name / f"{number}.pt")
    return tmp_path


def config_of(folders, *opts, workers=0):
    words = ["DATA.DATASET", "folder", "DATA.DATA_PATH", str(folders / "data"), "DATA.IMG_SIZE", 64]
    words += ["TRAIN.TOKEN_LABELS.ENABLE", True, "TRAIN.TOKEN_LABELS.MAPS", str(folders / "maps")]
    words += ["DATA.BATCH_SIZE", 4, "DATA.NUM_WORKERS", workers, "AUG.MIXUP", 0, "AUG.CUTMIX", 0]
    return load_config(SMOKE, [*words, *opts])


@pytest.mark.parametrize("workers", [0, 1])
def test_every_image_comes_with_its_map_and_window(folders, workers):
    loader = build_loader(config_of(folders, "AUG.HFLIP", 1.0, workers=workers), "train")
    loader.set_position(0)
    count = 0
    for images, targets in loader:
        assert isinstance(targets, MappedLabels)
        assert targets.scores.dtype == torch.float16
        assert torch.equal(targets.scores[:, 1, 0, 0, 0].long(), targets.labels)
        left, top, right, bottom = targets.windows.unbind(1)
        assert (right < left).all()
        assert (top < bottom).all()
        assert torch.unique(targets.windows, dim=0).shape == (len(images), 4)
        count += len(images)
    assert count == 12


def test_maps_change_no_image(folders):
    """Drawing the window again leaves the numbers of the transform and of erasing alone."""
    batches = []
    for opts in ([], ["TRAIN.TOKEN_LABELS.ENABLE", False]):
        loader = build_loader(config_of(folders, *opts), "train")
        loader.set_position(0)
        batches.append([images for images, _ in loader])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_evaluation_reads_no_maps(folders):
    _, labels = next(iter(build_loader(config_of(folders), "val")))
    assert labels.shape == (4,)


def test_a_skipped_image_takes_the_map_of_the_one_in_its_place(folders):
    (folders / "data" / "train" / "cat" / "3.a.png").write_bytes(b"")
    loader = build_loader(config_of(folders, "DATA.ON_ERROR", "skip"), "train")
    loader.set_position(0)
    for _, targets in loader:
        assert torch.equal(targets.scores[:, 1, 0, 0, 0].long(), targets.labels)
    assert loader.skipped == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (torch.zeros(3, 4, 4), r"must be a tensor \(2, k, height, width\), not \(3, 4, 4\)"),
        ({"a": 1}, "not dict"),
        (label_map(2) + 1, "names class 3, the data has 3"),
    ],
)
def test_a_map_that_is_none_is_named_with_its_image(folders, content, message):
    path = folders / "maps" / "cat" / "0.pt"
    path.unlink()
    if content is not None:
        torch.save(content, path)
    loader = build_loader(config_of(folders), "train")
    loader.set_position(0)
    with pytest.raises(OSError, match=rf"cannot read .*cat/0\.a\.png: .*cat/0\.pt .*{message}"):
        list(loader)


def test_maps_of_several_sizes_are_refused(folders):
    torch.save(label_map(0, size=5), folders / "maps" / "cat" / "0.pt")
    loader = build_loader(config_of(folders, "DATA.BATCH_SIZE", 12), "train")
    loader.set_position(0)
    with pytest.raises(ValueError, match=r"maps must have one size, not \[\(2, 2, 4, 4\), \(2, 2"):
        list(loader)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.TOKEN_LABELS.MAPS", "nowhere"], "MAPS='nowhere' is no folder"),
        (["AUG.CROP", "simple"], "set AUG.CROP resized"),
        (["DATA.IMG_SIZE", 32], "DATA.IMG_SIZE beyond 32 pixels"),
        (["DATA.DATASET", "synthetic", "DATA.ON_DEVICE", True], "MAPS are read by workers"),
    ],
)
def test_what_maps_cannot_follow_is_refused_before_an_image_is_read(folders, opts, message):
    with pytest.raises(ValueError, match=message):
        check_data(config_of(folders, *opts))


def test_more_classes_than_half_precision_can_count_are_refused(tmp_path):
    LabelMaps(str(tmp_path), 2048)
    with pytest.raises(ValueError, match="tell 2048 classes apart, the data has 2049"):
        LabelMaps(str(tmp_path), 2049)


# -- cutting -------------------------------------------------------------------------------------------


def cut(scores, window, grid, num_classes=7):
    """`cut_maps` of one map (2, k, h, w) and window -> (*grid, K)."""
    targets = MappedLabels(torch.tensor([0]), scores[None], torch.tensor([window]))
    return cut_maps(targets, grid, num_classes)[0]


def random_map(height, width, k=3, num_classes=7):
    classes = torch.rand(height, width, num_classes).argsort(-1)[..., :k].permute(2, 0, 1)
    return torch.stack([torch.rand(k, height, width), classes]).half()


def dense(scores, num_classes=7):
    """The map written out, position by position: (h, w, K), 0 where a class is not stored."""
    _, k, height, width = scores.shape
    out = torch.zeros(height, width, num_classes)
    for row in range(height):
        for column in range(width):
            for rank in range(k):
                out[row, column, int(scores[1, rank, row, column])] = scores[
                    0, rank, row, column
                ].float()
    return out


def test_the_whole_map_at_its_own_size_is_itself():
    scores = random_map(5, 6)
    torch.testing.assert_close(cut(scores, WHOLE, (5, 6)), dense(scores))


def test_a_window_along_positions_is_a_slice_and_mirrors_with_the_image():
    scores = random_map(4, 8)
    part = dense(scores)[1:3, 2:6]
    left, top, right, bottom = 2 / 8, 1 / 4, 6 / 8, 3 / 4
    for window, expected in [
        ((left, top, right, bottom), part),
        ((right, top, left, bottom), part.flip(1)),
        ((left, bottom, right, top), part.flip(0)),
        ((right, bottom, left, top), part.flip(0, 1)),
    ]:
        torch.testing.assert_close(cut(scores, window, (2, 4)), expected)


def test_a_coarser_grid_averages_and_a_finer_one_interpolates():
    scores = random_map(4, 4)
    means = dense(scores).unflatten(0, (2, 2)).unflatten(2, (2, 2)).mean((1, 3))
    torch.testing.assert_close(cut(scores, WHOLE, (2, 2)), means)
    ramp = torch.stack([torch.arange(8.0).expand(1, 8, 8), torch.zeros(1, 8, 8)]).half()
    fine = cut(ramp, (0.25, 0.25, 0.75, 0.75), (8, 8))[..., 0]
    # Centres of the cells, in positions: column i lies at 2 + (i + 0.5) / 2 - 0.5.
    expected = (2 + (torch.arange(8) + 0.5) / 2 - 0.5).expand(8, 8)
    torch.testing.assert_close(fine, expected)


def test_each_map_of_a_batch_is_cut_by_its_own_window():
    first, second = random_map(4, 4), random_map(4, 4)
    windows = torch.tensor([[0.0, 0.0, 0.5, 0.5], [1.0, 0.5, 0.5, 1.0]])
    targets = MappedLabels(torch.tensor([0, 1]), torch.stack([first, second]), windows)
    both = cut_maps(targets, (2, 2), 7)
    torch.testing.assert_close(both[0], dense(first)[:2, :2])
    torch.testing.assert_close(both[1], dense(second)[2:, 2:].flip(1))
