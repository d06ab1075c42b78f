"""--eval: scores of one file of weights, on one or more sets of images."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from yacs.config import CfgNode

from config import output_dir
from data import VAL, EvaluationSet, NumberedImages, build_evaluation_sets, build_loader
from data.registry import CLASSIFICATION, ImageDataset
from data.transforms import channel_stats
from engine import evaluate
from engine.attacks import GradientAttack, build_attack
from models.layers.tokens import to_pair
from tasks import build_task
from tasks.classification_metrics import SetEvaluator, corruption_errors
from tasks.classification_report import write_predictions, write_report
from tasks.views import averaged
from utils.amp import Amp
from utils.distributed import Runtime

from .build import build_placed, compiled, load_weights, set_up, source_of
from .dense_evaluation import evaluate_dense
from .results import report_skipped, write_json

_LOG = logging.getLogger(__name__)


class Evaluation:
    """Scores a model on evaluation sets, and writes beside eval.json what else TEST asks for.

    Attributes:
        skipped: unreadable images that were left out so far, on all processes.
    """

    def __init__(
        self,
        config: CfgNode,
        runtime: Runtime,
        amp: Amp,
        task: Any,
        model: nn.Module,
        classes: Sequence[str],
    ) -> None:
        self.config, self.runtime, self.amp, self.task = config, runtime, amp, task
        self.classes, self.skipped = classes, 0
        test = config.TEST
        self.model = averaged(model, test.TTA, to_pair(config.DATA.IMG_SIZE))
        mean, std = channel_stats(config.DATA.MEAN, config.DATA.STD, config.MODEL.IN_CHANS)
        self.attack = build_attack(
            test.ATTACK,
            eps=test.ATTACK_EPS / 255,
            steps=test.ATTACK_STEPS,
            step_size=test.ATTACK_STEP_SIZE / 255,
            mean=mean,
            std=std,
            seed=config.SEED,
        )

    def run(self, found: EvaluationSet) -> dict[str, Any]:
        """Metrics of a set; those of its parts together, if it has several."""
        scores = {part: self.score(found, part) for part in found.parts}
        whole = "" in scores
        result = scores[""] if whole else corruption_errors(scores)
        if not whole:
            self.tell(found, result)
        if self.attack:
            if not whole:
                attacked = {part: metrics["attack"] for part, metrics in scores.items()}
                result["attack"] = self.settings() | corruption_errors(attacked)
            _LOG.info("under attack:%s", self.task.describe(result["attack"]))
        return result

    def score(self, found: EvaluationSet, part: str) -> dict[str, Any]:
        """Metrics of one part; those of its attacked images under `attack`."""
        test, dataset = self.config.TEST, found.parts[part]
        details = dict(report=test.REPORT, record=bool(test.PREDICTIONS))
        numbered = any(details.values()) or not found.is_plain
        labels = dict(subset=found.subset, accepted=found.accepted) if numbered else {}
        loader = build_loader(
            self.config,
            "val",
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            device=self.runtime.device,
            dataset=NumberedImages(dataset) if numbered else dataset,
        )
        evaluator = self.task.evaluator(**labels, **(details if numbered else {}))
        metrics = self.pass_over(loader, evaluator)
        self.skipped += report_skipped([loader])
        if not part:  # before anything is written, which a full disk ends
            self.tell(found, metrics)
        if numbered and self.runtime.is_main:
            names = [] if found.name == VAL else [found.name, *part.split("/")]
            self.write("_".join(["", *filter(None, names)]), found, dataset, evaluator)
        if self.attack:
            attacked = self.pass_over(loader, self.task.evaluator(**labels), self.attack)
            metrics["attack"] = self.settings() | attacked
        return metrics

    def tell(self, found: EvaluationSet, metrics: dict[str, Any]) -> None:
        """The log line of a set."""
        name = "" if found.name == VAL else f"{found.name}:"
        _LOG.info("%s%s", name, self.task.describe(metrics))

    def pass_over(
        self, loader: Any, evaluator: Any, attack: GradientAttack | None = None
    ) -> dict[str, Any]:
        """Metrics of one pass over a loader."""
        return evaluate(
            self.model,
            self.task,
            loader,
            device=self.runtime.device,
            amp=self.amp,
            channels_last=self.config.CHANNELS_LAST,
            evaluator=evaluator,
            attack=attack,
        )

    def settings(self) -> dict[str, Any]:
        """The attack, as eval.json names it: sizes are of pixel values in [0, 1]."""
        attack = self.attack
        sizes = dict(eps=attack.eps, steps=attack.steps, step_size=attack.step_size)
        return dict(type=self.config.TEST.ATTACK, **sizes)

    def write(
        self, name: str, found: EvaluationSet, dataset: ImageDataset, evaluator: SetEvaluator
    ) -> None:
        """Predictions and report of one part, in files whose names end in `name`."""
        folder = output_dir(self.config)
        if evaluator.predictions is not None:
            target = folder / self.config.TEST.PREDICTIONS
            path = target.with_stem(target.stem + name)
            rows = evaluator.predictions
            write_predictions(path, rows, dataset.describe, self.classes, found.accepted)
            _LOG.info("written: %s", path)
        write_report(folder, name, evaluator, self.classes)


def evaluate_only(config: CfgNode, runtime: Runtime) -> None:
    """Score one file of weights on what the task is scored on."""
    {CLASSIFICATION: evaluate_sets}.get(config.TASK, evaluate_dense)(config, runtime)


def evaluate_sets(config: CfgNode, runtime: Runtime) -> None:
    """Score exactly the file that --resume (or --pretrained) names, on TEST.SETS; never trains."""
    amp = set_up(config, runtime)
    folder = output_dir(config)
    source = source_of(config, "eval", folder / "checkpoints" / "last.pth")
    classes, sets = build_evaluation_sets(config)
    task = build_task(config, len(classes))
    model = build_placed(config, len(classes), runtime.device)
    load_weights(config, model, source, classes)
    model, _ = amp.prepare(model)
    evaluation = Evaluation(config, runtime, amp, task, compiled(config, model), classes)
    results: dict[str, Any] = {}
    for found in sets:
        results[found.name] = evaluation.run(found)
        result = dict(checkpoint=source.path, **results[sets[0].name], skipped=evaluation.skipped)
        if [other.name for other in sets] != [VAL]:
            result["sets"] = results
        if config.TEST.TTA != "none":
            result["tta"] = config.TEST.TTA
        # After each set: a file that the next one cannot read costs no score.
        write_json(folder / "eval.json", result, runtime)
    _LOG.info("written: %s", folder / "eval.json")
