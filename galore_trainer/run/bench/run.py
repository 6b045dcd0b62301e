"""Run parts of the benchmark, print and write their results."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from galore_trainer.run.bench.measure import Timing
from galore_trainer.run.bench.rows import PARTS, lines_of_tails, rows_of
from galore_trainer.run.bench.small import small_bench
from galore_trainer.run.bench.step import line_of, lines
from galore_trainer.run.bench.weights import Bench
from galore_trainer.run.files import check_writable, write_file
from galore_trainer.run.results.artifacts import environment


def run_bench(
    bench: Bench, parts: Sequence[str], rows_file: Path | None, details_file: Path | None, *, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time the parts one after the other.

    Args:
        bench: what to time.
        parts: of ``PARTS``.
        rows_file: takes the ratios, a JSON list.
        details_file: takes settings, environment and every sample.
        say: takes a line of text.

    Returns:
        The rows.

    Raises:
        OptionError: a file that could not be written; nothing was timed.
    """
    for option, path in (("--json", rows_file), ("--details", details_file)):
        if path is not None:
            check_writable(option, path)
    where = environment()
    results: dict[str, dict[str, Any]] = {}
    for part in parts:
        say(f"{part}: {_describe(part, bench)}")
        results[part] = PARTS[part](bench)
        for line in lines(results[part]):
            say(line)
        if "refresh" in results[part]:
            say(line_of("refresh of all weights", results[part]["refresh"]))
        if "svd" in results[part]:
            say(f"{'SVDs of all weights':<36}{results[part]['svd']:10.1f} ms   each shape timed once")
        if "refreshed" in results[part]:
            for line in lines_of_tails(results[part]):
                say(line)
        for name, text in results[part].pop("profiles", {}).items():
            say(f"{name}\n{text}")
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"
    rows = rows_of(results, bench, device=device, commit=where.get("commit"))
    for row in rows:
        text = row.get("note") or f"{row['ratio']:.4g}  ({row['low']:.4g} to {row['high']:.4g})"
        say(f"{row['name']:<66}{text}  at most {row['bound']:.4g}")
    if rows_file is not None:
        write_file(rows_file, json.dumps(rows, indent=1) + "\n")
    if details_file is not None:
        content = {"bench": dataclasses.asdict(bench), "environment": where, "device": device, "found": _plain(results)}
        write_file(details_file, json.dumps(content, indent=1) + "\n")
    return rows


def _describe(part: str, bench: Bench) -> str:
    if part == "small":
        bench = small_bench(bench)
    trains = part in ("small", "e2e")
    layers = bench.model_layers if trains else bench.layers
    batch = f", batch {bench.batch_size} x {bench.length}" if trains else ""
    rank = "" if part == "ranks" else f", rank {bench.rank}"
    size = f"{bench.shape}, {layers} layers{rank}, {bench.dtype}{batch}"
    return f"{size}, {bench.rounds} rounds, kernels {bench.kernels}"


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return value.to_dict()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
