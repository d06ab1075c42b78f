"""COCO's json: what the file says is what a sample gets, and a file that is wrong says where."""

import json
import logging
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from config import load_config
from data import check_data, check_evaluation
from data.dense.detection import DetectionSample, decode_masks, eval_transform
from data.formats.coco import unpack_run_lengths
from data.registry import create_dataset
from models import CONFIG_DIR
from tests.data.coco_files import CATEGORIES, rewrite, run_lengths, write_coco


def opened(root, split="train", **options):
    return create_dataset("coco", str(root), split, "detection", **options)


def targets(dataset):
    return [dataset.read(index)[1] for index in range(len(dataset))]


@pytest.mark.parametrize("year", ["2017", ""])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_data_in_the_usual_places_is_found(tmp_path, year, suffix):
    contents = write_coco(tmp_path, year=year, suffix=suffix)
    for split in ("train", "val"):
        dataset = opened(tmp_path, split)
        assert len(dataset) == 4
        assert dataset.classes == ["disc", "square", "triangle"]
        for index, image in enumerate(contents[split]["images"]):
            pixels, target = dataset[index]
            file = tmp_path / f"{split}{year}" / image["file_name"]
            assert dataset.describe(index) == target["file"] == str(file)
            assert np.array_equal(pixels, Image.open(file))
            assert target["size"] == (image["height"], image["width"])
            assert target["image_id"] == image["id"]


def test_other_places_can_be_named(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "boxes").mkdir()
    (tmp_path / "annotations/instances_train2017.json").rename(tmp_path / "boxes/a.json")
    (tmp_path / "train2017").rename(tmp_path / "pictures")
    dataset = opened(tmp_path, train="boxes/a.json", train_images="pictures")
    assert len(dataset) == 4
    assert len(opened(tmp_path, "val", train="boxes/a.json", train_images="pictures")) == 4
    absolute = opened("", train=str(tmp_path / "boxes/a.json"), train_images=f"{tmp_path}/pictures")
    assert absolute.describe(0) == dataset.describe(0)


def test_images_in_sub_folders_are_found(tmp_path):
    contents = write_coco(tmp_path)["train"]
    for place, image in enumerate(contents["images"]):
        folder = tmp_path / "train2017" / f"part{place % 2}"
        folder.mkdir(exist_ok=True)
        (tmp_path / "train2017" / image["file_name"]).rename(folder / image["file_name"])
        image["file_name"] = f"./part{place % 2}/{image['file_name']}"
    rewrite(tmp_path, "train", contents)
    assert len([opened(tmp_path)[index] for index in range(4)]) == 4


def test_boxes_labels_and_crowds_are_those_that_pycocotools_reads(tmp_path, capsys):
    write_coco(tmp_path, num_images=7)
    dataset = opened(tmp_path, masks=True)
    coco = COCO(tmp_path / "annotations/instances_train2017.json")
    number = 0
    for target in targets(dataset):
        entries = coco.imgToAnns[target["image_id"]]
        boxes = np.array([entry["bbox"] for entry in entries], np.float32).reshape(-1, 4)
        assert target["boxes"].dtype == np.float32
        assert np.array_equal(target["boxes"][:, :2], boxes[:, :2])
        assert np.array_equal(target["boxes"][:, 2:] - target["boxes"][:, :2], boxes[:, 2:])
        # The round trip of category ids.
        found = [dataset.category_ids[label] for label in target["labels"]]
        assert found == [entry["category_id"] for entry in entries]
        assert target["iscrowd"].tolist() == [bool(entry["iscrowd"]) for entry in entries]
        masks = decode_masks(target["masks"], target["size"])
        assert all(
            np.array_equal(mask, coco.annToMask(entry))
            for mask, entry in zip(masks, entries, strict=True)
        )
        for kept, entry in zip(target["annotations"], entries, strict=True):
            number += 1
            # Numbers of annotations start at 1, whatever they are in the file.
            expected = dict(
                entry, id=number, category_id=dataset.category_ids.index(entry["category_id"])
            )
            assert kept == expected
    assert number == len(coco.anns)
    assert any(target["iscrowd"].any() for target in targets(dataset))


def test_labels_follow_the_ids_and_not_the_order_in_the_file(tmp_path):
    write_coco(tmp_path, categories={90: "square", 0: "disc", 13: "triangle"})
    dataset = opened(tmp_path)
    assert dataset.classes == ["disc", "triangle", "square"]
    assert list(dataset.category_ids) == [0, 13, 90]


def test_images_without_annotations_are_kept(tmp_path):
    write_coco(tmp_path)
    for split in ("train", "val"):
        last = targets(opened(tmp_path, split, masks=True))[-1]
        assert last["boxes"].shape == (0, 4)
        assert last["labels"].shape == last["iscrowd"].shape == (0,)
        assert last["masks"] == last["annotations"] == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_that_nobody_wants_take_no_memory(tmp_path, split):
    write_coco(tmp_path)
    with_masks, without = (
        targets(opened(tmp_path, split, masks=True)),
        targets(opened(tmp_path, split)),
    )
    assert all(target["masks"] is None for target in without)
    for one, other in zip(with_masks, without, strict=True):
        assert one["masks"] == [entry.pop("segmentation") for entry in one["annotations"]]
        assert other["annotations"] == one["annotations"]


def test_what_tools_leave_out_has_its_usual_value(tmp_path):
    content = write_coco(tmp_path, masks=False)["train"]
    for entry in content["annotations"]:
        for key in ("area", "iscrowd", "segmentation", "id"):
            del entry[key]
    rewrite(tmp_path, "train", content)
    entries = [entry for target in targets(opened(tmp_path)) for entry in target["annotations"]]
    assert len(entries) == len(content["annotations"])
    assert all(entry["area"] == entry["bbox"][2] * entry["bbox"][3] for entry in entries)
    assert not any(entry["iscrowd"] for entry in entries)


def test_ids_of_images_may_be_text(tmp_path):
    content = write_coco(tmp_path)["train"]
    for entry in content["images"]:
        entry["id"] = f"image {entry['id']}"
    for entry in content["annotations"]:
        entry["image_id"] = f"image {entry['image_id']}"
    rewrite(tmp_path, "train", content)
    assert targets(opened(tmp_path))[0]["image_id"] == "image 1000"


def test_a_file_that_changes_is_read_again(tmp_path):
    content = write_coco(tmp_path)["train"]
    assert len(opened(tmp_path)) == 4
    content["images"].pop()
    rewrite(tmp_path, "train", content)
    assert len(opened(tmp_path)) == 3


def test_a_dataset_can_be_sent_to_workers(tmp_path):
    write_coco(tmp_path)
    dataset = opened(tmp_path, masks=True)
    again = pickle.loads(pickle.dumps(dataset))
    assert pickle.dumps(targets(again)) == pickle.dumps(targets(dataset))
    with pytest.raises(IndexError):
        dataset.read(4)


def test_samples_have_the_files_objects(tmp_path):
    write_coco(tmp_path, num_images=6)
    sample = DetectionSample(eval_transform(short_side=96, long_side=200), True, True)
    dataset = opened(tmp_path, masks=True)
    for index in range(len(dataset)):
        pixels, stored = dataset[index]
        _, target = sample(np.asarray(pixels), stored)
        # Twice as large, of the objects that are no crowd.
        assert np.allclose(target["boxes"], 2 * stored["boxes"][~stored["iscrowd"]])
        areas = [entry["area"] for entry in stored["annotations"] if not entry["iscrowd"]]
        assert np.allclose(target["masks"].sum(dim=(1, 2)), 4 * np.array(areas))


# What is wrong, how it is made so, and what the message must say besides the file.


def _set(key, value, place=0, part="annotations"):
    return lambda content: content[part][place].__setitem__(key, value)


def _boxes(*box):
    return lambda content: [entry.update(bbox=[*box]) for entry in content["annotations"]]


def _drop(key, part="annotations"):
    return lambda content: content[part][0].pop(key)


WRONG = {
    "no images key": (lambda c: c.pop("images"), r"'images' is missing, found \['annotations',"),
    "no categories": (lambda c: c.pop("categories"), r"'categories' is missing"),
    "images no list": (lambda c: c.update(images={"a": 1}), r"'images' must be a list, not \{\"a\": 1\}"),
    "an image no object": (lambda c: c["images"].insert(1, "a.png"), r"images\[1\] must be an object"),
    "images empty": (lambda c: c.update(images=[], annotations=[]), r"'images' is empty"),
    "categories empty": (lambda c: c.update(categories=[]), r"'categories' is empty"),
    "category without name": (_drop("name", "categories"), r"categories\[0\] 'name' is missing"),
    "category id is text": (_set("id", "3", 1, "categories"), r"categories\[1\] 'id' is \"3\"; .*whole"),
    "category id twice": (_set("id", 7, 2, "categories"), r"categories\[2\] 'id' is 7, as that of 'square'"),
    "image without id": (_drop("id", "images"), r"images\[0\] 'id' is missing"),
    "image id twice": (_set("id", 1000, 2, "images"), r"images\[2\] 'id' is 1000, as that of 'train_000"),
    "image without name": (_drop("file_name", "images"), r"images\[0\] 'file_name' is missing"),
    "image without height": (_drop("height", "images"), r"images\[0\] 'height' is missing"),
    "width 0": (_set("width", 0, 1, "images"), r"images\[1\] has the height and width \[64, 0\]"),
    "width is true": (_set("width", True, 1, "images"), r"images\[1\] 'width' is true; .*whole number"),
    "image unknown": (_set("image_id", 5), r"annotations\[0\] 'image_id' is 5; no entry of 'images'"),
    "image id a list": (_set("image_id", [5]), r"annotations\[0\] 'image_id' is \[5\]"),
    "category unknown": (_set("category_id", 4), r"\[0\] 'category_id' is 4; .* has the ids \[3, 7, 20\]"),
    "no category": (_drop("category_id"), r"annotations\[0\] 'category_id' is null"),
    "no box": (_drop("bbox"), r"annotations\[0\] 'bbox' is null; it must be \[x, y, width, height\]"),
    "box of 3": (_set("bbox", [1, 2, 3], 1), r"annotations\[1\] 'bbox' is \[1, 2, 3\]"),
    "box of text": (_set("bbox", ["1", 2, 3, 4]), r"annotations\[0\] 'bbox' is \[\"1\", 2, 3, 4\]"),
    "negative width": (_set("bbox", [9, 2, -3, 4]), r"'bbox' is \[9, 2, -3, 4\]; .* of at least 0"),
    "shares of sides": (_boxes(0.3, 0.1, 0.7000001, 0.9), r"all \d+ boxes lie within one pixel.*in shares"),
    "area is text": (_set("area", "big"), r"annotations\[0\] 'area' is \"big\""),
    "negative area": (_set("area", -1.5), r"annotations\[0\] 'area' is -1.5"),
    "crowd 2": (_set("iscrowd", 2), r"annotations\[0\] 'iscrowd' is 2; it must be 0 or 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_file_is_named(tmp_path, case):
    content = write_coco(tmp_path)["train"]
    change, message = WRONG[case]
    change(content)
    path = rewrite(tmp_path, "train", content)
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path)
    assert str(error.value).startswith(f"{path}: ")


WRONG_MASKS = {
    "none": (None, "has no 'segmentation', and MODEL.HEAD learns masks.*retinanet"),
    "empty": ([], "has no 'segmentation'"),
    "text": ("abc", r"'segmentation' is \"abc\"; it must be a list of polygons"),
    "odd polygon": ([[1, 1, 5, 1, 5]], r"it must be a list of polygons"),
    "polygon of text": ([["1", 1, 5, 1, 5, 5]], r"it must be a list of polygons"),
    "flat polygon": ([1, 1, 5, 1, 5, 5], r"it must be a list of polygons"),
    "two points": ([[1, 1, 5, 5]], r"no polygon of it has three points"),
    "other size": (dict(counts=[64 * 48], size=[64, 48]), r"for the size \[64, 48\].* has \[48, 64\]"),
    "no size": (dict(counts=[64 * 48]), "for the size null"),
    "too few runs": (dict(counts=[9], size=[48, 64]), r"of 9 pixels in all, its image has 3072"),
    "text of too few": (dict(counts="0001", size=[48, 64]), r"of 1 pixels in all, its image has 3072"),
    "text cut off": (dict(counts="P`", size=[48, 64]), r"must have its run lengths in 'counts'"),
    "text of others": (dict(counts="abc é", size=[48, 64]), r"must have its run lengths in 'counts'"),
    "no counts": (dict(size=[48, 64]), r"must have its run lengths in 'counts'"),
    "negative counts": (dict(counts=[-1, 3073], size=[48, 64]), r"must have its run lengths in 'counts'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_MASKS)
def test_masks_that_are_wrong_are_named_if_somebody_wants_masks(tmp_path, case):
    content = write_coco(tmp_path)["train"]
    content["annotations"][0]["segmentation"], message = WRONG_MASKS[case]
    path = rewrite(tmp_path, "train", content)
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path, masks=True)
    assert str(error.value).startswith(f"{path}: annotations[0] ")
    assert len(opened(tmp_path)) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no json file, or is damaged"),
        (b'{"images": [', "is no json file, or is damaged: .*line 1"),
        (b"\xff\xfe\x00{", "is no json file, or is damaged"),
        (b"[" * 100_000, "is no json file, or is damaged"),
        (b"[]", r"must be an object with images, annotations and categories, not \[\]"),
        (b'{"images": [], "area": NaN}', "it has NaN for a number"),
    ],
)
def test_a_file_that_is_no_annotation_file_is_an_error(tmp_path, content, message):
    write_coco(tmp_path)
    path = tmp_path / "annotations/instances_train2017.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path)
    assert str(path) in str(error.value)


def test_numbers_beyond_all_bounds_are_no_box(tmp_path):
    content = write_coco(tmp_path)["train"]
    path = rewrite(tmp_path, "train", content)
    box = json.dumps(content["annotations"][0]["bbox"])
    path.write_text(path.read_text().replace(box, "[1e999, 1, 1, 1]", 1))
    with pytest.raises(ValueError, match=r"annotations\[0\] 'bbox' is \[Infinity"):
        opened(tmp_path)


def test_files_and_folders_that_are_missing_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"instances_train2017\.json does not exist.*DATA\.COCO"
    ):
        opened(tmp_path)
    write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"b\.json does not exist"):
        opened(tmp_path, train="b.json")
    with pytest.raises(FileNotFoundError, match=r"elsewhere does not exist"):
        opened(tmp_path, train_images="elsewhere")
    (tmp_path / "train2017").rename(tmp_path / "x")
    with pytest.raises(
        FileNotFoundError, match=r"train2017 does not exist; DATA\.DATA_PATH must hold"
    ):
        opened(tmp_path)


def test_images_that_are_listed_and_missing_are_an_error_before_any_is_read(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "val2017/val_001.png").unlink()
    (tmp_path / "val2017/val_003.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"val_001\.png does not exist; .* 4 images, and 2 of .*VAL_IMAGES"
    ):
        opened(tmp_path, "val")


def test_check_finds_images_of_another_size(tmp_path):
    write_coco(tmp_path)
    opened(tmp_path).check()
    Image.new("RGB", (64, 50)).save(tmp_path / "train2017/train_002.png")
    match = r"train_002\.png has \[50, 64\].*2017\.json says \[48, 64\].*correct height and width"
    with pytest.raises(ValueError, match=match):
        opened(tmp_path).check()


def test_check_knows_why_an_image_that_is_to_be_turned_has_another_size(tmp_path):
    write_coco(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (48, 64)).save(tmp_path / "train2017/train_002.png", exif=exif)
    with pytest.raises(ValueError, match=r"EXIF orientation.*exif_transpose"):
        opened(tmp_path).check()


def test_check_finds_files_that_are_no_images(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "train2017/train_001.png").write_text("not there")
    with pytest.raises(ValueError, match=r"train_001\.png cannot be read as an image"):
        opened(tmp_path).check()


def test_boxes_that_leave_their_image_are_warned_of(tmp_path, caplog):
    content = write_coco(tmp_path)["train"]
    content["annotations"][1]["bbox"] = [40, 30, 60, 46]  # x1 y1 x2 y2
    rewrite(tmp_path, "train", content)
    with caplog.at_level(logging.WARNING):
        opened(tmp_path)
    assert "annotations[1] has [40, 30, 60, 46] in an image of [48, 64]" in caplog.text
    assert "[x, y, width, height]" in caplog.text
    assert f"1 of {len(content['annotations'])} boxes leave" in caplog.text
    assert "corners" not in caplog.text


def test_boxes_of_one_pixel_stand_for_objects_that_are_not_known(tmp_path):
    content = write_coco(tmp_path)["train"]
    for entry in content["annotations"]:
        entry["bbox"] = [0, 0, 1, 1]
    rewrite(tmp_path, "train", content)
    assert len(opened(tmp_path)) == len(content["images"])


def test_corners_in_place_of_sides_are_suspected(tmp_path, caplog):
    content = write_coco(tmp_path)["train"]
    for entry in content["annotations"]:
        entry["bbox"] = [40, 30, 60, 46]
    rewrite(tmp_path, "train", content)
    with caplog.at_level(logging.WARNING):
        opened(tmp_path)
    assert "boxes leave their image (are they corners [x1, y1, x2, y2]?)" in caplog.text


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_without_annotations_is_warned_of(tmp_path, caplog, listed):
    """Those of COCO's test sets have no list of them at all."""
    content = write_coco(tmp_path)["train"]
    content["annotations"] = []
    if not listed:
        del content["annotations"]
    rewrite(tmp_path, "train", content)
    with caplog.at_level(logging.WARNING):
        assert len(opened(tmp_path)) == 4
    assert "has no annotation" in caplog.text


@pytest.mark.parametrize("left", ["no list", "nothing", "crowds"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_objects_stops_a_run_before_it_trains(tmp_path, split, left):
    content = write_coco(tmp_path)[split]
    annotations = content.pop("annotations")
    if left != "no list":
        crowds = [entry for entry in annotations if entry["iscrowd"]]
        content["annotations"] = crowds if left == "crowds" else []
        assert crowds
    path = rewrite(tmp_path, split, content)
    opts = ["DATA.DATASET", "coco", "DATA.DATA_PATH", str(tmp_path)]
    file = CONFIG_DIR / "_base_" / "smoke_det.yaml"
    message = rf"{path} has no annotation, or only crowds, .*DATA\.COCO\.{split.upper()} "
    with pytest.raises(ValueError, match=message):
        check_data(load_config(file, opts))
    evaluation = [*opts, "EVAL_MODE", "True"]
    if split == "val":
        with pytest.raises(ValueError, match=message):
            check_evaluation(load_config(file, evaluation))
    # Results of a test set can be written, but not while training.
    check_evaluation(load_config(file, [*evaluation, "TEST.REPORT", "True"]))
    with pytest.raises(ValueError, match=message):
        check_data(load_config(file, [*opts, "TEST.REPORT", "True"]))


@settings(max_examples=100)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=12), st.booleans())
def test_run_lengths_as_text_are_the_numbers_that_pycocotools_wrote(lengths, starts_with_ones):
    counts = [0, *lengths] if starts_with_ones else lengths
    text = coco_mask.frPyObjects(dict(counts=counts, size=[1, sum(counts)]), 1, sum(counts))[
        "counts"
    ]
    assert unpack_run_lengths(text.decode("ascii")) == counts


def test_the_helper_writes_run_lengths_that_are_those_of_the_mask():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((5, 7)) < rng.random()
        assert np.array_equal(decode_masks([run_lengths(mask)], (5, 7))[0], mask)
    assert list(CATEGORIES) != sorted(CATEGORIES)  # so that the order of labels is put to the test
