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
from models import CONFIG_DIR, create_model
from tests.small_models import SMALL
from tools import predict

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
        gain = patches - (1 - predict.ALPHA) * before
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
    assert "give --resume" in capsys.readouterr().err


def test_a_thousand_classes_without_names_are_imagenet_s():
    predictor = object.__new__(predict.Predictor)
    predictor.names = []
    assert predictor.name(281, 1000).startswith("tabby")
    assert predictor.name(3, 7) == "class 3"
