"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168) and data in its form: a question, a solution ending in ``#### 72``.

    user       Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...
    assistant  Natalia sold 48/2 = 24 clips in May.
               Natalia sold 48+24 = 72 clips altogether in April and May.
               #### 72

Calculator annotations (``48/2 = <<48/2=24>>24``) are taken out of the targets. A gold number in another spelling
(``$5.00``, ``+5``, ``1e3``) is written in plain digits, so that a model that writes its target scores as right.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from galore_trainer.metrics.answers import EXTRACTIONS, plain_number, same_number
from galore_trainer.recipes.base import Parsed, counted, question_example
from galore_trainer.recipes.sources import Row

FIELDS = ("question", "answer")
ANNOTATION = re.compile(r"<<[^<>]*>>")
USUAL = re.compile(r"-?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?")  # stays as it is written
FREE_TEXT = "Free text is trained on with data.task=sft and data.columns={prompt: question, completion: answer}."


def recognises(columns: Collection[str]) -> bool:
    """Whether rows with these columns are read by this recipe when ``data.task`` is auto."""
    return set(FIELDS) <= set(columns)


def parse(rows: list[Row]) -> Parsed:
    """Examples from rows with ``question`` and ``answer``; the gold number stands after the last ``####``."""
    examples, annotations = [], 0
    for row in rows:
        solution, count = ANNOTATION.subn("", row.text("answer"))
        annotations += count
        steps, mark, written = solution.rpartition("####")
        written = written.strip()
        gold = plain_number(written) if mark else None
        if gold is None:
            raise row.refuse("answer", "a solution ending in '#### number'", FREE_TEXT)
        last = f"#### {written if USUAL.fullmatch(written) else gold}"
        target = "\n".join([*(line.rstrip() for line in steps.strip().split("\n")), last]).strip()
        if not all(same_number(extract(target), gold) for extract in EXTRACTIONS.values()):
            raise row.refuse(
                "answer", "one '#### number' alone, at the end", "The first one is what strict scoring reads."
            )
        examples.append(question_example(row.text("question").strip(), target, gold, row.id))
    notes = (
        [f"{counted(annotations, 'calculator annotation')} <<...>> taken out of the solutions"] if annotations else []
    )
    return Parsed(examples, notes)
