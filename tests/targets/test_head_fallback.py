"""Attention whose heads are unknown, and models of which nothing could be projected: what is said, and which cause."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.hf.build import build_optimizer
from galore_trainer.hf.table import weight_table
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.targets.groups import Weight, parameter_groups, plan_weights
from galore_trainer.targets.matrices import unknown_heads

JOINT = GaLoreConfig(rank=4, head_sharing="joint")
SHARED = GaLoreConfig(rank=4)
REFUSE = GaLoreConfig(rank=4, head_fallback="refuse")


def model_of(name: str, **settings: Any) -> nn.Module:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(vocab_size=64, **settings))


def llama(**settings: Any) -> nn.Module:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return model_of("LlamaForCausalLM", **{**sizes, "num_key_value_heads": 2, **settings})


def gpt2_with_cross_attention() -> nn.Module:
    """Its c_attn of cross-attention holds k and v alone, beside one in self-attention that holds q, k and v."""
    return model_of("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)


def heads(plan: list[Weight]) -> dict[str, tuple[int, int]]:
    """Heads and rows of each, by weight, of weights that are one matrix."""
    return {
        w.name.removesuffix(".weight"): (m.rows // m.head_dim, m.head_dim)
        for w in plan
        if len(w.matrices) == 1
        for m in w.matrices
        if m.head_dim
    }


# ---------------------------------------------------------------------- what is known


def test_encoder_and_decoder_have_their_own_heads() -> None:
    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48)
    bart = model_of("BartForConditionalGeneration", encoder_attention_heads=2, decoder_attention_heads=8, **sizes)
    found = heads(plan_weights(bart, SHARED))
    assert {shape for name, shape in found.items() if ".encoder.layers" in name} == {(2, 16)}
    assert {shape for name, shape in found.items() if ".decoder.layers" in name} == {(8, 4)}


class PerLayer:
    """A config whose layers differ, which says so by an error of transformers' kind."""

    num_attention_heads, num_key_value_heads = 4, 2

    @property
    def head_dim(self) -> int:
        raise RuntimeError("'head_dim' is a per-layer attribute and may vary across layers.")


def test_a_head_size_that_differs_by_layer_is_read_from_the_layer() -> None:
    model = llama()
    for size, layer in zip((8, 16), model.model.layers, strict=True):
        attention = layer.self_attn
        attention.config, attention.head_dim = PerLayer(), size
        for name, count in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
            setattr(attention, name, nn.Linear(32, count * size, bias=False))
    model.config = PerLayer()
    assert set(heads(plan_weights(model, SHARED)).values()) == {(4, 8), (2, 8), (4, 16), (2, 16)}


@pytest.mark.parametrize("settings", [{"head_sharing": "joint"}, {"target_modules": ["up_proj", "down_proj"]}])
def test_nothing_about_heads_is_asked_where_none_play_a_part(settings: dict[str, Any]) -> None:
    class Silent:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"{name} was asked for")

    model = llama()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = Silent()
    assert any(w.matrices for w in plan_weights(model, GaLoreConfig(rank=4, **settings)))


# ---------------------------------------------------------------------- what falls back


def test_what_falls_back_is_named_in_the_log_and_the_table(caplog: pytest.LogCaptureFixture) -> None:
    model = gpt2_with_cross_attention()
    with caplog.at_level(logging.WARNING, logger="galore_trainer"):
        optimizer = build_optimizer(model, SHARED)
    (record,) = (r for r in caplog.records if r.name.startswith("galore_trainer"))
    for words in (
        "2 modules such as transformer.h.0.crossattention.c_attn (q 4 heads x 8 + k 4 heads x 8 + v 4 heads x 8 rows "
        "are not its 64 rows)",
        "2 modules such as transformer.h.0.crossattention.q_attn (no layout of heads is known by its name)",
    ):
        assert words in record.getMessage()
    rows = {
        line.split("x ")[1].split()[0]: line for line in weight_table(optimizer, model).splitlines() if "x " in line
    }
    assert {name for name, line in rows.items() if "unknown: joint" in line} == {
        "transformer.h.*.crossattention.c_attn",
        "transformer.h.*.crossattention.q_attn",
    }
    assert "4, one lends" in rows["transformer.h.*.attn.c_attn"]


def test_what_falls_back_moves_as_under_joint() -> None:
    moved = []
    for config in (SHARED, JOINT):
        plan = plan_weights(gpt2_with_cross_attention(), config)
        weight = next(w for w in plan if w.name == "transformer.h.0.crossattention.c_attn.weight")
        optimizer = GaLoreAdamW(parameter_groups([weight], config, lr=1e-2, weight_decay=0.0), config)
        for step in range(3):
            weight.parameter.grad = torch.randn(weight.parameter.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        moved.append(weight.parameter.detach())
    assert torch.equal(*moved)


def test_no_word_of_heads_where_all_are_known_or_none_were_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    for model, config in ((llama(), SHARED), (gpt2_with_cross_attention(), JOINT)):
        optimizer = build_optimizer(model, config)
        assert "unknown" not in weight_table(optimizer, model)
    assert not [r for r in caplog.records if r.name.startswith("galore_trainer")]


def test_refuse_names_the_weight_and_the_way_out() -> None:
    model = gpt2_with_cross_attention()
    with pytest.raises(OptionError, match="head_fallback joint") as error:
        plan_weights(model, REFUSE)
    assert (error.value.option, error.value.got) == ("galore.head_sharing", "shared")
    assert "transformer.h.0.crossattention.c_attn" in str(error.value)
    same = unknown_heads("q_proj", REFUSE, "they are new")
    assert (same.reason, same.option) == ("they are new", "galore.head_sharing")


def test_a_part_with_fewer_rows_than_the_rank_falls_back_and_is_refused_by_rank() -> None:
    """Of a multi-query weight one key head of 8 rows cannot span rank 12."""
    model = model_of("FalconForCausalLM", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    (weight,) = (w for w in plan_weights(model, GaLoreConfig(rank=12)) if w.why_joint)
    assert weight.why_joint == "the 8 rows of k do not span rank 12"
    with pytest.raises(OptionError, match=r"give .* a basis") as error:
        plan_weights(model, GaLoreConfig(rank=12, head_fallback="refuse"))
    assert error.value.option == "galore.rank"


# ---------------------------------------------------------------------- resume


def optimizer_of(model: nn.Module, config: GaLoreConfig = SHARED) -> GaLoreAdamW:
    optimizer = build_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_a_checkpoint_from_before_head_fallback_resumes() -> None:
    saved = optimizer_of(llama()).state_dict()
    for group in saved["param_groups"]:
        group.get("galore", {}).pop("head_fallback", None)
    for config in (SHARED, REFUSE):
        optimizer_of(llama(), config).load_state_dict(saved)


def test_a_checkpoint_whose_heads_were_read_in_another_way_is_refused_by_name() -> None:
    saved = optimizer_of(llama()).state_dict()
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.num_heads, layer.self_attn.head_dim = 8, 4
    with pytest.raises(OptionError, match="4 heads of 8 rows, 1 bases of rank 4 on the right, as in the") as error:
        optimizer_of(model).load_state_dict(saved)
    assert error.value.option == "heads of model.layers.0.self_attn.q_proj.weight"


# ---------------------------------------------------------------------- layouts


@pytest.mark.parametrize("residual", [0.0, 5.0])
def test_a_gated_q_moves_as_its_query_by_heads_and_its_gate_alone(residual: float) -> None:
    gated = [
        LogicalMatrix(label="q", outer=4, length=8, columns=24, rank=4, head_dim=8, lenders=1),
        LogicalMatrix(label="gate", outer=4, start=8, length=8, columns=24, rank=4),
    ]
    config = GaLoreConfig(rank=4, update_proj_gap=2, residual_percent=residual, residual_warmup_steps=1)
    weight = nn.Parameter(torch.randn(64, 24, generator=torch.Generator().manual_seed(0)))
    parts = [nn.Parameter(m.take(weight.detach())[0].clone()) for m in gated]
    apart = [dataclasses.replace(m, label="", outer=1, start=0, length=32) for m in gated]
    fused = GaLoreAdamW([{"params": [weight], "names": ["w"], "projected": True, "matrices": [gated]}], config, lr=1e-2)
    names = [f"w.{m.label}" for m in gated]
    group = {"params": parts, "names": names, "projected": True, "matrices": [[m] for m in apart]}
    separate = GaLoreAdamW([group], config, lr=1e-2)
    for step in range(5):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        for part, m in zip(parts, gated, strict=True):
            part.grad = m.take(weight.grad)[0].clone()
        fused.step()
        separate.step()
    for part, m in zip(parts, gated, strict=True):
        torch.testing.assert_close(m.take(weight.detach())[0], part.detach(), rtol=0, atol=2e-6)


# ---------------------------------------------------------------------- wrong causes


def freeze(model: nn.Module, pattern: str = "") -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(pattern not in name)
    return model


@pytest.mark.parametrize("config", [SHARED, REFUSE, JOINT])
def test_attention_that_does_not_train_needs_no_heads(config: GaLoreConfig) -> None:
    plan = plan_weights(freeze(llama(), "self_attn"), config)
    assert {w.name.split(".")[-2] for w in plan if w.matrices} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("adapter", "rank"), [(4, 8), (8, 4), (8, 8)])
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear"])
def test_a_model_of_adapters_is_told_so(adapter: int, rank: int, modules: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=adapter, target_modules=modules))
    with pytest.raises(OptionError, match="adapters") as error:
        plan_weights(model, GaLoreConfig(rank=rank))
    assert "q, k, v" not in str(error.value)
    assert "at most" not in str(error.value)
    by_name = GaLoreConfig(rank=rank, target_modules=r".*lora_[AB]\.default")
    if rank <= adapter:
        assert sum(bool(w.matrices) for w in plan_weights(model, by_name)) > 0


def test_adapters_beside_weights_that_train_whole_leave_those_their_heads() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        if "v_proj" in name:
            p.requires_grad_(True)
    assert set(heads(plan_weights(model, SHARED))) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}


class Params4bit(nn.Parameter):
    """Packed as bitsandbytes does: two numbers a byte, one column."""


def quantize(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            module.weight = Params4bit(packed, requires_grad=False)
    return model


def gptq(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                packed = nn.Module()
                packed.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
                setattr(module, name, packed)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: freeze(llama()), "parameters are all frozen"),
        (lambda: freeze(llama(), "layers"), "frozen weights in all of target_modules"),
        (lambda: quantize(llama()), r"quantised by Params4bit \(uint8\)"),
        (lambda: gptq(llama()), "quantised by packed buffers"),
        (lambda: nn.Sequential(nn.Embedding(8, 8)), "no linear layer"),
    ],
)
def test_the_cause_is_named_where_nothing_could_be_projected(make: Any, words: str) -> None:
    for config in (SHARED, JOINT):
        with pytest.raises(OptionError, match=words):
            plan_weights(make(), config)


def test_adapters_over_a_quantised_model_are_both_named() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(OptionError, match=r"adapters .* quantised by bitsandbytes"):
        plan_weights(model, GaLoreConfig(rank=8))


def test_a_rank_is_compared_with_what_trains() -> None:
    model = freeze(llama(), "proj")
    model.model.layers[0].self_attn.k_proj.requires_grad_(True)
    with pytest.raises(OptionError, match="at most 16, the largest smaller side of any target that trains") as error:
        plan_weights(model, GaLoreConfig(rank=24))
    assert error.value.option == "galore.rank"
