"""Token labels: scores of positions, the loss written out, exchanged regions, the auxiliary head."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import main as program
from models import CONFIG_DIR, create_model
from models.pretrained import load_pretrained
from tasks.classification import ClassificationTask
from tasks.teacher import Teacher
from tasks.token_labels import TokenLabelling

SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")
DILATE = dict(embed_dim=12, num_heads=(3, 3, 3, 3), depths=(1, 1, 1, 1), num_classes=5)
DEIT = dict(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=5)


def dilate(**keywords):
    return create_model("dilateformer_tiny", **(DILATE | keywords))


def scattered(model):
    """Weights that make classes differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


# -- scores per position -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        dilate,
        lambda: create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1, 1, 1),
                             num_heads=(1, 1, 1, 1), window_size=2, num_classes=5),
        lambda: timm.create_model("test_resnet", num_classes=5),
        lambda: timm.create_model("test_convnext", num_classes=5),
    ],
    ids=["tokens", "swin", "timm map", "timm map with a norm"],
)  # fmt: skip
def test_the_mean_over_positions_is_the_prediction(make):
    network = scattered(make())
    if hasattr(network, "head") and hasattr(network.head, "norm"):
        network.head.norm = nn.Identity()  # of the mean: not the same as of each position
    teacher, images = Teacher(network), torch.randn(2, 3, 64, 96)
    scores = teacher.token_logits(images, (2, 3))
    assert scores.shape == (2, 2, 3, 5)
    assert scores.flatten(1, 2).std(1).min() > 0
    torch.testing.assert_close(scores.mean((1, 2)), teacher.logits(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_class_tokens_classifier_reads_the_patches(name):
    network = scattered(create_model(name, **DEIT))
    images = torch.randn(2, 3, 32, 48)
    scores = Teacher(network).token_logits(images, (4, 6))
    with torch.no_grad():
        patches = network.forward_pyramid(images)[0].permute(0, 2, 3, 1)
        expected = network.head(patches)
        if network.distilled:
            expected = (expected + network.head_dist(patches)) / 2
    torch.testing.assert_close(scores, expected)


def test_scores_of_another_grid_are_resized():
    network = scattered(dilate())
    images = torch.randn(1, 3, 128, 128)
    fine = Teacher(network).token_logits(images, (4, 4))
    coarse = Teacher(network).token_logits(images, (2, 2))
    assert coarse.shape == (1, 2, 2, 5)
    # Antialiased bilinear halving: triangles two positions wide, cut off at the border.
    weights = torch.tensor([[3.0, 3, 1, 0], [0, 1, 3, 3]]) / 7
    expected = torch.einsum("ai,bj,nijk->nabk", weights, weights, fine)
    torch.testing.assert_close(coarse, expected, rtol=1e-4, atol=1e-4)
    assert Teacher(network, size=64).token_logits(images, (2, 2)).shape == (1, 2, 2, 5)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            lambda: create_model("evit_tiny_r07_fuse", depth=4, drop_loc=[1], embed_dim=6),
            "sequence of",
        ),
        (lambda: nn.Conv2d(3, 5, 3), "no forward_features as in timm"),
    ],
)
def test_a_teacher_without_positions_is_refused(network, message):
    with pytest.raises(ValueError, match=rf"TOKEN_LABELS\.TEACHER: .*{message}.*choose a network"):
        Teacher(network()).token_logits(torch.randn(1, 3, 64, 64), (2, 2))


# -- the loss ------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """A teacher that knows the scores of each position of the image beforehand."""

    num_features, feature_info = 5, [dict(stride=32)]

    def __init__(self, scores):
        super().__init__()
        self.scores, self.images = scores, None

    def forward_features(self, x):
        self.images = x.clone()
        return self.scores

    def forward_head(self, x):
        return x.mean(1)


class Student(nn.Module):
    """Fixed logits of the image and of its 2 x 2 positions."""

    training_outputs = ("logits", "tokens")
    feature_info = [dict(stride=32)]  # noqa: RUF012  as a backbone has it

    def __init__(self, size=2):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(size, 5))
        self.tokens = nn.Parameter(torch.randn(size, 4, 5))
        self.images = []

    def forward(self, x):
        self.images.append(x.clone())
        return self.logits + 0, self.tokens + 0


def shares(scores):
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def entropy(wanted, scores):
    """Cross entropy of `scores` with the shares `wanted`."""
    return -sum(w * math.log(p) for w, p in zip(wanted, shares(scores), strict=True))


def test_the_loss_is_that_of_the_paper():
    """L = H(class head, y) + beta / N * sum over positions H(position, token label)."""
    scores, student = torch.randn(2, 4, 5), Student()
    objective = TokenLabelling(Teacher(Positions(scores)), weight=0.25, mix_alpha=0)
    task = ClassificationTask(5, label_smoothing=0.1, objective=objective)
    losses = task.losses(student, (torch.rand(2, 3, 64, 64), torch.tensor([3, 1])))
    smooth = [[0.02 + 0.9 * (k == label) for k in range(5)] for label in (3, 1)]
    own = [entropy(w, s) for w, s in zip(smooth, student.logits.tolist(), strict=True)]
    dense = [
        entropy(shares(scores[i, n].tolist()), student.tokens[i, n].tolist())
        for i in range(2)
        for n in range(4)
    ]
    assert losses["loss_cls"].item() == pytest.approx(sum(own) / 2, rel=1e-5)
    assert losses["loss_tokens"].item() == pytest.approx(sum(dense) / 8, rel=1e-5)
    expected = sum(own) / 2 + 0.25 * sum(dense) / 8
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_exchanged_regions_carry_their_labels_along(monkeypatch):
    """MixToken: the upper left of four positions comes from the other image, in image, labels and share."""
    scores, student = torch.randn(2, 4, 5), Student()
    teacher = Positions(scores)
    objective = TokenLabelling(Teacher(teacher))
    monkeypatch.setattr(objective, "draw_region", lambda grid: (0, 1, 0, 1))
    task = ClassificationTask(5, objective=objective)
    images, labels = torch.rand(2, 3, 64, 50), torch.tensor([3, 1])
    before = images.clone()
    losses = task.losses(student, (images, labels))
    assert torch.equal(images, before)
    assert torch.equal(teacher.images, before)  # whole images can be labelled
    (seen,) = student.images
    assert torch.equal(seen[:, :, :32, :32], before.flip(0)[:, :, :32, :32])
    assert torch.equal(seen[:, :, 32:], before[:, :, 32:])
    assert torch.equal(seen[:, :, :32, 32:], before[:, :, :32, 32:])
    own = F.cross_entropy(student.logits, labels)
    other = F.cross_entropy(student.logits, labels.flip(0))
    torch.testing.assert_close(losses["loss_cls"], 0.75 * own + 0.25 * other)
    wanted = torch.cat([scores.flip(0)[:, :1], scores[:, 1:]], dim=1).softmax(-1)
    torch.testing.assert_close(
        losses["loss_tokens"], F.cross_entropy(student.tokens.flatten(0, 1), wanted.flatten(0, 1))
    )
    losses["loss"].backward()
    assert student.tokens.grad.abs().sum() > 0


def test_regions_are_drawn_in_whole_positions():
    np.random.seed(0)
    objective = TokenLabelling(Teacher(nn.Identity()))
    regions = [objective.draw_region((7, 5)) for _ in range(200)]
    assert len(set(regions)) > 20
    for top, bottom, left, right in regions:
        assert 0 <= top <= bottom <= 7
        assert 0 <= left <= right <= 5
    assert TokenLabelling(Teacher(nn.Identity()), mix_alpha=0).draw_region((7, 5)) == (0, 0, 0, 0)


def test_only_models_with_an_auxiliary_head_learn_token_labels():
    task = ClassificationTask(5, objective=TokenLabelling(Teacher(nn.Identity())))
    with pytest.raises(
        ValueError, match=r"TOKEN_LABELS\.ENABLE=True: DilateFormer has no auxiliary"
    ):
        task.check(dilate())
    task.check(dilate(aux_head=True))
    with pytest.raises(ValueError, match=r"which nothing would teach: set TRAIN\.TOKEN_LABELS"):
        ClassificationTask(5).check(dilate(aux_head=True))
    ClassificationTask(5).check(dilate())


# -- the auxiliary head ----------------------------------------------------------------------------------


def test_the_auxiliary_head_adds_two_tensors_and_changes_no_other():
    plain, taught = dilate().state_dict(), dilate(aux_head=True).state_dict()
    assert taught.keys() - plain.keys() == {"aux_head.weight", "aux_head.bias"}
    assert plain.keys() <= taught.keys()


def test_the_auxiliary_head_scores_positions_and_helps_at_evaluation():
    model = scattered(dilate(aux_head=True))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = model.forward_features(images)
        scores = model.aux_head(tokens)
        expected = model.head(tokens.mean(1)) + 0.5 * scores.max(1).values
        torch.testing.assert_close(model(images), expected)
        logits, positions = model.train().forward_head(tokens)
    torch.testing.assert_close(logits, model.head(tokens.mean(1)))
    torch.testing.assert_close(positions, scores)
    model.reset_classifier(7)
    assert model.aux_head.out_features == 7
    model.reset_classifier(0)
    assert model(images).shape == (2, 96)


def test_published_weights_without_the_head_start_a_model_with_it(tmp_path):
    source, model = dilate(), dilate(aux_head=True)
    report = load_pretrained(model, source.state_dict())
    assert set(report.head_replaced) >= {"aux_head.weight", "aux_head.bias"}
    assert torch.equal(model.norm.weight, source.norm.weight)
    dense = dilate(num_classes=0)
    assert load_pretrained(dense, model.state_dict()).unexpected == []


# -- through main.py -------------------------------------------------------------------------------------


SMALL = "DATA.IMG_SIZE 64 MODEL.TYPE dilateformer MODEL.DILATEFORMER.EMBED_DIM 12 AUG.AUTO_AUGMENT none "
SMALL += "MODEL.DILATEFORMER.DEPTHS [1,1,1,1] MODEL.DILATEFORMER.NUM_HEADS [3,3,3,3]"


def run(tag, *opts):
    words = [*SMALL.split(), *map(str, opts)]
    program.main(["--cfg", SMOKE, "--output", "out", "--tag", tag, "--opts", *words])
    return Path("out/smoke_cls") / tag


def test_a_run_with_token_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = run("teacher", "TRAIN.MAX_STEPS", 1)
    folder = run(
        "student", "MODEL.DILATEFORMER.AUX_HEAD", True, "TRAIN.TOKEN_LABELS.ENABLE", True,
        "TRAIN.TOKEN_LABELS.TEACHER", teacher / "config.yaml", "AUG.MIXUP", 0, "AUG.CUTMIX", 0,
        "TRAIN.TOKEN_LABELS.TEACHER_WEIGHTS", teacher / "checkpoints" / "last.pth",
        "TRAIN.EPOCHS", 1,
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert len(trained) == 4
    for line in trained:
        assert line["loss"] == pytest.approx(line["loss_cls"] + 0.5 * line["loss_tokens"], rel=1e-5)
    state = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)["model"]
    assert "aux_head.weight" in state


def test_a_run_with_stored_label_maps_teaches_what_they_say(tmp_path, monkeypatch):
    """Maps instead of a teacher, from the files to the loss; no teacher is asked."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(8):
                noise = np.random.default_rng(number).integers(0, 255, (70, 70, 3), np.uint8)
                Image.fromarray(noise).save(tmp_path / "data" / split / name / f"{number}.png")
        (tmp_path / "maps" / name).mkdir(parents=True)
        for number in range(8):
            stored = torch.stack([torch.full((1, 3, 3), 20.0), torch.ones(1, 3, 3)]).half()
            torch.save(stored, tmp_path / "maps" / name / f"{number}.pt")
    folder = run(
        "student", "MODEL.DILATEFORMER.AUX_HEAD", True, "TRAIN.TOKEN_LABELS.ENABLE", True,
        "TRAIN.TOKEN_LABELS.MAPS", tmp_path / "maps", "AUG.MIXUP", 0, "AUG.CUTMIX", 0,
        "DATA.DATASET", "folder", "DATA.DATA_PATH", tmp_path / "data", "TRAIN.MAX_STEPS", 12,
        "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 0.5,
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_tokens"] for line in lines if line["kind"] == "train"]
    assert losses[0] == pytest.approx(math.log(2), abs=0.2)
    assert losses[-1] < 0.3 * losses[0], "every position learns that it is a dog"


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ([], "mixes images by itself (MIX_ALPHA): AUG.MIXUP=0.8"),
        (["AUG.MIXUP", 0, "AUG.CUTMIX", 0], "TOKEN_LABELS.TEACHER is empty"),
        (
            [
                *("AUG.MIXUP", 0, "AUG.CUTMIX", 0, "TRAIN.TOKEN_LABELS.TEACHER", "x"),
                "TRAIN.TOKEN_LABELS.MAPS",
                ".",
            ],
            "exclude each other: leave one of them empty",
        ),
        (["TRAIN.TOKEN_LABELS.WEIGHT", -1], "WEIGHT=-1.0 must be within"),
    ],
)
def test_bad_keys_stop_before_anything_is_written(tmp_path, monkeypatch, capsys, opts, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run("student", "TRAIN.TOKEN_LABELS.ENABLE", True, *opts)
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
