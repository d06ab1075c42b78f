"""WebDataset shards: any image by itself, whole shards only, and whatever is wrong is named."""

import gzip
import io
import json
import logging
import tarfile

import pytest
from PIL import Image

from data.formats import webdataset
from data.registry import create_dataset
from data.shards import expand_braces, find_shards


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    """Members in order: name -> bytes; None makes a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def samples(first, labels):
    members = []
    for number, label in enumerate(labels, first):
        members += [(f"{number:04d}.png", png(number)), (f"{number:04d}.cls", b"%d" % label)]
    return members


def read(root, split="train", **options):
    return create_dataset("webdataset", str(root), split, **options)


def contents(dataset):
    return [dataset.read(i) for i in range(len(dataset))]


@pytest.fixture
def root(tmp_path):
    write_tar(tmp_path / "train-000.tar", samples(0, [1, 0, 1]))
    write_tar(tmp_path / "train-001.tar", samples(3, [2, 0]))
    write_tar(tmp_path / "val-000.tar", samples(5, [0]))
    webdataset._INDICES.clear()
    return tmp_path


def test_samples_are_those_of_all_shards_in_order(root):
    train = read(root)
    assert contents(train) == [(png(i), label) for i, label in enumerate([1, 0, 1, 2, 0])]
    assert train.classes == ["0", "1", "2"]
    assert read(root, "val").classes == train.classes
    assert train[4][0].getpixel((0, 0)) == (4, 0, 0)
    assert train.describe(3) == f"{root}/train-001.tar@/0003.png"


def test_shards_are_walked_once_and_their_index_is_kept(root, monkeypatch, caplog):
    expected = contents(read(root))
    kept = sorted(root.glob(".webdataset-*.npz"))
    assert len(kept) == 2
    webdataset._INDICES.clear()
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "walk", lambda path: pytest.fail(f"{path} was walked again"))
        assert contents(read(root)) == expected
    # Another content: walked again, by itself.
    write_tar(root / "train-001.tar", samples(7, [2]))
    assert [label for _, label in contents(read(root))] == [1, 0, 1, 2]
    for path in kept:
        path.write_bytes(b"damaged")
    webdataset._INDICES.clear()
    write_tar(root / "train-001.tar", samples(3, [2, 0]))
    with caplog.at_level(logging.WARNING):
        assert [label for _, label in contents(read(root))] == [1, 0, 1, 2, 0]
    assert "the shards are walked again" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(root, monkeypatch, caplog):
    def refused(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(webdataset.np, "savez", refused)
    with caplog.at_level(logging.INFO):
        assert len(read(root)) == 5
    assert "the index is not kept (read-only)" in caplog.text
    assert not list(root.glob(".webdataset*"))


def test_labels_may_be_in_json_and_names_may_be_long(tmp_path):
    folder = "x" * 120 + "/n01440764/"
    members = [
        ("x" * 120, None),
        (folder + "a.jpeg", b"image a"),
        (folder + "a.json", json.dumps({"label": 0, "size": [3, 2]}).encode()),
        (folder.replace("n01440764", "n02") + "b.seg.txt", b"not used"),
        (folder.replace("n01440764", "n02") + "b.JPG", b"image b"),
        (folder.replace("n01440764", "n02") + "b.json", b'{"cls": 1}'),
        (".hidden", b""),
        ("README", b""),
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        write_tar(tmp_path / f"{form}" / "train.tar", members, form)
        dataset = read(tmp_path / f"{form}")
        assert contents(dataset) == [(b"image a", 0), (b"image b", 1)]
        assert dataset.classes == ["n01440764", "n02"]


def test_classes_are_named_by_a_file_if_there_is_one(root):
    (root / "classnames.txt").write_text("tench\ngoldfish\nshark\nray\n")
    assert read(root, "val").classes == ["tench", "goldfish", "shark", "ray"]
    (root / "classnames.txt").write_text("tench\n")
    with pytest.raises(ValueError, match=r"'0000.png' has label 1, out of range: 1 classes"):
        read(root)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x")], r"sample 'a' must have its label.*it has \['png'\]"),
        ([("a.png", b"x"), ("a.cls", b"cat")], r"in .cls, .* with b'cat'"),
        ([("a.png", b"x"), ("a.cls", b"-1")], r"number from 0 on.* with -1"),
        ([("a.png", b"x"), ("a.json", b"[1]")], r"'label' or 'cls' in .json"),
        ([("a.png", b"x"), ("a.json", b"{")], r"with b'{'"),
        ([("a.cls", b"0")], r"sample 'a' must have one image"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"0")], r"must have one image"),
        ([("a.png", b"x"), ("a.png", b"x")], r"has two .png files in a row"),
        (samples(0, [0, 2]), r"labels must be 0 to 2 without a gap, and no image has \[1\]"),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, members, message):
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_damaged_shards_are_named(root):
    path = root / "train-001.tar"
    good = path.read_bytes()
    path.write_bytes(gzip.compress(good))
    with pytest.raises(ValueError, match=r"train-001.tar is no uncompressed tar archive"):
        read(root)
    path.write_bytes(good[:1024])  # cut off where one member ends, and within one
    with pytest.raises(ValueError, match=r"train-001.tar is damaged or cut off"):
        read(root)
    path.write_bytes(good[:600])
    with pytest.raises(ValueError, match=r"train-001.tar"):
        read(root)
    damaged = bytearray(good)
    damaged[2 * 512 : 2 * 512 + 20] = (
        b"\xff" * 20
    )  # a header in the middle: tarfile stops in silence
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"train-001.tar is damaged or cut off: after \d+ bytes"):
        read(root)


def test_a_shard_that_shrinks_later_is_noticed_when_it_is_read(root):
    dataset = read(root)
    (root / "train-001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="the shard is cut off"):
        dataset.read(4)


# -- which files ---------------------------------------------------------------------------------------


def test_braces_expand_to_all_pairs():
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain") == ["plain"]


def test_shards_are_found_by_name_or_by_pattern(tmp_path):
    names = [
        "imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar",
        "restraint-0.tar", "training.tar",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()

    def find(split, pattern=""):
        found = find_shards(tmp_path, split, pattern, ".tar", "DATA.WEBDATASET.KEY")
        return [path.name for path in found]

    assert find("train") == names[:2]
    assert find("val") == names[2:3]
    assert find("train", "imagenet1k-train-{0000..0001}.tar") == names[:2]
    assert find("train", "{training,restraint-*}.tar") == ["training.tar", "restraint-0.tar"]
    with pytest.raises(FileNotFoundError, match=r"train-0002.tar does not exist \(DATA.WEBDATASET"):
        find("train", "imagenet1k-train-{0000..0002}.tar")
    for pattern, message in (("train-{3..1}.tar", "names nothing"), ("/x.tar", "is not relative")):
        with pytest.raises(ValueError, match=f"DATA.WEBDATASET.KEY='{pattern[:2]}.*{message}"):
            find("train", pattern)
    (tmp_path / names[2]).unlink()
    with pytest.raises(FileNotFoundError, match=r"no .tar files of the split 'val'.*set DATA.WEBD"):
        find("val")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_shards(tmp_path / "nowhere", "train", "", ".tar", "KEY")


def test_a_missing_part_of_a_numbered_set_is_named(tmp_path):
    (tmp_path / "train-00000-of-00002.parquet").touch()
    with pytest.raises(FileNotFoundError, match=r"train-00001-of-00002.parquet does not exist"):
        find_shards(tmp_path, "train", "", ".parquet", "KEY")
