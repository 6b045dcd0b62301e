"""A study: one configuration, varied over a grid of dotted keys and repeated over seeds."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_trainer.config import check_type
from galore_trainer.errors import OptionError
from galore_trainer.run.results.columns import metric_names
from galore_trainer.run.settings.keys import refuse_all
from galore_trainer.run.settings.methods import methods_reading
from galore_trainer.run.settings.run_config import RunConfig, load_run_config, packaged_configs, read_config
from galore_trainer.run.settings.sources import Setting, command_line_settings, file_settings
from galore_trainer.run.settings.yaml_io import Document, parse_value

# Key of a study's file -> its type.
KEYS: dict[str, Any] = {
    "title": str,
    "question": str,
    "base": str,
    "set": dict[str, Any],
    "grid": dict[str, Any],
    "cells": list[dict[str, Any]],
    "seeds": list[int],
    "metrics": list[str],
}
MOST_CELLS, MOST_RUNS = 1000, 10_000
NAME = "name"  # of a cell, beside its settings
RESERVED = {
    "seed": "Write the study's 'seeds:', or give --seeds 0,1,2.",
    "output_dir": "Give --output-dir; each run has a folder of its own in it.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of a study.

    Attributes:
        name: for people, for example ``rank 16``.
        slug: for folders, for example ``rank-16``.
        values: what this cell sets, by dotted key.
        configs: the run of each seed; their ``output_dir`` is still to be set.
    """

    name: str
    slug: str
    values: dict[str, Any]
    configs: dict[int, RunConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study that can be run: every cell is resolved and valid.

    Attributes:
        name: packaged name, or the file's name without its ending.
        title: of a report.
        question: what it is to answer; may be empty.
        base: the configuration that is varied.
        seeds: in the order they are run.
        metrics: keys of ``columns.columns``, to be shown first.
        cells: in the order of the grid.
    """

    name: str
    title: str
    question: str
    base: str
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    cells: tuple[Cell, ...]


def packaged_studies() -> dict[str, str]:
    """The packaged studies: name to YAML text."""
    return packaged_configs("studies")


def load_study(study: str | Path, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Study:
    """Read a study and resolve each of its cells: base < the study's ``set:`` < overrides < the cell's own values.

    What one block of methods alone reads (``galore.``, ``lora.``) is left out of the cells of others.

    Args:
        study: packaged name or YAML file.
        overrides: ``key=value`` for every cell; ``base=NAME`` replaces the study's base.
        seeds: in place of the study's own.

    Raises:
        OptionError: an unknown study or key, an empty axis, a value that does not fit, two equal cells, an override of
            what the study varies.
    """
    document = read_config(study, "studies")
    data = _checked(document)
    base, rest = data.get("base", "arithmetic"), []
    for text in overrides:
        if text.partition("=")[0].strip() == "base":
            base = text.partition("=")[2].strip()
        else:
            rest.append(text)
    base = _base(document, base)
    points = list(itertools.islice(_points(document, data), MOST_CELLS + 1))
    common = {s.key: s for s in [*file_settings(_part(document, "set")), *command_line_settings(rest, {})]}
    _check_keys(document, common, points)
    seeds = tuple(data.get("seeds", (0,)) if seeds is None else seeds)
    _check_seeds(seeds)
    if len(points) > MOST_CELLS or len(points) * len(seeds) > MOST_RUNS:
        many = f"more than {MOST_CELLS} cells" if len(points) > MOST_CELLS else f"{len(points)} cells"
        wanted = f"at most {MOST_CELLS} cells and {MOST_RUNS} runs"
        raise OptionError("grid", f"{many} x {len(seeds)} seeds", wanted, f"Vary less at a time. ({document.name})")

    cells: list[Cell] = []
    slugs: set[str] = set()
    earlier: list[tuple[str, dict[str, Any]]] = []
    for name, values in zip(_names(points), (values for _, values in points), strict=True):
        config = _resolve(document.name, base, name, values, common)
        if twin := next((other for other, settings in earlier if settings == comparable(config)), None):
            both = f"{twin!r} and {name!r}"
            raise OptionError("grid", both, "cells that differ", f"Both say the same: remove one ({document.name}).")
        earlier.append((name, comparable(config)))
        configs = {s: dataclasses.replace(config, training={**config.training, "seed": s}) for s in seeds}
        cells.append(Cell(name=name, slug=_slug(name, slugs), values=values, configs=configs))
    methods = {config.method for cell in cells for config in cell.configs.values()}
    for key, setting in common.items():
        if methods_reading(key) and not methods & set(methods_reading(key)):
            raise OptionError(key, setting.place, f"a setting of {', '.join(sorted(methods))}", "No cell reads it.")
    title = Path(study).stem
    return Study(
        name=title,
        title=data.get("title", title),
        question=data.get("question", ""),
        base=base,
        seeds=seeds,
        metrics=tuple(data.get("metrics", ())),
        cells=tuple(cells),
    )


def comparable(config: RunConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The settings that define a run of one seed, by dotted key: all but where files go."""
    data = config.to_dict() if isinstance(config, RunConfig) else config
    kept = {key: value for key, value in data.items() if key not in ("output_dir", "methods")}
    return dict(sorted(_flat(kept)))


def show_value(value: Any) -> str:
    """A value as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, or the whole of it where two end alike."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


# ------------------------------------------------------------------------------------------ what a file may hold


def _checked(document: Document) -> dict[str, Any]:
    unknown = []
    for key in (key for key in document.data if key not in KEYS):
        close = difflib.get_close_matches(key, KEYS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"A study takes {', '.join(KEYS)}."
        place = document.place((key,))
        unknown.append(OptionError(key, document.data[key], "a key of a study", f"{hint} ({place})"))
    if unknown:
        raise refuse_all(unknown, "")
    for key, value in document.data.items():
        check_type(f"{key} ({document.place((key,))})", value, KEYS[key])
    data = document.data
    if not data.get("grid") and not data.get("cells"):
        raise OptionError(
            document.name,
            "no grid and no cells",
            "something to vary",
            "Write 'grid: {galore.rank: [16, 32]}', or 'cells: [{galore.rank: 16}, {galore.rank: 32}]'.",
        )
    for name in data.get("metrics", ()):
        if name not in metric_names():
            close = difflib.get_close_matches(name, metric_names(), n=1)
            hint = f"Did you mean {close[0]!r}?" if close else ""
            raise OptionError("metrics", name, f"some of {', '.join(metric_names())}", hint)
    return data


def _base(document: Document, base: str) -> str:
    beside = Path(document.name).parent / base
    path = str(beside) if base not in packaged_configs() and beside.is_file() else base
    try:
        read_config(path)
    except OptionError as error:
        option = "base" if error.option == "CONFIG" else error.option
        raise OptionError(option, error.got, error.wanted, error.way_out) from None
    return path


def _part(document: Document, key: str) -> Document:
    """One block of a study as a document of its own; errors still name the study's lines."""
    lines = {path[1:]: line for path, line in document.lines.items() if path[0] == key and len(path) > 1}
    return Document(document.name, document.data.get(key) or {}, lines)


def _points(document: Document, data: Mapping[str, Any]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The given name and the values of every cell: each entry of ``cells:`` with each combination of ``grid:``."""
    axes: dict[str, list[Any]] = {}
    for setting in file_settings(_part(document, "grid")):
        if not isinstance(setting.value, list) or not setting.value:
            wanted = "a list with at least one value"
            raise OptionError(f"grid.{setting.key}", setting.value, wanted, f"For example [16, 32]. ({setting.place})")
        axes[setting.key] = setting.value
    for i, entry in enumerate(data.get("cells") or [{}]):
        place = f"cells[{i}]"
        name = entry.get(NAME)
        check_type(f"{place}.{NAME}", name, str | None)
        settings_of_cell = {key: value for key, value in entry.items() if key != NAME}
        paired = {s.key: s.value for s in file_settings(Document(f"{document.name}, {place}", settings_of_cell, {}))}
        if data.get("cells") and not paired:
            raise OptionError(place, entry, "at least one setting", f"For example galore.rank: 16. ({document.name})")
        if both := sorted(axes.keys() & paired.keys()):
            raise OptionError(f"{place}.{both[0]}", paired[both[0]], "a key that the grid does not vary")
        for combination in itertools.product(*axes.values()):
            yield name, {**paired, **dict(zip(axes, combination, strict=True))}


def _check_keys(
    document: Document, common: Mapping[str, Setting], points: Sequence[tuple[Any, dict[str, Any]]]
) -> None:
    varied = {key for _, values in points for key in values}
    for key in (*common, *varied):
        if key in RESERVED:
            raise OptionError(
                key, common[key].place if key in common else document.name, "no such setting in a study", RESERVED[key]
            )
    for key, setting in common.items():
        if key in varied:
            way_out = "Leave it out, or change the study: 'galore-ft config show NAME' prints a packaged one."
            raise OptionError(key, setting.place, f"no value, as the study varies {key}", way_out)


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise OptionError("seeds", list(seeds), "different integers from 0 on, at least one")


# ------------------------------------------------------------------------------------------ the cells


def _resolve(study: str, base: str, name: str, values: Mapping[str, Any], common: Mapping[str, Setting]) -> RunConfig:
    def texts(settings: Mapping[str, Setting]) -> list[str]:
        words = [f"{s.key}={s.written if s.written is not None else _as_text(s.value)}" for s in settings.values()]
        return [*words, *(f"{key}={_as_text(value)}" for key, value in values.items())]

    try:
        method = load_run_config(base, texts({k: s for k, s in common.items() if not methods_reading(k)})).method
        return load_run_config(
            base, texts({k: s for k, s in common.items() if method in (methods_reading(k) or [method])})
        )
    except OptionError as error:
        way_out = f"{error.way_out} (cell {name!r} of {study})".strip()
        raise OptionError(error.option, error.got, error.wanted, way_out) from None


def _as_text(value: Any) -> str:
    """A value as one would write it after ``key=``."""
    return value if isinstance(value, str) and parse_value(value) == value else json.dumps(value, ensure_ascii=False)


def _names(points: Sequence[tuple[str | None, dict[str, Any]]]) -> list[str]:
    """A name for every cell: its own, and the values that tell it from others of that name."""
    short = short_names(list(dict.fromkeys(key for _, values in points for key in values)))
    names = []
    for cell_name, values in points:
        same_name = [other for name, other in points if name == cell_name]
        shown = [
            key for key in values if cell_name is None or any(other.get(key) != values[key] for other in same_name)
        ]
        names.append(
            ", ".join([*([cell_name] if cell_name else []), *(f"{short[k]} {show_value(values[k])}" for k in shown)])
        )
    return names


def _slug(name: str, taken: set[str]) -> str:
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", name.replace("+", "-plus")).strip("-.")[:80] or "cell"
    number = next(n for n in itertools.count(1) if (slug if n == 1 else f"{slug}-{n}") not in taken)
    slug = slug if number == 1 else f"{slug}-{number}"
    taken.add(slug)
    return slug


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if prefix == "" and isinstance(value, Mapping):
            yield from _flat(value, f"{key}.")
        else:
            yield prefix + key, value
