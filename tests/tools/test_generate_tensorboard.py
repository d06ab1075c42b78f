"""Curves from the logs of every line of work, with what is damaged counted and left out."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as program
from models import CONFIG_DIR
from tools import generate_tensorboard as tool

SWIN = """\
[2021-04-12 01:00:00 swin_tiny] (main.py 190): INFO Train: [0/300][0/1251]\teta 1:02:03 lr 0.000001\t\
time 2.9000 (2.9000)\tloss 6.9500 (6.9500)\tgrad_norm 1.5000 (1.5000)\tmem 7000MB
[2021-04-12 01:00:05 swin_tiny] (main.py 190): INFO Train: [0/300][1250/1251]\teta 0:00:00 lr 0.000025\t\
wd 0.0500\ttime 0.3000 (0.3000)\tloss 6.1000 (6.5000)\tgrad_norm nan (inf)\t\
loss_scale 65536.0 (65536.0)\tmem 7001MB
[2021-04-12 01:00:06 swin_tiny] (main.py 198): INFO EPOCH 0 training takes 0:10:00
[2021-04-12 01:00:07 swin_tiny] (main.py 260): INFO  * Acc@1 5.250 Acc@5 15.750
[2021-04-12 01:00:07 swin_tiny] (main.py 130): INFO Accuracy of the network on the 50000 test images: 5.2%
[2021-04-12 01:00:09 swin_tiny] (main.py 190): INFO Train: [1/300][0/1251]\teta 1:0
[2021-04-12 01:00:09 swin_tiny] (main.py 190): INFO Train: [1/300][10/1251]\teta 1:02:03 lr 0.000026\t\
time 0.3000 (0.3000)\tloss 6.
"""

DEIT = [
    dict(train_lr=1e-6, train_loss=6.9, test_loss=6.5, test_acc1=1.5, test_acc5=5.0, epoch=0),
    dict(train_lr=2e-4, train_loss=6.1, test_loss=5.5, test_acc1=8.5, test_acc5=20.0, epoch=1),
]

MIXED = """\
Namespace(batch_size=128, model='dilateformer_tiny')
number of params: 17239240
Epoch: [0]  [   0/1251]  eta: 1:02:03  lr: 0.000001  loss: 6.9500 (6.9500)  time: 2.9000  \
data: 1.5000  max mem: 7000
Epoch: [0]  [1250/1251]  eta: 0:00:00  lr: 0.000001  loss: 6.8000 (6.9000)  time: 0.3000  \
data: 0.0010  max mem: 7001
Epoch: [0] Total time: 0:10:00 (0.4800 s / it)
Epoch: [1]  [   0/1251]  eta: 1:02:03  lr: 0.0
Test:  [  0/261]  eta: 0:05:00  loss: 6.5000 (6.5000)  acc1: 1.0000 (1.0000)  time: 1.2  data: 0.9
* Acc@1 1.500 Acc@5 5.000 loss 6.500
Accuracy of the network on the 50000 test images: 1.5%
{"train_lr": 1e-06, "train_loss": 6.9, "test_loss": 6.5, "test_acc1": 1.5, "test_acc5": 5.0, \
"epoch": 0, "n_parameters": 17239240}
{"train_lr": 0.0002, "train_lo
"""

TIMM = """\
epoch,train_loss,eval_loss,eval_top1,eval_top5,lr
0,6.9,6.5,1.5,5.0,1e-06
1,6.1,5.5,8.5,20.0,0.0002
2,5.9,5.1
3,text,5.0,9.0,21.0,0.0004
"""


def write(path, text):
    path.write_text(text)
    return path


def test_swins_lines_become_curves_by_batches(tmp_path):
    log = tool.read_log(write(tmp_path / "log_rank0.txt", SWIN))
    assert set(log.values) == {("train", 1), ("train", 1251), ("eval", 1251)}
    first, last = log.values["train", 1], log.values["train", 1251]
    assert first == dict(epoch=0, lr=1e-6, time=2.9, loss=6.95, grad_norm=1.5, mem_mib=7000)
    assert (last["loss"], last["wd"], last["loss_scale"]) == (6.1, 0.05, 65536.0)
    assert last["grad_norm"] != last["grad_norm"], "nan"
    assert log.values["eval", 1251] == dict(acc1=5.25, acc5=15.75)
    assert log.damaged == 2


def test_deits_json_lines_become_curves_by_epochs(tmp_path):
    text = "".join(json.dumps(line | {"n_parameters": 5}) + "\n" for line in DEIT)
    log = tool.read_log(write(tmp_path / "log.txt", text + '{"train_lr": 0.1, "tr'))
    assert log.values == {
        ("train", 0): dict(epoch=0, lr=1e-6, loss=6.9),
        ("eval", 0): dict(epoch=0, loss=6.5, acc1=1.5, acc5=5.0),
        ("train", 1): dict(epoch=1, lr=2e-4, loss=6.1),
        ("eval", 1): dict(epoch=1, loss=5.5, acc1=8.5, acc5=20.0),
    }
    assert log.damaged == 1


def test_json_lines_among_printed_ones_are_found(tmp_path):
    """Trap: DilateFormer's run_log.txt gets the JSON lines and standard output alike."""
    log = tool.read_log(write(tmp_path / "run_log.txt", MIXED))
    assert set(log.values) == {("train", 1), ("train", 1251), ("eval", 1251)}
    assert log.values["train", 1]["loss"] == 6.95
    assert log.values["train", 1]["mem_mib"] == 7000
    assert log.values["train", 1251]["loss"] == 6.9, "the mean of the epoch, at its end"
    assert log.values["eval", 1251] == dict(epoch=0, acc1=1.5, acc5=5.0, loss=6.5)
    assert log.damaged == 2, "a batch and a JSON line that were cut off"


def test_timms_table_becomes_curves_by_epochs(tmp_path):
    log = tool.read_log(write(tmp_path / "summary.csv", TIMM))
    assert log.values == {
        ("train", 0): dict(epoch=0, loss=6.9, lr=1e-6),
        ("eval", 0): dict(epoch=0, loss=6.5, acc1=1.5, acc5=5.0),
        ("train", 1): dict(epoch=1, loss=6.1, lr=2e-4),
        ("eval", 1): dict(epoch=1, loss=5.5, acc1=8.5, acc5=20.0),
    }
    assert log.damaged == 2


def test_printed_scores_of_detection_and_segmentation_are_read(tmp_path, monkeypatch):
    lines = [
        "Train: [0/2][0/5]\teta 0:00:10 lr 0.1\t loss 2.0 (2.0)\t mem 10MB",
        " * AP 86.330 AP50 94.087 mask AP 66.994 mask AP50 90.880 (10 images)",
        "Train: [1/2][4/5]\teta 0:00:10 lr 0.1\t loss 1.0 (1.0)\t mem 10MB",
        " * mIoU 40.10 mAcc 50.00 aAcc 80.20 (10 images, 3 of 11 classes)",
        " * AP 86.3",
    ]
    log = tool.read_log(write(tmp_path / "log_rank0.txt", "\n".join(lines)))
    assert log.values["eval", 1] == dict(AP=86.33, AP50=94.087, mask_AP=66.994, mask_AP50=90.88)
    assert log.values["eval", 10] == dict(mIoU=40.1, mAcc=50.0, aAcc=80.2)
    assert log.damaged == 1
    drawn = []
    monkeypatch.setattr(tool, "plot_training", lambda *args: drawn.append(args[2]))
    tool.write_picture(log, tmp_path / "c.png")
    assert drawn == ["AP"]


def test_our_metrics_are_read_with_their_words_for_nan(tmp_path):
    lines = [
        '{"kind": "train", "step": 10, "loss": "NaN", "note": "text"}',
        '{"kind": "eval", "step": 10, "acc1": 50}',
        '{"kind": "train", "st',
        '{"kind": "train", "loss": 1.0}',
    ]
    log = tool.read_log(write(tmp_path / "metrics.jsonl", "\n".join(lines)))
    assert set(log.values) == {("train", 10), ("eval", 10)}
    assert list(log.values["train", 10]) == ["loss"]
    assert log.values["eval", 10] == dict(acc1=50.0)
    assert log.damaged == 2


def test_a_run_of_ours_gives_the_same_curves_from_both_of_its_logs(tmp_path):
    smoke = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")
    program.main(["--cfg", smoke, "--output", str(tmp_path), "--opts", "PRINT_FREQ", "1"])
    folder = tmp_path / "smoke_cls" / "default"
    exact = tool.read_log(folder)  # metrics.jsonl comes first
    printed = tool.read_log(folder / "log_rank0.txt")
    assert exact.damaged == printed.damaged == 0
    assert set(printed.values) == set(exact.values)
    for key, values in printed.values.items():
        for name in ("loss", "grad_norm", "lr", "acc1", "acc5"):
            if name in values:
                assert values[name] == pytest.approx(exact.values[key][name], abs=6e-4), key
    tool.main([str(folder), "--output", str(tmp_path / "curves"), "--png", str(tmp_path / "c.png")])
    events = EventAccumulator(str(tmp_path / "curves")).Reload()
    points = {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {step: v["loss"] for (kind, step), v in exact.values.items() if kind == "train"}
    assert points == pytest.approx(expected)
    assert len(points) == 8
    assert [event.step for event in events.Scalars("eval/acc1")] == [4, 8]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "hello\n", "epoch,lr\n", '{"a": 1}\n'])
def test_a_file_that_is_no_log_is_an_error(tmp_path, text, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main([str(write(tmp_path / "x.txt", text)), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "no line of a log that is known" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_and_what_is_there_already_are_errors(tmp_path, capsys):
    for path, message in ((tmp_path / "no", "does not exist"), (tmp_path, "has none of")):
        with pytest.raises(SystemExit):
            tool.main([str(path)])
        assert message in capsys.readouterr().err
    write(tmp_path / "summary.csv", TIMM)
    tool.main([str(tmp_path)])
    assert "2 rows; 2 damaged lines skipped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path)])
    assert "has curves already" in capsys.readouterr().err
