"""The model table of README.md says what the models cost."""

import json

import pytest

from models import list_models
from tests.golden_tools import FOLDER
from tools import tables

COUNTS = tables.read_counts()
PARAMETERS = json.loads((FOLDER / "parameters.json").read_text())


def smallest_of_each_family():
    best = {}
    for name in sorted(COUNTS, key=lambda name: COUNTS[name]["macs"]):
        best.setdefault(tables.family(name), name)
    return sorted(best.values())


def test_no_count_is_of_a_variant_that_is_gone():
    """A variant that is not counted yet is no fault: adding an architecture takes two files."""
    assert set(COUNTS) <= set(list_models()), "run `python tools/tables.py --update`"


@pytest.mark.parametrize("name", smallest_of_each_family())
def test_stored_counts_are_those_of_the_model(name):
    assert COUNTS[name] == tables.count_variant(name)


def test_parameters_agree_with_the_published_ones():
    both = COUNTS.keys() & PARAMETERS.keys()
    assert both
    assert {name: COUNTS[name]["params"] for name in both} == {n: PARAMETERS[n] for n in both}


def test_the_readme_holds_the_table_of_the_stored_counts():
    text = tables.README.read_text()
    assert tables.insert(text, tables.to_markdown(COUNTS)) == text, (
        "run `python tools/tables.py --update`"
    )


def test_the_readme_holds_the_recorded_speed():
    text = tables.README.read_text()
    block = tables.speed_block()
    assert tables.insert(text, block, tables.SPEED_START, tables.SPEED_END) == text, (
        "run `python tools/tables.py --speed`"
    )


def test_each_result_is_a_column_of_the_speed_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    row = dict(model="a", mode="train", compiled=False, baseline="b", ratio=2.0, img_per_s=3.0)
    for folder, names, processes in (("cpu", "ac", 0), ("other", "a", 2)):
        path = tmp_path / "results" / folder / "race.json"
        path.parent.mkdir(exist_ok=True, parents=True)
        result = dict(
            machine=dict(
                cpu="CPU",
                threads=2,
                load_average=[2.5 if processes else 2.0, 0.0, 0.0],
                tflop_per_s=0.5,
                torch="2.15.0+cu1",
                commit="0123456789",
            ),
            run=dict(
                batch_size=8,
                dtype="float32",
                processes=processes,
                channels_last=processes > 0,
                compile_baseline=processes > 0,
            ),
            costs={},
            rows=[row | dict(model=name) for name in names] + [dict(row, mode="inference")],
        )
        del result["rows"][-1]["ratio"]  # a baseline's own row
        path.write_text(json.dumps(result))
    (tmp_path / "results" / "runs.json").write_text("{}")  # of another program
    lines = tables.speed_block().splitlines()
    assert lines[1].startswith("**Training step**")
    assert lines[3:7] == [
        "| model | against | [CPU, 0.50 TFLOP/s, batch 8, all in one process, torch 2.15.0, commit 0123456]"
        "(results/cpu/race.md) | [CPU, 0.50 TFLOP/s, batch 8, channels last, alone, baselines compiled, "
        "**busy: load 2.5**, torch 2.15.0, commit 0123456](results/other/race.md) |",
        "|---|---|---:|---:|",
        "| a | b | **2.00** (3.0) | **2.00** (3.0) |",
        "| c | b | **2.00** (3.0) |  |",
    ]


def test_the_table_groups_the_variants_by_family():
    block = tables.to_markdown({name: COUNTS[name] for name in ("dfvt_tiny", "dfvt_base")})
    assert block.startswith(tables.START)
    assert block.endswith(tables.END)
    assert "<b>dfvt</b>: 2 variants, 4.0 to 37.3 M parameters" in block
    assert "- `models/dfvt.py`: DFvT: a window-attention path" in block
    assert "| dfvt_tiny | dfvt | 3.97 | 0.306 | 224x224 |" in block


def test_an_update_counts_stores_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "COUNTS", tmp_path / "complexity.json")
    monkeypatch.setattr(tables, "README", tmp_path / "README.md")
    tables.README.write_text(f"before\n{tables.START}\nold\n{tables.END}\nafter\n")
    tables.main(["--update", "dhvt_tiny_cifar_patch4"])
    stored = tables.read_counts()
    assert stored == {"dhvt_tiny_cifar_patch4": COUNTS["dhvt_tiny_cifar_patch4"]}
    text = tables.README.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| dhvt_tiny_cifar_patch4 |" in text
    assert "old" not in text


@pytest.mark.parametrize("text", ["no markers", f"{tables.END}{tables.START}", tables.START])
def test_a_text_without_markers_is_an_error(text):
    with pytest.raises(ValueError, match="needs one line '<!-- models -->'"):
        tables.insert(text, "block")
