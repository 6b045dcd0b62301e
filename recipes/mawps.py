"""MAWPS (Koncel-Kedziorski et al., NAACL 2016): one-line word problems with an equation and a number.

    user       A waiter had 22 customers in his section. If 14 of them left and the rest of his tables had 4 people ...?
    assistant  (22 - 14) / 4 = 2
               #### 2

The target is built from the equation. A row whose equation cannot be read, or does not give the row's own answer within
a relative 1e-3, is kept out of training; in an evaluation set it stays, with the row's answer as gold, so that scores
cover the whole set. A row without a number as answer is dropped. Pre-tokenised text (``section . If``) is joined.

Columns go by the names of the copies in use: ``original_text, equation, ans`` (LLM-Adapters), ``question, expression,
result_float, chain`` (MU-NLPC/Calc-mawps), ``Question, Equation, Answer, Numbers`` with blanks ``N_00`` (mwpt5/MAWPS),
``sQuestion, lEquations, lSolutions`` (the original); other names through ``data.columns``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from decimal import Decimal
from typing import Any

from galore_trainer.recipes.base import Parsed, counted, question_example
from galore_trainer.recipes.equations import EquationError, evaluate, format_number, working
from galore_trainer.recipes.equations import parse as parse_equation
from galore_trainer.recipes.sources import Row

FIELDS = ("question", "equation", "answer", "numbers")
ALIASES = {
    "question": ("question", "original_text", "Question", "sQuestion"),
    "equation": ("equation", "Equation", "lEquations", "expression", "chain"),
    "answer": ("answer", "ans", "Answer", "lSolutions", "result_float", "result"),
    "numbers": ("numbers", "Numbers"),
}
BLANK = re.compile(r"\bN_(\d\d)\b")
GADGET = re.compile(r"<gadget[^>]*>(.*?)</gadget>", re.DOTALL)
SHOWN = 5  # ids named in a note


def recognises(columns: Collection[str]) -> bool:
    """Whether rows with these columns are read by this recipe when ``data.task`` is auto."""
    return all(any(alias in columns for alias in ALIASES[field]) for field in ("question", "equation", "answer"))


def parse(rows: list[Row]) -> Parsed:
    """Examples from rows with a question, an equation and an answer, under any of the known column names."""
    examples, eval_only, unanswered, joined = [], [], [], 0
    for row in rows:
        numbers = str(_get(row, "numbers", "")).split()
        try:
            question, equation = (_fill_blanks(_required(row, field), numbers) for field in ("question", "equation"))
        except EquationError:
            raise row.refuse("numbers", "numbers for the blanks N_00, N_01, ...") from None
        text = join_tokens(question)
        joined += text != question
        try:
            answer = _number(_get(row, "answer"))
        except EquationError:
            unanswered.append(row.id)
            continue
        try:
            steps = _working(equation, answer)
        except EquationError:
            steps = []
            eval_only.append(row.id)
        target = "\n".join([*steps, f"#### {format_number(answer)}"])
        gold = str(int(answer)) if answer == int(answer) else repr(answer)
        examples.append(question_example(text, target, gold, row.id))
    notes = []
    if joined:
        notes.append(f"{counted(joined, 'question')} joined from separate tokens ('section .' to 'section.')")
    if unanswered:
        notes.append(f"{counted(len(unanswered), 'row')} without a number as answer dropped ({_some(unanswered)})")
    if eval_only:
        notes.append(
            f"{counted(len(eval_only), 'row')} with an equation that is unreadable or does not give the answer: "
            f"never trained on, evaluated on like the rest ({_some(eval_only)})"
        )
    return Parsed(examples, notes, frozenset(eval_only))


def join_tokens(text: str) -> str:
    """Undo pre-tokenisation: ``Dan 's cat did n't cost $ 5 .`` becomes ``Dan's cat didn't cost $5.``."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([?!;:,%)]|\.(?!\d))", r"\1", text)
    text = re.sub(r"([$(]) (?=\S)", r"\1", text)
    text = re.sub(r" (['’](?:s|re|ve|ll|d|m)|n['’]t)\b", r"\1", text)
    return re.sub(r"(?<=\w) - (?=[a-z])", "-", text)


def _working(equation: str, answer: float) -> list[str]:
    gadgets = GADGET.findall(equation)
    if not gadgets:
        return working(equation, answer)
    last = len(gadgets) - 1
    values = [answer if i == last else evaluate(parse_equation(gadget)) for i, gadget in enumerate(gadgets)]
    return [line for gadget, value in zip(gadgets, values, strict=True) for line in working(gadget, value)]


def _number(value: Any) -> float:
    """A number from ``2.0``, ``"106491.0"``, ``"1_000"``, ``"3/5"``, ``"$5"`` or a list of one of them."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str | int | float | Decimal):
        raise EquationError("no number")
    return evaluate(parse_equation(re.sub(r"[$%]", "", str(value))))


def _fill_blanks(text: str, numbers: list[str]) -> str:
    """Put numbers in the place of ``N_00``, ``N_01``, ...; a blank without a number stays."""

    def fill(match: re.Match[str]) -> str:
        index = int(match.group(1))
        return format_number(_number(numbers[index])) if index < len(numbers) else match.group()

    return BLANK.sub(fill, text)


def _get(row: Row, field: str, default: Any = None) -> Any:
    for alias in ALIASES[field]:
        if row.fields.get(alias) is not None:
            return row.fields[alias]
    return default


def _required(row: Row, field: str) -> str:
    value = _get(row, field)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        name = next((alias for alias in ALIASES[field] if alias in row.fields), field)
        raise row.refuse(name, "a text")
    return value


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
