"""The plots of docs/why.md show the numbers of results/why."""

from __future__ import annotations

from pathlib import Path

import pytest

import plots
import why_figures


@pytest.mark.parametrize("name", why_figures.PLOTS)
def test_a_plot_shows_the_figures_of_results(name: str) -> None:
    numbers, *_ = why_figures.PLOTS[name]
    assert plots.shown(why_figures.IMAGES / name) == numbers(), "run `make figures`"


def test_curves_are_drawn_with_their_figures(tmp_path: Path) -> None:
    why_figures.draw("why_lost.svg", tmp_path / "plot.svg")
    assert plots.shown(tmp_path / "plot.svg") == why_figures.lost_curves()
