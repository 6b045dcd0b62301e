"""The ratios that ``bench all`` reports, each with its upper bound."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from galore_trainer.run.bench.e2e import bench_e2e
from galore_trainer.run.bench.measure import percentile, quartiles, ratio
from galore_trainer.run.bench.ranks import ADAMW, ALONE, RANKS, SCALED, SPARSE, bench_ranks
from galore_trainer.run.bench.refresh import HIGHER, USUAL, bench_refresh, spread
from galore_trainer.run.bench.small import METHODS, bench_small
from galore_trainer.run.bench.step import SCALED as ALONE_SCALED
from galore_trainer.run.bench.step import bench_step
from galore_trainer.run.bench.weights import Bench

PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "step": bench_step,
    "ranks": bench_ranks,
    "small": bench_small,
    "refresh": bench_refresh,
    "e2e": bench_e2e,
}
Parts = dict[str, dict[str, Any]]


def _step(parts: Parts, name: str, other: str | None) -> dict[str, float]:
    timings = parts["step"]["timings"]
    return ratio(timings[name], timings[other] if other else parts["step"]["floor"])


def _rank(parts: Parts, name: str, other: str | None = None) -> dict[str, float]:
    """A step of several in a row over another one, or over its limit."""
    timings = parts["ranks"]["timings"]
    return ratio(timings[name], timings[other] if other else parts["ranks"]["limits"][name])


def _adds(parts: Parts, name: str) -> dict[str, float]:
    """Milliseconds that a step with a residual takes longer."""
    timings = parts["ranks"]["timings"]
    more = [a - b for a, b in zip(timings[name].ms, timings["r 128"].ms, strict=True)]
    low, high = quartiles(more)
    return {"ratio": statistics.median(more), "low": low, "high": high}


def _small(parts: Parts, what: str, method: str) -> dict[str, float]:
    timings = parts["small"]["timings"]
    return ratio(timings[f"{what}, {method}"], timings[f"{what}, AdamW fused"])


def _training(parts: Parts, name: str, other: str) -> dict[str, float]:
    """Training steps without a refresh."""
    return ratio(parts["e2e"]["timings"][name], parts["e2e"]["timings"][other])


def _higher(parts: Parts, rank: int) -> dict[str, float]:
    timings = parts["refresh"]["timings"]
    return ratio(timings[f"{USUAL}, r {rank}"], timings[USUAL])


def _staggered(parts: Parts) -> dict[str, float]:
    """Mean steps; "low" and "high" are those of the halves."""
    staggered, together = parts["e2e"]["staggered"], parts["e2e"]["together"]
    halves = [statistics.fmean(staggered[half::2]) / statistics.fmean(together) for half in (0, 1)]
    return {"ratio": statistics.fmean(staggered) / statistics.fmean(together), "low": min(halves), "high": max(halves)}


def _e2e(parts: Parts, other: str, gap: int, *, svd: bool = False) -> dict[str, float]:
    """GaLore+ with its share of a refresh, over another method with its share of SVDs."""
    e2e = parts["e2e"]
    return ratio(
        e2e["timings"]["GaLore+"],
        e2e["timings"][other],
        plus=spread(e2e["refresh"], gap),
        other_plus=e2e["svd"] / gap if svd else 0.0,
    )


def _refresh(parts: Parts) -> dict[str, float]:
    return ratio(parts["refresh"]["timings"][USUAL], parts["refresh"]["svd"])


def _refresh_share(parts: Parts, gap: int) -> dict[str, float]:
    share = ratio(parts["e2e"]["timings"]["forward and backward"], spread(parts["e2e"]["refresh"], gap))
    return {"ratio": 1 / share["ratio"], "low": 1 / share["high"], "high": 1 / share["low"]}


def _tail(parts: Parts) -> dict[str, float]:
    times = parts["e2e"]["staggered"]
    halves = [percentile(half, 0.99) / statistics.median(half) for half in (times[::2], times[1::2])]
    return {"ratio": percentile(times, 0.99) / statistics.median(times), "low": min(halves), "high": max(halves)}


def lines_of_tails(e2e: dict[str, Any]) -> list[str]:
    """Median and 99th percentile of steps that refreshed a weight, and of steps that did not.

    The tail of the second kind is noise of the machine.
    """
    pairs = list(zip(e2e["refreshed"], e2e["staggered"], strict=True))
    text = []
    for kind, title in ((True, "steps that refresh a weight"), (False, "steps that refresh none")):
        times = [ms for refreshed, ms in pairs if refreshed == kind]
        if times:
            median, tail = statistics.median(times), percentile(times, 0.99)
            text.append(f"{title:<36}{median:10.3f} ms   99th percentile {tail:.3f}, {tail / median:.3f} of it")
    return text


def _layerwise(parts: Parts, gap: int) -> dict[str, float]:
    timings = parts["e2e"]["timings"]
    below = spread(parts["e2e"]["refresh"], gap)  # layer-wise mode refreshes within its steps
    return ratio(timings["GaLore+, layer-wise"], timings["GaLore+"], other_plus=below)


ROWS: list[tuple[str, str, float, Callable[[Parts, int], dict[str, float]]]] = [
    ("step", "step: GaLore+ / bandwidth floor", 1.35, lambda f, _: _step(f, "GaLore+", None)),
    ("step", "step: GaLore+ / AdamW fused", 0.50, lambda f, _: _step(f, "GaLore+", "AdamW fused")),
    ("step", "step: GaLore+, scaled residual / AdamW fused", 0.60, lambda f, _: _step(f, ALONE_SCALED, "AdamW fused")),
    ("step", "step: GaLore+, residual / AdamW fused", 0.85, lambda f, _: _step(f, "GaLore+, residual", "AdamW fused")),
    *(
        ("ranks", f"steps in a row: r {rank} / limit", bound, lambda f, _, rank=rank: _rank(f, f"r {rank}"))
        for rank, bound in zip(RANKS, (1.15, 1.25, 1.30, 1.35, 1.35), strict=True)
    ),
    ("ranks", "steps in a row: r 512 / AdamW fused", 0.85, lambda f, _: _rank(f, "r 512", ADAMW)),
    ("ranks", "steps in a row: r 1024 / AdamW fused", 1.60, lambda f, _: _rank(f, "r 1024", ADAMW)),
    ("ranks", "steps in a row: scaled residual / AdamW fused", 0.60, lambda f, _: _rank(f, SCALED, ADAMW)),
    ("ranks", "steps in a row: scaled residual adds, ms", 2.0, lambda f, _: _adds(f, SCALED)),
    ("ranks", "steps in a row: sparse residual adds, ms", 2.6, lambda f, _: _adds(f, SPARSE)),
    ("ranks", "steps in a row: 16-bit state / 32-bit", 1.05, lambda f, _: _rank(f, "16-bit state", "r 128")),
    ("ranks", "steps in a row: 8-bit state / 32-bit", 1.15, lambda f, _: _rank(f, "8-bit state", "r 128")),
    ("ranks", "one step alone / a step of several in a row", 1.10, lambda f, _: _rank(f, ALONE, "r 128")),
    *(
        (
            "small",
            f"SmolLM2-135M, {what}: {name} / AdamW fused",
            bound,
            lambda f, _, what=what, name=name: _small(f, what, name),
        )
        for what, bound in (("update", 1.5), ("training", 1.01))
        for name in METHODS
    ),
    ("refresh", "refresh: GaLore+ / galore-torch", 1 / 500, lambda f, _: _refresh(f)),
    *(
        ("refresh", f"refresh: r {rank} / r 128", bound, lambda f, _, rank=rank: _higher(f, rank))
        for rank, bound in zip(HIGHER, (1.6, 3.0), strict=True)
    ),
    ("e2e", "refresh a step / forward and backward", 0.01, _refresh_share),
    ("e2e", "step with staggered refresh: 99th percentile / median", 1.10, lambda f, _: _tail(f)),
    ("e2e", "step with staggered refresh: mean / mean with all at once", 1.01, lambda f, _: _staggered(f)),
    (
        "e2e",
        "training: GaLore+ / forward and backward",
        1.06,
        lambda f, _: _training(f, "GaLore+", "forward and backward"),
    ),
    (
        "e2e",
        "training: clipping inside the step / forward and backward",
        1.04,
        lambda f, _: _training(f, "GaLore+, clipping inside the step", "forward and backward"),
    ),
    (
        "e2e",
        "training: scaled residual / AdamW fused",
        1.00,
        lambda f, _: _training(f, "GaLore+, scaled residual", "AdamW fused"),
    ),
    ("e2e", "training: GaLore+ / galore-torch", 1 / 3.6, lambda f, gap: _e2e(f, "galore-torch", gap, svd=True)),
    ("e2e", "training: GaLore+ / AdamW fused", 1.00, lambda f, gap: _e2e(f, "AdamW fused", gap)),
    ("e2e", "training: GaLore+ / LoRA", 0.75, lambda f, gap: _e2e(f, "LoRA", gap)),
    ("e2e", "training: GaLore+ / DoRA", 0.42, lambda f, gap: _e2e(f, "DoRA", gap)),
    ("e2e", "training: GaLore+ layer-wise / GaLore+", 1.05, _layerwise),
]
"""Part, name, bound, and how the ratio comes from the parts' figures and the gap."""


def rows_of(parts: Parts, bench: Bench, **common: Any) -> list[dict[str, Any]]:
    """The rows of the parts that ran: name, ratio, bound, low, high, unit, and the fields ``common`` to all rows.

    Where a peer is missing, the ratio of its row is None and ``note`` names the peer.
    """
    rows = []
    for part, name, bound, take in ROWS:
        if part not in parts:
            continue
        row: dict[str, Any] = {"name": name, "ratio": None, "bound": bound, "low": None, "high": None, "unit": "ratio"}
        try:
            row |= take(parts, bench.gap)
        except KeyError as missing:
            row["note"] = f"{missing.args[0]} was not timed"
        rows.append({**row, **common})
    return rows
