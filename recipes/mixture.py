"""Several sources as one: what each gives to the training data, and what of each is held out.

Sources stand one after the other, without the duplicates among them. Held out are ``eval_samples`` prompts in all, of
each source its share: by weight where there are weights, else by its number of prompts. No source trains on a prompt
that is held out of another. Of the rest everything is trained on, or ``train_samples`` examples; with weights each
source gives its share of the examples, none twice: as many in all as the scarcest source allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import DataConfig, Example, Parsed, Part, TaskData, counted, in_entry
from galore_trainer.recipes.split import apart_from, gather, pick, prompt_key, trained_prompts, unique

MIXED = "mixed"
"""The task of sources that have different ones."""


class Pool(NamedTuple):
    """The examples of one source and their task."""

    task: str
    parsed: Parsed


def mix(config: DataConfig, read: Callable[[DataConfig], Pool], evaluation: Parsed | None) -> TaskData:
    """Join the sources of ``config``.

    Args:
        config: with ``sources``.
        read: the examples of one source, whose settings it is given as a block of their own.
        evaluation: of ``eval_source``; None where a part of each source is to be held out.

    Raises:
        OptionError: naming the entry of ``data.sources``: one that cannot be read or has too few examples; tasks that
            cannot be scored together.
    """
    parts, pools = config.parts(), []
    for part in parts:
        with in_entry(part.option):
            pools.append(read(part.config))
    task = _task(parts, pools)
    notes = [
        f"{part.config.source}: {note}" for part, pool in zip(parts, pools, strict=True) for note in pool.parsed.notes
    ]
    owners, never = _named_apart(parts, pools)
    examples = unique(example for example, _ in owners.values())
    if len(examples) < len(owners):
        notes.append(f"{counted(len(owners) - len(examples), 'duplicate')} among {len(owners)} examples dropped")
    by_source: list[list[Example]] = [[] for _ in parts]
    for example in examples:
        by_source[owners[example.id][1]].append(example)
    gathered = pools[0].parsed.evaluated_by is not None
    if evaluation is None:
        chosen = _held_out_prompts(parts, by_source, config, notes)
        held_out = [example for example in examples if prompt_key(example) in chosen]
        held_out = gather(held_out) if gathered else held_out
    else:
        if (evaluation.evaluated_by is not None) != gathered:
            raise OptionError("data.eval_source", config.eval_source, f"data of the sources' task, {task}")
        to_score = gather(evaluation.examples) if gathered else evaluation.examples
        _, held_out = apart_from(examples, replace(evaluation, examples=to_score), config, notes)
        chosen = {prompt_key(example) for example in to_score}
    usable = [[e for e in own if e.id not in never and chosen.isdisjoint(trained_prompts(e))] for own in by_source]
    return TaskData(task=task, train=_drawn(parts, usable, config, notes), eval=held_out, notes=notes)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` in whole shares proportional to ``weights``: what rounding down leaves goes to the largest rests."""
    exact = [Fraction(str(weight)) for weight in weights]
    wanted = [total * weight / sum(exact) for weight in exact]
    shares = [int(share) for share in wanted]
    by_rest = sorted(range(len(shares)), key=lambda k: (shares[k] - wanted[k], k))
    for k in by_rest[: total - sum(shares)]:
        shares[k] += 1
    return shares


def _task(parts: Sequence[Part], pools: Sequence[Pool]) -> str:
    tasks = list(dict.fromkeys(pool.task for pool in pools))
    for part, pool in zip(parts, pools, strict=True):
        if len(tasks) > 1 and pool.parsed.evaluated_by:
            raise OptionError(
                f"{part.option}.task",
                pool.task,
                f"sources of one task, as {pool.task} is scored by whole texts; the others are {', '.join(tasks)}",
                "Train on it alone, or as pairs: task: sft, columns: {prompt: ..., completion: ...}.",
            )
    return tasks[0] if len(tasks) == 1 else MIXED


def _named_apart(parts: Sequence[Part], pools: Sequence[Pool]) -> tuple[dict[str, tuple[Example, int]], frozenset[str]]:
    """Every example and its source's number by an id that no two have, and the ids of those never to be trained on."""
    owners: dict[str, tuple[Example, int]] = {}
    never: set[str] = set()
    for k, (part, pool) in enumerate(zip(parts, pools, strict=True)):
        clash = any(example.id in owners for example in pool.parsed.examples)
        for example in pool.parsed.examples:
            id = f"{example.id} of {part.option}" if clash else example.id
            owners[id] = (replace(example, id=id), k)
            if example.id in pool.parsed.eval_only:
                never.add(id)
    return owners, frozenset(never)


def _weights(parts: Sequence[Part], sizes: Sequence[int]) -> list[float]:
    """The weights, 1 where an entry names none; the sizes where no entry does."""
    if all(part.weight is None for part in parts):
        return list(sizes)
    return [1.0 if part.weight is None else part.weight for part in parts]


def _held_out_prompts(
    parts: Sequence[Part], by_source: Sequence[Sequence[Example]], config: DataConfig, notes: list[str]
) -> set[str]:
    if config.eval_samples is None:
        raise OptionError("data.eval_samples", None, "a number of examples to hold out, as there is no eval source")
    prompts: list[set[str]] = []
    for own in by_source:
        prompts.append({prompt_key(example) for example in own}.difference(*prompts))
    counts = apportion(config.eval_samples, _weights(parts, [max(len(keys), 1) for keys in prompts]))
    chosen: set[str] = set()
    for part, keys, count in zip(parts, prompts, counts, strict=True):
        if count and count >= len(keys):
            raise OptionError(
                "data.eval_samples",
                config.eval_samples,
                f"fewer to hold out: {count} of them are of {part.config.source}, which has {len(keys)} prompts",
                "Lower it or the weight of that source, or name a data.eval_source.",
            )
        chosen |= pick(keys, count, config.split_seed)
    shown = _shown(parts, counts)
    notes.append(f"{counted(len(chosen), 'prompt')} held out for evaluation by split_seed {config.split_seed}: {shown}")
    return chosen


def _drawn(
    parts: Sequence[Part], usable: Sequence[Sequence[Example]], config: DataConfig, notes: list[str]
) -> list[Example]:
    sizes, wanted = [len(own) for own in usable], config.train_samples
    for part, size in zip(parts, sizes, strict=True):
        if size == 0:
            raise OptionError(f"{part.option}.source", part.config.source, "at least one example to train on")
    if wanted is None and all(part.weight is None for part in parts):
        notes.append(f"training on {_shown(parts, sizes)}")
        return [example for own in usable for example in own]
    weights = [Fraction(str(weight)) for weight in _weights(parts, sizes)]
    most = min(int(size * sum(weights) / weight) for size, weight in zip(sizes, weights, strict=True))
    if (wanted or most) > most or most == 0:
        raise OptionError(
            "data.train_samples",
            wanted,
            f"at most {most}, as no example is drawn twice; there are {_shown(parts, sizes)}",
            "Lower it, or the weight of the scarcest source.",
        )
    counts = apportion(wanted or most, [float(weight) for weight in weights])
    notes.append(f"training on {_shown(parts, counts)}, drawn by split_seed {config.split_seed}")
    drawn = []
    for own, count in zip(usable, counts, strict=True):
        chosen = pick((prompt_key(e) + e.target for e in own), count, config.split_seed)
        drawn += [e for e in own if prompt_key(e) + e.target in chosen]
    return drawn


def _shown(parts: Sequence[Part], counts: Sequence[int]) -> str:
    return ", ".join(f"{count} of {part.config.source}" for part, count in zip(parts, counts, strict=True))
