"""Plots of the pages: bars and curves as SVG files that carry their numbers in their own descriptions."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS, OTHERS, INK = "#e07b39", "#8c9aa8", "#3b3f44"
STYLE: Any = {"svg.hashsalt": "figures", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9}
Panels = dict[str, dict[str, float]]
"""A panel's title -> label of a bar -> its length."""
Curves = dict[str, dict[str, list[list[float]]]]
"""A panel's title -> label of a curve -> its x and its y."""


def bars(panels: Panels, title: str, unit: str, file: Path, line: tuple[float, str] | None = None) -> None:
    """Draw horizontal bars, a panel a key, as an SVG whose description holds the numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        longest = max(len(panel) for panel in panels.values())
        figure = Figure(figsize=(9, 0.75 + 0.27 * longest), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (name, values) in zip(axes, panels.items(), strict=True):
            colours = [OURS if label.startswith("GaLore+") else OTHERS for label in values]
            drawn = axis.barh([*values], [*values.values()], color=colours, height=0.72)
            if line:
                axis.axvline(line[0], color=INK, linewidth=1, linestyle=":", zorder=0)
                axis.text(
                    line[0], 1.0, line[1], transform=axis.get_xaxis_transform(), color=INK, ha="center", va="bottom"
                )
            labels = axis.bar_label(drawn, [f"{value:.1f}" for value in values.values()], padding=3, color=INK)
            for label in labels:
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
            axis.set_xlim(0, 1.14 * max(values.values()))
            axis.set_ylim(len(values) - 0.4, -0.6)
            axis.set_xlabel(f"{name}: {unit}", color=INK)
            axis.tick_params(colors=INK, length=0)
            axis.spines[["top", "right", "left"]].set_visible(False)
        _save(figure, file, title, panels)


def curves(
    panels: Curves,
    title: str,
    x: str,
    y: str,
    file: Path,
    *,
    looks: Mapping[str, Mapping[str, Any]],
    ticks: list[float] | None = None,
    log: bool = False,
) -> None:
    """Draw curves, a panel a key, as an SVG whose description holds the numbers.

    Args:
        panels: the numbers.
        title, x, y: of the figure and its axes.
        file: to write.
        looks: keywords of ``Axes.plot`` by label.
        ticks: of the x axis.
        log: whether the x axis is logarithmic.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.3), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        shown_labels: dict[str, Any] = {}
        for axis, (name, lines) in zip(axes, panels.items(), strict=True):
            for label, (at, values) in lines.items():
                (shown_labels[label],) = axis.plot(at, values, **looks[label])
            if log:
                axis.set_xscale("log", base=2)
            if ticks:
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.minorticks_off()
            axis.set_title(name, fontsize=9, color=INK)
            axis.set_xlabel(x, color=INK)
            axis.tick_params(colors=INK, length=2)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(y, color=INK)
        axes[0].set_ylim(0, 1.05 * max(max(values) for lines in panels.values() for _, values in lines.values()))
        figure.legend(
            [*shown_labels.values()],
            [*shown_labels],
            loc="outside lower center",
            ncols=min(4, len(shown_labels)),
            frameon=False,
            labelcolor=INK,
        )
        _save(figure, file, title, panels)


def _save(figure: Any, file: Path, title: str, numbers: Any) -> None:
    figure.savefig(file, metadata={"Date": None, "Title": title, "Description": json.dumps(numbers)})


def shown(file: Path) -> Any:
    """The numbers in a plot's description."""
    description = re.search(r"<dc:description>(.*?)</dc:description>", file.read_text(encoding="utf-8"), re.S)
    return json.loads(html.unescape(description[1])) if description else None
