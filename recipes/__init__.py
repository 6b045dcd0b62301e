"""Recipes: where examples come from and how answers are scored, one file a task.

A recipe is a module with ``FIELDS`` (its column names), ``recognises(columns)``, ``parse(rows)`` and, where answers are
no numbers, a ``score(predictions, examples)`` of its own. A new one is such a file, its line in the table below, and
its name in ``base.Task``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.metrics.answers import exact_match
from galore_trainer.metrics.meteor import meteor_missing
from galore_trainer.metrics.rouge import rouge_missing
from galore_trainer.recipes import arithmetic, gsm8k, mawps, nlg, reasoning, restaurants, sft, text
from galore_trainer.recipes.base import (
    ALSO,
    FIELDS,
    REASONING_GYM,
    RESTAURANTS,
    DataConfig,
    Example,
    Parsed,
    TaskData,
    also_blocks,
    in_entry,
)
from galore_trainer.recipes.mixture import Pool, mix
from galore_trainer.recipes.sources import Kind, Row, kind_of, read_file, rename_columns
from galore_trainer.recipes.split import assemble, prompt_key, trained_prompts

__all__ = ["DataConfig", "Example", "TaskData", "load_also", "load_data", "score"]

# In the order that auto asks them.
RECIPES: dict[str, ModuleType] = {"sft": sft, "mawps": mawps, "gsm8k": gsm8k, "nlg": nlg, "text": text}
GENERATED = 2000  # training examples of a generator when data.train_samples is unset


def load_data(config: DataConfig) -> TaskData:
    """Load, clean, deduplicate and split the data that ``config`` names; deterministic.

    Raises:
        OptionError: a source that is missing, malformed (named with file, line and field) or out of reach, or options
            that do not fit together.
    """
    data = _load(config)
    if config.system_prompt is not None:
        if not any(example.messages for example in data.train):
            raise OptionError("data.system_prompt", config.system_prompt, "unset, as raw texts have no turns")
        train, evaluation = (_with_system(config.system_prompt, part) for part in (data.train, data.eval))
        data = replace(data, train=train, eval=evaluation)
    if data.task == "nlg" and data.eval:  # said before a run, not after it
        data.notes.extend(missing for missing in (meteor_missing(), rouge_missing()) if missing)
    return data


def load_also(also: Mapping[str, Mapping[str, Any]], train: Iterable[Example]) -> dict[str, TaskData]:
    """The held-out part of other data, by name, without the examples whose prompts are trained on.

    Args:
        also: the setting ``eval.also``.
        train: what a model is trained on.

    Returns:
        Data without a ``train`` part; ``notes`` says in one sentence what is held out.

    Raises:
        OptionError: as ``load_data``, or nothing is held out.
    """
    trained: set[str] = set().union(*map(trained_prompts, train)) if also else set()
    held_out = {}
    for name, block in also_blocks(also).items():
        place = f"{ALSO}.{name}"
        with in_entry(place, FIELDS):
            data = load_data(block)
        if not data.eval:
            raise OptionError(f"{place}.eval_samples", block.eval_samples, "at least one example to evaluate on")
        kept = [example for example in data.eval if prompt_key(example) not in trained]
        if not kept:
            wanted, way_out = "examples that are not trained on", "Give it the split_seed of the block data."
            raise OptionError(f"{place}.source", block.shown_source, wanted, way_out)
        without = f", without {len(data.eval) - len(kept)} that are trained on" if len(kept) < len(data.eval) else ""
        note = f"{name}: {len(kept)} held out ({data.task} from {block.shown_source}{without})"
        held_out[name] = replace(data, train=[], eval=kept, notes=[note])
    return held_out


def _load(config: DataConfig) -> TaskData:
    if config.sources is not None:
        return mix(config, _pool, _eval_pool(config))
    kind = kind_of("data.source", config.source)
    _refuse_unused(config, kind)
    if kind == "embedded":
        return _embedded(config)
    if kind == "reasoning_gym":
        return _reasoning_gym(config)
    task, rows = _rows(config, kind)
    eval_rows = _eval_rows(config)
    evaluation = _parse(config, task, eval_rows) if eval_rows else None
    return assemble(task, _parse(config, task, rows), evaluation, config)


def _rows(config: DataConfig, kind: Kind) -> tuple[str, list[Row]]:
    """The task of a file or data set, and its rows."""
    _check_columns(config, list(RECIPES) if config.task == "auto" else [config.task])
    rows = _read(config, kind, "data.source", config.source, config.split, "data.split")
    task = _task(config, rows[0])
    _check_columns(config, [task])
    return task, rows


def _pool(config: DataConfig) -> Pool:
    """All examples of one source among several."""
    alone = replace(config, eval_source=None, eval_split=None, train_samples=None, eval_samples=0)
    kind = kind_of("data.source", config.source)
    if kind in ("embedded", "reasoning_gym"):
        data = _load(alone)
        of = "meaning representation" if data.task == "nlg" else None
        return Pool(data.task, Parsed(data.train, data.notes, evaluated_by=of))
    _refuse_unused(alone, kind)
    task, rows = _rows(alone, kind)
    return Pool(task, _parse(alone, task, rows))


def _eval_pool(config: DataConfig) -> Parsed | None:
    """The examples to evaluate several sources on; None where a part of each is to be held out."""
    if config.eval_source is None:
        return None
    rows = _eval_rows(replace(config, sources=None)) or []
    return _parse(config, _task(replace(config, sources=None, source=config.eval_source), rows[0]), rows)


def score(task: str, predictions: list[str], examples: list[Example]) -> dict[str, Any]:
    """Score what a model wrote against the gold answers of ``examples``, in the same order.

    Returns:
        ``n``, ``exact_match_flexible``, ``exact_match_strict``, ``exact_match_last_number`` (each with ``value``,
        ``low``, ``high``, ``correct``), over the examples with an answer, and ``per_example``; for nlg what
        ``metrics.nlg.nlg_scores`` returns; ``n`` alone where the task has no answers, or no examples.
    """
    assert len(predictions) == len(examples), f"{len(predictions)} predictions for {len(examples)} examples"
    own: Callable[..., dict[str, Any]] | None = getattr(RECIPES.get(task), "score", None)
    if own is not None and examples:
        return own(predictions, examples)
    answered = [i for i, example in enumerate(examples) if example.answer is not None]
    if not answered:
        return {"n": len(examples)}
    golds = [str(examples[i].answer) for i in answered]
    result = exact_match([predictions[i] for i in answered], golds)
    verdicts = dict(zip(answered, result["per_example"], strict=True))
    result["per_example"] = [
        {"id": example.id, "prediction": prediction, "answer": example.answer, **verdicts.get(i, {})}
        for i, (example, prediction) in enumerate(zip(examples, predictions, strict=True))
    ]
    return result


def _with_system(text: str, examples: list[Example]) -> list[Example]:
    """Put a system message before every prompt that does not begin with one; a raw text has no prompt."""
    system = {"role": "system", "content": text}
    return [
        replace(e, messages=(system, *e.messages), trained=tuple(turn + 1 for turn in e.trained))
        if e.messages and e.messages[0]["role"] != "system"
        else e
        for e in examples
    ]


def _embedded(config: DataConfig) -> TaskData:
    task, make = ("nlg", _restaurants) if config.source == RESTAURANTS else ("arithmetic", _arithmetic)
    if config.task not in ("auto", task):
        raise OptionError("data.task", config.task, f"auto or {task} for {config.source}")
    return make(config)


def _arithmetic(config: DataConfig) -> TaskData:
    generate = partial(
        arithmetic.generate, seed=config.split_seed, difficulty=config.difficulty, max_number=config.max_number
    )
    train, evaluation = generate("train", config.train_samples or GENERATED), generate("eval", _wanted_eval(config))
    note = (
        f"generated {len(train)} training and {len(evaluation)} evaluation problems, disjoint by construction: "
        f"up to {config.difficulty} steps, numbers up to {config.max_number}, split_seed {config.split_seed}"
    )
    return TaskData(task="arithmetic", train=train, eval=evaluation, notes=[note])


def _restaurants(config: DataConfig) -> TaskData:
    train = restaurants.generate("train", config.train_samples or GENERATED, seed=config.split_seed)
    evaluation = restaurants.generate("eval", _wanted_eval(config), seed=config.split_seed)
    references = sum(len(example.references) for example in evaluation)
    note = (
        f"generated {len(train)} training texts, and {len(evaluation)} meaning representations with {references} "
        f"references to evaluate on; none is in both, by construction: split_seed {config.split_seed}"
    )
    return TaskData(task="nlg", train=train, eval=evaluation, notes=[note])


def _reasoning_gym(config: DataConfig) -> TaskData:
    if config.task not in ("auto", "gsm8k"):
        raise OptionError("data.task", config.task, f"auto or gsm8k for {REASONING_GYM}")
    wanted = config.train_samples or GENERATED
    train = reasoning.generate("train", wanted, seed=config.split_seed)
    evaluation = reasoning.generate("eval", _wanted_eval(config), seed=config.split_seed)
    return assemble("gsm8k", train, evaluation, replace(config, train_samples=wanted))


def _wanted_eval(config: DataConfig) -> int:
    if config.eval_samples is None:
        raise OptionError("data.eval_samples", None, f"a number of problems for {config.source} to make")
    return config.eval_samples


def _eval_rows(config: DataConfig) -> list[Row] | None:
    """Rows of the evaluation source or split; None when a part of the training data is to be held out."""
    if config.eval_source is None and config.eval_split is None:
        return None
    option = "data.source" if config.eval_source is None else "data.eval_source"
    source = config.eval_source or config.source
    kind = kind_of(option, source)
    if kind not in ("file", "hub"):
        raise OptionError("data.eval_source", source, "a file or a hub id")
    if kind == "hub" and config.eval_split is None:
        raise OptionError("data.eval_split", None, f"the split of {source} to evaluate on", "For example test.")
    if kind == "file" and config.eval_split is not None:
        raise OptionError(
            "data.eval_split", config.eval_split, "unset, as the source is a file", "Name a data.eval_source."
        )
    return _read(config, kind, option, source, config.eval_split or "", "data.eval_split")


def _read(config: DataConfig, kind: Kind, option: str, source: str, split: str, split_option: str) -> list[Row]:
    if kind == "file":
        rows = read_file(option, source)
    else:
        from galore_trainer.recipes.hub_source import read_hub

        described = config.source if kind_of("data.source", config.source) == "hub" else source
        subset, revision = (config.subset, config.revision) if source == described else (None, None)
        rows = read_hub(option, source, subset=subset, split=split, revision=revision, split_option=split_option)
    return rename_columns(rows, config.columns)


def _check_columns(config: DataConfig, tasks: list[str]) -> None:
    fields = [field for task in tasks for field in RECIPES[task].FIELDS]
    for name in config.columns:
        if name not in fields:
            raise OptionError("data.columns", name, f"one of {', '.join(dict.fromkeys(fields))}")


def _task(config: DataConfig, row: Row) -> str:
    if config.task != "auto":
        return config.task
    tasks = [task for task, recipe in RECIPES.items() if recipe.recognises(row.fields.keys())]
    named = [task for task in tasks if set(config.columns) <= set(RECIPES[task].FIELDS)]  # what the user renamed counts
    if tasks:
        return (named or tasks)[0]
    raise OptionError(
        "data.task",
        "auto",
        f"columns that tell the task; {config.source} has {', '.join(map(str, row.fields))}",
        "gsm8k: question, answer; mawps: question, equation, answer; nlg: mr, ref; "
        "sft: messages, conversations, prompt and completion, or instruction and output; text: text. "
        "Name the columns with data.columns={question: ..., answer: ...}.",
    )


def _parse(config: DataConfig, task: str, rows: list[Row]) -> Parsed:
    parsed: Parsed = RECIPES[task].parse(rows)
    if config.train_on == "last":
        parsed = replace(parsed, examples=[replace(example, trained=()) for example in parsed.examples])
    if not parsed.examples:
        raise OptionError(rows[0].option, rows[0].source, f"at least one usable row for {task}", " ".join(parsed.notes))
    return parsed


def _refuse_unused(config: DataConfig, kind: Kind) -> None:
    """Refuse options that the source has no use for, rather than ignore them."""
    hub_only = ("subset", "revision", "split")
    generator_only = ("difficulty", "max_number")
    unlike_arithmetic = generator_only if config.source == RESTAURANTS else ()
    unused = {
        "embedded": (*hub_only, *unlike_arithmetic, "columns", "eval_source", "eval_split"),
        "reasoning_gym": (*hub_only, *generator_only, "columns", "eval_source", "eval_split"),
        "file": (*generator_only, "split") if config.eval_split else (*generator_only, *hub_only),
        "hub": generator_only,
    }[kind]
    if kind in ("file", "hub") and config.task == "arithmetic":
        raise OptionError("data.task", "arithmetic", f"auto or one of {', '.join(RECIPES)}, as the source is a {kind}")
    for name in unused:
        if not config.is_default(name):
            wanted = f"its default, as {config.source} has no use for it"
            raise OptionError(f"data.{name}", getattr(config, name), wanted, "Leave it out.")
