"""The training loop: what one optimizer step is, and that a run can be cut anywhere."""

import copy
import io
import logging
import math
import re

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from engine import evaluate, to_device, train_epoch
from lr_scheduler import Schedule
from models.evit import EViT
from tasks.classification import ClassificationTask
from utils.amp import Amp
from utils.ema import ModelEma

CPU = torch.device("cpu")


class Constant:
    """A timm-like scheduler that keeps one rate."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step_update(self, step):
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 + step)


def schedule_for(optimizer, total_steps=1000):
    """Step n has the rate base * (1 + n), so that a wrong step number changes the weights."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])

    def make(target):
        for group in target.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return Constant(target)

    return Schedule(make, optimizer, total_steps=total_steps, warmup_steps=3, steps_per_epoch=7)


class Net(nn.Module):
    """A small classifier with dropout and batch norm, so that modes and random states matter."""

    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.norm = nn.BatchNorm1d(32) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(32, 10)
        self.progress = []

    def set_progress(self, step, total_steps, warmup_steps, steps_per_epoch=None):
        self.progress.append((step, total_steps, warmup_steps, steps_per_epoch))

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x))))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def digits(num_batches, batch_size=8):
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    return [
        (images[i : i + batch_size], labels[i : i + batch_size])
        for i in range(0, num_batches * batch_size, batch_size)
    ]


def run(
    model, batches, *, lr=0.1, optimizer=None, total_steps=1000, amp=None, task=None, **options
):
    """One epoch with the defaults of these tests -> TrainResult."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    defaults = dict(device=CPU, amp=amp or Amp(), num_batches=len(batches), log_every=1000)
    return train_epoch(
        model,
        task or ClassificationTask(10),
        batches,
        optimizer,
        schedule_for(optimizer, total_steps),
        **(defaults | options),
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_batch_of_digits_is_learnt_by_heart():
    model, (batch,) = Net(norm=True), digits(1, batch_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = run(model, [batch], optimizer=optimizer).metrics["loss"]
    last = run(model, [batch] * 30, optimizer=optimizer).metrics["loss"]
    assert last < first / 2
    scores = evaluate(model, ClassificationTask(10), [batch], device=CPU, amp=Amp())
    assert scores["acc1"] == 100.0


def test_a_model_is_not_compiled_while_its_shapes_change():
    """EViT's keep rate falls at each step: one graph before, one after."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def evit():
        torch.manual_seed(0)
        sizes = dict(patch_size=2, embed_dim=16, depth=2, num_heads=2, drop_loc=(1,))
        sizes |= dict(img_size=8, in_chans=1, num_classes=10)
        return EViT(keep_rate=0.5, shrink_start_epoch=1, shrink_epochs=2, **sizes)

    plain, model = evit(), evit()
    torch.compiler.reset()
    batches = digits(24, batch_size=4)  # epochs of the schedule have 7 steps
    compiled = torch.compile(model, backend=backend)
    run(compiled, batches, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3))
    run(plain, batches, lr=1e-3)
    assert model.keep_rates == [1.0, 0.5]
    torch.testing.assert_close(weights(model), weights(plain))
    assert len(graphs) == 2


def test_an_epoch_that_only_has_to_be_scored_is_scored_as_after_its_last_step():
    """A run that is killed while it scores continues there; EViT's keep rate is part of the score."""
    model = Net()
    batches = digits(4)
    run(model, batches)
    last = model.progress[-1]
    model.progress.clear()
    run(model, [], num_batches=4, first_batch=4, step=4)
    assert model.progress == [last]


def test_accumulated_batches_equal_one_large_batch():
    accumulated, large = Net(), Net()
    large.load_state_dict(accumulated.state_dict())
    run(accumulated, digits(4, 8), accumulation_steps=4)
    run(large, digits(1, 32))
    torch.testing.assert_close(weights(accumulated), weights(large))


def test_the_last_partial_window_is_stepped_with_its_own_length():
    """Trap: Swin drops the gradients of a last incomplete accumulation window."""
    model, expected = Net(), Net()
    expected.load_state_dict(model.state_dict())
    batches = digits(5, 8)
    result = run(model, batches, accumulation_steps=4)
    assert result.step == 2
    run(expected, [tuple(torch.cat(part) for part in zip(*batches[:4], strict=True))])
    run(expected, batches[4:], step=1)
    torch.testing.assert_close(weights(model), weights(expected))


def test_accumulation_of_zero_means_one():
    """Trap: DFvT's default is 0, which divides the loss by zero."""
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    steps = [
        run(m, digits(3), accumulation_steps=n).step for m, n in zip(models, (0, 1), strict=True)
    ]
    assert steps == [3, 3]
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_clip_zero_is_off_and_the_norm_is_logged_anyway():
    """Trap: Swin's `is not None` test turns CLIP_GRAD 0 into clipping everything to zero."""
    model = Net()
    before = weights(model)
    metrics = run(model, digits(1), lr=1.0, clip_grad=0.0).metrics
    assert (weights(model) - before).norm() == pytest.approx(metrics["grad_norm"], rel=1e-4)
    clipped = Net()
    before = weights(clipped)
    metrics = run(clipped, digits(1), lr=1.0, clip_grad=0.01).metrics
    assert metrics["grad_norm"] > 0.1
    assert (weights(clipped) - before).norm() == pytest.approx(0.01, rel=1e-3)


def state_of(model, optimizer, ema, amp):
    return copy.deepcopy(
        dict(
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            ema=ema.state_dict(),
            scaler=amp.state_dict(),
            rng=torch.get_rng_state(),
        )
    )


def built(dtype):
    model = Net(dropout=0.5, norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, ModelEma(model, decay=0.9, warmup=True), Amp("cpu", dtype)


@pytest.mark.parametrize("dtype", ["float32", "fp16"])
def test_four_steps_equal_two_and_two_resumed_bitwise(dtype):
    """Trap: a resume that forgets scaler, average, schedule or random state jumps."""
    batches = digits(8)
    options = dict(accumulation_steps=2, clip_grad=1.0, num_batches=8)
    model, optimizer, ema, amp = built(dtype)
    start = state_of(model, optimizer, ema, amp)
    run(model, batches, optimizer=optimizer, ema=ema, amp=amp, **options)
    straight = state_of(model, optimizer, ema, amp)

    def restore(state):
        model, optimizer, ema, amp = built(dtype)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        amp.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        return model, optimizer, ema, amp

    saved = []
    model, optimizer, ema, amp = restore(start)
    run(
        model,
        batches[:4],
        optimizer=optimizer,
        ema=ema,
        amp=amp,
        total_steps=2,
        save_every=2,
        on_save=lambda *position: saved.append((position, state_of(model, optimizer, ema, amp))),
        **options,
    )
    ((step, next_batch), state) = saved[0]
    # Through a file, as the checkpoint goes.
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    model, optimizer, ema, amp = restore(torch.load(file, weights_only=True))
    result = run(
        model,
        batches[next_batch:],
        optimizer=optimizer,
        ema=ema,
        amp=amp,
        step=step,
        first_batch=next_batch,
        **options,
    )
    assert (step, next_batch, result.step) == (2, 4, 4)
    resumed = state_of(model, optimizer, ema, amp)
    for key in ("model", "ema"):
        assert all(torch.equal(resumed[key][n], v) for n, v in straight[key].items()), key
    for own, other in zip(
        resumed["optimizer"]["state"].values(), straight["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(own[name], other[name]) for name in own)
    assert resumed["scaler"] == straight["scaler"]
    assert torch.equal(resumed["rng"], straight["rng"])
    assert not torch.equal(straight["model"]["head.weight"], start["model"]["head.weight"])


def test_resuming_inside_an_accumulation_window_steps_its_rest():
    """After a change of the batch size the position need not be at the start of a window."""
    model, expected = Net(), Net()
    expected.load_state_dict(model.state_dict())
    batches = digits(4)
    result = run(model, batches[1:], first_batch=1, num_batches=4, accumulation_steps=2)
    run(expected, batches[1:2])
    run(expected, batches[2:], step=1, accumulation_steps=2)
    assert result.step == 2
    assert torch.equal(weights(model), weights(expected))


def test_the_schedule_ends_the_run_inside_an_epoch():
    assert run(Net(), digits(6), total_steps=5, step=2).step == 5


def test_a_loader_that_ends_early_is_an_error():
    with pytest.raises(RuntimeError, match="ended after batch 2 of 5"):
        run(Net(), digits(2), num_batches=5)


def test_models_see_their_progress_before_each_step():
    model = Net()
    ema = ModelEma(model)
    run(model, digits(4), accumulation_steps=2, step=5, ema=ema)
    assert model.progress == [(5, 1000, 3, 7), (6, 1000, 3, 7)]
    assert ema.module.progress == model.progress


def test_the_average_follows_every_step():
    model = Net()
    ema = ModelEma(model, decay=0.5)
    expected = weights(model)
    for step, batch in enumerate(digits(3)):
        run(model, [batch], ema=ema, step=step)
        expected = 0.5 * expected + 0.5 * weights(model)
    torch.testing.assert_close(weights(ema.module), expected)
    assert not torch.equal(weights(ema.module), weights(model))


def test_training_puts_the_model_in_training_mode():
    """Trap: DilateFormer and DHVT fine-tune in eval mode."""
    model = Net(norm=True).eval()
    run(model, digits(1), save_every=1, on_save=lambda *_: model.eval())
    assert model.training
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_advice(value):
    """Trap: an fp16 run that turned to NaN goes on for days."""
    batches = digits(4)
    batches[1] = (torch.full_like(batches[1][0], value), batches[1][1])
    with pytest.raises(
        FloatingPointError, match=r"step 4 .epoch 0, batch 3, lr 0.4.*bf16.*BASE_LR"
    ):
        run(Net(), batches)
    saved = []
    with pytest.raises(FloatingPointError, match="step 2"):
        run(Net(), batches, save_every=1, on_save=lambda *where: saved.append(where))
    assert saved == [(1, 1)]  # broken weights never reach a checkpoint


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_weights_that_a_gradient_made_nan_are_not_saved(clip_grad):
    """The loss before the step is finite, and the next one may be of the next epoch."""
    model, saved = Net(), []
    model.head.bias.register_hook(lambda grad: grad * (math.nan if saved else 1))
    with pytest.raises(
        FloatingPointError, match="the grad_norm became nan at or shortly before step 2"
    ):
        run(
            model,
            digits(2),
            save_every=1,
            clip_grad=clip_grad,
            on_save=lambda *where: saved.append(where),
        )
    assert saved == [(1, 1)]


def test_no_step_between_log_lines_reads_from_the_device():
    """Trap: `.item()` in every step makes the GPU wait for the host.

    Any read of a tensor's value (item, float, bool, tolist of one) runs this one operator.
    """

    def reads(num_batches, log_every):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
            run(
                Net(), digits(num_batches), clip_grad=1.0, log_every=log_every,
                accumulation_steps=2, amp=Amp("cpu", "bf16"),
            )  # fmt: skip
        counts = {event.key: event.count for event in profile.key_averages()}
        return counts.get("aten::_local_scalar_dense", 0)

    assert reads(16, log_every=1000) == reads(4, log_every=1000) > 0
    assert reads(16, log_every=2) > reads(16, log_every=1000)


SWIN_LINE = re.compile(
    r"Train: \[(\d+)/(\d+)\]\[(\d+)/(\d+)\]\teta (\S+) lr (\d+\.\d{6})\t wd (\d+\.\d{4})\t"
    r"time (\d+\.\d{4}) \((\d+\.\d{4})\)\tloss (\d+\.\d{4}) \((\d+\.\d{4})\)\t"
    r"grad_norm (\d+\.\d{4}) \((\d+\.\d{4})\)\tloss_scale (\d+\.\d{4}) \((\d+\.\d{4})\)\tmem (\d+)MB$"
)


def test_log_lines_have_the_format_of_swin(caplog):
    with caplog.at_level(logging.INFO, logger="engine.train"):
        run(Net(), digits(5), log_every=2, epoch=3, epochs=9)
    matches = [SWIN_LINE.match(message) for message in caplog.messages]
    assert [match.group(1, 2, 3, 4) for match in matches] == [
        ("3", "9", str(index), "5") for index in (0, 2, 4)
    ]
    assert [match[6] for match in matches] == ["0.100000", "0.300000", "0.500000"]


def test_log_lines_before_the_first_step_have_the_format_too(caplog):
    records = []
    with caplog.at_level(logging.INFO, logger="engine.train"):
        run(Net(), digits(3), log_every=1, accumulation_steps=3, on_log=records.append)
    assert [SWIN_LINE.match(m)[12] for m in caplog.messages[:2]] == ["0.0000"] * 2
    assert float(SWIN_LINE.match(caplog.messages[2])[12]) > 0
    assert ["grad_norm" in record for record in records] == [False, False, True]


def test_times_leave_out_checkpoints(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Task(ClassificationTask):
        def losses(self, model, batch):
            clock[0] += 1.0
            return super().losses(model, batch)

    def save(step, next_batch):
        clock[0] += 100.0

    records = []
    run(
        Net(),
        digits(4),
        task=Task(10),
        save_every=1,
        on_save=save,
        log_every=2,
        on_log=records.append,
    )
    assert [record["time"] for record in records] == [1.0, 1.0, 1.0]
    assert [record["img_per_s"] for record in records] == [8.0, 8.0, 8.0]


def test_records_hold_window_means_and_rates():
    records, single = [], []
    run(Net(), digits(1), on_log=single.append)
    torch.manual_seed(0)
    result = run(Net(), digits(5), log_every=2, on_log=records.append)
    assert [r["step"] for r in records] == [1, 3, 5]
    assert [r["lr"] for r in records] == pytest.approx([0.1, 0.3, 0.5])
    assert records[0]["loss"] == single[0]["loss"]
    mean = (records[0]["loss"] + 2 * records[1]["loss"] + 2 * records[2]["loss"]) / 5
    assert result.metrics["loss"] == pytest.approx(mean)
    for record in records:
        assert record["img_per_s"] == pytest.approx(8 / record["time"])
        assert 0 < record["data_time"] < record["time"]
        assert {"epoch", "batch", "loss_cls", "grad_norm", "loss_scale", "mem_mib"} <= set(record)


def test_an_overflown_fp16_step_is_logged_without_infinity():
    """The schedule counts the skipped step, the weights do not see it."""
    model, records = Net(), []
    amp = Amp("cpu", "fp16")
    amp.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = weights(model)
    result = run(model, digits(1), amp=amp, on_log=records.append)
    assert result.step == 1
    assert torch.equal(weights(model), before)
    assert "grad_norm" not in records[0]
    assert records[0]["loss_scale"] == 2.0**29


def test_only_the_last_batch_of_a_window_synchronises_gradients():
    class Wrapped(nn.DataParallel):
        def no_sync(self):
            events.append("no_sync")
            return torch.enable_grad()

        def forward(self, *args):
            events.append("forward")
            return super().forward(*args)

    events = []
    run(Wrapped(Net()), digits(5), accumulation_steps=3)
    assert events == ["no_sync", "forward"] * 2 + ["forward", "no_sync", "forward", "forward"]


def test_batches_move_with_their_nesting():
    inner = torch.rand(2, 3, 4, 4)
    moved = to_device(
        ([inner], {"boxes": inner[0], "ids": ["a"]}, 3), torch.device("meta"), channels_last=True
    )
    assert moved[0][0].device.type == "meta"
    assert moved[0][0].is_contiguous(memory_format=torch.channels_last)
    assert moved[1]["boxes"].device.type == "meta"
    assert moved[1]["ids"] == ["a"]
    assert isinstance(moved, tuple)
    assert moved[2] == 3
