"""Losses and metrics of classification against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from yacs.config import CfgNode

from tasks import build_task
from tasks.classification import ClassificationTask


class Fixed(nn.Module):
    """Returns the same logits for every image, with an auxiliary loss like a routed model's."""

    def __init__(self, logits, aux=None):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.aux = aux or {}

    def forward(self, x):
        return self.logits.expand(len(x), -1)

    def aux_losses(self):
        return {name: torch.tensor(value) for name, value in self.aux.items()}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)  # what timm's mixup draws from


def batch(labels, size=8):
    return torch.rand(len(labels), 3, size, size), torch.tensor(labels)


def config(batch_size=4, smoothing=0.1, train=None, **aug):
    mixing = dict(
        MIXUP=0.0,
        CUTMIX=0.0,
        CUTMIX_MINMAX=None,
        MIXUP_PROB=1.0,
        MIXUP_SWITCH_PROB=0.5,
        MIXUP_MODE="batch",
    )
    return CfgNode(
        dict(
            TASK="classification",
            EVAL_MODE=False,
            AUG=mixing | aug,
            MODEL=dict(LABEL_SMOOTHING=smoothing),
            TRAIN=dict(
                LOSS="cross_entropy",
                BCE_THRESHOLD=None,
                BCE_SUM=False,
                DISTILLATION=dict(TYPE="none"),
                TOKEN_LABELS=dict(ENABLE=False),
            )
            | (train or {}),
            DATA=dict(BATCH_SIZE=batch_size),
        )
    )


def test_plain_loss_is_cross_entropy():
    loss = ClassificationTask(3).losses(Fixed([1.0, 2.0, 3.0]), batch([2, 0]))["loss"]
    log_sum = torch.tensor([1.0, 2.0, 3.0]).logsumexp(0)
    assert loss.item() == pytest.approx((log_sum - 2).item())


def test_label_smoothing_moves_mass_to_all_classes():
    task = ClassificationTask(3, label_smoothing=0.3)
    loss = task.losses(Fixed([1.0, 2.0, 3.0]), batch([2, 2]))["loss"]
    log_sum = torch.tensor([1.0, 2.0, 3.0]).logsumexp(0)
    assert loss.item() == pytest.approx((log_sum - (0.7 * 3 + 0.3 * 2)).item())


@pytest.mark.parametrize(
    "aug",
    [dict(MIXUP=0.8), dict(CUTMIX=1.0), dict(CUTMIX_MINMAX=[0.3, 0.7])],
    ids=["mixup", "cutmix", "cutmix_minmax"],
)
def test_each_kind_of_mixing_alone_gives_a_soft_target_loss(aug):
    """Trap: looking at MIXUP only hands CutMix's soft targets to a hard-label loss."""
    task = build_task(config(smoothing=0.0, **aug), 2)
    images, labels = batch([0, 1])
    # All images show class 0: the loss tells the share of label 0 in the mixed targets exactly, and
    # the pair (0, 1) mixed with itself flipped has half of it, whatever was drawn.
    loss = task.losses(Fixed([2.0, -1.0]), (images, labels))["loss"]
    hard = F.cross_entropy(torch.tensor([[2.0, -1.0]] * 2), labels)
    assert loss.item() == pytest.approx(hard.item(), abs=1e-5)
    same = task.losses(Fixed([2.0, -1.0]), batch([0, 0]))["loss"]
    assert same.item() == pytest.approx(F.softplus(torch.tensor(-3.0)).item(), abs=1e-5)
    mixed, targets = task.mixup(images.clone(), labels)
    assert not torch.equal(mixed, images)
    assert targets.shape == (2, 2)


def test_mixing_smooths_the_labels_once():
    task = build_task(config(smoothing=0.4, MIXUP=0.8), 2)
    loss = task.losses(Fixed([2.0, -1.0]), batch([0, 0]))["loss"]
    expected = F.cross_entropy(torch.tensor([[2.0, -1.0]]), torch.tensor([0]), label_smoothing=0.4)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


LOGITS = [1.0, -2.0, 0.5]


def binary(targets, logits=LOGITS):
    """Binary cross entropy of each class, in a list."""
    shares = [1 / (1 + math.exp(-logit)) for logit in logits]
    return [
        -t * math.log(p) - (1 - t) * math.log(1 - p) for t, p in zip(targets, shares, strict=True)
    ]


@pytest.mark.parametrize(
    ("options", "targets", "reduce"),
    [
        ({}, [0.0, 0.0, 1.0], lambda losses: sum(losses) / 3),
        (dict(bce_sum=True), [0.0, 0.0, 1.0], sum),
        (dict(label_smoothing=0.3), [0.1, 0.1, 0.8], lambda losses: sum(losses) / 3),
        (dict(bce_threshold=0.0), [0.0, 0.0, 1.0], lambda losses: sum(losses) / 3),
        (
            dict(label_smoothing=0.3, bce_threshold=0.2),
            [0.0, 0.0, 1.0],
            lambda losses: sum(losses) / 3,
        ),
    ],
    ids=["mean", "sum", "smoothed", "threshold", "smoothed threshold"],
)
def test_binary_cross_entropy_asks_for_each_class_alone(options, targets, reduce):
    task = ClassificationTask(3, loss="bce", **options)
    loss = task.losses(Fixed(LOGITS), batch([2, 2]))["loss"]
    assert loss.item() == pytest.approx(reduce(binary(targets)), rel=1e-5)


def test_a_threshold_that_smoothing_reaches_in_every_class_is_refused():
    """All targets would be 1, and the loss would fall to 0 without anything learnt."""
    with pytest.raises(ValueError, match=r"TRAIN.BCE_THRESHOLD=0.0 .* MODEL.LABEL_SMOOTHING=0.3"):
        ClassificationTask(3, loss="bce", label_smoothing=0.3, bce_threshold=0.0)


def test_a_threshold_makes_both_labels_of_a_mixed_image_true():
    """As DeiT III has it: targets above 0 become 1, whatever their share."""
    train = dict(LOSS="bce", BCE_THRESHOLD=0.0)
    task = build_task(config(smoothing=0.0, train=train, MIXUP=0.8), 3)
    loss = task.losses(Fixed(LOGITS), batch([0, 2]))["loss"]
    assert loss.item() == pytest.approx(sum(binary([1.0, 0.0, 1.0])) / 3, rel=1e-5)
    soft = build_task(config(smoothing=0.0, train=dict(LOSS="bce"), MIXUP=0.8), 3)
    mean = soft.losses(Fixed(LOGITS), batch([0, 2]))["loss"]
    halves = [
        binary([1.0, 0.0, 0.0]),
        binary([0.0, 0.0, 1.0]),
    ]  # the two mix with shares that sum to 1
    assert mean.item() == pytest.approx(sum(map(sum, halves)) / 6, rel=1e-5)


def test_losses_leave_the_batch_as_it_was():
    """timm mixes in place, and on a CPU the batch may be the dataset's own tensor."""
    images, labels = batch([0, 1, 2, 0])
    before = images.clone()
    build_task(config(MIXUP=0.8), 3).losses(Fixed([1.0, 2.0, 3.0]), (images, labels))
    assert torch.equal(images, before)


def test_auxiliary_losses_are_added_and_named():
    task, model = ClassificationTask(2), Fixed([0.0, 0.0], aux={"budget": 0.5, "load": 0.25})
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        losses = task.losses(wrapped, batch([0, 1]))
        assert set(losses) == {"loss", "loss_cls", "loss_budget", "loss_load"}
        assert losses["loss"] == losses["loss_cls"] + 0.75


def test_a_model_with_two_heads_trains_both_on_the_labels():
    class TwoHeads(nn.Module):
        def forward(self, x):
            return first.expand(len(x), -1), second.expand(len(x), -1)

    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    loss = ClassificationTask(2).losses(TwoHeads(), batch([0, 0]))["loss"]
    alone = [F.cross_entropy(head[None], torch.tensor([0])) for head in (first, second)]
    torch.testing.assert_close(loss, sum(alone) / 2)


def test_an_odd_batch_size_with_mixing_is_refused_before_training():
    with pytest.raises(ValueError, match=r"DATA.BATCH_SIZE=5 must be even"):
        build_task(config(batch_size=5, CUTMIX=1.0), 3)
    build_task(config(batch_size=5), 3)
    evaluation = config(batch_size=5, CUTMIX=1.0)
    evaluation.EVAL_MODE = True
    build_task(evaluation, 3)


def test_an_odd_batch_with_mixing_is_explained():
    task = build_task(config(MIXUP=0.8), 3)
    with pytest.raises(ValueError, match=r"which has 3: make DATA.BATCH_SIZE even"):
        task.losses(Fixed([1.0, 2.0, 3.0]), batch([0, 1, 2]))


def test_bad_arguments_name_their_key():
    with pytest.raises(ValueError, match="NUM_CLASSES=1"):
        ClassificationTask(1)
    with pytest.raises(ValueError, match=r"TRAIN\.LOSS='hinge' must be one of"):
        ClassificationTask(3, loss="hinge")
    other = config()
    other.TASK = "regression"
    with pytest.raises(ValueError, match="TASK='regression' must be one of"):
        build_task(other, 3)


def test_metrics_of_a_hand_made_case():
    logits = torch.eye(7)[[0, 1, 2, 3]] * 4
    logits[3, :5] += torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0])  # label 6: not among the first five
    evaluator = ClassificationTask(7).evaluator()
    labels = torch.tensor([0, 1, 3, 6])
    evaluator.update(logits[:3], (None, labels[:3]))
    evaluator.update(logits[3:], (None, labels[3:]))
    result = evaluator.compute()
    assert result["acc1"] == 50.0
    assert result["acc5"] == 75.0
    assert result["images"] == 4
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)


def test_few_classes_have_a_top_k_of_all_classes():
    evaluator = ClassificationTask(2).evaluator()
    evaluator.update(torch.tensor([[1.0, 0.0]]), (None, torch.tensor([1])))
    result = evaluator.compute()
    assert (result["acc1"], result["acc5"]) == (0.0, 100.0)


@pytest.mark.parametrize("world", [2, 3, 20])
def test_sharded_evaluation_equals_one_process_exactly(monkeypatch, world):
    """Trap: padded samplers and averaged averages count some of 101 images twice.

    Batch k goes to process k % world; with 20 processes some have none.
    """
    torch.manual_seed(0)
    logits, labels = torch.randn(101, 10), torch.randint(10, (101,))
    batches = list(zip(logits.split(8), labels.split(8), strict=True))
    task = ClassificationTask(10)

    def evaluated(part):
        evaluator = task.evaluator()
        for output, target in part:
            evaluator.update(output, (None, target))
        return evaluator

    single = evaluated(batches).compute()
    assert single["images"] == 101

    shards = [evaluated(batches[rank::world]) for rank in range(world)]
    contributions: list[torch.Tensor] = []

    def collect(sums):
        contributions.append(sums.clone())
        raise CollectedError

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    monkeypatch.setattr("torch.distributed.all_reduce", collect)
    for shard in shards:
        with pytest.raises(CollectedError):
            shard.compute()
    total = torch.stack(contributions).sum(0)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: sums.copy_(total))
    assert [shard.compute() for shard in shards] == [single] * world


class CollectedError(Exception):
    """Stands for the other processes, which are not there."""


def test_nan_logits_are_named():
    evaluator = ClassificationTask(2).evaluator()
    evaluator.update(torch.tensor([[float("nan"), 0.0], [1.0, 0.0]]), (None, torch.tensor([0, 0])))
    with pytest.raises(FloatingPointError, match="logits of 1 of 2 images are nan or infinite"):
        evaluator.compute()


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        ClassificationTask(2).evaluator().compute()
