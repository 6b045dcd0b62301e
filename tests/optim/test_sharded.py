"""Weights cut over three processes, anywhere, end where whole ones end. Threads stand for processes here."""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MixtralConfig, Phi3Config, Qwen3NextConfig

from cut_weights import WORLD, Run, build, on_every_rank, some_gradients
from galore_trainer.config import GaLoreConfig
from galore_trainer.core.linalg import Tools, by_cholesky, by_eigh
from galore_trainer.errors import OptionError
from galore_trainer.layouts.shard import Shard, completed_cut_rows
from galore_trainer.optim import galore_adamw, refresh
from galore_trainer.optim.param_groups import SLICES
from galore_trainer.optim.reshard import rows_of_whole, whole_of_slices
from galore_trainer.optim.state_dict import describe
from galore_trainer.optim.state_forms import BAR, COUNTERS, ROW_KEYS, bare
from threads import Meeting, Thread

STEPS = 7  # three bases
FEW = 5  # two bases, a residual and moments that are carried over: where kernels are interpreted, which takes long
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 46, "num_hidden_layers": 1}
LLAMA = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)
PHI3 = Phi3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
NEOX = GPTNeoXConfig(**SMALL, num_attention_heads=4)
MIXTRAL = MixtralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)


@pytest.mark.parametrize("kind", ["rows", "anywhere", "one row", "empty"])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        (LLAMA, {}),
        (LLAMA, {"head_sharing": "joint", "residual_warmup_steps": 0}),
        (LLAMA, {"head_sharing": "grouped", "head_group_size": 2, "head_choice": "energy"}),
        (LLAMA, {"head_sharing": "per_head", "svd": "exact", "momentum_transfer": "reset"}),
        (LLAMA, {"head_sharing": "joint", "warm_start": True, "stagger_refresh": True, "subspace_iterations": 1}),
        (LLAMA, {"embeddings": "projected", "head_choice": "fixed", "residual_percent": 0.0}),
        (LLAMA, {"residual": "scaled"}),
        (LLAMA, {"residual": "both", "head_sharing": "per_head"}),
        (LLAMA, {"residual_mode": "moments", "head_sharing": "per_head"}),
        (PHI3, {}),
        (PHI3, {"residual": "scaled", "head_sharing": "grouped", "head_group_size": 2}),
        (PHI3, {"head_sharing": "per_head", "residual_warmup_steps": 0}),
        (PHI3, {"share_heads_of": ["q", "k"], "residual_mode": "moments"}),
        (NEOX, {}),
        (NEOX, {"head_sharing": "grouped", "head_group_size": 2, "momentum_transfer": "align"}),
        (NEOX, {"residual": "both"}),
        (MIXTRAL, {}),
        (MIXTRAL, {"residual": "scaled"}),
    ],
    ids=lambda x: x.model_type if hasattr(x, "model_type") else "-".join(map(str, x.values())) or "default",
)
def test_any_sharding_equals_the_whole_weight(architecture: Any, settings: dict[str, Any], kind: str) -> None:
    check_sharding(architecture, settings, kind)


def test_a_part_without_heads_beside_parts_with_heads_is_cut_like_them() -> None:
    """Qwen3-Next's gates lie between its queries, head by head, and share one basis."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_value_head_dim": 6}
    check_sharding(Qwen3NextConfig(**SMALL | layers | heads | linear), {}, "anywhere")


@pytest.mark.parametrize("kind", ["rows", "one row", "empty", "anywhere"])
@pytest.mark.parametrize(
    "settings",
    [{"head_sharing": "joint"}, {"head_sharing": "shared"}, {"head_choice": "energy"}, {"svd": "exact"}],
    ids=["rows that stay", "one head", "energy", "exact"],
)
def test_equal_weights_find_their_bases_together(settings: dict[str, Any], kind: str) -> None:
    """As on a GPU; on a CPU each is alone."""
    joined = []
    search = refresh.Search

    def counted(bucket: Any, *args: Any) -> Any:
        joined.append(len(bucket.pieces))
        return search(bucket, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh, "Search", counted)
        check_sharding(LLAMA, settings, kind, most=1 << 20)
    assert max(joined) > 1


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_equal_weights_of_two_dtypes_find_their_bases_apart(svd: str) -> None:
    """The bfloat16 layer comes first, and nothing of the float32 one is rounded."""
    config = GaLoreConfig(rank=4, update_proj_gap=2, proj_type="right", svd=svd, residual_percent=0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 2}))
    model.model.layers[0].to(torch.bfloat16)
    cut, whole = Run(model, config, "rows"), build(model, config)
    for optimizer in cut.optimizers:
        optimizer.max_stack_elements = 1 << 20  # together, as on a GPU
    params = {n: p for g in whole.param_groups for n, p in zip(g["names"], g["params"], strict=True)}
    for step in range(4):
        grads = {name: grad.to(params[name].dtype) for name, grad in some_gradients(whole, step).items()}
        cut.step(grads)
        for name, p in params.items():
            p.grad = grads[name].clone()
        whole.step()
    for name, p in params.items():
        if p.dtype == torch.float32:
            torch.testing.assert_close(cut.weights[name], p.detach(), rtol=0, atol=1e-5)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = threading.Lock()

    def one_at_a_time(work: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*args: Any) -> Any:
            with alone:  # Triton's interpreter knows one thread
                return work(*args)

        return locked

    for name in ("update", "move_plain", "count"):
        monkeypatch.setattr(galore_adamw, name, one_at_a_time(getattr(galore_adamw, name)))
    monkeypatch.setattr(refresh, "LIBRARY", 0)  # eigenvectors by the library: interpreted rotations take long


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kind", "sharing"),
    [("rows", "shared"), ("anywhere", "per_head")],  # several pieces of a weight of blocks
)
def test_kernels_move_cut_weights_too(kind: str, sharing: str) -> None:
    check_sharding(LLAMA, {"kernels": "triton", "head_sharing": sharing}, kind, steps=FEW)


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_float32_weights_of_a_bfloat16_model() -> None:
    """Factors have 8 bits, sums 24: most entries move as without rounding but for a bfloat16's distance to the next.

    Not all do: Adam turns a number near zero into a step of full size, of either sign.
    """
    config = GaLoreConfig(rank=4, update_proj_gap=3, scale=0.5, proj_type="right", residual_percent=0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LLAMA)
    kernels = dataclasses.replace(config, kernels="triton")
    low, exact = Run(model, kernels, "anywhere", torch.bfloat16), Run(model, config, "anywhere")
    whole, start = build(model, config), {name: w.clone() for name, w in low.weights.items()}
    for step in range(FEW):
        grads = {name: grad.bfloat16().float() for name, grad in some_gradients(whole, step).items()}
        low.step(grads)
        exact.step(grads)
    for group in whole.param_groups:
        for name in group["names"] if group["projected"] else []:
            distance, moved = ((low.weights[name] - x[name]).abs().median() for x in (exact.weights, start))
            assert 0.0 < distance < 2**-8 * moved


def test_cut_weights_find_bases_by_cholesky_factors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; test-only: on a CPU a refresh takes Householder's way, and cut weights eigenvectors."""
    asked = []

    def counted(A: Tensor, reduce: Any = None) -> Tensor:
        asked.append(reduce is not None)
        return by_cholesky(A, reduce)

    monkeypatch.setattr("galore_trainer.optim.refresh.tools_for", lambda *_: Tools(counted, by_eigh))
    check_sharding(LLAMA, {"head_sharing": "joint"}, "anywhere")
    assert any(asked)
    assert not all(asked)


def check_sharding(
    architecture: Any, settings: dict[str, Any], kind: str, most: int | None = None, steps: int = STEPS
) -> None:
    """Steps of cut weights, and of whole ones without kernels; ``most`` entries of the cut ones together."""
    config = GaLoreConfig(
        rank=4,
        update_proj_gap=3,
        scale=0.5,
        plain_lr_ratio=1.0,
        proj_type="right",
        **{"residual_percent": 5.0, "residual_warmup_steps": 2, **settings},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture)
    cut, whole = Run(model, config, kind), build(model, dataclasses.replace(config, kernels="torch"))
    for optimizer in cut.optimizers:
        optimizer.max_stack_elements = most
    start = {name: w.clone() for name, w in cut.weights.items()}
    for step in range(steps):
        grads = some_gradients(whole, step)
        cut.step(grads)
        for group in whole.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                p.grad = grads[name].clone()
        whole.step()
    params = {n: p.detach() for g in whole.param_groups for n, p in zip(g["names"], g["params"], strict=True)}
    for name, w in cut.weights.items():
        assert (w - start[name]).abs().max() > 1e-2
        torch.testing.assert_close(w, params[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    counters = [
        {
            name: {k: float(v) for k, v in state.items() if k.endswith(("step", "calls", "due", "born"))}
            for name, state in states.items()
        }
        for states in cut.states
    ]
    assert counters[0] == counters[1] == counters[2]


def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_on_all() -> None:
    config = GaLoreConfig(rank=4, update_proj_gap=2, proj_type="right")
    model = AutoModelForCausalLM.from_config(LLAMA)
    run, whole = Run(model, config, "anywhere"), build(model, config)
    grads = some_gradients(whole, 0)
    bad = "model.layers.0.mlp.up_proj.weight"
    grads[bad].view(-1)[-1] = float("inf")
    before = {name: w.clone() for name, w in run.weights.items()}
    run.step(grads)
    for name, w in run.weights.items():
        assert torch.equal(w, before[name]) == (name == bad)
    assert [states[bad]["skipped"].tolist() for states in run.states] == [[1, 1, 1]] * WORLD


def test_a_step_on_nothing_makes_state_and_changes_nothing() -> None:
    config = GaLoreConfig(rank=4, proj_type="right")
    model = AutoModelForCausalLM.from_config(LLAMA)
    run, whole = Run(model, config, "anywhere"), build(model, config)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    before = {name: w.clone() for name, w in run.weights.items()}
    run.step({name: torch.zeros_like(grad) for name, grad in some_gradients(whole, 0).items()})
    assert all(torch.equal(w, before[name]) for name, w in run.weights.items())
    assert all(state["calls"] == 0 for states in run.states for state in states.values())
    run.step(some_gradients(whole, 0))
    assert all(state["calls"] == 1 for states in run.states for state in states.values())


def test_rows_that_several_processes_hold_come_together() -> None:
    whole = torch.arange(35.0).view(7, 5)
    boundaries = (0, 12, 13, 35)  # the second process has one entry of row 2

    def rows(rank: int) -> dict[int, Tensor]:
        start, stop = boundaries[rank : rank + 2]
        shard = Shard(rows=7, columns=5, start=start, stop=stop, boundaries=(12, 13), ranks=Thread(meeting, rank))
        assert shard.cuts == (2,)
        return completed_cut_rows([shard], [whole.view(-1)[start:stop].clone()])[0]

    meeting = Meeting(WORLD)
    found = on_every_rank(rows)
    assert [list(each) for each in found] == [[2], [0], [0]]  # local rows
    assert all(torch.equal(row, whole[2]) for each in found for row in each.values())


def as_saved(run: Run, rank: int) -> tuple[dict[str, Any], list[Tensor]]:
    """What one process would save if ZeRO had put its projected weights into one flat tensor."""
    group = next(g for g in run.optimizers[rank].param_groups if g["projected"])
    slices, parts, state = [], [], {}
    for i, name in enumerate(group["names"]):
        held = run.local(rank, group, i, name, run.weights[name])
        offset = sum(map(len, parts))
        slices.append([name, list(run.weights[name].shape), held.shard.start, held.shard.stop, offset])
        parts.append(held.weight)
        state |= {f"{name}{BAR}{key}": value for key, value in run.saved(held).items()}
    described = {"names": group["names"], "projected": True, "matrices": describe(group["matrices"]), "params": [0]}
    return {"state": {0: state}, "param_groups": [described], SLICES: {0: slices}}, [torch.cat(parts)]


@pytest.mark.parametrize("steps", [1, 4])  # residual candidates, a residual
@pytest.mark.parametrize("kind", ["rows", "anywhere", "one row", "empty"])
@pytest.mark.parametrize("architecture", [LLAMA, PHI3, NEOX, MIXTRAL], ids=lambda x: x.model_type)
def test_saved_parts_become_a_whole_state_which_is_cut_into_the_same_parts(
    architecture: Any, kind: str, steps: int
) -> None:
    config = GaLoreConfig(
        rank=4, update_proj_gap=2, proj_type="right", residual_percent=5.0, residual_warmup_steps=2, basis_bits=16
    )
    model = AutoModelForCausalLM.from_config(architecture)
    run, whole = Run(model, config, kind), build(model, config)
    for step in range(steps):
        grads = some_gradients(whole, step)
        run.step(grads)
        for group in whole.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                p.grad = grads[name].clone()
        whole.step()
    parts = [as_saved(run, rank) for rank in range(WORLD)]
    made, weights = whole_of_slices([saved for saved, _ in parts], [flats for _, flats in parts])
    expected, group = whole.state_dict(), whole.param_groups[0]
    for number, name in enumerate(group["names"]):
        assert torch.equal(weights[name], run.weights[name])
        state = made["state"][number]
        assert described(state) == described(expected["state"][number])
        for rank in range(WORLD):
            held = run.local(rank, group, number, name, run.weights[name])
            again = rows_of_whole(state, group["matrices"][number], held.shard)
            saved = run.saved(held)
            assert described(again) == described(saved)
            for key, value in again.items():  # of a row that is cut in two, its owner's numbers were taken
                own = held.shard.owned if key in ROW_KEYS else ...
                assert not isinstance(value, Tensor) or torch.equal(value[own], saved[key][own])
    saved, flats = parts[0]
    with pytest.raises(OptionError, match="the files of all processes"):
        whole_of_slices([saved, saved], [flats, flats])


def described(state: Any) -> dict[str, Any]:
    """Keys with shapes and types, or numbers; counters are tensors in a state dict."""
    return {
        k: int(v) if bare(k) in COUNTERS else (v.shape, v.dtype) if isinstance(v, Tensor) else v
        for k, v in state.items()
    }
