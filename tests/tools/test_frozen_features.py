"""Features against what the model computes by hand, and the classifiers on them against loops."""

import json
import math
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from config import load_config
from data import build_dataset, build_loader
from models import CONFIG_DIR, build_model
from tools import frozen_features
from tools.frozen_features import Split, draw_shots, few_shot_accuracies, knn_accuracy
from utils.amp import Amp

DEMO = str(CONFIG_DIR / "demo.yaml")
OPTS = ["DATA.NUM_WORKERS", "0"]


def clusters(per_class, spread, classes=3, dim=8):
    """Points around one centre per class, in an order that mixes the classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(classes).repeat(per_class)
    noise = torch.randn(len(labels), dim, generator=torch.Generator().manual_seed(per_class))
    return Split(centres[labels] + spread * noise, labels)


def literal_knn(train, val, k, classes, temperature):
    """DINO's vote in loops: each of the k most similar training images adds exp(similarity / T)."""
    right = 0
    for feature, label in zip(val.features, val.labels, strict=True):
        similarities = [
            (torch.dot(feature, other) / (feature.norm() * other.norm())).item()
            for other in train.features
        ]
        order = sorted(range(len(similarities)), key=lambda i: -similarities[i])[:k]
        votes = [0.0] * classes
        for i in order:
            votes[int(train.labels[i])] += math.exp(similarities[i] / temperature)
        right += votes.index(max(votes)) == int(label)
    return 100 * right / len(val.labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0)])
def test_knn_is_the_weighted_vote(monkeypatch, k, temperature):
    monkeypatch.setattr(frozen_features, "CHUNK", 7)  # several chunks of queries
    train, val = clusters(20, 1.5), clusters(11, 1.5)
    expected = literal_knn(train, val, k, 3, temperature)
    assert knn_accuracy(train, val, k, 3, temperature) == pytest.approx(expected)
    assert 34 < expected < 100


def test_near_neighbours_outvote_many_far_ones():
    """Without the weights, two far neighbours would win against one near."""
    train = Split(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), torch.tensor([0, 1, 1]))
    val = Split(torch.tensor([[1.0, 0.05]]), torch.tensor([0]))
    assert knn_accuracy(train, val, 3, 2, temperature=0.07) == 100
    assert knn_accuracy(train, val, 3, 2, temperature=100.0) == 0


def test_more_neighbours_than_images_are_refused():
    with pytest.raises(ValueError, match=r"--knn 61 must be from 1 to 60"):
        knn_accuracy(clusters(20, 1.0), clusters(5, 1.0), 61, 3)


def test_shots_are_so_many_of_each_class_without_repetition():
    labels = clusters(20, 1.0).labels
    chosen = draw_shots(labels, 4, (0, 4, 0))
    assert len(chosen.unique()) == 12
    assert labels[chosen].bincount().tolist() == [4, 4, 4]
    assert torch.equal(chosen, draw_shots(labels, 4, (0, 4, 0)))
    assert not torch.equal(chosen, draw_shots(labels, 4, (0, 4, 1)))
    with pytest.raises(ValueError, match=r"--shots 21: class 0 has only 20 training images"):
        draw_shots(labels, 21, (0,))


def test_the_nearest_class_mean_is_that_of_unit_vectors():
    train, val = clusters(20, 1.5), clusters(11, 1.5)
    (accuracy,) = few_shot_accuracies(train, val, 20, draws=1, seed=0, kind="mean")
    reference = make_pipeline(Normalizer(), NearestCentroid())
    reference.fit(train.features.numpy(), train.labels.numpy())
    expected = 100 * reference.score(val.features.numpy(), val.labels.numpy())
    assert accuracy == pytest.approx(expected)
    assert 34 < accuracy < 100


def test_labels_need_not_be_numbered_without_gaps():
    """A class without training images is never predicted; the others keep their labels."""
    train = Split(torch.eye(3)[[0, 1, 2]], torch.tensor([1, 4, 9]))
    val = Split(torch.eye(3)[[2, 1]], torch.tensor([9, 2]))
    assert few_shot_accuracies(train, val, 1, draws=1, seed=0, kind="mean") == [50]


@pytest.mark.parametrize("kind", frozen_features.CLASSIFIERS)
def test_more_shots_are_better_and_draws_differ(kind):
    train, val = clusters(60, 1.5), clusters(40, 1.5)
    options = dict(draws=4, seed=0, kind=kind)
    few = few_shot_accuracies(train, val, 1, **options)
    many = few_shot_accuracies(train, val, 50, **options)
    assert sum(many) > sum(few)
    assert len(set(few)) > 1
    assert few == few_shot_accuracies(train, val, 1, **options)


def test_features_are_what_the_classifier_reads(tmp_path):
    config = load_config(DEMO, OPTS)
    model = build_model(config, num_classes=10)
    loader = build_loader(config, "val", dataset=build_dataset(config, "train"))
    split = frozen_features.extract(model.train(), loader, torch.device("cpu"), Amp())
    assert split.features.shape == (1437, model.num_features)
    dataset = build_dataset(config, "train")
    assert split.labels.tolist() == [dataset[i][1] for i in range(len(dataset))], (
        "in order, each once"
    )
    images = next(iter(loader))[0][:3]
    with torch.no_grad():
        logits = model.eval()(images)
        from_features = model.get_classifier()(split.features[:3])
    torch.testing.assert_close(from_features, logits, rtol=1e-4, atol=1e-5)


def test_the_program_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_model(load_config(DEMO, OPTS), num_classes=3)  # another classifier
    torch.save({"model": model.state_dict()}, "weights.pth")
    options = "--pretrained weights.pth --knn 1 20 --shots 1 5 --draws 2 --classifier mean"
    frozen_features.main(["--cfg", DEMO, *options.split(), "--output", "out", "--opts", *OPTS])
    printed = capsys.readouterr().out
    report = json.loads(Path("out/frozen_features.json").read_text())
    assert list(report["knn"]) == ["1", "20"]
    assert list(report["few_shot"]) == ["1", "5"]
    assert len(report["few_shot"]["5"]["draws"]) == 2
    assert (report["train_images"], report["val_images"]) == (1437, 360)
    assert report["checkpoint"] == "weights.pth"
    lines = [line.split() for line in printed.splitlines()]
    assert ["k-NN,", "k", "20", f"{report['knn']['20']:.2f}"] in lines
    assert report["knn"]["1"] > 50, "digits are told apart by an untrained network, too"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to do"),
        (["--linear", "--c", "0"], "--c 0.0 must be positive"),
        (["--shots", "0"], "--shots [0] must be positive"),
        (["--knn", "5000"], "--knn 5000 must be from 1 to 1437"),
        (["--linear", "--resume", "nowhere.pth"], "nowhere.pth does not exist"),
    ],
)
def test_mistakes_are_named(args, message, capsys):
    with pytest.raises(SystemExit):
        frozen_features.main(["--cfg", DEMO, *args, "--opts", *OPTS])
    assert message in capsys.readouterr().err


def test_a_segmenter_is_refused(capsys):
    cfg = str(CONFIG_DIR / "_base_" / "smoke_seg.yaml")
    with pytest.raises(SystemExit):
        frozen_features.main(["--cfg", cfg, "--linear"])
    assert "TASK='segmentation' must be 'classification'" in capsys.readouterr().err
