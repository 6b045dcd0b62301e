"""The types that every recipe uses: an example, the data settings of a run, and the loaded data."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from galore_trainer.config import check_fields
from galore_trainer.errors import OptionError
from galore_trainer.fields import knob

Task = Literal["auto", "arithmetic", "gsm8k", "mawps", "nlg", "sft", "text"]
TrainOn = Literal["all", "last"]
EMBEDDED = "embedded:arithmetic"
RESTAURANTS = "embedded:restaurants"
REASONING_GYM = "reasoning_gym:gsm_symbolic"
ALSO, ALSO_NAME = "eval.also", re.compile(r"\w[\w.-]*", re.ASCII)
"""The setting that names other data to evaluate on, and the names that it may give."""
CHANGE = "_change"
"""How the key ends under which results have the change of such a loss by training."""
OF_A_SOURCE = ("source", "task", "columns", "subset", "revision", "split")
"""Settings that an entry of ``data.sources`` has for itself, besides its ``weight``."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and the answer that the assistant is trained to give.

    Attributes:
        messages: prompt turns ``{"role", "content"}``; the last one is the user's. Empty for a raw text.
        target: the assistant's turn, without an end-of-sequence token; the loss is on this text. A raw text as a whole.
        answer: the gold answer as text; None where the task has none.
        id: stable name of the example: ``train/17``, ``gsm8k/train/3``, ``file.jsonl:12`` (file and line).
        references: all texts that are right, where a text is scored and there are several; ``target`` is the first.
        trained: indices in ``messages`` of earlier turns of the assistant that are trained on besides ``target``.
    """

    messages: tuple[dict[str, str], ...]
    target: str
    answer: str | None
    id: str
    references: tuple[str, ...] = ()
    trained: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The block ``data:`` of a configuration: where the training and evaluation data come from."""

    source: str = knob(
        EMBEDDED,
        f"Training data: {EMBEDDED}, {RESTAURANTS}, {REASONING_GYM}, a hub id, or a .json, .jsonl, .csv or "
        ".parquet file.",
    )
    sources: list[dict[str, Any]] | None = knob(
        None,
        "Several sources, in the place of source: a list of {source, weight, task, columns, subset, revision, split}. "
        "Without weights all examples are trained on; with them each source gives weight / (sum of weights) of the "
        "training examples, drawn by split_seed, none twice.",
    )
    task: Task = knob("auto", "Recipe that reads the rows; auto tells it from the source and its columns.")
    columns: dict[str, str] = knob(
        {}, "Column names of the data where they differ from the recipe's own, {recipe's name: column}."
    )
    subset: str | None = knob(None, "Configuration name of a hub data set (openai/gsm8k: main).")
    revision: str | None = knob(None, "Branch, tag or commit of a hub data set.")
    split: str = knob("train", "Split of a hub data set to train on.")
    eval_source: str | None = knob(
        None, "Another file or hub id to evaluate on; unset: a part of the training data is held out."
    )
    eval_split: str | None = knob(None, "Split of a hub data set to evaluate on; unset: as eval_source says.")
    train_samples: int | None = knob(
        None, "Examples to train on, picked by split_seed; unset: all there are (generated ones: 2000).", minimum=1
    )
    eval_samples: int | None = knob(
        200, "Examples to evaluate on: held out, or picked from the eval source; null: all of the latter.", minimum=0
    )
    split_seed: int = knob(0, "Seed of generated problems, of the held-out part and of picked samples.", minimum=0)
    system_prompt: str | None = knob(
        None, "System message before every prompt that has none; unset leaves it to the model's chat template."
    )
    train_on: TrainOn = knob(
        "all", "Turns of the assistant in a chat that are trained on: all of them, or the last one."
    )
    difficulty: int = knob(2, f"Most steps of a problem of {EMBEDDED}, 1 to 4.", minimum=1)
    max_number: int = knob(
        100, f"Largest number in a problem of {EMBEDDED}, 20 to 10000; factors go up to its square root.", minimum=20
    )

    def __post_init__(self) -> None:
        """Check every field alone; ``load_data`` refuses fields that do not fit together."""
        check_fields("data.", self)
        if self.difficulty > 4:
            raise OptionError("data.difficulty", self.difficulty, "a number of steps from 1 to 4")
        if self.max_number > 10_000:
            raise OptionError("data.max_number", self.max_number, "an integer from 20 to 10000")
        if self.sources is not None:
            self._check_sources()

    def _check_sources(self) -> None:
        for name in (*OF_A_SOURCE, "difficulty", "max_number"):
            if not self.is_default(name):
                way_out = "Write it into the entries of data.sources." if name in OF_A_SOURCE else "Leave it out."
                raise OptionError(f"data.{name}", getattr(self, name), "unset beside data.sources", way_out)
        if self.eval_split is not None and self.eval_source is None:
            wanted = "unset beside data.sources without data.eval_source"
            raise OptionError("data.eval_split", self.eval_split, wanted, "Name a data.eval_source.")
        if not self.sources:
            raise OptionError("data.sources", [], "at least one source")
        self.parts()

    def parts(self) -> list[Part]:
        """The entries of ``sources``; where there are none, the whole as one."""
        if self.sources is None:
            return [Part("data", None, self)]
        return [_part(self, f"data.sources[{number}]", entry) for number, entry in enumerate(self.sources)]

    @property
    def shown_source(self) -> str:
        """The source, or all sources, in words."""
        return ", ".join(part.config.source for part in self.parts())

    def named_sources(self) -> list[tuple[str, str]]:
        """Each source that is read, the evaluation's too, as (option that names it, name)."""
        named = [(f"{part.option}.source", part.config.source) for part in self.parts()]
        return named if self.eval_source is None else [*named, ("data.eval_source", self.eval_source)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dictionaries, in declaration order."""
        return dataclasses.asdict(self)

    def is_default(self, name: str) -> bool:
        """Whether the field ``name`` has its declared default."""
        return getattr(self, name) == getattr(DataConfig(), name)


FIELDS = tuple(field.name for field in dataclasses.fields(DataConfig))


class Part(NamedTuple):
    """One source of several: the option that names it, its weight if it has one, and its settings as a whole block."""

    option: str
    weight: float | None
    config: DataConfig


def _part(config: DataConfig, option: str, entry: dict[str, Any]) -> Part:
    known = ("source", "weight", *OF_A_SOURCE[1:])
    for name in entry:
        if name not in known:
            raise OptionError(f"{option}.{name}", entry[name], f"one of {', '.join(known)}")
    if "source" not in entry:
        raise OptionError(option, entry, "an entry with a source", "For example {source: a.jsonl, weight: 2}.")
    weight = entry.get("weight")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (number and 0 < weight < math.inf):
        raise OptionError(
            f"{option}.weight", weight, "a finite number above 0", "Leave a source out to read none of it."
        )
    settings = {name: value for name, value in entry.items() if name != "weight" and value is not None}
    with in_entry(option):
        return Part(option, weight, dataclasses.replace(config, sources=None, **settings))


def also_blocks(also: Mapping[str, Mapping[str, Any]]) -> dict[str, DataConfig]:
    """The blocks of ``eval.also`` by name; they have the fields of ``data:``.

    Raises:
        OptionError: a name that is no word or ends as ``CHANGE``, a field that is unknown or would be ignored, a block
            without a source, or what ``DataConfig`` refuses; each named as it stands under ``eval.also``.
    """
    known = [name for name in FIELDS if name != "train_samples"]
    configs = {}
    for name, block in also.items():
        if not ALSO_NAME.fullmatch(name):
            raise OptionError(ALSO, name, "names of letters, digits, '_', '-' and '.', without the latter two first")
        if name.endswith(CHANGE):
            wanted = f"names that do not end in {CHANGE}, as the columns of a change do"
            raise OptionError(ALSO, name, wanted)
        place = f"{ALSO}.{name}"
        for field, value in block.items():
            if field == "train_samples":
                raise OptionError(f"{place}.{field}", value, "unset, as nothing of this data is trained on")
            if field not in known:
                close = difflib.get_close_matches(field, known, n=1)
                way_out = f"Did you mean {close[0]!r}?" if close else ""
                raise OptionError(f"{place}.{field}", value, f"one of {', '.join(known)}", way_out)
        if "source" not in block and "sources" not in block:
            raise OptionError(place, dict(block), "a source", f"For example {{source: {EMBEDDED}, eval_samples: 100}}.")
        with in_entry(place, FIELDS):
            configs[name] = DataConfig(**block)
    return configs


def also_sources(also: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each source that the blocks of ``eval.also`` read, as (option that names it, name)."""
    return [
        (option.replace("data", f"{ALSO}.{name}", 1), source)
        for name, block in also_blocks(also).items()
        for option, source in block.named_sources()
    ]


@contextlib.contextmanager
def in_entry(option: str, names: Collection[str] = OF_A_SOURCE) -> Iterator[None]:
    """Errors about the settings ``data.NAME`` name them as they stand under ``option``."""
    try:
        yield
    except OptionError as error:
        there = re.compile(rf"\bdata\.({'|'.join(names)})\b")
        texts = (there.sub(rf"{option}.\1", text) for text in (error.option, error.wanted, error.way_out))
        name, wanted, way_out = texts
        raise OptionError(name, error.got, wanted, way_out) from error


@dataclass(frozen=True)
class TaskData:
    """Examples of one task, ready to be trained and evaluated on.

    Attributes:
        task: the recipe, never ``auto``.
        train: the training data.
        eval: the evaluation data; shares no prompt with ``train``.
        notes: sentences on what was cleaned, dropped, deduplicated and held out.
    """

    task: str
    train: list[Example]
    eval: list[Example]
    notes: list[str]


@dataclass(frozen=True)
class Parsed:
    """The examples that a recipe makes of rows.

    Attributes:
        examples: one a row.
        notes: sentences on the cleaning.
        eval_only: ids of examples that must not be trained on.
        evaluated_by: a noun for what a prompt describes, where all examples of a prompt are evaluated as one, with
            their targets as references; None where every example is evaluated alone.
    """

    examples: list[Example]
    notes: list[str]
    eval_only: frozenset[str] = frozenset()
    evaluated_by: str | None = None


def counted(count: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def question_example(question: str, target: str, answer: str | None, id: str) -> Example:
    """An example with one user turn, which holds the question and nothing else."""
    return Example(messages=({"role": "user", "content": question},), target=target, answer=answer, id=id)
