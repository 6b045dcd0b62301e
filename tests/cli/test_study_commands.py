"""``galore-ft ablate`` and ``galore-ft report``: what reaches them, what they print, what each outcome exits with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError
from galore_trainer.run.report import write as report
from galore_trainer.run.study import sweep as ablate


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Sweeps are remembered instead of run; append an outcome to the list's first entry to set it."""
    seen: list[tuple[Any, ...]] = []

    def fake(study: Any, output: Path, **options: Any) -> Any:
        seen.append((study, output, options))
        return fake.outcome  # type: ignore[attr-defined]

    fake.outcome = ablate.Outcome({}, 0, False)  # type: ignore[attr-defined]
    monkeypatch.setattr(ablate, "ablate", fake)
    return seen


def set_outcome(*values: Any) -> None:
    ablate.ablate.outcome = ablate.Outcome(*values)  # type: ignore[attr-defined]


def test_arguments_reach_the_sweep(sweeps: list, capsys: pytest.CaptureFixture[str]) -> None:
    words = "ablate rank base=mawps data.source=a.json --seeds 3,5 --jobs 2 --only 16 --max-cells 1 --keep-models"
    assert main([*words.split(), "--output-dir", "runs/x y"]) == 0
    study, output, options = sweeps[0]
    assert (study.name, study.base, study.seeds) == ("rank", "mawps", (3, 5))
    assert output == Path("runs/x y")
    assert options["jobs"] == 2
    assert (options["only"], options["max_cells"], options["keep_models"]) == ("16", 1, True)
    assert options["command"] == (
        "galore-ft ablate rank base=mawps data.source=a.json --output-dir 'runs/x y' --seeds 3,5 --jobs 2 --only 16 "
        "--max-cells 1"
    )
    assert "galore-ft report 'runs/x y'" in capsys.readouterr().out
    assert main(["ablate", "svd"]) == 0
    assert sweeps[1][1] == Path("runs/ablate-svd")
    assert sweeps[1][0].seeds == (0, 1, 2)


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (({}, 0, False), 0, "galore-ft report"),
        (({}, 3, False), 0, "3 runs are still to do"),
        (({"rank 16, seed 0": "out of memory"}, 0, False), 1, "failed: rank 16, seed 0: out of memory"),
        (({}, 3, True), 130, "the same command goes on"),
    ],
)
def test_each_outcome_has_its_exit_code(
    outcome: tuple, code: int, said: str, sweeps: list, capsys: pytest.CaptureFixture[str]
) -> None:
    set_outcome(*outcome)
    assert main(["ablate", "rank"]) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ablate"], "STUDY"),
        (["ablate", "ranks"], "Did you mean 'rank'?"),
        (["ablate", "rank", "galore.rank=8"], "varies"),
        (["ablate", "rank", "galore.rnk=8"], "Did you mean 'galore.rank'?"),
        (["ablate", "rank", "--seeds", "a,b"], "--seeds 0,1,2"),
        (["ablate", "rank", "--seeds", "1,1"], "different integers"),
        (["ablate", "rank", "--jobs", "0"], "--jobs"),
        (["ablate", "rank", "--dry-run", "--only", "13"], "The cells are rank 16"),
        (["report"], "RUNS"),
        (["report", "nowhere"], "result.json"),
    ],
)
def test_a_mistake_exits_with_2_and_says_why(
    words: list[str], said: str, sweeps: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert sweeps == []


def test_a_dry_run_prints_the_plan_and_runs_nothing(
    sweeps: list, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["ablate", "cross_head", "--dry-run", "data.train_samples=64", "--output-dir", str(tmp_path / "out")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "4 cells x 3 seeds of arithmetic" in out
    assert "head_sharing per_head        8" in out  # 64 examples, 16 at a time, two epochs
    assert sweeps == []
    assert not (tmp_path / "out").exists()


def test_studies_are_listed_and_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "list"]) == 0
    assert "cross_head" in capsys.readouterr().out
    assert main(["config", "show", "svd"]) == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text(capsys.readouterr().out)
    assert main(["ablate", str(mine), "--dry-run", "max_steps=3", "--output-dir", str(tmp_path / "out")]) == 0
    assert "randomized, 3 iterations" in capsys.readouterr().out


def test_report_names_the_files_it_wrote(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple] = []

    def fake(runs: list[str], target: Path, *, title: str | None, command: str) -> list[Path]:
        seen.append((runs, target, title, command))
        return [target / "report.html"]

    monkeypatch.setattr(report, "report", fake)
    assert main(["report", "runs/a"]) == 0
    assert main(["report", "runs/a", "runs/b", "--title", "Two"]) == 0
    assert main(["report", "runs/a", "-o", "out"]) == 0
    assert [entry[1] for entry in seen] == [Path("runs/a/report"), Path("report"), Path("out")]
    assert [entry[2] for entry in seen] == [None, "Two", None]
    assert seen[2][3] == "galore-ft report runs/a -o out"
    assert "runs/a/report/report.html" in capsys.readouterr().out


def test_a_refused_report_is_an_error_of_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OptionError("RUNS", ["a"], "finished runs alone", "Finish them.")

    monkeypatch.setattr(report, "report", refuse)
    assert main(["report", "a"]) == 2
    assert "Finish them." in capsys.readouterr().err
