import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_trainer.metrics.answers import (
    EXTRACTIONS,
    NORMAL_95,
    exact_match,
    extract_flexible,
    extract_last_number,
    extract_strict,
    plain_number,
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


@pytest.mark.parametrize(
    ("predicted", "gold", "same"),
    [
        ("18.0", "18", True),
        ("1,000", "1000", True),
        ("12345679", "12345678", False),
        ("1001", "1000", False),
        ("18.0001", "18", False),
        ("12345678901234567891", "12345678901234567890", False),  # the same as floats
        ("0", "0", True),
        ("0.0001", "0", False),
        ("-3", "-3.0", True),
        ("1.8333", "1.8333333333333333", True),
        ("27.151", "27.15", True),
        ("27.1511", "27.15", False),
        ("2000.501", "2000.5", True),
        ("2000.6", "2000.5", False),
        ("1", "0.99999999", True),
        ("inf", "3", False),
        ("9" * 400, "3", False),
        ("1e999999999", "3", False),
        (None, "3", False),
    ],
)
def test_an_integer_must_be_equal_and_another_number_within_a_thousandth(predicted, gold, same):
    assert same_number(predicted, gold) is same


@pytest.mark.parametrize(
    ("written", "plain"),
    [("72", "72"), ("$5.00", "5"), ("+5", "5"), ("1e3", "1000"), ("1_000", "1000"), ("1 234", "1234"), ("-$5", "-5"),
     ("\u22125", "-5"), ("1,200.50", "1200.5"), (".5", "0.5"), ("5.", "5"), ("20 %", "20"), ("1e-5", "0.00001"),
     ("00072", "72"), ("-0", "0"), ("1\u202f234", "1234")]
    + [(text, None) for text in ("", "-", "$", ".", "1,2", "12 34", "1.234,56", "1,234 567", "1e999", "0x10", "1/2",
                                 "5 dollars", "nan", "e5", "1" * 400)],
)  # fmt: skip
def test_gold_numbers_in_plain_digits(written, plain):
    assert plain_number(written) == plain


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**15), max_value=10**15, places=4))
def test_plain_digits_are_read_by_every_extraction(value):
    plain = plain_number(str(value))
    assert plain is not None
    assert all(same_number(extract(f"#### {plain}"), str(value)) for extract in EXTRACTIONS.values())


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
