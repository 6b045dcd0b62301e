"""Whatever happens to a file of a checkpoint, ``--resume auto`` tells of it and goes on from the one before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from damages import MANIFESTS, WAYS, falls_back, files_of, write_manifest
from faults import Worker, equal, settings, state
from galore_trainer.errors import OptionError
from galore_trainer.run.launching.checkpoints import (
    ASIDE,
    MANIFEST,
    checkpoints,
    choose_checkpoint,
    make_way,
    newest_whole,
    seal,
)


@pytest.mark.parametrize("way", WAYS)
def test_each_file_of_a_checkpoint_is_missed(way: str, two_checkpoints: Path) -> None:
    files = files_of(two_checkpoints / "checkpoint-5")
    assert {"optimizer.pt", "model.safetensors", "trainer_state.json", "rng_state.pth", MANIFEST} <= {*files}
    assert [name for name in files if not falls_back(two_checkpoints, name, WAYS[way])] == []


@pytest.mark.parametrize("form", MANIFESTS)
def test_a_manifest_that_says_nothing_is_damage(form: str, two_checkpoints: Path) -> None:
    assert falls_back(two_checkpoints, MANIFEST, write_manifest(MANIFESTS[form]))


@pytest.fixture
def run(two_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(two_checkpoints, tmp_path / "run"))


def test_what_is_no_checkpoint_is_passed_by(run: Path) -> None:
    for name in ("checkpoint-²", "checkpoint-٣", "checkpoint-", "checkpoint-007", "checkpoint-9.old", "checkpoint--8"):
        (run / name).mkdir()
    for name, target in (
        ("checkpoint-10", "nowhere"),
        ("checkpoint-11", "checkpoint-11"),
        ("checkpoint-12", "result.json"),
    ):
        (run / name).symlink_to(target)
    (run / "checkpoint-13").write_text("a file")
    (run / f"checkpoint-{'9' * 5000}"[:200]).mkdir()
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-{step}" for step in (13, 12, 11, 10, 5, 4)]
    chosen, notes = choose_checkpoint("auto", run)
    assert chosen == run / "checkpoint-5"
    assert notes[:4] == [f"checkpoint-{step} is not used: it is no folder" for step in (13, 12, 11, 10)]
    assert make_way(run, chosen) == [f"checkpoint-{step} was moved to {ASIDE}/" for step in (13, 12, 11, 10)]
    assert choose_checkpoint("auto", run) == (chosen, [f"resuming from {chosen}"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"global_step": 4}', "says step 4"),
        ('{"global_step": "../../x"}', "says step '../../x'"),
        ('{"global_step": true}', "says step True"),
        ('{"global_step": -5}', "says step -5"),
        ("null", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_sealed_state_of_another_step_is_damage(content: str, told: str, run: Path) -> None:
    (run / "checkpoint-5" / "trainer_state.json").write_text(content)
    seal(run / "checkpoint-5")
    chosen, notes = choose_checkpoint("auto", run)
    assert chosen == run / "checkpoint-4"
    assert told in notes[0]
    with pytest.raises(OptionError, match="trainer_state"):
        choose_checkpoint(str(run / "checkpoint-5"), run)


def test_weights_alone_are_refused_with_the_cause(run: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt"):
        (run / "checkpoint-5" / name).unlink()
    seal(run / "checkpoint-5")
    for resume in ("auto", str(run / "checkpoint-5")):
        with pytest.raises(OptionError, match="save_only_model"):
            choose_checkpoint(resume, run)


def test_going_back_sets_newer_checkpoints_aside(run: Path) -> None:
    assert make_way(run, run / "checkpoint-4") == [f"checkpoint-5 was moved to {ASIDE}/"]
    assert newest_whole(run) == run / "checkpoint-4"
    assert newest_whole(run / ASIDE) == run / ASIDE / "checkpoint-5"
    other = run / "elsewhere" / "checkpoint-4"
    shutil.copytree(run / "checkpoint-4", other)
    assert make_way(run, other) == [f"checkpoint-4 was moved to {ASIDE}/"]
    assert make_way(run, None) == []


def test_a_run_whose_checkpoints_are_all_damaged_begins_again(run: Path, tiny_model_dir: Path) -> None:
    """And one that was damaged is no part of the checkpoint that is written under its name."""
    whole = state(run)
    for step in (4, 5):
        (run / f"checkpoint-{step}" / MANIFEST).unlink()
        (run / f"checkpoint-{step}" / "junk").write_text("left over")
    (run / "model" / "model.safetensors").unlink()
    config = settings("galore_plus", tiny_model_dir, run, save_total_limit=2)
    worker = Worker(run.parent, {"config": config, "resume": "auto"})
    assert worker.wait() == 0, worker.said()
    assert "checkpoint-5 is not used: it has no manifest.json" in worker.said()
    assert "no whole checkpoint in" in worker.said()
    assert equal(whole, state(run))
    assert sorted(os.listdir(run / ASIDE)) == ["checkpoint-4", "checkpoint-5"]
    assert not (run / "checkpoint-4" / "junk").exists()
    assert json_of_result(run)["resumed_from_step"] is None


def json_of_result(run: Path) -> dict[str, object]:
    import json

    return dict(json.loads((run / "result.json").read_text()))
