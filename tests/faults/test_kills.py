"""A run that is killed three times, wherever that may be, comes to what it would have come to; see ``__main__.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from faults import LAST, VARIANTS, Campaign, Kill

KILLS: dict[str, list[Kill]] = {
    "galore_plus": [("half of the optimizer", 2), ("half of the rotation", 4), ("half of the model", LAST)],
    "layer-wise, 8 bits": [("before the manifest", 2), ("before the rotation", 4), ("half of the weights", LAST)],
    "bfloat16, 16 bits": [("update", 1), ("half of the manifest", 4), ("before the result", LAST)],
    "AdamW": [("after the rotation", 2), ("the checkpoint was loaded", 0), ("before the manifest", LAST)],
    "LoRA": [("before the trainer's state", 4), ("checkpoints were moved aside", 0), ("before the rotation", LAST)],
    "TRL": [("before the save", 2), ("forward", 4), ("half of the optimizer", LAST)],
    "two processes": [("before the manifest", 4), ("half of the rotation", LAST)],
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.alone] * (name == "two processes")) for name in VARIANTS]
)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(variant: str, campaign: Callable[[str], Campaign]) -> None:
    if variant == "TRL":
        pytest.importorskip("trl")
    if variant == "LoRA":
        pytest.importorskip("peft")
    outcome = campaign(variant).kill("killed", KILLS[variant])
    assert (outcome.lost, outcome.equal) == (0, True)
