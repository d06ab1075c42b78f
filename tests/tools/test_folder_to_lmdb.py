"""The converter of folders: files that are whole, or not there. What is in them: test_formats_lmdb.py."""

from types import SimpleNamespace

import pytest
from PIL import Image

import data.formats.lmdb as lmdb_format
from data.formats.lmdb import write_lmdb
from data.registry import create_dataset
from tools.folder_to_lmdb import convert, main


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for name, number in (("cat", count), ("dog", 2)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (3, 2), (i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_files_go_to_another_folder_and_finished_ones_are_kept(folder, capsys):
    target = folder / "fast" / "disk"
    main([str(folder), str(target), "--splits", "val"])
    assert [p.name for p in target.iterdir()] == ["val.lmdb"]
    before = (target / "val.lmdb").stat().st_mtime_ns
    main([str(folder), str(target)])
    assert "val.lmdb is there already: kept" in capsys.readouterr().out
    assert (target / "val.lmdb").stat().st_mtime_ns == before
    assert len(create_dataset("lmdb", str(target), "train")) == 5


def test_an_interrupted_conversion_leaves_nothing_behind(folder, monkeypatch):
    def interrupted(content):
        raise KeyboardInterrupt

    (folder / ".train.lmdb.tmp").write_bytes(b"of a process that was killed")
    with monkeypatch.context() as patch:
        patch.setattr(lmdb_format.zlib, "crc32", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, folder, "train")
    assert not list(folder.glob("*lmdb*")) + list(folder.glob(".*lmdb*"))
    convert(folder, folder, "train")
    assert len(create_dataset("lmdb", str(folder), "train")) == 5


def test_what_cannot_be_converted_is_named(folder, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main([str(folder / "train")])
    assert "has neither train/ nor val/" in capsys.readouterr().err
    (folder / "train" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        main([str(folder)])
    assert "cat/1.png is empty" in capsys.readouterr().err
    assert not (folder / "train.lmdb").exists()
    with pytest.raises(ValueError, match="1 images, labels must be 0 to 0"):
        write_lmdb(folder / "x.lmdb", [(folder / "train" / "cat" / "0.png", "a", 1)], ["one"])
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(lmdb_format.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match=r"0.0 GiB free"):
        convert(folder, folder, "val")
    assert not (folder / "val.lmdb").exists()
