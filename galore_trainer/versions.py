"""Versions of packages: what is installed, and what this project's own metadata (pyproject.toml) asks for."""

from __future__ import annotations

import functools
import importlib.metadata

from galore_trainer.errors import OptionError

DISTRIBUTION = "galore-trainer"


def version(package: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, dict[str, str]]:
    """Extra -> package -> versions that fit, such as ``>=2.11``; the extra ``""`` holds what is always needed.

    Empty where the project runs from its source without being installed.
    """
    from packaging.requirements import Requirement

    needed: dict[str, dict[str, str]] = {}
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    for line in map(Requirement, lines):
        # a marker that only one extra fulfils belongs to that extra; other markers are about the platform
        for extra in ["", *extras]:
            if line.marker is None or line.marker.evaluate({"extra": extra}):
                needed.setdefault(extra, {})[line.name] = str(line.specifier)
                break
    return needed


def fits(here: str | None, wanted: str) -> bool:
    """Whether an installed version is one of those that are wanted; None, for a package that is missing, is not."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    # a build between releases, such as 2.11.0a0 of a container, counts as its release
    return here is not None and Version(here).base_version in SpecifierSet(wanted)


def misfits(extra: str = "") -> dict[str, str]:
    """Installed packages whose version does not fit, with the versions that do; of an extra, or of what all need."""
    packages = requirements().get(extra, {}).items()
    return {name: wanted for name, wanted in packages if (here := version(name)) and not fits(here, wanted)}


@functools.cache  # a command and an import ask again and again
def check_versions(extra: str = "") -> None:
    """Refuse installed packages that are too old; one that is missing is reported where it is imported.

    Args:
        extra: check the packages of this extra in place of those that are always needed.

    Raises:
        OptionError: which version is there, which is wanted, and the command that installs it.
    """
    if wrong := misfits(extra):
        raise OptionError(
            "installed packages",
            ", ".join(f"{package} {version(package)}" for package in wrong),
            " and ".join(f"{package}{wanted}" for package, wanted in wrong.items()),
            f"Run: {install_command(wrong)}",
        )


def install_command(packages: dict[str, str]) -> str:
    """The command that installs fitting versions of packages."""
    quoted = (f"'{package}{wanted}'" for package, wanted in packages.items())
    return f"pip install {' '.join(quoted)}"
