"""Plots whose description holds the numbers that they show, so that a test can compare them with results/."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, OTHERS, INK = "#e07b39", "#8c9aa8", "#3b3f44"
COLOURS = ("#e07b39", "#3b82c4", "#3a9d6a", "#c2477f", "#8a6fd1", "#b59a2d", "#4bacb8", "#8c9aa8")
HEIGHT = 0.1  # of a panel of losses, nats per token
Panels = dict[str, dict[str, float]]  # panel -> label of a bar -> its length
Curves = dict[str, dict[str, list[list[float]]]]  # panel -> label of a curve -> its x and its y
Rates = dict[str, dict[str, dict[str, float]]]  # panel -> method -> learning rate -> loss
Intervals = dict[str, dict[str, list[float]]]  # panel -> difference -> mean, low, high


@contextmanager
def drawing(title: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of a size in inches, with its title."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "figures", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
        yield figure


def save(figure: Figure, file: Path, title: str, numbers: Any) -> None:
    """Write a figure as an SVG that is the same for the same numbers."""
    figure.savefig(file, metadata={"Date": None, "Title": title, "Description": json.dumps(numbers)})


def shown(file: Path) -> Any:
    """The numbers in a plot's description."""
    description = re.search(r"<dc:description>(.*?)</dc:description>", file.read_text(encoding="utf-8"), re.S)
    return json.loads(html.unescape(description[1])) if description else None


def bars(panels: Panels, title: str, unit: str, file: Path, line: tuple[float, str] | None = None) -> None:
    """Draw horizontal bars, a panel a key."""
    longest = max(len(panel) for panel in panels.values())
    with drawing(title, (9, 0.75 + 0.27 * longest)) as figure:
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
        save(figure, file, title, panels)


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
    """Draw curves, a panel a key.

    Args:
        panels: the numbers.
        title, x, y: of the figure and its axes.
        file: to write.
        looks: keywords of ``Axes.plot`` by label.
        ticks: of the x axis.
        log: whether the x axis is logarithmic.
    """
    with drawing(title, (9, 3.3)) as figure:
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
        save(figure, file, title, panels)


def rates(panels: Rates, title: str, file: Path) -> None:
    """Draw loss over learning rate, a line a method with a ring around its best rate; a panel a family of methods."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with drawing(title, (9, 1.1 + 3.1 * -(-len(panels) // 2))) as figure:
        grid = [*figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False, sharey=True).flat]
        lowest = min(loss for methods in panels.values() for losses in methods.values() for loss in losses.values())
        grid[0].set_ylim(lowest - 0.05 * HEIGHT, lowest + HEIGHT)  # of all panels; what diverges leaves the frame
        for axis, (name, methods) in zip(grid, panels.items(), strict=False):
            for (method, losses), colour in zip(methods.items(), COLOURS * 3, strict=False):
                rates = [float(rate) for rate in losses]
                line: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.4}
                axis.plot(rates, [*losses.values()], label=method, **line)
                best = min(losses, key=losses.__getitem__)
                ring: dict[str, Any] = {"facecolors": "none", "edgecolors": colour, "s": 70, "linewidths": 1.2}
                axis.scatter([float(best)], [losses[best]], **ring)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}".replace("e-0", "e-")))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(name, loc="left", fontsize=9, color=INK)
            axis.set_xlabel("learning rate", color=INK)
            axis.grid(alpha=0.25)
            axis.tick_params(colors=INK)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=8)
        for axis in grid[len(panels) :]:
            axis.set_visible(False)
        save(figure, file, title, panels)


def forest(panels: Intervals, title: str, file: Path) -> None:
    """Draw differences with their intervals, a panel a kind; orange lies below 0, blue above, grey holds it."""
    heights = [len(rows) for rows in panels.values()]
    with drawing(title, (9, 0.9 + 0.55 * len(panels) + 0.26 * sum(heights))) as figure:
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        for axis, (name, rows) in zip(axes, panels.items(), strict=True):
            for place, (mean, low, high) in enumerate(rows.values()):
                colour = OURS if high < 0 else COLOURS[1] if low > 0 else OTHERS
                axis.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
                axis.plot([mean], [place], color=colour, marker="o", markersize=5)
            axis.axvline(0, color=INK, linewidth=1, linestyle=":", zorder=0)
            axis.set_yticks(range(len(rows)), [*rows])
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.set_title(name, loc="left", fontsize=9, color=INK)
            axis.tick_params(colors=INK, length=0)
            axis.grid(axis="x", alpha=0.25)
            axis.spines[["top", "right", "left"]].set_visible(False)
        axes[-1].set_xlabel("difference in eval loss, nats per token, with its 95 % interval", color=INK)
        save(figure, file, title, panels)
