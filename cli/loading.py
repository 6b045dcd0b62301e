"""What the commands share: the configuration from positional arguments and flags, and who may print."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.run.config import RunConfig, load_run_config, packaged_configs


def is_main_process() -> bool:
    """Whether this process speaks for the run: the only one, or rank 0 of a launcher's."""
    return os.environ.get("RANK", "0") == "0"


def split_overrides(config: str | None, overrides: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """Tell CONFIG from ``key=value`` where CONFIG was left out."""
    rest = list(overrides or ())
    if config is not None and "=" in config and not Path(config).expanduser().is_file():
        return None, [config, *rest]
    return config, rest


def load(config: str | None, overrides: Sequence[str] | None, flags: Mapping[str, Any] | None = None) -> RunConfig:
    """Resolve the configuration a command was given; CONFIG must be there.

    Raises:
        OptionError: CONFIG is missing; anything ``load_run_config`` refuses.
    """
    name, rest = split_overrides(config, overrides)
    if name is None:
        wanted = f"a packaged name ({', '.join(packaged_configs())}) or the path of a YAML file"
        raise OptionError("CONFIG", "nothing", wanted, "For example: galore-ft train quickstart.")
    return load_run_config(name, rest, flags)
