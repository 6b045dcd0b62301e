"""Two processes under DDP, FSDP2 and ZeRO end where one process ends, and resume as if nothing had been.

fp32, gloo, no accelerator. The sizes make ZeRO cut inside rows and leave a process without a part of some weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed not installed")
ZERO = [pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)]
Launch = Callable[..., Any]


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", *ZERO])
def test_two_processes_equal_one_and_resume_bit_for_bit(backend: str, launch: Launch) -> None:
    (one, _), (two, resumed) = launch(1, "single").found, launch(2, backend).found
    assert two["share"] == 1.0 if backend == "ddp" else 0.3 < two["share"] < 0.7
    assert_equal(one, two)
    for name, whole in two["weights"].items():
        assert torch.equal(resumed["weights"][name], whole), name


@pytest.mark.parametrize("backend", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_attach_to_a_trainer_equals_the_plugin_bit_for_bit(backend: str, launch: Launch) -> None:
    by_plugin, by_attach = (launch(2, backend, settings).found for settings in ("{}", '{"attach": true}'))
    for wanted, found in zip(by_plugin, by_attach, strict=True):
        assert found["share"] == wanted["share"] < 0.7
        for name, w in wanted["weights"].items():
            assert torch.equal(found["weights"][name], w), name


@pytest.mark.parametrize("settings", ['{"layerwise": true}', '{"layerwise": true, "embeddings": "frozen"}'])
def test_layer_wise_mode_on_two_processes_equals_it_on_one(settings: str, launch: Launch) -> None:
    (one, _), (two, resumed) = launch(1, "single", settings).found, launch(2, "ddp", settings).found
    assert_equal(one, two)
    for name, whole in two["weights"].items():
        assert torch.equal(resumed["weights"][name], whole), name


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_clipping_inside_the_step_takes_the_norm_of_all_processes(backend: str, launch: Launch) -> None:
    """0.5 is the Trainer's limit in the other run; each of the six norms is above it."""
    (one, _), (two, resumed) = launch(1, "single").found, launch(2, backend, '{"max_grad_norm": 0.5}').found
    assert min(two["norms"]) > 0.5
    assert_equal(one, two)
    for name, whole in two["weights"].items():
        assert torch.equal(resumed["weights"][name], whole), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_without_rows_loses_nothing_at_a_resume(dtype: str, torchrun: Launch, tmp_path: Path) -> None:
    torchrun(3, Path(__file__).with_name("few_rows.py"), str(tmp_path), dtype)


def assert_equal(one: Any, two: Any) -> None:
    """Six steps move weights by some 0.05; sums over processes come in another order."""
    start = one["weights"].keys()
    assert two["weights"].keys() == start
    total = count = 0.0
    for name, w in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], w, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        total += (two["weights"][name] - w).abs().sum().item()
        count += w.numel()
    assert total / count < 1e-7
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
