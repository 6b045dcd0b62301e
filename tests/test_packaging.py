"""What is installed is what stands in the repository, under the one name ``galore_trainer``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}


def packages_on_disk() -> dict[str, Path]:
    """Installed name of every folder that holds Python files."""
    return {
        ".".join((name, *path.parent.relative_to(folder).parts)): path.parent
        for name, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }


def data_files(suffix: str) -> set[Path]:
    """Files that pyproject.toml's package-data names."""
    patterns = SETUPTOOLS["package-data"].items()
    found = {path for name, globs in patterns for glob in globs for path in FOLDERS[name].glob(glob)}
    return {path for path in found if path.name.endswith(suffix)}


def test_every_package_on_disk_is_listed_and_every_listed_one_is_there():
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_on_disk())


def test_every_package_has_an_init():
    assert [str(folder) for folder in packages_on_disk().values() if not (folder / "__init__.py").is_file()] == []


def test_every_yaml_every_template_and_the_type_marker_are_package_data():
    for suffix in (".yaml", ".jinja"):
        on_disk = {path for folder in FOLDERS.values() for path in folder.rglob(f"*{suffix}")}
        assert data_files(suffix) == on_disk != set()
    assert data_files("py.typed") == {ROOT / "galore_trainer" / "py.typed"}


def test_a_package_folder_holds_nothing_that_is_not_installed():
    ignored = {"__pycache__", "galore_trainer.egg-info"}
    files = {path for folder in FOLDERS.values() for path in folder.rglob("*") if path.is_file()}
    files = {path for path in files if not ignored & {*path.parts}}
    assert files == {path for path in files if path.suffix == ".py"} | data_files("")


def test_only_one_name_is_installed():
    assert {name.split(".")[0] for name in SETUPTOOLS["packages"]} == {"galore_trainer"}
    assert SETUPTOOLS["include-package-data"] is False


def test_version_stands_in_the_package_too():
    import galore_trainer

    assert galore_trainer.__version__ == PROJECT["project"]["version"]


def test_constraints_pin_every_requirement_and_hold_no_place():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {canonicalize_name(p.name): p for p in pinned if p.marker is None or p.marker.evaluate()}
    assert all(str(pin.specifier).startswith("==") and pin.url is None for pin in pinned)
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *(r for name in extras if name != "reasoning" for r in extras[name])]
    for requirement in map(Requirement, needed):
        if requirement.marker is None or requirement.marker.evaluate():
            version = str(here[canonicalize_name(requirement.name)].specifier).removeprefix("==")
            assert requirement.specifier.contains(version), requirement


def test_wheel_and_source_hold_what_they_should(tmp_path: Path):
    source = tmp_path / "source"  # a build leaves files beside its sources
    tracked = tracked_files()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    check_wheel({name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name})
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member.size for member in archive if member.isfile()}
    made = {name for name in members if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert members.keys() - made == tracked
    assert max(members.values()) < 1 << 20, "no data sets, no trained weights"


def tracked_files() -> set[str]:
    """The files that git tracks, as they are now."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


def check_wheel(names: set[str]) -> None:
    """The packages, their data, and nothing else."""
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in packages_on_disk().items()
        for path in folder.glob("*.py")
    }
    data = {
        f"{name.replace('.', '/')}/{path.relative_to(FOLDERS[name]).as_posix()}"
        for name, globs in SETUPTOOLS["package-data"].items()
        for glob in globs
        for path in FOLDERS[name].glob(glob)
    }
    assert names == expected | data
    assert {Path(name).suffix for name in names} == {".py", ".yaml", ".jinja", ".typed"}
