"""What is left to do to a batch of uint8 images on their device: normalisation and random erasing.

Workers deliver bytes, a quarter of the memory of floats, and the device does the arithmetic. Erasing comes
after normalisation, whose noise it needs, so it happens here too; which rectangles are erased, and the seeds
of what fills them, are drawn with the sample, so that an erased image depends on its key alone: the same for
any number of workers, and after a resume. Noise is that of its device's generator: a CPU and a GPU fill the
same rectangles with other numbers.
"""

import math
import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ERASE_MODES = ("pixel", "const", "rand")


class Erasure(NamedTuple):
    """A rectangle of an image in pixels, and the seed of the noise that fills it."""

    top: int
    left: int
    height: int
    width: int
    seed: int


class RandomErasing:
    """Draws rectangles as timm's `RandomErasing` does, from the same random numbers (arXiv:1708.04896).

    A rectangle has from 1/50 to 1/3 of the image's area, divided by the number of rectangles, and an aspect
    ratio from 0.3 to 1/0.3.

    Args:
        prob: probability that an image is erased.
        count: most rectangles per image.
    """

    AREA = (0.02, 1 / 3)
    LOG_ASPECT = (math.log(0.3), -math.log(0.3))
    ATTEMPTS = 10  # per rectangle; the ones that do not fit into the image are drawn again

    def __init__(self, prob: float, count: int = 1) -> None:
        self.prob, self.count = prob, count

    def draw(self, rng: random.Random, height: int, width: int) -> list[Erasure]:
        """Rectangles of one image; `rng` is a generator, or the module `random` for the global one."""
        if not self.prob or rng.random() > self.prob:
            return []
        count = 1 if self.count == 1 else rng.randint(1, self.count)
        corners = [
            corner for _ in range(count) if (corner := self._place(rng, height, width, count))
        ]
        return [Erasure(*corner, seed=rng.getrandbits(62)) for corner in corners]

    def _place(
        self, rng: random.Random, height: int, width: int, count: int
    ) -> tuple[int, int, int, int] | None:
        for _ in range(self.ATTEMPTS):
            area = rng.uniform(*self.AREA) * height * width / count
            aspect = math.exp(rng.uniform(*self.LOG_ASPECT))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        return None


class Finish:
    """uint8 images (B, C, H, W) on any device -> normalised float32 images, erased where drawn.

    Args:
        mean: per channel, of values in [0, 1]; so is std.
        erase_mode: what fills a rectangle: "pixel" noise of each pixel, "rand" one noisy colour, "const" the
            mean colour.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], erase_mode: str = "pixel"
    ) -> None:
        if erase_mode not in ERASE_MODES:
            raise ValueError(f"AUG.REMODE='{erase_mode}' must be one of {list(ERASE_MODES)}")
        self.erase_mode = erase_mode
        # In units of the stored values, and in float64 until they are rounded once.
        self._mean = torch.tensor(mean, dtype=torch.float64).mul(255).float().view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float64).mul(255).float().view(-1, 1, 1)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._memory = Recycled()

    def __call__(self, images: Tensor, erasures: Tensor | None = None) -> Tensor:
        """
        Args:
            images: uint8, in any memory layout.
            erasures: int64 on the CPU, with rows of `Erasure` behind the number of their image; None: none.

        Returns:
            (B, C, H, W) float32, contiguous.
        """
        if images.device != self._mean.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        if images.is_cpu:
            # Image by image, so that each stays in the cache for all three passes.
            finished = self._memory.empty(images.shape)
            pieces = zip(finished, images, strict=True)
        else:
            finished = torch.empty(images.shape, dtype=torch.float32, device=images.device)
            pieces = [(finished, images)]
        for target, source in pieces:
            target.copy_(source).sub_(self._mean).div_(self._std)
        for image, *erasure in [] if erasures is None else erasures.tolist():
            self._erase(finished[image], Erasure(*erasure))
        return finished

    def _erase(self, image: Tensor, where: Erasure) -> None:
        part = image[:, where.top : where.top + where.height, where.left : where.left + where.width]
        if self.erase_mode == "const":
            part.zero_()
            return
        generator = self._generators.get(image.device)
        if generator is None:
            generator = self._generators[image.device] = torch.Generator(image.device)
        generator.manual_seed(where.seed)
        shape = part.shape if self.erase_mode == "pixel" else (len(part), 1, 1)
        part.copy_(torch.randn(shape, generator=generator, device=image.device))


class Recycled:
    """float32 memory on the CPU, taken again when nobody holds a tensor in it, or a view of one.

    Fresh memory of this size comes from the system with every batch, and page faults would take three
    quarters of the time. Aligned as PyTorch's own, since the order of sums in a kernel, and so the bits of a
    run, may follow the address.
    """

    STEP = 64 // 4  # values per cache line

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []

    def empty(self, shape: torch.Size) -> Tensor:
        """A tensor whose values are whatever was there."""
        size = shape.numel() + self.STEP
        free = [i for i in range(len(self._buffers)) if _references(self._buffers, i) == _UNUSED]
        number = next((i for i in free if len(self._buffers[i]) == size), None)
        if number is None:
            # A smaller last batch, or one that is kept: what is free now would stay so.
            self._buffers = [part for i, part in enumerate(self._buffers) if i not in free]
            self._buffers.append(np.empty(size, np.float32))
            number = len(self._buffers) - 1
        memory = self._buffers[number]
        start = -(memory.ctypes.data // 4) % self.STEP
        # The tensor's storage holds this slice, and the slice its base.
        return torch.from_numpy(memory[start : start + shape.numel()]).view(shape)

    def __getstate__(self) -> dict[str, Any]:
        return dict(_buffers=[])  # a worker's copy, or a saved one, starts without memory


def _references(buffers: list[np.ndarray], number: int) -> int:
    return sys.getrefcount(buffers[number])


_UNUSED = _references([np.empty(1)], 0)
