"""Parquet files of the Hugging Face Hub; pyarrow is optional, and a development dependency."""

import io
import json
import multiprocessing
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.registry import create_dataset


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, first, labels, names=None, image="image", label="label", struct=True, rows=2):
    images = [png(first + i) for i in range(len(labels))]
    stored = [dict(bytes=content, path=f"{i}.png") for i, content in enumerate(images)]
    table = pa.table({image: stored if struct else images, label: pa.array(labels)})
    if names:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def read(root, split="train", **options):
    return create_dataset("parquet", str(root), split, **options)


def contents(dataset):
    return [dataset.read(i) for i in range(len(dataset))]


@pytest.fixture
def root(tmp_path):
    names = ["cat", "dog", "emu"]
    write(tmp_path / "data" / "train-00000-of-00002.parquet", 0, [1, 0, 1, 1, 0], names)
    write(tmp_path / "data" / "train-00001-of-00002.parquet", 5, [0, 1, 0], names)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", 8, [0, 1], names)
    return tmp_path


def test_rows_are_those_of_all_files_in_any_order(root):
    train = read(root)
    expected = [(png(i), label) for i, label in enumerate([1, 0, 1, 1, 0, 0, 1, 0])]
    assert contents(train) == expected
    backwards = [train.read(i) for i in reversed(range(8))]
    assert backwards[::-1] == expected
    assert train.classes == ["cat", "dog", "emu"]
    assert train[6][0].getpixel((0, 0)) == (6, 0, 0)
    assert train.describe(6) == f"{root}/data/train-00001-of-00002.parquet, row 1"
    assert contents(read(root, "val")) == [(png(8), 0), (png(9), 1)]


def test_few_row_groups_stay_in_memory(root):
    train = read(root)
    contents(train)
    assert len(train._kept) == 4 < len(train._groups)
    assert pickle.loads(pickle.dumps(train)).read(7) == train.read(7)


def _read_all(dataset, queue):
    queue.put(contents(dataset))


def test_forked_workers_read_what_their_parent_reads(root):
    train = read(root)
    expected = contents(train)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_read_all, args=(train, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()


def test_other_columns_and_plain_bytes_without_names(tmp_path):
    options = dict(image="img", label="fine_label")
    write(tmp_path / "train.parquet", 0, [2, 0, 1], **options, struct=False)
    write(tmp_path / "validation.parquet", 3, [0], **options, struct=False)
    for split in ("train", "val"):
        assert read(tmp_path, split, **options).classes == ["0", "1", "2"]
    assert read(tmp_path, "val", **options, val="valid*.parquet").read(0) == (png(3), 0)


def test_what_is_wrong_is_named(root):
    with pytest.raises(ValueError, match=r"no column 'img' \(DATA.PARQUET.IMAGE\), only \['image'"):
        read(root, image="img")
    with pytest.raises(FileNotFoundError, match=r"x.parquet does not exist \(DATA.PARQUET.TRAIN"):
        read(root, train="x.parquet")
    path = root / "data" / "test-00000-of-00001.parquet"
    for labels, message in (
        ([0, -1], r"'label' \(DATA.PARQUET.LABEL\) must be a number from 0 on .*found -1"),
        ([0, None], r"is missing \(null\) in 1 of 2 rows"),
        (["a", "b"], "found .*'a'"),
        ([0, 3], "row 1' has label 3, out of range: 3 classes"),
    ):
        write(path, 0, labels, ["cat", "dog", "emu"])
        with pytest.raises(ValueError, match=message):
            read(root, "val")
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match="is no readable parquet file"):
        read(root, "val")


def test_labels_without_names_must_leave_none_out(tmp_path):
    write(tmp_path / "train.parquet", 0, [0, 2])
    write(tmp_path / "val.parquet", 0, [1])
    with pytest.raises(ValueError, match=r"labels must be 0 to 2 .*no image has \[1\]"):
        read(tmp_path, "val")


def test_rows_that_name_files_instead_of_holding_them_are_an_error(tmp_path):
    rows = pa.array(
        [dict(bytes=None, path="a.png")], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": rows, "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="'image' holds only a path instead of an encoded image"):
        read(tmp_path).read(0)


def test_without_the_package_the_error_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"DATA.DATASET='parquet' needs .*pip install pyarrow"):
        read(root)
