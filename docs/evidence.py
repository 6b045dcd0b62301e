"""Writes results/RESULTS.md, docs/evidence.md and the tables of the studies' pages: ``make results``.

Every figure comes from ``results/*/study.jsonl``. A study without a page gets one whose verdict is still to be written.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import plots
from blocks import table, write_block
from claims import CLAIMS, OVER_SEEDS, SEARCH, claims_table, outcomes, sentence
from galore_trainer.run.results.columns import columns
from studies import RESULTS, ROOT, Pair, Study, methods_table, paired, pairs_table, rates_table, shown, sources, values
from studies import studies as read_studies

Studies = Mapping[str, Study]
CHANGES, RIVALS = "gsm8k_changes", "gsm8k_rivals"
NAMED = 6  # unfinished runs that the page names; the others are counted
PAGE, EVIDENCE, IMAGES = RESULTS / "RESULTS.md", ROOT / "docs" / "evidence.md", ROOT / "docs" / "images"
PAIRS = {  # beside those of the claims
    SEARCH: (
        ("GaLore+ r 32, scaled", "GaLore+ r 32, none"),
        ("AdamW, embeddings at a quarter", "AdamW"),
        ("GaLore+ r 128, scaled x 2", "GaLore+ r 128, scaled"),
    ),
    OVER_SEEDS: (("GaLore+ r 32, scaled", "GaLore+ r 32, none"), ("AdamW, embeddings at a quarter", "AdamW")),
}
FAMILIES = ("GaLore+, scaled residual", "AdamW and adapters", "GaLore+, other residuals", "other projections")


# --------------------------------------------------------------------------------------------- what is compared


def pairs_of(study: Study, studies: Studies) -> list[Pair]:
    """The comparisons of a study's page.

    Studies of the claims' methods have the claims' pairs. In another one with the seed and the examples of the search
    each method stands against the scaled residual of its rank there, else against the first method of the study.
    """
    if study.name in PAIRS:
        named = [(c.first, second) for claim in CLAIMS for c in claim.comparisons for second in c.second]
        both = [(a, b) for a, b in (*named, *PAIRS[study.name]) if {a, b} <= study.runs.keys()]
        pairs = [Pair((study, first), (study, second)) for first, second in both]
        return pairs + (beside(study) if study.name == OVER_SEEDS else [])
    pairs = [Pair((study, method), reference(study, method, studies)) for method in study.runs]
    return [pair for pair in pairs if pair.first != pair.second and pair.comparable()]


def reference(study: Study, method: str, studies: Studies) -> tuple[Study, str]:
    """What a method is compared with."""
    search = studies.get(SEARCH)
    if search is None or search.examples != study.examples or search.seeds() != study.seeds():
        return study, next(iter(study.runs))
    rank = re.search(r"\br (\d+)\b", method)
    same = f"GaLore+ r {rank[1]}, scaled" if rank else ""
    return search, same if same in search.runs else CLAIMS[0].comparisons[0].first


def beside(study: Study) -> list[Pair]:
    """Methods over seeds that no claim names, against the other side of claim 1."""
    named = {name for claim in CLAIMS for c in claim.comparisons for name in (c.first, *c.second)}
    others = [min((n for n in c.second if n in study.runs), key=study.loss, default="") for c in CLAIMS[0].comparisons]
    return [
        Pair((study, name), (study, other)) for name in study.runs if name not in named for other in others if other
    ]


# ------------------------------------------------------------------------------------------------- the sentences


def summary(studies: Studies) -> str:
    """What holds, what does not, what is noise, and what was tried to mend the rest: one paragraph."""
    parts = ["SmolLM2-135M on GSM8K, loss on held-out problems after one epoch, each method at its best rate."]
    parts += [sentence(number, claim, studies) for number, claim in enumerate(CLAIMS, 1)]
    parts += [noise(studies), mended(studies)]
    return " ".join(part for part in parts if part) + "\n"


def noise(studies: Studies) -> str:
    """How far seeds lie apart, for one setting and for a difference, and which neighbours are not told apart."""
    study, one = studies.get(OVER_SEEDS), one_seed(studies)
    if study is None or one is None:
        return "**What is noise** between seeds is not known yet."
    seeds = [study.best(name) for name in study.runs]
    deviations = [statistics.stdev(run.loss for run in runs.values()) for runs in seeds if len(runs) > 1]
    text = (
        f"**Noise:** over seeds the loss of one setting has a standard deviation of {min(deviations):.4f} to "
        f"{max(deviations):.4f}, and a difference that one seed shows is known to ±{one:.4f}"
    )
    pairs = [Pair((study, a), (study, b)) for a, b in itertools.pairwise(study.ranked())]
    level = [pair for pair in pairs if pair.comparable() and (gap := pair.by_seed()).low <= 0 <= gap.high]
    names = "; ".join(f"{pair.name} {shown(pair.by_seed())}" for pair in level)
    return f"{text}; neighbours that the seeds do not tell apart: {names}." if level else f"{text}."


def one_seed(studies: Studies) -> float | None:
    """Half the 95 % interval about a difference of one seed, from the spread of all differences between methods."""
    study = studies.get(OVER_SEEDS)
    seeds = [study.best(name) for name in study.runs] if study else []
    variances = [
        statistics.variance(a[seed].loss - b[seed].loss for seed in both)
        for a, b in itertools.combinations(seeds, 2)
        if len(both := a.keys() & b.keys()) > 1
    ]
    return paired.NORMAL * math.sqrt(statistics.fmean(variances)) if variances else None


def mended(studies: Studies) -> str:
    """What changes to the method gave on one seed, and what those that were run over seeds gave."""
    study, text = studies.get(CHANGES), ""
    if study is not None:
        gaps = {pair.first[1]: pair.by_problem() for pair in changed(study, studies)}
        sides = {
            "lower": [name for name, gap in gaps.items() if gap.high < 0],
            "not told apart": [name for name, gap in gaps.items() if gap.low <= 0 <= gap.high],
            "higher": [name for name, gap in gaps.items() if gap.low > 0],
        }
        words = [
            f"**{what}** {'; '.join(f'{name} ({gaps[name].mean:+.4f})' for name in names)}"
            for what, names in sides.items()
            if names
        ]
        text = f"**Tried to lower the loss of GaLore+ further**, on one seed, by problem, {len(gaps)} changes: "
        text += ", ".join(words)
        if one := one_seed(studies):
            beyond = [name for name, gap in gaps.items() if abs(gap.mean) > one]
            text += f"; **beyond the noise of one seed** {'; '.join(beyond) or 'none'}"
        text += "."
    over = studies.get(OVER_SEEDS)
    if over and (extra := [pair for pair in beside(over) if pair.comparable()]):
        gaps_of = "; ".join(f"{pair.name} {shown(pair.by_seed())}, n {pair.by_seed().n}" for pair in extra)
        text += f" Over seeds, chosen after the search and so no claim: {gaps_of}."
    return text.strip()


def changed(study: Study, studies: Studies) -> list[Pair]:
    """The pairs of the study of changes, the lowest difference first."""
    return sorted(pairs_of(study, studies), key=lambda pair: pair.by_problem().mean)


# ---------------------------------------------------------------------------------------------------- the tables


def changes(studies: Studies) -> str:
    """Each change against the unchanged method of the search, the lowest difference first."""
    study = studies.get(CHANGES)
    if study is None:
        return not_run(CHANGES)
    pairs = changed(study, studies)
    return pairs_table(pairs) + sources(side[0] for pair in pairs for side in pair)


def methods(studies: Studies) -> str:
    """Every method at its best rate: its loss on the seed of the search, what the search took, its loss over seeds.

    The lowest loss stands first: over seeds where it is known, else of the search.
    """
    over = studies.get(OVER_SEEDS)
    tuned = searches(studies)
    every = [(method, study) for study in tuned for method in study.runs]
    searched = {method for method, _ in every}
    every += [(method, over) for method in (over.runs if over else ()) if over and method not in searched]
    if not every:
        return not_run(SEARCH)
    used = [*tuned, *([over] if over else [])]
    table_of = columns(result for study in used for result in study.results())
    state, loss = table_of["state_bytes"], table_of["eval_loss"]
    rows = []
    for method, study in sorted(every, key=lambda one: (over if over and one[0] in over.runs else one[1]).loss(one[0])):
        runs = [run.result for run in study.best(method).values()]
        row = [method, state.show(values(state, runs)).partition(" ")[0], f"{study.rate(method):g}"]
        count = sum(len(seeds) for seeds in study.runs[method].values())
        row += ["-", "-", ""] if study is over else [f"{study.loss(method):.4f}", str(count), study.at_edge(method)]
        if over:
            seeds = [run.result for run in over.best(method).values()] if method in over.runs else []
            row.append(f"{loss.show(values(loss, seeds))}, n {len(seeds)}" if seeds else "-")
        rows.append(row)
    head = ("method", state.title, "best rate", "eval loss of the search", "its runs", "best at the edge")
    return table([(*head, *["over seeds"] * bool(over)), *rows]) + sources(used)


def searches(studies: Studies) -> list[Study]:
    """The search and that of the rivals, which were scored on the same examples."""
    return [studies[name] for name in (SEARCH, RIVALS) if name in studies]


def loss_row(studies: Studies) -> tuple[str, str, str]:
    """A row of README: the differences of claim 1, by seed where there are several."""
    parts = [(part.comparison, part.pair) for part in outcomes(CLAIMS[0], studies) if part.pair]
    n = min((pair.by_seed().n for _, pair in parts), default=0)
    gaps = []
    for comparison, pair in parts:
        name = f"{comparison.second[0]} (better setting)" if len(comparison.second) > 1 else pair.second[1]
        gaps.append(f"{name} {shown(pair.by_seed() if n > 1 else pair.by_problem())}")
    return (
        "eval loss of rank 128 - another's, 95 % interval",
        ", ".join(gaps),
        f"[RESULTS](results/RESULTS.md), 135M on GSM8K, {f'{n} seeds' if n > 1 else 'one seed, by problem'}",
    )


def unfinished(studies: Studies) -> str:
    """Studies that are written and have no run, and runs that did not end."""
    written = sorted(path.stem for path in (ROOT / "benchmarks" / "studies").glob("*.yaml"))
    rows = [f"- {not_run(name)}" for name in written if not (RESULTS / name).is_dir()]
    for study in studies.values():
        if names := study.unfinished():
            more = f"; and {len(names) - NAMED} more" if len(names) > NAMED else ""
            rows.append(f"- {study.name}: {'; '.join(names[:NAMED])}{more}.\n")
    return "".join(rows) or "Every written study was run.\n"


def others(studies: Studies) -> str:
    """Studies of this form whose tables stand on their own pages alone."""
    shown_above = {SEARCH, RIVALS, OVER_SEEDS, CHANGES}
    rows = [
        f"- {study.link}: {study.record['question']} {verdict_of(study.name)}.\n"
        for study in studies.values()
        if study.name not in shown_above
    ]
    return "".join(rows) or "None yet.\n"


def verdict_of(name: str) -> str:
    """What a study's page says came of it."""
    page = RESULTS / name / "README.md"
    match = re.search(r"^\*\*Verdict: ([^*]+?)\.?\*\*", page.read_text(encoding="utf-8"), re.M)
    return f"Verdict: {match[1]}" if match else "Not judged yet"


def not_run(name: str) -> str:
    """Instead of the table of a study without runs."""
    return f"Not run yet: `benchmarks/studies/{name}.yaml`.\n"


def page_of(study: Study, studies: Studies) -> str:
    """The tables of a study's page."""
    pairs = pairs_of(study, studies)
    differences = f"\nDifferences at the best rates, with 95 % intervals:\n\n{pairs_table(pairs)}" if pairs else ""
    used = [study, *(side[0] for pair in pairs for side in pair)]
    return (rates_table(study) if study.searches else methods_table(study)) + differences + sources(used)


def new_page(study: Study) -> str:
    """A page for a study that has none: what was asked, the command, the tables, and a verdict still to be written."""
    record = study.record
    command = record["commands"][0] if record["commands"] else f"galore-ft ablate benchmarks/studies/{study.name}.yaml"
    return (
        f"# {record['title']}\n\n**Asked:** {record['question']}\n\n**Verdict: open, not judged yet.**\n\n"
        f"```bash\n{command}\n```\n\n<!-- tables: written by `make results` from study.jsonl -->\n"
        "<!-- end of tables -->\n\nEvery run and the loss of each example: [study.jsonl](study.jsonl).\n"
    )


def blocks(studies: Studies) -> dict[tuple[Path, str], str]:
    """Every generated text: (page, name of its block) -> text."""
    makers: dict[str, Callable[[Studies], str]] = {
        "summary": summary,
        "claims": claims_table,
        "methods": methods,
        "changes": changes,
        "others": others,
        "unfinished": unfinished,
    }
    whole = {(PAGE, name): make(studies) for name, make in makers.items()}
    whole |= {(EVIDENCE, name): makers[name](studies) for name in ("summary", "claims")}
    return whole | {
        (RESULTS / study.name / "README.md", "tables"): page_of(study, studies) for study in studies.values()
    }


# ----------------------------------------------------------------------------------------------------- the plots


def rate_curves(studies: Studies) -> plots.Rates:
    """Mean loss at every learning rate: family -> method -> rate -> loss."""
    panels: plots.Rates = {name: {} for name in FAMILIES}
    for study in searches(studies):
        for method, rates in study.runs.items():
            if len(rates) > 1:
                losses = {
                    f"{rate:g}": round(statistics.fmean(run.loss for run in seeds.values()), 4)
                    for rate, seeds in sorted(rates.items())
                }
                panels[family(study, method)][method] = losses
    return {name: methods for name, methods in panels.items() if methods}


def family(study: Study, method: str) -> str:
    """The panel of a method."""
    config = next(iter(study.best(method).values())).result["config"]
    if config["method"].startswith("galore_plus"):
        return FAMILIES[0 if config["galore"]["residual"] in ("scaled", "auto") else 2]
    return FAMILIES[1 if config["method"] in ("adamw", "adamw_8bit", "lora", "dora") else 3]


def differences(studies: Studies) -> plots.Intervals:
    """Intervals of the claims, by seed where there are several and by problem, and of the changes.

    Returns:
        panel -> difference -> mean, low, high.
    """
    pairs = [part.pair for claim in CLAIMS for part in outcomes(claim, studies) if part.pair]
    counts = sorted({pair.by_seed().n for pair in pairs})
    several = [pair for pair in pairs if pair.by_seed().n > 1]
    seeds = f"mean over {' or '.join(map(str, counts))} seeds" if several else "one seed"
    panels = {
        f"claims, by seed, n {' or '.join(map(str, counts))}": {pair.name: ends(pair.by_seed()) for pair in several},
        f"claims, by problem, {seeds}": {pair.name: ends(pair.by_problem()) for pair in pairs},
    }
    if study := studies.get(CHANGES):
        tried = {pair.name: ends(pair.by_problem()) for pair in changed(study, studies)}
        panels["changes, by problem, one seed"] = tried
    return {name: rows for name, rows in panels.items() if rows}


def ends(gap: paired.Difference) -> list[float]:
    """Mean, low, high."""
    return [round(value, 5) for value in (gap.mean, gap.low, gap.high)]


PLOTS: dict[str, tuple[Callable[[Studies], Any], Callable[[Any, str, Path], None], str]] = {
    "rates.svg": (rate_curves, plots.rates, "Eval loss over learning rate, GSM8K, one epoch of SmolLM2-135M"),
    "differences.svg": (differences, plots.forest, "Paired differences in eval loss: below 0 the first one is better"),
}


def main() -> None:
    """Write everything."""
    studies = read_studies()
    for study in studies.values():
        page = RESULTS / study.name / "README.md"
        if not page.is_file():
            page.write_text(new_page(study), encoding="utf-8")
            print(f"new page: write a verdict in {page.relative_to(ROOT)} and a line in results/README.md")
    for (page, name), text in blocks(studies).items():
        write_block(page, name, text)
    for name, (numbers, draw, title) in PLOTS.items():
        draw(numbers(studies), title, IMAGES / name)


if __name__ == "__main__":
    main()
