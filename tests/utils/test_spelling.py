"""Words that a user may have meant."""

import pytest

from utils.spelling import choose, nearest


def test_nearest_ignores_case_and_gives_everything_where_nothing_is_close():
    assert nearest("dfvt_TINY", ["DFvT_tiny", "swin"]) == ["DFvT_tiny"]
    assert nearest("xyz", ["b", "a"]) == ["a", "b"]


def test_a_wrong_choice_is_said_with_key_value_and_choices():
    assert choose("MODEL.ACT", "relu", {"relu": 1}) == 1
    with pytest.raises(
        ValueError, match=r"MODEL.ACT='rleu' must be one of \['gelu', 'relu'\].*relu\?"
    ):
        choose("MODEL.ACT", "rleu", {"relu": 1, "gelu": 2})


def test_of_many_names_of_which_none_is_close_the_nearest_few_are_named():
    names = [f"model_{i}" for i in range(50)]
    assert len(nearest("xyz", names)) == 3
