"""The program as a user runs it: modes, files, resuming, launchers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import main as program
from logger import MetricsWriter
from models import CONFIG_DIR
from modes import training
from tests.processes import free_port, interrupted_after_saving, run_on_two_processes
from utils.arguments import parse_args

ROOT = CONFIG_DIR.parent
SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args: str, cfg: str = SMOKE) -> Path:
    """main.py in this process -> the output folder."""
    program.main(["--cfg", cfg, "--output", "out", *args])
    return Path("out/smoke_cls/default")


def command(*args: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [
        sys.executable,
        *launcher,
        str(ROOT / "main.py"),
        "--cfg",
        SMOKE,
        "--output",
        "out",
        *args,
    ]


def launch(*args: str, launcher: tuple[str, ...] = ()) -> str:
    """main.py in processes of its own -> what it printed."""
    done = subprocess.run(
        command(*args, launcher=launcher),
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def last_state(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.pth", weights_only=True)


def lines(folder: Path) -> list[dict]:
    """What the run recorded."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Output folder of a finished smoke run."""
    folder = tmp_path_factory.mktemp("trained")
    program.main(["--cfg", SMOKE, "--output", str(folder)])
    return folder / "smoke_cls" / "default"


def test_training_leaves_every_promised_file(trained):
    names = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert names >= {
        "config.yaml",
        "log_rank0.txt",
        "metrics.jsonl",
        "curves.png",
        "eval.json",
        "throughput.json",
        "checkpoints/last.pth",
        "checkpoints/best.pth",
        "checkpoints/epoch_0.pth",
        "checkpoints/epoch_1.pth",
    }
    assert any(name.startswith("tensorboard/") for name in names)
    evaluation = json.loads((trained / "eval.json").read_text())
    assert evaluation["images"] == 20
    assert {"acc1", "acc5", "loss"} <= evaluation.keys()
    speed = json.loads((trained / "throughput.json").read_text())
    promised = "model img_per_s latency_ms_p50 latency_ms_p95 batch_size dtype device compile"
    assert {*promised.split(), "channels_last", "peak_memory_mib"} <= speed.keys()
    assert speed["deployed"] is True
    assert {"cpu", "threads", "torch", "commit"} <= speed["machine"].keys()
    log = (trained / "log_rank0.txt").read_text()
    assert (trained / "config.yaml").read_text().rstrip() in log, "every setting"
    assert re.search(r"machine: cpu .*, threads \d+, processes 1, .*torch \d", log)
    assert re.search(r"Train: \[1/2\]\[3/4\]\teta .* lr \d.*loss \d.*grad_norm \d.*mem \d+MB", log)
    assert "Summary" in log


def test_a_checkpoint_holds_all_that_a_run_needs_and_plain_data_only(trained):
    state = last_state(trained)
    assert {"model", "ema", "optimizer", "scheduler", "scaler", "progress", "rng"} <= state.keys()
    assert {"metrics", "best", "config", "git", "classes", "versions"} <= state.keys()
    assert state["progress"]["epoch"] == 2
    assert len(state["classes"]) == 10


def test_the_dumped_config_gives_the_same_weights_again(trained):
    program.main(["--cfg", str(trained / "config.yaml"), "--output", "again"])
    again = Path("again/smoke_cls/default/checkpoints/last.pth")
    assert same(weights(again), weights(trained / "checkpoints" / "last.pth"))


def test_eval_scores_exactly_the_file_it_is_given_and_never_trains(trained):
    """Trap: auto-resume replaces an explicit --resume by the newest file of the output folder."""
    own = Path("out/smoke_cls/default/checkpoints")
    own.mkdir(parents=True)
    shutil.copy(trained / "checkpoints" / "epoch_0.pth", own / "last.pth")
    before = (own / "last.pth").read_bytes()
    target = trained / "checkpoints" / "last.pth"
    folder = run("--eval", "--resume", str(target))
    recorded = torch.load(target, weights_only=True)["metrics"]
    evaluation = json.loads((folder / "eval.json").read_text())
    assert evaluation["checkpoint"] == str(target)
    assert evaluation["loss"] == pytest.approx(recorded["loss"], abs=1e-6)
    other = torch.load(own / "last.pth", weights_only=True)["metrics"]
    assert evaluation["loss"] != pytest.approx(other["loss"], abs=1e-6)
    assert (own / "last.pth").read_bytes() == before
    assert "Train:" not in (folder / "log_rank0.txt").read_text()


def test_eval_with_nothing_to_evaluate_is_an_error(capsys):
    """Trap: `--eval` without `--resume` starts training."""
    with pytest.raises(SystemExit):
        run("--eval")
    assert "--eval has nothing to evaluate" in capsys.readouterr().err
    assert not Path("out").exists()


def test_fewer_images_than_a_batch_stop_before_any_work(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--opts", "DATA.SYNTHETIC.TRAIN_SIZE", "15", "DATA.BATCH_SIZE", "16")
    assert stop.value.code == 2
    assert "15 images, and one batch needs 16" in capsys.readouterr().err
    assert not Path("out").exists()


def other_order(state):
    state["classes"].reverse()


def without_heads_row(state):
    state["model"] = {k: v[:-1] if "head" in k else v for k, v in state["model"].items()}


@pytest.mark.parametrize("flag", ["--eval --resume", "--eval --pretrained", "--resume"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_order, "these are the same classes in another order"),
        (without_heads_row, "head"),
        (lambda state: state.update(model={"w": torch.ones(1)}), "DHVT"),
    ],
    ids=["order", "count", "architecture"],
)
def test_weights_of_other_classes_stop_before_any_work(trained, flag, change, message, capsys):
    state = last_state(trained)
    change(state)
    torch.save(state, "other.pth")
    with pytest.raises(SystemExit) as stop:
        run(*flag.split(), "other.pth")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("flag", ["--eval --resume", "--pretrained", "--resume", "--info --resume"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"model: 1", "is no checkpoint"),
        (None, "damaged or cut off"),
    ],
    ids=["empty", "text", "cut off"],
)
def test_files_that_are_no_weights_stop_before_any_work(trained, flag, content, message, capsys):
    whole = (trained / "checkpoints" / "last.pth").read_bytes()
    Path("bad.pth").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(SystemExit) as stop:
        run(*flag.split(), "bad.pth")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_weights_alone_are_nothing_to_continue(trained, capsys):
    torch.save({"model": weights(trained / "checkpoints" / "last.pth")}, "weights.pth")
    with pytest.raises(SystemExit):
        run("--resume", "weights.pth")
    assert "its weights alone load with --pretrained" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(
            "--resume", str(trained / "checkpoints" / "last.pth"),
            "--opts", "TRAIN.EMA.ENABLE", "True",
        )  # fmt: skip
    assert "has no 'ema', which this run needs" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_teacher_of_other_classes_stops_before_any_work(trained, capsys):
    with pytest.raises(SystemExit):
        run(
            "--opts", "TRAIN.DISTILLATION.TYPE", "hard", "DATA.SYNTHETIC.NUM_CLASSES", "7",
            "TRAIN.DISTILLATION.TEACHER", str(trained / "config.yaml"),
            "TRAIN.DISTILLATION.TEACHER_WEIGHTS", str(trained / "checkpoints" / "last.pth"),
        )  # fmt: skip
    assert "must have the student's 7 classes" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_interrupted_run_equals_an_uninterrupted_one_bit_by_bit(trained, monkeypatch):
    evaluate = training.evaluate

    def fail_at_second_call(*args, **kwargs):
        if len(list(Path("out").rglob("epoch_0.pth"))):
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(training, "evaluate", fail_at_second_call)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(training, "evaluate", evaluate)
    folder = run()
    log = (folder / "log_rank0.txt").read_text()
    assert "auto-resume" in log
    assert same(
        weights(folder / "checkpoints" / "last.pth"), weights(trained / "checkpoints" / "last.pth")
    )
    train_steps = [line["step"] for line in lines(folder) if line["kind"] == "train"]
    assert train_steps == sorted(set(train_steps)), "no step is recorded twice"


def test_a_run_resumed_within_an_epoch_equals_an_uninterrupted_one_bit_by_bit(trained):
    with interrupted_after_saving(step=3):
        run("--opts", "SAVE_STEPS", "3")
    folder = run("--opts", "SAVE_STEPS", "3")
    assert same(
        weights(folder / "checkpoints" / "last.pth"), weights(trained / "checkpoints" / "last.pth")
    )


def test_ema_is_evaluated_saved_and_scored_by_eval():
    folder = run("--opts", "TRAIN.EMA.ENABLE", "True", "TRAIN.EMA.DECAY", "0.5")
    state = last_state(folder)
    assert not same(state["model"], state["ema"])
    run(
        "--eval", "--resume", str(folder / "checkpoints" / "last.pth"),
        "--opts", "TRAIN.EMA.ENABLE", "True",
    )  # fmt: skip
    evaluation = json.loads((folder / "eval.json").read_text())
    assert evaluation["loss"] == pytest.approx(state["metrics"]["loss"], abs=1e-6)
    log = folder / "log_rank0.txt"
    assert "has averaged weights too" not in log.read_text()
    run("--eval", "--resume", str(folder / "checkpoints" / "last.pth"))
    assert "has averaged weights too" in log.read_text()


def test_a_resumed_run_goes_on_in_batches_of_todays_size(trained, caplog):
    run("--opts", "TRAIN.EPOCHS", "1")
    folder = run("--batch-size", "4", "--opts", "TRAIN.EPOCHS", "2")
    log = (folder / "log_rank0.txt").read_text()
    assert "Train: [1/2][0/8]" in log
    assert "Train: [1/2][7/8]" in log
    assert "Train: [0/2]" not in log.split("auto-resume")[1]
    state = last_state(folder)
    assert state["progress"]["step"] == 16


def test_a_run_that_was_cut_by_max_steps_can_be_made_longer():
    run("--opts", "TRAIN.MAX_STEPS", "6")
    first = torch.load("out/smoke_cls/default/checkpoints/last.pth", weights_only=True)["progress"]
    assert (first["epoch"], first["batch"], first["step"]) == (1, 2, 6)
    folder = run("--opts", "TRAIN.MAX_STEPS", "10")
    last = last_state(folder)["progress"]
    assert (last["epoch"], last["batch"], last["step"]) == (2, 2, 10)


def test_max_steps_counts_the_steps_that_were_made():
    """Steps of two batch sizes are not a whole number of epochs of either."""
    run("--opts", "TRAIN.MAX_STEPS", "4")
    folder = run("--batch-size", "4", "--opts", "TRAIN.MAX_STEPS", "8")
    assert last_state(folder)["progress"]["step"] == 8
    assert "Train: [1/2][3/8]" in (folder / "log_rank0.txt").read_text()
    folder = run("--batch-size", "16", "--opts", "TRAIN.MAX_STEPS", "11")
    assert last_state(folder)["progress"]["step"] == 11
    scored = [line["step"] for line in lines(folder) if line["kind"] == "eval"]
    assert scored[-1] == 11


def test_a_run_that_max_steps_ended_is_scored_and_summed_up():
    run("--opts", "TRAIN.MAX_STEPS", "6")
    for _ in range(2):
        folder = run("--opts", "TRAIN.MAX_STEPS", "6")
        assert last_state(folder)["progress"]["step"] == 6
        assert "of 0 to 1\n" in (folder / "log_rank0.txt").read_text().rpartition("Summary")[2]
    with interrupted_after_saving(step=3):
        run("--tag", "cut", "--opts", "SAVE_STEPS", "3")
    run("--tag", "cut", "--opts", "TRAIN.MAX_STEPS", "3")
    assert json.loads(Path("out/smoke_cls/cut/eval.json").read_text())["epoch"] == 0


def test_an_epoch_that_ends_by_todays_batches_is_scored():
    size = ("--opts", "DATA.SYNTHETIC.TRAIN_SIZE", "30", "TRAIN.EPOCHS", "1")
    with interrupted_after_saving(step=6):  # after 24 images, where two batches of 12 end too
        run("--batch-size", "4", *size, "SAVE_STEPS", "6")
    folder = run("--batch-size", "12", *size)
    assert [line["epoch"] for line in lines(folder) if line["kind"] == "eval"] == [0]


def test_a_resume_in_other_batches_loses_no_line():
    epoch = ("--opts", "PRINT_FREQ", "1", "TRAIN.EPOCHS", "1")
    with interrupted_after_saving(step=1):
        run("--batch-size", "4", "--accumulation-steps", "2", *epoch, "SAVE_STEPS", "1")
    folder = run("--batch-size", "8", *epoch)
    found = [(line["step"], line["batch"]) for line in lines(folder) if line["kind"] == "train"]
    assert found == [(0, 0), (1, 1), (2, 1), (3, 2), (4, 3)]
    assert not (folder / "metrics.replaced.jsonl").exists()


def test_batches_after_the_last_save_are_not_logged_twice(monkeypatch):
    options = ("--batch-size", "4", "--accumulation-steps", "4")
    epoch = ("--opts", "PRINT_FREQ", "1", "TRAIN.EPOCHS", "1", "SAVE_STEPS", "1")
    write = MetricsWriter.write

    def stop_within_a_window(self, kind, step, values):
        write(self, kind, step, values)
        if values.get("batch") == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", stop_within_a_window)
        with pytest.raises(KeyboardInterrupt):
            run(*options, *epoch)
    folder = run(*options, *epoch)
    assert [line["batch"] for line in lines(folder) if line["kind"] == "train"] == [*range(8)]
    moved = (folder / "metrics.replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["batch"] for line in moved] == [4, 5]


def test_a_step_is_counted_where_its_window_ends():
    """In the middle of a window of today the rest of it makes a step."""
    with interrupted_after_saving(step=1):
        run("--opts", "SAVE_STEPS", "1")  # after 8 of 32 images
    options = ["--batch-size", "4", "--accumulation-steps", "4"]
    folder = run(*options, "--opts", "TRAIN.EPOCHS", "1")
    progress = last_state(folder)["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == (1, 0, 2)


@pytest.mark.parametrize("save_steps", ["0", "2"])
def test_the_last_epoch_is_scored_after_a_kill_in_its_evaluation(monkeypatch, save_steps):
    """What was trained is on the disk before it is scored."""
    options = ["--opts", "SAVE_STEPS", save_steps, "TRAIN.EPOCHS", "1"]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(*options)
    trained_weights = weights(Path("out/smoke_cls/default/checkpoints/last.pth"))
    folder = run(*options)
    assert [line["epoch"] for line in lines(folder) if line["kind"] == "eval"] == [0]
    if save_steps == "0":
        assert same(weights(folder / "checkpoints" / "last.pth"), trained_weights)


def test_rates_of_the_config_win_over_those_of_the_checkpoint():
    run("--opts", "TRAIN.EPOCHS", "1", "TRAIN.LR_MULTIPLIERS", "['head=10']")
    folder = run("--opts", "TRAIN.EPOCHS", "2", "TRAIN.LR_MULTIPLIERS", "['head=3']")
    groups = last_state(folder)["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {1.0, 3.0}


def test_another_optimizer_cannot_go_on(capsys):
    run("--opts", "TRAIN.EPOCHS", "1")
    with pytest.raises(SystemExit):
        run("--optim", "sgd", "--opts", "TRAIN.EPOCHS", "2")
    assert "NAME='sgd' cannot go on with the state of 'adamw'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["TRAIN.FREEZE", "['head']"], ["TRAIN.FREEZE", "['norm']"]),  # as many groups
        (["TRAIN.LAYER_DECAY", "1.0"], ["TRAIN.LAYER_DECAY", "0.5"]),
    ],
)
def test_other_parameter_groups_cannot_go_on(before, after, capsys):
    """PyTorch would give the moments of one parameter to another of its shape, or stop in the middle."""
    run("--opts", "TRAIN.EPOCHS", "1", *before)
    with pytest.raises(SystemExit):
        run("--opts", "TRAIN.EPOCHS", "2", *after)
    message = capsys.readouterr().err
    assert "not of the same parameters" in message
    assert "Resume with its TRAIN.FREEZE" in message


def test_settings_of_earlier_steps_stay_beside_those_of_later_ones():
    """Trap 12: logs without their configuration."""
    folder = run("--opts", "TRAIN.EPOCHS", "1")
    first = (folder / "config.yaml").read_text()
    run("--opts", "TRAIN.EPOCHS", "1")
    assert not list(folder.glob("config_*")), "the same settings"
    run("--opts", "TRAIN.EPOCHS", "2")
    assert (folder / "config_before_step_4.yaml").read_text() == first
    assert "EPOCHS: 2" in (folder / "config.yaml").read_text()


def test_a_finished_run_without_its_metrics_ends_well(caplog):
    """Only the checkpoints were copied to another machine."""
    folder = run("--opts", "TRAIN.EPOCHS", "1")
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    run("--opts", "TRAIN.EPOCHS", "1")
    assert (folder / "eval.json").is_file()
    assert "no curves" in caplog.text


def test_larger_steps_say_that_lines_of_later_steps_move(caplog):
    run("--opts", "TRAIN.EPOCHS", "1")
    folder = run("--batch-size", "16", "--opts", "TRAIN.EPOCHS", "2")
    assert "made after 4 steps, of fewer images: this run goes on at step 2" in caplog.text
    assert (folder / "metrics.replaced.jsonl").is_file()


def test_processes_with_different_files_stop_before_they_start(tmp_path):
    """Trap 16: the first machine would go on, and the others begin anew."""
    script = (
        "import os, sys, main\n"
        "sys.argv[1:] = sys.argv[1].split()\n"
        "os.makedirs(os.environ['RANK'], exist_ok=True)\n"
        "os.chdir(os.environ['RANK'])\n"
        "try:\n"
        "    main.main(sys.argv[1:])\n"
        "except SystemExit as error:\n"
        "    print('status', error.code)\n"
    )
    checkpoints = tmp_path / "0" / "out" / "smoke_cls" / "default" / "checkpoints"
    checkpoints.parent.mkdir(parents=True)
    shutil.copytree(run("--opts", "TRAIN.EPOCHS", "1") / "checkpoints", checkpoints)
    words = f"--cfg {SMOKE} --output out --opts TRAIN.EPOCHS 2 DEVICE cpu"
    printed = run_on_two_processes(script, words, timeout=240, folder=tmp_path)
    assert all("status 2" in text for text in printed)
    assert "process 1 would start from scratch, process 0 from out" in "".join(printed)
    assert "must be one that all machines share" in "".join(printed)
    assert not (tmp_path / "1" / "out").exists()


def test_the_best_of_another_run_is_not_that_of_this_one(trained):
    run("--opts", "TRAIN.EPOCHS", "1")
    state = last_state(trained)
    state["best"]["value"] = 1000.0
    torch.save(state, "other.pth")
    folder = run(
        "--resume", "other.pth", "--opts", "TRAIN.EPOCHS", "3", "TRAIN.AUTO_RESUME", "False"
    )
    best = torch.load(folder / "checkpoints" / "best.pth", weights_only=True)
    evaluation = json.loads((folder / "eval.json").read_text())
    assert evaluation["epoch"] == best["metrics"]["epoch"] == 2


def test_a_failed_run_does_not_wait_for_the_others_on_its_way_out(monkeypatch):
    """Trap: one process out of memory leaves the process group, which waits for those in a collective."""
    left = []
    monkeypatch.setattr(program, "cleanup", lambda: left.append(1))

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(program, "train", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
    assert not left
    run("--info")
    assert left


def test_opts_may_be_given_again():
    _, own, _ = parse_args(["--cfg", "x", "--opts", "A", "1", "--tag", "t", "--opts", "B", "2"])
    assert own.opts == ["A", "1", "B", "2"]


def test_weight_decay_of_the_config_wins_over_that_of_the_checkpoint():
    run("--opts", "TRAIN.EPOCHS", "1")
    folder = run("--opts", "TRAIN.EPOCHS", "2", "TRAIN.WEIGHT_DECAY", "0.5")
    groups = last_state(folder)["optimizer"]
    assert {group["weight_decay"] for group in groups["param_groups"]} == {0.0, 0.5}
    assert "taken from the config" in (folder / "log_rank0.txt").read_text()


def test_sgd_becomes_nesterov_where_the_config_gives_momentum():
    run("--optim", "sgd", "--opts", "TRAIN.EPOCHS", "1", "TRAIN.OPTIMIZER.MOMENTUM", "0.0")
    folder = run("--optim", "sgd", "--opts", "TRAIN.EPOCHS", "2")
    groups = last_state(folder)["optimizer"]["param_groups"]
    assert {(group["momentum"], group["nesterov"]) for group in groups} == {(0.9, True)}


def test_evaluations_can_be_rarer_than_epochs():
    folder = run("--opts", "TRAIN.EPOCHS", "3", "EVAL_FREQ", "2")
    records = lines(folder)
    assert [r["epoch"] for r in records if r["kind"] == "eval"] == [1, 2]


def test_pretrained_weights_take_a_new_head_and_are_scored_before_training(trained):
    folder = run(
        "--pretrained", str(trained / "checkpoints" / "best.pth"),
        "--opts", "DATA.SYNTHETIC.NUM_CLASSES", "7", "TRAIN.EPOCHS", "1",
    )  # fmt: skip
    log = (folder / "log_rank0.txt").read_text()
    assert "starting from" in log
    assert "classifier not taken from the file" in log
    assert "before training:" in log
    scored = [line for line in lines(folder) if line["kind"] == "eval"]
    assert [line["step"] for line in scored] == [0, 4]
    assert scored[0]["images"] == scored[1]["images"] == 20


@pytest.mark.parametrize(
    "opts",
    [
        ["TRAIN.ACCUMULATION_STEPS", "3", "TRAIN.USE_CHECKPOINT", "True"],
        ["AMP_DTYPE", "bf16", "CHANNELS_LAST", "True", "DETERMINISTIC", "True"],
        ["TRAIN.OPTIMIZER.NAME", "lamb", "TRAIN.LR_SCHEDULER.NAME", "poly", "TRAIN.MAX_STEPS", "5"],
        ["TRAIN.CLIP_GRAD", "0", "AUG.MIXUP", "0.0", "TRAIN.LAYER_DECAY", "0.8"],
    ],
    ids=["accumulate", "bf16", "lamb-poly", "plain"],
)
def test_switches_train_together(opts):
    folder = run("--opts", *opts)
    assert (folder / "eval.json").is_file()


def test_throughput_and_info_need_no_data():
    args = ["--cfg", str(CONFIG_DIR / "dfvt" / "dfvt_tiny.yaml"), "--output", "out"]
    program.main([*args, "--info"])
    info = json.loads(Path("out/dfvt_tiny/default/info.json").read_text())
    assert info["gmacs"] == pytest.approx(0.306, rel=0.01)
    assert info["params_m"] == pytest.approx(3.967627, rel=1e-6)
    folder = run("--throughput", "--batch-size", "2")
    speed = json.loads((folder / "throughput.json").read_text())
    assert speed["batch_size"] == 2
    assert speed["img_per_s"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batchsize", "3"], "--batch-size"),
        (["--opts", "TRAIN.EPOCH", "3"], "TRAIN.EPOCHS"),
        (["--amp-opt-level", "O3"], "O3"),
        (["--eval", "--throughput"], "exclude each other"),
        (["--opts", "DEVICE", "gpu"], "DEVICE='gpu' must be one of auto, cpu"),
        (["--opts", "TRAIN.EPOCHS", "0"], "leave nothing to train"),
        (["--opts", "MODEL.TYPE", "swin_moe"], "mixture-of-experts models are not part"),
        (["--eval", "--resume", "none.pth"], "none.pth does not exist"),
        (
            ["--eval", "--resume", "http://127.0.0.1:9/x.pth"],
            "cannot download http://127.0.0.1:9/x.pth",
        ),
        (["--eval", "--resume", "x" * 300], "File name too long"),
        (["--batch-size", "7"], "DATA.BATCH_SIZE=7 must be even"),
        (["--optim", "adamww"], "did you mean one of ['adamw'"),
        (["--opts", "DATA.DATASET", "imagnet"], "did you mean one of ['imagenet'"),
        (["--opts", "DATA.DATASET", "imagenet"], "train does not exist; DATA.DATA_PATH"),
        (["--opts", "DATA.MEAN", "[0.5, 0.5]"], "DATA.MEAN=[0.5, 0.5]"),
        (["--opts", "AUG.AUTO_AUGMENT", "rnd-m9"], "AUG.AUTO_AUGMENT='rnd-m9'"),
        (["--opts", "TRAIN.OPTIMIZER.BETAS", "[0.9, 0.9, 0.9]"], "OPTIMIZER.BETAS"),
        (["--opts", "MODEL.NUM_CLASSES", "7"], "MODEL.NUM_CLASSES=7"),
        (["--opts", "AMP_OPT_LEVEL", "O1"], "NVIDIA Apex"),
        (["--info", "--opts", "MODEL.DHVT.NUM_HEADS", "3"], "MODEL.DHVT: num_heads=3"),
    ],
)
def test_mistakes_on_the_command_line_stop_before_any_work(args, message, capsys):
    """Trap: misspelt flags are dropped silently."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("architecture", ["dfvt", "dilateformer"])
def test_one_pixel_of_one_image_has_no_variance(architecture, capsys):
    one = ["DATA.BATCH_SIZE", "1", "AUG.MIXUP", "0", "AUG.CUTMIX", "0", "TRAIN.MAX_STEPS", "1"]
    small = ["DATA.DATASET", "synthetic", "DATA.NUM_WORKERS", "0", "DATA.IMG_SIZE", "32"]
    cfg = str(CONFIG_DIR / architecture / f"{architecture}_tiny.yaml")
    with pytest.raises(SystemExit):
        run("--opts", *one, *small, cfg=cfg)
    assert "DATA.BATCH_SIZE=1 and DATA.IMG_SIZE=32: the last batch norms" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.DHVT.EMBED_DIM", "64"], "MODEL.DHVT.EMBED_DIM 32 there, 64 here"),
        (["MODEL.TYPE", "deit"], "MODEL.TYPE 'dhvt' there, 'deit' here"),
    ],
)
def test_a_run_does_not_go_on_with_another_model(opts, message, capsys):
    run("--opts", "TRAIN.MAX_STEPS", "1")
    with pytest.raises(SystemExit):
        run("--opts", "TRAIN.MAX_STEPS", "2", *opts)
    error = capsys.readouterr().err
    assert message in error
    assert "another --tag" in error


def test_training_images_that_are_missing_stop_the_run_before_any_work(tmp_path, capsys):
    image = tmp_path / "data" / "val" / "cat" / "1.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(image)
    with pytest.raises(SystemExit):
        run("--data-path", str(tmp_path / "data"), "--opts", "DATA.DATASET", "imagenet")
    assert "train does not exist; DATA.DATA_PATH" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("mode", [["--info"], ["--throughput"]])
def test_the_recipe_of_training_does_not_stop_a_mode_that_needs_none(mode):
    opts = ["MODEL.IN_CHANS", "1", "DATA.DATASET", "imagenet22K", "AUG.MIXUP", "0.8"]
    folder = run(*mode, "--batch-size", "1", "--opts", *opts)
    assert (folder / f"{mode[0].strip('-')}.json").is_file()


def test_published_data_gives_the_classes_that_its_models_have():
    sizes = []
    for name in ("imagenet22K", "cifar10"):
        folder = run("--info", "--opts", "DATA.DATASET", name)
        sizes.append(json.loads((folder / "info.json").read_text())["params_m"])
    assert sizes[0] > 5 * sizes[1]


def test_flags_that_were_not_given_override_nothing():
    """Trap: `--cache-mode` and `--output` have defaults that override YAML and --opts."""
    _, _, flags = parse_args(["--cfg", "x.yaml"])
    assert flags == {}


@pytest.mark.parametrize("flag", ["--local_rank", "--local-rank"])
def test_local_rank_by_hand_runs_one_process_and_does_not_hang(flag):
    """Trap: `--local_rank 0` passed by hand hangs; `--local-rank` is an unknown argument."""
    folder = run(flag, "0", "--info")
    assert (folder / "info.json").is_file()


def test_evaluation_is_identical_on_one_two_and_three_processes(trained):
    """Trap: distributed evaluation counts duplicates, and averages means of unequal batches."""
    args = ["--eval", "--resume", str(trained / "checkpoints" / "best.pth")]
    opts = ["--opts", "DATA.SYNTHETIC.VAL_SIZE", "101"]
    results = []
    for count in (1, 2, 3):
        own = [*args, "--tag", f"n{count}", *opts]
        if count == 1:
            run(*own)
        else:
            launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
            launch(*own, launcher=launcher)
        content = json.loads(Path(f"out/smoke_cls/n{count}/eval.json").read_text())
        results.append({key: content[key] for key in ("acc1", "acc5", "loss", "images")})
    assert results[0]["images"] == 101
    assert results[0] == results[1] == results[2]


def test_the_old_launcher_trains_on_two_processes():
    """Trap: KeyError LOCAL_RANK, unrecognized arguments --local-rank."""
    launcher = ("-W", "ignore", "-m", "torch.distributed.launch", "--nproc_per_node=2")
    opts = ["TRAIN.EPOCHS", "1", "TRAIN.EMA.ENABLE", "True", "TRAIN.EMA.DECAY", "0.9"]
    launch("--opts", *opts, launcher=(*launcher, f"--master_port={free_port()}"))
    folder = Path("out/smoke_cls/default")
    recorded = json.loads((folder / "eval.json").read_text())
    assert recorded["images"] == 20
    # Averages that started from other weights on each process would score otherwise alone.
    run("--eval", "--resume", str(folder / "checkpoints" / "last.pth"), "--opts", *opts)
    alone = json.loads((folder / "eval.json").read_text())
    assert alone["loss"] == pytest.approx(recorded["loss"], abs=1e-5)
    state = last_state(folder)
    assert len(state["rng"]) == 2
    assert state["progress"]["step"] == 2, "32 images, 8 per process: two steps"


def stopped(how: signal.Signals, *args: str) -> tuple[subprocess.CompletedProcess, Path]:
    """A run of its own that gets a signal once it has saved -> what it left, and its last.pth."""
    process = subprocess.Popen(
        command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    last = Path("out/smoke_cls/default/checkpoints/last.pth")
    deadline = time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stderr=errors), last


def test_an_interrupted_run_says_so_in_one_line():
    done, last = stopped(signal.SIGINT, "--opts", "TRAIN.EPOCHS", "400", "SAVE_FREQ", "400")
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr
    log = (last.parents[1] / "log_rank0.txt").read_text().splitlines()
    assert "WARNING interrupted" in log[-1]


def test_a_killed_run_continues_with_the_same_command_and_finishes():
    """Trap: resume does not restore."""
    _, last = stopped(signal.SIGKILL, "--opts", "TRAIN.EPOCHS", "40", "SAVE_FREQ", "100")
    progress = torch.load(last, weights_only=True)["progress"]
    # An epoch is saved before it is scored, and again after it.
    reached = progress["epoch"] + (progress["batch"] > 0)
    assert 1 <= reached < 40
    printed = launch("--opts", "TRAIN.EPOCHS", "40", "SAVE_FREQ", "100")
    assert "auto-resume" in printed
    assert f"Train: [{reached}/40][0/4]" in printed
    assert f"Train: [{reached - 1}/40]" not in printed
    assert torch.load(last, weights_only=True)["progress"]["epoch"] == 40


def test_an_architecture_is_added_by_two_files(tmp_path):
    """The two files are those of docs/adding_a_model.md, which this keeps true."""
    skipped = shutil.ignore_patterns(".git", ".venv", "output", "tests", "__pycache__")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=skipped)
    text = (ROOT / "docs" / "adding_a_model.md").read_text()
    blocks = dict(re.findall(r"## \d\. [^`]*`([^`]+)`\n\n```\w+\n(.*?)```", text, re.DOTALL))
    assert set(blocks) == {"models/toyformer.py", "configs/toyformer/toyformer_tiny.yaml"}
    for name, content in blocks.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(content)
    config = "configs/toyformer/toyformer_tiny.yaml"
    opts = "--opts DATA.DATASET synthetic DATA.NUM_WORKERS 0 DATA.BATCH_SIZE 8 DATA.IMG_SIZE 32"
    script = (
        "import models, main\n"
        "assert 'toyformer_tiny' in models.list_models()\n"
        "assert models.create_model('toyformer_tiny', num_classes=3).num_features == 48\n"
        f"main.main('--cfg {config} --info {opts}'.split())\n"
        f"main.main('--cfg {config} {opts} TRAIN.MAX_STEPS 2'.split())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = copy / "output" / "toyformer_tiny" / "default"
    assert json.loads((folder / "info.json").read_text())["gmacs"] > 0
    state = last_state(folder)
    assert state["progress"]["step"] == 2
    # The tests that every architecture has to pass.
    (copy / "tests").symlink_to(ROOT / "tests")
    names = ("contract", "build", "registry", "timm_registry", "compile", "freezing")
    tests = [f"tests/models/test_{name}.py" for name in names]
    words = [*("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "toyformer"), *tests]
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def refuse(*_, **__):
    raise PermissionError("no")


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        program.main(["--cfg", SMOKE, "--output", "file"])
    assert re.search(r"OUTPUT leads to file/.* is a file", capsys.readouterr().err)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(SystemExit):
        run()
    assert "nothing can be written to" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_part_of_the_output_folder_that_cannot_be_written_is_named(capsys, monkeypatch):
    """An epoch would be lost at its end."""
    folder = run("--opts", "TRAIN.MAX_STEPS", "1")
    monkeypatch.setattr("os.access", lambda path, _: Path(path).name != "checkpoints")
    run("--eval", "--resume", str(folder / "checkpoints" / "last.pth"))
    with pytest.raises(SystemExit):
        run("--opts", "TRAIN.MAX_STEPS", "2")
    assert "default/checkpoints cannot be written to" in capsys.readouterr().err


def test_info_of_weights_that_are_not_there_stops_before_any_work(capsys):
    with pytest.raises(SystemExit):
        run("--info", "--resume", "nowhere.pth")
    assert "nowhere.pth does not exist" in capsys.readouterr().err
    assert not Path("out").exists()


def test_info_of_a_routed_model_is_the_mean_over_images():
    """DGE asks as many queries as its routers choose, image by image."""
    cfg = str(CONFIG_DIR / "dge" / "deit_dge_s124_tiny_patch16_256.yaml")
    opts = ["--opts", "DATA.DATASET", "synthetic", "DATA.NUM_WORKERS", "0", "DATA.IMG_SIZE", "64"]
    opts += ["MODEL.DEIT_DGE.DEPTH", "1", "MODEL.NAME", "smoke_cls", "DATA.BATCH_SIZE", "4"]
    opts += ["DATA.SYNTHETIC.VAL_SIZE", "4"]
    folder = run("--info", *opts, cfg=cfg)
    assert "mean over 4 validation images" in (folder / "log_rank0.txt").read_text()
    gmacs = json.loads((folder / "info.json").read_text())["gmacs"]
    assert 0.005 < gmacs < 0.05, "one image of 16 tokens, not four"
