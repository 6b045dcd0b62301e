"""Score answers that are numbers: extract the number from a text, compare it with the gold number, give an interval.

``strict`` and ``flexible`` are the two extractions of ``gsm8k`` in lm-evaluation-harness (first number after ``####``;
last number of the text). ``last_number`` is the extraction of LLM-Adapters. The harness compares strings; here numbers
are compared, so that ``18.0`` equals ``18``, and an ellipsis is no number. A prediction must equal a gold number that
is an integer; otherwise it may differ by ``TOLERANCE``, as in LLM-Adapters' evaluation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
LAST_NUMBER = re.compile(r"-?\d+\.?\d*")
GOLD = re.compile(
    r"\$?\s*(?P<sign>[-+\u2212]?)\s*\$?\s*"
    r"(?P<whole>\d{1,3}(?:(?P<separator>[,_ \u00a0\u2009\u202f])\d{3})(?:(?P=separator)\d{3})*|\d*)"
    r"(?:\.(?P<fraction>\d*))?(?:[eE](?P<exponent>[-+]?\d{1,3}))?\s*[$%]?"
)
TOLERANCE = 1e-3  # absolute, for gold numbers that are no integers
NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def extract_strict(text: str) -> str | None:
    """The number after the first ``#### ``, as written; None where there is none."""
    match = STRICT.search(text)
    return match.group(1) if match else None


def extract_flexible(text: str) -> str | None:
    """The last number of the text, as written (``$1,200.``); None where there is none."""
    matches = [m for m in FLEXIBLE.findall(text) if any(c.isdigit() for c in m)]
    return matches[-1] if matches else None


def extract_last_number(text: str) -> str | None:
    """The last number of the text after commas are removed, as LLM-Adapters does; None where there is none."""
    matches = LAST_NUMBER.findall(text.replace(",", ""))
    return matches[-1] if matches else None


EXTRACTIONS: dict[str, Callable[[str], str | None]] = {
    "flexible": extract_flexible,
    "strict": extract_strict,
    "last_number": extract_last_number,
}


def to_number(text: str | None) -> float | None:
    """The number a text spells, without ``$ , %`` and a closing full stop; None where it spells none."""
    value = _exact(text)
    return None if value is None else float(value)


def same_number(predicted: str | None, gold: str | None, tolerance: float = TOLERANCE) -> bool:
    """Whether both texts spell the same number.

    Args:
        predicted: the text that was extracted from a prediction.
        gold: the right answer.
        tolerance: largest absolute difference from a gold number that is no integer; an integer must be equal.
    """
    left, right = _exact(predicted), _exact(gold)
    if left is None or right is None:
        return False
    if right == right.to_integral_value():
        return left == right
    return abs(left - right) <= Decimal(str(tolerance))


def plain_number(text: str) -> str | None:
    """A gold answer in plain digits, which every extraction reads; None where it is no number.

    ``$5.00``, ``+5``, ``1e3``, ``1_000``, ``1 234`` become ``5``, ``5``, ``1000``, ``1000``, ``1234``.
    """
    match = GOLD.fullmatch(text.strip())
    if not match or not (match["whole"] or match["fraction"]):
        return None
    sign = "-" if match["sign"] in ("-", "\u2212") else ""
    whole = re.sub(r"\D", "", match["whole"])
    value = _exact(f"{sign}{whole or 0}.{match['fraction'] or 0}e{match['exponent'] or 0}")
    if value is None:
        return None
    whole, _, fraction = f"{value:f}".partition(".")
    fraction = fraction.rstrip("0")
    plain = f"{whole}.{fraction}" if fraction else whole
    return "0" if plain == "-0" else plain


def _exact(text: str | None) -> Decimal | None:
    """The value of ``to_number`` without rounding; None where it is beyond the range of a float."""
    if text is None:
        return None
    try:
        value = Decimal(re.sub(r"[$,%\s]", "", text).rstrip("."))
        return value if value.is_finite() and math.isfinite(float(value)) else None
    except (ArithmeticError, ValueError):
        return None


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``correct`` in ``n`` (E. B. Wilson, JASA 22, 1927); (0, 1) for ``n = 0``."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, NORMAL_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # min and max: rounding must not leave the share itself outside
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def exact_match(predictions: Sequence[str], golds: Sequence[str]) -> dict[str, Any]:
    """Score texts against gold numbers under every extraction, as ``same_number`` compares them.

    Args:
        predictions: what the model wrote, one text an example.
        golds: the gold numbers as text, in the same order.

    Returns:
        ``n``; per extraction ``exact_match_<name>`` with ``value`` and its 95 % interval ``low``, ``high`` (shares from
        0 to 1) and the count ``correct``; ``per_example`` with ``<name>`` (the extracted text) and ``<name>_correct``.
    """
    assert len(predictions) == len(golds), f"{len(predictions)} predictions for {len(golds)} examples"
    per_example: list[dict[str, Any]] = []
    for prediction, gold in zip(predictions, golds, strict=True):
        extracted = {name: extract(prediction) for name, extract in EXTRACTIONS.items()}
        correct_by_name = {f"{name}_correct": same_number(text, gold) for name, text in extracted.items()}
        per_example.append({**extracted, **correct_by_name})
    result: dict[str, Any] = {"n": len(golds)}
    for name in EXTRACTIONS:
        correct = sum(row[f"{name}_correct"] for row in per_example)
        low, high = wilson_interval(correct, len(golds))
        value = correct / len(golds) if golds else 0.0
        result[f"exact_match_{name}"] = {"value": value, "low": low, "high": high, "correct": correct}
    result["per_example"] = per_example
    return result
