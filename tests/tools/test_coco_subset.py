"""A json with the first images of another, which trains like any other."""

import json

import pytest

from data.registry import create_dataset
from tests.data.coco_files import write_coco
from tools import coco_subset


def test_the_first_images_with_objects_are_kept(tmp_path, capsys):
    whole = write_coco(tmp_path, num_images=5)["train"]
    source = tmp_path / "annotations" / "instances_train2017.json"
    target = tmp_path / "annotations" / "two.json"
    coco_subset.main([str(source), str(target), "--images", "2"])
    part = json.loads(target.read_text())
    assert part["images"] == whole["images"][:2]
    assert part["categories"] == whole["categories"]
    ids = {image["id"] for image in part["images"]}
    assert part["annotations"] == [
        entry for entry in whole["annotations"] if entry["image_id"] in ids and not entry["iscrowd"]
    ]
    assert f"2 images, {len(part['annotations'])} objects" in capsys.readouterr().out
    options = dict(train="annotations/two.json", train_images="train2017")
    assert len(create_dataset("coco", str(tmp_path), "train", "detection", **options)) == 2


@pytest.mark.parametrize("images", ["0", "99"])
def test_more_images_than_there_are_is_an_error(tmp_path, images, capsys):
    write_coco(tmp_path, num_images=3)
    source = tmp_path / "annotations" / "instances_train2017.json"
    with pytest.raises(SystemExit):
        coco_subset.main([str(source), str(tmp_path / "new.json"), "--images", images])
    assert f"--images {images} must be from 1 to 2" in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"info": {}, "images": []}, "annotations"),
        ({"annotations": []}, "images"),
        ({"images": [{"id": 1}], "annotations": [{"id": 1}]}, "annotations"),
        ({"images": {"id": 1}, "annotations": []}, "images"),
        ([], "images"),
    ],
)
def test_a_file_of_something_else_is_an_error(tmp_path, content, part, capsys):
    source = tmp_path / "captions.json"
    source.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        coco_subset.main([str(source), str(tmp_path / "new.json")])
    message = capsys.readouterr().err
    assert f"{source}: '{part}' must be a list of objects with" in message
    assert not (tmp_path / "new.json").exists()


def test_no_file_is_overwritten(tmp_path, capsys):
    write_coco(tmp_path)
    source = tmp_path / "annotations" / "instances_train2017.json"
    with pytest.raises(SystemExit):
        coco_subset.main([str(source), str(source)])
    assert "exists already" in capsys.readouterr().err
