"""--throughput and --info: what a model takes, without data."""

import logging

import torch
from yacs.config import CfgNode

from config import output_dir
from utils.distributed import Runtime

from .build import build_placed, known_classes, load_weights, set_up, source_of
from .results import count_model, some_images, time_model, write_json, write_speed

_LOG = logging.getLogger(__name__)


def throughput_only(config: CfgNode, runtime: Runtime) -> None:
    """Time the model alone at the config's batch size; needs no data."""
    amp = set_up(config, runtime)
    folder = output_dir(config)
    model = build_placed(config, known_classes(config), runtime.device)
    source = source_of(config, "throughput", folder / "checkpoints" / "last.pth")
    if source.kind != "scratch":
        load_weights(config, model, source)
    model, _ = amp.prepare(model)
    result = time_model(config, amp, model, runtime.device)
    parts = {name: found for name, found in result.items() if isinstance(found, dict)}
    for name, timed in {"": result, **parts}.items():
        _LOG.info(
            "%sbatch_size %d throughput %.1f (images/s, median of %d; %.1f to %.1f)",
            f"{name} alone: " if name else "",
            timed["batch_size"],
            timed["img_per_s"],
            timed["repeats"],
            timed["img_per_s_min"],
            timed["img_per_s_max"],
        )
    write_speed(folder, result, runtime)
    _LOG.info("written: %s", folder / "throughput.json")


def info_only(config: CfgNode, runtime: Runtime) -> None:
    """Count parameters, GMACs and activations per module.

    Needs no data; a model whose cost depends on the image is counted as the mean over a batch of
    validation images where they are at hand, else on noise. Weights come from --resume, if given.
    """
    set_up(config, runtime)
    model = build_placed(config, known_classes(config), torch.device("cpu"))
    source = source_of(config, "throughput", output_dir(config) / "checkpoints" / "last.pth")
    if source.kind != "scratch":
        load_weights(config, model, source)
    cost = count_model(config, model, some_images(config) if model.cost_depends_on_images else None)
    _LOG.info("%s\n%s", config.MODEL.NAME, cost.to_text())
    write_json(output_dir(config) / "info.json", cost.to_dict(), runtime)
    _LOG.info("written: %s", output_dir(config) / "info.json")
