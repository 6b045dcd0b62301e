"""Runs on two processes that several tests look at: each backend trains once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).with_name("script.py")


class Outcome(NamedTuple):
    """Where ``script.py`` left its files, and what it found: of a run and its resume, or of each checkpoint."""

    folder: Path
    found: Any

    @property
    def checkpoint(self) -> Path:
        """What it saved after its third step."""
        return self.folder / "checkpoint-3"


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, two key-value heads, 111 columns in the feed-forward layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=111,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("odd-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def launch(
    odd_model: Path, torchrun: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Outcome]:
    """``launch(processes, backend, settings, checkpoints)``: equal calls give one run."""

    @functools.cache
    def once(processes: int, backend: str, settings: str = "{}", checkpoints: tuple[Path, ...] = ()) -> Outcome:
        folder = tmp_path_factory.mktemp(f"{backend}-{processes}")
        torchrun(processes, SCRIPT, backend, str(odd_model), str(folder), settings, *map(str, checkpoints))
        return Outcome(folder, torch.load(folder / "found.pt", weights_only=True))

    return once
