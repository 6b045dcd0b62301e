"""Packed rows: no example is cut or lost, losses and gradients are those of rows of their own, and who cannot pack."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from galore_trainer.errors import OptionError
from galore_trainer.run.launching.plan import describe_plan
from galore_trainer.run.models.model import load_model
from galore_trainer.run.models.packing import PackedRows, PackingCollator, check_packing, fill
from galore_trainer.run.models.prompts import IGNORED, make_collator
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train

Run = Callable[..., RunConfig]
SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=256, num_attention_heads=4)
HEADS = dict(num_key_value_heads=2)


def tiny(kind: str, **more: Any) -> Any:
    import transformers

    attention = more.pop("attn_implementation", None)
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def rows_of(lengths: tuple[int, ...], size: int = 256) -> list[dict[str, list[int]]]:
    """Rows of random ids; of some the first tokens are no targets, as prompts, of others all are."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(size, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [IGNORED] * (i % 3) + row[i % 3 :]} for i, row in enumerate(ids)]


def summed_loss(model: Any, batch: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """The loss as the Trainer asks for it: the sum over all targets, by their number in all batches of a step."""
    return model(**batch, num_items_in_batch=count, use_cache=False).loss


def loss_and_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    count = sum(int(batch["labels"][:, 1:].ne(IGNORED).sum()) for batch in batches)
    losses = [summed_loss(model, batch, count) for batch in batches]
    sum(losses).backward()  # type: ignore[union-attr]
    return sum(loss.item() for loss in losses), {name: p.grad.clone() for name, p in model.named_parameters()}


BATCHES = ((False, 2), (False, 1), (True, 2))
"""Whether the rows of a batch are joined, and how many there are."""


def assert_equal_to_unpacked(
    model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], most: int, rtol: float, batches: Any = BATCHES
) -> None:
    packed = PackedRows(rows, most)
    assert len(packed) < len(rows)
    loss, gradients = loss_and_gradients(model, [make_collator(tokenizer)([row]) for row in rows])
    for joined, size in batches:
        collate = PackingCollator(2, 8, joined=joined)
        items = [packed[i] for i in range(len(packed))]
        made = [collate(items[i : i + size]) for i in range(0, len(items), size)]
        again, others = loss_and_gradients(model, made)
        assert again == pytest.approx(loss, rel=rtol)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=0, atol=rtol * float(gradient.abs().max()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_each_example_lies_in_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    bins = fill(lengths, 12)
    assert sorted(i for group in bins for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= 12 for group in bins)
    assert sum(sum(lengths[i] for i in group) <= 6 for group in bins) <= 1  # two half empty rows would be one


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", HEADS),
        ("Qwen3", {**HEADS, "head_dim": 8}),
        ("Mistral", {**HEADS, "sliding_window": 4}),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    ],
)
def test_losses_and_gradients_are_those_of_unpacked_rows(
    kind: str, more: dict[str, Any], attention: str, tiny_model_dir: Path
) -> None:
    _, tokenizer = load_model(str(tiny_model_dir))
    model = tiny(kind, **more, attn_implementation=attention)
    check_packing(model)
    assert_equal_to_unpacked(model, tokenizer, rows_of((9, 4, 7, 1, 12, 3, 2)), 16, rtol=2e-5)


def test_losses_and_gradients_of_smollm2(embedded_model_dir: Path) -> None:
    model, tokenizer = load_model(str(embedded_model_dir))
    check_packing(model)
    assert_equal_to_unpacked(model, tokenizer, rows_of((9, 4, 7)), 16, 1e-4, BATCHES[:1])


def test_a_run_that_packs_takes_the_steps_of_one_that_does_not(short_run: Run) -> None:
    """All examples in one step, in two rows or in rows of their own: the same losses and the same weights."""
    more = {"method": "adamw", "save_strategy": "no", "data": {"train_samples": 6, "eval_samples": 4}}
    plain = short_run("plain", **more, per_device_train_batch_size=6, max_length=700)
    packed = short_run("packed", **more, packing=True, gradient_accumulation_steps=2, max_length=700)
    packed = RunConfig.from_dict({**packed.to_dict(), "per_device_train_batch_size": 1})
    assert "fewer once they are packed" in describe_plan(packed)
    for config in (plain, packed):
        assert train(config).result["steps"] == 6
    logs = [
        [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
        for config in (plain, packed)
    ]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    before, after = (load_file(Path(config.output_dir) / "model" / "model.safetensors") for config in (plain, packed))
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=0)
    assert "packing: true" in (Path(packed.output_dir) / "config.resolved.yaml").read_text()
    assert "packing" in (Path(packed.output_dir) / "model" / "README.md").read_text()


@pytest.mark.parametrize("method", ["galore_plus", "lora"])
def test_packed_runs_evaluate_and_resume(short_run: Run, method: str) -> None:
    config = short_run(method=method, packing=True, eval_strategy="steps", eval_steps=3, save_total_limit=3)
    result = train(config).result
    whole = load_file(Path(config.output_dir) / "model" / "model.safetensors")
    (Path(config.output_dir) / "checkpoint-6" / "manifest.json").unlink()
    assert train(config, resume="auto").result["resumed_from_step"] == 4
    again = load_file(Path(config.output_dir) / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert result["train_examples"] == 40


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("Mamba", {"state_size": 4, "expand": 2, "time_step_rank": 4}, "no position ids"),
        ("Bloom", {"n_head": 4, "n_layer": 2}, "no position ids"),
        ("Jamba", {**HEADS, "num_experts": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4}, "a state along the row"),
    ],
)
def test_models_that_would_mix_examples_are_refused(kind: str, more: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=rf"packing.*{kind}.*{reason}.*Remove packing"):
        check_packing(tiny(kind, **more))


def test_a_model_that_ignores_position_ids_is_found_out_by_trying(tiny_llama: Any) -> None:
    forward = tiny_llama.model.forward
    tiny_llama.model.forward = lambda *args, position_ids=None, **more: forward(*args, **more)
    with pytest.raises(OptionError, match=r"packing.*other outputs for an example"):
        check_packing(tiny_llama)


def test_a_run_with_a_model_that_cannot_pack_is_refused_before_anything_is_written(
    short_run: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    _, tokenizer = load_model(str(tiny_model_dir))
    tokenizer.save_pretrained(tmp_path / "bloom")
    tiny("Bloom", n_head=4, n_layer=2).save_pretrained(tmp_path / "bloom")
    with pytest.raises(OptionError, match="Remove packing"):
        train(short_run(packing=True, model_name_or_path=str(tmp_path / "bloom")))
    assert not (tmp_path / "run").exists()
