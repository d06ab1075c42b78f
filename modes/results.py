"""What modes report besides the scores: costs, speed, files."""

import datetime
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from yacs.config import CfgNode

from data import build_loader
from engine import measure_throughput
from models.deployment import deploy
from models.layers.tokens import to_pair
from utils.amp import Amp
from utils.complexity import Complexity, count
from utils.distributed import Runtime, all_reduce_sum
from utils.fingerprint import fingerprint

from .build import compiled

_LOG = logging.getLogger(__name__)


def write_json(path: Path, content: dict[str, Any], runtime: Runtime) -> None:
    """One result file of a run, written by the first process."""
    if runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


def write_speed(folder: Path, speed: dict[str, Any], runtime: Runtime) -> None:
    """throughput.json: what `time_model` found, and the machine that it found it on."""
    machine = fingerprint(runtime.device)
    write_json(folder / "throughput.json", speed | dict(machine=machine), runtime)


def count_model(
    config: CfgNode, model: nn.Module, images: torch.Tensor | None = None
) -> Complexity:
    """Costs of one image of `info_size`; the mean over `images` (B, C, H, W) if given."""
    if images is not None:
        _LOG.info("counting the mean over %d validation images", len(images))
        return count(model, images).per_image()
    return count(model, (config.MODEL.IN_CHANS, *info_size(config)))


def info_size(config: CfgNode) -> tuple[int, int]:
    """Height and width that costs are counted at."""
    return to_pair(config.INFO_SIZE or config.DATA.IMG_SIZE)


def throughput_size(config: CfgNode) -> tuple[int, int]:
    """Height and width that models are timed at."""
    return to_pair(config.THROUGHPUT_SIZE or config.DATA.IMG_SIZE)


def some_images(config: CfgNode) -> torch.Tensor | None:
    """A batch of validation images (B, C, *info_size), if there is a dataset.

    Dense tasks have them one by one, and each of a size of its own.
    """
    size, images = info_size(config), []
    try:
        for batch in build_loader(config, "val"):
            found = batch[0]
            same = found.shape[-2:] == size
            images.append(found if same else F.interpolate(found, size, mode="bilinear"))
            if sum(map(len, images)) >= config.DATA.BATCH_SIZE:
                break
    except FileNotFoundError:
        return None
    return torch.cat(images)


def time_model(config: CfgNode, amp: Amp, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Throughput and latency of a deployed copy, with what they depend on; those of its parts by name."""
    model = deploy(model)

    def timed(part: nn.Module) -> dict[str, Any]:
        return measure_throughput(
            compiled(config, part),
            batch_size=config.DATA.BATCH_SIZE,
            image_size=throughput_size(config),
            in_chans=config.MODEL.IN_CHANS,
            device=device,
            amp=amp,
            channels_last=config.CHANNELS_LAST,
        )

    return dict(
        model=config.MODEL.NAME,
        compile=config.COMPILE,
        compile_mode=config.COMPILE_MODE if config.COMPILE else None,
        deployed=True,  # batch norms folded, weights laid out for inference
        **timed(model),
        **{name: timed(part) for name, part in model.timed_parts().items()},
    )


def report_skipped(loaders: Sequence[Any]) -> int:
    """How many unreadable images DATA.ON_ERROR skip has left out, on all processes."""
    skipped = int(all_reduce_sum(torch.tensor(sum(loader.skipped for loader in loaders))))
    if skipped:
        _LOG.warning("unreadable images were skipped %d times so far, over all epochs", skipped)
    return skipped


def duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))
