"""Documents point at files that exist; every study says what was asked and what came of it; the log is in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from source import defined_names

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *RESULTS.rglob("*.md")]
STUDIES = sorted(path for path in RESULTS.iterdir() if path.is_dir())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_says_what_was_asked_how_and_the_verdict(study: Path) -> None:
    text = (study / "README.md").read_text(encoding="utf-8")
    assert "**Asked:**" in text
    assert re.search(r"^\*\*Verdict: (won|lost|open)\b", text, re.M)
    assert re.search(r"^```bash\n(galore-ft|python|make) ", text, re.M)
    assert re.search(r"^\|.*\|\n\|[ :|-]+\|$", text, re.M), "no table"
    assert f"({study.name}/README.md)" in (RESULTS / "README.md").read_text(encoding="utf-8")


def test_the_log_is_newest_first_with_a_date_and_a_verdict_in_each_title() -> None:
    titles = re.findall(r"^## (.*)$", (RESULTS / "LOG.md").read_text(encoding="utf-8"), re.M)
    entries = [re.fullmatch(r"(\d{4}-\d{2}-\d{2}) · (?:won|lost|open) · \S.*", title) for title in titles]
    dates = [entry[1] for entry in entries if entry]
    assert len(dates) == len(titles) > 0
    assert dates == sorted(dates, reverse=True)


def test_functions_that_the_reading_path_names_stand_in_their_files() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = []
    for path, names in re.findall(r"\]\((\S+\.py)\)((?:,? `[\w.]+`)+)", text):
        defined = defined_names(ROOT / path)
        missing += [f"{path}: {name}" for name in re.findall(r"`([\w.]+)`", names) if name not in defined]
    assert missing == []
