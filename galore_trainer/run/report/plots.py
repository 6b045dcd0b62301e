"""A report's plots: score and loss against what was varied, time by part, projection error against its cost."""

from __future__ import annotations

import io
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from galore_trainer.run.report.pages import Plot
from galore_trainer.run.report.runs import Group, ReportData, cell_values, is_number, score_interval
from galore_trainer.run.results.artifacts import smoothed
from galore_trainer.run.results.columns import PARTS, Column, columns
from galore_trainer.run.results.shapes import LARGEST
from galore_trainer.run.study.grid import short_names

INK = "#3b3f44"  # letters and axes; the page's own colour in the SVG
COLOURS = ("#3b82c4", "#e07b39", "#3a9d6a", "#c2477f", "#8a6fd1", "#b59a2d", "#4bacb8", "#8c8c8c")
MARKERS = "osD^vP*X"
RANGE_OF_A_LOG_AXIS = 8.0
STYLE: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "report",
    "axes.grid": True,
    "grid.color": "#888888",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.parse_math": False,
}


def make_plots(data: ReportData) -> dict[str, Plot]:
    """Every figure for which the runs have data, by the section it belongs to: quality, loss, time, projection."""
    makers: dict[str, Callable[[ReportData], tuple[Figure, str] | None]] = {
        "quality": _score,
        "loss": _losses,
        "time": _time,
        "projection": _projection,
    }
    names = {"quality": "score", "loss": "loss", "time": "time", "projection": "projection"}
    plots = {}
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a name in other letters
        for section, make in makers.items():
            drawn = make(data)
            if drawn is not None:
                plots[section] = _export(names[section], *drawn)
    return plots


# ------------------------------------------------------------------------------------------ the figures


def _score(data: ReportData) -> tuple[Figure, str] | None:
    table = columns(run.result for run in data.runs)
    shown = [table[key] for key in ("score", "eval_loss") if any(_values(data, table[key]))]
    if not shown:
        return None
    axis = _numeric_axis(data)
    figure = _figure(9.0, 3.4 if axis else 1.3 + 0.34 * len(data.groups))
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=axis is None)[0]
    for panel, column in zip(panels, shown, strict=True):
        _against_values(panel, data, column, axis)
    if axis is None:
        panels[0].set_yticks(range(len(data.groups)), [group.name for group in data.groups])
        panels[0].invert_yaxis()
    what = axis[0] if axis else "cell"
    return figure, f"{' and '.join(column.title for column in shown)} for each {what}; {_bars(data)}"


def _against_values(panel: Axes, data: ReportData, column: Column, axis: tuple[str, list[float]] | None) -> None:
    """One figure of merit: along a numeric axis, or one line of the plot for each cell."""
    values = _values(data, column)
    places = axis[1] if axis else [float(i) for i in range(len(values))]
    present = [i for i, cell in enumerate(values) if cell]
    means = [column.factor * statistics.fmean(values[i]) for i in present]
    errors = [_error(data.groups[i], column, values[i]) for i in present]
    spread = [list(side) for side in zip(*errors, strict=True)]
    positions = [places[i] for i in present]
    seeds = [(places[i], column.factor * value) for i in present for value in values[i] if len(values[i]) > 1]
    points: dict[str, Any] = {"facecolors": "none", "edgecolors": INK, "s": 20, "zorder": 5, "linewidths": 0.8}
    bars: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "markersize": 6, "capsize": 3, "zorder": 4}
    if axis:
        panel.errorbar(positions, means, yerr=spread, linewidth=1.6, **bars)
        if seeds:
            panel.scatter(*zip(*seeds, strict=True), **points)
        _scale(panel, positions)
        panel.set_xticks(positions, labels=[f"{tick:g}" for tick in positions])
        panel.set_xticks([], minor=True)
        panel.set(xlabel=axis[0], title=column.title)
        panel.set_ylim(*_from_zero(*panel.get_ylim()))
    else:
        panel.errorbar(means, positions, xerr=spread, linestyle="none", **bars)
        if seeds:
            panel.scatter([v for _, v in seeds], [p for p, _ in seeds], **points)
        panel.set(title=column.title)
        panel.margins(y=0.12)
        panel.set_xlim(*_from_zero(*panel.get_xlim()))


def _time(data: ReportData) -> tuple[Figure, str] | None:
    table = columns(run.result for run in data.runs)
    groups = [group for group in data.groups if cell_values(data, group, table["seconds_per_step"])]
    if not groups:
        return None
    figure = _figure(9.0, 1.2 + 0.38 * len(groups))
    panel = figure.subplots()
    left = [0.0] * len(groups)
    for (key, name), colour in zip(PARTS.items(), COLOURS, strict=False):
        widths = [statistics.fmean(cell_values(data, group, table[key]) or [0.0]) for group in groups]
        panel.barh(range(len(groups)), widths, left=left, height=0.62, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, total in enumerate(left):
        panel.annotate(f"{total:.3g}", (total, i), xytext=(4, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(groups)), [group.name for group in groups])
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.margins(x=0.08)
    panel.set_xlim(left=0.0)
    how = "exclusive pass" if data.exclusive_pass else "mean over seeds"
    panel.set(xlabel="seconds per step", title=f"Where time goes ({how})")
    figure.legend(loc="outside upper right", ncols=len(PARTS))
    return figure, f"Seconds per training step by part, {how}: {', '.join(PARTS.values())}"


def _projection(data: ReportData) -> tuple[Figure, str] | None:
    table = columns(run.result for run in data.runs)
    price, error = table["refresh_seconds"], table["projection_error"]
    points = [(group.name, cell_values(data, group, price), cell_values(data, group, error)) for group in data.groups]
    points = [point for point in points if point[1] and point[2]]
    if not points:
        return None
    figure = _figure(7.0, 3.6)
    panel = figure.subplots()
    for i, (name, prices, errors) in enumerate(points):
        panel.errorbar(
            price.factor * statistics.fmean(prices),
            statistics.fmean(errors),
            xerr=price.factor * _deviation(prices),
            yerr=_deviation(errors),
            label=name,
            linestyle="none",
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i // len(COLOURS) % len(MARKERS)],
            markersize=7,
            capsize=3,
        )
    if _scale(panel, [price.factor * statistics.fmean(prices) for _, prices, _ in points]):
        _plain_numbers(panel.xaxis)
    panel.margins(0.15)
    panel.set(
        xlabel=price.title, ylabel="projection error (mean over matrices)", title="What a refresh costs and gives"
    )
    figure.legend(loc="outside right upper")
    absent = [group.name for group in data.groups if group.runs and group.name not in [name for name, _, _ in points]]
    note = f"; not shown, without a projection or without its time: {', '.join(absent)}" if absent else ""
    return figure, f"Projection error against the time of one refresh of all matrices{note}"


def _losses(data: ReportData) -> tuple[Figure, str] | None:
    kinds = {"loss": "training loss, smoothed", "eval_loss": "eval loss during training"}
    curves = {kind: [(group, list(_curve(group, kind))) for group in data.groups] for kind in kinds}
    shown = [kind for kind in kinds if any(len(curve) > 1 for _, curve in curves[kind])]
    if not shown:
        return None
    figure = _figure(9.0, 3.8)
    for panel, kind in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for i, (group, curve) in enumerate(curves[kind]):
            if not curve:
                continue
            steps = [step for step, _ in curve]
            values = [value for _, value in curve]
            values = smoothed(values) if kind == "loss" else values
            style = ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
            label = group.name if kind == shown[0] else None
            panel.plot(steps, values, color=COLOURS[i % len(COLOURS)], linestyle=style, linewidth=1.5, label=label)
        panel.set(xlabel="step", ylabel="nats per token", title=kinds[kind], yscale="log")
        _plain_numbers(panel.yaxis)
    figure.legend(loc="outside lower center", ncols=min(len(data.groups), 4))
    return figure, f"{' and '.join(kinds[kind] for kind in shown).capitalize()} against the step, mean over seeds"


def _curve(group: Group, kind: str) -> Iterator[tuple[int, float]]:
    """A loss at the steps that all seeds logged, averaged over them."""
    logs = [{row["step"]: row[kind] for row in run.log if _finite(row.get(kind))} for run in group.runs]
    for step in sorted(set.intersection(*map(set, logs)) if logs else ()):
        yield step, statistics.fmean(log[step] for log in logs)


# ------------------------------------------------------------------------------------------ axes


def _numeric_axis(data: ReportData) -> tuple[str, list[float]] | None:
    """Name and positions of the one numeric setting that was varied; None where cells are names."""
    keys = list(dict.fromkeys(key for group in data.groups for key in group.values))
    values = [group.values.get(keys[0]) if keys else None for group in data.groups]
    if len(keys) != 1 or len(values) < 2 or not all(is_number(value) for value in values):
        return None
    return short_names(keys)[keys[0]], [float(value) for value in values if value is not None]


def _scale(panel: Axes, values: Sequence[float]) -> bool:
    """Make the horizontal axis logarithmic where positive values span a factor of eight, and say so."""
    wide = max(values) >= RANGE_OF_A_LOG_AXIS * min(values) > 0.0
    if wide:
        panel.set_xscale("log")
    return wide


def _from_zero(low: float, high: float) -> tuple[float, float]:
    """Limits without a stretch below zero, where no score and no loss is."""
    if low >= 0.0:
        return low, high
    high = high if high > 0.1 else 1.0
    return -0.03 * high, high


def _plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis as 0.2 and 3, not as powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _values(data: ReportData, column: Column) -> list[list[float]]:
    return [cell_values(data, group, column) for group in data.groups]


def _error(group: Group, column: Column, values: Sequence[float]) -> tuple[float, float]:
    """Lengths of the bar below and above the mean: the deviation over seeds; of a single score its 95 % interval."""
    interval = score_interval(group) if column.key == "score" and len(values) == 1 else None
    if interval:
        return column.factor * max(values[0] - interval[0], 0.0), column.factor * max(interval[1] - values[0], 0.0)
    return (column.factor * _deviation(values),) * 2


def _bars(data: ReportData) -> str:
    several = any(len(group.runs) > 1 for group in data.groups)
    return "bars: standard deviation over seeds" if several else "bars: 95 % interval of the score"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST


# ------------------------------------------------------------------------------------------ files


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _export(name: str, figure: Figure, alt: str) -> Plot:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)  # ids are one space for the whole page
    return Plot(name=name, alt=alt, svg=text, png=png.getvalue())
