"""What Python code passes to create_model, torch.hub and timm meets the checks of the config's keys."""

import numpy as np
import pytest
import timm
import torch

import hubconf
from config import load_config
from models import build_model, create_model, registry, variant_file
from models.mixers.options import parse_spec
from models.mixers.registry import MixerContext, build_mixer
from tests.golden_tools import SkipInit


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(num_classes=-1), r"MODEL.NUM_CLASSES=-1 must be within \[0, inf\)"),
        (
            dict(num_classes="10"),
            r"NUM_CLASSES='10' in the keyword num_classes must be int or None",
        ),
        (dict(num_classes=True), r"NUM_CLASSES=True in the keyword num_classes .* not bool"),
        (dict(in_chans=0), r"MODEL.IN_CHANS=0 must be within \[1, inf\)"),
        (dict(img_size=0), r"DATA.IMG_SIZE=0 must be within \[1, inf\)"),
        (dict(img_size=(0, 32)), r"DATA.IMG_SIZE=\[0, 32\] must be within"),
        (
            dict(img_size=(3, 224, 224)),
            r"DATA.IMG_SIZE=\[3, 224, 224\] must be one side in pixels or",
        ),
        (dict(img_size=[224.0, 224.0]), r"the keyword img_size must be a list of int"),
        (dict(drop_rate=1), r"MODEL.DROP_RATE=1.0 must be within \[0, 1\)"),
        (dict(drop_path_rate=1.5), r"MODEL.DROP_PATH_RATE=1.5 must be within \[0, 1\)"),
        (dict(drop_path_rate=None), r"the keyword drop_path_rate must be float, not NoneType"),
        (
            dict(keep_rate="0.7"),
            r"EVIT.KEEP_RATE='0.7' in the keyword keep_rate must be float or list",
        ),
        (dict(keep_rate=[0.7, "0.5"]), r"the keyword keep_rate must be a list of float"),
        (dict(drop_loc=3), r"EVIT.DROP_LOC=3 in the keyword drop_loc must be list, not int"),
        (dict(depth=0), r"MODEL.EVIT.DEPTH=0 must be within \[1, inf\)"),
    ],
)
def test_a_keyword_is_refused_with_key_value_and_what_is_allowed(keywords, message):
    with pytest.raises(ValueError, match=message):
        create_model("evit_small_r07_fuse", **keywords)


@pytest.mark.parametrize("entry_point", [hubconf.dfvt_tiny, create_model, timm.create_model])
def test_every_python_entry_point_checks(entry_point):
    name = [] if entry_point is hubconf.dfvt_tiny else ["dfvt_tiny"]
    with pytest.raises(ValueError, match=r"MODEL.DROP_PATH_RATE=1.5 must be within"):
        entry_point(*name, drop_path_rate=1.5)


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_every_stage_of_every_architecture_has_a_block(entry):
    keyword = next((word for word in ("depths", "depth") if word in entry.fields), None)
    assert keyword, (
        f"{entry.name} counts its blocks by another name, which config._COUNTS must have"
    )
    default = entry.fields[keyword].default
    none = 0 if isinstance(default, int) else [*default[:-1], 0]
    config = load_config(variant_file("dfvt_tiny"), ["MODEL.TYPE", entry.name])
    with pytest.raises(
        ValueError, match=rf"{entry.node}.{keyword.upper()}=.*must be within \[1, inf"
    ):
        build_model(config, **{keyword: none})


def test_values_arrive_as_the_config_would_give_them(monkeypatch):
    given = {}
    monkeypatch.setattr(registry.find("evit").cls, "__init__", lambda self, **kw: given.update(kw))
    create_model(
        "evit_small_r07_fuse",
        keep_rate=1,
        drop_loc=(np.int64(3), 6),
        num_classes=np.int64(7),
        drop_path_rate=np.float64(0.25),
        img_size=torch.Size((64, 96)),
    )
    assert repr(given["keep_rate"]) == "1.0"
    assert repr(given["drop_loc"]) == "[3, 6]"
    assert repr((given["num_classes"], given["drop_path_rate"])) == "(7, 0.25)"
    assert repr(given["img_size"]) == "[64, 96]"


def test_none_is_taken_where_the_config_takes_it():
    with torch.device("meta"), SkipInit():
        model = create_model("dfformer_s18", num_classes=None, res_scale=(None, None, 1, None))
    assert model.num_classes == 1000
    assert isinstance(model.stages[1][0].res_scale1, torch.nn.Identity)
    with pytest.raises(ValueError, match=r"RES_SCALE=\[None, '1'\] .* list of float or None"):
        create_model("dfformer_s18", res_scale=(None, "1"))


def test_the_example_of_a_mixer_spec_is_one():
    example = parse_spec.__doc__.split('"')[1]
    assert parse_spec(example) == ("dilated", {"dilation": [1, 2]})
    assert isinstance(build_mixer(example, 16, MixerContext(num_heads=2)), torch.nn.Module)
