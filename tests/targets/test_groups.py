"""Which weights are projected, and which rows of which weight are heads: checked against the models themselves."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.targets.groups import parameter_groups, plan_weights


def build(name: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(vocab_size=64, **settings))


def llama(**settings) -> nn.Module:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return build("LlamaConfig", **{**sizes, "num_key_value_heads": 2, **settings})


REFUSE = GaLoreConfig(rank=4, head_fallback="refuse")
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
FUSED = {
    "phi3": lambda: build("Phi3Config", **SMALL, num_key_value_heads=2, pad_token_id=0),
    "gpt_neox": lambda: build("GPTNeoXConfig", **SMALL),
    "gpt2": lambda: build("GPT2Config", n_embd=32, n_layer=1, n_head=4),
    "bloom": lambda: build("BloomConfig", hidden_size=32, n_layer=1, n_head=4),
}


@pytest.mark.parametrize("architecture", FUSED)
def test_parts_of_a_fused_weight_are_the_models_q_k_and_v(architecture: str) -> None:
    """Without its v rows an attention passes nothing on; without q or k it weighs all visible tokens alike."""
    model = FUSED[architecture]().eval()
    plan = plan_weights(model, GaLoreConfig(rank=4))
    weight = next(w for w in plan if len(w.matrices) == 3)
    assert [m.label for m in weight.matrices] == ["q", "k", "v"]
    attention = model.get_submodule(weight.name.removesuffix(".weight").rsplit(".", 1)[0])
    output = next(m for n, m in attention.named_children() if n in ("o_proj", "dense", "c_proj"))
    for name, p in attention.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    seen: dict[str, torch.Tensor] = {}
    output.register_forward_pre_hook(lambda _, inputs: seen.update(mixed=inputs[0].detach().clone()))
    tokens = torch.arange(1, 9)[None]
    kept = weight.parameter.detach().clone()
    uniform = {}
    for matrix in weight.matrices:
        with torch.no_grad():
            weight.parameter.copy_(kept)
            rows = matrix.take(weight.parameter)
            matrix.put(weight.parameter, rows * 0)
            assert (weight.parameter == 0).sum() >= rows.numel()
            model(tokens)
        uniform[matrix.label] = seen["mixed"]
    assert not uniform["v"].any()
    if architecture != "bloom":  # its ALiBi weighs positions even without q and k
        torch.testing.assert_close(uniform["q"], uniform["k"])
    with torch.no_grad():
        weight.parameter.copy_(kept)
        model(tokens)
    assert (seen["mixed"] - uniform["q"]).abs().max() > 1e-6


@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize("sharing", ["shared", "per_head"])
def test_a_fused_weight_moves_as_its_parts_would_alone(architecture: str, sharing: str) -> None:
    model = FUSED[architecture]()
    config = GaLoreConfig(rank=4, update_proj_gap=2, head_sharing=sharing)
    weight = next(w for w in plan_weights(model, config) if len(w.matrices) == 3)
    fused = GaLoreAdamW(parameter_groups([weight], config, lr=1e-2, weight_decay=0.1), config)
    parts = [nn.Parameter(m.take(weight.parameter.detach()).flatten(0, 1).clone()) for m in weight.matrices]
    whole = [
        type(m)(length=m.rows, columns=m.columns, rank=m.rank, blocks=m.blocks, head_dim=m.head_dim, lenders=m.lenders)
        for m in weight.matrices
    ]
    names = [f"{weight.name}.{m.label}" for m in weight.matrices]
    group = {"params": parts, "names": names, "projected": True, "matrices": [[m] for m in whole], "weight_decay": 0.1}
    separate = GaLoreAdamW([group], config, lr=1e-2)
    for step in range(5):
        G = torch.randn(weight.parameter.shape, generator=torch.Generator().manual_seed(step))
        weight.parameter.grad = G
        for part, m in zip(parts, weight.matrices, strict=True):
            part.grad = m.take(G).flatten(0, 1).clone()
        fused.step()
        separate.step()
    for part, m in zip(parts, weight.matrices, strict=True):
        torch.testing.assert_close(m.take(weight.parameter.detach()).flatten(0, 1), part.detach(), rtol=0, atol=2e-6)


def test_a_transposed_conv1d_moves_as_the_linear_it_stands_for() -> None:
    model = FUSED["gpt2"]()
    config = GaLoreConfig(rank=4, update_proj_gap=2)
    weight = next(w for w in plan_weights(model, config) if w.name.endswith("mlp.c_fc.weight"))
    linear = nn.Parameter(weight.parameter.detach().T.clone())
    conv = GaLoreAdamW(parameter_groups([weight], config, lr=1e-2, weight_decay=0.0), config)
    group = {"params": [linear], "names": [weight.name], "projected": True}
    plain = GaLoreAdamW([group], config, lr=1e-2)
    for step in range(5):
        G = torch.randn(weight.parameter.shape, generator=torch.Generator().manual_seed(step))
        weight.parameter.grad, linear.grad = G, G.T.clone()
        conv.step()
        plain.step()
    torch.testing.assert_close(weight.parameter.detach().T, linear.detach(), rtol=0, atol=2e-6)


def test_llama_plan_projects_the_blocks_and_nothing_else() -> None:
    model = llama(tie_word_embeddings=True)
    plan = {w.name: w for w in plan_weights(model, GaLoreConfig(rank=4))}
    assert len(plan) == len(list(model.parameters()))
    projected = {n for n, w in plan.items() if w.kind == "projected"}
    leaves = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    assert projected == {n for n in plan if re.fullmatch(rf"model\.layers\.\d\..*({leaves})\.weight", n)}
    q, k = (plan[f"model.layers.0.self_attn.{x}_proj.weight"].matrices[0] for x in "qk")
    assert (q.rows, q.head_dim, q.lenders, k.rows, k.side) == (32, 8, 1, 16, "right")
    assert plan["model.layers.0.self_attn.o_proj.weight"].matrices[0].head_dim == 0
    assert plan["model.embed_tokens.weight"].kind == "plain"


def test_head_dim_need_not_be_hidden_over_heads() -> None:
    model = llama(head_dim=12)
    plan = {w.name: w for w in plan_weights(model, GaLoreConfig(rank=16))}
    q = plan["model.layers.0.self_attn.q_proj.weight"].matrices[0]
    assert (q.rows, q.head_dim, q.lenders) == (48, 12, 2)  # two heads span rank 16


def test_experts_are_projected_one_by_one() -> None:
    model = build("MixtralConfig", **SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    config = GaLoreConfig(rank=4, update_proj_gap=2)
    plan = plan_weights(model, config)
    stack = next(w for w in plan if w.parameter.dim() == 3)
    (matrix,) = stack.matrices
    assert matrix.blocks == 3
    together = GaLoreAdamW(parameter_groups([stack], config, lr=1e-2, weight_decay=0.0), config)
    for step in range(3):
        stack.parameter.grad = torch.randn(stack.parameter.shape, generator=torch.Generator().manual_seed(step))
        together.step()
    basis = together.state[stack.parameter]["basis"]
    assert basis.shape[0] == 3
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4).expand(3, 4, 4), rtol=0, atol=1e-5)
    router = next(w for w in plan if w.name.endswith("gate.weight"))
    assert router.kind == "plain"


def test_output_heads_share_a_basis_by_columns() -> None:
    """o_proj with shared output heads moves as its transpose would as a q_proj."""
    model = llama()
    config = GaLoreConfig(rank=4, update_proj_gap=2, share_output_heads=True, residual_warmup_steps=2)
    weight = next(w for w in plan_weights(model, config) if w.name.endswith("o_proj.weight"))
    (matrix,) = weight.matrices
    assert (matrix.transposed, matrix.rows, matrix.head_dim, matrix.side) == (True, 32, 8, "right")
    upright = nn.Parameter(weight.parameter.detach().T.clone())
    group = {
        "params": [upright],
        "names": [weight.name],
        "projected": True,
        "matrices": [[dataclasses.replace(matrix, transposed=False)]],
    }
    by_columns = GaLoreAdamW(parameter_groups([weight], config, lr=1e-2, weight_decay=0.0), config)
    by_rows = GaLoreAdamW([group], config, lr=1e-2)
    for step in range(5):
        G = torch.randn(weight.parameter.shape, generator=torch.Generator().manual_seed(step))
        weight.parameter.grad, upright.grad = G, G.T.clone()
        by_columns.step()
        by_rows.step()
    torch.testing.assert_close(weight.parameter.detach().T, upright.detach(), rtol=0, atol=2e-6)


def test_rank_pattern_and_small_weights() -> None:
    model = llama()
    config = GaLoreConfig(rank=20, rank_pattern={"q_proj": 5, r"layers\.1\..*down_proj": 7})
    plan = {w.name.removeprefix("model.layers."): w for w in plan_weights(model, config)}
    assert plan["0.self_attn.q_proj.weight"].matrices[0].rank == 5
    assert plan["1.mlp.down_proj.weight"].matrices[0].rank == 7
    assert plan["0.mlp.down_proj.weight"].matrices[0].rank == 20
    assert plan["0.self_attn.k_proj.weight"].note == "rank 20 > smaller side 16"


@pytest.mark.parametrize(
    ("settings", "option", "words"),
    [
        ({"target_modules": r".*\.q_porj"}, "galore.target_modules", "q_proj"),
        ({"target_modules": ["q_proj", "nope"]}, "galore.target_modules", "q_proj"),
        ({"target_modules": "("}, "galore.target_modules", "regular expression"),
        ({"rank": 40}, "galore.rank", "at most 32"),
        ({"rank": 20, "target_modules": ["k_proj"]}, "galore.rank", "at most 16"),
        ({"rank": 9, "head_sharing": "per_head"}, "galore.rank", "at most 8"),
        ({"rank": 9, "head_sharing": "grouped", "head_group_size": 2}, "galore.rank", "at most 8"),
        ({"rank": 4, "head_sharing": "grouped", "head_group_size": 3}, "galore.head_group_size", "divisor"),
        ({"rank": 4, "proj_type": "left"}, "galore.proj_type", "joint"),
        ({"rank": 4, "proj_type": "reverse_std"}, "galore.proj_type", "joint"),
        ({"rank": 4, "svd": "exact", "warm_start": True}, "galore.warm_start", "randomized"),
        ({"rank_pattern": {"nope": 3}, "rank": 4}, "galore.rank_pattern['nope']", "matches"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings: dict, option: str, words: str) -> None:
    with pytest.raises(OptionError) as error:
        plan_weights(llama(), GaLoreConfig(**settings))
    assert error.value.option == option
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "leaf"),
    [("gpt2", "attn.c_proj"), ("gpt_neox", "attention.dense"), ("bloom", "self_attention.dense")],
)
def test_output_heads_are_found_in_attention_and_nowhere_else(architecture: str, leaf: str) -> None:
    plan = plan_weights(FUSED[architecture](), GaLoreConfig(rank=4, share_output_heads=True))
    outputs = [w.name for w in plan if len(w.matrices) == 1 and w.matrices[0].head_dim]
    assert len(outputs) == 1
    assert outputs[0].endswith(f"{leaf}.weight")


def test_attention_under_names_nobody_knows_is_refused_not_joint_in_silence() -> None:
    model = llama()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            layer.self_attn.add_module(f"to_{name[0]}", layer.self_attn._modules.pop(name))
    with pytest.raises(OptionError, match="head_sharing joint"):
        plan_weights(model, REFUSE)
    assert plan_weights(model, GaLoreConfig(rank=4, head_sharing="joint"))


def test_unknown_heads_are_refused_with_joint_as_the_way_out() -> None:
    model = llama()
    model.config.num_attention_heads = 3  # rows no longer are heads x head_dim
    with pytest.raises(OptionError, match="head_sharing joint"):
        plan_weights(model, REFUSE)
    assert plan_weights(model, GaLoreConfig(rank=4, head_sharing="joint"))
    fused = FUSED["gpt_neox"]()
    fused.config.model_type = "unheard_of"
    with pytest.raises(OptionError, match="order of rows"):
        plan_weights(fused, REFUSE)


def test_frozen_parameters_stay_out_and_groups_hold_each_parameter_once() -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    config = GaLoreConfig(rank=4, plain_lr_ratio=0.5)
    plan = plan_weights(model, config)
    norms = {w.name for w in plan if "norm" in w.name}
    groups = parameter_groups(plan, config, lr=1e-3, weight_decay=0.1, no_decay=norms)
    in_groups = [id(p) for g in groups for p in g["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [(g["projected"], g["lr"], g["weight_decay"]) for g in groups] == [
        (True, 1e-3, 0.1),
        (False, 5e-4, 0.1),
        (False, 5e-4, 0.0),
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_output_layer_are_plain_frozen_or_projected(tied: bool) -> None:
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    kinds = {}
    for choice in ("plain", "projected", "frozen"):
        plan = plan_weights(llama(tie_word_embeddings=tied), GaLoreConfig(rank=4, embeddings=choice))
        kinds[choice] = {w.kind for w in plan if w.name in ends}
        rest = {w.name: w.kind for w in plan if w.name not in ends}
        assert rest == {n: "plain" if "norm" in n else "projected" for n in rest}
    assert kinds == {choice: {choice} for choice in kinds}
    (end,) = {
        m.basis_shape
        for w in plan_weights(llama(), GaLoreConfig(rank=4, embeddings="projected"))
        if w.name in ends
        for m in w.matrices
    }
    assert end == (1, 32, 4)  # the hidden side, whatever the vocabulary
    with pytest.raises(OptionError, match=r"galore\.embeddings"):
        plan_weights(nn.Sequential(nn.Linear(8, 8)), GaLoreConfig(rank=2, head_sharing="joint", embeddings="frozen"))
