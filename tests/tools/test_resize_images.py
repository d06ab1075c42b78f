"""A reduced copy of a tree of images: same names, same classes, nothing lost without a word."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data import build_dataset  # noqa: F401  registers the formats
from data.registry import create_dataset
from tools import resize_images
from tools.resize_images import main, resize_tree


def picture(height, width, mode="RGB"):
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows % 256, columns % 256, (rows + columns) % 256], 2).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def tree(tmp_path):
    """Images of several kinds, a small one, and a text file."""
    root = tmp_path / "source"
    for name in ("train/ant", "train/bee", "val/ant", "val/bee"):
        (root / name).mkdir(parents=True)
    picture(80, 120).save(root / "train/ant/wide.JPEG")
    picture(99, 66).save(root / "train/bee/tall.png")
    picture(80, 120, "L").save(root / "val/ant/gray.jpg")
    picture(80, 120, "CMYK").save(root / "val/bee/print.jpg")
    picture(30, 200).save(root / "val/bee/small.jpg", quality=30)
    (root / "classes.txt").write_text("ant\nbee\n")
    return root


def test_linked_folders_are_copied_too(tree, tmp_path):
    """As the loaders see them: without, a copy would lack classes, and train."""
    (tmp_path / "elsewhere").mkdir()
    picture(80, 120).save(tmp_path / "elsewhere" / "one.jpg")
    (tree / "train" / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    resize_tree(tree, tmp_path / "target", 40)
    assert "train/cat/one.jpg" in names(tmp_path / "target")


def names(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def stored(path):
    """Size, format and mode of an image file, and its pixels."""
    with Image.open(path) as image:
        return (image.size, image.format, image.mode), np.asarray(image)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_shorter_side_is_reduced_and_the_tree_is_kept(tree, tmp_path, workers):
    target = tmp_path / "target"
    report = resize_tree(tree, target, 40, workers=workers)
    assert report == dict(resized=4, copied=2, kept=0, damaged={})
    assert names(target) == names(tree)
    kinds = {name: stored(target / name)[0] for name in names(target) if name != "classes.txt"}
    assert kinds == {
        "train/ant/wide.JPEG": ((60, 40), "JPEG", "RGB"),
        "train/bee/tall.png": ((40, 60), "PNG", "RGB"),
        "val/ant/gray.jpg": ((60, 40), "JPEG", "L"),
        "val/bee/print.jpg": ((60, 40), "JPEG", "RGB"),
        "val/bee/small.jpg": ((200, 30), "JPEG", "RGB"),
    }
    for name in ("val/bee/small.jpg", "classes.txt"):
        assert (target / name).read_bytes() == (tree / name).read_bytes()
    dataset = create_dataset("imagenet", str(target), "train")
    assert (len(dataset), dataset.classes) == (2, ["ant", "bee"])


def test_pixels_are_those_of_pils_filter_and_quality_counts(tree, tmp_path):
    resize_tree(tree, tmp_path / "target", 40)
    expected = picture(99, 66).resize((40, 60), Image.Resampling.BICUBIC)
    assert np.array_equal(stored(tmp_path / "target/train/bee/tall.png")[1], expected)
    resize_tree(tree, tmp_path / "coarse", 40, quality=20)
    fine, coarse = (
        (tmp_path / name / "train/ant/wide.JPEG").stat().st_size for name in ("target", "coarse")
    )
    assert coarse < fine


def test_an_image_of_16_bits_is_copied(tree, tmp_path):
    path = tree / "train/ant/deep.png"
    Image.fromarray(np.linspace(0, 2**16 - 1, 60 * 90).reshape(60, 90).astype("uint16")).save(path)
    report = resize_tree(tree, tmp_path / "target", 40)
    assert report == dict(resized=4, copied=3, kept=0, damaged={})
    assert (tmp_path / "target/train/ant/deep.png").read_bytes() == path.read_bytes()


def test_existing_files_are_kept_so_that_an_interrupted_run_continues(tree, tmp_path):
    target = tmp_path / "target"
    resize_tree(tree, target, 40)
    (target / "train/ant/wide.JPEG").write_bytes(b"mine")
    (target / "train/bee/tall.png").unlink()
    assert resize_tree(tree, target, 40) == dict(resized=1, copied=0, kept=5, damaged={})
    assert (target / "train/ant/wide.JPEG").read_bytes() == b"mine"


def test_damaged_files_are_reported_and_left_out(tree, tmp_path, capsys):
    path = tree / "train/ant/wide.JPEG"
    path.write_bytes(path.read_bytes()[:500])
    (tree / "val/bee/small.jpg").write_bytes(b"<html>")
    command = [str(tree), str(tmp_path / "target"), "--side", "40", "--workers", "0"]
    assert main([*command, "--report", str(tmp_path / "report.json")]) == 1
    text = capsys.readouterr().out
    assert f"damaged: {path}: OSError" in text
    assert "3 resized, 1 copied, 0 kept, 2 damaged" in text
    assert set(json.loads((tmp_path / "report.json").read_text())["damaged"]) == {
        str(path),
        str(tree / "val/bee/small.jpg"),
    }
    assert len(names(tmp_path / "target")) == 4


def test_nothing_half_written_stays_behind(tree, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(resize_images.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resize_tree(tree, tmp_path / "target", 40)
    assert names(tmp_path / "target") == []


def test_a_full_disk_is_not_a_damaged_image(tree, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit):
        resize_images.main([str(tree), str(tmp_path / "t"), "--side", "40", "--workers", "0"])
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "side", "quality", "message"),
    [("source", 40, 90, "must lie outside"), ("source/small", 40, 90, "must lie outside"),
     ("t", 0, 90, "--side 0"), ("t", 40, 101, "--quality 101")],
)  # fmt: skip
def test_mistakes_stop_before_anything_is_written(tree, tmp_path, target, side, quality, message):
    before = names(tmp_path)
    with pytest.raises(ValueError, match=message):
        resize_tree(tree, tmp_path / target, side, quality=quality)
    assert names(tmp_path) == before
    with pytest.raises(FileNotFoundError, match="is no folder"):
        resize_tree(tmp_path / "nowhere", tmp_path / "t", 40)


def test_colour_profiles_and_turned_images_are_stored_as_loaders_see_them(tree, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    picture(80, 120).save(content, "JPEG", exif=exif, icc_profile=b"profile")
    (tree / "train/ant/turned.jpg").write_bytes(content.getvalue())
    resize_tree(tree, tmp_path / "target", 40)
    with Image.open(tmp_path / "target/train/ant/turned.jpg") as image:
        assert image.size == (60, 40)
        assert not image.getexif()
        assert "icc_profile" not in image.info


def test_a_folder_without_files_is_told(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty has no file"):
        resize_images.resize_tree(tmp_path / "empty", tmp_path / "out", 20, workers=0)
    assert not (tmp_path / "out").exists()
