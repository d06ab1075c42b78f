"""Images that lists name: any lists, the domains of DomainNet and PACS, ImageNet-22k."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data.formats.domainnet import DOMAINNET, PACS
from data.listing import Listing, Names, class_names, count_classes, read_list
from data.registry import create_dataset

CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
PER_CLASS = {"train": 3, "test": 2}


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    """A small PACS: domains and classes as published, 3 + 2 images per class, in list files.

    Domains are listed in an order of their own, and none has the labels in order.
    """
    root = tmp_path_factory.mktemp("pacs")
    rng = np.random.default_rng(0)
    for domain in PACS:
        for split, count in PER_CLASS.items():
            lines = []
            for label, name in enumerate(CLASSES):
                folder = root / domain / name
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    path = folder / f"{split}_{number}.png"
                    Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).save(path)
                    lines.append(f"{domain}/{name}/{path.name} {label}")
            lines = [lines[i] for i in rng.permutation(len(lines))]
            (root / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def listed(root, domains, split):
    """What the files say, read by another program: (path, label) in their order."""
    text = "".join((root / f"{d}_{split}.txt").read_text() for d in domains)
    pairs = [line.rsplit(" ", 1) for line in text.splitlines()]
    return [(str(root / path), int(label)) for path, label in pairs]


def contents(dataset):
    return [(dataset.describe(i), dataset.read(i)[1]) for i in range(len(dataset))]


@pytest.mark.parametrize("domains", [[d] for d in PACS] + [list(PACS), ["sketch", "photo"], []])
@pytest.mark.parametrize("split", ["train", "val"])
def test_pacs_is_what_its_lists_say_one_by_one_and_jointly(pacs, domains, split):
    dataset = create_dataset("pacs", str(pacs), split, domains=domains)
    ending = "train" if split == "train" else "test"
    used = domains or PACS
    assert contents(dataset) == listed(pacs, used, ending)
    assert dataset.classes == CLASSES
    counts = np.bincount([label for _, label in contents(dataset)]).tolist()
    assert counts == [PER_CLASS[ending] * len(used)] * 7


def test_list_files_of_any_name_are_read_in_the_same_way(pacs):
    options = dict(
        train=["photo_train.txt", "sketch_train.txt"], val=["photo_test.txt", "sketch_test.txt"]
    )
    for split in ("train", "val"):
        dataset = create_dataset("lists", str(pacs), split, **options)
        domains = create_dataset("pacs", str(pacs), split, domains=["photo", "sketch"])
        assert contents(dataset) == contents(domains)
        assert dataset.classes == CLASSES
    image, _ = dataset[3]
    assert image.size == (5, 4)


def test_the_same_domains_in_folders_give_the_same_images(pacs, tmp_path):
    for domain in ("photo", "sketch"):
        for split, ending in (("train", "train"), ("val", "test")):
            for path, label in listed(pacs, [domain], ending):
                file = tmp_path / domain / split / CLASSES[label] / path.rpartition("/")[2]
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, file)
    lists = create_dataset("pacs", str(pacs), "train", domains=["photo", "sketch"])
    folders = create_dataset("pacs", str(tmp_path), "train", domains=["photo", "sketch"])
    assert len(folders) == len(lists) == 42
    assert sorted(folders.read(i) for i in range(42)) == sorted(lists.read(i) for i in range(42))
    assert folders.classes == CLASSES
    assert folders.describe(41) == str(tmp_path / "sketch" / "train" / "person" / "train_2.png")
    single = create_dataset("pacs", str(tmp_path), "val", domains=["sketch"])
    assert len(single) == 14


def test_domains_in_folders_must_have_the_same_classes(tmp_path, write_images):
    write_images(tmp_path / "real", {"cat": 1, "dog": 1})
    write_images(tmp_path / "sketch", {"cat": 1})
    with pytest.raises(ValueError, match=r"only in train: \['dog'\]"):
        create_dataset("domainnet", str(tmp_path), "train", domains=["real", "sketch"])


def test_domainnet_has_its_classes_whatever_a_domain_lacks(tmp_path, write_images):
    write_images(tmp_path, {"zebra": 1}, "real")
    (tmp_path / "real_train.txt").write_text("real/zebra/0.png 344\n")
    dataset = create_dataset("domainnet", str(tmp_path), "train", domains=["real"])
    assert len(dataset.classes) == 345
    assert dataset.classes[344] == "zebra"
    assert dataset.classes[3] == "3"
    assert len(DOMAINNET) == 6


@pytest.mark.parametrize(
    ("domains", "error", "message"),
    [
        (["photos"], ValueError, r"unknown domain 'photos'; did you mean one of \['photo'\]"),
        (["photo", "sketch", "photo"], ValueError, r"names 'photo' twice"),
        (["photo", "sketch"], FileNotFoundError, r"lacks .*sketch_train.txt.*<domain>_train.txt"),
        ([], FileNotFoundError, r"art_painting_train.txt, .*cartoon_train.txt"),
    ],
)
def test_domains_that_are_not_there_are_named(tmp_path, domains, error, message):
    (tmp_path / "photo_train.txt").write_text("photo/dog/1.jpg 0\n")
    with pytest.raises(error, match=message):
        create_dataset("pacs", str(tmp_path), "train", domains=domains)


def test_domains_that_number_classes_differently_are_an_error(tmp_path):
    (tmp_path / "photo_train.txt").write_text("photo/dog/1.jpg 0\n")
    (tmp_path / "sketch_train.txt").write_text("sketch/cat/1.jpg 0\n")
    with pytest.raises(ValueError, match=r"label 0 is 'dog' in .*photo.* and 'cat' in .*sketch"):
        create_dataset("pacs", str(tmp_path), "train", domains=["photo", "sketch"])


# -- what is wrong with lists -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png 0\nb.png\n", r"list.txt, line 2: 'b.png' must be `path label`"),
        ("a.png 0\n\nb.png one\n", r"list.txt, line 3: 'b.png one'"),
        ("a.png -1\n", r"list.txt, line 1: 'a.png -1' must be `path label`, label >= 0"),
        ("a.png 1.0\n", r"line 1"),
        ("a.png 99999999999\n", r"line 1"),
        ("a.png 0\nb.png 99999999\n", r"no image has \[1, 2, 3, 4, 5\] \(99999998 are left out\)"),
        ("\n\n", r"list.txt lists no image"),
        ("a.png 1\nb.png 2\n", r"labels must be 0 to 2 .*has \[0\] .*start at 1"),
        (
            "a.png 0\nb.png 3\n",
            r"labels must be 0 to 3 without a gap.*has \[1, 2\] \(2 are left out\)",
        ),
        ("a.png 0\nc.png 1\n", r"c.png does not exist; .*list.txt lists it as 'c.png'"),
    ],
)
def test_a_damaged_list_is_named_with_its_line(tmp_path, write_images, text, message):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        create_dataset("lists", str(tmp_path), "train", train=["list.txt"], val=["none.txt"])


def test_a_list_that_is_no_text_is_named(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match=r"list.txt is no text file in UTF-8"):
        read_list(tmp_path / "list.txt")


def test_lists_need_files_that_exist_and_come_once(tmp_path):
    with pytest.raises(ValueError, match=r"needs DATA.LISTS.VAL: list files"):
        create_dataset("lists", str(tmp_path), "val", train=["a.txt"])
    with pytest.raises(FileNotFoundError, match=r"a.txt does not exist.*DATA.LISTS.TRAIN"):
        create_dataset("lists", str(tmp_path), "train", train=["a.txt"])
    (tmp_path / "a.txt").write_text("x 0\n")
    with pytest.raises(ValueError, match=r"names \['a.txt'\] twice"):
        create_dataset("lists", str(tmp_path), "train", train=["a.txt", "a.txt"])


def test_names_of_classes_come_from_a_file_if_there_is_one(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "with blank.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "with blank.png").rename(tmp_path / "images" / "with blank.png")
    (tmp_path / "list.txt").write_text("\ufeffwith blank.png\t1\r\n", encoding="utf-8")
    options = dict(train=["list.txt"], images="images")

    def build(**more):
        return create_dataset("lists", str(tmp_path), "train", **options, **more)

    (tmp_path / "classes.txt").write_text("cat\nsea lion\n")
    assert build().classes == ["cat", "sea lion"]
    assert build()[0][1] == 1
    (tmp_path / "other.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=r"'with blank.png' has label 1, out of range: 1 classes"):
        build(classes="other.txt")
    with pytest.raises(FileNotFoundError, match=r"none.txt does not exist"):
        build(classes="none.txt")
    for text, fault in (("a\nb\na\n", r"\['a'\] come twice"), ("a\n\nb\n", "a line is empty")):
        (tmp_path / "other.txt").write_text(text)
        with pytest.raises(ValueError, match=fault):
            build(classes="other.txt")


def test_a_list_that_was_changed_is_read_again(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a 0\n")
    assert read_list(path) is read_list(path)
    path.write_text("a 0\nb 1\n")
    assert len(read_list(path)) == 2


def test_names_are_those_of_the_list():
    names = ["a/b.png", "", "ünï/x y.jpg", "z"]
    packed = Names(names)
    assert list(packed) == names
    assert len(packed) == 4
    assert packed[2] == "ünï/x y.jpg"


def test_classes_are_named_by_folders_of_their_own_only():
    names = ["r/ant/1", "r/bee/1", "r/bee/2", "r/cow/1", "r/dog/1", "r/cow/2"]
    listing = Listing(names, [0, 1, 2, 3, 3, 4], "list")
    assert class_names(listing.folders, 6) == ["ant", "1", "2", "3", "4", "5"]
    assert class_names({}, 2) == ["0", "1"]
    assert count_classes(None, listing) == count_classes(listing, listing) == 5


# -- ImageNet-22k --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "text"])
def test_imagenet_22k_is_read_by_the_lists_of_swin(tmp_path, form):
    """Swin's map files are JSON, whatever their name says."""
    root = tmp_path / form
    folder = root / "fall11_whole" / "n00004475"
    folder.mkdir(parents=True)
    for name in ("a.JPEG", "b.JPEG"):
        Image.new("RGB", (3, 2)).save(folder / name, "JPEG")
    for split, name, label in (("train", "a.JPEG", 21840), ("val", "b.JPEG", 21840)):
        entry = [f"fall11_whole/n00004475/{name}", label]
        text = json.dumps([entry]) if form == "json" else f"{entry[0]}\t{label}\n"
        (root / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(text)
    for split, name in (("train", "a.JPEG"), ("val", "b.JPEG")):
        dataset = create_dataset("imagenet22K", str(root), split)
        assert contents(dataset) == [(str(folder / name), 21840)]
        assert (len(dataset.classes), dataset.classes[21840]) == (21841, "n00004475")
        assert dataset[0][0].size == (3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[["a", 1], ["b"]]', r"entry 1: \['b'\] must be \[path, label\]"),
        ('[["a", -1]]', r"entry 0: \['a', -1\] has a label that is not 0 to 21840"),
        ('[["a", 21841]]', r"has a label that is not 0 to 21840"),
        ("a 21841", "'a' has label 21841, out of range: 21841 classes"),
        ("[]", "lists no image"),
        ('[["a", 1]', "is damaged"),
    ],
)
def test_damaged_lists_of_imagenet_22k_are_named(tmp_path, text, message):
    (tmp_path / "ILSVRC2011fall_whole_map_train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        create_dataset("imagenet22k", str(tmp_path), "train")


def test_imagenet_22k_is_read_from_folders_too(tmp_path, write_images):
    with pytest.raises(FileNotFoundError, match=r"fall_whole_map_val.txt does not exist"):
        create_dataset("imagenet22k", str(tmp_path), "val")
    write_images(tmp_path, {"n1": 1, "n2": 1}, "val")
    assert create_dataset("imagenet22k", str(tmp_path), "val").classes == ["n1", "n2"]
