"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168) and data in its form: a question, a solution ending in ``#### 72``.

    user       Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...
    assistant  Natalia sold 48/2 = 24 clips in May.
               Natalia sold 48+24 = 72 clips altogether in April and May.
               #### 72

Calculator annotations (``48/2 = <<48/2=24>>24``) are taken out of the targets.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from galore_trainer.metrics.answers import to_number
from galore_trainer.recipes.base import Parsed, counted, question_example
from galore_trainer.recipes.sources import Row

FIELDS = ("question", "answer")
TOLERANCE = 1e-6
ANNOTATION = re.compile(r"<<[^<>]*>>")


def recognises(columns: Collection[str]) -> bool:
    """Whether rows with these columns are read by this recipe when ``data.task`` is auto."""
    return set(FIELDS) <= set(columns)


def parse(rows: list[Row]) -> Parsed:
    """Examples from rows with ``question`` and ``answer``; the gold number stands after the last ``####``."""
    examples, annotations = [], 0
    for row in rows:
        solution, count = ANNOTATION.subn("", row.text("answer"))
        annotations += count
        steps, mark, gold = solution.rpartition("####")
        gold = gold.strip()
        if not mark or to_number(gold) is None:
            raise row.refuse(
                "answer",
                "a solution ending in '#### number'",
                "Free text is trained on with data.task=sft and data.columns={prompt: question, completion: answer}.",
            )
        target = "\n".join([*(line.rstrip() for line in steps.strip().split("\n")), f"#### {gold}"]).strip()
        examples.append(question_example(row.text("question").strip(), target, gold.replace(",", ""), row.id))
    notes = (
        [f"{counted(annotations, 'calculator annotation')} <<...>> taken out of the solutions"] if annotations else []
    )
    return Parsed(examples, notes)
