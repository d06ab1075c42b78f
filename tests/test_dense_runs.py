"""What holds for classification holds for dense tasks: processes, resuming, averages, timing."""

import json

import pytest
import torch

import main as program
from models import CONFIG_DIR
from tests.processes import interrupted_after_saving, run_on_two_processes

RUN = "import sys, main; main.main(sys.argv[1:])"
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
def test_two_processes_train_and_score_as_one(task, head, tmp_path):
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
    program.main([*command, "--throughput", *opts])
    (file,) = tmp_path.rglob("throughput.json")
    timed = json.loads(file.read_text())
    assert min(timed["img_per_s"], timed["backbone"]["img_per_s"]) > 0
    assert timed["backbone"].keys() >= {"latency_ms_p50", "latency_ms_p95", "peak_memory_mib"}
    program.main([*command, "--info", *opts, "INFO_SIZE", "[128, 96]"])
    (file,) = tmp_path.rglob("info.json")
    assert json.loads(file.read_text())["input_shape"] == [1, 3, 128, 96]
