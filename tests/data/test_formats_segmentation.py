"""Segmentation formats: which files belong together, what mask values mean, and what is refused."""

import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import data.formats  # noqa: F401  registers the formats
from data.formats.cityscapes import CLASSES
from data.formats.image_pairs import read_palette
from data.masks import (
    IGNORED,
    IndexMasks,
    MaskedImages,
    check_labels,
    find_pairs,
    numbered,
    open_mask,
)
from data.registry import create_dataset, dataset_node, list_datasets, published_num_classes
from tests.data.segmentation_files import (
    blocks,
    colour_of,
    write_ade,
    write_cityscapes,
    write_image,
    write_pairs,
)


def open_data(name, root, split="train", **options):
    return create_dataset(name, str(root), split, "segmentation", **options)


def masks_of(dataset):
    return [dataset.read(index)[1]["mask"] for index in range(len(dataset))]


def refused(root, match, name="ade20k", split="train", error=ValueError, **options):
    """`check` of the data, or opening it, stops with this message."""
    with pytest.raises(error, match=match):
        open_data(name, root, split, **options).check()


def test_the_formats_are_registered_for_segmentation_only():
    names = ["ade20k", "cityscapes", "image_pairs", "synthetic"]
    assert list_datasets("segmentation") == names
    assert [published_num_classes(name, "segmentation") for name in names] == [150, 19, None, None]
    assert dataset_node("image_pairs", "segmentation") == "PAIRS"
    assert "ade20k" not in list_datasets()


# -- labels of all masks ------------------------------------------------------------------------------


def test_check_gives_the_labels_of_the_masks_in_its_share(tmp_path):
    write_ade(tmp_path, train=2, val=1, num_classes=4, names=False)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    for number, labels in enumerate(([1, 2], [0, 4])):
        mask = np.array([labels], np.uint8).repeat(24, 0).repeat(20, 1)
        write_image(tmp_path / f"annotations/training/ADE_training_{number:04d}.png", mask)
    dataset = open_data("ade20k", tmp_path, classes="names.txt")
    assert dataset.check() == {0, 1, 3, IGNORED}
    assert dataset.check(1, 2) == {3, IGNORED}


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ({"val": {IGNORED}}, "no pixel of the val masks counts"),
        ({"train": {IGNORED}}, "no pixel of the train masks counts"),
        ({"train": {0, IGNORED}}, "are 'ground', .*for 3 classes; the others are 255.*PALETTE"),
        ({"train": {2}}, "are 'lesion', there is nothing to tell apart for 3 classes$"),
    ],
)
def test_masks_that_nothing_can_be_learned_from_are_an_error(seen, message):
    with pytest.raises(ValueError, match=message):
        check_labels(seen, ["ground", "vessel", "lesion"])


def test_classes_that_do_not_occur_are_warned_of(caplog):
    classes = [f"class_{label}" for label in range(9)]
    check_labels({"train": {*range(9), IGNORED}, "val": {0, IGNORED}}, classes)
    assert [record.getMessage() for record in caplog.records] == [
        "8 of 9 classes occur in no mask of the val split: class_1, class_2, class_3, class_4, class_5 ..."
    ]
    check_labels({"train": set()}, classes)  # a format without masks
    assert len(caplog.records) == 1


def test_images_without_masks_can_be_named_for_predictions(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    dataset = open_data("image_pairs", tmp_path, "val", classes="classes.txt", val_masks="")
    assert dataset.check() == {IGNORED}
    known = open_data("image_pairs", tmp_path, "val", classes="classes.txt")
    for index in range(len(known)):
        (content, target), (_, expected) = dataset.read(index), known.read(index)
        assert content == known.read(index)[0]
        assert target["image_id"] == expected["image_id"]
        assert target["mask"].shape == expected["mask"].shape
        assert (target["mask"] == IGNORED).all()


# -- ADE20K -------------------------------------------------------------------------------------------


def test_zero_is_ignored_and_classes_count_from_one(tmp_path):
    classes = write_ade(tmp_path, train=3, val=1)
    stored = np.array([[0, 1, 2], [3, 255, 1]], np.uint8).repeat(8, 0).repeat(8, 1)
    write_image(tmp_path / "images" / "training" / "A.jpg", colour_of(stored))
    write_image(tmp_path / "annotations" / "training" / "A.png", stored)
    dataset = open_data("ade20k", tmp_path)
    assert dataset.classes == classes
    assert len(dataset) == 4
    content, target = dataset.read(0)
    expected = np.array([[255, 0, 1], [2, 255, 0]], np.uint8).repeat(8, 0).repeat(8, 1)
    np.testing.assert_array_equal(target["mask"], expected)
    assert target["mask"].dtype == np.uint8
    assert target["image_id"] == "A"
    assert target["file"] == dataset.describe(0) == str(tmp_path / "images/training/A.jpg")
    assert content == (tmp_path / "images" / "training" / "A.jpg").read_bytes()
    dataset.check()


def test_classes_count_from_zero_if_it_is_no_reduced_label(tmp_path):
    write_ade(tmp_path, num_classes=3, names=False)
    (tmp_path / "names.txt").write_text("void\na\nb\nc\n")
    options = dict(classes="names.txt", reduce_zero_label=False)
    dataset = open_data("ade20k", tmp_path, **options)
    stored = np.asarray(Image.open(tmp_path / "annotations/training/ADE_training_0000.png"))
    assert set(np.unique(stored)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(dataset.read(0)[1]["mask"], stored)
    assert dataset.classes == ["void", "a", "b", "c"]
    dataset.check()


def test_without_names_there_are_150_classes_by_number(tmp_path):
    write_ade(tmp_path, names=False)
    assert open_data("ade20k", tmp_path).classes == [str(n) for n in range(1, 151)]
    counted = open_data("ade20k", tmp_path, reduce_zero_label=False).classes
    assert counted == [str(n) for n in range(150)]


def test_ade20ks_own_table_gives_the_first_synonyms(tmp_path):
    write_ade(tmp_path, num_classes=3, names=False)
    rows = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        "1\t0.1576\t11664\t1172\t1\twall",
        "2\t0.1072\t6046\t612\t1\tbuilding, edifice ",
        "3\t0.0878\t8265\t796\t0\tdoor;double door",
    ]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows) + "\n\n")
    assert open_data("ade20k", tmp_path).classes == ["wall", "building", "door"]
    rows.append("4\t0\t0\t0\t0\tdoor;screen door")
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    whole = ["wall", "building, edifice", "door;double door", "door;screen door"]
    assert open_data("ade20k", tmp_path).classes == whole


@pytest.mark.parametrize(
    ("text", "reduce_zero_label", "match"),
    [
        ("Idx\tName\n1\ta\n2\ta", True, r"\['a'\] come twice"),
        ("Idx\tName\n", True, "it names no class"),
        ("Idx\tName\n1\ta\n3\tb", True, "Idx must be 1 to 2 in this order.*it is 1, 3"),
        ("Idx\tName\n0\ta\n1\tb", True, "from 0: set DATA.ADE20K.REDUCE_ZERO_LABEL False"),
        ("Idx\tName\n1\ta\n2\tb", False, "from 1: set DATA.ADE20K.REDUCE_ZERO_LABEL True"),
        ("Idx\tName\n1\ta\n\tb", True, r"line 3.*must have a number as Idx"),
        ("a\n\nb", True, "a line is empty"),
        ("", True, "it is empty"),
        ("\n".join(map(str, range(255))), True, "255 classes, .* at most 254"),
    ],
)
def test_a_damaged_list_of_names_is_one_error(tmp_path, text, reduce_zero_label, match):
    write_ade(tmp_path, names=False)
    (tmp_path / "objectInfo9.txt").write_text(text)
    options = dict(reduce_zero_label=reduce_zero_label)
    refused(tmp_path, f"objectInfo9.txt.*{match}", **options)


def test_the_file_of_names_is_found_or_asked_for(tmp_path):
    write_ade(tmp_path)
    match = "nothing.txt does not exist; DATA.ADE20K.CLASSES='nothing.txt'"
    refused(tmp_path, match, error=FileNotFoundError, classes="nothing.txt")
    (tmp_path / "objectInfo4.txt").write_text("a\nb\nc\n")
    refused(tmp_path, r"'objectInfo3.txt', 'objectInfo4.txt'.*DATA.ADE20K.CLASSES")
    assert open_data("ade20k", tmp_path, classes="objectInfo4.txt").classes == ["a", "b", "c"]
    outside = str(tmp_path / "objectInfo4.txt")
    assert open_data("ade20k", tmp_path, classes=outside).classes == ["a", "b", "c"]


# -- what is wrong with files -------------------------------------------------------------------------

IMAGES, MASKS = "images/training", "annotations/training"


@pytest.mark.parametrize("folder", [IMAGES, MASKS])
def test_a_missing_folder_is_named_with_the_layout(tmp_path, folder):
    write_ade(tmp_path)
    (tmp_path / folder).rename(tmp_path / "elsewhere")
    match = rf"{folder} does not exist; DATA.DATA_PATH must hold images/\{{training,validation\}}"
    refused(tmp_path, match, error=FileNotFoundError)
    assert len(open_data("ade20k", tmp_path, "val")) == 2  # the other split can be used alone


def test_an_empty_folder_is_an_error(tmp_path):
    write_ade(tmp_path, train=0)
    for folder in (IMAGES, MASKS):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / IMAGES / "notes.txt").touch()
    (tmp_path / IMAGES / ".hidden.jpg").touch()
    match = r"images/training has no images named \* with the ending .jpg.*but"
    refused(tmp_path, match, error=FileNotFoundError)


def test_masks_in_jpeg_are_no_masks(tmp_path):
    write_ade(tmp_path, train=1)
    mask = next((tmp_path / MASKS).iterdir())
    mask.rename(mask.with_suffix(".jpg"))
    match = "has no masks .*but ADE_training_0000.jpg.*JPEG, which changes labels"
    refused(tmp_path, match, error=FileNotFoundError)


def test_an_image_without_a_mask_is_named(tmp_path):
    write_ade(tmp_path, train=3)
    (tmp_path / MASKS / "ADE_training_0001.png").unlink()
    match = (
        r"images/training/ADE_training_0001.jpg has no mask: there is no .*annotations/training/"
        r"ADE_training_0001 \(1 of 3 images have none\)"
    )
    refused(tmp_path, match, error=FileNotFoundError)


def test_a_mask_without_an_image_is_named(tmp_path):
    write_ade(tmp_path, train=3)
    (tmp_path / IMAGES / "ADE_training_0002.jpg").unlink()
    match = r"annotations/training/ADE_training_0002.png has no image.*1 of 3 masks have none"
    refused(tmp_path, match, error=FileNotFoundError)


def test_two_images_of_one_name_are_an_error(tmp_path):
    write_ade(tmp_path)
    write_image(tmp_path / IMAGES / "ADE_training_0000.png", np.zeros((24, 40, 3), np.uint8))
    refused(tmp_path, r"ADE_training_0000.* are both the image 'ADE_training_0000'")


def test_a_mask_of_another_size_is_named_with_both_sizes(tmp_path):
    write_ade(tmp_path)
    write_image(tmp_path / MASKS / "ADE_training_0001.png", blocks([1, 2], (24, 41)))
    match = r"ADE_training_0001.png: the mask has 24x41 pixels .*0001.jpg has 24x40"
    refused(tmp_path, match)


def test_a_value_out_of_range_is_named_with_what_is_allowed(tmp_path):
    write_ade(tmp_path)
    mask = blocks([1, 2, 3])
    mask[:2, :3] = 4
    mask[5, 5] = 9
    write_image(tmp_path / MASKS / "ADE_training_0002.png", mask)
    match = (
        r"0002.png is no mask of this data: it has the value 4 \(7 pixels .* allowed are 0 \(ignored\), "
        r"1 to 3 \(3 classes\) and 255 \(ignored\), with DATA.ADE20K.REDUCE_ZERO_LABEL True"
    )
    refused(tmp_path, match)
    with pytest.raises(ValueError, match=r"0002.png is no mask of this data"):
        open_data("ade20k", tmp_path).read(2)


def test_a_mask_in_colours_is_refused_where_numbers_are_wanted(tmp_path):
    write_ade(tmp_path)
    write_image(tmp_path / MASKS / "ADE_training_0000.png", np.zeros((24, 40, 3), np.uint8))
    match = "0000.png is no mask.*mode RGB with 3 channel.*save the class numbers as a one-channel"
    refused(tmp_path, match)


@pytest.mark.parametrize(
    "name", [f"{MASKS}/ADE_training_0000.png", f"{IMAGES}/ADE_training_0000.jpg"]
)
def test_a_damaged_file_is_named(tmp_path, name):
    write_ade(tmp_path)
    content = (tmp_path / name).read_bytes()
    cut = content[: len(content) // 2] if "png" in name else content[:20]
    (tmp_path / name).write_bytes(cut)
    refused(tmp_path, f"{name} cannot be read")


def test_of_several_faults_the_first_one_is_reported(tmp_path):
    write_ade(tmp_path, train=30)
    for index in (29, 11, 17):
        write_image(tmp_path / MASKS / f"ADE_training_{index:04d}.png", blocks([77]))
    for _ in range(5):
        refused(tmp_path, "ADE_training_0011.png")


# -- masks of numbers, in any mode that holds them ----------------------------------------------------


def stored_as(path, mask, mode):
    if mode == "P":
        image = Image.fromarray(mask)
        image.putpalette([value for k in range(256) for value in (k * 7 % 256, k, 255 - k)])
        image.save(path)
    elif mode == "I;16":
        Image.fromarray(mask.astype(np.uint16)).save(path)
    elif mode == "1":
        Image.fromarray(mask.astype(bool)).save(path)
    elif mode.startswith("L"):
        path.write_bytes(gray_png(mask, int(mode[1:])))


def gray_png(mask, bits):
    """A PNG file with gray values of so many bits; what optimisers make of masks with few classes."""
    height, width = mask.shape
    planes = np.unpackbits(mask[..., None], axis=-1)[..., 8 - bits :]
    rows = np.packbits(planes.reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize("mode", ["P", "I;16", "1", "L1", "L2", "L4", "L8"])
def test_every_way_to_store_numbers_gives_the_same_labels(tmp_path, mode):
    largest = {"1": 1, "L1": 1, "L2": 3}.get(mode, 15)
    mask = blocks(range(largest + 1), (16, 43))
    stored_as(tmp_path / "mask.png", mask, mode)
    read = numbered(16, False, "KEY")(open_mask((tmp_path / "mask.png").read_bytes()))
    np.testing.assert_array_equal(read, mask)
    assert read.dtype == np.uint8
    assert read.flags.writeable


@pytest.mark.parametrize("value", [256, 1000, 65535])
def test_numbers_beyond_a_byte_are_named_and_do_not_wrap_around(tmp_path, value):
    mask = np.ones((4, 5), np.uint16)
    mask[2, 3] = value
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=rf"it has the value {value} \(1 pixels"):
        numbered(3, True, "KEY")(open_mask((tmp_path / "mask.png").read_bytes()))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_other_modes_are_refused(mode):
    with pytest.raises(ValueError, match=f"it has the mode {mode} with"):
        numbered(3, False, "KEY")(Image.new(mode, (4, 4)))


def test_every_value_has_one_label_or_is_refused():
    """Against the rule, value by value."""
    for reduce_zero_label in (False, True):
        meaning = numbered(5, reduce_zero_label, "KEY")
        for value in range(256):
            mask = Image.fromarray(np.full((2, 2), value, np.uint8))
            label = value - 1 if reduce_zero_label else value
            if value == 255 or label == -1:
                label = IGNORED
            elif label >= 5:
                with pytest.raises(ValueError, match=f"it has the value {value} "):
                    meaning(mask)
                continue
            assert (meaning(mask) == label).all()


# -- Cityscapes ---------------------------------------------------------------------------------------


def test_cityscapes_ids_become_its_19_training_ids(tmp_path):
    values = range(34)
    write_cityscapes(tmp_path, size=(48, 48), values=values)
    dataset = open_data("cityscapes", tmp_path)
    dataset.check()
    assert len(dataset) == 2
    assert len(dataset.classes) == 19
    assert dataset.classes[13] == "car"
    train_ids = dict(zip(CLASSES.values(), range(19), strict=True))
    for index in range(2):
        _, target = dataset.read(index)
        stored = blocks(values, (48, 48), index)
        expected = np.vectorize(lambda value: train_ids.get(value, 255))(stored)
        np.testing.assert_array_equal(target["mask"], expected)
    assert target["image_id"] == "ulm/ulm_000001_000019"
    # By hand, from the benchmark's table of labels.
    assert [CLASSES[name] for name in ("road", "wall", "sky", "train", "bicycle")] == [
        *(7, 12, 23, 31, 33)
    ]


def test_masks_of_training_ids_are_preferred(tmp_path):
    write_cityscapes(tmp_path, values=(7, 26))
    write_cityscapes(tmp_path, values=(0, 13, 18, 255), train_ids=True)
    dataset = open_data("cityscapes", tmp_path)
    assert set(np.unique(masks_of(dataset)[0])) == {0, 13, 18, 255}
    dataset.check()


def test_predictions_get_the_values_of_the_masks(tmp_path):
    """What `labels/*.png` hold is what the benchmarks' servers read, and what the masks have."""
    ids = range(34)
    for train_ids in (False, True):
        values = range(19) if train_ids else ids
        write_cityscapes(tmp_path, size=(48, 48), values=values, train_ids=train_ids)
        assert open_data("cityscapes", tmp_path).category_ids == list(CLASSES.values())
    write_ade(tmp_path / "ade", train=1)
    write_pairs(tmp_path / "pairs")
    for name, folder, options in (
        ("ade20k", "annotations/training", dict(classes="names.txt")),
        ("image_pairs", "annotations/train", dict(classes="names.txt")),
    ):
        root = tmp_path / dict(ade20k="ade", image_pairs="pairs")[name]
        for reduced in (True, False):
            count = (3 if name == "ade20k" else 2) + (not reduced)
            (root / "names.txt").write_text("\n".join(f"n{i}" for i in range(count)))
            dataset = open_data(name, root, reduce_zero_label=reduced, **options)
            mask = dataset.read(0)[1]["mask"]
            stored = np.asarray(Image.open(sorted((root / folder).glob("*.png"))[0]))
            table = np.zeros(256, np.uint8)
            table[: len(dataset.category_ids)] = dataset.category_ids
            counts = mask != IGNORED
            assert counts.any()
            np.testing.assert_array_equal(table[mask[counts]], stored[counts])


def test_a_cityscapes_mask_with_other_numbers_is_refused(tmp_path):
    write_cityscapes(tmp_path, values=(7, 34))
    refused(tmp_path, "ulm_000000.*it has the value 34.*0 to 33", "cityscapes")
    write_cityscapes(tmp_path, values=(7, 19), train_ids=True)
    refused(tmp_path, "labelTrainIds.*it has the value 19.*0 to 18", "cityscapes")


def test_a_cityscapes_image_without_a_mask_is_named_with_the_file_that_lacks(tmp_path):
    write_cityscapes(tmp_path)
    lacks = tmp_path / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png"
    lacks.unlink()
    match = f"ulm_000001_000019_leftImg8bit.png has no mask: there is no {lacks}"
    refused(tmp_path, match, "cityscapes", error=FileNotFoundError)
    refused(tmp_path / "none", "leftImg8bit/train does not exist", "cityscapes", error=OSError)


# -- pairs of folders ---------------------------------------------------------------------------------

COLOURS = [(0, 0, 0), (128, 0, 64), (255, 255, 255)]


def write_palette(root, *lines):
    (root / "palette.txt").write_text("\n".join(lines) + "\n")
    return dict(palette="palette.txt")


def test_masks_of_numbers_in_any_folders(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "images").rename(tmp_path / "photos")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    options = dict(train_images="photos/train", classes="names.txt")
    dataset = open_data("image_pairs", tmp_path, **options)
    dataset.check()
    for index, mask in enumerate(masks_of(dataset)):
        np.testing.assert_array_equal(mask, blocks(range(3), seed=index))
    assert dataset.classes == ["a", "b", "c"]
    match = r"images/val does not exist.*images/val \(DATA.PAIRS.VAL_IMAGES\) and annotations/val"
    refused(tmp_path, match, "image_pairs", "val", FileNotFoundError, **options)
    match = r"it has the value 2 .*0 to 1 \(2 classes\).*DATA.PAIRS.REDUCE_ZERO_LABEL False"
    (tmp_path / "names.txt").write_text("a\nb\n")
    refused(tmp_path, match, "image_pairs", **options)


def test_zero_can_be_ignored_in_pairs_too(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "names.txt").write_text("b\nc\n")
    options = dict(classes="names.txt", reduce_zero_label=True)
    mask = masks_of(open_data("image_pairs", tmp_path, **options))[0]
    np.testing.assert_array_equal(mask, np.array([255, 0, 1])[blocks(range(3))])


def test_names_that_differ_by_a_part_are_paired_by_a_pattern(tmp_path):
    for split in ("train", "val"):
        for city in ("one", "two"):
            mask = blocks([0, 1], seed=len(city + split))
            write_image(tmp_path / f"in/{split}/{city}/x_rgb.png", colour_of(mask))
            write_image(tmp_path / f"out/{split}/{city}/m_x_L.png", mask)
            write_image(tmp_path / f"out/{split}/{city}/m_x_colour.png", colour_of(mask))
    (tmp_path / "names.txt").write_text("a\nb\n")
    options = dict(
        train_images="in/train/*_rgb", train_masks="out/train/m_*_L.png", classes="names.txt"
    )
    dataset = open_data("image_pairs", tmp_path, **options)
    assert [dataset.read(i)[1]["image_id"] for i in range(len(dataset))] == ["one/x", "two/x"]
    (tmp_path / "out/train/two/m_x_L.png").unlink()
    match = "in/train/two/x_rgb.png has no mask: there is no .*out/train/two/m_x_L.png"
    refused(tmp_path, match, "image_pairs", error=FileNotFoundError, **options)
    for wrong in ("in/*/x", "in/*_*"):
        match = r"DATA.PAIRS.TRAIN_IMAGES='in/\*.* may have one \*"
        refused(tmp_path, match, "image_pairs", **(options | dict(train_images=wrong)))


def test_masks_in_colours_become_labels_by_the_palette(tmp_path):
    write_pairs(tmp_path, colours=COLOURS)
    options = write_palette(
        tmp_path, "# all of them", "255 255 255\tsnow", "128,0,64 brick wall", "0 0 0 ignore", ""
    )
    dataset = open_data("image_pairs", tmp_path, **options)
    dataset.check()
    assert dataset.classes == ["snow", "brick wall"]
    for index, mask in enumerate(masks_of(dataset)):
        expected = np.array([255, 1, 0])[blocks(range(3), seed=index)]
        np.testing.assert_array_equal(mask, expected)
        assert mask.dtype == np.uint8


def test_colours_of_one_name_are_one_class_and_the_first_may_be_ignored(tmp_path):
    write_pairs(tmp_path, colours=COLOURS)
    options = write_palette(tmp_path, "0 0 0 sky", "255 255 255 sky", "128 0 64 wall")
    dataset = open_data("image_pairs", tmp_path, **options)
    np.testing.assert_array_equal(masks_of(dataset)[0], np.array([0, 1, 0])[blocks(range(3))])
    dataset = open_data("image_pairs", tmp_path, reduce_zero_label=True, **options)
    np.testing.assert_array_equal(masks_of(dataset)[0], np.array([255, 0, 255])[blocks(range(3))])
    assert dataset.classes == ["wall"]


def test_names_may_come_from_a_list_beside_the_palette(tmp_path):
    write_pairs(tmp_path, colours=COLOURS)
    options = write_palette(tmp_path, "0 0 0", "128 0 64", "255 255 255")
    match = "palette.txt, line 1: '0 0 0' must be `red green blue name`"
    refused(tmp_path, match, "image_pairs", **options)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    dataset = open_data("image_pairs", tmp_path, classes="names.txt", **options)
    assert dataset.classes == ["a", "b", "c"]
    np.testing.assert_array_equal(masks_of(dataset)[0], blocks(range(3)))
    (tmp_path / "names.txt").write_text("a\nb\n")
    match = "DATA.PAIRS.CLASSES='names.txt' has 2 names, and DATA.PAIRS.PALETTE='palette.txt' has 3"
    refused(tmp_path, match, "image_pairs", classes="names.txt", **options)


def test_an_unknown_colour_is_named_with_its_file(tmp_path):
    write_pairs(tmp_path, colours=COLOURS)
    options = write_palette(tmp_path, "0 0 0 a", "128 0 64 b")
    match = (
        r"train0.png is no mask of this data: it has the colour \(255, 255, 255\) \(\d+ pixels .*"
        r"palette.txt lists only 2 others"
    )
    refused(tmp_path, match, "image_pairs", **options)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["1 2 a"], "line 1: '1 2 a' must be"),
        (["0 0 0 a", "1 2 256 b"], "line 2: '1 2 256 b' must be .* from 0 to 255"),
        (["0 0 0 a", "# b", "0 0 0 c"], r"line 3: the colour \(0, 0, 0\) comes twice"),
        (["0 0 0 ignore"], "lists no class"),
        ([f"0 0 {k} class {k}" for k in range(255)], "255 classes"),
    ],
)
def test_a_damaged_palette_is_one_error(tmp_path, lines, match):
    write_palette(tmp_path, *lines)
    with pytest.raises(ValueError, match=f"palette.txt.*{match}"):
        read_palette(tmp_path, "palette.txt")
    with pytest.raises(FileNotFoundError, match=r"DATA.PAIRS.PALETTE='x.txt'"):
        read_palette(tmp_path, "x.txt")


def test_pairs_need_names_and_colours_need_a_palette(tmp_path):
    write_pairs(tmp_path, colours=COLOURS)
    refused(tmp_path, "DATA.PAIRS.CLASSES must name a file.*DATA.PAIRS.PALETTE", "image_pairs")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    match = (
        "train0.png.*mode RGB with 3 channel.*name the file of their colours in DATA.PAIRS.PALETTE"
    )
    refused(tmp_path, match, "image_pairs", classes="names.txt")


def test_masks_with_a_palette_of_their_own_are_read_as_colours_with_a_palette_file(tmp_path):
    write_pairs(tmp_path, train=1)
    path = tmp_path / "annotations/train/train0.png"
    image = Image.fromarray(blocks(range(3)))
    image.putpalette([value for colour in COLOURS for value in colour] + [9] * (253 * 3))
    image.save(path)
    options = write_palette(tmp_path, "255 255 255 a", "128 0 64 b", "0 0 0 c")
    mask = masks_of(open_data("image_pairs", tmp_path, **options))[0]
    np.testing.assert_array_equal(mask, np.array([2, 1, 0])[blocks(range(3))])


# -- all of them --------------------------------------------------------------------------------------


def test_datasets_can_be_sent_to_workers_after_use(tmp_path):
    write_pairs(tmp_path, colours=COLOURS)
    options = write_palette(tmp_path, "0 0 0 a", "128 0 64 b", "255 255 255 c")
    dataset = open_data("image_pairs", tmp_path, **options)
    before = masks_of(dataset)
    sent = pickle.dumps(dataset)
    assert len(sent) < 10_000  # without the table of all colours
    for a, b in zip(before, masks_of(pickle.loads(sent)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_links_and_upper_case_endings_are_followed(tmp_path):
    write_pairs(tmp_path / "real", train=1, endings=(".png", ".png"))
    image = tmp_path / "real/images/train/train0.png"
    image.rename(image.with_suffix(".PNG"))
    for name in ("images", "annotations"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").symlink_to(tmp_path / "real" / name / "train")
    pairs = find_pairs((tmp_path / "images", "*"), (tmp_path / "annotations", "*"), "anything")
    assert [name for name, _, _ in pairs] == ["part/train0"]
    meaning = IndexMasks({0: 0, 1: 1, 2: 2}, "0 to 2")
    np.testing.assert_array_equal(
        masks_of(MaskedImages(pairs, meaning, ["a", "b", "c"]))[0], blocks(range(3))
    )


def test_synthetic_images_are_the_same_each_time_and_their_colours_tell_the_class():
    options = dict(img_size=(48, 64), train_size=20, val_size=7, num_classes=4)
    train, again, val = (
        open_data("synthetic", "", split, **options) for split in ("train", "train", "val")
    )
    assert (len(train), len(val), len(train.classes)) == (20, 7, 4)
    seen = set()
    colours = {}
    for index in range(20):
        (image, target), (image2, target2) = train.read(index), again.read(index)
        np.testing.assert_array_equal(image, image2)
        np.testing.assert_array_equal(target["mask"], target2["mask"])
        assert image.shape == (48, 64, 3)
        assert image.dtype == np.uint8
        assert target["mask"].shape == (48, 64)
        assert target["mask"].dtype == np.uint8
        seen |= set(np.unique(target["mask"]).tolist())
        for label in set(np.unique(target["mask"])) - {255}:
            pixels = image[target["mask"] == label].astype(int)
            colours.setdefault(label, []).append((pixels.min(0), pixels.max(0)))
    assert seen == {0, 1, 2, 3, 255}
    for label, ranges in colours.items():  # one colour per class, and 32 levels of noise
        low = np.min([low for low, _ in ranges], axis=0)
        high = np.max([high for _, high in ranges], axis=0)
        assert (high - low < 32).all(), label
    assert not np.array_equal(train.read(0)[0], val.read(0)[0])


def test_synthetic_data_takes_gray_images_and_refuses_too_many_classes():
    image, target = open_data("synthetic", "", img_size=(32, 32), in_chans=1, num_classes=1).read(0)
    assert image.shape == (32, 32, 1)
    assert not target["mask"].any()
    match = r"DATA.SYNTHETIC.NUM_CLASSES=255 must be 1 to 254"
    refused("", match, "synthetic", img_size=(32, 32), num_classes=255)
