"""From parsed rows to a training and an evaluation part that share no prompt.

Duplicates within the training data (same prompt and same answer) are dropped, the first one stays. Then whole prompts
are held out, chosen by a hash of ``split_seed`` and the prompt's text: the choice depends neither on the order of the
rows nor on how many of the rest are trained on. With an evaluation source, all its prompts leave the training data.
Where a prompt has several right answers (``Parsed.evaluated_by``), it is one evaluation example with all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import DataConfig, Example, Parsed, TaskData, counted


def prompt_key(example: Example) -> str:
    """The text by which prompts are compared: all turns, or a raw text, without regard to case and white space."""
    turns = example.messages or ({"role": "text", "content": example.target},)
    return "\n".join(f"{turn['role']}: {' '.join(turn['content'].casefold().split())}" for turn in turns)


def trained_prompts(example: Example) -> set[str]:
    """The keys of all prompts whose answers an example is trained on."""
    earlier = (replace(example, messages=example.messages[:turn]) for turn in example.trained)
    return {prompt_key(example), *map(prompt_key, earlier)}


def gather(examples: Iterable[Example]) -> list[Example]:
    """One example a prompt, in order of first appearance, with the targets of all as its references."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault("\n".join(turn["content"] for turn in example.messages), []).append(example)
    return [replace(group[0], references=tuple(example.target for example in group)) for group in groups.values()]


def assemble(task: str, train: Parsed, evaluation: Parsed | None, config: DataConfig) -> TaskData:
    """Deduplicate, hold out a part or read the evaluation source, and pick the requested numbers of samples."""
    notes = list(train.notes)
    pool = unique(train.examples)
    if len(pool) < len(train.examples):
        dropped = counted(len(train.examples) - len(pool), "duplicate")
        notes.append(f"{dropped} among {len(train.examples)} training examples dropped")
    prompts = {prompt_key(example) for example in pool}
    if len(prompts) < len(pool) and not train.evaluated_by:
        notes.append(f"{counted(len(pool) - len(prompts), 'more example')} of a prompt with another answer: kept")
    if evaluation is None:
        rest, held_out = _hold_out(pool, prompts, config, notes)
        held_out = gather(held_out) if train.evaluated_by else held_out
    else:
        examples = gather(evaluation.examples) if train.evaluated_by else evaluation.examples
        rest, held_out = apart_from(pool, replace(evaluation, examples=examples), config, notes)
    if train.evaluated_by and held_out:
        references = sum(len(example.references) for example in held_out)
        notes.append(
            f"evaluating on {counted(len(held_out), train.evaluated_by)} with {references} references; the parts are "
            f"split by {train.evaluated_by}, not by row: none is in both"
        )
    usable = [example for example in rest if example.id not in train.eval_only]
    if not usable:
        raise OptionError("data.source", config.source, "at least one example to train on", " ".join(notes))
    if config.train_samples is not None:
        if config.train_samples > len(usable):
            raise OptionError(
                "data.train_samples", config.train_samples, f"at most the {len(usable)} examples there are to train on"
            )
        chosen = pick((prompt_key(e) + e.target for e in usable), config.train_samples, config.split_seed)
        usable = [e for e in usable if prompt_key(e) + e.target in chosen]
        notes.append(f"training on {len(usable)} examples picked by split_seed {config.split_seed}")
    return TaskData(task=task, train=usable, eval=held_out, notes=notes)


def unique(examples: Iterable[Example]) -> list[Example]:
    """The first example of every prompt and answer."""
    first: dict[tuple[str, str], Example] = {}
    for example in examples:
        first.setdefault((prompt_key(example), example.target if example.answer is None else example.answer), example)
    return list(first.values())


def _hold_out(
    pool: list[Example], prompts: set[str], config: DataConfig, notes: list[str]
) -> tuple[list[Example], list[Example]]:
    if config.eval_samples is None:
        raise OptionError("data.eval_samples", None, "a number of examples to hold out, as there is no eval source")
    if config.eval_samples >= len(prompts):
        raise OptionError(
            "data.eval_samples",
            config.eval_samples,
            f"fewer than the {len(prompts)} different prompts of {config.source}",
            f"For example data.eval_samples={max(1, len(prompts) // 10)}, or name a data.eval_source.",
        )
    chosen = pick(prompts, config.eval_samples, config.split_seed)
    held_out = [example for example in pool if prompt_key(example) in chosen]
    notes.append(
        f"{len(held_out)} of {len(pool)} examples ({len(chosen)} prompts) held out for evaluation by "
        f"split_seed {config.split_seed}"
    )
    return [example for example in pool if chosen.isdisjoint(trained_prompts(example))], held_out


def apart_from(
    pool: list[Example], evaluation: Parsed, config: DataConfig, notes: list[str]
) -> tuple[list[Example], list[Example]]:
    """The examples whose prompts are not evaluated on, and those to evaluate on."""
    examples = evaluation.examples
    notes.extend(f"eval: {note}" for note in evaluation.notes)
    duplicates = len(examples) - len(unique(examples))
    if duplicates:
        notes.append(f"eval: {counted(duplicates, 'duplicate')} among {len(examples)} examples kept")
    prompts = {prompt_key(example) for example in examples}
    rest = [example for example in pool if prompts.isdisjoint(trained_prompts(example))]
    if len(rest) < len(pool):
        notes.append(
            f"{counted(len(pool) - len(rest), 'training example')} with a prompt of the evaluation data dropped"
        )
    if config.eval_samples is not None and config.eval_samples < len(examples):
        chosen = pick((example.id for example in examples), config.eval_samples, config.split_seed)
        notes.append(f"evaluating on {len(chosen)} of {len(examples)}, picked by split_seed {config.split_seed}")
        examples = [example for example in examples if example.id in chosen]
    return rest, examples


def pick(keys: Iterable[str], count: int, seed: int) -> set[str]:
    """``count`` of the keys, those with the smallest hash under ``seed``."""

    def rank(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}|{key}".encode(), digest_size=16).digest()

    return set(sorted(set(keys), key=rank)[:count])
