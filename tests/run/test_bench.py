"""Ratios follow from what was timed; the command writes a row for each line of its table. No test looks at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_trainer.cli.main import main
from galore_trainer.run.bench import rows, weights
from galore_trainer.run.bench.measure import Timing, copy_bandwidth, percentile, ratio, take_turns
from galore_trainer.run.bench.ranks import RANKS, RandomBases
from galore_trainer.run.bench.refresh import USUAL
from galore_trainer.run.bench.weights import Bench, galore_plus, linear_weights

TINY = Bench(
    shape="tiny",
    layers=1,
    model_layers=1,
    rank=4,
    lora_rank=2,
    dtype="float32",
    batch_size=1,
    length=8,
    gap=10,
    rounds=1,
    steps=2,
    device="cpu",
)


def taking(*ms: float) -> Timing:
    return Timing(ms, ms)


def test_a_ratio_is_that_of_rounds_that_ran_together() -> None:
    found = ratio(taking(2.0, 4.0, 9.0), taking(1.0, 4.0, 3.0))
    assert found == {"ratio": 2.0, "low": 1.5, "high": 2.5}
    assert ratio(taking(1.0, 3.0), 2.0, plus=1.0) == {"ratio": 1.5, "low": 1.25, "high": 1.75}
    assert ratio(taking(6.0), taking(1.0), other_plus=2.0)["ratio"] == 2.0
    assert percentile(range(1, 101), 0.99) == 99


def test_the_rows_follow_from_what_the_parts_found() -> None:
    found: dict[str, Any] = {
        "step": {
            "timings": {
                "GaLore+": taking(8.0),
                "GaLore+, scaled residual": taking(10.0),
                "GaLore+, residual": taking(12.0),
                "AdamW fused": taking(16.0),
            },
            "floor": 5.0,
        },
        "ranks": {
            "timings": {
                **{f"r {rank}": taking(ms) for rank, ms in zip(RANKS, (5.5, 8.0, 9.0, 14.0, 30.0), strict=True)},
                "scaled residual": taking(9.5),
                "sparse residual": taking(11.0),
                "16-bit state": taking(8.0),
                "8-bit state": taking(10.0),
                "one step alone": taking(8.8),
                "AdamW fused": taking(20.0),
            },
            "limits": {f"r {rank}": 5.0 for rank in RANKS},
        },
        "small": {
            "timings": {
                **{f"update, {name}": taking(ms) for name, ms in (("AdamW fused", 2.0), ("GaLore+", 3.0))},
                **{f"training, {name}": taking(ms) for name, ms in (("AdamW fused", 50.0), ("GaLore+", 51.0))},
            }
        },
        "refresh": {
            "timings": {
                USUAL: taking(30.0),
                f"{USUAL}, r 256": taking(45.0),
                f"{USUAL}, r 512": taking(90.0),
            },
            "svd": 60000.0,
        },
        "e2e": {
            "timings": {
                "forward and backward": taking(100.0),
                "GaLore+": taking(109.0),
                "AdamW fused": taking(110.0),
                "galore-torch": taking(120.0),
                "LoRA": taking(180.0),
                "GaLore+, layer-wise": taking(121.0),
                "GaLore+, scaled residual": taking(110.0),
                "GaLore+, clipping inside the step": taking(104.0),
            },
            "refresh": taking(200.0),
            "svd": 50000.0,
            "staggered": [100.0] * 99 + [150.0],
            "together": [99.5] * 100,
        },
    }
    told = rows.rows_of(found, Bench(gap=200), device="d", commit="c")
    found_and_bounds = {row["name"]: (row["ratio"] and round(row["ratio"], 4), row["bound"]) for row in told}
    assert found_and_bounds == {
        "step: GaLore+ / bandwidth floor": (1.6, 1.35),
        "step: GaLore+ / AdamW fused": (0.5, 0.5),
        "step: GaLore+, scaled residual / AdamW fused": (0.625, 0.6),
        "step: GaLore+, residual / AdamW fused": (0.75, 0.85),
        "steps in a row: r 32 / limit": (1.1, 1.15),
        "steps in a row: r 128 / limit": (1.6, 1.25),
        "steps in a row: r 256 / limit": (1.8, 1.3),
        "steps in a row: r 512 / limit": (2.8, 1.35),
        "steps in a row: r 1024 / limit": (6.0, 1.35),
        "steps in a row: r 512 / AdamW fused": (0.7, 0.85),
        "steps in a row: r 1024 / AdamW fused": (1.5, 1.6),
        "steps in a row: scaled residual / AdamW fused": (0.475, 0.6),
        "steps in a row: scaled residual adds, ms": (1.5, 2.0),
        "steps in a row: sparse residual adds, ms": (3.0, 2.6),
        "steps in a row: 16-bit state / 32-bit": (1.0, 1.05),
        "steps in a row: 8-bit state / 32-bit": (1.25, 1.15),
        "one step alone / a step of several in a row": (1.1, 1.1),
        "SmolLM2-135M, update: GaLore+ / AdamW fused": (1.5, 1.5),
        "SmolLM2-135M, update: GaLore+, scaled residual / AdamW fused": (None, 1.5),
        "SmolLM2-135M, training: GaLore+ / AdamW fused": (1.02, 1.01),
        "SmolLM2-135M, training: GaLore+, scaled residual / AdamW fused": (None, 1.01),
        "refresh: GaLore+ / galore-torch": (0.0005, 1 / 500),
        "refresh: r 256 / r 128": (1.5, 1.6),
        "refresh: r 512 / r 128": (3.0, 3.0),
        "refresh a step / forward and backward": (0.01, 0.01),
        "step with staggered refresh: 99th percentile / median": (1.0, 1.1),
        "step with staggered refresh: mean / mean with all at once": (round(100.5 / 99.5, 4), 1.01),
        "training: GaLore+ / forward and backward": (1.09, 1.06),
        "training: clipping inside the step / forward and backward": (1.04, 1.04),
        "training: scaled residual / AdamW fused": (1.0, 1.0),
        "training: GaLore+ / galore-torch": (round(110 / 370, 4), 1 / 3.6),
        "training: GaLore+ / AdamW fused": (1.0, 1.0),
        "training: GaLore+ / LoRA": (round(110 / 180, 4), 0.75),
        "training: GaLore+ / DoRA": (None, 0.42),
        "training: GaLore+ layer-wise / GaLore+": (1.1, 1.05),
    }
    notes = {row["name"]: row["note"] for row in told if row["ratio"] is None}
    assert notes["training: GaLore+ / DoRA"] == "DoRA was not timed"
    assert len(notes) == 3
    assert rows.rows_of({"refresh": found["refresh"]}, Bench())[0]["name"] == "refresh: GaLore+ / galore-torch"


def test_methods_take_turns() -> None:
    calls: list[str] = []
    found = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, torch.device("cpu"))
    assert calls == [*"aaabbb", *"ababab"]
    assert {name: len(timing.ms) for name, timing in found.items()} == {"a": 3, "b": 3}
    assert copy_bandwidth(torch.device("cpu")) > 0.0


def test_random_bases_take_the_place_of_those_of_gradients() -> None:
    """Equal seeds give equal bases whatever the gradients are; afterwards bases are orthonormal again."""
    found = []
    for size in (1.0, 2.0):
        model = linear_weights(TINY)
        for p in model.parameters():
            p.grad = None if p.grad is None else torch.randn_like(p) * size
        optimizer = galore_plus(TINY, model)
        torch.manual_seed(0)
        with RandomBases():
            optimizer.step()
        name, _ = next(iter(optimizer.projected_weights()))
        found.append(optimizer.state_of(name)["basis"])
    assert torch.equal(*found)
    optimizer.refresh_now()
    basis = optimizer.state_of(name)["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(TINY.rank).expand(len(basis), -1, -1), rtol=0, atol=1e-5)


def test_a_refresh_that_is_asked_for_changes_every_basis_and_no_weight() -> None:
    model = linear_weights(TINY)
    optimizer = galore_plus(TINY, model)
    optimizer.step()
    before = {name: p.clone() for name, p in optimizer.projected_weights()}
    for p in model.parameters():
        p.grad = None if p.grad is None else torch.randn_like(p)
    bases = {name: optimizer.state_of(name)["basis"].clone() for name in before}
    optimizer.refresh_now()
    for name, p in optimizer.projected_weights():
        assert torch.equal(p, before[name])
        assert not torch.allclose(optimizer.state_of(name)["basis"], bases[name])


def test_an_svd_that_is_handed_out_again_is_computed_once_for_each_shape() -> None:
    original, A, B = torch.linalg.svd, torch.randn(4, 3), torch.randn(4, 3)
    with weights.CopiedSvd():
        first, second = torch.linalg.svd(A, full_matrices=False), torch.linalg.svd(B, full_matrices=False)
    assert torch.linalg.svd is original
    assert first is second
    torch.testing.assert_close(first[0] * first[1] @ first[2], A)


def test_the_command_writes_a_row_for_each_line_and_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, details = tmp_path / "speed.json", tmp_path / "details.json"
    words = ["--layers", "1", "--model-layers", "1", "--rounds", "1", "--steps", "2", "--device", "cpu"]
    assert main(["bench", "all", "--json", str(file), "--details", str(details), *words]) == 0
    written = json.loads(file.read_text())
    assert [row["name"] for row in written] == [name for _, name, _, _ in rows.ROWS]
    assert all(set(row) >= {"name", "ratio", "bound", "low", "high", "unit", "device", "commit"} for row in written)
    assert json.loads(details.read_text())["bench"]["layers"] == 1
    told = capsys.readouterr().out
    assert "adamw_8bit: left out, it needs a GPU" in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bench", "speed"], "one of step, ranks, small, refresh, e2e, all"),
        (["bench", "--shape", "huge"], "one of tiny"),
        (["bench", "--device", "tpu"], "cuda where there is a GPU"),
        (["bench", "step", "--profile", "--device", "cpu"], "a GPU, whose kernels it lists"),
    ],
)
def test_what_cannot_be_timed_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert says in capsys.readouterr().err
