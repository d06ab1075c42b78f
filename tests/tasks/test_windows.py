"""What a segmenter is shown of an image, against loops that show it the same."""

import cv2
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors

from data.dense.segmentation import eval_transform
from tasks import windows
from tasks.windows import Looks, View, most_probable


class Stride4(nn.Module):
    """Logits at a quarter of the size, as a head gives them; they depend on where in the image a pixel is."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 7, stride=4, padding=3)
        nn.init.normal_(self.conv.weight)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        return self.conv(x) * (1 + torch.arange(x.shape[-1] // 4) / 10)


@pytest.fixture
def model():
    return Stride4().eval()


def upsampled(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def literal_logits(model, image):
    """(C, h, w) -> (K, h, w): zeros to multiples of 32, the model, its logits at full size, the part."""
    height, width = image.shape[-2:]
    padded = torch.zeros(1, 3, -(-height // 32) * 32, -(-width // 32) * 32)
    padded[0, :, :height, :width] = image
    return upsampled(model(padded), padded.shape[-2:])[0, :, :height, :width]


def literal_windows(model, image, crop, stride):
    """mmsegmentation's slide_inference in its own words."""
    height, width = image.shape[-2:]
    total, counts = torch.zeros(5, height, width), torch.zeros(height, width)
    rows = max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride[0] + crop[0], height)
            right = min(column * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            logits = literal_logits(model, image[:, top:bottom, left:right])
            for y in range(top, bottom):
                for x in range(left, right):
                    total[:, y, x] += logits[:, y - top, x - left]
                    counts[y, x] += 1
    assert counts.min() > 0
    return total / counts


def labels_of(logits, size):
    return upsampled(logits[None], size)[0].argmax(0)


@pytest.mark.parametrize("size", [(64, 96), (50, 41), (130, 77)])
@torch.no_grad()
def test_the_padding_is_cut_off_before_logits_are_resized(model, size):
    image = torch.randn(3, 50, 70)
    labels = Looks().labels(model, image, size)
    assert model.sizes == [(64, 96)]
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, labels_of(literal_logits(model, image), size).byte())


@torch.no_grad()
def test_what_is_beside_the_image_never_counts(model):
    """The part without padding, from a batch that is padded further, gives the same."""
    image = torch.randn(3, 50, 70)
    batch = F.pad(image, (0, 58, 0, 46), value=9.0)
    expected = Looks().labels(model, image, (50, 70))
    assert torch.equal(Looks().labels(model, batch[:, :50, :70], (50, 70)), expected)


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
@torch.no_grad()
def test_a_window_as_large_as_the_image_is_the_whole_image(model, size):
    image = torch.randn(3, *size)
    sliding = Looks(mode="slide", crop=size, stride=(7, 5))
    larger = Looks(mode="slide", crop=(500, 500), stride=(100, 100))
    expected = Looks().labels(model, image, (80, 111))
    assert torch.equal(sliding.labels(model, image, (80, 111)), expected)
    assert torch.equal(larger.labels(model, image, (80, 111)), expected)
    assert len(model.sizes) == 3


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((64, 96), (32, 32), (20, 24)),
        ((64, 96), (32, 64), (32, 32)),  # side by side in one direction
        ((50, 41), (30, 20), (13, 20)),  # windows that need padding, and a ragged last one
        ((20, 90), (32, 32), (16, 16)),  # lower than a window
    ],
)
@torch.no_grad()
def test_overlapping_windows_are_a_loop_over_pixels(model, size, crop, stride):
    image = torch.randn(3, *size)
    expected = literal_windows(model, image, crop, stride)
    looks = Looks(mode="slide", crop=crop, stride=stride)
    torch.testing.assert_close(looks._slide(model, image), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(looks.labels(model, image, (60, 60)), labels_of(expected, (60, 60)).byte())


@pytest.mark.parametrize("mode", ["whole", "slide"])
@torch.no_grad()
def test_scales_and_mirrored_images_are_averaged_as_probabilities(model, mode):
    image, size = torch.randn(3, 50, 70), (75, 90)
    total = 0
    for scale, scaled_size in ((0.5, (25, 35)), (1.0, (50, 70)), (1.75, (88, 123))):
        scaled = image
        if scale != 1:
            pixels = image.permute(1, 2, 0).numpy()
            pixels = cv2.resize(pixels, scaled_size[::-1], interpolation=cv2.INTER_LINEAR)
            scaled = torch.from_numpy(pixels).permute(2, 0, 1)
        for mirrored in (False, True):
            shown = scaled.flip(-1) if mirrored else scaled
            logits = (
                literal_logits(model, shown)
                if mode == "whole"
                else literal_windows(model, shown, (40, 48), (32, 32))
            )
            logits = logits.flip(-1) if mirrored else logits
            total = total + upsampled(logits[None], size)[0].softmax(0)
    looks = Looks(mode=mode, crop=(40, 48), stride=(32, 32), scales=(0.5, 1.0, 1.75), flip=True)
    labels = looks.labels(model, image, size)
    best = total.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4  # sums of other orders may tie otherwise
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear], total.argmax(0).byte()[clear])


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.5])
def test_scales_resize_as_the_transform_of_evaluation(scale):
    """A scale of an image is what TEST.SEGMENTATION.RESIZE times the scale would have made of it."""
    pixels = torch.randint(256, (3, 52, 72), dtype=torch.uint8)
    resize = [round(72 * scale), round(52 * scale)]
    expected, _ = eval_transform(resize=resize)(tv_tensors.Image(pixels), {})
    scaled = windows._scaled(pixels.float(), scale)
    assert scaled.shape == expected.shape
    assert (scaled - expected).abs().max() < 1.01  # rounded to bytes there, by side


def test_the_sides_of_scales_are_rounded_with_halves_up():
    assert windows._scaled(torch.zeros(3, 41, 37), 0.5).shape == (3, 21, 19)


@torch.no_grad()
def test_looks_survive_a_model_that_writes_over_its_last_result():
    """As one in a CUDA graph does."""
    image, kept = torch.rand(3, 64, 96), []

    def logits(x):
        return torch.cat([x, x.flip(-1).square()], 1)[:, :, ::4, ::4]

    def overwriting(x):
        kept[:] = kept or [logits(x)]
        return kept[0].copy_(logits(x))

    looks = Looks(flip=True)
    expected = looks.labels(logits, image, (64, 96))
    assert torch.equal(looks.labels(overwriting, image, (64, 96)), expected)


@torch.no_grad()
def test_flipping_changes_nothing_for_a_symmetric_model():
    class Symmetric(nn.Module):
        def forward(self, x):
            return F.avg_pool2d(x, 4)

    image = torch.randn(3, 64, 96)
    plain = Looks().labels(Symmetric(), image, (64, 96))
    flipped = Looks(flip=True).labels(Symmetric(), image, (64, 96))
    assert torch.equal(plain, flipped)
    assert plain.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("flip", [False, True])
@torch.no_grad()
def test_labels_do_not_depend_on_how_many_classes_are_resized_at_a_time(monkeypatch, flip):
    """Memory: with 150 classes at 512 x 2048, chunks of classes take the place of one large tensor."""
    model, image = Stride4(classes=11), torch.randn(3, 64, 64)
    expected = Looks(flip=flip).labels(model, image, (50, 50))
    seen = []
    on_pixels = View.on_pixels

    def counting(view, size, classes=slice(None)):
        result = on_pixels(view, size, classes)
        seen.append(len(result))
        return result

    monkeypatch.setattr(View, "on_pixels", counting)
    monkeypatch.setattr(windows, "CHUNK", 4 * 64 * 64 + 5)
    assert torch.equal(Looks(flip=flip).labels(model, image, (50, 50)), expected)
    assert set(seen) == {4, 3}


def test_equal_logits_give_the_first_class_and_nan_none():
    logits = torch.zeros(3, 2, 2)
    logits[:, 0, 0] = torch.nan
    logits[2, 1, 1] = 1
    view = View(logits, (2, 2), (2, 2))
    assert most_probable([view], (2, 2)).tolist() == [[255, 0], [0, 2]]
    assert most_probable([view, view], (2, 2)).tolist() == [[255, 0], [0, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="tiles"), r"TEST.SEGMENTATION.MODE='tiles' must be one of"),
        (
            dict(mode="slide", crop=(64, 64), stride=(32, 65)),
            r"STRIDE=\[32, 65\] leaves gaps between windows of TEST.SEGMENTATION.CROP=\[64, 64\]",
        ),
        (dict(scales=()), r"TEST.SEGMENTATION.SCALES=\[\]"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Looks(**options)
