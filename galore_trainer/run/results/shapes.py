"""Checks of ``result.json``, ``study.json`` and ``log.jsonl`` field by field, as users may edit these files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from galore_trainer.config import check_type
from galore_trainer.errors import OptionError
from galore_trainer.metrics.nlg import TEXT_METRICS

LARGEST = 1e100  # larger figures overflow in means, units and axes
WAY_OUT = "Leave this folder out, or make the file anew with the command that wrote it."


class Field(NamedTuple):
    """The type of a field, and the smallest number that it may be; a missing field counts as null."""

    hint: Any
    low: float | None = None


AMOUNT = Field(float, 0)
COUNT = Field(int, 0)
TEXT = Field(str)
MAPPING = Field(dict[str, Any])
MAYBE_AMOUNT = Field(float | None)

RESULT: dict[str, Field] = {
    "method": TEXT,
    "task": TEXT,
    "seed": Field(int),
    "steps": COUNT,
    "resumed_from_step": Field(int | None, 0),
    "config": MAPPING,
    "config.galore.update_proj_gap": Field(int | None, 1),
    "config.galore.stagger_refresh": Field(bool | None),
    "score_before": Field(dict[str, Any] | None),
    "score_after": Field(dict[str, Any] | None),
    "seconds.training": AMOUNT,
    "seconds.forward_backward": AMOUNT,
    "seconds.update": AMOUNT,
    "seconds.refresh": AMOUNT,
    "peak_memory.peak_bytes": MAYBE_AMOUNT,
    "peak_memory.meaning": TEXT,
    "predicted_memory": Field(dict[str, Any] | None),
    "predicted_memory.peak_bytes": MAYBE_AMOUNT,
    "predicted_memory.weights_bytes": MAYBE_AMOUNT,
    "optimizer_state_bytes": Field(dict[str, float]),
    "projection_error": Field(dict[str, Any] | None),
    "projection_error.mean": MAYBE_AMOUNT,
    "projection_error.excess": MAYBE_AMOUNT,
    "projection_error.sharing_excess": MAYBE_AMOUNT,
    "environment.versions": Field(dict[str, str]),
    "environment.commit": Field(str | None),
    "environment.uncommitted_changes": Field(bool | None),
    "environment.device": TEXT,
    "environment.platform": TEXT,
    "environment.accelerators": COUNT,
}
SCORE: dict[str, Field] = {
    "n": Field(int, 1),
    "metric": Field(str | None),
    "score": MAYBE_AMOUNT,
    "interval": Field(list[float] | None),
    "eval_loss": MAYBE_AMOUNT,
    **{name: MAYBE_AMOUNT for name in TEXT_METRICS},
}
OTHER: dict[str, Field] = {"task": TEXT, "n": Field(int, 1), "eval_loss": AMOUNT}
STUDY: dict[str, Field] = {
    "name": TEXT,
    "title": Field(str | None),
    "question": Field(str | None),
    "metrics": Field(list[str] | None),
    "commands": Field(list[str] | None),
    "cells": Field(list[dict[str, Any]]),
}
CELL: dict[str, Field] = {
    "name": TEXT,
    "slug": TEXT,
    "values": MAPPING,
    "runs": Field(list[dict[str, Any]]),
    "timing": MAPPING,
}
ENTRY: dict[str, Field] = {
    "seed": Field(int),
    "folder": TEXT,
    "status": TEXT,
    "exclusive": Field(bool),
    "reason": Field(str | None),
}


def check_result(path: Path, result: dict[str, Any]) -> None:
    """Refuse a ``result.json`` that no run wrote. Missing fields of its first level that may be null become None.

    Raises:
        OptionError: naming the file, the first field that does not fit, and what is wanted there.
    """
    _check_text(path, result)
    _check(path, result, RESULT)
    for name in RESULT:
        if "." not in name:
            result.setdefault(name)  # readers need not ask whether it is there
    for when in ("score_before", "score_after"):
        _check(path, result, {f"{when}.also": Field(dict[str, Any] | None)})
        for name, other in ((result.get(when) or {}).get("also") or {}).items():
            _check(path, other, OTHER, f"{when}.also.{name}.")
    score = result.get("score_after")
    if score:
        _check(path, score, SCORE, "score_after.")
        if score.get("interval") is not None and len(score["interval"]) != 2:
            raise OptionError(f"{path}: score_after.interval", score["interval"], "two numbers", WAY_OUT)


def check_study(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse a ``study.json`` that no sweep wrote; see ``check_result``."""
    _check_text(path, record)
    _check(path, record, STUDY)
    for i, cell in enumerate(record["cells"]):
        _check(path, cell, CELL, f"cells[{i}].")
        for k, entry in enumerate(cell["runs"]):
            _check(path, entry, ENTRY, f"cells[{i}].runs[{k}].")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``log.jsonl``, each with its ``step``; none where there is no such file.

    Raises:
        OptionError: naming the file and the line that is no row of a log.
    """
    wanted, rows = "JSON lines with a step, as a run writes them", list[dict[str, Any]]()
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(str(path), str(error), wanted, "Remove the file for a report without curves.") from None
    for number, line in enumerate(lines if lines != [""] else (), start=1):
        row = _parse(line)
        if not isinstance(row, dict) or not _fits(row.get("step"), COUNT) or not _are_samples(row.get("samples", [])):
            raise OptionError(f"{path}, line {number}", _short(line), wanted, "Remove that line.")
        rows.append(row)
    return rows


def _are_samples(value: Any) -> bool:
    """Whether these are texts as ``eval.samples`` writes them."""
    return isinstance(value, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("id", "prompt", "prediction"))
        for row in value
    )


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _check(path: Path, data: Mapping[str, Any], fields: Mapping[str, Field], above: str = "") -> None:
    for name, field in fields.items():
        value: Any = data
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not _fits(value, field):
            option = f"{path}: {above}{name}"
            try:
                check_type(option, value, field.hint)
            except OptionError as error:
                raise OptionError(option, _short(value), error.wanted, WAY_OUT) from None
            low = -LARGEST if field.low is None else field.low
            raise OptionError(option, _short(value), f"numbers from {low:g} to {LARGEST:g}", WAY_OUT)


def _fits(value: Any, field: Field) -> bool:
    try:
        check_type("", value, field.hint)
    except OptionError:
        return False
    return all(_is_number(number, field.low) for number in _numbers(value, field.hint))


def _numbers(value: Any, hint: Any) -> list[float]:
    """The numbers that a field holds; values of an untyped mapping are not checked."""
    if isinstance(value, Mapping):
        return list(value.values()) if hint == dict[str, float] else []
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int | float) and not isinstance(number, bool)]


def _is_number(value: float, low: float | None) -> bool:
    """Whether a number can be calculated with and drawn: no NaN, nothing whose sums or units leave a float."""
    return abs(value) <= LARGEST and (low is None or value >= low)


def _check_text(path: Path, data: Any) -> None:
    """Refuse lone surrogates, which JSON can hold and UTF-8 cannot."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        excerpt = _short(error.object[max(error.start - 20, 0) : error.end + 20])
        raise OptionError(str(path), excerpt, "whole characters", WAY_OUT) from None


def _short(value: Any) -> Any:
    text = repr(value)
    return value if len(text) <= 80 else f"{text[:77]}..."
