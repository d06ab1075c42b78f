"""Metrics of object detection as COCO defines them, exact over the images of all processes."""

import contextlib
import importlib.util
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from torch import Tensor

from utils.distributed import broadcast_object, gather_object, is_main
from utils.tables import write_rows

EVALUATORS = ("auto", "pycocotools", "faster")

# In the order of `COCOeval.stats`.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# What is compared -> prefix of its metrics.
PREFIXES = {"bbox": "", "segm": "mask_"}


@dataclass(frozen=True)
class ImageResult:
    """What was found in one image, and what is there; plain data, in pixels of the stored image.

    Attributes:
        image_id: the data set's.
        size: (height, width).
        boxes: (N, 4), xyxy, NumPy, as `scores` (N,) and `labels` (N,).
        masks: RLE of each detection; None where the model makes no masks.
        annotations: dicts of COCO, whose `category_id` is the label.
        bad: what was left out because it is nan or infinite.
    """

    image_id: int | str
    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None
    annotations: list[dict[str, Any]]
    bad: int

    def detections(self, kind: str) -> Iterator[dict[str, Any]]:
        """Label, score, and `bbox` (xywh) or `segmentation` (RLE), which `kind` ("bbox" | "segm") compares.

        Never both: COCO's evaluation takes the area of a mask from the box, if there is one.
        """
        corners = self.boxes.astype(np.float64)
        sides = corners[:, 2:] - corners[:, :2]
        boxes = np.concatenate([corners[:, :2], sides], axis=1).tolist()
        shapes = dict(bbox=boxes, segmentation=self.masks)
        key = "bbox" if kind == "bbox" else "segmentation"
        rows = zip(self.labels.tolist(), self.scores.tolist(), shapes[key], strict=True)
        for label, score, shape in rows:
            yield {"category_id": label, "score": score, key: shape}


class CocoEvaluator:
    """The twelve numbers of COCO for boxes, and for masks if the model makes some.

    The main process evaluates the images of all processes, sorted by their id, each once however often it
    came. Crowds, sizes of objects and the limit of 100 detections (per image and class) are COCO's.

    Args:
        num_classes: labels are 0 ... K-1.
        evaluator: pycocotools, or faster (faster-coco-eval, the same numbers), or auto: faster where it is
            installed.
        classes: names of the classes; their numbers without.
        category_ids: the data set's own id of each class, for the results that are written; labels without.
        record: write the results too.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        evaluator: str = "auto",
        classes: Sequence[str] = (),
        category_ids: Sequence[int] = (),
        record: bool = False,
    ) -> None:
        self.backend = choose_evaluator(evaluator)
        self.classes = list(classes) or [str(label) for label in range(num_classes)]
        self.category_ids = list(category_ids) or list(range(num_classes))
        self.record = record
        for name, values in (("classes", self.classes), ("category_ids", self.category_ids)):
            if len(values) != num_classes:
                raise ValueError(f"{len(values)} {name} for a model of {num_classes} classes")
        self._images: dict[int | str, ImageResult] = {}
        self._evaluated: list[ImageResult] = []
        self._per_class: dict[str, list[float | None]] = {}

    def update(
        self, output: Sequence[Mapping[str, Any]], batch: tuple[Any, Sequence[Mapping[str, Any]]]
    ) -> None:
        """Keep what `DetectionTask.predict` gave for a batch, and the `annotations` of its targets."""
        for found, target in zip(output, batch[1], strict=True):
            boxes, scores, labels = (_array(found[name]) for name in ("boxes", "scores", "labels"))
            self._images[target["image_id"]] = ImageResult(
                target["image_id"],
                tuple(target["original_size"]),
                boxes,
                scores,
                labels,
                found.get("masks"),
                target["annotations"],
                found.get("bad", 0),
            )

    def compute(self) -> dict[str, float]:
        """AP ... ARl of boxes, mask_AP ... mask_ARl of masks, all in percent, and the number of `images`.

        A number of which the data have no object (small ones, say) is left out; without any object all are,
        which only an evaluation that records its results allows.

        Raises:
            FloatingPointError: detections of some images are nan or infinite.
            ValueError: there is no image on any process, or none has an object; an object has no mask.
        """
        shares = gather_object(list(self._images.values()))
        outcome = None
        if shares is not None:
            try:
                outcome = self._evaluate(shares)
            except Exception as error:  # the other processes wait: they must hear of any
                outcome = error
        outcome = broadcast_object(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def write(self, folder: Path, suffix: str = "") -> list[Path]:
        """Files of the main process, after `compute`; the others write none.

        - `classes<suffix>.csv`: number of objects without crowds, AP and AP50 of each class in percent, empty
          where there is no object;
        - with `record`: `results_bbox<suffix>.json` and, with masks, `results_segm<suffix>.json`, for
          `COCO.loadRes`.
        """
        if not is_main():
            return []
        assert self._evaluated, "write() comes after compute()"
        files = [folder / f"classes{suffix}.csv"]
        objects = Counter(a["category_id"] for image in self._evaluated for a in _objects(image))
        write_rows(
            files[0],
            ["label", "class", "category_id", "objects", *self._per_class],
            (
                [label, self.classes[label], self.category_ids[label], objects[label]]
                + [
                    "" if column[label] is None else column[label]
                    for column in self._per_class.values()
                ]
                for label in range(len(self.classes))
            ),
        )
        for kind in self._kinds() if self.record else ():
            files.append(folder / f"results_{kind}{suffix}.json")
            files[-1].write_text(json.dumps(list(self._results(kind))), encoding="utf-8")
        return files

    def _results(self, kind: str) -> Iterator[dict[str, Any]]:
        """Detections of all images with the data set's own ids."""
        for image in self._evaluated:
            for found in image.detections(kind):
                category = self.category_ids[found["category_id"]]
                yield {"image_id": image.image_id, **found, "category_id": category}

    def _kinds(self) -> list[str]:
        has_masks = any(image.masks is not None for image in self._evaluated)
        return ["bbox", "segm"] if has_masks else ["bbox"]

    def _evaluate(self, shares: Sequence[Sequence[ImageResult]]) -> dict[str, float]:
        """Metrics of the images of all processes; keeps what `write` needs."""
        # A sampler may give an image to two processes, to make their shares equal: the first one's counts.
        images = {image.image_id: image for share in reversed(shares) for image in share}
        self._evaluated = sorted(images.values(), key=lambda i: (str(type(i.image_id)), i.image_id))
        if not images:
            raise ValueError("nothing to evaluate: the loaders of all processes are empty")
        if bad := sum(image.bad > 0 for image in self._evaluated):
            raise FloatingPointError(
                f"outputs for {bad} of {len(images)} images are nan or infinite: the weights are damaged, "
                "or half precision overflows (try AMP_ENABLE False)"
            )
        if not self.record and not any(True for image in self._evaluated for _ in _objects(image)):
            raise ValueError(
                f"nothing to evaluate: none of {len(images)} images has an annotation that is no crowd"
            )
        self._per_class, metrics = {}, {}
        for kind in self._kinds():
            truth = self._dataset(kind, self._annotations(kind))
            found = self._dataset(kind, self._found(kind))
            stats, precision = _scores(self.backend, truth, found, kind)
            prefix = PREFIXES[kind]
            metrics |= {
                prefix + name: round(100 * float(value), 6)
                for name, value in zip(NAMES, stats, strict=True)
                if value > -1
            }
            for name, thresholds in (("AP", slice(None)), ("AP50", slice(0, 1))):
                self._per_class[prefix + name] = [
                    _mean(precision[thresholds, :, label, 0, -1])
                    for label in range(len(self.classes))
                ]
        return metrics | {"images": len(images)}

    def _dataset(self, kind: str, annotations: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Content of a COCO json: images and annotations are numbered from 1, categories are labels.

        Numbered anew, because image ids may be strings, and an annotation with id 0 counts as unmatched.
        """
        return dict(
            info={},
            images=[
                dict(id=number, height=image.size[0], width=image.size[1])
                for number, image in enumerate(self._evaluated, 1)
            ],
            categories=[dict(id=label, name=name) for label, name in enumerate(self.classes)],
            annotations=[
                annotation | dict(id=number) for number, annotation in enumerate(annotations, 1)
            ],
        )

    def _annotations(self, kind: str) -> Iterator[dict[str, Any]]:
        keys = ("category_id", "bbox", "area", "iscrowd")
        for number, image in enumerate(self._evaluated, 1):
            for annotation in image.annotations:
                entry = {key: annotation[key] for key in keys} | dict(image_id=number)
                if kind == "segm":
                    if not annotation.get("segmentation"):
                        raise ValueError(
                            f"an annotation of image {image.image_id!r} has no segmentation, so masks "
                            "cannot be scored: choose a head without masks"
                        )
                    entry["segmentation"] = annotation["segmentation"]
                yield entry

    def _found(self, kind: str) -> Iterator[dict[str, Any]]:
        for number, image in enumerate(self._evaluated, 1):
            for found in image.detections(kind):
                if kind == "bbox":
                    area = found["bbox"][2] * found["bbox"][3]
                else:
                    area = float(coco_mask.area(found["segmentation"]))
                yield found | dict(image_id=number, area=area, iscrowd=0)


def choose_evaluator(name: str) -> str:
    """`TEST.DETECTION.EVALUATOR` -> pycocotools or faster; ValueError for another, or one that is missing."""
    if name not in EVALUATORS:
        raise ValueError(f"TEST.DETECTION.EVALUATOR='{name}' must be one of {list(EVALUATORS)}")
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if name == "auto":
        return "faster" if installed else "pycocotools"
    if name == "faster" and not installed:
        raise ValueError(
            "TEST.DETECTION.EVALUATOR='faster' needs the package faster-coco-eval: pip install "
            "faster-coco-eval, or set pycocotools"
        )
    return name


def _scores(
    backend: str, truth: dict[str, Any], found: dict[str, Any], kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """COCO's twelve numbers, and the precisions (IoU, recall, class, area, limit) they are means of.

    Shares, -1 where there is no object. Both packages talk to the terminal, or to the log: not here.
    """
    if backend == "faster":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluation

        options = dict(print_function=lambda *_: None)
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluation

        options = {}
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for content in (truth, found):
            sides.append(COCO())
            sides[-1].dataset = content
            sides[-1].createIndex()
        evaluation = Evaluation(*sides, kind, **options)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats), np.asarray(evaluation.eval["precision"])


def _mean(precision: np.ndarray) -> float | None:
    """Percent; None if there is no object."""
    valid = precision[precision > -1]
    return round(100 * float(valid.mean()), 6) if valid.size else None


def _objects(image: ImageResult) -> Iterator[dict[str, Any]]:
    return (annotation for annotation in image.annotations if not annotation["iscrowd"])


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
