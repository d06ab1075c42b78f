import json
import logging
import re
import sys
from contextlib import contextmanager

import pytest
import torch
from tqdm import tqdm

from logger import MetricsWriter, create_logger, kept_warnings, muted

# Swin's line: [time model] (file line): LEVEL message
LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\S+)\] \((\S+) (\d+)\): (\w+) (.*)")


@pytest.fixture(autouse=True)
def restore_root():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def lines(path):
    return path.read_text().splitlines()


def records(folder):
    return [json.loads(line) for line in lines(folder / "metrics.jsonl")]


def test_every_module_reaches_file_and_console_in_swins_format(tmp_path, capsys):
    create_logger(tmp_path, 0, "swin_tiny")
    logging.getLogger("engine.train").info("loss %.1f", 2.5)
    logging.getLogger("models.swin").debug("too detailed")
    expected = ("swin_tiny", "test_logger.py", "INFO", "loss 2.5")
    (line,) = lines(tmp_path / "log_rank0.txt")
    assert LINE.fullmatch(line).group(1, 2, 4, 5) == expected
    shown = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out).rstrip("\n")
    assert LINE.fullmatch(shown).group(1, 2, 4, 5) == expected


def test_other_ranks_write_their_file_only(tmp_path, capsys):
    create_logger(tmp_path / "new", 3).warning("here")
    assert "WARNING here" in (tmp_path / "new" / "log_rank3.txt").read_text()
    assert capsys.readouterr().out == ""


def test_a_second_call_does_not_double_lines(tmp_path, capsys):
    before = len(logging.getLogger().handlers)
    create_logger(tmp_path, 0, "a")
    create_logger(tmp_path, 0, "100%")
    logging.getLogger("x").info("once")
    assert len(lines(tmp_path / "log_rank0.txt")) == 1
    assert capsys.readouterr().out.count("once") == 1
    assert len(logging.getLogger().handlers) == before + 2
    create_logger(None)
    assert len(logging.getLogger().handlers) == before + 1


def test_exceptions_are_logged_with_their_trace(tmp_path, capsys):
    log = create_logger(tmp_path)
    try:
        raise KeyError("lost")
    except KeyError:
        log.exception("failed")
    assert "KeyError: 'lost'" in (tmp_path / "log_rank0.txt").read_text()
    assert "KeyError: 'lost'" in capsys.readouterr().out


def test_a_progress_bar_and_log_lines_do_not_mix(tmp_path, capsys):
    log = create_logger(tmp_path)
    with tqdm(total=2, file=sys.stdout, mininterval=0) as bar:
        bar.update()
        log.info("in between")
        bar.update()
    shown = capsys.readouterr().out
    (line,) = [part for part in re.split(r"[\r\n]", shown) if "in between" in part]
    assert "it/s" not in line
    assert "%" not in line


def test_metrics_are_appended_as_one_json_object_per_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 10, {"loss": torch.tensor(1.5), "lr": 1e-3, "note": "warm-up"})
        assert records(tmp_path) == [  # flushed: readable while the run goes on
            {"kind": "train", "step": 10, "loss": 1.5, "lr": 1e-3, "note": "warm-up"}
        ]
        writer.write("eval", 10, {"acc1": 50})
    with MetricsWriter(tmp_path, resume_step=10) as writer:
        writer.write("eval", 20, {"acc1": 60})
    assert [r["step"] for r in records(tmp_path)] == [10, 10, 20]
    writer.write("eval", 30, {})
    assert len(records(tmp_path)) == 3


def test_what_json_cannot_say_is_valid_json(tmp_path):
    values = {"a": float("nan"), "b": float("inf"), "c": torch.tensor(-float("inf"))}
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("train", 1, values)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    (line,) = lines(tmp_path / "metrics.jsonl")
    record = json.loads(line, parse_constant=refuse)
    assert [record[key] for key in "abc"] == ["NaN", "Infinity", "-Infinity"]
    assert float(record["c"]) == -float("inf")


def test_lines_after_the_resume_step_move_away(tmp_path):
    """Trap 12: logs that do not say what the run did."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (10, 20, 30):
            writer.write("train", step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    with MetricsWriter(tmp_path, resume_step=20, tensorboard=False) as writer:
        writer.write("train", 30, {"loss": 31})
    assert [r["loss"] for r in records(tmp_path)] == [10, 20, 31]
    moved = lines(tmp_path / "metrics.replaced.jsonl")
    assert json.loads(moved[0])["loss"] == 30
    assert len(moved) == 2


def test_lines_of_an_unfinished_accumulation_move_away(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for batch in range(13):
            writer.write("train", batch // 4, {"epoch": 1, "batch": batch})
    # The checkpoint is of 2 steps, so of 8 batches.
    with MetricsWriter(tmp_path, resume_step=2, tensorboard=False, position=(1, 8)) as writer:
        writer.write("train", 2, {"epoch": 1, "batch": 8})
    assert [r["batch"] for r in records(tmp_path)] == [*range(8), 8]
    moved = [json.loads(line)["batch"] for line in lines(tmp_path / "metrics.replaced.jsonl")]
    assert moved == [8, 9, 10, 11, 12]


def test_a_score_that_was_not_saved_is_made_again(tmp_path):
    for saved, kept in (((1, 4), [0]), ((2, 0), [0, 1])):
        folder = tmp_path / str(saved[0])
        with MetricsWriter(folder, tensorboard=False) as writer:
            for epoch in range(2):
                writer.write("train", 4 * epoch + 4, {"epoch": epoch, "batch": 3})
                writer.write("eval", 4 * epoch + 4, {"epoch": epoch, "acc1": 50.0})
        MetricsWriter(folder, resume_step=8, tensorboard=False, position=saved).close()
        found = records(folder)
        assert [r["epoch"] for r in found if r["kind"] == "train"] == [0, 1]
        assert [r["epoch"] for r in found if r["kind"] == "eval"] == kept


def test_a_fresh_run_moves_all_lines_of_an_earlier_one_away(tmp_path):
    for loss in (1.0, 2.0):
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write("train", 0, {"loss": loss})
    assert [r["loss"] for r in records(tmp_path)] == [2.0]
    assert len(lines(tmp_path / "metrics.replaced.jsonl")) == 1


@contextmanager
def no_handlers():
    """As in a program: pytest has handlers of its own, which come with each phase of a test."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers = before


def test_warnings_before_the_logger_come_first_in_it(tmp_path, capfd):
    with no_handlers():
        for number in range(3):  # only what the last check has said counts
            with kept_warnings():
                logging.getLogger("early").info("nothing")
                logging.getLogger("early").warning("boxes leave their image, %d", number)
        assert "boxes" not in "".join(capfd.readouterr())
        create_logger(tmp_path, name="swin").info("started")
        create_logger(tmp_path / "again", name="swin")
    first, second = lines(tmp_path / "log_rank0.txt")
    assert first.endswith("WARNING boxes leave their image, 2")
    assert second.endswith("INFO started")
    assert capfd.readouterr().out.count("boxes leave") == 1
    assert not lines(tmp_path / "again" / "log_rank0.txt")


def test_handlers_of_others_get_early_warnings_once(tmp_path):
    seen = []

    class Other(logging.Handler):
        def emit(self, record):
            seen.append(record.getMessage())

    with no_handlers():
        logging.getLogger().addHandler(Other())
        with kept_warnings():
            logging.getLogger("early").warning("boxes leave their image")
        create_logger(tmp_path, name="swin")
    assert seen == ["boxes leave their image"]


def test_warnings_before_an_error_are_said_with_it(capfd):
    def check():
        with kept_warnings():
            logging.getLogger("early").warning("boxes leave their image")
            raise ValueError("stop")

    with no_handlers():
        with pytest.raises(ValueError, match="stop"):
            check()
        assert not logging.getLogger().handlers
    assert capfd.readouterr().err == "boxes leave their image\n"


def test_other_ranks_write_no_metrics(tmp_path):
    with MetricsWriter(tmp_path, rank=1) as writer:
        writer.write("train", 1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_numbers_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 5, {"loss": 2.0, "note": "text"})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(5, 2.0)]


def test_a_resumed_run_draws_the_saved_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for batch in (1, 3, 5):
            # Two batches to a step: the last one is of a step that was not saved whole.
            writer.write("train", (batch + 1) // 2, dict(epoch=0, batch=batch, loss=batch))
        writer.write("train", 2, dict(epoch=0, batch=4, loss=4.5))
    with MetricsWriter(tmp_path, resume_step=2, position=(0, 4)) as writer:
        writer.write("train", 2, dict(epoch=0, batch=4, loss=4.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 3.0), (2, 4.0)]


def test_without_tensorboard_the_run_goes_on_with_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"loss": 1.0})
        writer.write("train", 2, {"loss": 1.0})
    assert len(records(tmp_path)) == 2
    assert caplog.text.count("pip install tensorboard") == 1


def test_what_is_muted_is_not_said_and_the_rest_is(caplog):
    log = logging.getLogger("some.module")
    with muted():
        log.warning("later")
        log.error("now")
        with muted(logging.ERROR):
            log.error("not this")
        log.error("again")
    log.warning("then")
    assert [record.message for record in caplog.records] == ["now", "again", "then"]
