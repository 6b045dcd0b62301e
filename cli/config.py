"""``galore-ft config list | show | validate | convert | schema``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from galore_trainer.cli.once import OptionsOnce
from galore_trainer.cli.options import Debug, Overrides, names_of
from galore_trainer.errors import OptionError
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.run_config import (
    known_keys,
    load_run_config,
    packaged_configs,
    read_config,
    read_packaged,
)
from galore_trainer.run.settings.sources import command_line_settings, file_settings, still_to_fill_in

app = typer.Typer(help="Packaged configurations, a check of yours, other programs' as ours.", no_args_is_help=True)

KINDS = {
    "train": "galore-ft train CONFIG",
    "studies": "galore-ft ablate STUDY",
    "launch": "galore-ft train CONFIG --launch-config NAME",
}

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="One of those that 'config list' names.",
        autocompletion=names_of("train", "studies", "launch", files=False),
    ),
]
Foreign = Annotated[
    str, typer.Argument(metavar="FILE", help="YAML file of another program.", autocompletion=names_of())
]
Program = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="NAME", help="llama-factory, axolotl, trl or transformers (default: by the file's keys)."
    ),
]
File = Annotated[
    str, typer.Argument(metavar="FILE", help="YAML file or packaged name.", autocompletion=names_of("train"))
]


@app.command("list", cls=OptionsOnce)
def list_configs() -> None:
    """Name the packaged configurations, the studies of 'galore-ft ablate', and the ways to launch several processes."""
    texts = {kind: packaged_configs(kind) for kind in KINDS}
    width = max(len(name) for named in texts.values() for name in named) + 2
    for kind, title in KINDS.items():
        typer.echo(f"{title}:")
        for name, text in texts[kind].items():
            typer.echo(f"  {name:<{width}}{text.splitlines()[0].lstrip('# ')}")


@app.command(cls=OptionsOnce)
def show(name: Name) -> None:
    """Print a packaged configuration, study or launch configuration, to be saved and changed."""
    texts = {**packaged_configs("studies"), **packaged_configs("launch")}
    typer.echo((texts[name] if name in texts else read_packaged(name)).rstrip())


@app.command(cls=OptionsOnce)
def convert(file: Foreign, program: Program = None, debug: Debug = False) -> None:
    """Print a configuration of LLaMA-Factory, axolotl, TRL or transformers as ours, and say what became of each key.

    The YAML goes to standard output, the list of keys to standard error: galore-ft config convert theirs.yaml > my.yaml
    """
    from galore_trainer.run.settings.convert import convert as convert_file

    conversion = convert_file(file, program)
    typer.echo(conversion.report(file), err=True)
    typer.echo(conversion.text.rstrip())


@app.command(cls=OptionsOnce)
def validate(file: File, overrides: Overrides = None, debug: Debug = False) -> None:
    """Check every key, type and value; say which other methods the file would serve. Loads no model and no data."""
    blanks = still_to_fill_in(file_settings(read_config(file)), known_keys())
    try:
        config = load_run_config(file, overrides or ())
    except OptionError as error:
        if all(blank.key != error.option for blank in blanks):
            raise
        lines = [f"  {blank.key}: {'' if blank.value is None else blank.value} ({blank.place})" for blank in blanks]
        way_out = "\n".join(["Still to be filled in:", *lines])
        raise OptionError(file, [blank.key for blank in blanks], "a value for each", way_out) from error
    method = config.method
    typer.echo(f"{file}: valid, runs {method}.")
    given = {setting.key for setting in command_line_settings(overrides or (), {})}
    if names := [f"{blank.key} ({blank.value})" for blank in blanks if blank.key not in given]:
        typer.echo(f"still to be filled in before it can run: {', '.join(names)}")
    for sentence in config.idle_settings():
        typer.echo(f"note: {sentence}")
    for other in METHODS:
        if other != method:
            try:
                load_run_config(file, (), {"method": other})
                typer.echo(f"--method {other}: valid.")
            except OptionError as error:
                typer.echo(f"--method {other}: refused. {error}")


@app.command(cls=OptionsOnce)
def schema(debug: Debug = False) -> None:
    """Print a JSON schema of our YAML, for editors: galore-ft config schema > galore-ft.schema.json

    A first line '# yaml-language-server: $schema=galore-ft.schema.json' in a file makes editors check and complete it.
    """
    from galore_trainer.run.settings.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
