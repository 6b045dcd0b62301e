"""``share_heads_of``: which of q, k, v share bases by head, in separate and fused weights, and in saved states."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.hf.build import build_optimizer
from galore_trainer.hf.table import weight_table
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.targets.geometry import Heads
from galore_trainer.targets.groups import Weight, plan_weights
from galore_trainer.targets.matrices import project_heads

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LLAMA = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)
PHI3 = Phi3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
STEPS = 5
ROWS = {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}  # of Phi-3's fused weight


def model_of(config: Any = LLAMA) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def settings(**more: Any) -> GaLoreConfig:
    return GaLoreConfig(**{"rank": 4, "update_proj_gap": 2, **more})


def of_attention(model: nn.Module, config: GaLoreConfig) -> dict[str, LogicalMatrix]:
    """The logical matrices of the first attention's q, k, v, by role."""
    matrices = {}
    for weight in plan_weights(model, config):
        if "self_attn" in weight.name and "o_proj" not in weight.name:
            leaf = weight.name.rsplit(".", 2)[-2]
            matrices |= {m.label or leaf[0]: m for m in weight.matrices}
    return matrices


def train(model: nn.Module, config: GaLoreConfig, steps: int = STEPS) -> tuple[GaLoreAdamW, dict[str, torch.Tensor]]:
    """Steps on gradients that depend on a weight's place in the model alone; the weights by name."""
    optimizer = build_optimizer(model, config, lr=1e-2)
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    return optimizer, {name: p.detach().clone() for name, p in model.named_parameters()}


def give_gradients(model: nn.Module, step: int) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))


# ---------------------------------------------------------------------- which weights share


@pytest.mark.parametrize("architecture", [LLAMA, PHI3], ids=["separate", "fused"])
@pytest.mark.parametrize("roles", [["q", "k", "v"], ["q", "k"], ["k", "q"], ["v"]], ids="".join)
@pytest.mark.parametrize("sharing", ["shared", "per_head"])
def test_roles_that_are_named_share_and_the_others_have_one_basis(
    architecture: Any, roles: list[Any], sharing: str
) -> None:
    model = model_of(architecture)
    every = of_attention(model, settings(head_sharing=sharing))
    some = of_attention(model, settings(head_sharing=sharing, share_heads_of=roles))
    assert every.keys() == some.keys() == {"q", "k", "v"}
    for role, matrix in some.items():
        if role in roles:
            assert matrix == every[role]
        else:
            # std: the shorter side, as a weight without heads has it
            side = "right" if matrix.rows >= matrix.columns else "left"
            assert (matrix.blocks, matrix.head_dim, matrix.lenders, matrix.side) == (1, 0, 0, side)
            assert (matrix.start, matrix.rows) == (every[role].start, every[role].rows)


def test_the_default_is_all_of_them() -> None:
    model = model_of()
    assert plan_is(model, settings(), settings(share_heads_of=["v", "k", "q"]))
    assert plan_is(model, settings(head_sharing="joint"), settings(head_sharing="joint", share_heads_of=["q"]))


def plan_is(model: nn.Module, one: GaLoreConfig, other: GaLoreConfig) -> bool:
    plans = ([(w.name, w.matrices, w.kind) for w in plan_weights(model, c)] for c in (one, other))
    return next(plans) == next(plans) and one.trajectory() == other.trajectory()


def test_v_moves_as_under_joint_and_the_others_as_under_shared() -> None:
    ways = [{"share_heads_of": ["q", "k"]}, {}, {"head_sharing": "joint"}]
    some, every, joint = (train(model_of(), settings(**way))[1] for way in ways)
    for name, moved in some.items():
        assert torch.equal(moved, (joint if "v_proj" in name else every)[name]), name
    assert not torch.equal(
        joint["model.layers.0.self_attn.v_proj.weight"], every["model.layers.0.self_attn.v_proj.weight"]
    )


@pytest.mark.parametrize("residual", ["scaled", "sparse"])
def test_a_fused_weight_moves_as_its_parts_would_by_themselves(residual: str) -> None:
    """With what is drawn by name left out: the exact basis of the first head."""
    more = {"svd": "exact", "head_choice": "fixed", "residual": residual, "residual_warmup_steps": 1}
    config = settings(share_heads_of=["q", "k"], **more)
    model = model_of(PHI3)
    fused = model.model.layers[0].self_attn.qkv_proj.weight
    optimizer = build_optimizer(model, config, lr=1e-2)
    matrices = of_attention(model, config)
    parts = {role: nn.Parameter(fused.detach()[rows].clone()) for role, rows in ROWS.items()}
    # a part as a weight of its own: the same matrix, but for where it begins
    alone = [[LogicalMatrix(**{**vars(matrices[role]), "start": 0, "label": ""})] for role in ROWS]
    group = {"params": [*parts.values()], "names": [*parts], "projected": True, "matrices": alone}
    other = GaLoreAdamW([group], config, lr=1e-2)
    for step in range(STEPS):
        give_gradients(model, step)
        for role, p in parts.items():
            p.grad = fused.grad[ROWS[role]].clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts.values()]), rtol=0, atol=1e-6)


def test_keys_and_values_of_latent_attention_are_parts_without_heads() -> None:
    heads = Heads(num_heads=4, num_kv_heads=4, head_dim=8, k_dim=6, v_dim=8)
    config = settings(share_heads_of=["q"])
    matrices = project_heads(
        "self_attn.kv_b_proj", "fused", 56, 16, model_type="x", heads=heads, config=config, rank=4, transposed=False
    )
    assert [(m.label, m.rows, m.blocks, m.head_dim) for m in matrices] == [("k", 24, 1, 0), ("v", 32, 1, 0)]
    weight = Weight("self_attn.kv_b_proj.weight", nn.Parameter(torch.zeros(56, 16)), tuple(matrices))
    assert not weight.falls_back(config)


# ---------------------------------------------------------------------- what is said of it


@pytest.mark.parametrize("architecture", [LLAMA, PHI3], ids=["separate", "fused"])
def test_the_start_table_shows_it_and_nothing_is_said_to_be_unknown(
    architecture: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(architecture)
    with caplog.at_level(logging.WARNING, logger="galore_trainer"):
        optimizer = build_optimizer(model, settings(share_heads_of=["q", "k"], head_fallback="refuse"))
    assert not caplog.records
    table = weight_table(optimizer, model)
    assert "unknown" not in table
    if architecture is LLAMA:
        rows = {line.split()[0].rsplit(".", 1)[-1]: line for line in table.splitlines() if "self_attn" in line}
        assert "4, one lends" in rows["q_proj"]
        assert "one lends" not in rows["v_proj"]
    else:
        assert "4, one lends / 2, one lends / -" in table


def test_heads_of_what_does_not_share_are_not_asked_for() -> None:
    """v whose rows are no heads would be refused here."""
    model = model_of()
    model.model.layers[0].self_attn.v_proj = nn.Linear(32, 13, bias=False)
    named = {"head_fallback": "refuse", "target_modules": ["v_proj"]}
    with pytest.raises(OptionError, match="v_proj"):
        plan_weights(model, settings(**named))
    assert any(w.matrices for w in plan_weights(model, settings(**named, share_heads_of=["q", "k"])))


@pytest.mark.parametrize("architecture", [LLAMA, PHI3], ids=["separate", "fused"])
@pytest.mark.parametrize("mode", ["separate", "moments"])
def test_the_planned_memory_is_what_the_optimizer_holds(architecture: Any, mode: str) -> None:
    config = settings(
        share_heads_of=["q"], head_sharing="per_head", residual="sparse", residual_mode=mode, residual_warmup_steps=1
    )
    model = model_of(architecture)
    planned = [w.state_bytes(config) for w in plan_weights(model, config)]
    held = train(model, config)[0].state_bytes()
    assert sum(w["basis"] for w in planned) == held["basis"]
    ages = 4 * sum(w["residual"] > 0 for w in planned)  # counters are not planned
    assert sum(w["residual"] for w in planned) == held["residual"] - ages


# ---------------------------------------------------------------------- saved states


@pytest.mark.parametrize("architecture", [LLAMA, PHI3], ids=["separate", "fused"])
def test_resumed_is_uninterrupted(architecture: Any) -> None:
    config = settings(share_heads_of=["k", "q"])
    _, whole = train(model_of(architecture), config)
    model = model_of(architecture)
    first, _ = train(model, config, 3)
    second = build_optimizer(model, settings(share_heads_of=["q", "k"]), lr=1e-2)  # the order means nothing
    second.load_state_dict(first.state_dict())
    for step in range(3, STEPS):
        give_gradients(model, step)
        second.step()
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("ours", "saved"), [(["q", "k"], ["q", "k", "v"]), (["q", "k", "v"], ["q", "k"]), (["v"], ["q"])]
)
def test_a_resume_under_others_is_refused_by_name(ours: list[Any], saved: list[Any]) -> None:
    model = model_of()
    state = train(model, settings(share_heads_of=saved), 2)[0].state_dict()
    with pytest.raises(OptionError, match=r"galore\.share_heads_of: got \['") as caught:
        build_optimizer(model, settings(share_heads_of=ours)).load_state_dict(state)
    assert str(saved) in caught.value.wanted


def test_no_key_is_new_in_a_saved_group_and_one_without_it_means_all() -> None:
    """``torch.distributed.checkpoint`` wants every key of the state that it reads into."""
    model = model_of()
    every, some = (train(model, settings(**way), 2)[0].state_dict() for way in ({}, {"share_heads_of": ["q", "k"]}))
    groups = [state["param_groups"][0]["galore"] for state in (every, some)]
    assert groups[0].keys() == groups[1].keys()
    assert "share_heads_of" not in groups[0]
    assert groups[0]["head_sharing"] == "shared"
    build_optimizer(model, settings()).load_state_dict(every)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ([], "Use head_sharing joint to share no heads"),
        (["q", "q"], "some of q, k, v, each once"),
        (["q", "o"], "wanted a list of q, k, v"),
        ("q", "wanted a list of q, k, v"),
        ("qkv", "wanted a list of q, k, v"),
    ],
)
def test_what_names_no_roles_is_refused(roles: Any, said: str) -> None:
    with pytest.raises(OptionError, match=rf"galore\.share_heads_of: got .*{said}"):
        GaLoreConfig(share_heads_of=roles)
