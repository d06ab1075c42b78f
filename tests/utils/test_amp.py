"""One backward and step path for float32, bf16, fp16 and Apex."""

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from utils.amp import Amp


def test_auto_on_the_cpu_is_float32():
    amp = Amp("cpu")
    assert not amp.enabled
    assert amp.name == "float32"
    with amp.autocast():
        assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype is torch.float32


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_auto_on_a_gpu_prefers_bf16(monkeypatch, supported, expected):
    """Trap: fp16 overflows where bf16 does not."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: SimpleNamespace(**k))
    assert Amp("cuda").name == expected


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_taken_at_its_word_on_the_cpu(name, dtype):
    with Amp("cpu", name).autocast():
        assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype is dtype


@pytest.mark.parametrize("off", [dict(enabled=False), dict(opt_level="O0")])
def test_off_is_off_whatever_the_type(off):
    """Trap: O0 is a spelling of "no AMP", not of "Apex"."""
    amp = Amp("cpu", "fp16", **off)
    assert not amp.enabled
    assert not amp.scaler.is_enabled()


@pytest.mark.parametrize("dtype", ["float32", "bf16", "fp16"])
def test_every_precision_takes_the_same_step_within_its_accuracy(dtype):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.rand(8, 4)
    expected = model.weight.detach().clone()
    out = model(x).detach()
    grad, of_bias = 2 * (out * x).mean(0, keepdim=True), 2 * out.mean(0)
    expected -= 0.1 * grad
    amp, optimizer = Amp("cpu", dtype), torch.optim.SGD(model.parameters(), lr=0.1)
    with amp.autocast():
        loss = model(x).float().square().mean()
    amp.backward(loss)
    norm = amp.step(optimizer, model.parameters())
    atol = 1e-6 if dtype == "float32" else 3e-3
    torch.testing.assert_close(model.weight.detach(), expected, atol=atol, rtol=0)
    # Unscaled: a scaled fp16 gradient is 65536 times larger.
    assert norm.item() == pytest.approx(torch.cat([grad[0], of_bias]).norm().item(), rel=0.02)


def step_with_gradient(amp, value, clip):
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    amp.backward((weight * value).sum())
    norm = amp.step(optimizer, [weight], clip)
    return weight.detach(), norm


def test_clipping_bounds_the_norm_and_reports_the_one_before():
    weight, norm = step_with_gradient(Amp(), 3.0, clip=1.0)
    assert norm == pytest.approx(6.0)
    assert weight.norm() == pytest.approx(1.0, rel=1e-5)


def test_clipping_happens_after_unscaling():
    weight, norm = step_with_gradient(Amp("cpu", "fp16"), 3.0, clip=1.0)
    assert norm == pytest.approx(6.0)
    assert weight.norm() == pytest.approx(1.0, rel=1e-5)


def test_clip_zero_is_off():
    """Trap: Swin's `is not None` test turns CLIP_GRAD 0 into clipping everything to zero."""
    weight, norm = step_with_gradient(Amp(), 3.0, clip=0.0)
    assert norm == pytest.approx(6.0)
    assert weight.tolist() == [-3.0] * 4


def test_an_overflown_fp16_step_is_skipped_and_the_scale_halved():
    amp = Amp("cpu", "fp16")
    before = amp.loss_scale()
    weight, norm = step_with_gradient(amp, float("inf"), clip=1.0)
    assert weight.tolist() == [0.0] * 4
    assert not norm.isfinite()
    assert amp.loss_scale() == before / 2


def test_the_loss_scale_survives_a_checkpoint():
    """Trap: a resumed fp16 run that forgets its loss scale jumps."""
    amp = Amp("cpu", "fp16")
    step_with_gradient(amp, float("inf"), clip=0.0)
    restored = Amp("cpu", "fp16")
    restored.load_state_dict(amp.state_dict())
    assert restored.loss_scale() == amp.loss_scale() != Amp("cpu", "fp16").loss_scale()


@pytest.mark.parametrize(("saved", "own"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_a_checkpoint_of_another_precision_loads_with_a_warning(caplog, saved, own):
    Amp("cpu", own).load_state_dict(Amp("cpu", saved).state_dict())
    assert "loss scaler" in caplog.text


@pytest.mark.parametrize("bad", [dict(dtype="half"), dict(opt_level="O3")])
def test_unknown_precisions_name_the_choices(bad):
    with pytest.raises(ValueError, match="must be one of"):
        Amp("cpu", **bad)


def test_a_missing_apex_names_the_native_keys(monkeypatch):
    """Trap: DFvT's command line asks for Apex by default."""
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(
        ValueError, match=r"AMP_OPT_LEVEL='O1' needs NVIDIA Apex.*AMP_ENABLE.*AMP_DTYPE"
    ):
        Amp("cpu", opt_level="O1")
    Amp("cpu", opt_level="O1", enabled=False)


def test_apex_scales_the_loss_and_clips_its_master_parameters(monkeypatch):
    calls = []

    @contextlib.contextmanager
    def scale_loss(loss, optimizer, delay_unscale):
        calls.append(delay_unscale)
        yield loss

    apex = ModuleType("apex")
    apex.amp = SimpleNamespace(
        initialize=lambda model, optimizer, opt_level: (
            calls.append(opt_level) or (model, optimizer)
        ),
        scale_loss=scale_loss,
        master_params=lambda optimizer: optimizer.param_groups[0]["params"],
        state_dict=lambda: {"loss_scaler0": {}},
    )
    monkeypatch.setitem(sys.modules, "apex", apex)
    amp = Amp("cpu", opt_level="O2")
    assert amp.name == "apex O2"
    assert not amp.enabled
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = model.weight.item()
    model, optimizer = amp.prepare(model, optimizer)
    for final in (False, True):
        amp.backward(model(torch.ones(1, 1)).sum(), optimizer, final)
    norm = amp.step(optimizer, [], clip_grad=1.0)
    assert calls == ["O2", True, False]
    assert norm == pytest.approx(2.0)
    assert model.weight.item() == pytest.approx(start - 1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("device", "dtype", "precision"),
    [("cuda", "bf16", "high"), ("cuda", "float32", "highest"), ("cpu", "bf16", "highest")],
)
def test_float32_is_rounded_only_where_autocast_rounds_on_a_gpu(device, dtype, precision):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        Amp(device, dtype).set_float32_precision()
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == (precision == "high"), "convolutions"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
