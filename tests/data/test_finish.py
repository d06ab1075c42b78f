"""What is done to a batch on its device: normalisation and random erasing."""

import random

import pytest
import torch
from timm.data.random_erasing import RandomErasing as TimmErasing
from torchvision import transforms

from data.finish import Erasure, Finish, RandomErasing, Recycled

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batch(size=4, channels=3, height=20, width=30):
    generator = torch.Generator().manual_seed(0)
    shape = (size, channels, height, width)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def rows(*erasures):
    return torch.tensor(erasures, dtype=torch.int64)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_bytes_equals_normalising_floats(channels):
    """ToTensor and Normalize in the worker, as all six lines do it, within float32's rounding."""
    mean, std = MEAN[:channels], STD[:channels]
    every = torch.arange(256, dtype=torch.uint8).expand(2, channels, 16, 256)
    expected = transforms.Normalize(mean, std)(every / 255)
    out = Finish(mean, std)(every)
    assert (out.dtype, out.is_contiguous()) == (torch.float32, True)
    assert (out - expected).abs().max() < 5e-7
    exact = (every.double() / 255 - torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)) / (
        torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
    )
    assert (out - exact).abs().max() < 5e-7


def test_the_memory_layout_of_the_batch_does_not_matter():
    finish, images = Finish(MEAN, STD), batch()
    assert finish(images.contiguous(memory_format=torch.channels_last)).equal(finish(images))


@pytest.mark.parametrize("prob", [0.3, 1.0])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (24, 60)])
def test_rectangles_are_those_of_timm(prob, count, size):
    literal = TimmErasing(prob, mode="const", max_count=count, device="cpu")
    erasing, finish = RandomErasing(prob, count), Finish([0.0], [1.0], "const")
    erased = 0
    for seed in range(60):
        random.seed(seed)
        expected = literal(torch.ones(1, *size))
        random.seed(seed)
        drawn = erasing.draw(random, *size)
        out = finish(
            torch.full((1, 1, *size), 255, dtype=torch.uint8),
            rows(*((0, *e) for e in drawn)).reshape(-1, 6),
        )
        assert out[0].equal(expected)
        erased += bool(drawn)
    assert erased == 60 if prob == 1.0 else 5 < erased < 35


def test_nothing_is_drawn_when_erasing_is_off():
    state = random.getstate()
    assert RandomErasing(0.0).draw(random, 8, 8) == []
    assert random.getstate() == state


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_rectangles_are_filled_as_asked_and_the_rest_is_kept(mode):
    plain, finish = Finish(MEAN, STD)(batch()), Finish(MEAN, STD, mode)
    where = Erasure(top=2, left=5, height=10, width=20, seed=7)
    out = finish(batch(), rows((1, *where), (3, *where._replace(seed=8))))
    inside = torch.zeros_like(plain, dtype=torch.bool)
    inside[[1, 3], :, 2:12, 5:25] = True
    assert out[~inside].equal(plain[~inside])
    filled = out[[1, 3], :, 2:12, 5:25]
    if mode == "const":
        assert not filled.any()
    else:
        assert not filled[0].equal(filled[1])
    if mode == "rand":
        assert filled.equal(filled[:, :, :1, :1].expand_as(filled))
        assert len(filled.unique()) == 6
    if mode == "pixel":
        assert abs(filled.mean()) < 0.15
        assert abs(filled.std() - 1) < 0.15


def test_noise_depends_on_its_seed_and_not_on_the_batch_or_the_global_generator():
    where = (2, 5, 10, 20, 7)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = Finish(MEAN, STD)(batch(), rows((1, *where)))
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(5)
    second = Finish(MEAN, STD)(batch(2), rows((0, 0, 0, 3, 3, 99), (1, *where)))
    assert first[1, :, 2:12, 5:25].equal(second[1, :, 2:12, 5:25])


def test_an_unknown_way_to_erase_names_its_key():
    with pytest.raises(ValueError, match=r"AUG.REMODE='noise' must be one of"):
        Finish(MEAN, STD, "noise")


def test_memory_is_taken_again_only_when_nothing_looks_at_it():
    """A tensor, a view of it, and what autograd keeps of it all hold its memory."""
    memory, shape = Recycled(), torch.Size([5, 3, 7])
    first = memory.empty(shape)
    address = first.data_ptr()
    assert address % 64 == 0
    assert memory.empty(shape).data_ptr() != address
    view = first[2:, 1]
    del first
    assert memory.empty(shape).data_ptr() != address
    weight = torch.ones((), requires_grad=True)
    product = view * weight
    del view
    assert memory.empty(shape).data_ptr() != address
    del product
    again = [memory.empty(shape) for _ in range(3)]
    assert address in {tensor.data_ptr() for tensor in again}
    assert memory.empty(torch.Size([2, 3, 7])).shape == (2, 3, 7)


def test_batches_that_are_kept_are_not_written_over():
    finish = Finish(MEAN, STD)
    kept = [finish(batch() // (i + 1)) for i in range(4)]
    for i, images in enumerate(kept):
        assert images.equal(Finish(MEAN, STD)(batch() // (i + 1)))
