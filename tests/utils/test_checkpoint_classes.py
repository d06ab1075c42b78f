"""Weights are used for the classes that they were trained on."""

import logging

import pytest

from utils.checkpoint import check_classes


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
