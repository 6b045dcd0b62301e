"""How the workers of ``pytest -n 2`` share the tests and the machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# One worker runs these: their processes are forks of one server, and some of their launches serve several tests.
TOGETHER = (
    "tests/distributed/",
    "tests/hf/test_ddp.py",
    "tests/run/test_launch.py",
    "tests/run/test_train.py",
    "tests/run/test_ablate.py",
    "tests/faults/",
)
# Other files of more than ten seconds begin early, so that no worker is left with one of them at the end.
LONG = ("tests/optim/test_sharded.py", "tests/kernels/", "tests/run/test_estimate.py", "tests/hf/test_smollm2.py")


def is_alone(item: pytest.Item | None) -> bool:
    """Whether a test starts several processes: it has the mark, or the fixture that starts them."""
    if item is None:
        return False
    return item.get_closest_marker("alone") is not None or "torchrun" in getattr(item, "fixturenames", ())


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests that run alone first, while the other workers have nothing yet that could keep them waiting."""

    def place(item: pytest.Item) -> tuple[bool, bool]:
        return not is_alone(item), not item.nodeid.startswith(LONG)

    return sorted(items, key=place)


class Scheduling(LoadScopeScheduling):
    """A file a worker, in the order of the collection; files that stand together are as one."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "together" if file.startswith(TOGETHER) else file

    def remove_node(self, node: Any) -> str | None:
        """Give the tests of a worker that crashed to the others, but for the one that it crashed in."""
        work = self.assigned_work[node].values()
        unit, test = next(((unit, test) for unit in work for test, done in unit.items() if not done), (None, None))
        if unit is not None:
            unit[test] = True
        super().remove_node(node)
        return test


class Turns:
    """A test that starts several processes has the machine for itself: the other workers wait at their next test.

    Three busy processes on two cores make each other miss their deadlines. All tests hold one lock, shared or
    exclusive, for which they ask through a second one: those who share it cannot keep out the one who waits.
    """

    def __init__(self) -> None:
        here = Path(__file__)
        locked = here, here.with_name("forked.py")  # any two files that all workers see
        self.gate, self.room = (path.open("r+" if os.access(path, os.W_OK) else "r") for path in locked)
        self.kept = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        if not self.kept:
            fcntl.flock(self.gate, fcntl.LOCK_EX)
            fcntl.flock(self.room, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
            fcntl.flock(self.gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            self.kept = is_alone(item) and is_alone(nextitem)
            if not self.kept:
                fcntl.flock(self.room, fcntl.LOCK_UN)
