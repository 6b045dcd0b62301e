"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) as Google's package rouge_score counts them, which most papers quote.

They differ from the E2E challenge's ROUGE-L of ``metrics/nlg.py`` in the tokens (runs of letters and digits), in the F
measure (precision and recall weigh the same) and in the reference (the one with the best F measure).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

ROUGE = {"rouge1": "ROUGE-1 (Google)", "rouge2": "ROUGE-2 (Google)", "rougeL": "ROUGE-L (Google)"}
"""The package's own key of each metric, and its name in tables."""


def rouge_missing() -> str | None:
    """What these metrics need and how to install it, as a sentence; None where nothing is missing."""
    if importlib.util.find_spec("rouge_score") is not None:
        return None
    need = "the package rouge-score, which is not installed (pip install 'galore-trainer[rouge]')"
    return f"ROUGE-1, ROUGE-2 and Google's ROUGE-L are skipped: they need {need}."


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """F measures of each example by ``ROUGE``, from 0 to 1, without stemming; the best reference counts for each.

    Args:
        predictions: one text for each example.
        references: for each example its right answers, at least one.
    """
    assert rouge_missing() is None, "ask rouge_missing() first"
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    examples = zip(predictions, references, strict=True)
    return [
        {key: float(score.fmeasure) for key, score in scorer.score_multi(group, text).items()}
        for text, group in examples
    ]
