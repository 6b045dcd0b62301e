"""results/RESULTS.md and the studies' tables say what the runs say; claims are decided by the preregistered rule."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

import claims
import evidence
import studies
from blocks import read_block
from documents import ROOT
from plots import shown

PROBLEMS = (5, 9, 7, 4, 8)
"""Tokens of each held-out problem of a made study."""
STUDENT_OF_2 = 4.302652730
"""97.5 % quantile of Student's t with two degrees of freedom."""


def make_line(cell: str, seed: int, rate: float, losses: list[float], correct: Sequence[int] = ()) -> dict[str, Any]:
    """A run as study_lines.py packs it, with what pages are written from."""
    method = "galore_plus" if cell.startswith("GaLore+") else "adamw"
    after: dict[str, Any] = {"n": len(PROBLEMS), "metric": None, "score": None, "eval_loss": weighted(losses)}
    if correct:
        after |= {"metric": "exact_match_flexible", "score": sum(correct) / len(correct)}
    result = {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "steps": 10,
        "score_after": after,
        "seconds": {"training": 1.0},
        "peak_memory": {"peak_bytes": 2**30, "meaning": "allocated on the device, weights included"},
        "optimizer_state_bytes": {"moments": 2**20},
        "environment": {"versions": {"python": "3.12.3", "torch": "2.11.0"}, "device": "NVIDIA T", "commit": "a" * 40},
        "config": {"method": method, "galore": {"residual": "scaled"}},
    }
    pairs = [list(pair) for pair in zip(losses, PROBLEMS, strict=True)]
    line = {"cell": cell, "folder": f"{cell}/{seed}", "timing": False, "result": result, "losses": pairs}
    return {**line, "correct": [*correct]} if correct else line


def weighted(losses: list[float]) -> float:
    return sum(loss * n for loss, n in zip(losses, PROBLEMS, strict=True)) / sum(PROBLEMS)


def write_study(root: Path, name: str, lines: list[dict[str, Any]]) -> None:
    ended = {"status": "finished", "reason": None, "exclusive": False}
    cells = [{"name": line["cell"], "runs": [{"seed": line["result"]["seed"], **ended}]} for line in lines]
    left = {"seed": 99, "status": "failed", "reason": "out of memory", "exclusive": False}
    cells += [{"name": "too large", "runs": [left]}]
    record = {"name": name, "title": "T", "question": "Q?", "commands": [f"galore-ft ablate {name}"], "cells": cells}
    head = {"study": record, "examples": [f"p{i}" for i in range(len(PROBLEMS))]}
    (root / name).mkdir(parents=True)
    (root / name / "study.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))


def losses_of(base: float, seed: int) -> list[float]:
    """Losses of the made problems: equal means over problems but for the seed's own shift."""
    return [base + 0.001 * math.sin(seed) + 0.01 * i for i in range(len(PROBLEMS))]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Mapping[str, studies.Study]]:
    """Writes the study over seeds, a base loss for each method, and reads it."""

    def make(bases: Mapping[str, float], seeds: range = claims.SEEDS, **spread: float) -> Mapping[str, studies.Study]:
        lines = []
        for i, (cell, base) in enumerate(bases.items()):
            lines += [
                make_line(cell, seed, 1e-3, losses_of(base + spread.get("by", 0.0) * math.cos(3 * i + seed), seed))
                for seed in seeds
            ]
        write_study(tmp_path, claims.OVER_SEEDS, lines)
        return studies.studies(tmp_path)

    return make


def test_intervals_are_those_of_students_t_and_of_the_ratio_of_means(tmp_path: Path) -> None:
    cells = {"GaLore+ r 8": 0.5, "AdamW": 0.52, "LoRA": 0.51}
    noise = numpy.random.default_rng(0)
    tables = {cell: base + 0.01 * noise.normal(size=(3, len(PROBLEMS))) for cell, base in cells.items()}
    answers = {cell: noise.integers(0, 2, size=(3, len(PROBLEMS))) for cell in cells}
    lines = [
        make_line(cell, seed, 1e-3, tables[cell][seed].tolist(), answers[cell][seed].tolist())
        for cell in cells
        for seed in range(3)
    ]
    write_study(tmp_path, "made", lines)
    study = studies.studies(tmp_path)["made"]
    pair = studies.Pair((study, "GaLore+ r 8"), (study, "AdamW"))

    tokens = numpy.array(PROBLEMS, dtype=float)
    gaps = tables["GaLore+ r 8"] - tables["AdamW"]
    seeds = gaps @ tokens / tokens.sum()
    half = STUDENT_OF_2 * math.sqrt(((seeds - seeds.mean()) ** 2).sum() / 2 / 3)
    found = pair.by_seed()
    assert (found.mean, found.n) == (pytest.approx(seeds.mean()), 3)
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((half, half), rel=1e-4)  # of 4 digits

    means = gaps.mean(0)
    ratio = (means * tokens).sum() / tokens.sum()
    half = 1.96 * numpy.std(tokens * (means - ratio), ddof=1) / tokens.mean() / math.sqrt(len(tokens))
    found = pair.by_problem()
    assert (found.mean, found.high - found.mean) == pytest.approx((ratio, half))

    (row,) = [line for line in evidence.page_of(study, {"made": study}).splitlines() if line.startswith("| AdamW - ")]
    right = 100 * (answers["AdamW"] - answers["GaLore+ r 8"]).mean()
    assert row.count(f"{right:+.1f} [") == 2, "exact match by seed and by problem"
    assert f"| {studies.shown(studies.Pair(pair.second, pair.first).by_seed())} |" in row


@pytest.mark.parametrize(
    ("second", "verdicts"),
    [
        (0.52, ["holds", "holds", "holds"]),
        (0.48, ["fails", "fails", "fails"]),
        (0.5, ["undecided", "undecided", "holds"]),
        (0.497, ["fails", "fails", "holds"]),
    ],
)
def test_claims_are_decided_by_the_interval_over_eight_seeds(made: Any, second: float, verdicts: list[str]) -> None:
    ours = ("GaLore+ r 128, scaled", "GaLore+ r 32, scaled", "GaLore+ r 8, scaled")
    theirs = ("AdamW", "AdamW, embeddings at a quarter", "LoRA r 64", "LoRA r 32", "GaLore+ r 32, none")
    all_of = made(dict.fromkeys(ours, 0.5) | dict.fromkeys(theirs, second), by=0.001)
    found = [claims.verdict(claims.outcomes(claim, all_of)) for claim in claims.CLAIMS]
    assert found == verdicts
    text = evidence.summary(all_of)
    for number, came in enumerate(verdicts, 1):
        assert f"**Claim {number}, that {claims.CLAIMS[number - 1].text}, {claims.said(came)}**" in text  # type: ignore[arg-type]
    assert "over 8 seeds)" in text


def test_not_worse_is_undecided_where_the_interval_holds_0_and_the_margin() -> None:
    gap = studies.paired.Difference
    assert claims.decide(gap(0.002, -0.001, 0.006, 8), 0.005) == "undecided"
    assert claims.decide(gap(0.003, 0.001, 0.006, 8), 0.005) == "fails"
    assert claims.decide(gap(0.003, 0.001, 0.0049, 8), 0.005) == "holds"
    assert claims.decide(gap(-0.001, -0.002, 0.0, 8), 0.0) == "undecided"


def test_claims_and_seeds_are_those_that_were_preregistered() -> None:
    text = (studies.RESULTS / "PREREGISTRATION.md").read_text(encoding="utf-8")
    for number, claim in enumerate(claims.CLAIMS, 1):
        assert f"\n{number}. {claim.text}.\n" in text
    assert f"eight seeds ({claims.SEEDS[0]} to {claims.SEEDS[-1]};" in text
    margins = {comparison.margin for claim in claims.CLAIMS for comparison in claim.comparisons} - {0.0}
    assert [f"below {margin:g}" in text for margin in margins] == [True]
    planned = yaml.safe_load((ROOT / "benchmarks" / "studies" / f"{claims.OVER_SEEDS}.yaml").read_text())
    names = {name for claim in claims.CLAIMS for c in claim.comparisons for name in (c.first, *c.second)}
    assert names <= {cell["name"] for cell in planned["cells"]}
    assert planned["seeds"] == [*claims.SEEDS]


def test_a_study_of_several_seeds_or_of_other_examples_is_compared_with_its_first_method(tmp_path: Path) -> None:
    write_study(tmp_path, claims.SEARCH, [make_line("GaLore+ r 128, scaled", 0, 1e-3, losses_of(0.5, 0))])
    ranks = [make_line(f"r {rank}", seed, 1e-3, losses_of(0.5, seed)) for rank in (16, 64) for seed in range(3)]
    write_study(tmp_path, "ranks", ranks)
    all_of = studies.studies(tmp_path)
    assert [pair.name for pair in evidence.pairs_of(all_of["ranks"], all_of)] == ["r 64 - r 16"]
    without = [{**line, "losses": []} for line in ranks]
    write_study(tmp_path, "without", without)
    all_of = studies.studies(tmp_path)
    assert evidence.pairs_of(all_of["without"], all_of) == []
    assert "| r 16 |" in evidence.page_of(all_of["without"], all_of)


def test_adamw_counts_at_its_better_setting(made: Any) -> None:
    bases = {"GaLore+ r 128, scaled": 0.5, "AdamW": 0.52, "AdamW, embeddings at a quarter": 0.49, "LoRA r 64": 0.52}
    all_of = made(bases, by=0.001)
    adamw, lora = claims.outcomes(claims.CLAIMS[0], all_of)
    assert (adamw.verdict, lora.verdict) == ("fails", "holds")
    assert adamw.pair is not None
    assert adamw.pair.second[1] == "AdamW, embeddings at a quarter"


@pytest.mark.parametrize(("quarter", "verdict"), [(0.49, "fails"), (0.51, "not run yet")])
def test_one_setting_of_adamw_on_all_seeds_can_refute_a_claim_and_cannot_show_it(
    quarter: float, verdict: str, tmp_path: Path
) -> None:
    cells = {"GaLore+ r 128, scaled": (0.5, 8), "AdamW, embeddings at a quarter": (quarter, 8), "AdamW": (0.6, 7)}
    lines = [
        make_line(cell, seed, 1e-3, losses_of(base, seed))
        for cell, (base, seeds) in cells.items()
        for seed in claims.SEEDS[:seeds]
    ]
    write_study(tmp_path, claims.OVER_SEEDS, lines)
    assert claims.outcome(claims.CLAIMS[0].comparisons[0], studies.studies(tmp_path)).verdict == verdict


def test_too_few_seeds_and_no_study_are_not_run_yet(made: Any, tmp_path: Path) -> None:
    bases = dict.fromkeys(("GaLore+ r 32, scaled", "LoRA r 32", "GaLore+ r 8, scaled"), 0.5)
    few = made(bases, range(1, 4), by=0.001)
    (part,) = claims.outcomes(claims.CLAIMS[1], few)
    assert (part.verdict, part.seeds) == ("not run yet", 3)
    assert part.pair is not None
    assert part.pair.by_seed().n == 3
    assert f"{claims.CLAIMS[1].text}, is not run yet**: 3 of 8 seeds" in evidence.summary(few)
    nothing: Mapping[str, studies.Study] = studies.studies(tmp_path / "nothing")
    assert nothing == {}
    for text in evidence.blocks(nothing).values():
        assert text
    assert evidence.rate_curves(nothing) == evidence.differences(nothing) == {}


def test_other_seeds_than_the_preregistered_ones_do_not_count(made: Any) -> None:
    bases = {"GaLore+ r 32, scaled": 0.5, "LoRA r 32": 0.52}
    all_of = made(bases, range(0, 8), by=0.001)
    (part,) = claims.outcomes(claims.CLAIMS[1], all_of)
    assert (part.verdict, part.seeds) == ("not run yet", 7)


def test_a_method_that_no_claim_names_stands_beside_claim_1(made: Any) -> None:
    bases = {"GaLore+ r 128, joint": 0.49, "AdamW": 0.5, "AdamW, embeddings at a quarter": 0.51, "LoRA r 64": 0.52}
    pairs = evidence.beside(made(bases, by=0.001)[claims.OVER_SEEDS])
    assert [pair.name for pair in pairs] == ["GaLore+ r 128, joint - AdamW", "GaLore+ r 128, joint - LoRA r 64"]


def test_changes_stand_against_the_same_rank_of_the_search(tmp_path: Path) -> None:
    search = [
        make_line(f"{cell}, learning_rate {rate}", 0, rate, losses_of(base + rate, 0))
        for cell, base in {"GaLore+ r 128, scaled": 0.5, "GaLore+ r 32, scaled": 0.6}.items()
        for rate in (1e-4, 2e-4)
    ]
    cells = {"r 128, joint basis": 0.49, "r 32, joint basis": 0.61, "r 256": 0.5002}
    write_study(tmp_path, claims.SEARCH, search)
    write_study(tmp_path, evidence.CHANGES, [make_line(c, 0, 4e-4, losses_of(b, 0)) for c, b in cells.items()])
    all_of = studies.studies(tmp_path)
    text = evidence.changes(all_of)
    assert "| r 128, joint basis - GaLore+ r 128, scaled | -0.0101" in text
    assert "| r 32, joint basis - GaLore+ r 32, scaled | +0.0099" in text
    assert "| r 256 - GaLore+ r 128, scaled | +0.0001" in text
    assert "3 changes: **lower** r 128, joint basis (-0.0101), **higher** r 256 (+0.0001)" in evidence.summary(all_of)
    assert "best at the edge" in (table := evidence.methods(all_of))
    assert re.search(r"^\| GaLore\+ r 32, scaled \| .*\| 0.0001 \| 0.\d{4} \| 2 \| lowest \|$", table, re.M)
    assert "too large, seed 99 (failed: out of memory)" in evidence.unfinished(all_of)


def test_committed_pages_are_those_that_make_results_writes() -> None:
    found = studies.studies()
    stale = [
        f"{page.relative_to(ROOT)}: {name}"
        for (page, name), text in evidence.blocks(found).items()
        if read_block(page, name) != text
    ]
    assert stale == [], "run `make results`"
    for name, (numbers, *_) in evidence.PLOTS.items():
        assert shown(evidence.IMAGES / name) == numbers(found), "run `make results`"


def test_every_marked_block_is_written_by_make_results() -> None:
    written = {(page, name) for page, name in evidence.blocks(studies.studies())}
    for page in (*ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md"), ROOT / "README.md"):
        marks = re.findall(r"<!-- (\w+): written by `make results`", page.read_text(encoding="utf-8"))
        assert {(page, name) for name in marks} <= written


def test_every_table_of_runs_names_where_its_figures_come_from() -> None:
    """Command, commit, device, versions, seeds and n, in a line below it."""
    source = re.compile(
        r"^\w+: `galore-ft ablate .*`; commit [0-9a-f]{7}.*; .*; python 3\S+, torch [\d.]+, transformers [\d.]+.*; "
        r"seeds? \d.*; n = \d+ of \d+ runs( \(.*\))?, \d+ held-out examples\.$",
        re.M,
    )
    tables = {key: text for key, text in evidence.blocks(studies.studies()).items() if "| --- |" in text}
    assert tables
    assert [str(key) for key, text in tables.items() if not source.search(text)] == []


def test_pages_stay_short() -> None:
    pages = {page for page, _ in evidence.blocks(studies.studies())}
    assert {page.name: n for page in pages if (n := len(page.read_text(encoding="utf-8").splitlines())) >= 100} == {}


def test_plots_are_drawn_with_their_figures(tmp_path: Path) -> None:
    found = studies.studies()
    for name, (numbers, draw, title) in evidence.PLOTS.items():
        draw(numbers(found), title, tmp_path / name)
        assert shown(tmp_path / name) == numbers(found)
        again = (tmp_path / name).read_text(encoding="utf-8")
        draw(numbers(found), title, tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8") == again


def test_a_study_without_a_page_gets_one(made: Any) -> None:
    page = evidence.new_page(made({"AdamW": 0.5})[claims.OVER_SEEDS])
    assert "**Asked:** Q?" in page
    assert "\n**Verdict: open" in page
    assert "```bash\ngalore-ft ablate gsm8k_seeds\n" in page
