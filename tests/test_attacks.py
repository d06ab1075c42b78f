"""Adversarial images against the arithmetic of a linear model, and on every architecture."""

import pytest
import torch
from torch import nn

from engine import evaluate
from engine.attacks import GradientAttack, build_attack
from models import create_model
from tasks.classification import ClassificationTask
from tasks.classification_metrics import SetEvaluator
from tests.small_models import SMALL
from utils.amp import Amp

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def normalise(pixels):
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def pixels_of(images):
    return images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


def attack(kind, **options):
    defaults = dict(eps=8 / 255, steps=5, step_size=2 / 255, mean=MEAN, std=STD)
    return build_attack(kind, **(defaults | options))


def test_fgsm_moves_every_pixel_by_eps_along_the_sign_of_a_linear_models_weights():
    """The loss of weights . x rises fastest along sign(weights), and there is nothing else to it."""
    weights = torch.randn(3, 4, 5)
    pixels = torch.rand(2, 3, 4, 5) * 0.8 + 0.1  # nothing to clip
    moved = attack("fgsm")(normalise(pixels), lambda x: (x * weights).sum())
    expected = pixels + 8 / 255 * weights.sign()
    torch.testing.assert_close(pixels_of(moved), expected, rtol=0, atol=1e-6)


def test_pixels_stay_valid():
    pixels = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0]).expand(1, 3, 1, 5)
    up = attack("fgsm")(normalise(pixels), lambda x: x.sum())
    down = attack("fgsm")(normalise(pixels), lambda x: -x.sum())
    eps = 8 / 255
    for moved, expected in (
        (up, [eps, 0.01 + eps, 0.5 + eps, 1.0, 1.0]),
        (down, [0.0, 0.0, 0.5 - eps, 0.99 - eps, 1 - eps]),
    ):
        expected = torch.tensor(expected).expand(1, 3, 1, 5)
        torch.testing.assert_close(pixels_of(moved), expected, rtol=0, atol=1e-6)


def literal_pgd(pixels, loss, eps, steps, step_size):
    """Madry et al. 2018, Sec. 2.1, on pixels, without a random start."""
    moved = pixels.clone()
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        loss(normalise(moved)).backward()
        moved = moved.detach() + step_size * moved.grad.sign()
        moved = torch.minimum(torch.maximum(moved, pixels - eps), pixels + eps).clamp(0, 1)
    return moved


def test_pgd_is_that_of_the_paper():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 8), nn.Tanh(), nn.Linear(8, 1))
    pixels = torch.rand(2, 3, 4, 4)

    def loss(x):
        return net(x).sum()

    still = GradientAttack(8 / 255, 3 / 255, 5, MEAN, STD)
    moved = still(normalise(pixels), loss)
    expected = literal_pgd(pixels, loss, 8 / 255, 5, 3 / 255)
    torch.testing.assert_close(pixels_of(moved), expected, rtol=0, atol=1e-5)
    assert all(parameter.grad is not None for parameter in net.parameters()), "the literal one's"


def test_the_random_start_lies_in_the_box_and_depends_on_seed_and_batch_alone():
    pixels = torch.rand(2, 3, 4, 4)
    images = normalise(pixels)

    def started(number=0, **options):
        # A loss without a slope leaves the images where they start.
        return attack("pgd", steps=1, **options)(images, lambda x: (0 * x).sum(), number)

    start = pixels_of(started())
    change = (start - pixels).abs()
    assert change.max() <= 8 / 255 + 1e-6
    assert change.mean() > 2 / 255
    assert start.min() >= -1e-6
    assert start.max() <= 1 + 1e-6
    torch.manual_seed(7)
    assert torch.equal(started(), started())
    assert not torch.equal(started(), started(number=1))
    assert not torch.equal(started(), started(seed=1))


def test_kinds_are_named():
    assert attack("none") is None
    fgsm = attack("fgsm")
    assert (fgsm.steps, fgsm.step_size, fgsm.random_start) == (1, 8 / 255, False)
    with pytest.raises(ValueError, match=r"TEST.ATTACK='cw' must be one of"):
        attack("cw")


def score(model, images, labels, chosen, **options):
    task = ClassificationTask(10)
    batches = list(zip(images.split(2), labels.split(2), strict=True))
    return evaluate(model, task, batches, device=CPU, amp=Amp(), attack=chosen, **options)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_attack_raises_the_loss_of_every_architecture(name):
    """Gradients through eval mode, where models take ways of their own when nothing asks for gradients."""
    variant, overrides = SMALL[name]
    model = create_model(variant, num_classes=10, **overrides).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    side = overrides["img_size"]
    images, labels = normalise(torch.rand(2, 3, side, side)), torch.tensor([1, 2])
    plain = score(model, images, labels, None)
    moved = score(model, images, labels, attack("fgsm"))
    assert moved["loss"] > plain["loss"] + 1e-4
    assert score(model, images, labels, None) == plain, "nothing of the attack is left"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_gradient_that_the_attack_follows_is_the_right_one():
    """Against finite differences, through the task, the restricted classes and the evaluator."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, 6)).double().eval()
    evaluator, task = SetEvaluator(6, subset=[1, 4]), ClassificationTask(6)
    images, targets = torch.rand(2, 3, 2, 2, dtype=torch.float64), torch.tensor([[1, 0], [4, 1]])

    def loss(x):
        return evaluator.loss(task.predict(net, (x, targets)), (x, targets))

    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    for place in [(0, 0, 0, 0), (1, 2, 1, 0)]:
        shifted = images.clone()
        shifted[place] += 1e-3
        slope = (loss(shifted) - loss(images)) / 1e-3
        assert slope.item() == pytest.approx(gradient[place].item(), abs=1e-3)


def test_half_precision_is_attacked_in_float32():
    """In half precision small gradients vanish, and their signs with them."""
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 10)

        def forward(self, x):
            output = self.head(x.flatten(1))
            seen.append((output.requires_grad, output.dtype))
            return output

    images, labels = normalise(torch.rand(2, 3, 2, 2)), torch.tensor([1, 2])
    evaluate(
        Net(),
        ClassificationTask(10),
        [(images, labels)],
        device=CPU,
        amp=Amp("cpu", "bf16"),
        attack=attack("fgsm"),
    )
    assert seen == [(True, torch.float32), (False, torch.bfloat16)]
