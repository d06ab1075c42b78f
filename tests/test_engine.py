"""Evaluation and throughput."""

import pytest
import torch
from torch import nn

from engine import evaluate, measure_throughput
from models.vit import VisionTransformer
from tasks.classification import ClassificationTask
from utils.amp import Amp

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.drop(self.body(x).mean((2, 3))))


def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(10, 3, 4, 4, generator=generator)
    labels = torch.randint(3, (10,), generator=generator)
    return list(zip(images.split(4), labels.split(4), strict=True))


def score(model, **options):
    task = ClassificationTask(3)
    return evaluate(model, task, batches(), **(dict(device=CPU, amp=Amp()) | options))


def test_evaluation_leaves_no_trace():
    model = Net().train()
    model.body[1].eval()  # a frozen batch norm
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = score(model)
    assert first == score(model)
    assert model.training
    assert model.drop.training
    assert not model.body[1].training
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert first["images"] == 10


def test_evaluation_leaves_no_activations_behind():
    model = VisionTransformer(
        img_size=4, patch_size=2, embed_dim=8, depth=1, num_heads=2, num_classes=3
    )
    with torch.no_grad():
        model.eval()(batches()[0][0])
    assert model.token_maps()
    score(model)
    assert model.token_maps() == {}


def test_modes_come_back_after_an_error():
    model = Net().train()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="10 of 10 images"):
        score(model)
    assert model.drop.training


def test_a_parallel_model_is_evaluated_without_its_wrapper():
    model = Net()
    calls = []

    class Wrapped(nn.DataParallel):
        def forward(self, *args):
            calls.append(args)

    assert score(Wrapped(model)) == score(model)
    assert not calls


def test_a_compiled_model_is_evaluated_compiled():
    calls = []

    class Compiled(nn.Module):
        """Holds the module under the name that torch.compile gives it."""

        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def forward(self, x):
            calls.append(x)
            return self._orig_mod(x)

    model = Net()
    assert score(Compiled(model)) == score(model)
    assert calls


def test_half_precision_and_channels_last_agree_with_float32():
    model = Net()
    reference = score(model)
    half = score(model, amp=Amp("cpu", "bf16"), channels_last=True)
    assert half["loss"] == pytest.approx(reference["loss"], abs=0.02)
    assert half["loss"] != reference["loss"]


def measure(model=None, **options):
    defaults = dict(batch_size=2, image_size=8, device=CPU, amp=Amp())
    return measure_throughput(model or Net(), **(defaults | options))


def test_throughput_reports_what_it_ran():
    """Trap 15: figures cannot be compared without batch, precision, layout and device beside them."""
    model = Net().train()
    result = measure(
        model, image_size=(8, 12), warmup=2, iterations=3, repeats=4, channels_last=True
    )
    assert model.training
    assert model.drop.training
    expected = dict(
        batch_size=2,
        height=8,
        width=12,
        dtype="float32",
        device="cpu",
        channels_last=True,
        peak_memory_kind="process",
        warmup=2,
        iterations=3,
        repeats=4,
    )
    assert {key: result[key] for key in expected} == expected
    assert result["img_per_s_min"] <= result["img_per_s"] <= result["img_per_s_max"]
    spread = (result["img_per_s_max"] - result["img_per_s_min"]) / result["img_per_s"]
    assert result["img_per_s_spread"] == pytest.approx(spread)
    assert 0 < result["latency_ms_p50"] <= result["latency_ms_p95"]
    assert result["peak_memory_mib"] > 10


class Counting(nn.Module):
    """Counts forwards by batch size, in eval mode and without gradients.

    Each takes `seconds` per image, and the first of each size `compiling` more.
    """

    def __init__(self, seconds=0.0, compiling=0.0):
        super().__init__()
        self.seconds, self.compiling, self.sizes, self.clock = seconds, compiling, [], 0.0

    def forward(self, x):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.clock += 0.0 if len(x) in self.sizes else self.compiling
        self.sizes.append(len(x))
        self.clock += self.seconds * len(x)
        return x


def test_the_default_protocol_is_that_of_swin_with_repeats():
    model = Counting()
    result = measure(model, budget_s=1e9)
    # Two passes more of each size: one may compile, one looks at the budget.
    assert model.sizes == [2] * (2 + 50 + 3 * 30) + [1] * (2 + 50 + 3 * 30)
    assert (result["warmup"], result["iterations"], result["repeats"]) == (50, 30, 3)


@pytest.mark.parametrize("seconds", [0.5, 100.0])
def test_a_slow_model_gets_fewer_passes_and_exact_figures(monkeypatch, caplog, seconds):
    """On a clock that only the model moves, so that the figures are known."""
    model = Counting(seconds)
    monkeypatch.setattr("time.perf_counter", lambda: model.clock)
    result = measure(model, budget_s=20.0)
    assert "timing" in caplog.text
    assert result["warmup"] < 50
    assert result["img_per_s"] == pytest.approx(1 / seconds)
    assert result["latency_ms_p50"] == pytest.approx(1000 * seconds)
    assert result["latency_ms_p95"] == pytest.approx(1000 * seconds)
    if seconds < 1:
        assert 10 < model.clock <= 20 + 3 * seconds
        assert result["latency_passes"] >= 5
    else:
        assert model.sizes == [2] * 4 + [1] * 4  # two to plan, one to warm up, one to time


def test_the_time_that_a_compiler_takes_leaves_the_plan_alone(monkeypatch):
    plans = []
    for compiling in (0.0, 60.0):
        model = Counting(0.5, compiling)
        monkeypatch.setattr("time.perf_counter", lambda model=model: model.clock)
        result = measure(model, budget_s=20.0)
        plans.append((result["iterations"], result["repeats"], result["latency_passes"]))
    assert plans[0] == plans[1]
