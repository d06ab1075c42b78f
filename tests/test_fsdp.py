"""Training that is spread over processes equals training that is not, and so do its files.

Two processes of gloo on the CPU run once for the whole file: first the contract of every architecture, then
main.py in some ways. The tests look at what they left.
"""

import json
from pathlib import Path

import pytest
import torch

import main as program
from config import load_config
from models import CONFIG_DIR
from tests.processes import free_port, run_on_two_processes
from utils.sharding import shard

ROOT = Path(__file__).resolve().parent.parent
SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")
# Nothing random in a step and no batch norm, whose statistics are those of a process, so that one process can
# go on where two were. A large epsilon: Adam would blow rounding errors up to whole steps. 17 images: the
# processes score different numbers of batches. A keep rate on its way: what is scored has to follow it.
COMMON = [
    "MODEL.TYPE", "evit", "MODEL.EVIT.PATCH_SIZE", "8", "MODEL.EVIT.EMBED_DIM", "32",
    "MODEL.EVIT.DEPTH", "2", "MODEL.EVIT.NUM_HEADS", "2", "MODEL.EVIT.DROP_LOC", "[0]",
    "MODEL.EVIT.KEEP_RATE", "0.2", "MODEL.EVIT.SHRINK_START_EPOCH", "0", "MODEL.EVIT.SHRINK_EPOCHS", "4",
    "AUG.MIXUP", "0.0", "AUG.CUTMIX", "0.0", "MODEL.DROP_PATH_RATE", "0.0", "TRAIN.BASE_LR", "0.1",
    "TRAIN.OPTIMIZER.EPS", "1e-4", "TRAIN.CLIP_GRAD", "0.5", "TRAIN.EMA.ENABLE", "True",
    "TRAIN.EMA.DECAY", "0.5", "DATA.SYNTHETIC.VAL_SIZE", "17",
]  # fmt: skip
FSDP = ["TRAIN.FSDP", "True"]
ROUNDING = 5e-6
# A detector and a segmenter: their backbone is called by other methods than `forward`.
DENSE = [str(CONFIG_DIR / "_base_" / f"smoke_{task}.yaml") for task in ("det", "seg")]
DENSE_OPTIONS = ["TRAIN.MAX_STEPS", "2", "TRAIN.OPTIMIZER.EPS", "1e-4"]
# One of each way to build a model out of blocks.
ARCHITECTURES = ["deit", "evit", "dhvt", "dfvt", "swin", "mixed", "pvt_dge"]

WORKER = """
import copy, json, os, sys
import torch
import torch.distributed as dist
import main as program
from models import create_model
from tests.processes import time_briefly
from tests.small_models import SMALL
from tests.test_fsdp import ARCHITECTURES, COMMON, DENSE, DENSE_OPTIONS, FSDP, SMOKE
from utils import distributed
from utils.amp import Amp
from utils.checkpoint_files import save_checkpoint
from utils.sharding import Gathered, WholeCopy, shard, whole
from engine.train import _gradient_sync

torch.set_num_threads(1)
runtime = distributed.init_distributed("cpu")
rank, device = runtime.rank, torch.device("cpu")

# -- every architecture ----------------------------------------------------------------------------

def images(model, size, seed):
    generator = torch.Generator().manual_seed(10 * seed + rank)
    return torch.rand(2, 3, size, size, generator=generator)

def loss_of(model, x):
    torch.manual_seed(5)  # drop path
    logits = model(x)
    logits = sum(logits) if isinstance(logits, tuple) else logits
    return logits.float().square().mean() + sum(model.aux_losses().values())

report = {}
for name in ARCHITECTURES:
    variant, options = SMALL[name]
    torch.manual_seed(0)
    model = create_model(variant, num_classes=5, **options).train()
    size, extra = options["img_size"], {}
    twin = copy.deepcopy(model)
    shard(model, device)
    model.set_grad_checkpointing(name in ("swin", "dhvt", "dfvt"))
    twin.set_grad_checkpointing(name in ("swin", "dhvt", "dfvt"))
    # Two batches per step: gradients are summed up first, averaged over the processes then.
    for index in range(2):
        with _gradient_sync(model, index == 1):
            loss_of(model, images(model, size, index)).backward()
        if index == 0:
            extra["early"] = sum(p.grad is not None for p in model.parameters())
        loss_of(twin, images(twin, size, index)).backward()
    worst = 0.0
    for (key, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        if theirs.grad is None:
            continue
        dist.all_reduce(theirs.grad)
        theirs.grad /= 2
        got = whole(mine.grad)
        assert got.shape == theirs.grad.shape, key
        worst = max(worst, ((got - theirs.grad).norm() / (theirs.grad.norm() + 1e-6)).item())
    # Clipping, and the norm that is logged.
    amp = Amp("cpu")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    norms = [amp.step(o, m.parameters(), 0.01) for o, m in zip(optimizers, (model, twin))]
    state = Gathered(model).state_dict()
    moved = max(
        (state[key] - value).abs().max().item()
        for key, value in twin.state_dict().items() if state[key] is not None and value.numel()
    ) if rank == 0 else 0.0
    local = sum(p.to_local().numel() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    names = list(state) == list(twin.state_dict())
    report[name] = dict(
        gradient=worst, norms=[n.item() for n in norms], plain=type(norms[0]) is torch.Tensor,
        moved=moved, share=local / total, names=names, blocks=len(model.layer_prefixes()) - 1, **extra,
    )

# -- half precision: an overflow on one process skips the step on both -----------------------------

torch.manual_seed(0)
model = create_model("dhvt_tiny_cifar_patch4", num_classes=5, **SMALL["dhvt"][1]).train()
shard(model, device)
amp = Amp("cpu", "fp16")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
before = {k: whole(v.detach()).clone() for k, v in model.named_parameters()}
x = images(model, 32, 0)
if rank == 1:
    x = x * float("inf")
with amp.autocast():
    loss = loss_of(model, x)
amp.backward(loss)
amp.step(optimizer, model.parameters(), 5.0)
report["overflow"] = dict(
    skipped=all(torch.equal(whole(p.detach()), before[k]) for k, p in model.named_parameters()),
    scale=amp.loss_scale(),
)

if rank == 0:
    with open("report.json", "w") as file:
        json.dump(report, file)
distributed.cleanup()

# -- main.py ---------------------------------------------------------------------------------------

time_briefly()
ports = iter(sys.argv[1:])

def run(tag, *opts, args=(), cfg=SMOKE):
    os.environ["MASTER_PORT"] = next(ports)
    program.main(["--cfg", cfg, "--output", "out", "--tag", tag, *args, "--opts", *opts])

run("ddp", *COMMON)
run("fsdp", *COMMON, *FSDP)
args = ["--resume", "out/smoke_cls/ddp/checkpoints/epoch_0.pth"]
run("ddp_to_fsdp", *COMMON, *FSDP, args=args)

for cfg in DENSE:
    run("ddp", *DENSE_OPTIONS, cfg=cfg)
    run("fsdp", *DENSE_OPTIONS, *FSDP, cfg=cfg)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes left that ran WORKER."""
    place = tmp_path_factory.mktemp("fsdp")
    ports = [str(free_port()) for _ in range(3 + 2 * len(DENSE))]
    run_on_two_processes(WORKER, *ports, timeout=280, folder=place)
    return place


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


def checkpoint(folder: Path, tag: str, name: str = "last.pth") -> dict:
    return torch.load(folder / "out/smoke_cls" / tag / "checkpoints" / name, weights_only=True)


def distance(a: dict, b: dict) -> float:
    """Largest difference of two state dicts with the same names, shapes and kinds of numbers."""
    assert list(a) == list(b)
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_norm_and_step_are_those_of_whole_models(report, name):
    """Two accumulated batches per process, gradients averaged over the processes."""
    found = report[name]
    assert found["gradient"] < 1e-4
    assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-5)
    assert found["plain"], "the norm is an ordinary tensor, which the log can add up"
    assert found["moved"] < 1e-6, "clipped alike"
    assert found["names"], "a checkpoint has the model's own names"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_process_holds_about_its_share(report, name):
    assert 0.3 < report[name]["share"] < 0.7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batches_before_the_last_of_a_step_are_not_averaged(report, name):
    """Shards have a gradient only once processes have exchanged them."""
    assert report[name]["early"] == 0


def test_an_overflow_on_one_process_skips_the_step_on_all(report):
    assert report["overflow"]["skipped"]
    assert report["overflow"]["scale"] == 2**15


@pytest.mark.parametrize("tag", ["fsdp", "ddp_to_fsdp"])
def test_training_and_its_files_equal_those_of_ddp(folder, tag):
    """Sharded from the start, and from the second epoch on."""
    expected, found = checkpoint(folder, "ddp"), checkpoint(folder, tag)
    for part in ("model", "ema"):
        assert distance(found[part], expected[part]) < ROUNDING
    halfway = checkpoint(folder, "ddp", "epoch_0.pth")
    assert distance(expected["model"], halfway["model"]) > 100 * ROUNDING, "it was trained"
    mine, theirs = found["optimizer"], expected["optimizer"]
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert distance(mine["state"][index], state) < ROUNDING
    assert found["progress"] == expected["progress"]
    assert found["metrics"]["images"] == 17
    assert found["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], abs=1e-4)
    assert found["scheduler"] == expected["scheduler"]


@pytest.mark.parametrize("name", ["smoke_det", "smoke_seg"])
def test_dense_models_are_trained_as_by_ddp(folder, name):
    expected, found = (
        torch.load(folder / "out" / name / tag / "checkpoints" / "last.pth", weights_only=True)
        for tag in ("ddp", "fsdp")
    )
    assert distance(found["model"], expected["model"]) < ROUNDING
    assert found["progress"] == expected["progress"]
    assert expected["progress"]["step"] == 2


def test_the_summary_of_a_sharded_run_is_complete(folder):
    place = folder / "out" / "smoke_cls" / "fsdp"
    names = {path.name for path in place.iterdir()}
    assert {"throughput.json", "eval.json", "curves.png"} <= names
    log = (place / "log_rank0.txt").read_text()
    assert "FSDP: 2 blocks over 2 processes" in log
    assert "Summary" in log


def test_one_process_goes_on_where_two_sharded_ones_were(folder, monkeypatch):
    monkeypatch.chdir(folder)
    start = "out/smoke_cls/fsdp/checkpoints/epoch_0.pth"
    args = ["--cfg", SMOKE, "--output", "out", "--tag", "one", "--resume", start]
    program.main([*args, "--batch-size", "16", "--opts", *COMMON, *FSDP])
    assert "TRAIN.FSDP is left out" in (folder / "out/smoke_cls/one/log_rank0.txt").read_text()
    found = checkpoint(folder, "one")
    expected = checkpoint(folder, "ddp")
    assert distance(found["model"], expected["model"]) < ROUNDING
    assert distance(found["ema"], expected["ema"]) < ROUNDING
    assert found["progress"]["step"] == 4


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.OPTIMIZER.NAME", "lamb"], "TRAIN.OPTIMIZER.NAME='lamb'"),
        (["COMPILE", "True"], "excludes COMPILE"),
        (["AMP_OPT_LEVEL", "O1"], "excludes AMP_OPT_LEVEL='O1'"),
    ],
)
def test_what_cannot_go_with_sharding_is_an_error(opts, message):
    with pytest.raises(ValueError, match=message):
        load_config(SMOKE, [*FSDP, *opts])
    load_config(SMOKE, opts)


def test_a_parameter_that_cannot_be_cut_is_named():
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"TRAIN.FSDP cannot shard \['scale'\]"):
        shard(model, torch.device("cpu"))
