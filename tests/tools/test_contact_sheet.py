"""The contact sheet shows what training gets."""

import pytest
import torch

from config import load_config
from data import build_dataset
from data.build import build_samples
from data.samplers import Key
from models import CONFIG_DIR
from tests.data.coco_files import write_coco
from tests.data.segmentation_files import write_ade
from tools import contact_sheet
from utils.pictures import draw_labels, draw_objects

DETECTION = str(CONFIG_DIR / "_base_" / "smoke_det.yaml")
SEGMENTATION = str(CONFIG_DIR / "_base_" / "smoke_seg.yaml")
# The first image has objects of two classes, and a crowd.
COCO = ["DATA.DATASET", "coco", "MODEL.HEAD.TYPE", "mask_rcnn"]
SMALL = ["AUG.DETECTION.SHORT_SIDES", "[48]", "AUG.DETECTION.LONG_SIDE", "80"]


@pytest.fixture
def detection(tmp_path):
    write_coco(tmp_path, num_images=5)
    return load_config(DETECTION, [*COCO, *SMALL, "DATA.DATA_PATH", str(tmp_path)])


@pytest.fixture
def segmentation(tmp_path):
    write_ade(tmp_path)
    opts = ["DATA.DATASET", "ade20k", "DATA.DATA_PATH", str(tmp_path)]
    return load_config(SEGMENTATION, opts)


def first_sample(config):
    dataset = build_dataset(config, "train")
    image, target = build_samples(config, dataset, training=True)[Key(0, 0)]
    return image.contiguous(), target, dataset.classes


def test_the_first_picture_is_the_first_sample_of_a_detector(detection):
    sheet = contact_sheet.contact_sheet(detection, images=3, draws=2, side=100)
    image, target, classes = first_sample(detection)
    assert len(target["boxes"])
    drawn = draw_objects(
        image, target["boxes"], target["labels"], classes=classes, masks=target["masks"]
    )
    height, width = target["size"]
    assert sheet[:, :height, :width].equal(drawn)
    assert not drawn.equal(image)


def test_the_first_picture_is_the_first_sample_of_a_segmenter(segmentation):
    sheet = contact_sheet.contact_sheet(segmentation, images=2, draws=2, side=600)
    image, target, _ = first_sample(segmentation)
    height, width = target["size"]
    assert sheet[:, :height, :width].equal(draw_labels(image, target["mask"]))


@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_are_images_and_columns_are_draws(detection, split):
    one = contact_sheet.contact_sheet(detection, split, images=1, draws=1, side=40)
    wide = contact_sheet.contact_sheet(detection, split, images=1, draws=4, side=40)
    high = contact_sheet.contact_sheet(detection, split, images=4, draws=1, side=40)
    assert 3 * 40 <= wide.shape[2] - one.shape[2] <= 3 * 48
    assert wide[:, :30, :40].equal(one[:, :30, :40])  # the largest is 48 x 64, shown as 30 x 40
    assert high.shape[1] >= 4 * 30
    # There are five images, and no more rows than that.
    five = contact_sheet.contact_sheet(detection, split, images=5, draws=1, side=40)
    assert contact_sheet.contact_sheet(detection, split, images=9, draws=1, side=40).equal(five)


def test_the_program_writes_a_picture(tmp_path, capsys):
    options = ["--images", "2", "--draws", "1", "--opts", "OUTPUT", str(tmp_path)]
    path = contact_sheet.main(["--cfg", DETECTION, *options])
    assert path == tmp_path / "smoke_det" / "default" / "contact_sheet.png"
    assert str(path) in capsys.readouterr().out
    other = contact_sheet.main(["--cfg", DETECTION, "--output", str(tmp_path / "a.png"), *options])
    assert path.read_bytes() == other.read_bytes()


def test_a_data_path_on_the_command_line_is_the_one(tmp_path):
    write_coco(tmp_path / "data")
    path = contact_sheet.main(
        ["--cfg", DETECTION, "--data-path", str(tmp_path / "data"), "--output", str(tmp_path / "b.png"),
         "--opts", *COCO, *SMALL]
    )  # fmt: skip
    assert path.exists()


def test_an_image_without_objects_is_drawn_as_it_is(tmp_path):
    write_coco(tmp_path, num_images=2, crowd=False)
    opts = [*COCO, *SMALL, "DATA.DATA_PATH", str(tmp_path), "AUG.HFLIP", "0.0"]
    config = load_config(DETECTION, opts)
    image, target = build_samples(config, build_dataset(config, "train"), True)[Key(0, 1)]
    assert not len(target["boxes"])
    sheet = contact_sheet.contact_sheet(config, images=2, draws=1, side=100)
    below = 48 + 8
    height, width = image.shape[1:]
    assert torch.equal(sheet[:, below : below + height, :width], image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")], "TASK='classification' has nothing"),
        (["--cfg", DETECTION, "--draws", "0"], "--images 4, --draws 0 and --side 480 must be at least 1"),
        (["--cfg", DETECTION, "--data-path", "/nowhere", "--opts", *COCO], "nowhere/annotations/"),
        (["--cfg", DETECTION, "--opts", "DATA.COCO.TRAINS", "x"], "DATA.COCO.TRAINS"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        contact_sheet.main(arguments)
    assert message in capsys.readouterr().err
