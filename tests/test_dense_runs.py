"""What holds for classification holds for dense tasks: processes, resuming, averages, timing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import main as program
from config import load_config
from models import CONFIG_DIR, Backbone, build_model
from modes import dense_evaluation
from modes.build import check_batch_norm
from modes.dense_evaluation import Drawing
from tests.data.coco_files import rewrite, write_coco
from tests.data.segmentation_files import write_image
from tests.processes import interrupted_after_saving, run_on_two_processes
from utils.amp import Amp
from utils.distributed import Runtime

RUN = """
import sys, main
from tests.processes import time_briefly
time_briefly()
main.main(sys.argv[1:])
"""
REFUSED = """
import sys, main
try:
    main.main(sys.argv[1:])
except SystemExit as end:
    print("ended with", end.code)
"""
# Seven images to score are four on the first process and three on the second.
TINY = [
    *("TRAIN.MAX_STEPS", "2", "DATA.BATCH_SIZE", "2", "DATA.SYNTHETIC.TRAIN_SIZE", "8"),
    *("DATA.SYNTHETIC.VAL_SIZE", "7", "TEST.REPORT", "True"),
]
MASK_RCNN = [
    *("MODEL.HEAD.TYPE", "mask_rcnn", "MODEL.HEAD.MASK_RCNN.FPN_CHANNELS", "16"),
    *("MODEL.HEAD.MASK_RCNN.FC_DIM", "32", "MODEL.HEAD.MASK_RCNN.SCORE_THRESHOLD", "0.0"),
]


TASKS = pytest.mark.parametrize(("task", "head"), [("det", MASK_RCNN), ("seg", [])])


@TASKS
def test_two_processes_score_what_they_trained_as_one_does(task, head, tmp_path):
    command = ["--cfg", str(CONFIG_DIR / "_base_" / f"smoke_{task}.yaml")]
    opts = ["--opts", "OUTPUT", str(tmp_path), *TINY, *head]
    run_on_two_processes(RUN, *command, *opts, timeout=240)
    (last,) = tmp_path.rglob("last.pth")
    folder = last.parent.parent
    of_two = json.loads((folder / "eval.json").read_text())
    program.main([*command, "--eval", "--resume", str(last), *opts])
    of_one = json.loads((folder / "eval.json").read_text())
    scores = of_one.keys() - {"checkpoint", "skipped"}
    assert {name: of_one[name] for name in scores} == {name: of_two[name] for name in scores}
    assert of_one["images"] == 7
    assert of_one["AP50" if task == "det" else "mIoU"] > 0, (
        "something was found that can be compared"
    )


def test_what_one_process_finds_in_its_share_of_the_data_stops_both(tmp_path):
    """Trap: the others go on to a collective operation, and wait there."""
    content = write_coco(tmp_path / "data")["train"]
    content["images"][1]["height"] += 2
    rewrite(tmp_path / "data", "train", content)
    command = ["--cfg", str(CONFIG_DIR / "_base_" / "smoke_det.yaml")]
    opts = ["DATA.DATASET", "coco", "DATA.DATA_PATH", str(tmp_path / "data")]
    opts += ["DATA.BATCH_SIZE", "2", "OUTPUT", str(tmp_path / "runs")]
    first, second = run_on_two_processes(REFUSED, *command, "--opts", *opts, timeout=240)
    assert "train_001.png has [64, 48] pixels" in first
    assert first.rstrip().endswith("ended with 2")
    assert second == "ended with 2\n"
    assert not (tmp_path / "runs").exists()


def test_labels_are_looked_for_in_the_shares_of_all_processes(tmp_path):
    """Each has masks of one class, which alone would be nothing to learn from."""
    for split, count in (("train", 2), ("val", 1)):
        for label in range(count):
            for kind in ("images", "annotations"):
                pixels = np.full((48, 64), label, np.uint8)
                write_image(tmp_path / kind / split / f"{label}.png", pixels)
    (tmp_path / "classes.txt").write_text("ground\nvessel\nlesion\n")
    command = ["--cfg", str(CONFIG_DIR / "_base_" / "smoke_seg.yaml"), "--opts"]
    command += ["DATA.DATASET", "image_pairs", "DATA.PAIRS.CLASSES", "classes.txt"]
    command += ["DATA.DATA_PATH", str(tmp_path), "DATA.BATCH_SIZE", "1"]
    command += ["OUTPUT", str(tmp_path / "runs"), "TRAIN.MAX_STEPS", "1"]
    run_on_two_processes(RUN, *command, timeout=240)
    (log,) = tmp_path.rglob("log_rank0.txt")
    said = [line for line in log.read_text().splitlines() if "occur in no mask" in line]
    assert ["1 of 3" in said[0], "2 of 3" in said[1]] == [True, True]
    assert said[0].endswith("of the train split: lesion")
    assert said[1].endswith("of the val split: vessel, lesion")


def test_scores_stay_when_a_picture_cannot_be_drawn(tmp_path, monkeypatch):
    command = ["--cfg", str(CONFIG_DIR / "_base_" / "smoke_seg.yaml")]
    opts = ["--opts", "OUTPUT", str(tmp_path), *TINY, "TRAIN.MAX_STEPS", "1"]
    program.main([*command, *opts])
    (last,) = tmp_path.rglob("last.pth")
    evaluation = last.parent.parent / "eval.json"
    evaluation.unlink()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(dense_evaluation, "save_picture", full)
    with pytest.raises(OSError, match="no space left"):
        program.main([*command, "--eval", "--resume", str(last), *opts, "TEST.PICTURES", "1"])
    assert json.loads(evaluation.read_text())["images"] == 7


def test_pictures_of_two_evaluations_do_not_mix(tmp_path):
    command = ["--cfg", str(CONFIG_DIR / "_base_" / "smoke_seg.yaml")]
    opts = ["--opts", "OUTPUT", str(tmp_path), *TINY, "TRAIN.MAX_STEPS", "1"]
    program.main([*command, *opts])
    (last,) = tmp_path.rglob("last.pth")
    for count in (3, 1):
        program.main(
            [*command, "--eval", "--resume", str(last), *opts, "TEST.PICTURES", str(count)]
        )
        assert len(list((last.parent.parent / "pictures").iterdir())) == count


def test_pictures_of_images_that_share_a_name_are_all_kept(tmp_path):
    picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
    task = SimpleNamespace(predict=lambda *_: [None], picture=lambda *_: picture)
    amp = Amp(enabled=False)
    draw = Drawing(nn.Identity(), task, amp, [], [0.5], [0.5], tmp_path)
    sizes = dict(size=(4, 4), original_size=(4, 4))
    files = ["day/a.png", "night/a.jpg"]
    batches = [(torch.zeros(1, 3, 4, 4), [dict(file=file, **sizes)]) for file in files]
    paths = [draw(batch, number) for number, batch in enumerate(batches)]
    assert [path.name for path in paths] == ["0000_a.png", "0001_a.png"]
    assert sorted(tmp_path.iterdir()) == paths


@TASKS
def test_a_run_that_was_cut_off_goes_on_bit_by_bit(task, head, tmp_path):
    """Mask R-CNN draws proposals at random, so the generators must come back too."""

    def run(folder):
        opts = ["OUTPUT", str(tmp_path / folder), *TINY, *head, "TRAIN.MAX_STEPS", "4"]
        opts += ["SAVE_STEPS", "1", "TRAIN.EMA.ENABLE", "True", "TRAIN.ACCUMULATION_STEPS", "2"]
        program.main(["--cfg", str(CONFIG_DIR / "_base_" / f"smoke_{task}.yaml"), "--opts", *opts])
        (last,) = (tmp_path / folder).rglob("last.pth")
        return torch.load(last, weights_only=True)

    whole = run("whole")
    with interrupted_after_saving(step=1):  # in the middle of the first epoch
        run("parts")
    parts = run("parts")
    for part in ("model", "ema"):
        assert whole[part].keys() == parts[part].keys()
        assert all(torch.equal(tensor, parts[part][name]) for name, tensor in whole[part].items())
    assert whole["metrics"] == parts["metrics"]


@TASKS
def test_the_whole_and_the_backbone_are_timed_and_counted(task, head, tmp_path):
    command = ["--cfg", str(CONFIG_DIR / "_base_" / f"smoke_{task}.yaml")]
    opts = ["--opts", "OUTPUT", str(tmp_path), *TINY, *head]
    program.main([*command, "--throughput", *opts, "THROUGHPUT_SIZE", "[96, 70]"])
    (file,) = tmp_path.rglob("throughput.json")
    timed = json.loads(file.read_text())
    assert min(timed["img_per_s"], timed["backbone"]["img_per_s"]) > 0
    for part in (timed, timed["backbone"]):
        assert (part["height"], part["width"]) == (96, 70)
    assert timed["backbone"].keys() >= {"latency_ms_p50", "latency_ms_p95", "peak_memory_mib"}
    program.main([*command, "--info", *opts, "INFO_SIZE", "[128, 96]"])
    (file,) = tmp_path.rglob("info.json")
    assert json.loads(file.read_text())["input_shape"] == [1, 3, 128, 96]


@pytest.mark.parametrize("part", ["backbone", "model"])
def test_only_a_head_that_knows_something_is_scored_before_training(part, tmp_path):
    """A detector with a fresh head finds nothing, and looks for it in the whole validation set."""
    file = str(CONFIG_DIR / "_base_" / "smoke_seg.yaml")
    model = build_model(load_config(file), num_classes=4)
    weights = (model.backbone if part == "backbone" else model).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    opts = ["--opts", "OUTPUT", str(tmp_path), *TINY, "TRAIN.MAX_STEPS", "1"]
    program.main(["--cfg", file, "--pretrained", str(tmp_path / "weights.pth"), *opts])
    (log,) = tmp_path.rglob("log_rank0.txt")
    assert ("not scored before training: head." in log.read_text()) is (part == "backbone")
    assert ("before training:  * mIoU" in log.read_text()) is (part == "model")


def test_info_of_a_routed_detector_is_the_mean_over_images_of_the_size_that_is_counted(tmp_path):
    """DGE asks as many queries as its routers choose; images of a detector have different sizes."""
    opts = ["OUTPUT", str(tmp_path), *TINY, "MODEL.TYPE", "pvt_dge", "INFO_SIZE", "[128, 96]"]
    opts += ["MODEL.PVT_DGE.EMBED_DIMS", "[16, 16, 32, 32]", "MODEL.PVT_DGE.DEPTHS", "[1, 1, 1, 1]"]
    opts += ["MODEL.PVT_DGE.NUM_HEADS", "[1, 1, 2, 2]"]
    program.main(
        ["--cfg", str(CONFIG_DIR / "_base_" / "smoke_det.yaml"), "--info", "--opts", *opts]
    )
    (log,) = tmp_path.rglob("log_rank0.txt")
    assert "mean over 2 validation images" in log.read_text()
    (file,) = tmp_path.rglob("info.json")
    assert json.loads(file.read_text())["input_shape"] == [1, 3, 128, 96]


def test_no_batch_is_too_small_for_a_classifier_whatever_its_parts_are_called():
    config = load_config(CONFIG_DIR / "_base_" / "smoke_cls.yaml", ["DATA.BATCH_SIZE", "1"])
    model = Backbone()  # the contract asks for get_classifier(), not for a part called `head`
    check_batch_norm(config, model, Runtime(0, 1, 0, torch.device("cpu")))
