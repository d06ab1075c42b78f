import numpy as np
import pytest
import torch
from PIL import Image

from utils.pictures import (
    draw_labels,
    draw_objects,
    legend,
    palette,
    save_picture,
    side_by_side,
    to_picture,
)

GREY = torch.full((3, 60, 80), 100, dtype=torch.uint8)


def colour_at(picture, y, x):
    return tuple(picture[:, y, x].tolist())


def test_colours_are_far_apart_and_stay_when_classes_are_added():
    colours = np.array(palette(150))
    gaps = np.linalg.norm((colours[:, None] - colours[None]).astype(float), axis=-1)
    assert gaps[np.triu_indices(150, 1)].min() >= 20
    first = gaps[:20, :20][np.triu_indices(20, 1)]
    assert first.min() >= 40
    assert palette(20) == palette(150)[:20]
    assert palette(0) == ()


def test_colours_begin_again_after_512():
    colours = palette(1203)  # LVIS has so many classes
    assert len(set(colours[:512])) == 512
    assert colours[512:1024] == colours[:512]
    picture = draw_objects(GREY, torch.tensor([[20.0, 30.0, 50.0, 55.0]]), [1202])
    assert colour_at(picture, 54, 35) == palette(179)[178]


def test_an_outline_encloses_just_the_pixels_of_its_box():
    picture = draw_objects(GREY, torch.tensor([[20.0, 30.0, 50.0, 55.0]]), [2])
    colour = palette(3)[2]
    for y, x in ((30, 45), (54, 20), (54, 49), (40, 20), (40, 49), (54, 35)):
        assert colour_at(picture, y, x) == colour, (y, x)
    for y, x in ((40, 21), (40, 48), (53, 35), (55, 35), (40, 19), (40, 50), (45, 30)):
        assert colour_at(picture, y, x) == (100, 100, 100), (y, x)
    assert (GREY == 100).all(), "the picture that came in stays as it is"


def test_the_label_stands_above_its_box_or_inside_where_the_picture_ends():
    low = draw_objects(GREY, torch.tensor([[20.0, 30.0, 50.0, 55.0]]), [1], classes=["a", "box"])
    assert (low[:, 18:30, 20:40] != 100).any()
    assert (low[:, 32:53, 22:48] == 100).all()
    high = draw_objects(GREY, torch.tensor([[20.0, 2.0, 50.0, 55.0]]), [1], classes=["a", "box"])
    assert (high[:, 4:12, 22:40] != 100).any()
    scored = draw_objects(GREY, torch.tensor([[70.0, 30.0, 80.0, 55.0]]), [1], scores=[0.5])
    assert (scored[:, 18:30, 50:70] != 100).any(), "at the right edge it moves to the left"


def test_a_score_changes_the_text():
    box = torch.tensor([[20.0, 30.0, 50.0, 55.0]])
    half, most = (draw_objects(GREY, box, [0], scores=torch.tensor([s])) for s in (0.5, 0.88))
    assert not torch.equal(half, most)
    assert torch.equal(half[:, 30:], most[:, 30:])


def test_a_mask_is_coloured_and_the_first_object_lies_above_the_others():
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 40:50, 40:50] = True
    masks[1, 40:50, 30:45] = True
    boxes = torch.tensor([[40.0, 40.0, 50.0, 50.0], [30.0, 40.0, 45.0, 50.0]])
    picture = draw_objects(GREY, boxes, [0, 1], masks=masks, alpha=0.5)
    first, second = (tuple(round((100 + v) / 2) for v in colour) for colour in palette(2))
    assert colour_at(picture, 45, 47) == pytest.approx(first, abs=1)
    assert colour_at(picture, 46, 42) == pytest.approx(first, abs=1), "where both are"
    assert colour_at(picture, 46, 33) == pytest.approx(second, abs=1)
    assert colour_at(picture, 55, 55) == (100, 100, 100)


def test_boxes_at_and_beyond_the_edges_and_without_area_are_drawn_at_the_edge():
    boxes = torch.tensor(
        [[0.0, 0.0, 80.0, 60.0], [-5.0, 20.0, 90.0, 40.0], [80.0, 60.0, 80.0, 60.0]]
    )
    picture = draw_objects(GREY, boxes, [0, 1, 2])
    zero, one, two = palette(3)
    assert colour_at(picture, 59, 40) == zero
    assert colour_at(picture, 39, 40) == one
    assert colour_at(picture, 59, 79) in (zero, two)
    assert torch.equal(draw_objects(GREY, torch.zeros(0, 4), []), GREY)


def test_a_label_map_colours_every_pixel_but_ignored_ones():
    labels = torch.full((60, 80), 255)
    labels[:20] = 0
    labels[20:40] = 7
    picture = draw_labels(GREY, labels.byte(), alpha=0.25)
    for row, label in ((10, 0), (30, 7)):
        expected = [0.75 * 100 + 0.25 * v for v in palette(8)[label]]
        assert colour_at(picture, row, 5) == pytest.approx(expected, abs=0.51)
    assert torch.equal(picture[:, 40:], GREY[:, 40:])
    assert torch.equal(draw_labels(GREY, torch.full((60, 80), 255)), GREY)


def test_a_legend_holds_the_colours_of_its_classes():
    strip = legend([2, 0, 2], ["sky", "no", "tree"], height=60)
    found = {colour_at(strip, y, x) for y in range(60) for x in range(strip.shape[2])}
    first, second, third = palette(3)
    assert {first, third} <= found
    assert second not in found
    assert legend(range(40), ["class"] * 40, height=60).shape[1] > 60


def test_pictures_stand_side_by_side_on_white():
    joined = side_by_side(GREY, GREY[:, :30, :10], gap=4)
    assert joined.shape == (3, 60, 94)
    assert torch.equal(joined[:, :, :80], GREY)
    assert (joined[:, :, 80:84] == 255).all()
    assert (joined[:, :30, 84:] == 100).all()
    assert (joined[:, 30:, 84:] == 255).all()
    assert side_by_side(GREY, GREY, gap=0).shape == (3, 60, 160)


def test_a_normalised_image_becomes_the_picture_it_was():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    pixels = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    shape = (3, 1, 1)
    image = (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    padded = torch.zeros(3, 32, 64)
    padded[:, :30, :40] = image
    assert torch.equal(to_picture(padded, mean, std, (30, 40)), pixels)
    flat = torch.full((1, 30, 40), 0.25)
    larger = to_picture(flat, [0.5], [0.5], original_size=(61, 80))
    assert larger.shape == (3, 61, 80)
    assert (larger == round(255 * 0.625)).all()


def test_what_is_saved_is_what_is_read(tmp_path):
    picture = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    save_picture(picture, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), picture)
