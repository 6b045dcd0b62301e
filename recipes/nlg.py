"""E2E (Novikova et al., SIGDIAL 2017) and data in its form: a meaning representation, and texts that people gave it.

    user       Describe this place in one or two sentences: name[The Copper Fox], eatType[pub], area[old town]
    assistant  The Copper Fox is a pub in the old town.

Trained on is every pair of a meaning representation and a text; evaluated on is every meaning representation once, with
all its texts as references. So a part is held out by whole meaning representations, never by single rows.

Columns go by the names in use, in capitals or not: ``mr, ref`` (the challenge's CSV files), ``meaning_representation,
human_reference`` (tuetschek/e2e_nlg); other names through ``data.columns``.
"""

from __future__ import annotations

from collections.abc import Collection

from galore_trainer.metrics.nlg import nlg_scores
from galore_trainer.recipes.base import Example, Parsed, question_example
from galore_trainer.recipes.sources import Row

FIELDS = ("mr", "ref")
ALIASES = {"mr": ("mr", "meaning_representation"), "ref": ("ref", "human_reference")}
REQUEST = "Describe this place in one or two sentences: "


def recognises(columns: Collection[str]) -> bool:
    """Whether rows with these columns are read by this recipe when ``data.task`` is auto."""
    return all(_column(columns, field) is not None for field in FIELDS)


def parse(rows: list[Row]) -> Parsed:
    """One example a row, under any of the known column names."""
    examples = []
    for row in rows:
        mr, ref = (row.text(_column(row.fields, field) or field) for field in FIELDS)
        examples.append(pair(mr, ref, row.id))
    return Parsed(examples, [], evaluated_by="meaning representation")


def pair(mr: str, ref: str, id: str) -> Example:
    """The example of one meaning representation and one text."""
    return question_example(REQUEST + mr.strip(), " ".join(ref.split()), None, id)


def score(predictions: list[str], examples: list[Example]) -> dict[str, object]:
    """All five metrics of ``metrics.nlg``, and each example's share in two of them."""
    result = nlg_scores(predictions, [example.references or (example.target,) for example in examples])
    result["per_example"] = [
        {"id": example.id, "prediction": prediction, "references": list(example.references), **row}
        for example, prediction, row in zip(examples, predictions, result["per_example"], strict=True)
    ]
    return result


def _column(columns: Collection[str], field: str) -> str | None:
    return next((column for column in columns if str(column).lower() in ALIASES[field]), None)
