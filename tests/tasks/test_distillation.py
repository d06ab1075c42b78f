"""Distillation: its formulas written out, a teacher that stays as it is, and what it needs of a student."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import main as program
from config import load_config
from engine import evaluate, train_epoch
from models import CONFIG_DIR, create_model
from tasks import build_task
from tasks.classification import ClassificationTask
from tasks.distillation import Distillation
from tasks.teacher import Teacher, load_teacher
from tests.test_engine_train import schedule_for
from utils.amp import Amp

SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")
DETECTOR = str(CONFIG_DIR / "_base_" / "smoke_det.yaml")
STUDENT = dict(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3)


class Fixed(nn.Module):
    """The same logits for each image, one vector per head; counts its calls."""

    def __init__(self, *heads):
        super().__init__()
        self.heads = nn.ParameterList([torch.tensor(head) for head in heads])
        self.training_outputs = ("logits", "distilled")[: len(heads)]
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        outputs = tuple(head.expand(len(x), -1) for head in self.heads)
        if len(outputs) == 1:
            return outputs[0]
        return outputs if self.training else sum(outputs) / 2


def batch(labels, size=16):
    return torch.rand(len(labels), 3, size, size), torch.tensor(labels)


def task(teacher, *, mixup=None, **options):
    return ClassificationTask(3, mixup=mixup, objective=Distillation(Teacher(teacher), **options))


def softmax(logits, tau=1.0):
    shares = [math.exp(value / tau) for value in logits]
    return [share / sum(shares) for share in shares]


CLASS, DISTILLED, TAUGHT = [1.0, 2.0, 0.5], [0.3, -0.2, 0.9], [0.1, 3.0, 2.0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_hard_distillation_learns_the_decision_of_the_teacher(alpha):
    losses = task(Fixed(TAUGHT), kind="hard", alpha=alpha).losses(
        Fixed(CLASS, DISTILLED), batch([2, 0])
    )
    labels = -(math.log(softmax(CLASS)[2]) + math.log(softmax(CLASS)[0])) / 2
    teacher = -math.log(softmax(DISTILLED)[1])  # its largest score is that of class 1
    assert losses["loss_cls"].item() == pytest.approx(labels)
    assert losses["loss_distillation"].item() == pytest.approx(teacher)
    assert losses["loss"].item() == pytest.approx((1 - alpha) * labels + alpha * teacher)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_the_divergence_over_all_scores(tau):
    """The release divides the sum by images x classes, not by images."""
    losses = task(Fixed(TAUGHT), kind="soft", tau=tau).losses(
        Fixed(CLASS, DISTILLED), batch([2, 0])
    )
    theirs, ours = softmax(TAUGHT, tau), softmax(DISTILLED, tau)
    divergence = sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True))
    expected = tau**2 * (2 * divergence) / (2 * 3)
    assert losses["loss_distillation"].item() == pytest.approx(expected, rel=1e-5)


def test_the_teacher_sees_the_mixed_images_and_the_student_is_called_once():
    np.random.seed(0)
    teacher, student = Fixed(TAUGHT), Fixed(CLASS, DISTILLED)
    images, labels = batch([0, 1, 2, 0])
    task(teacher, mixup=dict(mixup_alpha=0.8)).losses(student, (images, labels))
    assert len(student.seen) == len(teacher.seen) == 1
    assert torch.equal(student.seen[0], teacher.seen[0])
    assert not torch.equal(student.seen[0], images)


def test_the_class_head_learns_the_labels_and_the_other_the_teacher():
    student = Fixed(CLASS, DISTILLED)
    distilling = task(Fixed(TAUGHT), kind="hard", alpha=0.25)
    distilling.losses(student, batch([2, 2]))["loss"].backward()
    own = torch.tensor(CLASS).softmax(0) - F.one_hot(torch.tensor(2), 3)
    other = torch.tensor(DISTILLED).softmax(0) - F.one_hot(torch.tensor(1), 3)
    torch.testing.assert_close(student.heads[0].grad, 0.75 * own)
    torch.testing.assert_close(student.heads[1].grad, 0.25 * other)


class Learner(nn.Module):
    """A teacher whose mode and weights matter."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(x)).mean((2, 3)))


def test_training_leaves_the_teacher_as_it_was():
    teacher, student = Learner().train(), create_model("deit_tiny_distilled_patch16_224", **STUDENT)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    start = student.head_dist.weight.clone()
    train_epoch(
        student,
        task(teacher),
        [batch([0, 1])] * 3,
        optimizer,
        schedule_for(optimizer),
        device=torch.device("cpu"),
        amp=Amp(),
        num_batches=3,
    )
    assert not torch.equal(student.head_dist.weight, start)
    assert not teacher.training
    assert not teacher.drop.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_two_heads_are_averaged_at_evaluation():
    student = create_model("deit_tiny_distilled_patch16_224", **STUDENT)
    images, labels = batch([0, 1])
    student.train()
    with torch.no_grad():
        pair = student(images)
    scores = evaluate(
        student, task(Learner()), [(images, labels)], device=torch.device("cpu"), amp=Amp()
    )
    expected = F.cross_entropy((pair[0] + pair[1]) / 2, labels).item()
    assert scores["loss"] == pytest.approx(expected, abs=1e-5)


def test_the_teacher_may_see_another_size():
    teacher = Fixed(TAUGHT)
    images = torch.rand(2, 3, 16, 24)
    Teacher(teacher, size=32).logits(images)
    assert teacher.seen[0].shape == (2, 3, 32, 32)
    Teacher(teacher).logits(images)
    assert torch.equal(teacher.seen[1], images)


def test_a_student_without_a_distillation_head_is_told_what_to_choose():
    plain = create_model("deit_tiny_patch16_224", **STUDENT)
    with pytest.raises(
        ValueError,
        match=r"DISTILLATION\.TYPE='hard': VisionTransformer has no distillation head.*"
        r"deit_tiny_distilled_patch16_224.*TYPE none",
    ):
        task(Fixed(TAUGHT)).check(plain)
    task(Fixed(TAUGHT)).check(create_model("deit_tiny_distilled_patch16_224", **STUDENT))


def test_other_classes_of_the_teacher_are_refused():
    with pytest.raises(ValueError, match=r"scores 4 classes, the student 3"):
        task(Fixed([0.0] * 4)).losses(Fixed(CLASS, DISTILLED), batch([0, 1]))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"TYPE='medium' must be one of \['soft', 'hard'\]"):
        Distillation(Teacher(Fixed(TAUGHT)), "medium")


# -- teachers by name --------------------------------------------------------------------------------


def saved(tmp_path, name="deit_tiny_patch16_224", **keywords) -> tuple[nn.Module, str]:
    model = create_model(name, **keywords)
    file = tmp_path / "teacher.pth"
    torch.save({"model": model.state_dict()}, file)
    return model, str(file)


def load(name, weights="", **options):
    defaults = dict(num_classes=10, device=torch.device("cpu"))
    return load_teacher("TRAIN.DISTILLATION", name, weights, **(defaults | options))


def test_a_variant_with_its_checkpoint_is_a_teacher_and_draws_no_random_numbers(tmp_path):
    model, file = saved(tmp_path, num_classes=10)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    teacher = load("deit_tiny_patch16_224", file)
    assert torch.equal(torch.rand(1), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value), name


def test_the_averaged_weights_of_a_checkpoint_teach(tmp_path):
    file = tmp_path / "both.pth"
    states = [create_model("deit_tiny_patch16_224", num_classes=10).state_dict() for _ in range(2)]
    torch.save(dict(model=states[0], ema=states[1]), file)
    teacher = load("deit_tiny_patch16_224", str(file))
    assert torch.equal(teacher.head.weight, states[1]["head.weight"])


def test_a_yaml_file_and_a_model_of_timm_are_teachers(tmp_path):
    import timm

    cfg = tmp_path / "own.yaml"
    cfg.write_text("MODEL: {TYPE: deit, NAME: own, DEIT: {EMBED_DIM: 8, DEPTH: 1, NUM_HEADS: 2}}")
    _, file = saved(tmp_path, str(cfg), num_classes=10, in_chans=1)
    assert load(str(cfg), file, in_chans=1).num_features == 8
    network = timm.create_model("test_resnet", num_classes=10)
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    teacher = Teacher(load("timm:test_resnet", str(tmp_path / "timm.pth")))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(images), network.eval()(images))


def test_without_a_device_a_teacher_is_looked_at_only(tmp_path):
    _, file = saved(tmp_path, num_classes=10)
    load("deit_tiny_patch16_224", file, device=None)
    with pytest.raises(ValueError, match=r"be what TEACHER_WEIGHTS is of: .*other shapes"):
        load("deit_small_patch16_224", file, device=None)
    empty = tmp_path / "empty.pth"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.pth is empty"):
        load("deit_tiny_patch16_224", str(empty), device=None)
    # What only the run can fetch is left to it.
    teacher = load("deit_tiny_patch16_224", "https://example.org/teacher.pth", device=None)
    assert {p.device.type for p in teacher.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("", "", r"DISTILLATION\.TEACHER is empty: name a variant"),
        ("deit_tiny_patch16_224", "", r"TEACHER_WEIGHTS is empty.*has not learnt anything"),
        ("deit_tiny_patch16_224", "no.pth", r"TEACHER_WEIGHTS='no\.pth' does not exist"),
        ("deit_tiny_patch61_224", "here", r"TEACHER='deit_tiny_patch61_224': no model is named"),
        ("nowhere.yaml", "here", r"TEACHER='nowhere\.yaml': config file nowhere\.yaml"),
        (DETECTOR, "here", r"smoke_det\.yaml' is a model for detection: name a classifier"),
        ("timm:regnety_161", "", r"timm has no such model; perhaps one of .*regnety_160"),
        (
            "timm:regnety_160.no_such",
            "",
            r"TEACHER='timm:regnety_160\.no_such': Invalid pretrained",
        ),
        ("timm:mixlab_dfvt_tiny", "", r"timm has no weights of it; name a file"),
        ("timm:regnety_160", "", r"published weights are for 1000 classes, the student has 10"),
    ],
)
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_what_is_wrong_with_a_teacher_is_said_before_training(
    tmp_path, monkeypatch, name, weights, message, device
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    with pytest.raises(ValueError, match=message):
        load(name, weights, device=device)


def test_weights_for_other_classes_are_refused(tmp_path):
    _, file = saved(tmp_path, num_classes=7)
    with pytest.raises(ValueError, match=r"must have the student's 10 classes.*has 7 classes"):
        load("deit_tiny_patch16_224", file)


def test_published_weights_that_cannot_be_fetched_are_explained(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", refuse)
    with pytest.raises(ValueError, match=r"cannot be fetched \(no network\); name a file by"):
        load("timm:regnety_160", num_classes=1000)


# -- through main.py -----------------------------------------------------------------------------------


SMALL = ["MODEL.DEIT.PATCH_SIZE", 8, "MODEL.DEIT.EMBED_DIM", 16, "MODEL.DEIT.DEPTH", 1]
SMALL += ["MODEL.DEIT.NUM_HEADS", 2, "MODEL.TYPE", "deit", "AUG.AUTO_AUGMENT", "none"]


def run(tag: str, *opts, flags=()) -> Path:
    words = [*map(str, SMALL), *map(str, opts)]
    program.main(["--cfg", SMOKE, "--output", "out", "--tag", tag, *flags, "--opts", *words])
    return Path("out/smoke_cls") / tag


def test_a_run_with_a_teacher_trains_resumes_and_forgets_it(tmp_path, monkeypatch):
    """What the teacher is stays out of checkpoints, and a resumed run ends in the same weights."""
    monkeypatch.chdir(tmp_path)
    teacher = run("teacher", "TRAIN.MAX_STEPS", 1) / "checkpoints" / "last.pth"
    distil = ["MODEL.DEIT.DISTILLED", True, "TRAIN.DISTILLATION.TYPE", "hard"]
    distil += ["TRAIN.DISTILLATION.TEACHER", "out/smoke_cls/teacher/config.yaml"]
    distil += ["TRAIN.DISTILLATION.TEACHER_WEIGHTS", teacher]
    folder = run("student", *distil)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss_distillation"] > 0 for line in lines if line["kind"] == "train")
    state = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)
    shapes = create_model(str(folder / "config.yaml"), num_classes=10).state_dict().keys()
    assert state["model"].keys() == shapes
    again = run("again", *distil, flags=["--resume", str(folder / "checkpoints" / "epoch_0.pth")])
    resumed = torch.load(again / "checkpoints" / "last.pth", weights_only=True)["model"]
    assert all(torch.equal(resumed[name], value) for name, value in state["model"].items())
    # Scoring needs no teacher.
    teacher.unlink()
    scored = run(
        "student", *distil, flags=["--eval", "--resume", str(folder / "checkpoints" / "last.pth")]
    )
    assert json.loads((scored / "eval.json").read_text())["images"] == 20


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.DISTILLATION.TEACHER", "deit_tiny_patch16_224"], "TEACHER_WEIGHTS is empty"),
        (
            [
                "TRAIN.DISTILLATION.TEACHER",
                SMOKE,
                "TRAIN.DISTILLATION.TEACHER_WEIGHTS",
                "smoke.pth",
            ],
            "no distillation head",
        ),
        (["TRAIN.DISTILLATION.ALPHA", 1.5], "ALPHA=1.5 must be within"),
        (["TRAIN.DISTILLATION.TAU", 0], "TAU=0.0 must be within"),
        (["TRAIN.DISTILLATION.TYPE", "hrad"], "did you mean 'hard'"),
        (
            ["TRAIN.TOKEN_LABELS.ENABLE", True, "AUG.MIXUP", 0, "AUG.CUTMIX", 0],
            "exclude each other",
        ),
    ],
)
def test_bad_keys_stop_before_anything_is_written(tmp_path, monkeypatch, capsys, opts, message):
    monkeypatch.chdir(tmp_path)
    torch.save(create_model(SMOKE, num_classes=10).state_dict(), "smoke.pth")
    with pytest.raises(SystemExit):
        run("student", "TRAIN.DISTILLATION.TYPE", "soft", *opts)
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_evaluation_builds_no_teacher():
    config = load_config(
        SMOKE, ["EVAL_MODE", "True", "TRAIN.DISTILLATION.TYPE", "hard", "AUG.MIXUP", "0"]
    )
    assert build_task(config, 10).objective is None
