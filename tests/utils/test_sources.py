"""Where a run starts from; weights are used for the classes that they were trained on."""

import logging

import pytest

from utils.sources import check_classes, choose_source


@pytest.fixture
def files(tmp_path):
    found = {name: tmp_path / f"{name}.pth" for name in ("last", "given", "weights")}
    for path in found.values():
        path.touch()
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize("mode", ["eval", "throughput"])
def test_evaluation_uses_exactly_the_given_file(files, mode):
    """Trap of Swin: auto-resume replaces an explicit --resume, so that another model is scored."""
    source = choose_source(mode, files["last"], resume=files["given"], pretrained=files["weights"])
    assert (source.kind, source.path) == ("weights", files["given"])
    source = choose_source(mode, files["last"], pretrained=files["weights"])
    assert (source.kind, source.path) == ("weights", files["weights"])


def test_evaluation_of_nothing_is_an_error(files):
    """Trap of Swin: --eval without --resume starts training."""
    with pytest.raises(ValueError, match=r"nothing to evaluate: give --resume.*last\.pth"):
        choose_source("eval", files["last"])
    assert choose_source("throughput", files["last"]).kind == "scratch"


def test_training_prefers_its_own_last_checkpoint(files, tmp_path):
    last, given, weights = files["last"], files["given"], files["weights"]
    both = {"resume": given, "pretrained": weights}
    source = choose_source("train", last, **both)
    assert (source.kind, source.path) == ("resume", last)
    assert f"not used: --resume {given} and --pretrained {weights} (" in source.reason
    assert "not used" not in choose_source("train", last).reason
    assert "\n" not in source.reason
    source = choose_source("train", last, auto_resume=False, **both)
    assert (source.kind, source.path) == ("resume", given)
    nothing = tmp_path / "fresh" / "last.pth"
    assert choose_source("train", nothing, **both).path == given
    source = choose_source("train", nothing, pretrained=weights)
    assert (source.kind, source.path) == ("pretrained", weights)
    assert choose_source("train", nothing).kind == "scratch"


@pytest.mark.parametrize("flag", ["resume", "pretrained"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_source_that_does_not_exist_is_named_with_its_neighbours(files, tmp_path, mode, flag):
    with pytest.raises(ValueError, match=r"givn\.pth does not exist; its folder has.*given\.pth"):
        choose_source(mode, tmp_path / "none.pth", **{flag: str(tmp_path / "givn.pth")})


def test_the_same_classes_in_another_order_are_an_error_that_says_which():
    message = (
        r"a.pth was trained on other .*label 0 is 'cat' there and 'dog' here \(2 of 3 differ\)"
    )
    with pytest.raises(ValueError, match=message):
        check_classes(["cat", "dog", "emu"], ["dog", "cat", "emu"], "a.pth")


def test_other_names_are_a_warning_that_says_which(caplog):
    with caplog.at_level(logging.WARNING):
        check_classes(["n01", "n02"], ["n01", "goldfish"], "a.pth")
    assert "label 1 is 'n02' there and 'goldfish' here (1 of 2 differ)" in caplog.text


@pytest.mark.parametrize(
    ("saved", "current"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["0", "1"], ["cat", "dog"]),  # numbers are no names
        (["cat", "1"], ["cat", "dog"]),
        (["cat", "dog"], ["cat", "dog", "emu"]),  # the classifier does not fit: its own error
        (None, ["cat"]),  # checkpoints of the lineage
        (7, ["cat"]),
    ],
)
def test_whatever_may_mean_the_same_passes_in_silence(saved, current, caplog):
    with caplog.at_level(logging.WARNING):
        check_classes(saved, current, "a.pth")
    assert not caplog.text
