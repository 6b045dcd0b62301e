"""Checkpoints of an earlier version go on bit for bit, on one process and under each backend.

``tests/fixtures/make.py`` made them; it says what they are.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import PINNED, run_script

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXPECTED = {path.parent.name: path for path in sorted((FIXTURES / "checkpoints").glob("*/weights-9.safetensors"))}
VERSIONS = {"torch": torch.__version__, "transformers": version("transformers"), "machine": platform.machine()}
SAME = json.loads((FIXTURES / "checkpoints" / "versions.json").read_text(encoding="utf-8")) == VERSIONS


# Another version may sum in another order. Other vector widths moved one entry by 2.5e-6, where three steps move
# weights by up to 2e-2; in bfloat16 such a difference can round to the neighbour.
ELSEWHERE = {torch.float32: {"rtol": 0.0, "atol": 1e-4}, torch.bfloat16: {"rtol": 2.0**-7, "atol": 1e-3}}


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.alone)])
def test_checkpoints_of_an_earlier_version_go_on_bit_for_bit(processes: int | None, tmp_path: Path) -> None:
    cases = [case for case in EXPECTED if case.startswith("single") == (processes is None)]
    if importlib.util.find_spec("deepspeed") is None:
        cases = [case for case in cases if not case.startswith("zero")]
    assert len(cases) >= 4
    run_script(FIXTURES / "make.py", "--resume", str(tmp_path), *cases, processes=processes, **PINNED)
    for case in cases:
        expected, found = load_file(EXPECTED[case]), load_file(tmp_path / f"{case}.safetensors")
        assert found.keys() == expected.keys()
        for name, w in expected.items():
            if SAME:
                assert torch.equal(found[name], w), f"{case}: {name}"
            else:
                torch.testing.assert_close(found[name], w, **ELSEWHERE[w.dtype], msg=lambda m, n=name: f"{n}: {m}")


def test_they_hold_every_key_of_a_state() -> None:
    found: set[str] = set()
    for path in (FIXTURES / "checkpoints").glob("*/*/optimizer.pt"):
        for state in torch.load(path, weights_only=True)["state"].values():
            found |= {key.rsplit(".", 1)[-1] for key in state}
    moments = {f"{kind}{key}" for kind in ("", "residual_") for key in ("exp_avg", "exp_avg_sq")}
    counts = {"calls", "refreshes", "due", "born", "phase", "skipped", "step", "residual_step"}
    positions = {"candidate_index", "candidate_mean", "residual_index"}
    assert found == {*moments, *(f"{key}_scale" for key in moments), "basis", "basis_scale", *counts, *positions}
