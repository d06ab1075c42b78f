"""The feature pyramid: sizes, strides, and the top-down sum."""

import pytest
import torch

from models.heads.fpn import FeaturePyramid
from tests.golden_tools import without_useful_gradient

SIZES = [(25, 34), (13, 17), (7, 9)]  # odd ones, halves rounded up


@pytest.fixture
def maps() -> list[torch.Tensor]:
    return [torch.rand(2, 8 * 2**i, *size) for i, size in enumerate(SIZES)]


@pytest.mark.parametrize(
    ("extra", "sizes", "strides"),
    [
        ("none", [], []),
        ("pool", [(4, 5)], [64]),
        ("convs", [(4, 5), (2, 3)], [64, 128]),
    ],
)
def test_levels_have_the_sizes_of_maps_and_then_their_halves(maps, extra, sizes, strides):
    pyramid = FeaturePyramid([8, 16, 32], 12, extra)
    levels = pyramid(maps)
    assert [tuple(x.shape) for x in levels] == [(2, 12, *size) for size in SIZES + sizes]
    assert pyramid.strides([8, 16, 32]) == [8, 16, 32, *strides]


@pytest.mark.parametrize("extra", ["none", "pool", "convs"])
def test_every_parameter_gets_a_finite_gradient(maps, extra):
    pyramid = FeaturePyramid([8, 16, 32], 12, extra)
    sum(x.square().mean() for x in pyramid(maps)).backward()
    # Biases before the last level's convolution alone could cancel; none does.
    assert not without_useful_gradient(pyramid)


def test_coarse_maps_reach_fine_levels_and_not_the_other_way(maps):
    pyramid = FeaturePyramid([8, 16, 32], 12)
    before = pyramid(maps)
    coarse = pyramid([maps[0], maps[1], maps[2] + 1])
    fine = pyramid([maps[0] + 1, maps[1], maps[2]])
    assert not torch.equal(before[0], coarse[0])
    assert not torch.equal(before[0], fine[0])
    assert torch.equal(before[2], fine[2])


def test_extra_convolutions_read_the_last_input_even_if_it_is_as_wide_as_the_output():
    pyramid = FeaturePyramid([8, 16], 16, "convs")
    maps = [torch.rand(1, 8, 8, 8), torch.rand(1, 16, 4, 4)]
    first, second = pyramid(maps)[2:]
    block = pyramid.extra_blocks
    torch.testing.assert_close(first, block.first(maps[1]))
    torch.testing.assert_close(second, block.second(first))  # no ReLU in between


def test_an_unknown_extra_is_refused():
    with pytest.raises(ValueError, match=r"extra='conv' .* \['none', 'pool', 'convs'\]"):
        FeaturePyramid([8], 8, "conv")


def test_gradients_of_maps_one_pixel_wide_are_those_of_float32():
    """PyTorch leaves memory as it was in bfloat16 gradients of such a convolution of stride 2."""
    torch.manual_seed(0)
    pyramid = FeaturePyramid([16], 16, extra="convs")
    images = torch.randn(1, 16, 2, 1)

    def gradients(half):
        pyramid.zero_grad()
        torch.full((600_000,), torch.nan)  # freed, for the next one who asks for memory
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            levels = pyramid([images])
        sum(level.float().sum() for level in levels[1:]).backward()
        return {name: p.grad.clone() for name, p in pyramid.named_parameters() if "extra" in name}

    expected = gradients(half=False)
    for _ in range(5):
        torch.testing.assert_close(gradients(half=True), expected)
