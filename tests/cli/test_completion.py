"""What a shell offers after a part of a word; it must not wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from galore_trainer.cli.app import app
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.run_config import packaged_configs


def offered(words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Completions of the last word, as bash asks for them."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("_GALORE_FT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"galore-ft {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
    with pytest.raises(SystemExit):
        app([], prog_name="galore-ft")
    return set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train qu", {"quickstart"}),
        ("train ", {*packaged_configs(), "mine.yaml", "folder/"}),
        ("train mi", {"mine.yaml"}),
        ("train quickstart --method ", set(METHODS)),
        ("train quickstart --method adamw", {"adamw", "adamw_8bit"}),
        ("train quickstart --svd ", {"randomized", "exact"}),
        ("train quickstart --launch-config zero", {"zero1", "zero2", "zero3"}),
        ("estimate quickstart --methods adamw,lo", {"adamw,lora"}),
        ("data preview arith", {"arithmetic"}),
        ("ablate cross", {"cross_head"}),
        ("config show fs", {"fsdp2"}),
        ("config validate qu", {"quickstart"}),
        ("chat fo", {"folder/"}),
        ("chat ", {"folder/", "embedded:smollm2-135m"}),
        ("eval fo", {"folder/"}),
        ("config convert ", {"mine.yaml", "folder/"}),
        ("config ", {"list", "show", "validate", "convert", "schema"}),
    ],
)
def test_a_shell_completes_names(
    words: str,
    expected: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "other.txt").touch()
    (tmp_path / "folder").mkdir()
    assert offered(words, tmp_path, monkeypatch, capsys) == expected


def test_completion_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\nfrom galore_trainer.cli.main import main\n"
        "try:\n    main([])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    words = {"_GALORE_FT_COMPLETE": "complete_bash", "COMP_WORDS": "galore-ft train qu", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **words}, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.strip(), done.returncode) == ("quickstart", 0), done.stderr
