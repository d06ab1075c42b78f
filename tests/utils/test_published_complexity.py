"""Parameters and multiply-adds of the published code, as its tables and our counts of it give them."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from models import create_model, list_models
from models.layers.fourier import set_fourier_way
from tests.golden_tools import FOLDER, MANIFEST, fill_module_, oracle_input
from utils.complexity import count

# Variant: (parameters in millions, multiply-adds in 1e9); None where there is no number.
PUBLISHED = {
    "dilateformer_tiny": ("17.24", 3.16),
    "dilateformer_small": ("24.06", 4.59),
    "dilateformer_base": ("47.43", 9.92),
    "dfvt_tiny": ("3.97", 0.306),
    "dfvt_small": ("11.23", 0.941),
    "dfvt_base": ("37.33", 2.707),
    "dhvt_tiny_imagenet_patch16": ("6.27", 1.355),
    "dhvt_small_imagenet_patch16": ("24.04", 5.033),
    "dhvt_tiny_cifar_patch4": ("6.01", 0.388),
    "dhvt_small_cifar_patch4": ("23.43", 1.529),
    "dhvt_tiny_cifar_patch2": ("5.85", 1.705),
    "dhvt_small_cifar_patch2": ("22.77", 6.195),
    "dhvt_tiny_domain_patch16": ("6.11", 1.358),
    "dhvt_small_domain_patch16": ("23.79", 5.033),
    "evit_small_r09_fuse": ("22.05", 4.02),
    "evit_small_r08_fuse": ("22.05", 3.48),
    "evit_small_r07_fuse": ("22.05", 3.03),
    "evit_small_r06_fuse": ("22.05", 2.64),
    "evit_small_r05_fuse": ("22.05", 2.31),
    "deit_dge_s124_tiny_patch16_256": ("5.74", None),
    "deit_dge_s124_small_patch16_256": ("22.09", None),
    "pvt_tiny_256": ("13.35", 2.55),
    "pvt_small_256": ("24.60", 5.04),
    "pvt_medium_256": ("44.33", 8.78),
    "pvt_large_256": ("61.49", 12.94),
    "dfformer_s18": ("30.32", 3.80),
    "dfformer_s36": ("45.61", 7.36),
    "dfformer_m36": ("65.32", 12.46),
    "dfformer_b36": ("114.99", 22.13),
    "cdfformer_s18": ("30.19", 3.89),
    "cdfformer_s36": ("45.23", 7.53),
    "cdfformer_m36": ("64.43", 12.72),
    "cdfformer_b36": ("113.37", 22.47),
    "swin_tiny_patch4_window7_224": ("28.29", 4.51),
    "swin_small_patch4_window7_224": ("49.6", 8.7),
    "swin_base_patch4_window7_224": ("87.8", 15.4),
}
# EViT's own table; without fusion a block has one token less, which its one digit does not tell apart.
EVIT = {"r09": 4.0, "r08": 3.5, "r07": 3.0, "r06": 2.6, "r05": 2.3}
# Multiply-adds of the first image of the golden files, with the queries that their routers choose.
DGE = {"deit_dge_s124_tiny_patch16_256": 1_019_695_872, "pvt_dge_s124_tiny_256": 1_082_526_720}
COUNTS = json.loads((FOLDER / "complexity.json").read_text())


@cache
def published_counts():
    """Variant -> multiply-adds, where the golden file is of its size and a classifier's."""
    found = {}
    for file, entry in MANIFEST.items():
        name, path = Path(entry["config"]).stem, FOLDER / f"{file}.npz"
        if path.exists() and name not in DGE and entry["num_classes"]:
            assert COUNTS[name]["input_size"] == [entry["input_size"]] * 2
            with np.load(path) as golden:
                meta = json.loads(str(golden["meta_json"]))
            found[name] = meta["flops"]["torch_macs"]
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_variant_costs_what_its_table_says(name):
    """`tests/tools/test_tables.py` holds the stored counts to what the models do."""
    params, gmacs = PUBLISHED[name]
    digits = len(params.split(".")[1])
    assert f"{COUNTS[name]['params'] / 1e6:.{digits}f}" == params
    if gmacs is not None:
        assert COUNTS[name]["macs"] / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("rate", EVIT)
@pytest.mark.parametrize("way", ["drop", "fuse"])
def test_evit_costs_what_its_own_table_says(rate, way):
    gmacs = COUNTS[f"evit_small_{rate}_{way}"]["macs"] / 1e9
    assert gmacs == pytest.approx(EVIT[rate], abs=0.06)


@pytest.mark.parametrize("name", published_counts())
def test_a_variant_costs_what_the_published_code_costs(name):
    """The golden files have counts of the published code, by PyTorch's counter."""
    assert COUNTS[name]["macs"] == pytest.approx(published_counts()[name], rel=0.005)


def test_every_variant_of_the_table_exists():
    assert set(PUBLISHED) <= set(list_models())


@pytest.mark.parametrize("name", DGE)
def test_grained_queries_are_counted_as_the_images_ask_them(name):
    model = fill_module_(create_model(name))
    images = oracle_input(256)
    cost = count(model, images).gmacs
    each = [count(model, image[None]).gmacs for image in images]
    assert cost == pytest.approx(sum(each))
    assert each[0] == pytest.approx(DGE[name] / 1e9, rel=0.01)
    assert not math.isclose(*each, rel_tol=1e-3)
    assert max(each) < COUNTS[name]["macs"] / 1e9, "fresh routers ask everywhere"


def test_counts_do_not_depend_on_how_a_fourier_mixer_computes():
    with torch.device("meta"):
        model = create_model("dfformer_s18", depths=[1, 1, 1, 1])
    costs = []
    for way in ("fft", "matmul"):
        set_fourier_way(model, way)
        costs.append(count(model, (3, 224, 224)))
        assert {m.fourier for m in model.mixers()} == {way}
    assert costs[0] == costs[1]
    assert costs[0].fft_gmacs > 0
    assert costs[0].device == "meta"
