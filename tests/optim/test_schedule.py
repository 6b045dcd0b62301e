"""Stacks, staggering, warm starts and diagnoses: how work is arranged must not change what comes out."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.basis import exact, randomized
from galore_trainer.core.galore import lost_share
from galore_trainer.hf.build import build_optimizer

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)


def model_of(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def give_gradients(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("sharing", ["shared", "per_head", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stagger", [False, True])
def test_a_stack_moves_as_its_matrices_would_alone(
    architecture, sharing: str, dtype: torch.dtype, stagger: bool
) -> None:
    """Joined in one go, joined two at a time, or one by one: the same weights; non-finite gradients included."""
    start = model_of(architecture).to(dtype)
    config = GaLoreConfig(
        rank=4,
        update_proj_gap=3,
        head_sharing=sharing,
        residual_percent=5.0,
        residual_warmup_steps=2,
        stagger_refresh=stagger,
    )
    results = []
    for elements in (0, 2 * 32 * 48, 1 << 20):
        model = copy.deepcopy(start)
        optimizer = build_optimizer(model, config, lr=1e-3, weight_decay=0.1)
        optimizer.max_stack_elements = elements
        for step in range(8):
            give_gradients(model, step)
            if step in (3, 5):
                next(p for n, p in model.named_parameters() if "mlp" in n and p.dim() == 2).grad[0, 0] = float("nan")
            optimizer.step()
        assert list(optimizer.check_finite().values()) == [2]
        results.append([p.detach().float() for p in model.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # bfloat16: a last-bit difference of the product may fall on the other side of a rounding
            torch.testing.assert_close(a, b, rtol=0, atol=5e-6 if dtype == torch.float32 else 2**-6)


@pytest.mark.parametrize("elements", [0, 7 * 32 * 32, 1 << 20])
def test_a_bad_part_of_a_fused_weight_skips_all_of_it_whatever_else_is_in_the_stack(elements: int) -> None:
    """Phi-3's output projection has the shape of its q part and may stand in one stack with it."""
    model = model_of(
        Phi3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
        )
    )
    optimizer = build_optimizer(model, GaLoreConfig(rank=4, share_output_heads=True, update_proj_gap=2), lr=1e-3)
    optimizer.max_stack_elements = elements
    fused = model.model.layers[0].self_attn.qkv_proj.weight
    for step in range(4):
        give_gradients(model, step)
        before = fused.detach().clone()
        if step == 2:
            fused.grad[40, 3] = float("nan")  # a row of k
        optimizer.step()
        assert torch.equal(before, fused) == (step == 2)
    assert optimizer.check_finite() == {"model.layers.0.self_attn.qkv_proj.weight": 1}


def test_a_copy_of_the_optimizer_goes_on_by_itself() -> None:
    model = model_of(LLAMA)
    optimizer = build_optimizer(model, GaLoreConfig(rank=4, update_proj_gap=2, residual_warmup_steps=1), lr=1e-3)
    give_gradients(model, 0)
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    for step in range(1, 4):
        for m, o in ((model, optimizer), (twin, other)):
            give_gradients(m, step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_resume_may_arrange_stacks_otherwise() -> None:
    config = GaLoreConfig(rank=4, update_proj_gap=3, residual_warmup_steps=2)
    models = [model_of(LLAMA) for _ in range(2)]
    first = build_optimizer(models[0], config, lr=1e-3)
    first.max_stack_elements = 1 << 20
    for step in range(4):
        give_gradients(models[0], step)
        first.step()
    second = build_optimizer(models[1], config, lr=1e-3)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(4, 8):
        for model, optimizer in zip(models, (first, second), strict=True):
            give_gradients(model, step)
            optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


def test_staggered_refreshes_come_once_a_gap_for_every_weight_and_spread_evenly() -> None:
    gap, model = 7, model_of(LLAMA)
    optimizer = build_optimizer(model, GaLoreConfig(rank=4, update_proj_gap=gap, stagger_refresh=True), lr=1e-3)
    weights = [p for g in optimizer.param_groups if g["projected"] for p in g["params"]]
    counts, before = [], [0] * len(weights)
    for step in range(1 + 3 * gap):
        give_gradients(model, step)
        optimizer.step()
        now = [optimizer.state[p]["refreshes"] for p in weights]
        counts.append(sum(now) - sum(before))
        before = now
    assert counts[0] == len(weights)
    assert all(c == len(weights) // gap for c in counts[gap + 1 :])  # 21 weights over 7 steps
    assert all(3 <= n <= 4 for n in before)


def test_staggered_refreshes_of_a_step_are_of_equal_weights() -> None:
    """Which are found together: with as many steps as shapes, each step refreshes one shape."""
    model = model_of(LLAMA)
    weights = {name: p for name, p in model.named_parameters() if "_proj" in name}
    shapes = {p.shape for p in weights.values()}
    config = GaLoreConfig(rank=4, update_proj_gap=len(weights), stagger_refresh=True, head_sharing="joint")
    optimizer = build_optimizer(model, config, lr=1e-3)
    give_gradients(model, 0)
    optimizer.step()
    names = sorted(weights, key=lambda name: optimizer.state_of(name)["phase"])
    assert [optimizer.state_of(name)["phase"] for name in names] == list(range(len(names)))
    runs = [shape for shape, _ in itertools.groupby(weights[name].shape for name in names)]
    assert len(runs) == len(shapes)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_warm_start_is_better_than_a_cold_one_where_the_subspace_barely_moves(side: str) -> None:
    """At q = 0 the old basis of a slowly turning gradient beats a random sketch; P stays orthonormal."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(80, 60, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(60, 60, generator=generator)).Q
    spectrum = torch.arange(1, 61).float().pow(-0.5)
    old = ((left * spectrum) @ right.T)[None]
    new = old + 0.02 * torch.randn(1, 80, 60, generator=generator) * old.std()
    omega = torch.randn(1, 60, 18, generator=generator)
    previous = exact([old], 10, side)
    errors = []
    for warm in (previous, None):
        P = randomized([new], 10, side, omega=omega, previous=warm, iterations=0)
        torch.testing.assert_close(P.mT @ P, torch.eye(10)[None], rtol=0, atol=1e-5)
        errors.append(lost_share(new, P, side).item())
    assert errors[0] < errors[1]
    best = lost_share(new, exact([new], 10, side), side).item()
    assert best - 1e-6 <= errors[0] <= best * 1.02


def test_a_warm_start_runs_through_the_optimizer() -> None:
    config = GaLoreConfig(rank=4, update_proj_gap=2, warm_start=True, subspace_iterations=1)
    model = model_of(LLAMA)
    optimizer = build_optimizer(model, config, lr=1e-3)
    for step in range(5):
        give_gradients(model, step)
        optimizer.step()
    for p in model.model.layers[0].mlp.parameters():
        basis = optimizer.state[p]["basis"]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4)[None], rtol=0, atol=1e-5)


def test_diagnosis_measures_the_price_of_randomizing_and_of_sharing() -> None:
    """Exact joint bases cost nothing; a shared basis loses more than a joint one; nothing moves by being looked at."""
    weights = {}
    for diagnosed in (0, 2):
        config = GaLoreConfig(
            rank=4, update_proj_gap=2, subspace_iterations=0, oversampling=1, diagnose_refreshes=diagnosed
        )
        model = model_of(LLAMA)
        optimizer = build_optimizer(model, config, lr=1e-3)
        for step in range(5):
            give_gradients(model, step)
            optimizer.step()
        weights[diagnosed] = [p.detach().clone() for p in model.parameters()]
        assert bool(optimizer.excess_errors) == bool(diagnosed)
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
    excess = {n: e for n, e in optimizer.excess_errors.items() if "up_proj" in n}
    assert all(e > 0.0 and s == pytest.approx(e + 1.0, abs=1e-4) for e, s in excess.values())  # joint: one matrix
    shared = [s for n, (_, s) in optimizer.excess_errors.items() if "q_proj" in n]
    assert all(s > 1.0 for s in shared)

    config = GaLoreConfig(rank=4, svd="exact", head_sharing="joint", diagnose_refreshes=1)
    model = model_of(LLAMA)
    optimizer = build_optimizer(model, config, lr=1e-3)
    give_gradients(model, 0)
    optimizer.step()
    assert all(abs(e) < 1e-4 and abs(s - 1.0) < 1e-4 for e, s in optimizer.excess_errors.values())
