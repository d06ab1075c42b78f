"""Benchmarks: the literal yardstick computes the same as the model, and the clock is fair."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.axes import Axes
from torch import nn

from benchmarks import measure, run, throughput
from benchmarks.contestants import Contestant, Setting, enter, fix_routing
from benchmarks.literal import literal
from benchmarks.report import (
    bounds,
    costs,
    draw,
    figures,
    file_name,
    machine_folder,
    pooled,
    to_markdown,
)
from models import create_model
from models.layers.batch_norm import BatchNorm2d
from models.layers.depthwise import DepthwiseConv2d
from models.layers.layer_norm import LayerNorm
from tests.small_models import METAFORMER, SMALL
from utils.amp import Amp


def tiny(family):
    name, overrides = SMALL[family]
    model = create_model(name, num_classes=10, drop_path_rate=0.0, **overrides)
    with torch.no_grad():
        # Fresh biases and batch statistics are 0 and 1 and would hide a forgotten term.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim < 2:
                tensor.add_(0.2 * torch.rand_like(tensor))
        # And attention would be nearly uniform.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model, torch.randn(2, 3, overrides["img_size"], overrides["img_size"])


def logits_and_gradients(model, x):
    torch.manual_seed(0)  # draws of grained queries
    y = model(x)
    y.square().mean().backward()
    return y, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", SMALL)
def test_the_literal_model_equals_the_model(family, training):
    model, x = tiny(family)
    twin = literal(model).train(training)
    changed = [m for m in twin.modules() if type(m).__name__.startswith("Literal")]
    assert changed, "nothing was replaced"
    y, gradients = logits_and_gradients(model.train(training), x)
    same, others = logits_and_gradients(twin, x)
    torch.testing.assert_close(same, y, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == others.keys()
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5 * total, name


def test_the_literal_model_does_not_use_the_fused_kernels(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a fused kernel ran")

    model, x = tiny("mixed")
    twin = literal(model).eval()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", forbidden)
    monkeypatch.setattr("models.layers.dilated.dilated_attention", forbidden)
    twin(x)
    with pytest.raises(AssertionError, match="a fused kernel ran"):
        model.eval()(x)


@pytest.mark.parametrize("family", SMALL)
def test_the_literal_model_multiplies_by_pytorchs_own_linear(family, monkeypatch):
    class ConvolvedError(Exception):
        pass

    def forbidden(*_):
        raise ConvolvedError

    model, x = tiny(family)
    x = torch.cat([x] * 2)  # enough rows for a convolution
    twin = literal(model).eval()
    monkeypatch.setattr("models.layers.linear.multiplies_by_onednn", lambda: True)
    monkeypatch.setattr("models.layers.linear._convolve", forbidden)
    twin(x)
    with pytest.raises(ConvolvedError):
        model.eval()(x)


@pytest.mark.parametrize("family", SMALL)
def test_the_literal_model_has_pytorchs_own_norms_and_convolutions(family):
    model, _ = tiny(family)
    forwards = {type(m).forward for m in literal(model).modules()}
    assert not {cls.forward for cls in (BatchNorm2d, LayerNorm, DepthwiseConv2d)} & forwards


def test_norms_without_bias_are_written_out_as_in_the_releases():
    norms = [m for m in literal(tiny("dfformer")[0]).modules() if isinstance(m, nn.LayerNorm)]
    assert {type(m).__name__ for m in norms if m.bias is None} == {"BiasFreeNorm"}
    assert any(m.bias is None for m in norms)


def test_the_model_itself_stays_as_it_was():
    model, _ = tiny("mixed")
    before = [type(m) for m in model.modules()]
    literal(model)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: nn.Linear(1, 1), "Linear has no literal form; choose another baseline"),
        (
            lambda: create_model(
                "dfformer_s18", **METAFORMER | dict(mixers=["attention(keep_rate=0.5)"] * 4)
            ),
            r"the mixers \['KeptTokenAttention'\] have no literal form",
        ),
    ],
)
def test_what_has_no_literal_form_is_refused(model, match):
    with pytest.raises(ValueError, match=match):
        literal(model())


class Work(nn.Module):
    """As many values at a time as `repeats` says, and so many seconds of a clock that nothing else moves."""

    seconds = 0.0

    def __init__(self, repeats):
        super().__init__()
        self.repeats = repeats
        self.layer = nn.Linear(3 * 64 * 64, 64)

    def forward(self, x):
        Work.seconds += self.repeats
        return torch.stack([self.layer(x.flatten(1)) for _ in range(self.repeats)]).sum(0)


def raced(first, second, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.contestants.time", SimpleNamespace(perf_counter=lambda: Work.seconds)
    )
    setting = Setting(torch.device("cpu"), Amp("cpu", "float32"), 4, False)
    rival = Contestant("rival", second, (64, 64), is_baseline=True)
    model = Contestant("model", first, (64, 64), baseline=rival)
    measure.race([model, rival], run.MODES, setting, rounds=5, warmup=2, latency_passes=3)
    return [figures(model, mode, 4) for mode in run.MODES]


def test_a_model_against_itself_is_as_fast_as_itself(monkeypatch):
    for row in raced(Work(4), Work(4), monkeypatch):
        assert row["ratio_range"] == [1.0, 1.0]
        assert row["img_per_s"] == 1.0


def test_a_model_with_a_third_of_the_work_is_faster_and_smaller(monkeypatch):
    inference, train = raced(Work(4), Work(12), monkeypatch)
    assert inference["ratio"] == train["ratio"] == 3.0
    assert inference["latency_ms_p50"] == 4000
    assert inference["memory_ratio"] < 0.7


def test_the_figures_are_those_of_the_clock():
    rival = Contestant("rival", nn.Identity(), (1, 1), seconds={"train": [4.0, 6.0, 40.0]})
    model = Contestant("m", nn.Identity(), (1, 1), rival, seconds={"train": [2.0, 2.0, 4.0]})
    for contestant, memory in ((rival, 8.0), (model, 2.0)):
        contestant.memory_mib["train"], contestant.passes["train"] = memory, 1
    row = figures(model, "train", batch_size=8)
    assert row["ratio"] == 3.0
    assert row["ratio_quartiles"] == [2.5, 6.5]
    assert row["ratio_range"] == [2.0, 10.0]
    assert row["img_per_s"] == 4.0
    assert row["memory_ratio"] == 0.25


def test_bounds_are_peaks_over_work():
    work = dict(gmacs=2.0, fft_gmacs=0.5, layer_outputs_m=10.0)
    cost = dict(params_m=80.0, inference=work, train=work | dict(gmacs=4.5))
    peaks = dict(tflop_per_s=1.0, gb_per_s=12.0)
    bound = bounds(cost, peaks, "inference", batch_size=8, bytes_per_value=4)
    assert bound == dict(bound_arithmetic=200.0, bound_bytes=100.0)
    bound = bounds(cost, peaks, "train", 8, 4)
    assert bound == pytest.approx(dict(bound_arithmetic=100 / 3, bound_bytes=100 / 3))


def test_a_grained_model_has_more_work_in_training():
    name = "deit_dge_s124_tiny_patch16_256"
    model = create_model(name, embed_dim=32, num_heads=2, depth=2)
    fix_routing(model, 0.5)
    cost = costs(Contestant(name, model, (256, 256)))
    assert cost["train"]["gmacs"] > 1.5 * cost["inference"]["gmacs"]
    cost = costs(Contestant("dense", create_model("dfvt_tiny"), (224, 224)))
    assert cost["train"] == cost["inference"]


def test_inference_is_timed_without_batch_norms_and_a_step_with_them():
    setting = Setting(torch.device("cpu"), Amp("cpu", "float32"), 1, False)
    model, rival = enter(["dhvt_tiny_cifar_patch4"], "literal", setting)
    norms = {
        mode: sum(isinstance(m, nn.BatchNorm2d) for m in model.prepared(mode).modules())
        for mode in run.MODES
    }
    assert norms["inference"] == 0 < norms["train"]
    assert rival.prepared("inference") is rival.prepared("train")


def test_literal_forms_keep_the_default_layout():
    setting = Setting(torch.device("cpu"), Amp("cpu", "float32"), 2, channels_last=True)
    model, rival = enter(["dhvt_tiny_cifar_patch4"], "literal", setting)
    for contestant, layout in ((model, torch.channels_last), (rival, torch.contiguous_format)):
        kernel = contestant.prepared("train").patch_embed.proj[2][0].weight
        assert kernel.is_contiguous(memory_format=layout)
        assert setting.images(contestant).is_contiguous(memory_format=layout)


def test_the_literal_form_of_another_model_can_be_the_baseline():
    setting = Setting(torch.device("cpu"), Amp("cpu", "float32"), 1, False)
    model, rival = enter(["evit_small_r07_fuse=literal:deit_small_patch16_224"], "literal", setting)
    assert model.baseline is rival
    assert rival.name == "deit_small_patch16_224 (literal)"
    assert type(rival.model.blocks[0].attn).__name__ == "LiteralAttention"
    with pytest.raises(ValueError, match="literal:"):
        enter(["evit_small_r07_fuse=exact:deit_small_patch16_224"], "literal", setting)


def test_peak_memory_counts_what_is_alive_together():
    mib = torch.empty(2**18)  # of float32

    def step():
        kept = mib + 1
        for _ in range(5):
            kept.neg()  # each is freed before the next

    assert measure.peak_memory(step, torch.device("cpu")) == pytest.approx(2, abs=0.1)


def test_peak_memory_is_the_pass_s_own_whatever_was_freed_in_it():
    """A block of before may lie where the profiler has seen another one, of another size."""
    device, old = torch.device("cpu"), []

    def leave():
        old.extend(torch.empty(2**12) for _ in range(100))

    def step():
        old.clear()
        return torch.ones(2**18).add(1)  # float32: 1 MiB, twice

    measure.peak_memory(leave, device)
    old.clear()
    old.extend(torch.empty(2**11) for _ in range(100))
    assert measure.peak_memory(step, device) == pytest.approx(2, abs=0.1)


def test_a_grained_model_asks_the_share_of_queries_that_it_is_told():
    model = create_model("deit_dge_s124_tiny_patch16_256", embed_dim=32, num_heads=2, depth=2)
    fix_routing(model, 0.5)
    images = torch.randn(8, 3, 256, 256)
    with torch.no_grad():
        model.eval()(images)
    for index in range(2):
        grain = model.token_maps()[f"grain::blocks.{index}.dge"]  # 0: 16 queries, 2: a single one
        asked = (16.0 * (grain == 0) + (grain == 2)).mean() / 16
        assert float(asked) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("name", "share"), [("dfvt_tiny", 0.5), ("deit_dge_s124_tiny_patch16_256", 2)]
)
def test_a_share_that_makes_no_sense_is_refused(name, share):
    with pytest.raises(ValueError, match=f"@{share}"):
        fix_routing(create_model(name), share)


@pytest.mark.parametrize(
    ("modes", "channels_last", "expected"),
    [
        (("inference", "train"), False, "cpu_float32_compiled"),
        (("train",), False, "cpu_float32_compiled_train"),
        (("inference",), True, "cpu_float32_compiled_channels_last_inference"),
    ],
)
def test_results_of_one_mode_do_not_overwrite_those_of_another(modes, channels_last, expected):
    run = dict(device="cpu", dtype="float32", compile=True, channels_last=channels_last)
    run["processes"] = 0
    assert file_name(dict(run=run, rows=[dict(mode=mode) for mode in modes])) == expected


def test_the_table_of_throughput_has_a_line_per_model_and_compile_mode():
    row = dict(model="a", img_per_s=12.34, latency_ms_p50=5.0, latency_ms_p95=6.0)
    row |= dict(peak_memory_mib=100.4, dtype="float32", batch_size=8)
    row |= dict(iterations=5, repeats=3, latency_passes=40)
    machine = dict(cpu="EPYC", threads=2, torch="2.15", commit="abc")
    table = throughput.to_markdown([row | dict(compile=on) for on in (False, True)], machine)
    assert "| a | off | 12.3 | 5.0 / 6.0 | 15, 40 | 100 |" in table
    assert "| a | on | 12.3 | 5.0 / 6.0 | 15, 40 | 100 |" in table
    assert "EPYC, 2 threads; torch 2.15; float32, batch 8; commit abc" in table


def test_a_run_writes_json_table_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "TURN_S", 0.01)
    monkeypatch.setattr(run, "measure_peaks", lambda _: dict(tflop_per_s=0.5, gb_per_s=10.0))
    name = "dhvt_tiny_cifar_patch4"
    result = run.main(
        f"--models {name} {name}=self --batch-size 1 --rounds 3 --warmup 1 --latency-passes 2 "
        f"--device cpu --output {tmp_path}".split()
    )
    (path,) = tmp_path.glob("*/cpu_float32_eager.json")  # in a folder of this machine
    assert json.loads(path.read_text())["rows"] == result["rows"]
    assert path.with_suffix(".png").stat().st_size > 0
    assert "estimated:" in capsys.readouterr().out
    table = path.with_suffix(".md").read_text()
    assert f"| {name} | inference |" in table
    assert {"cpu", "cores", "threads", "torch", "commit"} <= result["machine"].keys()
    assert "torch.profiler" in result["run"]["peak_memory_kind"]
    for row in result["rows"]:
        assert row["peak_memory_mib"] > 0
        if row["model"] == name:
            assert row["max_logit_difference"] < 1e-4
    assert {row["baseline"] for row in result["rows"] if "baseline" in row} == {
        f"{name} (literal)",
        f"{name} (self)",
    }


def test_models_can_run_in_processes_of_their_own(tmp_path, monkeypatch):
    started, call = [], run.subprocess.run

    def counted(command, **options):
        started.append(command)
        return call(command, **options)

    monkeypatch.setattr(run.subprocess, "run", counted)
    name = "dhvt_tiny_cifar_patch4"
    result = run.main(
        f"--processes 2 --models {name} --mode inference --batch-size 1 --rounds 3 --warmup 1 "
        f"--latency-passes 2 --device cpu --minutes 2 --output {tmp_path}".split()
    )
    assert len(started) == 2
    assert result["run"]["processes"] == 2
    assert [row["model"] for row in result["rows"]] == [name, f"{name} (literal)"]
    for row in result["rows"]:
        assert len(row["seconds_per_pass"]) == 6
        assert len(row["latencies_s"]) == 4
        assert row["bound_arithmetic"] > 0
    assert result["rows"][0]["baseline_seconds_per_pass"] == result["rows"][1]["seconds_per_pass"]
    (path,) = tmp_path.rglob("cpu_float32_eager_inference_alone.md")
    table = path.read_text()
    assert "3 rounds in each of 2 processes per model and baseline" in table


def test_a_race_that_fails_leaves_the_others(monkeypatch, capsys):
    row = dict(model="b", mode="train", seconds_per_pass=[1.0], latencies_s=[], peak_memory_mib=1)
    work = dict(gmacs=1, fft_gmacs=0, layer_outputs_m=1)
    cost = dict(params_m=1, inference=work, train=work)
    machine = dict(tflop_per_s=1, gb_per_s=1)
    part = dict(
        machine=machine, run=dict(rounds=1, load_average_after=0), costs=dict(b=cost), rows=[row]
    )
    parts = dict(a=None, b=part)
    monkeypatch.setattr(run, "_race_alone", lambda argv, entry, minutes: parts[entry])
    args = run.make_parser().parse_args(
        ["--models", "a", "b", "--processes", "2", "--device", "cpu"]
    )
    (found,) = run.measure_apart([], args)["rows"]
    assert (found["model"], found["seconds_per_pass"]) == ("b", [1.0, 1.0])
    assert "a: failed, and is left out" in capsys.readouterr().out
    parts["b"] = None
    with pytest.raises(RuntimeError, match=r"none of \['a', 'b'\] could be timed"):
        run.measure_apart([], args)


RECORDED = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_recorded_tables_are_those_of_the_recorded_numbers():
    found = 0
    for path in RECORDED.rglob("*.json"):
        if "costs" in (result := json.loads(path.read_text())):
            assert path.parent.name == machine_folder(result["machine"])
            assert path.stem == file_name(result)
            assert path.with_suffix(".md").read_text() == to_markdown(result)
            found += 1
    assert found


def test_machines_have_folders_of_their_own():
    assert machine_folder(dict(cpu="AMD EPYC (family 25)")) == "amd_epyc_family_25"
    assert machine_folder(dict(cpu="AMD EPYC", gpu="NVIDIA H200")) == "nvidia_h200"


def test_a_cuda_graph_has_no_figure_of_memory():
    setting = Setting(torch.device("cuda"), Amp("cuda", "bf16"), 4, False)
    model = Contestant("m", Work(1), (64, 64), compile_mode="reduce-overhead")
    assert measure._memory_of(model, lambda: None, setting) is None
    rival = Contestant("rival", Work(1), (64, 64), memory_mib=dict(train=2.0))
    rival.seconds["train"] = model.seconds["train"] = [1.0]
    model.baseline, model.memory_mib, model.passes = rival, dict(train=None), dict(train=1)
    row = figures(model, "train", 4)
    assert row["peak_memory_mib"] is None
    assert "memory_ratio" not in row


def test_rounds_of_several_processes_are_pooled():
    parts = [
        dict(
            seconds_per_pass=[2.0], baseline_seconds_per_pass=[second], latencies_s=[0.1],
            peak_memory_mib=second,
        )
        for second in (4.0, 6.0, 16.0)
    ]  # fmt: skip
    row = pooled(parts, batch_size=8)
    assert (row["ratio"], row["ratio_range"], row["img_per_s"]) == (3.0, [2.0, 8.0], 4.0)
    assert row["peak_memory_mib"] == 16.0
    assert row["latency_ms_p50"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (run, "--processes 1 --models dhvt_tiny_cifar_patch4 dfvt_smal", "did you mean"),
        (run, "--models dfvt_smal", "did you mean"),
        (run, "--rounds 0", "--rounds 0 must be at least 1"),
        (run, "--device tpu", "must be one of auto, cpu, cuda"),
        (throughput, "--models dfvt_smal", "did you mean"),
        (throughput, "--batch-size 0", "--batch-size 0 must be at least 1"),
        (throughput, "--device tpu", "must be one of auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_run_is_said(program, arguments, message, capsys):
    with pytest.raises(SystemExit):
        program.main(["--device", "cpu", *arguments.split()])
    assert message in capsys.readouterr().err


def test_the_picture_has_a_model_that_another_is_compared_with(tmp_path, monkeypatch):
    labels, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *a, **k: labels.append(k.get("label")) or plot(*a, **k)
    )
    names = ("a", "b", "a (literal)")
    cost = dict(gmacs=1.0, fft_gmacs=0.0)
    rows = [
        dict(model="b", mode="train", img_per_s=2.0, baseline="a"),
        dict(model="a", mode="train", img_per_s=3.0, baseline="a (literal)"),
        dict(model="a (literal)", mode="train", img_per_s=1.0),
        dict(model="a", mode="train", img_per_s=3.1),
    ]
    draw(dict(rows=rows, costs={name: dict(train=cost) for name in names}), tmp_path / "a.png")
    assert {"a", "b"} <= set(labels)
