import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_trainer.metrics.answers import (
    NORMAL_95,
    exact_match,
    extract_flexible,
    extract_last_number,
    extract_strict,
    same_number,
    to_number,
    wilson_interval,
)

TEXTS = [  # text, strict, flexible, last number
    ("48 / 2 = 24\n#### 24", "24", "24", "24"),
    ("#### 1,200\nThe answer is 1,200.", "1,200", "1,200.", "1200."),
    ("First #### 3 and then #### 4", "3", "4", "4"),
    ("####7", None, "7", "7"),
    ("She pays $1,200.50!", None, "$1,200.50", "1200.50"),
    ("It falls to -5 degrees", None, "-5", "-5"),
    ("16-3=13", None, "13", "13"),
    ("The answer is 18. Well...", None, "18.", "18."),
    ("So she has 9 and , , left ,,", None, "9", "9"),
    ("no number at all ...", None, None, None),
    ("", None, None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible", "last"), TEXTS)
def test_extractions(text, strict, flexible, last):
    assert extract_strict(text) == strict
    assert extract_flexible(text) == flexible
    assert extract_last_number(text) == last


@pytest.mark.parametrize(
    ("text", "value"),
    [("$1,200.50", 1200.5), ("18.", 18.0), ("-5", -5.0), ("25%", 25.0), ("1.2.3", None), ("...", None), (None, None)],
)
def test_to_number(text, value):
    assert to_number(text) == value


def test_infinity_is_no_number():
    assert to_number("9" * 400) is None


def test_comparison_is_numeric_and_relative_to_the_gold():
    assert same_number("18.0", "18")
    assert same_number("1,000", "1000")
    assert not same_number("18.001", "18")
    assert same_number("18.01", "18", tolerance=1e-3)
    assert not same_number("18.02", "18", tolerance=1e-3)
    assert same_number("0", "0")
    assert not same_number("0.001", "0", tolerance=1e-3)
    assert not same_number(None, "3")


@settings(deadline=None)  # a busy machine stalls
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_the_shares_that_the_normal_test_just_accepts(case):
    correct, n = case
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            distance = abs(correct / n - bound)
            assert math.isclose(distance, NORMAL_95 * math.sqrt(bound * (1 - bound) / n), abs_tol=1e-9)


def test_wilson_known_values():
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_exact_match_counts_each_extraction():
    result = exact_match(["#### 4", "it is 4", "#### 5, no, 4", "five"], ["4", "4", "4", "5"])
    assert result["n"] == 4
    assert result["exact_match_strict"]["correct"] == 1
    assert result["exact_match_flexible"]["correct"] == 3
    assert result["exact_match_flexible"]["value"] == 0.75
    assert result["exact_match_flexible"]["low"] < 0.75 < result["exact_match_flexible"]["high"]
    assert [row["strict"] for row in result["per_example"]] == ["4", None, "5,", None]
    assert [row["flexible_correct"] for row in result["per_example"]] == [True, True, True, False]
