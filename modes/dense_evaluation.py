"""--eval of detectors and segmenters: scores of one file of weights, tables, results and pictures."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from config import output_dir
from data import build_data
from data.transforms import channel_stats
from engine import evaluate
from engine.train import to_device
from tasks import build_task
from utils.amp import Amp
from utils.distributed import Runtime
from utils.pictures import remove_pictures, save_picture, to_picture

from .build import build_placed, compiled, load_weights, set_up, source_of
from .results import report_skipped, write_json

_LOG = logging.getLogger(__name__)


def evaluate_dense(config: CfgNode, runtime: Runtime) -> None:
    """Score exactly the file that --resume (or --pretrained) names, on the validation split; never trains."""
    amp = set_up(config, runtime)
    folder = output_dir(config)
    source = source_of(config, "eval", folder / "checkpoints" / "last.pth")
    data = build_data(
        config,
        rank=runtime.rank,
        world_size=runtime.world_size,
        local_world_size=runtime.local_world_size,
        splits=["val"],
        device=runtime.device,
    )
    dataset = data.val.dataset.dataset
    task = build_task(config, data.num_classes)
    model = build_placed(config, data.num_classes, runtime.device)
    load_weights(config, model, source, data.classes)
    model, _ = amp.prepare(model)
    model = compiled(config, model)
    evaluator = task.evaluator(
        classes=data.classes, category_ids=dataset.category_ids, record=config.TEST.REPORT
    )
    metrics = evaluate(
        model,
        task,
        data.val,
        device=runtime.device,
        amp=amp,
        channels_last=config.CHANNELS_LAST,
        evaluator=evaluator,
    )
    _LOG.info("%s", task.describe(metrics))
    skipped = report_skipped([data.val])
    written = evaluator.write(folder) if runtime.is_main else []
    # Scores are on the disk before anything is drawn, which takes long and may fail.
    write_json(
        folder / "eval.json", dict(checkpoint=source.path, **metrics, skipped=skipped), runtime
    )
    if runtime.is_main and config.TEST.PICTURES:
        mean, std = channel_stats(config.DATA.MEAN, config.DATA.STD, config.MODEL.IN_CHANS)
        batches = itertools.islice(data.val, config.TEST.PICTURES)
        remove_pictures(folder / "pictures")
        draw = Drawing(model, task, amp, data.classes, mean, std, folder / "pictures")
        written += [
            draw(to_device(batch, runtime.device, config.CHANNELS_LAST), number)
            for number, batch in enumerate(batches)
        ]
    _LOG.info("written: %s", ", ".join(map(str, [folder / "eval.json", *written])))


class Drawing:
    """Draws what a model finds in an image beside what is there, into a folder."""

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        amp: Amp,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        folder: Path,
        **options: Any,
    ) -> None:
        """`options` are those of the task's `picture`."""
        self.options = options
        self.model, self.task, self.amp = model.eval(), task, amp
        self.classes, self.mean, self.std, self.folder = classes, mean, std, folder

    def __call__(
        self, batch: tuple[torch.Tensor, list[dict[str, Any]]], number: int, output: Any = None
    ) -> Path:
        """Draw a batch of one image -> the file, whose name has the number: folders may share names.

        Args:
            output: what the task predicts for it, if it is known.
        """
        (image,), (target,) = batch
        if output is None:
            with torch.inference_mode(), self.amp.autocast():
                (output,) = self.task.predict(self.model, batch)
        picture = to_picture(image, self.mean, self.std, target["size"], target["original_size"])
        path = self.folder / f"{number:04d}_{Path(str(target['file'])).stem}.png"
        save_picture(self.task.picture(picture, output, target, self.classes, **self.options), path)
        return path
