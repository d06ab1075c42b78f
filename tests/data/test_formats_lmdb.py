"""LMDB files: what is written is read, from any process, and whatever is wrong is named."""

import multiprocessing
import os
import pickle
import re
import sys

import lmdb
import numpy as np
import pytest

import data.formats.lmdb as lmdb_format
from data.formats.imagenet import FolderImages
from data.registry import create_dataset
from tools.folder_to_lmdb import convert, main


@pytest.fixture
def folder(tmp_path, write_images):
    write_images(tmp_path, {"cat": 3, "ünï dog": 2}, "train")
    write_images(tmp_path, {"cat": 1, "ünï dog": 2}, "val")
    return tmp_path


def read(root, split="train"):
    return create_dataset("lmdb", str(root), split)


def contents(dataset):
    return [dataset.read(index) for index in range(len(dataset))]


def test_the_file_holds_the_folder_byte_by_byte_with_names_and_classes(folder):
    main([str(folder)])
    for split in ("train", "val"):
        stored, original = read(folder, split), FolderImages(folder, split)
        assert contents(stored) == contents(original)
        assert stored.classes == original.classes == ["cat", "ünï dog"]
    assert read(folder).describe(3) == f"{folder}/train.lmdb@/ünï dog/0.png"
    original = FolderImages(folder, "train")
    assert np.array_equal(np.asarray(read(folder)[4][0]), np.asarray(original[4][0]))
    assert sorted(p.name for p in folder.glob("*.lmdb*")) == ["train.lmdb", "val.lmdb"]


def _read_all(dataset, queue):
    read_here = contents(dataset)
    queue.put((read_here, lmdb_format._OPEN[dataset._path][0] == os.getpid()))


def test_forked_workers_read_what_their_parent_reads(folder):
    """LMDB forbids a file that is inherited by a fork, and a second opening in one process."""
    convert(folder, folder, "train")
    dataset, twin = read(folder), read(folder)
    expected = contents(dataset)  # the parent has it open now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_read_all, args=(part, queue)) for part in (dataset, twin)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=20) for _ in processes] == [(expected, True)] * 2
    for process in processes:
        process.join()
    assert contents(twin) == contents(dataset) == expected
    assert contents(pickle.loads(pickle.dumps(dataset))) == expected  # as a spawned worker gets it


def test_a_file_that_was_cut_off_is_an_error_and_does_not_kill_the_process(folder):
    convert(folder, folder, "train")
    path = folder / "train.lmdb"
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(ValueError, match=r"train.lmdb is cut off: it has \d+ bytes of \d+"):
        read(folder)


def test_damaged_images_are_noticed_by_their_checksums(folder):
    convert(folder, folder, "train")
    path = folder / "train.lmdb"
    content = bytearray(path.read_bytes())
    for match in re.finditer(b"IDAT", bytes(content)):
        content[match.end() + 20] ^= 255
    path.write_bytes(content)
    dataset = read(folder)
    for index in range(5):
        with pytest.raises(ValueError, match="the entry is damaged"):
            dataset.read(index)


def write_entries(path, entries, subdir=False):
    environment = lmdb.open(str(path), subdir=subdir, map_size=2**20, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)


@pytest.mark.parametrize("subdir", [False, True])
def test_files_of_the_lineage_name_the_tool_that_replaces_them(tmp_path, subdir):
    """Trap 24: LMDB by pyarrow.serialize, which is gone, in DHVT and EViT."""
    entries = {b"__keys__": b"pyarrow", b"__len__": b"pyarrow", b"0": b"pyarrow"}
    write_entries(tmp_path / "train.lmdb", entries, subdir)
    with pytest.raises(ValueError, match=r"pyarrow.serialize.*tools/folder_to_lmdb.py FOLDER"):
        read(tmp_path)


def test_other_files_are_errors_that_say_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.lmdb does not exist.*folder_to_lmdb.py"):
        read(tmp_path)
    path = tmp_path / "train.lmdb"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match=r"train.lmdb is no readable LMDB file"):
        read(tmp_path)
    path.unlink()
    write_entries(path, {b"a": b"b"})
    with pytest.raises(ValueError, match="was written by another program"):
        read(tmp_path)
    path.unlink()
    entries = {b"meta": b'{"format": 2}', b"labels": b"", b"checksums": b"", b"names": b""}
    write_entries(path, entries)
    with pytest.raises(ValueError, match="has the format 2, and 1 is read"):
        read(tmp_path)
    path.unlink()
    meta = b'{"format": 1, "images": 3, "classes": ["a"]}'
    write_entries(path, entries | {b"meta": meta, b"labels": bytes(8)})
    with pytest.raises(ValueError, match="tables do not have 3 entries"):
        read(tmp_path)


def test_splits_with_other_classes_are_an_error(tmp_path, write_images):
    write_images(tmp_path, {"cat": 1}, "train")
    convert(tmp_path, tmp_path, "train")
    write_images(tmp_path / "other", {"dog": 1}, "val")
    convert(tmp_path / "other", tmp_path, "val")
    with pytest.raises(ValueError, match=r"only in train: \['cat'\], only in val: \['dog'\]"):
        read(tmp_path)


def test_without_the_package_the_error_says_what_to_install(folder, monkeypatch):
    convert(folder, folder, "train")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"DATA.DATASET='lmdb' needs .*pip install lmdb"):
        read(folder)
