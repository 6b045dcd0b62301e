"""``galore-ft score``: JSON on standard output, lines for people, one message for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from galore_trainer.cli.main import main


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("galore_trainer.metrics.nlg.meteor_missing", lambda: "METEOR is skipped: it needs Java.")
    monkeypatch.chdir(tmp_path)
    Path("system.txt").write_text("Larkspur is a pub in the old town.\nPaper Moon is Greek.\n")
    Path("places.csv").write_text(
        'mr,ref\n"name[Larkspur]","Larkspur is a pub in the old town."\n"name[Paper Moon]","Paper Moon is Greek."\n'
        '"name[Larkspur]","In the old town there is a pub, Larkspur."\n'
    )
    Path("numbers.jsonl").write_text('{"prediction": "so 3", "answer": "3"}\n{"prediction": "4", "answer": 5}\n')
    return tmp_path


def test_texts_as_json_and_as_lines(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score", "--task", "e2e", "--predictions", "system.txt", "--references", "places.csv"]
    assert main([*words, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["task"], scores["n"], scores["bleu"], scores["meteor"]) == ("e2e", 2, pytest.approx(1), None)
    assert main(words) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["bleu"], lines["rouge_l"], lines["meteor"]) == ("1.0000", "1.0000", "skipped")
    assert lines["note"] == "METEOR is skipped: it needs Java."
    assert lines["bleu_signature"].startswith("nrefs:var|case:lc")


def test_numbers_with_their_interval(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--task", "gsm8k", "--predictions", "numbers.jsonl", "--references", "numbers.jsonl"]) == 0
    assert "50.0 % (95 % interval 9.5 to 90.5, 1 of 2)" in capsys.readouterr().out


def test_files_that_do_not_fit_exit_with_2(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--task", "e2e", "--predictions", "numbers.jsonl", "--references", "none.csv"]) == 2
    assert "--references: got 'none.csv'" in capsys.readouterr().err
    assert main(["score", "--task", "e2e", "--predictions", "system.txt"]) == 2
    assert "--references" in capsys.readouterr().err
