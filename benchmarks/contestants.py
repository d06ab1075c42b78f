"""Who takes part in a comparison: models, their baselines, and the conditions they share."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import timm
import torch
from torch import Tensor, nn

from benchmarks.literal import literal
from config import load_config
from models import Backbone, create_model, variant_file
from models.deployment import deploy
from models.layers.grained import GrainedQueries, Router
from models.layers.tokens import to_pair
from utils.amp import Amp

TIMM_SWIN = "timm-swin-t"

Pass = Callable[[], None]


@dataclass
class Contestant:
    """A model in the race, with what was measured: seconds of each round by mode.

    Attributes:
        recomputing_memory_mib: of a training step with gradient checkpointing.
        model: what a training step runs.
        deployed: what inference runs, the same module unless batch norms are folded; None takes `model`.
    """

    name: str
    model: nn.Module
    size: tuple[int, int]
    baseline: "Contestant | None" = None
    deployed: nn.Module | None = None
    is_baseline: bool = False
    compile_mode: str | None = None
    difference: float | None = None
    passes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    memory_mib: dict[str, float | None] = field(default_factory=dict)
    recomputing_memory_mib: float | None = None

    @property
    def compiled(self) -> bool:
        return self.compile_mode is not None

    @property
    def is_ours(self) -> bool:
        """Whether it is a model as MixLab deploys it, not a literal form or timm's."""
        return self.name != TIMM_SWIN and not self.is_literal

    @property
    def is_literal(self) -> bool:
        return self.name.endswith(" (literal)")

    def prepared(self, mode: str) -> nn.Module:
        """The module of a mode, in that mode."""
        if mode == "train" or self.deployed is None:
            return self.model.train(mode == "train")
        return self.deployed.eval()


def recomputing(contestant: Contestant) -> Contestant | None:
    """The same with gradient checkpointing, for models of ours that are not compiled."""
    if contestant.compiled or not contestant.is_ours or not isinstance(contestant.model, Backbone):
        return None
    twin = Contestant(contestant.name, copy.deepcopy(contestant.model), contestant.size)
    twin.model.set_grad_checkpointing()
    return twin


@dataclass(frozen=True)
class Setting:
    """What all contestants have in common."""

    device: torch.device
    amp: Amp
    batch_size: int
    channels_last: bool

    def images(self, contestant: Contestant, batch_size: int | None = None) -> Tensor:
        """Random images (B, 3, H, W) of the contestant's size, the same at each call."""
        shape = (batch_size or self.batch_size, 3, *contestant.size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        return images.contiguous(memory_format=self.layout_of(contestant))

    def layout_of(self, contestant: Contestant) -> torch.memory_format:
        """Literal forms and timm's model keep PyTorch's default, as the releases do."""
        last = self.channels_last and contestant.is_ours
        return torch.channels_last if last else torch.contiguous_format

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def clock(self, run: Pass, passes: int = 1) -> float:
        """Seconds per pass."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(passes):
            run()
        self.synchronize()
        return (time.perf_counter() - start) / passes


def enter(
    entries: Sequence[str],
    baseline: str,
    setting: Setting,
    compile_models: str | None = None,
    compile_baselines: str | None = None,
) -> list[Contestant]:
    """The contestants in the order of their turns, each model before its baseline.

    Args:
        entries: `model` or `model=baseline`; `model@0.5` asks half of the queries that a grained model can.
        baseline: of entries that name none: "literal", "self", "timm-swin-t", a model, or
            "literal:" and a model.
        compile_models, compile_baselines: modes of torch.compile, None leaves them eager.

    Raises:
        ValueError: an unknown name, or no literal form.
    """
    order: list[Contestant] = []
    shared: dict[str, Contestant] = {}
    for entry in entries:
        name, _, own = entry.partition("=")
        model = _build(name, setting)
        against = own or baseline
        if against in ("literal", "self"):
            twin = copy.deepcopy(model.model)
            twin = literal(twin) if against == "literal" else twin
            rival = Contestant(f"{name} ({against})", twin, model.size, is_baseline=True)
        else:
            rival = shared.get(against) or _build_rival(against, setting)
            rival.is_baseline = True
        model.baseline = rival
        order.append(model)
        if against not in shared:
            order.append(rival)
        if against not in ("literal", "self"):
            shared[against] = rival
    for contestant in order:
        contestant.model.to(memory_format=setting.layout_of(contestant))
        if contestant.is_ours:
            contestant.deployed = deploy(contestant.model)
    for contestant in order:
        rival = contestant.baseline
        if rival and rival.name in (f"{contestant.name} (literal)", f"{contestant.name} (self)"):
            contestant.difference = _difference(contestant, rival, setting)
    for contestant in order:
        # A model against itself must be the same on both sides.
        is_rival = contestant.is_baseline and not contestant.name.endswith(" (self)")
        if mode := compile_baselines if is_rival else compile_models:
            for module in filter(None, (contestant.model, contestant.deployed)):
                module.compile(mode=mode)
            contestant.compile_mode = mode
    return order


def _build_rival(name: str, setting: Setting) -> Contestant:
    kind, _, variant = name.rpartition(":")
    if kind not in ("", "literal"):
        raise ValueError(f"the baseline {name} must be a model's name, or literal: and one")
    rival = _build(variant, setting)
    if kind:
        rival.name, rival.model = f"{variant} (literal)", literal(rival.model)
    return rival


def _build(name: str, setting: Setting) -> Contestant:
    torch.manual_seed(0)
    if name == TIMM_SWIN:
        # By timm's own name this is timm's model: MixLab's is registered there with a prefix.
        model, size = timm.create_model("swin_tiny_patch4_window7_224"), (224, 224)
    else:
        variant, _, share = name.partition("@")
        size = to_pair(load_config(variant_file(variant)).DATA.IMG_SIZE)
        model = create_model(variant)
        if share:
            fix_routing(model, float(share))
    return Contestant(name, model.to(setting.device), size)


class FixedRouter(Router):
    """A router that computes its logits and then decides by a draw: finest or coarsest patches.

    Fresh weights ask nearly all queries and trained ones do not exist here; what is timed is the cost of a
    given share. The draw is the same at each call and differs between the images of a batch.

    Args:
        prob: of the finest granularity, per region.
    """

    prob: float
    finest: int
    coarsest: int
    choices: dict[torch.Size, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)  # (..., S)
        if logits.shape not in self.choices:
            draw = torch.rand(logits.shape[:-1], generator=torch.Generator().manual_seed(0))
            choice = torch.where(draw < self.prob, self.finest, self.coarsest).to(x.device)
            self.choices[logits.shape] = nn.functional.one_hot(choice, logits.shape[-1])
        return logits * 0 + self.choices[logits.shape]


def fix_routing(model: nn.Module, share: float) -> None:
    """Let every router of `model` ask about `share` of the finest queries, by a fixed draw.

    Raises:
        ValueError: the model has no routers, or cannot ask so few or so many queries.
    """
    grained = [module for module in model.modules() if isinstance(module, GrainedQueries)]
    if not grained:
        raise ValueError(f"@{share:g} is for models with grained queries (dge), and this has none")
    for queries in grained:
        steps, region = queries.steps, queries.region
        most, least = ((region // step) ** 2 / region**2 for step in (min(steps), max(steps)))
        if not least <= share <= most:
            raise ValueError(f"@{share:g} must be between {least:g} and {most:g} of the queries")
        router = queries.router
        router.__class__ = FixedRouter
        router.choices = {}  # made once: random numbers of the CPU would make a GPU wait at each call
        router.prob = (share - least) / (most - least)
        router.finest, router.coarsest = steps.index(min(steps)), steps.index(max(steps))


@torch.no_grad()
def _difference(a: Contestant, b: Contestant, setting: Setting) -> float:
    """Largest difference of the logits of two images, relative to the largest logit."""
    images = setting.images(a, 2)
    with setting.amp.autocast():
        first, second = (c.prepared("inference")(images).float() for c in (a, b))
    return float((first - second).abs().max() / first.abs().max())


def make_pass(
    contestant: Contestant, mode: str, setting: Setting, batch_size: int | None = None
) -> Pass:
    """One forward pass without gradients, or forward, mean of squared logits and backward."""
    images = setting.images(contestant, batch_size)
    model, amp = contestant.prepared(mode), setting.amp

    def inference() -> None:
        with torch.inference_mode(), amp.autocast():
            model(images)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with amp.autocast():
            outputs = model(images)  # several of a distilled student
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        loss.backward()

    return inference if mode == "inference" else train
