"""Every format reads what it should, and says what is wrong with the rest."""

import pickle
import zipfile

import numpy as np
import pytest

from data.build import dataset_num_classes  # noqa: F401  registers the formats
from data.registry import (
    create_dataset,
    dataset_node,
    dataset_options,
    list_datasets,
    published_num_classes,
    register_dataset,
)


def write_cifar(root, name="cifar10", protocol=4, per_file=4):
    """Pickles in CIFAR's layout -> all training rows and labels."""
    rng = np.random.default_rng(0)
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    count = 10 if ten else 100
    rows, labels = [], []
    for file in files:
        rows.append(rng.integers(0, 256, (per_file, 3072), np.uint8))
        labels.append(rng.integers(0, count, per_file).tolist())
        key = "labels" if ten else "fine_labels"
        content = {"data": rows[-1], key: labels[-1], "filenames": ["x.png"] * per_file}
        (folder / file).write_bytes(pickle.dumps(content, protocol))
    names = {"label_names" if ten else "fine_label_names": [f"c{i}" for i in range(count)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(names, protocol))
    return np.concatenate(rows[:-1]), np.concatenate(labels[:-1]).tolist()


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(np.asarray(x), np.asarray(y)) and i == j
        for (x, i), (y, j) in zip(contents(a), contents(b), strict=True)
    )


def contents(dataset):
    return [dataset[i] for i in range(len(dataset))]


# -- the registry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet21K", "cifar"])
def test_an_unknown_format_is_an_error_with_all_names(name):
    with pytest.raises(ValueError, match=rf"DATA.DATASET='{name}'.*'cifar100'.*'imagenet'"):
        create_dataset(name, "", "train")


def test_formats_have_one_name_each_and_match_without_regard_to_case():
    assert {"imagenet", "folder", "cifar10", "cifar100", "digits", "synthetic"} <= set(
        list_datasets()
    )
    assert dataset_options("ImageNet") == {"zip_mode"}
    with pytest.raises(ValueError, match="'cifar10' is registered twice"):
        register_dataset("CIFAR10".lower())(lambda root, split: None)


def test_published_data_has_its_classes_without_its_files():
    names = ("imagenet22K", "CIFAR10", "cifar100", "imagenet")
    assert [published_num_classes(name) for name in names] == [21841, 10, 100, None]
    with pytest.raises(ValueError, match="not a known format"):
        published_num_classes("cifar")


def test_stored_files_are_decoded_by_a_decoder_that_can_be_set(tmp_path, write_images):
    write_images(tmp_path, {"cat": 1}, size=(5, 7))
    dataset = create_dataset("imagenet", str(tmp_path), "train")
    stored = (tmp_path / "train" / "cat" / "0.png").read_bytes()
    assert dataset.read(0) == (stored, 0)
    assert dataset[0][0].size == (7, 5)
    dataset.decode = len
    assert dataset[0] == (len(stored), 0)
    assert create_dataset("imagenet", str(tmp_path), "train")[0][0].size == (7, 5)
    digits = create_dataset("digits", "", "val")
    digits.decode = len
    assert digits[0][0].shape == (8, 8)  # nothing to decode


def test_formats_may_share_a_node_of_options():
    names = ("inat2018", "INAT19", "pacs", "cifar10")
    assert [dataset_node(name) for name in names] == ["INAT", "INAT", "DOMAINNET", "CIFAR10"]


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="split='test' must be one of"):
        create_dataset("digits", "", "test")


# -- folders and zip files ----------------------------------------------------------------------------


def test_a_folder_has_as_many_classes_as_sub_folders(tmp_path, write_images):
    """Trap 5: custom data without a hard-coded number of classes."""
    for split in ("train", "val"):
        write_images(tmp_path, {"cat": 2, "ant": 3, "dog": 1}, split)
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
    dataset = create_dataset("imagenet", str(tmp_path), "train")
    assert dataset.classes == ["ant", "cat", "dog"]
    assert [label for _, label in contents(dataset)] == [0, 0, 0, 1, 1, 2]
    assert dataset.describe(3) == str(tmp_path / "train" / "cat" / "0.png")


def test_a_folder_knows_whether_it_fills_a_batch_without_being_listed(tmp_path, write_images):
    write_images(tmp_path, {"cat": 2, "ant": 3})
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    dataset = create_dataset("folder", str(tmp_path), "train")
    assert dataset.holds(5)
    assert not dataset.holds(6)
    assert "samples" not in vars(dataset), "all images were listed"


def test_a_class_without_images_is_named_with_its_split(tmp_path, write_images):
    write_images(tmp_path, {"cat": 2, "ant": 3})
    (tmp_path / "train" / "bee").mkdir()
    dataset = create_dataset("folder", str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match=r"/train: .*bee.*give each class an image"):
        len(dataset)


def test_a_missing_folder_is_named_with_the_expected_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/train does not exist.*<class>/<image>"):
        create_dataset("imagenet", str(tmp_path / "nowhere"), "train")
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"val has no class folders"):
        create_dataset("imagenet", str(tmp_path), "val")


def test_evaluation_does_not_need_the_training_folder(tmp_path, write_images):
    write_images(tmp_path, {"cat": 1, "dog": 1}, "val")
    assert len(create_dataset("imagenet", str(tmp_path), "val")) == 2


def test_splits_with_different_classes_are_an_error(tmp_path, write_images):
    write_images(tmp_path, {"ant": 1, "cat": 1}, "train")
    write_images(tmp_path, {"cat": 1, "dog": 1}, "val")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=r"only in train: \['ant'\], only in val: \['dog'\]"):
            create_dataset("imagenet", str(tmp_path), split)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("cached", [[], [1, 4], range(5)])
@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_zip_equals_the_folder_with_any_part_in_memory(
    tmp_path, compression, cached, prefix, write_images, write_zip
):
    write_images(tmp_path, {"cat": 2, "dog": 3})
    write_zip(tmp_path, "train", compression, prefix)
    folder = create_dataset("imagenet", str(tmp_path), "train")
    zipped = create_dataset("imagenet", str(tmp_path), "train", zip_mode=True)
    zipped.cache(cached)
    assert same(folder, zipped)
    assert zipped.classes == folder.classes
    assert zipped.describe(2) == f"{tmp_path}/train.zip@/dog/0.png"


def test_cached_images_are_not_read_again(tmp_path, write_images, write_zip):
    write_images(tmp_path, {"cat": 2, "dog": 3})
    write_zip(tmp_path, "train")
    zipped = create_dataset("imagenet", str(tmp_path), "train", zip_mode=True)
    expected = contents(zipped)
    zipped.cache([0, 3])
    (tmp_path / "train.zip").write_bytes(b"")
    fresh = pickle.loads(pickle.dumps(zipped))  # as in a spawned worker: no open file
    assert np.array_equal(np.asarray(fresh[3][0]), np.asarray(expected[3][0]))
    with pytest.raises(zipfile.BadZipFile, match="header is damaged"):
        fresh[1]


def test_an_archive_can_be_cached_again(tmp_path, write_images, write_zip):
    """Evaluation sets share the images, and each has a loader."""
    write_images(tmp_path, {"cat": 2, "dog": 3})
    write_zip(tmp_path, "train")
    zipped = create_dataset("imagenet", str(tmp_path), "train", zip_mode=True)
    expected = contents(zipped)
    for indices in (range(3), [4, 1], [1], range(5), range(5)):
        zipped.cache(indices)
        for found, wanted in zip(contents(zipped), expected, strict=True):
            assert np.array_equal(np.asarray(found[0]), np.asarray(wanted[0]))


def test_a_damaged_member_of_a_zip_is_noticed_and_not_cached(tmp_path, write_images, write_zip):
    write_images(tmp_path, {"cat": 2})
    write_zip(tmp_path, "train")
    content = bytearray((tmp_path / "train.zip").read_bytes())
    content[content.index(b"IDAT") + 20] ^= 255
    (tmp_path / "train.zip").write_bytes(content)
    zipped = create_dataset("imagenet", str(tmp_path), "train", zip_mode=True)
    zipped.cache(range(2))
    with pytest.raises(zipfile.BadZipFile, match="content is damaged"):
        zipped[0]
    assert zipped[1][1] == 0


def test_classes_of_a_flat_zip_are_numbered_by_both_maps(tmp_path):
    """ImageNet's own val.zip has no folders, and a small val_map need not reach the last label."""
    (tmp_path / "val.zip").touch()
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.writestr("a.png", b"not read")
    (tmp_path / "val_map.txt").write_text("a.png\t1\n")
    assert create_dataset("imagenet", str(tmp_path), "val", zip_mode=True).classes == ["0", "1"]
    (tmp_path / "train_map.txt").write_text("n01/a.png\t0\nn02/b.png\t1\nn03/c.png\t2\n")
    dataset = create_dataset("imagenet", str(tmp_path), "val", zip_mode=True)
    assert dataset.classes == ["n01", "n02", "n03"]


def test_faults_of_zip_data_are_named(tmp_path):
    def dataset():
        return create_dataset("imagenet", str(tmp_path), "train", zip_mode=True)

    with pytest.raises(FileNotFoundError, match=r"train.zip does not exist.*path<TAB>label"):
        dataset()
    (tmp_path / "train.zip").write_bytes(b"no archive")
    with pytest.raises(FileNotFoundError, match=r"train_map.txt does not exist"):
        dataset()
    (tmp_path / "train_map.txt").write_text("a.png\t0\nb.png 1\n")
    with pytest.raises(
        ValueError, match=r"train_map.txt, line 2: 'b.png 1' must be path<TAB>label"
    ):
        dataset()
    (tmp_path / "train_map.txt").write_text("a.png\t0\n")
    with pytest.raises(ValueError, match=r"train.zip is not a readable zip"):
        dataset()
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("other.png", b"")
    with pytest.raises(FileNotFoundError, match=r"no member 'a.png'.*other.png"):
        dataset()
    (tmp_path / "train_map.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no image"):
        dataset()


# -- CIFAR --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar_is_read_from_pickles_of_any_protocol(tmp_path, name, protocol):
    rows, labels = write_cifar(tmp_path, name, protocol)
    dataset = create_dataset(name, str(tmp_path), "train")
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert [label for _, label in contents(dataset)] == labels
    assert np.array_equal(np.stack([image for image, _ in contents(dataset)]), images)
    assert dataset.classes[3] == "c3"
    assert len(create_dataset(name, str(next(tmp_path.iterdir())), "val")) == 4


def test_pickles_of_python_2_are_read(tmp_path):
    """The published CIFAR files have byte strings as keys, and arrays of `numpy.core`."""
    write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    shape, raw = b"(I1\nI3072\nt", b"\x80" + bytes(range(256)) * 12
    raw = raw[:3072]
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
        b"(I1\n" + shape + b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntb"
        b"I00\nT" + (3072).to_bytes(4, "little") + raw + b"tb"
    )
    path.write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](I7\neu.")
    image, label = create_dataset("cifar10", str(tmp_path), "val")[0]
    assert (label, image[0, 0, 0], image[0, 1, 0]) == (7, 128, 0)


class Malicious:
    def __reduce__(self):
        return (eval, ("open('owned', 'w')",))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({"data": Malicious(), "labels": [1]}, protocol))
    with pytest.raises(ValueError, match=r"test_batch cannot be read.*asks for .*eval"):
        create_dataset("cifar10", str(tmp_path), "val")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "test_batch cannot be read"),
        (b"nothing useful", "test_batch"),
        (pickle.dumps([1]), "must be a dict with the key 'data', found list"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}), "the key 'labels'"),
        (
            pickle.dumps({"data": np.zeros((2, 9), np.uint8), "labels": [1, 2]}),
            r"uint8 \(2, 3072\)",
        ),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), "from 0 to 9"),
    ],
)
def test_a_damaged_cifar_file_is_named(tmp_path, content, message):
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        create_dataset("cifar10", str(tmp_path), "val")


def test_a_missing_cifar_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python/train does not exist"):
        create_dataset("cifar100", str(tmp_path), "train")
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3 does not exist"):
        create_dataset("cifar10", str(tmp_path), "train")


# -- without files ------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all_with_every_class_in_both():
    train, val = (create_dataset("digits", "", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == [str(i) for i in range(10)]
    assert np.bincount([label for _, label in contents(val)]).tolist() == [
        36, 36, 35, 37, 36, 37, 36, 36, 35, 36,
    ]  # fmt: skip
    images = np.stack([image for image, _ in contents(val)])
    assert (images.dtype, images.shape, images.min(), images.max()) == (
        np.uint8,
        (360, 8, 8),
        0,
        255,
    )
    assert not {train.describe(i) for i in range(1437)} & {val.describe(i) for i in range(360)}


def test_synthetic_images_are_the_same_every_time():
    options = dict(img_size=(6, 4), in_chans=1, train_size=9, val_size=7, num_classes=3)
    train, again = (create_dataset("synthetic", "", "train", **options) for _ in range(2))
    val = create_dataset("synthetic", "", "val", **options)
    assert same(train, again)
    assert (len(train), len(val), len(train.classes)) == (9, 7, 3)
    assert train[0][0].shape == (6, 4, 1)
    assert not np.array_equal(train[0][0], val[0][0])
    assert not np.array_equal(train[0][0], train[3][0])
    assert [label for _, label in contents(val)] == [0, 1, 2, 0, 1, 2, 0]
