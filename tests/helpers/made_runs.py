"""Folders of runs and studies as the commands write them, for tests of reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from galore_trainer.run.settings.run_config import RunConfig

RANKS, SEEDS, STEPS, GAP = (16, 32, 64), (0, 1, 2), 100, 20


def make_result(rank: int = 16, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A result as a run writes it; figures differ in every run."""
    k = RANKS.index(rank) if rank in RANKS else 0
    settings = {
        "model_name_or_path": "/home/somebody/models/small",
        "max_steps": STEPS,
        "seed": seed,
        "galore": {"rank": rank, "update_proj_gap": GAP},
        "output_dir": f"/home/somebody/runs/{rank}-{seed}",
    }
    config = RunConfig.from_dict({**settings, **changes.pop("settings", {})})
    score = 0.4 + 0.05 * k + 0.01 * seed**2
    forward, refresh, update = 8.0 + seed, 0.5 + 0.25 * k, 1.0
    return {
        "method": config.method,
        "task": "arithmetic",
        "seed": seed,
        "steps": STEPS,
        "resumed_from_step": None,
        "score_before": None,
        "score_after": {
            "task": "arithmetic",
            "n": 200,
            "metric": "exact_match_flexible",
            "extract": "flexible",
            "score": score,
            "interval": [score - 0.07, score + 0.06],
            "eval_loss": 0.5 - 0.1 * k + 0.01 * seed,
        },
        "seconds": {
            "training": forward + refresh + update,
            "forward_backward": forward,
            "refresh": refresh,
            "update": update,
            "evaluation": 3.0,
        },
        "peak_memory": {"peak_bytes": (100 + rank + seed) * 2**20, "meaning": "allocated on the device"},
        "optimizer_state_bytes": {"basis": rank * 2**20, "moments": rank * 2**21, "plain": 2**20},
        "projection_error": {"mean": 0.2 - 0.05 * k, "excess": 0.01, "sharing_excess": 2.5, "by_matrix": {}},
        "environment": {
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "platform": "Linux x86_64",
            "device": "H100",
            "accelerators": 1,
            "cores": 8,
            "commit": "abc123",
            "uncommitted_changes": False,
        },
        "config": config.to_dict(),
    } | changes


def write_run(folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    rows = [{"step": step, "loss": 2.0 / step} for step in range(1, STEPS + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_study(folder: Path, *, jobs: int = 1, timing: bool = True) -> Path:
    cells = []
    for rank in RANKS:
        runs = []
        for seed in SEEDS:
            name = f"rank-{rank}/seed-{seed}"
            write_run(folder / name, make_result(rank, seed))
            runs.append({"seed": seed, "folder": name, "status": "finished", "exclusive": jobs == 1, "reason": None})
        if jobs > 1 and timing:
            quick = make_result(rank, 0, steps=40, settings={"max_steps": 40})
            shares = {"training": 0.4, "forward_backward": 0.3, "refresh": 0.04, "update": 0.06}
            quick["seconds"] = {part: share * rank for part, share in shares.items()}
            write_run(folder / f"rank-{rank}/timing", quick)
        cells.append(
            {
                "name": f"rank {rank}",
                "slug": f"rank-{rank}",
                "values": {"galore.rank": rank},
                "runs": runs,
                "timing": {},
            }
        )
    content = {
        "name": "rank",
        "title": "Rank & file",
        "question": "How many <directions>?",
        "base": "arithmetic",
        "metrics": ["score", "eval_loss", "fine_tuning_seconds"],
        "cells": cells,
        "commands": ["galore-ft ablate rank data.source=/home/somebody/data/train.json --output-dir runs/rank"],
    }
    (folder / "study.json").write_text(json.dumps(content))
    return folder


def change_runs(folder: Path, change: Any) -> None:
    """Change the records in a study's file."""
    record = json.loads((folder / "study.json").read_text())
    for cell in record["cells"]:
        for run in cell["runs"]:
            change(cell, run)
    (folder / "study.json").write_text(json.dumps(record))


def tables(markdown: str) -> dict[str, dict[str, dict[str, str]]]:
    """Cells of the report's tables by heading, row and column; a row that stands twice gets a ' (2)'."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for section in markdown.split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        if rows:
            head, _, *body = rows
            table: dict[str, dict[str, str]] = {}
            for row in body:
                name = row[0] if row[0] not in table else f"{row[0]} (2)"
                table[name] = dict(zip(head, row, strict=True))
            found[section.splitlines()[0]] = table
    return found
