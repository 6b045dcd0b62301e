"""Processes with equal weights: what layer-wise mode keeps is averaged, and what differs is named. Threads stand in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.guards import compare_bases
from galore_trainer.optim.layerwise import ProjectedGradient, measure_together
from threads import Meeting, Thread

WORLD, STEPS = 2, 7
SHAPES = {"tall": (24, 16), "wide": (12, 20), "square": (16, 16)}


def on_both(work: Callable[[Thread], Any]) -> list[Any]:
    found: list[Any] = [None] * WORLD
    meeting = Meeting(WORLD)

    def one(rank: int) -> None:
        try:
            found[rank] = work(Thread(meeting, rank))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def make(dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.nn.Parameter], GaLoreAdamW]:
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}
    config = GaLoreConfig(rank=4, update_proj_gap=3, layerwise=True, residual_percent=5.0, residual_warmup_steps=2)
    group = {"params": list(weights.values()), "names": list(weights), "projected": True}
    return weights, GaLoreAdamW([group], config, lr=1e-2, eps=1e-6)


def backward(weights: dict[str, torch.nn.Parameter], step: int, part: int) -> None:
    """One micro-batch: a loss whose gradients are given."""
    generator = torch.Generator().manual_seed(100 * step + part)
    loss = torch.stack([(p * torch.randn(p.shape, generator=generator)).float().sum() for p in weights.values()]).sum()
    (loss / WORLD).backward()


def test_two_processes_take_the_steps_of_one_on_all_micro_batches() -> None:
    one, optimizer = make()
    norms = []
    for step in range(STEPS):
        for part in range(2 * WORLD):
            backward(one, step, part)
        for p in one.values():
            p.grad.mul_(1.0 / WORLD)  # the mean over processes of each one's sum
        norms.append(torch.nn.utils.clip_grad_norm_(one.values(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()

    def work(ranks: Thread) -> Any:
        weights, own = make()
        own.replicate_over(ranks)
        seen = []
        for step in range(STEPS):
            for part in range(2):
                backward(weights, step, 2 * ranks.rank + part)
            seen.append(torch.nn.utils.clip_grad_norm_(weights.values(), 0.5).item())
            own.step()
            own.zero_grad()
        return {n: p.detach() for n, p in weights.items()}, seen

    for found in on_both(work):
        assert not isinstance(found, Exception), found
        weights, seen = found
        assert seen == pytest.approx(norms, rel=1e-4)
        for name, p in one.items():
            torch.testing.assert_close(weights[name], p.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("together", [1, 1 << 24])
def test_norms_estimated_together_are_what_is_kept_and_one_look_at_what_is_lost(
    together: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr("galore_trainer.optim.kept.TOGETHER", together)
    weights, optimizer = make()
    weights |= {f"{name} again": torch.nn.Parameter(w.detach().clone()) for name, w in weights.items()}
    names = [name for name in weights if name.endswith("again")]
    optimizer.add_param_group({"params": [weights[name] for name in names], "names": names, "projected": True})
    for part in range(2):
        backward(weights, 0, part)
    measure_together(w.grad for w in weights.values())
    for w in weights.values():  # of a sketch
        (own,) = w.grad.parts
        width = own.sketch.shape[-2 if own.matrix.side == "right" else -1]
        assert w.grad.estimate.item() == pytest.approx((own.sketch.norm() / width**0.5).item(), rel=1e-6)
    optimizer.step()
    for part in range(2):
        backward(weights, 1, part)
    dense = {name: torch.zeros_like(w) for name, w in weights.items()}
    for part in range(2):
        generator = torch.Generator().manual_seed(100 + part)
        for name, w in weights.items():
            dense[name] += torch.randn(w.shape, generator=generator) / WORLD
    found = {name: w.grad for name, w in weights.items() if isinstance(w.grad, ProjectedGradient)}  # others are due
    measure_together(found.values())
    assert len(found) >= 4
    for name, grad in found.items():
        (own,), G = grad.parts, dense[name]
        P, d, _, _ = (x.squeeze(0) for x in own.estimate_inputs())
        right = own.matrix.side == "right"
        kept, lost = (G @ P, G - G @ P @ P.T) if right else (P.T @ G, G - P @ P.T @ G)
        energy = kept.square().sum() + (lost @ d if right else d.T @ lost).square().sum()
        assert grad.estimate.item() == pytest.approx(energy.sqrt().item(), rel=1e-4), name


def test_what_is_sent_is_small_and_in_the_weights_precision() -> None:
    def work(ranks: Thread) -> Any:
        weights, own = make(torch.bfloat16)
        own.replicate_over(ranks)
        for step in range(STEPS):
            backward(weights, step, ranks.rank)
            own.step()
        return dict(own.averager.sent)

    sent, again = on_both(work)
    assert sent == again
    rows = 24 + 20 + 16  # of R: right, left, right
    whole = {n: rows * columns for n, (rows, columns) in SHAPES.items()}
    due = {n: len([t for t in range(1, STEPS) if t % 3 == place]) for place, n in enumerate(SHAPES)}
    assert sent["whole"] == 2 * sum(due[n] * whole[n] for n in SHAPES)
    assert sent["projected"] <= 2 * 4 * rows * (STEPS - 1)
    assert set(sent) == {"sketch", "projected", "along", "sampled", "whole"}


def test_backward_after_the_mean_is_refused() -> None:
    def work(ranks: Thread) -> None:
        weights, own = make()
        own.replicate_over(ranks)
        backward(weights, 0, 0)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        backward(weights, 0, 1)

    for error in on_both(work):
        assert isinstance(error, RuntimeError)
        assert "call step() or zero_grad() first" in str(error)


def test_other_weights_or_a_missing_gradient_are_named() -> None:
    def other_weights(ranks: Thread) -> None:
        weights, own = make()
        own.replicate_over(ranks)
        if ranks.rank == 1:
            weights["wide"].data[0, 0] += 1e-6
        backward(weights, 0, 0)
        own.step()

    def no_gradient(ranks: Thread) -> None:
        weights, own = make()
        own.replicate_over(ranks)
        if ranks.rank == 1:
            del weights["square"]
        backward(weights, 0, 0)
        own.step()

    for work, words in ((other_weights, "other weights, in wide"), (no_gradient, "no gradient.*in square")):
        for error in on_both(work):
            assert isinstance(error, RuntimeError)
            with pytest.raises(RuntimeError, match=words):
                raise error


def test_bases_that_drift_apart_are_named() -> None:
    def work(ranks: Thread) -> None:
        bases = {n: torch.ones(1, 4, 2) for n in ("q", "k")}
        bases["k"][0, 0, 0] += 1e-7 * ranks.rank
        compare_bases([(ranks, f"layer.{n}", P, 11) for n, P in bases.items()])

    for error in on_both(work):
        assert isinstance(error, RuntimeError)
        assert "different bases for layer.k" in str(error)
