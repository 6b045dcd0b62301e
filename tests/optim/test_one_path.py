"""One path serves whole and cut weights: what must not depend on the backend, on joining, or on a save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Phi3Config

from cut_weights import Run, build, some_gradients
from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix, local_rows
from galore_trainer.errors import OptionError
from galore_trainer.optim import lenders, refresh
from galore_trainer.optim.bucket import Bucket
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.state_forms import pieces_of_rows

SMALL = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
PHI3 = Phi3Config(**SMALL, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
NEOX = GPTNeoXConfig(**SMALL, num_attention_heads=4)


def cut_run(architecture: Any, settings: dict[str, Any], steps: int, most: int | None = None) -> Run:
    config = GaLoreConfig(**{"rank": 2, "update_proj_gap": 2, "proj_type": "right", **settings})
    torch.manual_seed(0)
    run = Run(AutoModelForCausalLM.from_config(architecture), config, "rows")
    for optimizer in run.optimizers:
        optimizer.max_stack_elements = most
    for step in range(steps):
        run.step(some_gradients(run.optimizers[0], step))
    return run


@pytest.mark.parametrize("settings", [{}, {"head_sharing": "per_head"}, {"head_choice": "energy"}], ids=str)
@pytest.mark.parametrize("architecture", [PHI3, NEOX], ids=lambda config: config.model_type)
def test_joined_parts_of_a_fused_weight_have_bases_of_their_own_rows(
    architecture: Any, settings: dict[str, Any]
) -> None:
    """q, k and v are equal matrices at other rows of one weight; on a GPU their bases are found together."""
    alone, joined = (cut_run(architecture, settings, 3, most) for most in (None, 1 << 20))
    for name, w in joined.weights.items():
        torch.testing.assert_close(w, alone.weights[name], rtol=0, atol=1e-5)


def test_rows_that_stay_are_not_copied_for_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of a gradient; only a process that has fewer than another in one bucket adds zeros."""
    seen: list[bool] = []

    def noted(bucket: Bucket, *args: Any) -> Any:
        rows, reduce = lenders.lending_rows(bucket, *args)
        (w,) = [piece.owner for piece in bucket.pieces]
        if reduce is not None and w.shard.local_rows:
            seen.append(rows[0].untyped_storage().data_ptr() == w.grad.untyped_storage().data_ptr())
        return rows, reduce

    monkeypatch.setattr(refresh, "lending_rows", noted)
    cut_run(PHI3, {"head_sharing": "joint"}, 1)
    assert all(seen)
    assert seen


def fused_after(steps: int, settings: dict[str, Any] | None = None) -> Any:
    """An optimizer of whole weights, the query, key and value of each layer in one."""
    torch.manual_seed(0)
    config = GaLoreConfig(
        **{"rank": 2, "update_proj_gap": 2, "residual": "sparse", "residual_warmup_steps": 1, **(settings or {})}
    )
    optimizer = build(AutoModelForCausalLM.from_config(PHI3), config)
    for step in range(steps):
        grads = some_gradients(optimizer, step)
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                p.grad = grads[name]
        optimizer.step()
    return optimizer


def test_a_fused_weight_has_one_age_and_saves_one_for_each_matrix() -> None:
    optimizer = fused_after(3)
    name = next(n for n, _ in optimizer.projected_weights() if "qkv" in n)
    assert {k for k in optimizer.state_of(name) if k.endswith("step")} == {"step", "residual_step"}
    saved = next(s for s in optimizer.state_dict()["state"].values() if "q.basis" in s)
    ages = {k: v for k, v in saved.items() if k.endswith("step")}
    assert {k: float(v) for k, v in ages.items()} == {
        f"{matrix}.{key}": age for matrix in "qkv" for key, age in (("step", 3.0), ("residual_step", 2.0))
    }
    assert len({age.data_ptr() for age in ages.values()}) == len(ages)  # each can be read into by itself


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["before", "warm-up", "support"])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_loaded_state_is_saved_again_as_it_was(steps: int, bits: int) -> None:
    saved = fused_after(steps, {"state_bits": bits}).state_dict()
    again = fused_after(0, {"state_bits": bits})
    again.load_state_dict(saved)
    assert_equal(again.state_dict()["state"], saved["state"])


def test_a_state_whose_matrices_have_unequal_ages_is_refused_and_left_as_it_is() -> None:
    saved, fresh = fused_after(2).state_dict(), fused_after(0)
    number = next(n for n, s in saved["state"].items() if "k.step" in s)
    saved["state"][number]["k.step"] += 1.0
    with pytest.raises(OptionError, match=r"qkv_proj.*\[2, 3\] steps"):
        fresh.load_state_dict(saved)
    assert not fresh.state


def test_unequal_ages_of_a_cut_weight_are_refused_before_its_state_is_touched() -> None:
    run = cut_run(PHI3, {}, 1)
    group = next(g for g in run.optimizers[0].param_groups if g["projected"])
    i, name = next((i, n) for i, n in enumerate(group["names"]) if "qkv" in n)
    w = run.local(0, group, i, name, torch.zeros_like(run.weights[name]))
    loaded = run.saved(w)
    loaded["v.step"] = loaded["v.step"] + 1.0
    before = dict(loaded)
    with pytest.raises(OptionError, match="steps"):
        pieces_of_rows(loaded, w.matrices, w.rows(), name)
    assert loaded.keys() == before.keys()


@pytest.mark.parametrize("architecture", [PHI3, NEOX], ids=lambda config: config.model_type)
def test_a_loaded_cut_state_is_saved_again_as_it_was_before_a_step_and_after_none(architecture: Any) -> None:
    run = cut_run(architecture, {"residual_warmup_steps": 1}, 3)
    for rank, optimizer in enumerate(run.optimizers):
        for group in optimizer.param_groups:
            for i, name in enumerate(group["names"] if group["projected"] else ()):
                w = run.local(rank, group, i, name, run.weights[name])
                saved = run.saved(w)
                w.state.clear()
                w.state.update({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in saved.items()})
                assert_equal(run.saved(w), saved)  # loaded, and not used yet
                pieces_of_rows(w.state, w.matrices, w.rows(), name)
                assert_equal(run.saved(w), saved)


def assert_equal(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, dict):
            assert_equal(found[key], value)
        elif isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value


def test_refresh_now_leaves_cut_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cut rows come together in a step only."""
    run = cut_run(PHI3, {}, 1)
    optimizer = run.optimizers[0]
    cut = [run.local(0, g, i, n, run.weights[n]) for g in optimizer.param_groups for i, n in enumerate(g["names"])]
    before = [dict(w.state) for w in cut]
    monkeypatch.setattr(optimizer, "weights_with_gradients", lambda: cut)
    optimizer.refresh_now()
    for w, state in zip(cut, before, strict=True):
        assert_equal(w.state, state)


def test_indices_of_scattered_rows_lie_where_the_rows_do() -> None:
    """A step on a GPU would wait for indices that come from the host."""
    run = cut_run(NEOX, {"head_sharing": "per_head"}, 0)
    group = next(g for g in run.optimizers[0].param_groups if g["projected"])
    matrices = next(m for m, name in zip(group["matrices"], group["names"], strict=True) if "query" in name)
    rows = [r for m in matrices for r in local_rows(m, "w", 48, 0, 30, torch.device("meta"))]
    scattered = [index for r in rows for index in (r.at, r.block_index) if not isinstance(index, slice)]
    assert scattered
    assert all(index.is_meta for index in scattered)


def test_an_ordinary_step_asks_the_device_nothing() -> None:
    """Fake tensors have no numbers, so that a step which reads one raises; a refresh of checked gradients does."""
    q, k = (LogicalMatrix(label=label, length=8, start=8 * i, columns=16, rank=4) for i, label in enumerate("qk"))
    config = GaLoreConfig(rank=4, residual_percent=10.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole, fused, plain = (torch.nn.Parameter(torch.empty(shape)) for shape in ((24, 16), (16, 16), (16,)))
        matrices = [[LogicalMatrix(length=24, columns=16, rank=4)], [q, k]]
        projected = {"params": [whole, fused], "names": ["a", "b"], "projected": True, "matrices": matrices}
        optimizer = GaLoreAdamW([projected, {"params": [plain], "names": ["c"]}], config, lr=1e-2)
        optimizer.make_state()
        for p in (whole, fused, plain):
            p.grad = torch.empty_like(p)
            optimizer.state[p]["calls"] = 5
        for p in (whole, fused):
            optimizer.state[p]["due"] = 100
        optimizer.step()
        optimizer.state[fused]["due"] = 0
        with pytest.raises(DataDependentOutputException):
            optimizer.step()
