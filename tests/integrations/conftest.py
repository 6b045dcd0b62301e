"""axolotl and ms-swift for plugins: the installed package, or its published interface in its place."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import published


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[published.Modules], None]]:
    """Puts modules in the place of a package; the plugins are imported anew, and forgotten afterwards."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("galore_trainer.integrations.")]:
            del sys.modules[name]

    def install(made: published.Modules) -> None:
        package = next(iter(made)).partition(".")[0]
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)

    forget()
    yield install
    forget()


def imported(package: str, made: published.Modules, install: Callable[[published.Modules], None]) -> Any:
    """A module of the installed package; where it is not installed, of its published interface."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        install(made)
    return importlib.import_module(package)


@pytest.fixture
def axolotl(installed: Any) -> Any:
    """``axolotl.integrations.base``."""
    pytest.importorskip("pydantic", reason="axolotl's settings are pydantic's")
    return imported("axolotl.integrations.base", published.axolotl(), installed)


@pytest.fixture
def swift(installed: Any) -> Any:
    """``swift.optimizers``."""
    return imported("swift.optimizers", published.swift(), installed)
