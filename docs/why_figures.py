"""Plots and tables of docs/why.md, from what ``benchmarks/why.py`` wrote into results/why."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from blocks import table
from plots import INK, OTHERS, OURS, Curves, curves

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "results" / "why" / "why.json"
IMAGES = ROOT / "docs" / "images"
HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARED, JOINT = HEADS[:3], ("o_proj", "gate_proj", "up_proj", "down_proj")
ALL = (*SHARED, *JOINT)
RANK = 32
Row = dict[str, Any]


@cache
def measured() -> Any:
    """The content of results/why/why.json, and tables that it lacks from other runs in the folder."""
    content: dict[str, Any] = {}
    for path in (*sorted(SOURCE.parent.glob("*.json")), SOURCE):
        content |= json.loads(path.read_text(encoding="utf-8"))
    return content


def mean(rows: Iterable[Row], column: str) -> float:
    """The mean of a column, to three digits."""
    return round(statistics.fmean(row[column] for row in rows), 3)


def where(name: str, **wanted: Any) -> list[Row]:
    """The rows of a table whose columns have the wanted values; a tuple allows any of its values."""
    fits: dict[str, Sequence[Any]] = {k: v if isinstance(v, tuple) else (v,) for k, v in wanted.items()}
    rows = [row for row in measured()[name] if all(row[key] in values for key, values in fits.items())]
    assert rows, f"no row of {name} has {wanted}"
    return rows


def steps() -> list[int]:
    """The steps of all measures."""
    at: list[int] = measured()["settings"]["at"]
    return at


def ranks() -> list[int]:
    """The ranks that were measured."""
    return sorted({row["rank"] for row in measured()["signal"]})


def kinds(names: Sequence[str]) -> str:
    """Modules in words."""
    return ", ".join(name.removesuffix("_proj") for name in names)


# ---------------------------------------------------------------------- curves


def heads_curves() -> Curves:
    """Similarity of heads' subspaces by layer, at the first and the last step."""
    layers = measured()["settings"]["layers"]

    def line(kind: str, step: int, column: str) -> list[list[float]]:
        values = [where("heads", kind=kind, rank=RANK, step=step, layer=layer)[0][column] for layer in layers]
        return [layers, values]

    return {
        kind.removesuffix("_proj"): {
            "two heads, first step": line(kind, steps()[0], "similarity"),
            "two heads, last step": line(kind, steps()[-1], "similarity"),
            "one head, two batches, last step": line(kind, steps()[-1], "same_head_other_batch"),
            "chance": line(kind, steps()[-1], "chance"),
        }
        for kind in HEADS
    }


def drift_curves() -> Curves:
    """Similarity of subspaces, and energy kept, against the number of steps between them.

    All curves begin at the same steps: those that were looked at after every lag, without the first step.
    """
    lags = sorted({row["lag"] for row in measured()["drift"]})
    starts = {lag: {row["step"] for row in measured()["drift"] if row["lag"] == lag} for lag in lags}
    whole = tuple(sorted(set.intersection(*starts.values()) - {steps()[0]}) or steps()[:1])
    same = [row for row in measured()["same_data"] if row["step"] in whole and row["rank"] == RANK]
    gaps = sorted({row["to"] - row["step"] for row in same})

    def training(column: str) -> list[list[float]]:
        return [[*lags], [mean(where("drift", lag=lag, rank=RANK, step=whole), column) for lag in lags]]

    def same_data(column: str, at_once: float, several: bool) -> list[list[float]]:
        rows = [row for row in same if (row["batches"] > 1) == several]
        by_gap = ([row for row in rows if row["to"] - row["step"] == gap] for gap in gaps)
        return [[0, *gaps], [at_once, *(mean(some, column) for some in by_gap)]]

    own = mean(where("drift", lag=0, rank=RANK, step=whole), "kept_by_own")
    return {
        title: {
            "another batch": training(column),
            "the same batch": same_data(column, at_once, several=False),
            "the same mean of several batches": same_data(column, at_once, several=True),
            bound: training(of_bound),
        }
        for title, column, at_once, bound, of_bound in (
            ("similarity of the two bases", "similarity", 1.0, "chance", "chance"),
            ("energy of the later gradient that is kept", "kept", own, "best basis of the later one", "kept_by_own"),
        )
    }


def lost_curves() -> Curves:
    """Share of the energy outside a basis against the rank, for its own batch and for another one."""
    later = tuple(steps()[1:])

    def line(names: Sequence[str], basis: str, other: str) -> list[list[float]]:
        rows = where("lost", kind=tuple(names), step=later)
        return [[*ranks()], [mean(rows, f"{basis}_{rank}{other}") for rank in ranks()]]

    panels: Curves = {}
    for names in (SHARED, JOINT):
        bases = ("joint", "shared") if names == SHARED else ("joint",)
        panels[kinds(names)] = {
            f"{basis} basis, {batch}": line(names, basis, other)
            for basis in bases
            for batch, other in (("its own batch", ""), ("another batch", "_other_batch"))
        }
    return panels


def signal_curves() -> Curves:
    """Cosine between two batches' gradients against the step, inside the basis and outside it."""

    def line(names: Sequence[str], column: str) -> list[list[float]]:
        found = [where("signal", kind=tuple(names), rank=RANK, basis="joint", step=step) for step in steps()]
        return [[*steps()], [mean(rows, column) for rows in found]]

    return {
        kinds(names): {
            "inside the basis": line(names, "cosine_inside"),
            "outside the basis": line(names, "cosine_outside"),
        }
        for names in (SHARED, JOINT)
    }


def limit_curves() -> Curves:
    """Length of the scaled residual beside the projected update, before its limit and after it."""
    at = sorted({row["step"] for row in measured()["update"]})
    return {
        kinds(names): {
            label: [[*at], [mean(where("update", kind=names, step=step), column) for step in at]]
            for label, column in (("as the equation asks", "wanted"), ("after the limit", "done"))
        }
        for names in (SHARED, JOINT[:-1], JOINT[-1:])
    }


# ---------------------------------------------------------------------- tables


def cells(values: Iterable[float]) -> list[str]:
    """Numbers as a table shows them."""
    return [f"{value:.2f}" for value in values]


def heads_table() -> str:
    """Shares of a head's energy that bases keep, at the last step, and what modules have in common."""
    rows = [("", "its own basis", "the joint basis", "another head's basis", "similarity", "chance")]
    columns = ("kept_by_own", "kept_by_joint", "kept_by_other", "similarity", "chance")
    for kind in HEADS:
        found = where("heads", kind=kind, rank=RANK, step=steps()[-1])
        rows.append((kinds([kind]), *cells(mean(found, column) for column in columns)))
    found = where("modules", step=steps()[-1], rank=RANK)
    pairs = (f"{' and '.join(n.removesuffix('_proj') for n in row['kinds'])} {row['similarity']:.2f}" for row in found)
    return table(rows, numbers=5) + f"\nSimilarity of joint bases that have the same inputs: {', '.join(pairs)}.\n"


def sources_table() -> str:
    """What bases keep of a batch that they do not know, by the batches that they come from, after the first step."""
    later = tuple(steps()[1:])
    names = {"one": "one batch", "mean": "the mean of several", "stacked": "several, stacked"}
    head = [f"{what}, {kinds(group)}" for group in (SHARED, JOINT) for what in ("energy", "signal")]
    rows = [("basis from", *head)]
    for source, name in names.items():
        found = [where("sources", kind=group, source=source, rank=RANK, step=later) for group in (SHARED, JOINT)]
        rows.append((name, *cells(mean(some, column) for some in found for column in ("kept", "signal"))))
    return table(rows, numbers=4)


def sides_table() -> str:
    """What bases of either side keep of a batch that they do not know, at the last step."""
    last = max(row["step"] for row in measured()["sides"])
    rows = [(f"step {last}: energy / signal", *(kinds([kind]) for kind in ALL))]
    for side, name in (("left", "left: errors"), ("right", "right: inputs")):
        found = [where("sides", side=side, kind=kind, rank=RANK, step=last)[0] for kind in ALL]
        rows.append((name, *(f"{row['kept']:.2f} / {row['signal']:.2f}" for row in found)))
    return table(rows, numbers=len(ALL))


def signal_table() -> str:
    """What batches have in common, inside and outside the basis, by rank, over all steps but the first."""
    rows = [("rank", "energy outside", "signal outside", "cosine inside", "cosine outside")]
    later = tuple(steps()[1:])
    for rank in ranks():
        found = where("signal", rank=rank, basis="joint", step=later)
        shares = [1.0 - mean(found, column) for column in ("inside", "signal_inside")]
        rows.append((str(rank), *cells(shares), *cells(mean(found, c) for c in ("cosine_inside", "cosine_outside"))))
    return table(rows, numbers=4)


def kinds_table() -> str:
    """Effective rank, what is lost and how concentrated it is, by kind of module, over all steps but the first."""
    percent, later = f"{100 * measured()['settings']['large']:g} %", tuple(steps()[1:])
    noise = measured()["gaussian"]
    head = (
        "participation ratio",
        "stable rank",
        "lost, own batch",
        "lost, another",
        f"largest {percent}; noise: {noise:.2f}",
    )
    rows = [("", *head, f"chosen {percent}: energy", "signal")]
    for kind in ALL:
        found = where("lost", kind=kind, step=later)
        common = where("signal", kind=kind, step=later, rank=RANK, basis="joint")
        effective = [f"{mean(found, column):.1f}" for column in ("participation_ratio", "stable_rank")]
        lost = [mean(found, f"{column}") for column in (f"joint_{RANK}", f"joint_{RANK}_other_batch", f"large_{RANK}")]
        chosen = [mean(common, column) for column in ("large_energy", "large_signal")]
        rows.append((kinds([kind]), *effective, *cells([*lost, *chosen])))
    return table(rows, numbers=7)


def limit_line() -> str:
    """The share of weights whose scaled residual is limited."""
    limited = measured()["limited"]  # from the second step on
    quarter = len(limited) // 4
    parts = [limited[i * quarter : (i + 1) * quarter] for i in range(4)]
    shares = ", ".join(f"{100 * statistics.fmean(part):.0f} %" for part in parts)
    found = where("update", step=steps()[-1])
    cut = 1.0 - mean(found, "done") / mean(found, "wanted")
    return (
        f"Weights whose residual is limited in a step, by quarters of the run: {shares}. In step {steps()[-1]} the "
        f"limit takes {100 * cut:.0f} % of the residual's length.\n"
    )


def run_line() -> str:
    """Where the numbers come from."""
    settings, environment = measured()["settings"], measured()["environment"]
    versions, seconds = environment["versions"], measured()["seconds"]
    return (
        f"{settings['steps']} steps of {settings['batch']}, seed {settings['seed']}; measured at steps "
        f"{', '.join(map(str, settings['at']))} in layers {', '.join(map(str, settings['layers']))} with "
        f"{settings['batches']} held-out batches; {environment['device']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {seconds['all']} s, of which measuring took {seconds['measuring']} s.\n"
    )


# ---------------------------------------------------------------------- the page

SOLID: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.5}
FIRST, SECOND, THIRD = ({**SOLID, "color": colour} for colour in (OURS, "#4878a8", "#6a9a58"))
BOUND: dict[str, Any] = {"color": OTHERS, "linestyle": ":", "linewidth": 1.5}
LOOKS: dict[str, dict[str, Any]] = {
    "two heads, first step": {**SOLID, "color": "#f0bf9a"},
    "two heads, last step": FIRST,
    "one head, two batches, last step": SECOND,
    "chance": BOUND,
    "another batch": FIRST,
    "the same batch": SECOND,
    "the same mean of several batches": THIRD,
    "best basis of the later one": BOUND,
    "joint basis, its own batch": {**SECOND, "linestyle": "--"},
    "joint basis, another batch": SECOND,
    "shared basis, its own batch": {**FIRST, "linestyle": "--"},
    "shared basis, another batch": FIRST,
    "inside the basis": FIRST,
    "outside the basis": SECOND,
    "as the equation asks": {**BOUND, "color": INK},
    "after the limit": FIRST,
}
PLOTS: dict[str, tuple[Callable[[], Curves], str, str, str]] = {
    "why_heads.svg": (heads_curves, f"Similarity of heads' subspaces, rank {RANK}", "layer", "mean squared cosine"),
    "why_lost.svg": (lost_curves, "What a projection loses", "rank", "share of ||G||², mean of later steps"),
    "why_drift.svg": (drift_curves, f"A basis and a later gradient, rank {RANK}", "steps between them", "share"),
    "why_signal.svg": (signal_curves, f"Two batches' gradients, rank {RANK}", "step", "cosine"),
    "why_limit.svg": (limit_curves, "The scaled residual beside the projected update", "step", "||φD|| / ||lift(N)||"),
}


def draw(name: str, file: Path) -> None:
    """Draw one of ``PLOTS``."""
    numbers, title, x, y = PLOTS[name]
    panels = numbers()
    ticks = [float(rank) for rank in ranks()] if x == "rank" else None
    curves(panels, title, x, y, file, looks=LOOKS, ticks=ticks, log=x == "rank")


def draw_all() -> None:
    """Draw ``PLOTS`` into docs/images."""
    for name in PLOTS:
        draw(name, IMAGES / name)


def blocks() -> dict[tuple[Path, str], str]:
    """Page and name of every block with numbers of this study -> text."""
    page = ROOT / "docs" / "why.md"
    readme = SOURCE.parent / "README.md"
    return {
        (page, "run"): run_line(),
        (page, "heads"): heads_table(),
        (page, "sides"): sides_table(),
        (page, "signal"): signal_table(),
        (page, "kinds"): kinds_table(),
        (page, "limit"): limit_line(),
        (readme, "run"): run_line(),
        (readme, "sources"): sources_table(),
    }
