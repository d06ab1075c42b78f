"""Our variants through timm.create_model; what timm has under its own name stays timm's."""

import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import DropPath
from torch import nn

import models
from config import load_config
from data.build import build_transform
from models import CONFIG_DIR, create_model, list_models, registry, variant_file
from models.timm_registry import register_in_timm
from tests.golden_tools import SkipInit


def test_every_variant_is_registered_under_its_own_name_or_beside_timms():
    for name in list_models():
        assert timm.is_model(f"mixlab_{name}")
        assert timm.is_model(name)
    ours = set(timm.list_models(module="timm_registry"))
    assert {"dilateformer_tiny", "mixlab_deit_tiny_patch16_224"} <= ours
    assert "deit_tiny_patch16_224" not in ours


def test_names_that_timm_has_build_timms_models():
    timms = timm.create_model("deit_tiny_patch16_224")
    own = timm.create_model("mixlab_deit_tiny_patch16_224")
    assert type(timms).__module__.startswith("timm.")
    assert type(own) is registry.find("deit").cls


def test_keywords_reach_the_constructor():
    model = timm.create_model(
        "dilateformer_tiny",
        num_classes=10,
        drop_rate=0.2,
        drop_path_rate=0.3,
        in_chans=1,
        img_size=96,
        global_pool=None,  # what timm's programs pass for a flag that was not given
    )
    expected = create_model(
        "dilateformer_tiny", num_classes=10, drop_rate=0.2, drop_path_rate=0.3, in_chans=1
    )
    assert str(model) == str(expected)
    assert "drop_prob=0.300" in str(model)
    assert model(torch.randn(1, 1, 96, 96)).shape == (1, 10)


@pytest.mark.parametrize("name", list_models())
def test_every_variant_honours_the_shared_keywords(name):
    with torch.device("meta"), SkipInit():
        model = timm.create_model(
            f"mixlab_{name}",
            num_classes=7,
            in_chans=1,
            img_size=96,
            drop_rate=0.2,
            drop_path_rate=0.3,
        )
    modules = list(model.modules())
    first = next(p for p in model.parameters() if p.ndim == 4)
    assert first.shape[1] == 1
    assert model.get_classifier() is not None
    assert model.num_classes == 7
    rates = [module.drop_prob for module in modules if isinstance(module, DropPath)]
    assert max(rates) == pytest.approx(0.3)
    assert any(isinstance(module, nn.Dropout) and module.p == 0.2 for module in modules)
    assert model.pretrained_cfg["input_size"] == (1, 96, 96)


@pytest.mark.parametrize(
    ("name", "table", "shape"),
    [
        ("deit_tiny_patch16_224", "pos_embed", (1, 37, 192)),
        ("pvt_tiny_256", "pos_embed1", (1, 576, 64)),
        ("dfformer_s18", "stages.0.0.token_mixer.complex_weights", (24, 13, 4, 2)),
    ],
)
def test_tables_have_the_size_of_the_images(name, table, shape):
    with torch.device("meta"), SkipInit():
        model = timm.create_model(f"mixlab_{name}", img_size=96)
    assert tuple(model.state_dict()[table].shape) == shape


def test_timms_programs_read_size_mean_and_classes():
    model = timm.create_model("pvt_tiny_256", num_classes=7)
    data = resolve_model_data_config(model)
    assert data["input_size"] == (3, 256, 256)
    assert data["mean"] == (0.485, 0.456, 0.406)
    assert model.pretrained_cfg["num_classes"] == 7
    small = timm.create_model("dfvt_tiny", img_size=64, num_classes=2)
    assert resolve_model_data_config(small)["input_size"] == (3, 64, 64)


@pytest.mark.parametrize(
    "name",
    [
        "dfvt_tiny",
        "dfformer_s18",
        "gfformer_s18",
        "swin_base_patch4_window12_384_finetune",
        "dhvt_tiny_cifar_patch4",
    ],
)
def test_timm_cuts_the_same_pixels_as_an_evaluation_here(name):
    """The published evaluation of DFFormer cuts out the centre, that of Swin at 384 pixels squashes."""
    with torch.device("meta"), SkipInit():
        data = resolve_model_data_config(timm.create_model(f"mixlab_{name}"))
    x, y = np.meshgrid(np.linspace(0, 255, 500), np.linspace(0, 255, 375))
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    theirs = create_transform(**data, normalize=False)(image)
    ours = build_transform(load_config(variant_file(name)), training=False)(image)
    assert np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy().astype(int)).max() <= 1
    squashed = ours[0, 0, 0] < 10
    assert squashed == ("384" in name or "cifar" in name)


def test_weights_come_from_a_file_that_is_named(tmp_path):
    trained = create_model("dhvt_tiny_cifar_patch4", num_classes=3)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    model = timm.create_model(
        "dhvt_tiny_cifar_patch4", num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay
    )
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(pretrained=True), "MixLab hosts no weights.*pretrained_cfg_overlay"),
        (dict(pretrained_cfg="in1k"), "no pretrained configuration 'in1k'"),
        (dict(features_only=True), "call forward_pyramid"),
        (dict(embed_dmi=3), r"no argument \['embed_dmi'\]"),
    ],
)
def test_what_cannot_be_had_is_an_error(keywords, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("dfvt_tiny", **keywords)


def test_registering_builds_nothing_and_twice_changes_nothing():
    def refuse(*_):
        raise AssertionError("loaded or built before it was asked for")

    register_in_timm(["dfvt_tiny", "mixlab_probe"], refuse, refuse)
    assert timm.create_model("dfvt_tiny", num_classes=2).num_classes == 2
    with pytest.raises(AssertionError, match="before it was asked for"):
        timm.create_model("mixlab_probe")


@pytest.mark.parametrize("broken", [b"MODEL: [", b"\xff\xfe"])
@pytest.mark.parametrize("other", [b"- a list", b"5", b"MODEL: swin", b""])
def test_yaml_files_of_other_kinds_are_no_variants_and_do_not_stop_the_import(
    broken, other, tmp_path, monkeypatch, caplog
):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "broken.yaml").write_bytes(broken)
    (tmp_path / "new" / "other.yaml").write_bytes(other)
    (tmp_path / "new" / "good.yaml").write_text("MODEL: {NAME: good}")
    monkeypatch.setattr(models, "CONFIG_DIR", tmp_path)
    with caplog.at_level(logging.WARNING):
        assert set(models._variants.__wrapped__()) == {"good"}
    assert "broken.yaml" in caplog.text
    assert CONFIG_DIR.is_dir()


def test_of_two_variants_of_one_name_the_first_is_used_and_the_other_named(
    tmp_path, monkeypatch, caplog
):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.yaml").write_text("MODEL: {NAME: same}")
    (tmp_path / "b" / "gone.yaml").symlink_to(tmp_path / "nowhere.yaml")
    monkeypatch.setattr(models, "CONFIG_DIR", tmp_path)
    with caplog.at_level(logging.WARNING):
        assert models._variants.__wrapped__() == {"same": tmp_path / "a" / "same.yaml"}
    assert f"{tmp_path / 'b' / 'same.yaml'} is not used" in caplog.text
    assert "gone.yaml" in caplog.text
