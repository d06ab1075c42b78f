"""Sizes of images: what they may be, and what is refused instead of cut short."""

import pytest

from models.layers.tokens import to_pair


@pytest.mark.parametrize(
    ("size", "pair"), [(224, (224, 224)), ([64, 96], (64, 96)), ((64, 96), (64, 96))]
)
def test_a_size_is_one_side_or_height_and_width(size, pair):
    assert to_pair(size) == pair


@pytest.mark.parametrize(
    "size", [(3, 224, 224), [224], (), 224.0, [224.0, 224], "224", "22", ("2", "2"), True, None]
)
def test_anything_else_is_refused_by_name(size):
    with pytest.raises(
        ValueError, match=r"img_size=.* must be one side in pixels or \[height, width"
    ):
        to_pair(size)
    with pytest.raises(ValueError, match=r"^DATA.IMG_SIZE="):
        to_pair(size, "DATA.IMG_SIZE")
