"""Adversarial images: the loss's gradient moves every pixel of a valid image, within bounds.

FGSM: Goodfellow et al., arXiv:1412.6572, Eq. in Sec. 4. PGD: Madry et al., arXiv:1706.06083, Sec. 2.1.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientAttack:
    """Steps along the sign of the gradient, inside a box around each image and inside the valid pixels.

    Attributes:
        eps: largest change of a pixel, of values in [0, 1] (L-infinity).
        step_size: change of a pixel per step, of values in [0, 1].
        steps: at least 1.
        mean, std: per channel, of the normalisation that the images went through.
        random_start: start at a random place of the box, instead of at the image.
        seed: of that place.
    """

    eps: float
    step_size: float
    steps: int
    mean: Sequence[float]
    std: Sequence[float]
    random_start: bool = False
    seed: int = 0

    def __call__(self, images: Tensor, loss: Callable[[Tensor], Tensor], number: int = 0) -> Tensor:
        """Normalised images (B, C, H, W) -> normalised images that raise `loss`.

        Args:
            loss: images -> a number whose gradient for an image does not depend on the others, so a sum.
            number: of the batch, among those of all processes; with `seed` it decides the random start.
        """
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        eps, step = self.eps / std, self.step_size / std  # (C, 1, 1), in normalised units
        low = torch.maximum(images - eps, -mean / std)
        high = torch.minimum(images + eps, (1 - mean) / std)
        moved = images
        if self.random_start:
            # Drawn on the CPU, so that every device starts at the same place. Its generator takes 32 bits of
            # a seed: the text is hashed to as many.
            seed = random.Random(f"{self.seed} {number}").getrandbits(32)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.rand(images.shape, generator=generator).to(images) * 2 - 1
            moved = (images + eps * noise).clamp(low, high)
        for _ in range(self.steps):
            moved = moved.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(moved), moved)
            moved = (moved.detach() + step * gradient.sign()).clamp(low, high)
        return moved.detach()


def build_attack(
    kind: str,
    *,
    eps: float,
    steps: int,
    step_size: float,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
) -> GradientAttack | None:
    """The attack that TEST.ATTACK names: fgsm, pgd, or None for none.

    FGSM is one step of `eps` from the image; PGD starts anywhere in the box, as in Madry et al.

    Args:
        eps, step_size: of values in [0, 1].
        mean, std: one entry per channel.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "none":
        return None
    if kind == "fgsm":
        return GradientAttack(eps, eps, 1, mean, std)
    if kind == "pgd":
        return GradientAttack(eps, step_size, steps, mean, std, random_start=True, seed=seed)
    raise ValueError(f"TEST.ATTACK='{kind}' must be one of ['none', 'fgsm', 'pgd']")
