"""One image through a trained classifier: the class that evaluation gives it, its name, and its maps."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import main as program
from config import load_config
from models import CONFIG_DIR, Backbone, create_model
from modes.build import load_weights
from tests.small_models import SMALL
from tools import predict
from utils.checkpoint_files import load_file
from utils.pictures import draw_values
from utils.sources import Source

SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")
EVIT = [
    *("MODEL.TYPE", "evit", "MODEL.EVIT.PATCH_SIZE", "8", "MODEL.EVIT.EMBED_DIM", "16"),
    *("MODEL.EVIT.DEPTH", "3", "MODEL.EVIT.NUM_HEADS", "2", "MODEL.EVIT.DROP_LOC", "[1]"),
    *("MODEL.EVIT.KEEP_RATE", "0.5", "TRAIN.MAX_STEPS", "2"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("evit")
    program.main(["--cfg", SMOKE, "--output", str(folder), "--opts", *EVIT])
    return str(folder / "smoke_cls" / "default" / "checkpoints" / "last.pth")


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Two digits as files, in grey and in colour."""
    paths = []
    for i, mode in enumerate(("L", "RGB")):
        digit = Image.fromarray((load_digits().images[i] * 15).astype("uint8"))
        paths.append(tmp_path / f"{mode}.png")
        digit.resize((40, 32)).convert(mode).save(paths[-1])
    return [str(path) for path in paths]


def test_the_classes_are_those_of_the_model_on_evaluation_s_pixels(checkpoint, images, capsys):
    found = predict.main(
        [*images, "--cfg", SMOKE, "--resume", checkpoint, "--top", "3", "--opts", *EVIT]
    )
    config = load_config(SMOKE, [*EVIT, "MODEL.RESUME", checkpoint])
    predictor = predict.Predictor(config)
    saved = torch.load(checkpoint, weights_only=True)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith(tuple(images))]
    for path, prediction, line in zip(images, found, lines, strict=True):
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(predictor.transform(image)))
        assert torch.equal(prediction.pixels, pixels.permute(2, 0, 1))
        mean, std = (torch.tensor(x) for x in (config.DATA.MEAN, config.DATA.STD))
        x = ((pixels / 255 - mean) / std).permute(2, 0, 1)[None]
        with torch.no_grad():
            probs, labels = predictor.model(x)[0].softmax(-1).topk(3)
        assert [name for name, _ in prediction.classes] == [saved["classes"][i] for i in labels]
        assert [chance for _, chance in prediction.classes] == pytest.approx(
            probs.tolist(), abs=1e-5
        )
        assert line.startswith(f"{path}: {100 * probs[0]:.1f} % {saved['classes'][labels[0]]}, ")


def test_a_picture_has_the_image_and_its_maps(checkpoint, images, tmp_path):
    folder = tmp_path / "looks"
    command = [*images, "--cfg", SMOKE, "--resume", checkpoint, "--draw", str(folder)]
    found = predict.main([*command, "--opts", *EVIT])
    for number, prediction in enumerate(found):
        kept = prediction.maps["kept_mask_0"]
        assert set(prediction.maps) == {"kept_mask_0"}
        assert kept.mean() == pytest.approx(0.5, abs=1 / kept.numel())
        side = prediction.pixels.shape[1]
        with Image.open(folder / f"{number}_{Path(images[number]).stem}.png") as picture:
            assert picture.size == (2 * side + 8, side)
        # A patch that was kept is brighter than the same patch would be had it been dropped.
        drawn = predict.draw(prediction)[:, :, side + 8 :].float()
        cell = side // kept.shape[0]
        patches = drawn.unfold(1, cell, cell).unfold(2, cell, cell).mean((0, 3, 4))
        before = (
            prediction.pixels.float().unfold(1, cell, cell).unfold(2, cell, cell).mean((0, 3, 4))
        )
        gain = patches - 0.4 * before
        assert gain[kept.bool()].min() > gain[~kept.bool()].max()


@pytest.mark.parametrize("family", SMALL)
def test_every_family_s_maps_can_be_drawn(family):
    name, overrides = SMALL[family]
    model = create_model(name, num_classes=10, **overrides).eval()
    size = 2 * overrides["img_size"]
    with torch.inference_mode():
        model(torch.randn(1, 3, size, size))
    maps = predict.map_positions(model.token_maps())
    expected = (
        0 if family in ("dfformer", "cdfformer", "gfformer", "afno", "swin_mlp", "dpvt") else 1
    )
    assert len(maps) >= expected
    pixels = torch.zeros(3, size, size, dtype=torch.uint8)
    drawn = predict.draw(predict.Prediction(Path("x"), [], pixels, maps))
    assert drawn.shape == (3, size, size + len(maps) * (size + 8))
    assert drawn.dtype == torch.uint8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cam", __file__], "--cam is drawn: give --draw FOLDER"),
        (
            ["--class", "3", "--draw", "looks", __file__],
            "'3' is the class of --cam: give --cam too",
        ),
        (["tools"], r"tools is a folder: give its files, as in tools/\*"),
        (["nothing.png"], r"there are no files \['nothing.png'\]"),
        ([__file__], "test_predict.py cannot be read as an image"),
        (["--top", "0", __file__], "--top 0 must be at least 1"),
    ],
)
def test_what_cannot_be_predicted_is_said(arguments, message, checkpoint, capsys):
    with pytest.raises(SystemExit, match="2"):
        predict.main([*arguments, "--cfg", SMOKE, "--resume", checkpoint, "--opts", *EVIT])
    assert re.search(message, capsys.readouterr().err)


def test_fresh_weights_do_not_guess(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        predict.main([*images, "--cfg", SMOKE])
    assert capsys.readouterr().err.endswith("give --resume CHECKPOINT\n")
    last = Path("output", "smoke_cls", "default", "checkpoints", "last.pth")
    last.parent.mkdir(parents=True)
    last.touch()
    with pytest.raises(SystemExit, match="2"):
        predict.main([*images, "--cfg", SMOKE])
    assert f"give --resume CHECKPOINT, such as this run's own {last}" in capsys.readouterr().err


def test_a_thousand_classes_without_names_are_imagenet_s():
    predictor = object.__new__(predict.Predictor)
    predictor.names = []
    assert predictor.name(281, 1000).startswith("tabby")
    assert predictor.name(3, 7) == "class 3"


def test_a_class_is_found_by_its_name_a_synonym_or_its_number():
    predictor = object.__new__(predict.Predictor)
    predictor.names = []
    for name in ("tabby", "Tabby, tabby cat", "281"):
        assert predictor.label(name, 1000) == 281
    with pytest.raises(ValueError, match=r"'crane' is a name of classes \[134, 517\]"):
        predictor.label("crane", 1000)
    with pytest.raises(ValueError, match=r"from 0 to 999; did you mean one of \['goldfish'"):
        predictor.label("goldfisch", 1000)
    predictor.names = ["7", "3", "1"]  # a name comes before a number
    assert [predictor.label(name, 3) for name in ("3", "1", "0")] == [1, 2, 0]
    with pytest.raises(
        ValueError, match="'5' must be the name of a class, or a number from 0 to 2"
    ):
        predictor.label("5", 3)


def test_the_file_is_opened_once_and_gives_evaluation_s_weights(tmp_path, monkeypatch):
    averaging = ["TRAIN.EMA.ENABLE", "True", "TRAIN.EMA.DECAY", "0.5", "TRAIN.MAX_STEPS", "2"]
    program.main(["--cfg", SMOKE, "--output", str(tmp_path), "--opts", *averaging])
    path = str(tmp_path / "smoke_cls" / "default" / "checkpoints" / "last.pth")
    opened = []
    monkeypatch.setattr("models.pretrained.load_file", None)
    monkeypatch.setattr(
        "modes.build.load_file", lambda *a, **k: opened.append(a) or load_file(*a, **k)
    )
    for choice in ("True", "False"):
        options = [*averaging, "TRAIN.EMA.EVALUATE", choice]
        config = load_config(SMOKE, [*options, "MODEL.RESUME", path])
        predictor = predict.Predictor(config)
        with monkeypatch.context() as patch:
            patch.setattr("modes.build.load_file", load_file)
            like = create_model(SMOKE, num_classes=10)
            load_weights(config, like, Source("weights", path, ""))
        for name, tensor in like.state_dict().items():
            assert torch.equal(predictor.model.state_dict()[name], tensor), name
    assert len(opened) == 2


def small(family: str, **overrides) -> Backbone:
    """In eval mode, with two classes and a linear classifier."""
    name, options = SMALL[family]
    if "head_dim" in options:
        options = options | dict(head="linear")
    return create_model(name, num_classes=2, **(options | overrides)).eval()


def with_signal(size: int, quadrant: int | None) -> torch.Tensor:
    """(1, 3, size, size): grey, with a coloured square inside one of the quadrants, row by row."""
    image = torch.zeros(1, 3, size, size)
    if quadrant is not None:
        half, edge = size // 2, size // 8
        rows, columns = (slice(half * i + edge, half * (i + 1) - edge) for i in divmod(quadrant, 2))
        image[:, :, rows, columns] += torch.tensor([3.0, -3.0, 3.0])[:, None, None]
    return image


@torch.no_grad()
def look_for_the_signal(model: Backbone, size: int) -> None:
    """Class 1 is what the signal adds to the features, so that all evidence for it is where the signal is."""

    def features(*quadrants: int | None) -> torch.Tensor:
        images = torch.cat([with_signal(size, quadrant) for quadrant in quadrants])
        return model.forward_head(model.forward_features(images), pre_logits=True).mean(0)

    change = features(0, 1, 2, 3) - features(None)
    linear = next(m for m in model.head.modules() if isinstance(m, torch.nn.Linear))
    linear.weight.zero_()[1] = change / change.norm()


@pytest.mark.parametrize("family", SMALL)
def test_every_family_s_grad_cam_is_brightest_where_the_evidence_is(family):
    drops = family.startswith("evit")
    # So many that fresh weights, which know nothing of the signal, keep some of it.
    model = small(family, **(dict(keep_rate=0.9) if drops else {}))
    if hasattr(model, "mixers"):
        with torch.no_grad():  # Fourier filters look everywhere at once: without them all is local
            for parameter in (p for mixer in model.mixers() for p in mixer.parameters()):
                parameter.zero_()
    stride = model.feature_info[-1]["stride"]
    size = 12 * stride if drops else 8 * stride
    look_for_the_signal(model, size)
    for quadrant in range(4):
        cam = predict.grad_cam(model, with_signal(size, quadrant), 1)
        height, width = cam.shape
        assert cam.shape == (size // stride, size // stride)
        assert (cam >= 0).all()
        row, column = divmod(int(cam.argmax()), width)
        assert (2 * row // height, 2 * column // width) == divmod(quadrant, 2)
        assert cam.max() > 0
    pixels = torch.zeros(1, size, size, dtype=torch.uint8)
    drawn = predict.draw(predict.Prediction(Path("x"), [], pixels, {"Grad-CAM": cam}))
    assert drawn.shape == (3, size, 2 * size + 8)
    row, column = divmod(int(drawn[:, :, size + 8 :].int().sum(0).argmax()), size)
    assert (2 * row // size, 2 * column // size) == divmod(quadrant, 2)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["swin", "dfvt", "dilateformer", "dpvt", "swin_mlp"])
def test_where_the_mean_is_classified_grad_cam_is_the_class_s_row_times_the_features(family):
    model = small(family)
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        features = model.forward_features(images)
        expected = (model.head.weight @ features.flatten(0, -2).T).relu() / 15
        # Of one of the two classes at least there is something to see.
        label = int(expected[1].sum() > expected[0].sum())
    cam = predict.grad_cam(model, images, label)
    assert cam.shape == (3, 5)
    assert torch.allclose(cam.flatten(), expected[label], rtol=1e-4, atol=1e-7)
    assert cam.max() > 0


@pytest.mark.parametrize(
    ("family", "layer"), [("deit", "blocks.1"), ("dhvt", "blocks.1"), ("pvt", "block4.0")]
)
def test_where_a_class_token_is_classified_weights_are_the_slopes_of_the_last_block_s_map(
    family, layer
):
    """Eq. 1 by differences: a channel that grows everywhere changes the logit by the sum of its gradients."""
    model = small(family).double()
    stride = model.feature_info[-1]["stride"]
    size = (3, 5)
    images = torch.randn(1, 3, size[0] * stride, size[1] * stride, dtype=torch.float64)
    block = model.get_submodule(layer)
    given = []
    hook = block.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    with torch.no_grad():
        before = model(images)[0, 1]
    hook.remove()
    values = given[0].reshape(-1, given[0].shape[-1])[-15:]  # without the class token: (h * w, C)

    def logit_with(change):
        def changed(_, args):
            tokens = args[0].clone()
            tokens.view(-1, tokens.shape[-1])[-15:] += change
            return tokens, *args[1:]

        hook = block.register_forward_pre_hook(changed)
        with torch.no_grad():
            logit = model(images)[0, 1]
        hook.remove()
        return logit

    changes = 1e-6 * torch.eye(values.shape[1], dtype=torch.float64)
    slopes = torch.stack([(logit_with(change) - before) / 1e-6 / 15 for change in changes])
    expected = (values @ slopes).relu().unflatten(0, size)
    cam = predict.grad_cam(model, images, 1)
    assert torch.allclose(cam.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    assert cam.max() > 0


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    ("drop_loc", "before", "last"), [([1, 2], 1, None), ([1, 3], 0, 1), ([3], None, 0)]
)
def test_patches_that_were_dropped_before_the_last_block_have_nothing(drop_loc, before, last, fuse):
    """`before` and `last`: which of the kept masks are of the blocks before the last one, and of that."""
    model = small("evit", drop_loc=drop_loc, fuse_token=fuse)
    cam = predict.grad_cam(model, torch.randn(1, 3, 96, 64), 0)
    assert cam.shape == (6, 4)
    maps = model.token_maps()
    there = torch.ones(6, 4).bool() if before is None else maps[f"kept_mask_{before}"][0]
    assert not cam[~there].any()
    # The last block attends to the patches that it drops.
    seen = there if last is None else there & ~maps[f"kept_mask_{last}"][0]
    assert cam[seen].any()


def test_a_model_whose_features_are_no_map_is_refused():
    model = small("swin")
    model.feature_info[-1]["stride"] = 16
    with pytest.raises(ValueError, match=r"needs a map of 8x8 positions.*gives \(4, 4, 128\)"):
        predict.grad_cam(model, torch.randn(1, 3, 128, 128), 0)


def test_grad_cam_of_a_class_is_drawn_first(checkpoint, images, tmp_path, capsys):
    folder = tmp_path / "looks"
    command = ["--cfg", SMOKE, "--resume", checkpoint, "--draw", str(folder), "--cam"]
    (found,) = predict.main([images[0], *command, "--opts", *EVIT])
    predicted = found.classes[0][0]
    assert list(found.maps) == [f"Grad-CAM of {predicted}", "kept_mask_0"]
    (found,) = predict.main([images[0], *command, "--class", "4", "--opts", *EVIT])
    assert list(found.maps) == ["Grad-CAM of class_4", "kept_mask_0"]
    assert "0_L.png: image, Grad-CAM of class_4, kept_mask_0" in capsys.readouterr().out
    with Image.open(folder / "0_L.png") as picture:
        assert picture.size == (3 * 32 + 2 * 8, 32)
    with pytest.raises(SystemExit, match="2"):
        predict.main([images[0], *command, "--class", "cat", "--opts", *EVIT])
    assert "--class 'cat' must be the name of a class" in capsys.readouterr().err


def test_a_map_of_numbers_is_stretched_over_the_picture_from_dark_to_bright():
    grey = torch.full((3, 20, 30), 100, dtype=torch.uint8)
    drawn = draw_values(grey, torch.tensor([[0.0, 1.0, 3.0], [1.0, 1.0, 2.0]])).float()
    brightness = drawn.sum(0)
    assert brightness[:10, :10].unique().numel() == 1
    order = [brightness[5, 5], brightness[15, 5], brightness[15, 25], brightness[5, 25]]
    assert order == sorted(order)
    assert len(set(order)) == 4
    assert drawn[:, 5, 5].tolist() == pytest.approx([40, 40, 42], abs=1), (
        "inferno begins with black"
    )
    flat = draw_values(grey, torch.zeros(2, 3))
    assert flat.flatten(1).unique(dim=1).shape == (3, 1), "neither dark nor bright"
    assert (grey == 100).all()


def test_one_damaged_image_does_not_hide_the_others(images, checkpoint, tmp_path, capsys):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    words = [images[0], str(damaged), images[0], "--cfg", SMOKE, "--resume", checkpoint]
    with pytest.raises(SystemExit, match="1"):
        predict.main([*words, "--opts", *EVIT])
    out, err = capsys.readouterr()
    assert out.count(f"{images[0]}: ") == 2
    assert "damaged.png cannot be read as an image" in err
