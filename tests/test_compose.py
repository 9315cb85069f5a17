"""Sums of classes as people write them."""

import re

import pytest

from runtime.errors import UserError
from sampling.plan import class_index, parse_sum

NAMES = ["CircleRight", "Walk-Left", "Jump + Run", "it's", "4", "Über"]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("CircleRight", [(1, 0)]),
        ("0", [(1, 0)]),
        ("0 + 0.5*1", [(1, 0), (0.5, 1)]),
        ("CircleRight+.5*Über", [(1, 0), (0.5, 5)]),
        ("CircleRight - 0.3 * 'Walk-Left'", [(1, 0), (-0.3, 1)]),
        ('-2.*"Jump + Run"-"it\'s"', [(-2, 2), (-1, 3)]),
        ("  1 -  2*Über ", [(1, 1), (-2, 5)]),
        ("4 + 5", [(1, 4), (1, 5)]),  # a name wins over an index
        ("2*3", [(2, 3)]),
        ("Über + 0 + Über", [(2, 5), (1, 0)]),
        ("0 - 1 + 1", [(1, 0)]),
    ],
)
def test_a_sum_is_read_as_weights_of_classes(text, terms):
    assert parse_sum(text, NAMES) == terms


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("", "its end"),
        ("   ", "'   '"),
        ("0 +", "'+'"),
        ("0 1", "'1'"),
        ("CircleRight * 0.5", "'* 0.5'"),
        ("0 ++ 1", "'++ 1'"),
        ("0*1*2", "'*2'"),
        ("0 + 'Walk-Left", '"+ \'Walk-Left"'),
        ("''", "\"''\""),
    ],
)
def test_what_is_no_sum_is_shown_from_where_it_goes_wrong(text, rest):
    with pytest.raises(UserError, match="in quotes") as error:
        parse_sum(text, NAMES)
    assert f"is not a sum from {rest}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["Zebra", "0 + 0.5*Zebra", "6", "Walk-Left", "0.5*", "0 + x"])
def test_an_unknown_class_is_named_with_those_there_are(text):
    with pytest.raises(UserError, match=r"(Zebra|6|Walk|0\.5|x) is unknown.*0 to 5: CircleRight"):
        parse_sum(text, NAMES)


@pytest.mark.parametrize("text", ["0 - CircleRight", "0*1", "9" * 400 + "*1"])
def test_a_sum_without_a_finite_weight_is_refused(text):
    with pytest.raises(UserError, match=re.escape(text[:9]) + ".*weight"):
        parse_sum(text, NAMES)


def test_a_class_is_found_by_its_name_before_its_index():
    assert [class_index(text, NAMES) for text in ("it's", "4", "5")] == [3, 4, 5]
