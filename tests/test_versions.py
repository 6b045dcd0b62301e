"""Packages that are too old are refused in words, by the versions of pyproject.toml."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from galore_trainer import versions
from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError

Installed = Callable[[dict[str, str]], None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """A function that makes packages appear in other versions."""
    real = importlib.metadata.version

    def pretend(others: dict[str, str]) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: others.get(name) or real(name))
        versions.check_versions.cache_clear()

    yield pretend
    versions.check_versions.cache_clear()


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are these whatever those of pyproject.toml become."""
    lines = ["torch>=2.11", "transformers>=5.17", "unheard-of>=1", 'peft>=0.18; extra == "peft"']
    lines += ['galore-torch==1.0; extra == "parity"', 'tomli>=2; python_version < "3" and extra == "peft"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)


def test_all_that_is_too_old_is_named_with_the_command_that_mends_it(installed: Installed) -> None:
    installed({"torch": "2.8.0+cu128", "transformers": "5.3.0"})
    with pytest.raises(OptionError) as error:
        versions.check_versions()
    assert str(error.value) == (
        "installed packages: got 'torch 2.8.0+cu128, transformers 5.3.0', wanted torch>=2.11 and transformers>=5.17. "
        "Run: pip install 'torch>=2.11' 'transformers>=5.17'"
    )


@pytest.mark.parametrize("fits", ["2.11.0", "2.11.0a0+c5b1de8.nv26.2", "2.13.0+cpu", "3.0.dev1", "10.0"])
def test_a_version_that_fits_is_taken(installed: Installed, fits: str) -> None:
    installed({"torch": fits, "transformers": "5.17.0"})
    versions.check_versions()


def test_an_import_and_a_command_refuse_and_doctor_reports(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import galore_trainer
    from galore_trainer.run import doctor

    installed({"transformers": "5.3.0"})
    with pytest.raises(OptionError, match=r"transformers 5\.3\.0"):
        _ = galore_trainer.galore_plugin
    assert main(["config", "list"]) == 2
    assert "Run: pip install 'transformers>=5.17'" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "hub", lambda: {"endpoint": "https://hub", "reachable": False, "problem": "no network"})
    assert main(["doctor"]) == 0
    assert "too old: pip install 'transformers>=5.17'" in capsys.readouterr().out


def test_a_package_of_an_extra_is_refused_where_it_is_used(installed: Installed) -> None:
    from galore_trainer.run.settings.methods import require_package

    installed({"peft": "0.5.0", "galore-torch": "1.1", "torch": "2.11", "transformers": "5.17"})
    versions.check_versions()
    assert versions.requirements()["peft"] == {"peft": ">=0.18"}
    with pytest.raises(OptionError, match=r"got 'peft 0\.5\.0', wanted peft>=0\.18"):
        require_package("method", "lora", "peft", "peft")
    with pytest.raises(OptionError, match=r"wanted galore-torch==1\.0"):
        versions.check_versions("parity")


def test_a_source_tree_that_is_not_installed_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert versions.requirements() == {}


def test_several_processes_on_cpus_load_an_optimizer_under_every_transformers(tmp_path: Path) -> None:
    """transformers before 5.18 asks torch for "cpu:0", which torch alone refuses."""
    importlib.import_module("galore_trainer.hf.reading")
    torch.save({"a": torch.arange(3)}, tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 0), weights_only=True)
    assert torch.equal(loaded["a"], torch.arange(3))
