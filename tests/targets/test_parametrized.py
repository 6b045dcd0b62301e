"""Every targeted module is projected, noted or refused, also where its weight is no parameter or has another name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from galore_trainer import GaLoreConfig, OptionError, build_optimizer
from galore_trainer.hf.table import weight_table
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.targets.groups import Weight, plan_weights

Change = Callable[[nn.Module], Any]
HOOKS: dict[str, Change] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def attentions(model: Any, change: Change, name: str = "q_proj") -> Any:
    for layer in model.model.layers:
        change(getattr(layer.self_attn, name))
    return model


def by_kind(plan: list[Weight], kind: str) -> set[str]:
    return {w.name for w in plan if w.kind == kind}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_named_module_whose_weight_is_computed_is_refused_by_name(hook: str, tiny_llama: Any) -> None:
    model = attentions(tiny_llama, HOOKS[hook])
    named: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 8}},
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.[qk]_proj"},
        {"rank_pattern": {"q_proj": 8}},
    ]
    for settings in named:
        with pytest.raises(OptionError, match=r"layers\.0\.self_attn\.q_proj, whose weight is computed") as refused:
            plan_weights(model, GaLoreConfig(rank=4, **settings))
        option = "target_modules" if "target_modules" in settings else "rank_pattern"
        assert refused.value.option == f"galore.{option}"
        assert "remove_parametrizations" in refused.value.way_out
        assert f"leave the module out of {option}" in refused.value.way_out


@pytest.mark.parametrize("hook", HOOKS)
def test_all_linear_leaves_computed_weights_plain_and_says_so(
    hook: str, tiny_llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    names = {n for n, _ in tiny_llama.named_parameters()}
    model = attentions(tiny_llama, HOOKS[hook])
    sources = {n for n, _ in model.named_parameters()} - names
    with caplog.at_level(logging.WARNING):
        optimizer = build_optimizer(model, GaLoreConfig(rank=4))
    plan = plan_weights(model, GaLoreConfig(rank=4))
    assert sources <= by_kind(plan, "plain")
    assert {w.name for w in plan if w.note} == sources
    assert len(by_kind(plan, "projected")) == 2 * 6
    said = "2 modules such as model.layers.0.self_attn.q_proj (computed from other parameters)"
    assert [r.getMessage() for r in caplog.records] == [f"targeted, but not projected: {said}"]
    rows = [line for line in weight_table(optimizer, model).splitlines() if "q_proj" in line]
    assert rows
    assert all("plain (computed from other parameters)" in row for row in rows)


def test_what_removes_the_parametrization_projects_again(tiny_llama: Any) -> None:
    attentions(tiny_llama, parametrizations.orthogonal)
    attentions(tiny_llama, lambda module: parametrize.remove_parametrizations(module, "weight"))
    plan = plan_weights(tiny_llama, GaLoreConfig(rank=4, target_modules=["q_proj"]))
    assert len(by_kind(plan, "projected")) == 2


def test_a_computed_bias_and_frozen_sources_refuse_nothing(tiny_llama: Any) -> None:
    for layer in tiny_llama.model.layers:
        layer.self_attn.q_proj = nn.Linear(64, 64)
        parametrize.register_parametrization(layer.self_attn.q_proj, "bias", nn.Tanh())
        parametrizations.weight_norm(layer.self_attn.v_proj).requires_grad_(False)
    plan = plan_weights(tiny_llama, GaLoreConfig(rank=4, target_modules=["q_proj", "v_proj"]))
    assert by_kind(plan, "projected") == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_where_nothing_else_trains_the_cause_is_the_parametrization() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(OptionError, match=r"model: got 'weights that are computed.*remove_parametrizations"):
        plan_weights(model, GaLoreConfig(rank=4))


def test_conv1d_and_stacks_of_experts_are_seen_too() -> None:
    from transformers.pytorch_utils import Conv1D

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 8))

    model = nn.ModuleDict({"fc": Conv1D(8, 8), "experts": Experts(), "free": nn.Linear(8, 8)})
    parametrizations.spectral_norm(model["fc"])
    parametrize.register_parametrization(model["experts"], "gate_up_proj", nn.Tanh())
    plan = plan_weights(model, GaLoreConfig(rank=4))
    assert by_kind(plan, "projected") == {"free.weight"}
    assert len([w for w in plan if w.note]) == 2
    for name in ("fc", "gate_up_proj"):
        with pytest.raises(OptionError, match=f"{name}, whose weight is computed"):
            plan_weights(model, GaLoreConfig(rank=4, target_modules=[name]))


@pytest.mark.parametrize("embeddings", ["frozen", "projected"])
def test_computed_embeddings_are_refused_where_they_are_chosen(embeddings: Any, tiny_llama: Any) -> None:
    tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    parametrizations.spectral_norm(tiny_llama.model.embed_tokens)
    with pytest.raises(OptionError, match=r"galore\.embeddings.*computed from other parameters"):
        plan_weights(tiny_llama, GaLoreConfig(rank=4, embeddings=embeddings))


def test_a_tied_weight_is_projected_by_any_of_its_names(tiny_llama: Any) -> None:
    """The output layer's weight is a parameter of the embeddings; a shared projection is one of the first layer's."""
    config = GaLoreConfig(rank=4, target_modules=["lm_head"])
    plan = plan_weights(tiny_llama, config)
    assert by_kind(plan, "projected") == {"model.embed_tokens.weight"}
    optimizer = build_optimizer(tiny_llama, config, lr=1e-2)
    before = tiny_llama.lm_head.weight.detach().clone()
    ids = torch.arange(3, 11)[None]
    tiny_llama(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert isinstance(optimizer, GaLoreAdamW)
    assert not torch.equal(before, tiny_llama.lm_head.weight)
    layers = tiny_llama.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    plan = plan_weights(tiny_llama, GaLoreConfig(rank=4, target_modules=r".*layers\.1\.mlp\.up_proj"))
    assert by_kind(plan, "projected") == {"model.layers.0.mlp.up_proj.weight"}


def test_all_linear_leaves_a_tied_embedding_plain_with_a_note() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(16, 8), "fc": nn.Linear(8, 8), "out": nn.Linear(8, 16, bias=False)})
    model["out"].weight = model["table"].weight
    plan = {w.name: w for w in plan_weights(model, GaLoreConfig(rank=4))}
    assert (plan["table.weight"].kind, plan["table.weight"].note) == ("plain", "tied to out")
    assert plan["fc.weight"].kind == "projected"


def test_a_lazy_layer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(OptionError, match=r"1\.weight, of a lazy layer.*Run one batch"):
        plan_weights(model, GaLoreConfig(rank=4))
    model(torch.zeros(1, 8))
    assert len(by_kind(plan_weights(model, GaLoreConfig(rank=4)), "projected")) == 2
