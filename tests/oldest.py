"""Print what is installed of the packages that pyproject.toml names; fail where one is not the oldest it accepts.

``make oldest`` runs this in its environment: a lower bound that cannot be installed with the others is no bound.
"""

from __future__ import annotations

import sys

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from galore_trainer.versions import requirements, version

NOT_INSTALLED = {"reasoning", "meteor", "apollo"}
"""Extras that ``make oldest`` leaves out: the first needs a C compiler, of the others one version fits."""


def main() -> int:
    """Print a line for each package; 1 where a bound differs from what is installed."""
    wrong = 0
    print(f"python {sys.version.split()[0]}")
    for extra, packages in requirements().items():
        for name, wanted in packages.items():
            if extra in NOT_INSTALLED:
                continue
            here = version(name)
            lowest = next(s.version for s in SpecifierSet(wanted) if s.operator in (">=", "=="))
            oldest = here is not None and Version(Version(here).base_version) == Version(lowest)
            print(f"{name} {here}" + ("" if oldest else f"  not the lower bound {lowest} of pyproject.toml"))
            wrong += not oldest
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
