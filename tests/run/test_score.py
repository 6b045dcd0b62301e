"""Output files of any system against reference files: forms that are read, scores, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.metrics.nlg import METRICS, nlg_scores
from galore_trainer.run.scoring.score import score_files

PREDICTIONS = ["Larkspur is a cheap pub in the old town.", "", "Paper Moon is Greek."]
GROUPS = [
    ["Larkspur is a cheap pub in the old town.", "In the old town, Larkspur is a pub with low prices."],
    ["Red Kettle is a coffee shop."],
    ["Paper Moon serves Greek food.", "Greek food is served at Paper Moon.", "Paper Moon is a Greek place."],
]


@pytest.fixture(autouse=True)
def without_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galore_trainer.metrics.nlg.meteor_missing", lambda: "METEOR is skipped: here.")


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: Any) -> str:
        lines = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(lines, encoding="utf-8")
        return str(tmp_path / name)

    return write


PREDICTION_FORMS = {
    "p.txt": "\n".join(PREDICTIONS) + "\n",
    "no_end.txt": "\n".join(PREDICTIONS),
    "p.jsonl": [{"id": i, "prediction": text} for i, text in enumerate(PREDICTIONS)],
    "json.txt": [{"prediction": text} for text in PREDICTIONS],
}
ROWS = [  # texts of one place are together and apart
    *((f"name[{i}]", text) for i, group in enumerate(GROUPS) for text in group[:2]),
    ("name[2]", GROUPS[2][2]),
]
REFERENCE_FORMS = {
    "r.txt": "\n\n".join("\n".join(group) for group in GROUPS) + "\n",
    "spaced.txt": "\n \n\n".join("\n".join(group) for group in GROUPS) + "\n\n",
    "r.csv": "mr,ref\n" + "".join(f'"{mr}","{text}"\n' for mr, text in [ROWS[0], *ROWS[2:], ROWS[1]]),
    "r.jsonl": [{"meaning_representation": mr, "human_reference": text} for mr, text in ROWS],
    "run.jsonl": [{"id": i, "prediction": "", "references": group} for i, group in enumerate(GROUPS)],
}


@pytest.mark.parametrize("references", REFERENCE_FORMS)
@pytest.mark.parametrize("predictions", PREDICTION_FORMS)
def test_every_form_gives_the_same_scores(write, predictions: str, references: str) -> None:
    scores = score_files(
        "e2e",
        write(f"pred-{predictions}", PREDICTION_FORMS[predictions]),
        write(f"ref-{references}", REFERENCE_FORMS[references]),
    )
    expected = nlg_scores(PREDICTIONS, GROUPS)
    assert (scores["task"], scores["n"], scores["notes"]) == ("e2e", 3, ["METEOR is skipped: here."])
    assert {key: scores[key] for key in METRICS} == pytest.approx({key: expected[key] for key in METRICS})


def test_without_blank_lines_each_line_is_an_example(write) -> None:
    single = [group[0] for group in GROUPS]
    scores = score_files("e2e", write("p.txt", "\n".join(single)), write("r.txt", "\n".join(single)))
    assert (scores["n"], scores["rouge_l"]) == (3, 1.0)


ANSWERS = ["72", 1200, "5 + 5 = 10\n#### 10", "-1.5"]
WRITTEN = ["So it is #### 72", "It costs $1,200.", "#### 10.0", "1.5"]


@pytest.mark.parametrize("task", ["gsm8k", "mawps"])
def test_numbers_are_matched(write, task: str) -> None:
    predictions = write("p.jsonl", [{"prediction": text} for text in WRITTEN])
    scores = score_files(task, predictions, write("r.jsonl", [{"answer": answer} for answer in ANSWERS]))
    assert scores["n"] == 4
    assert scores["exact_match_flexible"]["correct"] == 3
    assert scores["exact_match_strict"]["correct"] == 2
    assert "per_example" not in scores


@pytest.mark.parametrize("task", ["gsm8k", "mawps"])
def test_integers_must_be_equal_and_spellings_do_not_matter(write, task: str) -> None:
    golds = ["12345678", 1000, 11 / 6, "$5.00", "so\n####+5", "1e3", "1 234"]
    texts = ["12345679", "1001", "1.8333", "5", "5", "1,000", "1234"]
    predictions = write("p.jsonl", [{"prediction": f"#### {text}"} for text in texts])
    scores = score_files(task, predictions, write("r.jsonl", [{"answer": gold} for gold in golds]))
    assert scores["exact_match_strict"]["correct"] == 5


def test_plain_text_may_begin_with_a_brace(write) -> None:
    lines = ["{Larkspur} is a pub.", "{}", "[1]"]
    assert score_files("e2e", write("p.txt", "\n".join(lines)), write("r.txt", "\n\n".join(lines)))["rouge_l"] == 1.0


@pytest.mark.parametrize(
    ("task", "predictions", "references", "option", "said"),
    [
        ("chess", "a", "b", "--task", "one of e2e, gsm8k, mawps"),
        ("e2e", "a\nb\n", "c\n\nd\n\ne\n", "--predictions", "wanted 3 predictions.*it has 2"),
        ("gsm8k", [{"prediction": "1"}], [{"answer": 1}] * 2, "--predictions", "wanted 2 predictions.*it has 1"),
        ("e2e", [{"prediction": "a"}, {"text": "a"}], "a\n\nb", "--predictions", "field 'prediction' of line 2"),
        ("gsm8k", [{"prediction": 3}], [{"answer": 1}], "--predictions", "field 'prediction' of line 1"),
        ("gsm8k", "only text", [{"answer": 1}], "--predictions", "well-formed JSON; line 1"),
        ("gsm8k", [{"prediction": "1"}], [{"gold": 1}], "--references", "field 'answer' of line 1"),
        ("mawps", [{"prediction": "1"}] * 2, [{"answer": 1}, {"answer": "x"}], "--references", "'answer' of line 2"),
        ("mawps", [{"prediction": "1"}], [{"answer": True}], "--references", "'answer' of line 1"),
        ("e2e", "a", [{"mr": "name[A]", "text": "a"}], "--references", "columns mr and ref.*it has mr, text"),
        ("e2e", "a", [{"references": "a"}], "--references", "a list of texts in field 'references' of line 1"),
        ("e2e", "a", "\n\n", "--references", "at least one reference"),
    ],
)
def test_files_that_do_not_fit_name_option_and_place(write, task, predictions, references, option, said) -> None:
    with pytest.raises(OptionError, match=f"(?s){said}") as error:
        score_files(task, write("p.txt", predictions), write("r.txt", references))
    assert error.value.option == option


def test_a_file_that_is_not_there(write, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--predictions.*There is no"):
        score_files("e2e", str(tmp_path / "p.txt"), write("r.txt", "a"))
    with pytest.raises(OptionError, match=r"--references.*a readable file"):
        score_files("e2e", write("p.txt", "a"), str(tmp_path))
