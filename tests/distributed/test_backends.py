"""Two processes under DDP, FSDP2 and ZeRO end where one process ends, and resume as if nothing had been.

fp32, gloo, no accelerator. The sizes make ZeRO cut inside rows and leave a process without a part of some weights.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).with_name("script.py")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed not installed")
ZERO = [pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, two key-value heads, 111 columns in the feed-forward layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=111, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("odd-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def launch(processes: int, backend: str, model: Path, output: Path, settings: str = "{}", resume: str = "") -> Any:
    """What ``script.py`` found."""
    torchrun(processes, SCRIPT, backend, str(model), str(output), settings, *filter(None, [resume]))
    return torch.load(output / "found.pt", weights_only=True)


def torchrun(processes: int, script: Path, *words: str) -> None:
    """Run a script in several processes; its last words where it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    run = subprocess.run(
        [sys.executable, *command, str(script), *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    told = run.stderr.split("torch.distributed.elastic")[0]  # what follows is the launcher's own traceback
    assert run.returncode == 0, told[-4000:]


@pytest.fixture(scope="module")
def alone(odd_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process, whole weights."""
    return functools.cache(lambda settings: launch(1, "single", odd_model, tmp_path_factory.mktemp("one"), settings))


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", *ZERO])
def test_two_processes_equal_one_and_resume_bit_for_bit(
    backend: str, odd_model: Path, alone: Any, tmp_path: Path
) -> None:
    one, two = alone("{}"), launch(2, backend, odd_model, tmp_path)
    assert two["whole"]["share"] == 1.0 if backend == "ddp" else 0.3 < two["whole"]["share"] < 0.7
    assert_equal(one["whole"], two["whole"])
    for name, whole in two["whole"]["weights"].items():
        assert torch.equal(two["resumed"]["weights"][name], whole), name


@pytest.mark.parametrize("settings", ['{"layerwise": true}', '{"layerwise": true, "embeddings": "frozen"}'])
def test_layer_wise_mode_on_two_processes_equals_it_on_one(
    settings: str, odd_model: Path, alone: Any, tmp_path: Path
) -> None:
    one, two = alone(settings), launch(2, "ddp", odd_model, tmp_path, settings)
    assert_equal(one["whole"], two["whole"])
    for name, whole in two["whole"]["weights"].items():
        assert torch.equal(two["resumed"]["weights"][name], whole), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_without_rows_loses_nothing_at_a_resume(dtype: str, tmp_path: Path) -> None:
    torchrun(3, SCRIPT.with_name("few_rows.py"), str(tmp_path), dtype)


def test_a_checkpoint_of_two_fsdp2_processes_goes_on_in_one(odd_model: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "two", tmp_path / "one"):
        folder.mkdir()
    two = launch(2, "fsdp2", odd_model, tmp_path / "two")
    one = launch(1, "fsdp2", odd_model, tmp_path / "one", resume=str(tmp_path / "two" / "checkpoint-3"))
    for name, whole in two["whole"]["weights"].items():
        torch.testing.assert_close(one["whole"]["weights"][name], whole, rtol=0, atol=1e-5)


def assert_equal(one: Any, two: Any) -> None:
    """Six steps move weights by some 0.1; sums over processes come in another order."""
    start = one["weights"].keys()
    assert two["weights"].keys() == start
    total = count = 0.0
    for name, w in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], w, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        total += (two["weights"][name] - w).abs().sum().item()
        count += w.numel()
    assert total / count < 1e-7
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
