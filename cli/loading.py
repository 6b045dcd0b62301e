"""What the commands share: the configuration from positional arguments and flags."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.hub import is_cached, require_dataset, require_model
from galore_trainer.recipes.base import also_sources
from galore_trainer.recipes.sources import kind_of
from galore_trainer.run.models.model import EMBEDDED, is_hub_id
from galore_trainer.run.models.model import OPTION as MODEL_OPTION
from galore_trainer.run.settings.run_config import (
    RunConfig,
    has_foreign_keys,
    load_own_settings,
    load_run_config,
    packaged_configs,
)


def split_overrides(config: str | None, overrides: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """Tell CONFIG from ``key=value`` where CONFIG was left out."""
    rest = list(overrides or ())
    if config is not None and "=" in config and not Path(config).expanduser().is_file():
        return None, [config, *rest]
    return config, rest


def load(
    config: str | None,
    overrides: Sequence[str] | None,
    flags: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    reach: Collection[str] = ("data", "model"),
) -> RunConfig:
    """Resolve the configuration a command was given; CONFIG must be there.

    Args:
        config: CONFIG, or the first ``key=value``.
        overrides: the other ``key=value`` arguments.
        flags: values by dotted key.
        model: what the command loads in the place of the configuration's model.
        reach: what the command will load, of ``data`` and ``model``: what can only come from the hub is asked for
            first, so that the answer "no network" does not wait for libraries that take seconds to import.

    Raises:
        OptionError: CONFIG is missing; no network where one is needed; anything ``load_run_config`` refuses.
    """
    name, rest = split_overrides(config, overrides)
    if name is None:
        wanted = f"a packaged name ({', '.join(packaged_configs())}) or the path of a YAML file"
        raise OptionError("CONFIG", "nothing", wanted, "For example: galore-ft train quickstart.")
    if reach and not has_foreign_keys(name, rest):
        project_settings = load_own_settings(name, rest, flags)
        if "data" in reach:
            _require_data(project_settings)
        if "model" in reach:
            require_reach(model or project_settings.model_name_or_path)
    return load_run_config(name, rest, flags)


def _require_data(config: RunConfig) -> None:
    for option, source in [*config.data.named_sources(), *also_sources(config.eval.also)]:
        if kind_of(option, source) == "hub" and not is_cached(source, "dataset"):
            require_dataset(option, source)


def require_reach(model: str) -> None:
    """Raise ``OptionError`` at once for a model that only an unreachable hub has."""
    if is_hub_id(model) and not is_cached(model, "model"):
        require_model(MODEL_OPTION, model, EMBEDDED)
