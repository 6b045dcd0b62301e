"""The residual inside the optimizer's state: born with the first basis, then candidates, then a support.

Keys (after the matrix's prefix): ``candidate_index`` and ``candidate_mean`` while warming up; ``residual_index``,
``residual_exp_avg``, ``residual_exp_avg_sq`` and ``residual_step`` afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import residual
from galore_trainer.core.galore import widen
from galore_trainer.core.sparse import Support, read_at
from galore_trainer.optim.stack import Job, Stack
from galore_trainer.targets.matrices import has_residual, support_shape

MOMENTS = (("residual_exp_avg", True), ("residual_exp_avg_sq", False))  # key, and whether it has a sign
AGE = "residual_step"


def residual_lives(job: Job, config: GaLoreConfig) -> bool:
    """Whether it has begun: at the first basis that came from a whole gradient."""
    return has_residual(job.matrix, config) and job.state["refreshes"] > config.sketches_first


def lost_part(
    stack: Stack, G: Tensor | None, R: Tensor, P: Tensor, ok: Tensor, config: GaLoreConfig
) -> tuple[Support, Tensor] | None:
    """This step's D[S] and where it lies, or None while candidates warm up, which take it in.

    Args:
        stack: matrices of one age; the states of those that warm up are changed in place.
        G, R, P: gradients, projections and bases of this step, [jobs x blocks, ...]; G is None where gradients were
            sampled at the support beforehand.
        ok: [jobs x blocks, 1, 1], 1.0 where the gradient is finite.
        config: how many entries, how long a warm-up.
    """
    if not stack.has("residual_index"):
        _warm_up(stack, G, R, P, ok, config)
        if not stack.has("residual_index") or config.residual_warmup_steps > 0:
            return None  # the support's moments begin with the step after the warm-up
    support = Support(stack.get("residual_index"), stack.matrix.columns).wide()
    return support, _loss_at(stack, G, R, P, support)


def reset_residual(stack: Stack) -> None:
    """Start the sparse moments anew, on the same support (``momentum_transfer: reset``)."""
    if stack.has(AGE):
        for key, signed in MOMENTS:
            stack.put_moment(key, torch.zeros_like(stack.get_moment(key, signed=signed)), signed=signed)
        stack.put_count(AGE, torch.zeros_like(stack.get_count(AGE)))


def _loss_at(stack: Stack, G: Tensor | None, R: Tensor, P: Tensor, support: Support) -> Tensor:
    """D[S], from the gradients or from what was sampled of them."""
    at_support = stack.kept("sampled") if G is None else widen(read_at(G, support))
    return residual.lost_at(at_support, R, P, stack.matrix.side, support)


def _warm_up(stack: Stack, G: Tensor | None, R: Tensor, P: Tensor, ok: Tensor, config: GaLoreConfig) -> None:
    state = stack.jobs[0].state
    _, lines, entries = support_shape(stack.matrix, config)
    if not stack.has("candidate_index"):
        assert G is not None  # this step's basis came from it
        wide = entries if config.residual_warmup_steps == 0 else entries * residual.CANDIDATES
        index, D = residual.largest_lost(G, R, P, stack.matrix.side, lines, wide)
        stack.put("candidate_index", index)
        stack.put("candidate_mean", torch.zeros(index.shape, dtype=R.dtype, device=R.device))
    else:
        D = _at_candidates(stack, G, R, P)
    D = torch.where(ok > 0.0, D, 0.0)
    share = ok.to(D.dtype) * (1.0 - stack.group["betas"][0])
    stack.put("candidate_mean", torch.lerp(stack.get("candidate_mean"), D, share))
    if state["calls"] - state["born"] + 1 >= config.residual_warmup_steps:
        index = residual.best_candidates(stack.pop("candidate_index"), stack.pop("candidate_mean"), entries)
        stack.put("residual_index", index)
        for key, signed in MOMENTS:
            stack.put_moment(key, torch.zeros(index.shape, dtype=R.dtype, device=R.device), signed=signed)
        stack.put_count(AGE, stack.ages(len(stack.jobs)))


def _at_candidates(stack: Stack, G: Tensor | None, R: Tensor, P: Tensor) -> Tensor:
    """D at the candidates; where entries are gathered one product is cheaper than four times as many of them."""
    support = Support(stack.get("candidate_index"), stack.matrix.columns)
    if G is None or residual.samples(G.device):
        return _loss_at(stack, G, R, P, support)
    return read_at(residual.dense_loss(G, R, P, stack.matrix.side), support)
