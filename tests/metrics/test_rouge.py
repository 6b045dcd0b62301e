"""Google's ROUGE beside the challenge's metrics: its definition by hand, and what is said where it is not installed."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest

from galore_trainer.metrics.nlg import METRICS, TEXT_METRICS, nlg_scores
from galore_trainer.metrics.rouge import ROUGE, rouge, rouge_missing
from galore_trainer.run.results.columns import metric_names
from galore_trainer.run.scoring.scores import as_lines, metric_cells

PREDICTIONS = ["The pub's food is cheap; cheap, they say.", "A tavern near Queen Street", "", "Nothing in common"]
REFERENCES = [
    ["They say the food of the pub is cheap.", "Cheap food, they say, is the pub's."],
    ["Near Queen Street is a tavern", "a TAVERN near queen-street, rated 4"],
    ["Copper Fox has a rating of 4 out of 5."],
    ["Velvet Spoon serves Turkish food."],
]


def f_measure(common: int, written: int, wanted: int) -> float:
    return 2 * common / (written + wanted) if common else 0.0


def by_definition(prediction: str, reference: str) -> dict[str, float]:
    left, right = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    scores = {}
    for n in (1, 2):
        grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (left, right)]
        scores[f"rouge{n}"] = f_measure((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())
    longest = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            longest[i + 1][j + 1] = longest[i][j] + 1 if a == b else max(longest[i][j + 1], longest[i + 1][j])
    return {**scores, "rougeL": f_measure(longest[-1][-1], len(left), len(right))}


def test_it_equals_the_definition_with_the_best_reference_for_each() -> None:
    pytest.importorskip("rouge_score")
    expected = []
    for prediction, group in zip(PREDICTIONS, REFERENCES, strict=True):
        scores = [by_definition(prediction, reference) for reference in group]
        expected.append({key: pytest.approx(max(score[key] for score in scores), abs=1e-12) for key in ROUGE})
    assert rouge(PREDICTIONS, REFERENCES) == expected
    whole = nlg_scores(PREDICTIONS, REFERENCES)
    for key in ROUGE:
        values = [row[key] for row in whole["per_example"]]
        assert whole[key] == pytest.approx(sum(values) / len(values))
        assert 0 < whole[key] < 1


def test_without_the_package_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    missing = rouge_missing()
    assert missing is not None
    assert "pip install 'galore-trainer[rouge]'" in missing
    scores = nlg_scores(PREDICTIONS, REFERENCES)
    assert [scores[key] for key in ROUGE] == [None, None, None]
    assert missing in scores["notes"]
    assert set(scores["per_example"][0]) == {"rouge_l", "cider"}
    assert metric_cells(scores)["ROUGE-2 (Google)"] == "skipped"
    assert any(line.split() == ["rouge2", "skipped"] for line in as_lines(scores))


def test_results_of_before_have_the_challenge_s_metrics_alone() -> None:
    assert list(metric_cells(dict.fromkeys(METRICS, 0.5))) == list(METRICS.values())
    assert set(TEXT_METRICS) == {*METRICS, *ROUGE} <= set(metric_names())
