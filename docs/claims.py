"""The claims of results/PREREGISTRATION.md, and what the runs over seeds say of each by the rule that stands there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from blocks import table
from studies import Pair, Study, paired, shown, sources

Verdict = Literal["holds", "fails", "undecided", "not run yet"]
SEEDS = range(1, 9)
"""Those that decide; the seed that chose the learning rates is not among them."""
SEARCH, OVER_SEEDS = "gsm8k_rates", "gsm8k_seeds"
ADAMW = ("AdamW", "AdamW, embeddings at a quarter")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One difference that a claim is about.

    Attributes:
        first: the method that is claimed to be better.
        second: settings of the other method, of which the one with the lower loss counts.
        margin: the upper end of the interval must lie below it: 0 for "below", more for "not worse".
    """

    first: str
    second: tuple[str, ...]
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim: it holds if every one of its comparisons does."""

    text: str
    comparisons: tuple[Comparison, ...]


CLAIMS = (
    Claim(
        "GaLore+ at rank 128 with the scaled residual is below AdamW, and below LoRA of rank 64",
        (
            Comparison("GaLore+ r 128, scaled", ADAMW),
            Comparison("GaLore+ r 128, scaled", ("LoRA r 64",)),
        ),
    ),
    Claim(
        "GaLore+ at rank 32 with the scaled residual is below LoRA of rank 32",
        (Comparison("GaLore+ r 32, scaled", ("LoRA r 32",)),),
    ),
    Claim(
        "GaLore+ at rank 8 with the scaled residual is not worse than at rank 32 without a residual",
        (Comparison("GaLore+ r 8, scaled", ("GaLore+ r 32, none",), 0.005),),
    ),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the runs say of a comparison.

    Attributes:
        verdict: by the rule.
        seeds: how many of ``SEEDS`` every method of it has.
        pair: the methods with the better setting, over these seeds, or in the search until two are there; None where
            neither has them.
    """

    comparison: Comparison
    verdict: Verdict
    seeds: int
    pair: Pair | None


def decide(gap: paired.Difference, margin: float) -> Verdict:
    """By the ends of the interval: below the margin holds, above 0 fails, else it is undecided."""
    if gap.high < margin:
        return "holds"
    return "fails" if gap.low > 0 else "undecided"


def outcome(comparison: Comparison, studies: Mapping[str, Study]) -> Outcome:
    """Decide a comparison on the seeds of the preregistration, if all of them are there."""
    names = (comparison.first, *comparison.second)
    if (failed := refuted(comparison, studies.get(OVER_SEEDS))) is not None:
        return Outcome(comparison, "fails", len(SEEDS), failed)
    study, search = studies.get(OVER_SEEDS), studies.get(SEARCH)
    seeds = set(SEEDS) if study else set()
    for name in names:
        seeds &= set(study.best(name)) if study and name in study.runs else set()
    if study and len(seeds) > 1:
        pair = closest(study.only(seeds), comparison)
        whole = len(seeds) == len(SEEDS)
        verdict = decide(pair.by_seed(), comparison.margin) if whole else "not run yet"
        return Outcome(comparison, verdict, len(seeds), pair)
    known = search is not None and all(name in search.runs for name in names)
    return Outcome(comparison, "not run yet", len(seeds), closest(search, comparison) if search and known else None)


def refuted(comparison: Comparison, study: Study | None) -> Pair | None:
    """The first method above a setting of the second on all seeds: no other setting can make up for that."""
    if study is None:
        return None
    study = study.only(SEEDS)
    whole = {name for name in study.runs if len(study.best(name)) == len(SEEDS)}
    pairs = [
        Pair((study, comparison.first), (study, name))
        for name in comparison.second
        if {comparison.first, name} <= whole
    ]
    failing = [pair for pair in pairs if decide(pair.by_seed(), comparison.margin) == "fails"]
    return max(failing, key=lambda pair: pair.by_seed().mean, default=None)


def closest(study: Study, comparison: Comparison) -> Pair:
    """The first method against that setting of the second which has the lowest loss."""
    return Pair((study, comparison.first), (study, min(comparison.second, key=study.loss)))


def outcomes(claim: Claim, studies: Mapping[str, Study]) -> list[Outcome]:
    """Those of its comparisons."""
    return [outcome(comparison, studies) for comparison in claim.comparisons]


def verdict(parts: list[Outcome]) -> Verdict:
    """Of a claim: one comparison that fails decides, then one that was not run, then one that is undecided."""
    order: tuple[Verdict, ...] = ("fails", "not run yet", "undecided")
    return next((name for name in order if any(part.verdict == name for part in parts)), "holds")


def sentence(number: int, claim: Claim, studies: Mapping[str, Study]) -> str:
    """What holds and what does not, in words, with the figures."""
    parts = outcomes(claim, studies)
    came = verdict(parts)
    start = f"**Claim {number}, that {claim.text}, {said(came)}**: "
    if came == "not run yet":
        gaps = [f"{so_far(part.pair)} to {part.pair.second[1]}" for part in parts if part.pair]
        until_then = f"; the difference so far is {' and '.join(gaps)}" if gaps else ""
        return f"{start}{min(part.seeds for part in parts)} of {len(SEEDS)} seeds{until_then}."
    return f"{start}it is {' and '.join(in_words(part) for part in parts)}."


def so_far(pair: Pair) -> str:
    """A difference that decides nothing yet: by seed where there are several, else by problem."""
    gap = pair.by_seed()
    if gap.n > 1:
        return f"{shown(gap)} over {gap.n} seeds"
    return f"{shown(pair.by_problem())} by problem on the seed of the search"


def said(verdict: Verdict) -> str:
    """A verdict as the verb of a sentence."""
    return {"undecided": "is undecided", "not run yet": "is not run yet"}.get(verdict, verdict)


WORDS: dict[Verdict, str] = {"holds": "below", "fails": "above", "undecided": "not told apart from"}
WORDS_OF_MARGIN: dict[Verdict, str] = {
    "holds": "not worse than",
    "fails": "worse than",
    "undecided": "not shown to be as good as",
}


def in_words(part: Outcome) -> str:
    """One comparison: what was seen, the difference, its interval and what the interval is over."""
    against = part.pair.second[1] if part.pair else " or ".join(part.comparison.second)
    if part.verdict == "not run yet" or part.pair is None:
        return f"{part.seeds} of {len(SEEDS)} seeds against {against}"
    words = WORDS_OF_MARGIN if part.comparison.margin else WORDS
    better = "the better setting; " if len(part.comparison.second) > 1 else ""
    return f"{words[part.verdict]} {against} ({better}{shown(part.pair.by_seed())} over {part.seeds} seeds)"


def claims_table(studies: Mapping[str, Study]) -> str:
    """Every comparison with its differences and its verdict, and where the figures come from."""
    rows, used = [], []
    for number, claim in enumerate(CLAIMS, 1):
        for part in outcomes(claim, studies):
            if part.pair is None:
                names = f"{part.comparison.first} - {' or '.join(part.comparison.second)}"
                rows.append((str(number), names, "-", "-", part.verdict))
                continue
            used.append(studies[part.pair.first[0].name])
            seeds = f"{part.seeds} of {len(SEEDS)} seeds"
            if (gap := part.pair.by_seed()).n > 1:
                seeds = shown(gap) if part.seeds == len(SEEDS) else f"{shown(gap)}, {seeds}"
            rows.append((str(number), part.pair.name, seeds, shown(part.pair.by_problem()), part.verdict))
    return table([("claim", "difference in eval loss", "by seed", "by problem", "verdict"), *rows]) + sources(used)
