"""The optimizer with its state in fewer bits: it trains as well, resumes bit for bit, and takes the room it says."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.hf.build import galore_groups
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.targets.groups import plan_weights

METHOD: dict[str, Any] = {
    "rank": 4,
    "update_proj_gap": 5,
    "scale": 1.0,
    "plain_lr_ratio": 1.0,
    "residual": "sparse",
    "residual_warmup_steps": 2,
}
BITS = [
    {"state_bits": 16, "basis_bits": 16, "plain_state_bits": 16},
    {"state_bits": 8, "basis_bits": 8, "plain_state_bits": 8},
]


def make(config: GaLoreConfig, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, GaLoreAdamW]:
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ).to(dtype)
    return model, GaLoreAdamW(galore_groups(model, config, lr=3e-3, weight_decay=0.1), config, lr=3e-3, seed=7)


def batches(steps: int) -> Tensor:
    """Every row counts upwards, so there is something to learn."""
    start = torch.randint(0, 48, (steps, 8, 1), generator=torch.Generator().manual_seed(5))
    return (start + torch.arange(12)) % 48


def train(model: nn.Module, optimizer: GaLoreAdamW, data: Tensor) -> list[float]:
    losses = []
    for batch in data:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("bits", "dtype", "layerwise"),  # each pair of values once
    [
        (BITS[0], torch.float32, False),
        (BITS[0], torch.bfloat16, True),
        (BITS[1], torch.float32, True),
        (BITS[1], torch.bfloat16, False),
    ],
    ids=["16-float32", "16-bfloat16-layerwise", "8-float32-layerwise", "8-bfloat16"],
)
def test_it_learns_as_well_as_with_32_bits(bits: dict[str, int], dtype: torch.dtype, layerwise: bool) -> None:
    ends = []
    for more in ({}, bits):
        losses = train(*make(GaLoreConfig(**METHOD, **more, layerwise=layerwise), dtype), batches(40))
        ends.append(sum(losses[-5:]) / 5)
        assert ends[-1] < 0.6 * losses[0]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


@pytest.mark.parametrize("bits", BITS, ids=["16", "8"])
@pytest.mark.parametrize("transfer", ["rotate", "align", "reset"])
def test_a_resumed_run_equals_an_uninterrupted_one(bits: dict[str, int], transfer: str) -> None:
    config = GaLoreConfig(**METHOD, **bits, momentum_transfer=transfer)
    whole, optimizer = make(config, torch.bfloat16)
    train(whole, optimizer, batches(12))
    first, optimizer = make(config, torch.bfloat16)
    train(first, optimizer, batches(12)[:7])
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, resumed = make(config, torch.bfloat16)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, batches(12)[7:])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("bits", [{}, *BITS], ids=["32", "16", "8"])
def test_the_state_takes_the_room_that_was_told(bits: dict[str, int]) -> None:
    config = GaLoreConfig(**METHOD, **bits)
    model, optimizer = make(config)
    train(model, optimizer, batches(4))
    told = {"basis": 0, "moments": 0, "residual": 0, "plain": 0}
    for weight in plan_weights(model, config):
        for kind, size in weight.state_bytes(config).items():
            told[kind] += size
    taken = optimizer.state_bytes()
    matrices, plain = 14, 6
    age = 4 if config.sparse_percent else 0
    counters = {"basis": 0, "moments": (4 + 12) * matrices, "residual": age * matrices, "plain": (4 + 12) * plain}
    assert taken == {kind: told[kind] + counters[kind] for kind in told}


@pytest.mark.parametrize("bits", BITS, ids=["16", "8"])
def test_a_skipped_step_leaves_every_bit_as_it_is(bits: dict[str, int]) -> None:
    model, optimizer = make(GaLoreConfig(**METHOD, **bits), torch.bfloat16)
    train(model, optimizer, batches(4))
    before = [{k: v.clone() for k, v in s.items() if isinstance(v, Tensor)} for s in optimizer.state.values()]
    (model(input_ids=batches(1)[0], labels=batches(1)[0]).loss * float("nan")).backward()
    optimizer.step()
    for old, new in zip(before, optimizer.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old if key != "skipped")


def test_another_number_of_bits_is_refused_at_resume() -> None:
    model, optimizer = make(GaLoreConfig(**METHOD))
    train(model, optimizer, batches(2))
    _, other = make(GaLoreConfig(**METHOD, state_bits=8))
    with pytest.raises(OptionError, match=r"galore\.state_bits: got 8, wanted 32 as in the checkpoint"):
        other.load_state_dict(optimizer.state_dict())
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        group.get("galore", {}).pop("state_bits", None)  # as a checkpoint from before the field was
    make(GaLoreConfig(**METHOD))[1].load_state_dict(old)
