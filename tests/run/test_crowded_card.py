"""Runs of a sweep that are out of memory beside others wait, and run again with fewer beside them."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from galore_trainer.run.study import sweep as module
from galore_trainer.run.study.sweep import ablate

MakeStudy = Callable[..., Any]


def statuses(output: Path) -> set[str]:
    record = json.loads((output / "study.json").read_text())
    return {run["status"] for cell in record["cells"] for run in cell["runs"]}


class Card:
    """Runs that share a device with room for some of them, one tick a poll."""

    def __init__(self, room: int, sizes: dict[str, int], ticks: int = 3) -> None:
        self.room, self.sizes, self.ticks = room, sizes, ticks
        self.running: dict[str, list[int]] = {}
        self.most, self.started = 0, list[str]()

    def start(self, command: list[str], log: IO[bytes], environment: dict[str, str]) -> Any:
        path = Path(command[4])
        name = path.parent.name
        self.started.append(name)
        self.running[name] = [0]
        process = types.SimpleNamespace(returncode=None)

        def poll() -> int | None:
            self.most = max(self.most, len(self.running))
            self.running[name][0] += 1
            if self.running[name][0] < self.ticks:
                return None
            used = sum(self.sizes.get(other, 1) for other in self.running)
            process.returncode = 1 if used > self.room else 0  # an evaluation at the end takes all of it
            if process.returncode:
                with path.with_suffix(".log").open("a") as file:
                    file.write("Failed: CUDA out of memory. Tried to allocate 2 GiB\n")
            else:
                folder = path.with_suffix("")
                folder.mkdir(exist_ok=True)
                (folder / "result.json").write_text(json.dumps({"steps": 4, "score_after": None}))
            del self.running[name]
            return process.returncode

        process.poll = poll
        return process


@pytest.mark.parametrize(("room", "sizes"), [(3, {}), (1, {}), (5, {"rank-2": 5}), (12, {})])
def test_what_has_no_room_beside_others_waits(
    room: int, sizes: dict[str, int], make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card, said = Card(room, sizes), list[str]()
    monkeypatch.setattr(module, "start_process", card.start)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    ranks = list(range(2, 14))
    outcome = ablate(make_study({"galore.rank": ranks}), tmp_path / "out", jobs=12, timing=False, say=said.append)
    assert outcome == module.Outcome({}, 0, False)
    assert card.most == 12
    again = len(card.started) - len(ranks)
    assert (again > 0) == (room < 12)
    assert again == sum("waits: out of memory beside" in line for line in said)
    assert statuses(tmp_path / "out") == {"finished"}


class Crowded(Card):
    """A card on which equal runs fail at the same moment: each has seen the others at the peak of its memory."""

    def start(self, command: list[str], *rest: Any) -> Any:
        process = super().start(command, *rest)
        poll, peak = process.poll, [0]

        def crowded() -> int | None:
            peak[0] = max(peak[0], len(self.running))
            room, self.room = self.room, 0 if peak[0] > self.room else sys.maxsize
            try:
                return poll()
            finally:
                self.room = room

        process.poll = crowded
        return process


def test_runs_that_fail_at_the_same_moment_are_tried_again_by_half(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card, said = Crowded(6, {}), list[str]()
    monkeypatch.setattr(module, "start_process", card.start)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    study = make_study({"galore.rank": list(range(2, 14))})
    outcome = ablate(study, tmp_path / "out", jobs=12, timing=False, say=said.append)
    assert outcome == module.Outcome({}, 0, False)
    assert sum("waits: out of memory beside 11 others" in line for line in said) == 12
    assert sum("from now on 6 at a time" in line for line in said) >= 1
    assert not any("from now on 1 at a time" in line for line in said)


def test_a_run_that_has_no_room_alone_has_failed(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = Card(3, {"rank-3": 4})
    monkeypatch.setattr(module, "start_process", card.start)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    outcome = ablate(
        make_study({"galore.rank": [2, 3, 4]}), tmp_path / "out", jobs=3, timing=False, say=lambda text: None
    )
    assert outcome.failed == {"rank 3, seed 0": "out of memory: CUDA out of memory. Tried to allocate 2 GiB"}
    assert outcome.unfinished == 0
