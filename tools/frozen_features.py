"""How good a model's features are without training it: k nearest neighbours, few shots, a linear classifier.

    python tools/frozen_features.py --cfg configs/demo.yaml --resume best.pth --knn 10 20 --shots 1 5 --linear
    python tools/frozen_features.py --cfg configs/deit/deit_small_patch16_224.yaml --pretrained w.pth --knn 20

Features are what the classifier reads (`forward_head(forward_features(x), pre_logits=True)`), of the training
and of the validation split, both with the transform of evaluation; they are computed once. Results go to
standard output and, with all figures, to `frozen_features.json` in the experiment's folder.

- k-NN as in DINO (arXiv:2104.14294) and Wu et al. (arXiv:1805.01978): the k training images of
  highest cosine similarity s vote for their class with weight exp(s / temperature).
- Few shots: n training images per class, drawn several times; mean and standard deviation over the draws.
- Linear: logistic regression on all training images. It is fitted on the CPU in one piece; for ImageNet use
  `configs/_base_/linear_probe.yaml`, which trains the classifier by SGD.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import check_is_classifier, load_config, output_dir  # noqa: E402  found through the line above
from data import build_dataset, build_loader  # noqa: E402
from engine.train import to_device  # noqa: E402
from models import Backbone  # noqa: E402
from modes.build import build_placed, load_weights, source_of  # noqa: E402
from utils.amp import Amp  # noqa: E402
from utils.arguments import add_opts  # noqa: E402
from utils.distributed import own_device  # noqa: E402
from utils.files import check_output  # noqa: E402

CLASSIFIERS = ("logistic", "mean")
# Queries compared with all training images at once.
CHUNK = 1024


class Split(NamedTuple):
    """Features (N, D) float32 and labels (N,) int64 of one split, on the CPU."""

    features: Tensor
    labels: Tensor


@torch.inference_mode()
def extract(
    model: Backbone, loader: Any, device: torch.device, amp: Amp, channels_last: bool = False
) -> Split:
    """Features of all images of a loader, with the model in eval mode."""
    model.eval()
    features, labels = [], []
    for batch in tqdm(loader, desc="features", leave=False, disable=None):
        images, targets = to_device(batch, device, channels_last)
        with amp.autocast():
            found = model.forward_head(model.forward_features(images), pre_logits=True)
        features.append(found.float().cpu())
        labels.append(targets.cpu())
    return Split(torch.cat(features), torch.cat(labels))


def knn_accuracy(
    train: Split, val: Split, k: int, num_classes: int, temperature: float = 0.07
) -> float:
    """Top-1 accuracy in percent of the weighted vote of the `k` nearest training images.

    Raises:
        ValueError: there are fewer than k training images.
    """
    if not 1 <= k <= len(train.labels):
        raise ValueError(f"--knn {k} must be from 1 to {len(train.labels)}, the training images")
    known = F.normalize(train.features)  # (N, D)
    right = 0
    for queries, labels in zip(val.features.split(CHUNK), val.labels.split(CHUNK), strict=True):
        similarity, nearest = (F.normalize(queries) @ known.T).topk(k)  # (B, k)
        votes = torch.zeros(len(queries), num_classes)
        votes.scatter_add_(1, train.labels[nearest], (similarity / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return 100 * right / len(val.labels)


def logistic_accuracy(train: Split, val: Split, c: float = 1.0) -> float:
    """Top-1 accuracy in percent of a logistic regression on standardised features.

    Args:
        c: inverse strength of its L2 penalty, as scikit-learn has it.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    classifier.fit(train.features.numpy(), train.labels.numpy())
    return 100 * float(classifier.score(val.features.numpy(), val.labels.numpy()))


def mean_accuracy(train: Split, val: Split) -> float:
    """Top-1 accuracy in percent of the class whose mean of unit vectors is nearest to the image's."""
    classes, members = train.labels.unique(return_inverse=True)
    one_hot = F.one_hot(members).float()  # (N, classes)
    means = one_hot.T @ F.normalize(train.features) / one_hot.sum(0)[:, None]
    nearest = torch.cdist(F.normalize(val.features), means).argmin(1)
    return 100 * (classes[nearest] == val.labels).float().mean().item()


def draw_shots(labels: Tensor, shots: int, seed: Sequence[int]) -> Tensor:
    """Indices of `shots` images of each class that occurs, without replacement.

    Raises:
        ValueError: a class has fewer.
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0].numpy()
        if len(own) < shots:
            raise ValueError(
                f"--shots {shots}: class {int(label)} has only {len(own)} training images"
            )
        chosen.append(generator.choice(own, shots, replace=False))
    return torch.from_numpy(np.concatenate(chosen))


def few_shot_accuracies(
    train: Split, val: Split, shots: int, *, draws: int, seed: int, kind: str, c: float = 1.0
) -> list[float]:
    """Top-1 accuracy in percent on all validation images, one per draw of `shots` images per class.

    Args:
        kind: of `CLASSIFIERS`: logistic regression (with `c`), or the nearest class mean.
    """
    results = []
    for draw in range(draws):
        chosen = draw_shots(train.labels, shots, (seed, shots, draw))
        few = Split(train.features[chosen], train.labels[chosen])
        mean = kind == "mean"
        results.append(mean_accuracy(few, val) if mean else logistic_accuracy(few, val, c))
    return results


def evaluate_features(
    train: Split,
    val: Split,
    num_classes: int,
    *,
    knn: Sequence[int] = (),
    temperature: float = 0.07,
    shots: Sequence[int] = (),
    draws: int = 5,
    kind: str = "logistic",
    linear: bool = False,
    c: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """What was asked for, as `frozen_features.json` has it; accuracies are top-1 in percent."""
    report: dict[str, Any] = dict(
        dim=train.features.shape[1],
        train_images=len(train.labels),
        val_images=len(val.labels),
        knn={str(k): knn_accuracy(train, val, k, num_classes, temperature) for k in knn},
        few_shot={},
    )
    for n in shots:
        runs = few_shot_accuracies(train, val, n, draws=draws, seed=seed, kind=kind, c=c)
        report["few_shot"][str(n)] = dict(mean=fmean(runs), std=pstdev(runs), draws=runs)
    if linear:
        report["linear"] = logistic_accuracy(train, val, c)
    return report


def table(report: dict[str, Any]) -> str:
    """One line per figure."""
    lines = [f"{'on frozen features':24} {'top-1 (%)':>9}  {'std':>5}"]
    lines += [f"{f'k-NN, k {k}':24} {acc:9.2f}" for k, acc in report["knn"].items()]
    lines += [
        f"{f'few-shot, {n} per class':24} {entry['mean']:9.2f}  {entry['std']:5.2f}"
        for n, entry in report["few_shot"].items()
    ]
    if "linear" in report:
        lines.append(f"{'linear':24} {report['linear']:9.2f}")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the experiment's YAML file")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--resume", metavar="FILE", help="checkpoint of a run of ours")
    weights.add_argument("--pretrained", metavar="FILE", help="any weights of the architecture")
    parser.add_argument("--data-path", metavar="DIR", help="root folder of the dataset")
    parser.add_argument("--output", metavar="DIR", help="folder of the result")
    parser.add_argument("--knn", type=int, nargs="+", default=[], metavar="K", help="neighbours")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the neighbours' votes")
    parser.add_argument(
        "--shots", type=int, nargs="+", default=[], metavar="N", help="images per class"
    )
    parser.add_argument("--draws", type=int, default=5, help="draws per number of shots")
    parser.add_argument(
        "--classifier", choices=CLASSIFIERS, default="logistic", help="of few shots"
    )
    parser.add_argument("--linear", action="store_true", help="logistic regression on all images")
    parser.add_argument("--c", type=float, default=1.0, help="inverse L2 penalty of the regression")
    add_opts(parser)
    args = parser.parse_args(argv)
    if not (args.knn or args.shots or args.linear):
        parser.error("nothing to do: give --knn, --shots or --linear")
    for name, value in dict(temperature=args.temperature, draws=args.draws, c=args.c).items():
        if value <= 0:
            parser.error(f"--{name} {value} must be positive")
    if min(args.shots, default=1) < 1:
        parser.error(f"--shots {args.shots} must be positive")
    return parser, args


def main(argv: Sequence[str] | None = None) -> None:
    parser, args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    for package in ("modes", "models"):  # which weights were loaded, and how they fit
        logging.getLogger(package).setLevel(logging.INFO)
    given = {
        "MODEL.RESUME": args.resume,
        "MODEL.PRETRAINED": args.pretrained,
        "DATA.DATA_PATH": args.data_path,
    }
    try:
        config = load_config(args.cfg, args.opts, {k: v for k, v in given.items() if v})
        check_is_classifier(config, "features are what a classifier reads")
        folder = Path(args.output) if args.output else output_dir(config)
        check_output(folder, "--output", is_folder=True)
        device = own_device(config.DEVICE)
        loaders = {
            split: build_loader(config, "val", device=device, dataset=build_dataset(config, split))
            for split in ("train", "val")
        }
        images = len(loaders["train"].dataset)
        for flag, counts in (("--knn", args.knn), ("--shots", args.shots)):
            for count in counts:
                if not 1 <= count <= images:
                    raise ValueError(
                        f"{flag} {count} must be from 1 to {images}, the training images"
                    )
        num_classes = len(loaders["val"].classes)
        model = build_placed(config, num_classes, device)
        source = source_of(config, "throughput", output_dir(config) / "checkpoints" / "last.pth")
        if source.kind == "scratch":
            logging.warning("the weights are fresh: give --resume or --pretrained")
        else:
            # The classifier is not used: that of --pretrained weights may have other classes.
            kind = "pretrained" if args.pretrained else source.kind
            load_weights(config, model, replace(source, kind=kind))
        amp = Amp(device, config.AMP_DTYPE, config.AMP_ENABLE, config.AMP_OPT_LEVEL)
        model, _ = amp.prepare(model)
        train, val = (
            extract(model, loader, device, amp, config.CHANNELS_LAST) for loader in loaders.values()
        )
        report = evaluate_features(
            train,
            val,
            num_classes,
            knn=args.knn,
            temperature=args.temperature,
            shots=args.shots,
            draws=args.draws,
            kind=args.classifier,
            linear=args.linear,
            c=args.c,
            seed=config.SEED,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(table(report))
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(temperature=args.temperature, classifier=args.classifier, c=args.c)
    content = dict(model=config.MODEL.NAME, checkpoint=source.path, **settings, **report)
    (folder / "frozen_features.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"written: {folder / 'frozen_features.json'}")


if __name__ == "__main__":
    main()
