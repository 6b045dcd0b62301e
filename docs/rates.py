"""Tables of results/gsm8k_rates, from its runs by ``benchmarks/paired.py``."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from blocks import table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import paired  # noqa: E402 - the line above makes it importable

PAIRS = (
    ("GaLore+ r 128, scaled", "AdamW, embeddings at a quarter"),
    ("GaLore+ r 128, scaled", "AdamW"),
    ("GaLore+ r 128, scaled", "LoRA r 64"),
    ("GaLore+ r 32, scaled", "LoRA r 32"),
    ("GaLore+ r 8, scaled", "GaLore+ r 32, none"),
    ("GaLore+ r 32, scaled", "GaLore+ r 32, none"),
    ("AdamW, embeddings at a quarter", "AdamW"),
    ("GaLore+ r 128, scaled x 2", "GaLore+ r 128, scaled"),
)
SEED = 0


@cache
def runs() -> Any:
    """The runs by method, rate and seed."""
    return paired.read(ROOT / "results" / "gsm8k_rates" / "study.jsonl")


def best(method: str) -> Any:
    """The runs of a method at its best rate, by seed."""
    rates = runs()[method]
    return rates[paired.best_rate(rates)]


def rates_table() -> str:
    """Every rate of every method; the best one is bold."""
    rows = []
    for method, rates in runs().items():
        lowest = paired.best_rate(rates)
        cells = [f"{rate:g}: {seeds[SEED].loss:.4f}" for rate, seeds in sorted(rates.items())]
        marked = [f"**{cell}**" if cell.startswith(f"{lowest:g}:") else cell for cell in cells]
        rows.append((method, ", ".join(marked)))
    return table([("method", "learning rate: eval loss"), *rows])


def pairs_table() -> str:
    """Differences by problem at the best rates."""
    rows = []
    for first, second in PAIRS:
        gap = paired.by_problem(best(first), best(second))
        rows.append((f"{first} - {second}", f"{gap.mean:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"))
    return table([("at the best rates", "difference"), *rows])


def best_table() -> str:
    """docs/evidence.md: the loss of each method at its best rate, the lowest first."""
    losses = sorted((best(method)[SEED].loss, method) for method in runs())
    return table([("method", "eval loss"), *((method, f"{loss:.4f}") for loss, method in losses)])
