"""The model card names the scale and the residual that a run was trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from galore_trainer.run.results.card import model_card
from galore_trainer.run.settings.run_config import RunConfig

FACTS = {"versions": {"python": "3.11.7"}, "device": "some processor"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"galore": {"scale": "auto", "residual": "scaled"}},
            "rank 32, scale auto, a new basis every 200 steps, scaled",
        ),
        ({"galore": {"residual": "none"}}, "no residual"),
        ({"galore": {"residual": "sparse", "residual_percent": 0.6}}, "residual of 0.6 %"),
        ({"galore": {"residual": "both"}}, "scaled residual, and moments of 1.2 %"),
        ({"method": "galore", "galore": {"scale": 0.25}}, "scale 0.25, a new basis every 200 steps, no residual"),
        ({"method": "lora", "lora": {"rank": 4, "use_rslora": True}}, "rank 4, alpha 16, rank-stabilised"),
    ],
)
def test_it_says_what_the_run_did(settings: dict[str, Any], words: str, short_run: Callable[..., RunConfig]) -> None:
    card = model_card(short_run(**settings), before=None, after=None, environment=FACTS)
    assert words in card
