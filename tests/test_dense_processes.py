"""Dense tasks on several processes: every parameter is trained by DDP, every image is scored once."""

import json

import pytest

import main as program
from models import CONFIG_DIR
from tests.processes import run_on_two_processes

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


@pytest.mark.parametrize(("task", "head"), [("det", MASK_RCNN), ("seg", [])])
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
