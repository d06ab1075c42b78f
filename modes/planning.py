"""--plan: what training would do, without training."""

import logging
import math
from typing import Any

import torch
from yacs.config import CfgNode

from config import output_dir
from data import train_batches, train_size
from lr_scheduler import build_scheduler
from models import Backbone, registry
from models.heads import DenseModel, find_head
from optimizer import build_optimizer, build_rates
from utils.distributed import Runtime
from utils.plan import Plan, summarise_groups

from .build import build_placed, freeze, known_classes, set_up

_LOG = logging.getLogger(__name__)


def make_plan(config: CfgNode, runtime: Runtime) -> Plan:
    """What training with this config would do; the model has no memory behind it, no image is read.

    Raises:
        ValueError: keys that the model, the optimizer or the schedule refuse, or the number of training
            images is not known.
    """
    images, origin = train_size(config)
    processes = runtime.world_size if runtime.world_size > 1 else config.PLAN.WORLD_SIZE or 1
    window = max(config.TRAIN.ACCUMULATION_STEPS, 1)
    steps_per_epoch = math.ceil(train_batches(config, images, processes) / window)
    with torch.device("meta"):
        model = build_placed(config, known_classes(config), torch.device("meta"))
    freeze(config, model)
    optimizer = build_optimizer(config, model, processes)
    schedule = build_scheduler(config, optimizer, steps_per_epoch, processes)
    train, own = config.TRAIN, registry.find(config.MODEL.TYPE).node
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    plan = Plan(
        facts=dict(
            model=dict(name=config.MODEL.NAME, weights=config.MODEL.PRETRAINED or "fresh"),
            parameters=dict(trainable=sum(sizes), frozen=total - sum(sizes)),
            data=dict(name=config.DATA.DATASET, images=images, source=origin),
            batch=dict(
                per_process=config.DATA.BATCH_SIZE,
                processes=processes,
                started=runtime.world_size,
                accumulation=window,
                images_per_step=config.DATA.BATCH_SIZE * processes * window,
            ),
            steps=dict(
                per_epoch=steps_per_epoch,
                epochs=math.ceil(schedule.total_steps / steps_per_epoch),
                warmup=schedule.warmup_steps,
                total=schedule.total_steps,
            ),
            lr=dict(
                **build_rates(config, processes)._asdict(),
                scaling=train.LR_SCALING,
                schedule=train.LR_SCHEDULER.NAME,
            ),
            weight_decay=dict(
                first=schedule.weight_decay_at(0),
                last=schedule.weight_decay_at(schedule.total_steps),
            ),
            optimizer=dict(_lower(train.OPTIMIZER), clip_grad=train.CLIP_GRAD or 0.0),
            ema=_lower(train.EMA),
            **_of_the_task(config, model),
            architecture=dict(type=config.MODEL.TYPE, **_lower(config.MODEL[own])),
        ),
        groups=summarise_groups(optimizer.param_groups, model.layer_id),
        num_steps=schedule.total_steps,
        steps_per_epoch=steps_per_epoch,
        lr_at=schedule.lr_at,
        weight_decay_at=schedule.weight_decay_at,
    )
    assert plan.params == sum(sizes), f"groups hold {plan.params} of {sum(sizes)} parameters"
    return plan


def plan_only(config: CfgNode, runtime: Runtime) -> None:
    """Show what training would do: groups, batches, steps, rates; needs no data and no weights."""
    set_up(config, runtime)
    plan = make_plan(config, runtime)
    _LOG.info("plan of %s\n%s", config.MODEL.NAME, plan.to_text())
    if runtime.is_main:
        _LOG.info("written: %s", ", ".join(map(str, plan.write(output_dir(config)))))


def _of_the_task(config: CfgNode, model: Backbone) -> dict[str, dict[str, Any]]:
    """Sections that classification and dense tasks fill differently: of either only what training reads."""
    drops = dict(drop_rate=config.MODEL.DROP_RATE, drop_path_rate=config.MODEL.DROP_PATH_RATE)
    if isinstance(model, DenseModel):
        head = find_head(config.MODEL.HEAD.TYPE, model.task)
        own = config.AUG[model.task.upper()]
        return dict(
            regularisation=drops,
            augmentation=dict(hflip=config.AUG.HFLIP, **_lower(own)),
            head=dict(type=head.name, **_lower(config.MODEL.HEAD[head.node])),
        )
    train = config.TRAIN
    return dict(
        objective=dict(
            loss=train.LOSS,
            distillation=train.DISTILLATION.TYPE,
            token_labels=train.TOKEN_LABELS.ENABLE,
        ),
        regularisation=dict(label_smoothing=config.MODEL.LABEL_SMOOTHING, **drops),
        augmentation=_lower(config.AUG),
    )


def _lower(node: CfgNode) -> dict[str, Any]:
    """The values of a section by their lower-case names, without those of sections in it."""
    return {name.lower(): value for name, value in node.items() if not isinstance(value, CfgNode)}
