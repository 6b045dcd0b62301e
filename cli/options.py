"""Command-line options written from the dataclasses: a new field is a new flag, with its help and its default."""

from __future__ import annotations

import dataclasses
import functools
import glob
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.run.models.model import EMBEDDED
from galore_trainer.run.settings.knobs import field_help, show_default
from galore_trainer.run.settings.methods import METHOD_DEFAULTS, LoraSettings
from galore_trainer.run.settings.run_config import RunConfig, packaged_configs
from galore_trainer.run.settings.sources import flag_name

TOP_LEVEL = ("method", "trainer", "model_name_or_path", "output_dir")
# TrainingArguments fields that are typed most often; every other one is given as key=value.
TRAINING: dict[str, tuple[type, str]] = {
    "learning_rate": (float, "Learning rate of the Trainer."),
    "max_steps": (int, "Optimizer steps; -1 means num_train_epochs decides."),
    "seed": (int, "Seed of the run."),
}


def names_of(*kinds: str, files: bool = True) -> Callable[[str], list[tuple[str, str]]]:
    """A shell's completion of packaged names, and of YAML files and folders where ``files`` says so.

    Args:
        kinds: of ``packaged_configs``: train, studies, launch.
        files: whether a path may be given, too.
    """

    def complete(incomplete: str) -> list[tuple[str, str]]:
        texts = {name: text for kind in kinds for name, text in packaged_configs(kind).items()}
        words = [(name, text.splitlines()[0].lstrip("# ")) for name, text in texts.items()]
        paths = [Path(p) for p in glob.glob(f"{glob.escape(os.path.expanduser(incomplete))}*")] if files else []
        words += [(str(path), "") for path in sorted(paths) if path.suffix in (".yaml", ".yml")]
        words += [(f"{path}/", "") for path in sorted(paths) if path.is_dir()]
        return [(word, help) for word, help in words if word.startswith(os.path.expanduser(incomplete))]

    return complete


def models(incomplete: str) -> list[tuple[str, str]]:
    """A shell's completion of the folders of runs and models, and of the embedded model."""
    paths = sorted(Path(p) for p in glob.glob(f"{glob.escape(os.path.expanduser(incomplete))}*"))
    embedded = [(EMBEDDED, "the embedded model")] if EMBEDDED.startswith(incomplete) else []
    return [*embedded, *((f"{path}/", "") for path in paths if path.is_dir())]


def choices(hint: Any, many: bool = False) -> Callable[[str], list[str]] | None:
    """A shell's completion of the values of a ``Literal``; None for any other type.

    Args:
        hint: the annotation.
        many: several values may be given, with commas between them.
    """
    if get_origin(hint) is not Literal:
        return None
    values = [str(value) for value in get_args(hint)]

    def complete(incomplete: str) -> list[str]:
        before = incomplete[: incomplete.rfind(",") + 1] if many else ""
        return [f"{before}{value}" for value in values if f"{before}{value}".startswith(incomplete)]

    return complete


Config = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG",
        show_default=False,
        help="Packaged name (see 'config list') or YAML file.",
        autocompletion=names_of("train"),
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", show_default=False, help="Settings by dotted key, above the file."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def integers(flag: str, text: str) -> list[int]:
    """The numbers of an option such as ``--seeds 0,1,2``; ``OptionError`` for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        wanted = "integers with commas between them"
        raise OptionError(flag, text, wanted, f"For example {flag} 0,1,2.") from None


@dataclasses.dataclass(frozen=True)
class Flag:
    """One generated option: the dotted key it sets, its type and its help."""

    key: str
    hint: Any
    help: str

    @property
    def parameter(self) -> str:
        """Name of the Python parameter that receives it."""
        return flag_name(self.key)[2:].replace("-", "_")

    def to_parameter(self) -> inspect.Parameter:
        """The parameter Typer reads; None means that the flag was not given.

        Values stay text, so that a flag, an override and a YAML line are read by one reader and refused in one voice.
        """
        name, kind = flag_name(self.key), inspect.Parameter.KEYWORD_ONLY
        common: dict[str, Any] = {"help": self.help, "show_default": False}
        if self.hint is bool:
            option = typer.Option(f"{name}/{flag_name(self.key, negated=True)}", **common)
            return inspect.Parameter(self.parameter, kind, default=None, annotation=Annotated[bool | None, option])
        option = typer.Option(name, metavar=_metavar(self.hint), autocompletion=choices(self.hint), **common)
        return inspect.Parameter(self.parameter, kind, default=None, annotation=Annotated[str | None, option])


def all_flags() -> list[Flag]:
    """Every generated option, in the order of the help page."""
    hints = get_type_hints(RunConfig)
    run_fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    return [
        *(Flag(name, hints[name], _help(run_fields[name], name)) for name in TOP_LEVEL),
        *(Flag(name, hint, help) for name, (hint, help) in TRAINING.items()),
        *_block_flags("galore", GaLoreConfig),
        *_block_flags("lora", LoraSettings),
    ]


def _block_flags(block: str, cls: type) -> list[Flag]:
    hints, fields = get_type_hints(cls), dataclasses.fields(cls)
    return [Flag(f"{block}.{f.name}", hints[f.name], _help(f, f"{block}.{f.name}")) for f in fields]


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every generated option; ``flags`` holds the values of those that were used, by dotted key."""
    flags = {flag.parameter: flag for flag in all_flags()}
    signature = inspect.signature(command, eval_str=True)
    declared = [parameter for name, parameter in signature.parameters.items() if name != "flags"]
    generated = [flag.to_parameter() for flag in flags.values()]

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        values = {flag.key: kwargs.pop(name) for name, flag in flags.items()}
        command(*args, flags={key: value for key, value in values.items() if value is not None}, **kwargs)

    complete = signature.replace(parameters=[*declared, *generated])
    wrapped.__signature__ = complete  # type: ignore[attr-defined]
    wrapped.__annotations__ = {name: parameter.annotation for name, parameter in complete.parameters.items()}
    return wrapped


def _help(field: dataclasses.Field[Any], key: str) -> str:
    defaults = [show_default(field)]
    defaults += [f"{method}: {values[key]}" for method, values in METHOD_DEFAULTS.items() if key in values]
    return f"{field_help(field)} (default {', '.join(defaults)})"


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is dict:
        return "MAPPING"
    if get_origin(hint) is list:
        return "LIST"
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT", type(None): "none", list[str]: "LIST"}
    return "|".join(names.get(part, "VALUE") for part in (get_args(hint) or (hint,)))
