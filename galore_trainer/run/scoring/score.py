"""Scoring any system's output file against a reference file, without a model: what ``galore-ft score`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.metrics.answers import exact_match, plain_number
from galore_trainer.metrics.nlg import nlg_scores
from galore_trainer.recipes import nlg
from galore_trainer.recipes.sources import SUFFIXES, MalformedJson, Row, decode_json, read_file, read_text
from galore_trainer.recipes.split import gather

TASKS = ("e2e", "gsm8k", "mawps")
PREDICTIONS, REFERENCES = "--predictions", "--references"


def score_files(task: str, predictions: str, references: str) -> dict[str, Any]:
    """Score the predictions of one file against the references of another, in the order of both.

    Args:
        task: ``e2e`` (five text metrics), ``gsm8k`` or ``mawps`` (exact match of numbers).
        predictions: JSON lines with ``prediction``; for e2e also plain text, one prediction a line.
        references: JSON lines with ``answer``, a number or a solution ending in ``#### number``. For e2e a table with
            ``mr`` and ``ref``, grouped by ``mr`` in order of first appearance; JSON lines with the list ``references``,
            as a run's predictions have it; or plain text, one reference a line with a blank line between two examples
            (without any blank line each line is an example, as the official scorer has it).

    Returns:
        ``task`` and what ``metrics.nlg.nlg_scores`` or ``metrics.answers.exact_match`` return, without ``per_example``.

    Raises:
        OptionError: a file or a line that cannot be read, or files of different lengths.
    """
    if task not in TASKS:
        raise OptionError("--task", task, f"one of {', '.join(TASKS)}")
    texts = _predictions(predictions, plain=task == "e2e")
    groups = _reference_groups(references) if task == "e2e" else []
    golds = [_gold(row) for row in _rows(REFERENCES, references)] if task != "e2e" else []
    examples = len(groups or golds)
    if len(texts) != examples:
        raise OptionError(
            PREDICTIONS,
            predictions,
            f"{examples} predictions, one for each example of {references!r}; it has {len(texts)}",
            "Of plain text every line is a prediction, an empty one too; rows with the same mr are one example."
            if task == "e2e"
            else "",
        )
    scores = nlg_scores(texts, groups) if task == "e2e" else exact_match(texts, golds)
    del scores["per_example"]
    return {"task": task, **scores}


def _predictions(source: str, *, plain: bool) -> list[str]:
    if plain and not _has_fields(PREDICTIONS, source):
        lines = read_text(PREDICTIONS, source).removesuffix("\n").split("\n")
        return [line.strip() for line in lines]
    texts = []
    for row in _rows(PREDICTIONS, source):
        text = row.fields.get("prediction")
        if not isinstance(text, str):
            raise row.refuse("prediction", "a text", 'A line looks like {"prediction": "..."}.')
        texts.append(text)
    return texts


def _reference_groups(source: str) -> list[list[str]]:
    if not _has_fields(REFERENCES, source):
        return _plain_groups(source)
    rows = _rows(REFERENCES, source)
    if "references" in rows[0].fields:
        return [_texts(row) for row in rows]
    if not nlg.recognises(rows[0].fields.keys()):
        columns = ", ".join(map(str, rows[0].fields))
        raise OptionError(REFERENCES, source, f"the columns mr and ref, or references; it has {columns}")
    return [list(example.references) for example in gather(nlg.parse(rows).examples)]


def _plain_groups(source: str) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for line in read_text(REFERENCES, source).strip().split("\n"):
        if line.strip():
            groups[-1].append(line.strip())
        elif groups[-1]:
            groups.append([])
    if not groups[0]:
        raise OptionError(REFERENCES, source, "at least one reference", "The file has none.")
    return groups if len(groups) > 1 else [[line] for line in groups[0]]


def _texts(row: Row) -> list[str]:
    texts = row.fields.get("references")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise row.refuse("references", "a list of texts", 'A line looks like {"references": ["...", "..."]}.')
    return texts


def _gold(row: Row) -> str:
    answer = row.fields.get("answer")
    number = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    gold = plain_number(str(answer).rpartition("####")[2]) if number else None
    if gold is None:
        raise row.refuse(
            "answer", "a number or a solution ending in '#### number'", 'A line looks like {"answer": "72"}.'
        )
    return gold


def _rows(option: str, source: str) -> list[Row]:
    return read_file(option, source, None if Path(source).suffix in SUFFIXES else ".jsonl")


def _has_fields(option: str, source: str) -> bool:
    """Whether a file holds named fields, told from its ending or its first line, and not plain text."""
    if Path(source).suffix in SUFFIXES:
        return True
    first, *_ = read_text(option, source).lstrip().split("\n", 1)
    try:
        value, end = decode_json(first)
    except MalformedJson:
        return False
    return isinstance(value, dict) and end == len(first)
