"""The ratios that ``bench all`` reports, each with its upper bound."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from galore_trainer.run.bench.e2e import bench_e2e
from galore_trainer.run.bench.measure import percentile, ratio
from galore_trainer.run.bench.refresh import USUAL, bench_refresh, spread
from galore_trainer.run.bench.step import bench_step
from galore_trainer.run.bench.weights import Bench

PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {"step": bench_step, "refresh": bench_refresh, "e2e": bench_e2e}
Parts = dict[str, dict[str, Any]]


def _step(parts: Parts, name: str, other: str | None) -> dict[str, float]:
    timings = parts["step"]["timings"]
    return ratio(timings[name], timings[other] if other else parts["step"]["floor"])


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
    ("step", "step: GaLore+, residual / AdamW fused", 0.85, lambda f, _: _step(f, "GaLore+, residual", "AdamW fused")),
    ("refresh", "refresh: GaLore+ / galore-torch", 1 / 500, lambda f, _: _refresh(f)),
    ("e2e", "refresh a step / forward and backward", 0.01, _refresh_share),
    ("e2e", "step with staggered refresh: 99th percentile / median", 1.10, lambda f, _: _tail(f)),
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
