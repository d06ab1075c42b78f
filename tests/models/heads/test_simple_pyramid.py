"""The pyramid of a plain ViT's one map."""

import pytest
import torch

from models.heads.simple_pyramid import SimplePyramid
from tests.golden_tools import without_useful_gradient


@pytest.mark.parametrize("hw", [(4, 6), (5, 7), (1, 1)])
@pytest.mark.parametrize(
    ("stride", "widths"), [(16, [6, 12, 24, 24]), (8, [12, 24, 24, 24]), (32, [3, 6, 12, 24])]
)
def test_maps_have_the_strides_asked_for(hw, stride, widths):
    pyramid = SimplePyramid(24, stride)
    maps = pyramid(torch.rand(2, 24, *hw))
    assert pyramid.features == [
        dict(channels=c, stride=s) for c, s in zip(widths, (4, 8, 16, 32), strict=True)
    ]
    for x, feature in zip(maps, pyramid.features, strict=True):
        size = [-(-side * stride // feature["stride"]) for side in hw]  # rounded up
        assert list(x.shape) == [2, feature["channels"], *size]


def test_every_parameter_gets_a_finite_gradient():
    pyramid = SimplePyramid(24, 16)
    sum(x.square().mean() for x in pyramid(torch.rand(2, 24, 4, 4))).backward()
    assert not without_useful_gradient(pyramid)


def test_the_map_of_the_same_stride_is_the_input():
    x = torch.rand(1, 8, 3, 3)
    assert torch.equal(SimplePyramid(8, 16, [16])(x)[0], x)


def test_a_finer_map_depends_on_its_own_position_alone():
    pyramid = SimplePyramid(8, 16, [4])
    x = torch.rand(1, 8, 3, 3)
    changed = x.clone()
    changed[..., 1, 2] += 1
    differs = (pyramid(x)[0] != pyramid(changed)[0]).any(dim=1)[0]
    assert differs[4:8, 8:12].all()
    assert differs.sum() == 16


def test_a_stride_that_is_no_power_of_two_apart_is_refused():
    with pytest.raises(ValueError, match="stride 14 cannot be brought to stride 4"):
        SimplePyramid(8, 14)
