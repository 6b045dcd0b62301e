"""Plots and generated tables say what results/ and the code say, and the site builds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import figures
import fit
import plots
from blocks import read_block
from documents import PAGES, ROOT

NO_TEXT = re.compile(r"<(pre|script|style)\b.*?</\1>", re.S)


@pytest.mark.parametrize("name", figures.PLOTS)
def test_a_plot_shows_the_figures_of_results(name: str) -> None:
    numbers, *_ = figures.PLOTS[name]
    assert plots.shown(figures.IMAGES / name) == numbers(), "run `make figures`"


def test_a_plot_is_drawn_with_its_figures(tmp_path: Path) -> None:
    numbers, title, unit, line = figures.PLOTS["memory.svg"]
    plots.bars(numbers(), title, unit, tmp_path / "plot.svg", line)
    assert plots.shown(tmp_path / "plot.svg") == numbers()


def test_generated_tables_are_those_that_the_code_writes() -> None:
    stale = [
        f"{page.name}: {name}" for (page, name), text in figures.blocks().items() if read_block(page, name) != text
    ]
    assert stale == [], "run `make figures`"


def test_every_marked_block_is_written_by_figures() -> None:
    written = {(page, name) for page, name in figures.blocks()}
    for page in PAGES:
        marks = re.findall(r"<!-- (\w+): written by `make figures`", page.read_text(encoding="utf-8"))
        assert {(page, name) for name in marks} <= written


def test_predictions_are_those_of_estimate() -> None:
    row = next(row for row in fit.predicted() if (row["model"], row["task"], row["setting"]) == ("1B", "SFT", "D"))
    # other versions of torch and transformers allocate a little more or less
    assert row["peak"] == pytest.approx(fit.predict("1B", "D", "SFT"), rel=0.02)
    assert [(row["model"], row["task"], row["setting"]) for row in fit.predicted()] == list(fit.cases())


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="docs extra not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "results" / "memory" / "index.html").is_file()
    # a table or list without an empty line before it stays text
    pages = {page.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html")}
    assert [name for name, text in pages.items() if re.search(r"^(\| |- )", NO_TEXT.sub("", text), re.M)] == []
