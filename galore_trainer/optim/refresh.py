"""A new basis for a stack of matrices, and when it is due."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.basis import BASES, decomposes, from_sketch
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.linalg import CERTAIN, Reduce, Tools, least_error
from galore_trainer.optim.fused import tools_for
from galore_trainer.optim.group_settings import gap_of
from galore_trainer.optim.layerwise import is_usable, norms_of
from galore_trainer.optim.on_host import OnHost
from galore_trainer.optim.parts import sketch, sketch_matrices, width_of_sketch
from galore_trainer.optim.residual_state import reset_residual
from galore_trainer.optim.stack import Job, Stack
from galore_trainer.optim.streams import stream


def norms_on_host(jobs: Sequence[Job]) -> OnHost:
    """The Frobenius norms of the gradients of some jobs."""
    norms = norms_of([job.grad for job in jobs])
    return OnHost(torch.stack([norm.to(jobs[0].parameter.device) for norm in norms]))


class Doubts:
    """Refreshes that may fail, by their tools or by their gradients, of weights that keep their old bases then.

    Whether they did is asked for in the step after, where such a weight is due again, off its grid, and is given bases
    for certain, if its gradients are usable then: no step waits for an answer.
    """

    def __init__(self) -> None:
        self._open: list[tuple[OnHost, list[MutableMapping[str, Any]]]] = []

    def add(self, jobs: Sequence[Job], failed: Tensor) -> None:
        """Ask about some jobs; ``failed``: [jobs], true where the old basis was kept."""
        self._open.append((OnHost(failed), [job.state for job in jobs]))

    def settle(self) -> None:
        """Take in the answers: a refresh that failed is due again."""
        for failed, asked in self._open:
            for state, bad in zip(asked, failed.tolist(), strict=True):
                if bad:
                    state["due"] = state["calls"]
        self._open.clear()


def part_due(due: Iterable[Job], config: GaLoreConfig) -> tuple[list[Job], list[Job]]:
    """Jobs whose refresh may fail without harm, and those whose gradients are looked at before it.

    All matrices of a weight are of one kind, as its refreshes are counted once.
    """
    jobs = list(due)
    asking = {id(job.state) for job in jobs if not _may_fail(job, config)}
    return [job for job in jobs if id(job.state) not in asking], [job for job in jobs if id(job.state) in asking]


def part_by_norm(
    careful: Sequence[Job], norms: Sequence[float], config: GaLoreConfig
) -> tuple[list[Job], list[Job]]:  # fmt: skip
    """Jobs that can be refreshed now, and jobs that have no basis in this step.

    A refresh from zeros, or from entries that are not finite, stays due. A weight has no basis where a sketch is about
    to give it its first one, or where its first gradient is not finite.

    Args:
        careful: from ``part_due``.
        norms: of their gradients.
        config: of the optimizer.
    """
    fit = [job for job, norm in zip(careful, norms, strict=True) if 0.0 < norm < math.inf]
    without = [
        job
        for job, norm in zip(careful, norms, strict=True)
        if job.state["refreshes"] == 0 and (config.sketches_first or not norm < math.inf)  # NaN is not
    ]
    return fit, without


def usable_at_first(grad: Tensor) -> Tensor:
    """The flag of a weight without a basis; a norm that overflows tells as much as an entry."""
    return is_usable(grad) * torch.isfinite(norms_of([grad])[0])


def _may_fail(job: Job, config: GaLoreConfig) -> bool:
    """Whether a refresh can leave a basis for another step: it came from a whole gradient, and is not due off its grid.

    The residual begins at the first of these, with the gradient of that step. ``momentum_transfer: reset`` would start
    its moments anew twice; the library's SVDs raise an error at numbers that are none; and where tools that never fail
    are as fast there is nothing to gain.
    """
    state, gap, (_, m, n) = job.state, gap_of(job.group), job.matrix.lending_shape
    width = width_of_sketch(job.matrix, config, m, n)
    kept = state["refreshes"] > config.sketches_first and gap > 1 and (state["calls"] - state["phase"]) % gap == 0
    raises = config.diagnose_refreshes > 0 or decomposes(config.svd, width, m, n, config.momentum_transfer == "keep")
    apt = not raises and config.momentum_transfer != "reset"
    return kept and apt and tools_for(config, job.parameter.device, compute_dtype(job.parameter.dtype)) != CERTAIN


def next_due(calls: int, gap: int, phase: int) -> int:
    """The first step after ``calls`` on the grid phase, phase + gap, ...; one that had to wait does not shift it."""
    return calls + gap - (calls - phase) % gap


def refresh_stack(
    stack: Stack, G: Sequence[Tensor], config: GaLoreConfig, seed: int, doubts: Doubts | None = None
) -> galore.MatrixState:
    """Find bases from the gradients, carry the moments over, write the state.

    Args:
        stack: matrices that are due.
        G: the gradient of each, [blocks, rows, n]; finite and not all zero where there are no ``doubts``.
        config: how.
        seed: of the run.
        doubts: takes what may have failed, and is not waited for; without it a failure is made good here.

    Returns:
        The new state, as written.
    """
    old, first = stack.read(), stack.jobs[0].state["refreshes"] == 0
    rows = lending_rows(stack, G, config, seed)
    P = find_bases(stack, rows, config, seed, certainly=doubts is None)
    ok: Tensor | None = None
    if doubts is not None:
        norms = torch.stack(norms_of([job.grad for job in stack.jobs]))
        found = torch.isfinite(P).reshape(len(stack.jobs), -1).all(dim=1) & torch.isfinite(norms) & (norms > 0.0)
        ok = stack.spread(found)
        P = torch.where(ok, P, old.P)
        doubts.add(stack.jobs, ~found)
    if first:
        new = old._replace(P=P)
    else:
        new = galore.change_basis(
            old, P, stack.matrix.side, config.momentum_transfer, betas=stack.group["betas"]
        )  # fmt: skip
    new = new._replace(P=stack.put_basis(new.P))
    if new.M is not old.M:
        if ok is not None:  # with the basis, its moments stay
            new = new._replace(M=torch.where(ok, new.M, old.M), V=torch.where(ok, new.V, old.V))
        stack.write_moments(new, purpose=".refresh", ok=None if ok is None else ok.float())
    if config.momentum_transfer == "reset":
        reset_residual(stack)
    return new


def find_bases(
    stack: Stack, rows: Sequence[Tensor], config: GaLoreConfig, seed: int, reduce: Reduce | None = None,
    certainly: bool = True,
) -> Tensor:  # fmt: skip
    """Bases from the rows that give them, [jobs x blocks, lending rows, n]; the state is read, not written.

    Args:
        stack: matrices that are due.
        rows: of each job's gradient, in its dtype; with ``reduce`` this process's alone (``core.basis``).
        config: how.
        seed: of the run.
        reduce: sums over the processes that hold the rows.
        certainly: see to it that none is NaN, which may wait for the device.
    """
    omega, previous = None, None
    if config.svd != "exact":
        omega = draw_omega(stack.jobs, config, seed)
        if config.warm_start and stack.jobs[0].state["refreshes"] > 0:
            previous = stack.get_basis()
    find = functools.partial(
        BASES[config.svd], rows, stack.matrix.rank, stack.matrix.side, omega=omega, previous=previous,
        iterations=config.subspace_iterations, raw_signs=config.momentum_transfer == "keep",
    )  # fmt: skip
    if reduce is not None:
        find = functools.partial(find, reduce=reduce)
    tools = tools_for(config, stack.device, stack.dtype)
    return certain(find, tools, reduce) if certainly else find(tools=tools)


def certain(find: Callable[..., Tensor], tools: Tools, reduce: Reduce | None = None) -> Tensor:
    """Bases with tools that may fail; if they did, with those that do not. Waits for the device if they can fail.

    With ``reduce`` the processes do so together: a failure of one is one of all.
    """
    found = find(tools=tools)
    if tools == CERTAIN:
        return found
    failed = (~torch.isfinite(found)).any().float()
    return find(tools=CERTAIN) if bool(failed if reduce is None else reduce(failed)) else found


def count_refresh(state: MutableMapping[str, Any], group: Mapping[str, Any], config: GaLoreConfig) -> None:
    """Note in the state of a weight of this group that it has new bases, and when the next ones are due."""
    if state["refreshes"] == config.sketches_first:  # the first one from a whole gradient
        state["born"] = state["calls"]
    state["refreshes"] += 1
    state["due"] = next_due(state["calls"], gap_of(group), state["phase"])


def first_basis(stack: Stack, G: Sequence[Tensor], config: GaLoreConfig, seed: int) -> None:
    """Give matrices their first basis from a sketch of their gradients: of whole ones, or the one that was kept.

    A sketch sees all rows of a block, whoever lends later: it is the same for every split into micro-batches.
    """
    side = stack.matrix.side
    if not G:
        S = stack.kept("sketch")
    else:
        S = torch.cat([
            sketch(part, sketch_matrices(job.matrix, config, seed, job.name, stack.device), side)
            for part, job in zip(G, stack.jobs, strict=True)
        ])  # fmt: skip
    find = functools.partial(from_sketch, S, stack.matrix.rank, side)
    stack.put_basis(certain(find, tools_for(config, stack.device, stack.dtype)))


def lending_rows(stack: Stack, G: Sequence[Tensor], config: GaLoreConfig, seed: int) -> Sequence[Tensor]:
    """The rows that give each block its basis, [blocks, lending rows, n] of every job."""
    matrix = stack.matrix
    if not matrix.lends_heads:
        return G
    heads = draw_heads(stack.jobs, config, seed, lambda: torch.cat([matrix.energy(part) for part in G]))
    return [matrix.lend(part, own) for part, own in zip(G, stack.split(heads), strict=True)]


def errors_of(stack: Stack, G: Sequence[Tensor], P: Tensor) -> list[Tensor]:
    """The projection error of every job, a scalar tensor each."""
    kept = [galore.project(part, own, stack.matrix.side) for part, own in zip(G, stack.split(P), strict=True)]
    whole, projected = (torch.stack(norms_of(each)) for each in (G, kept))
    return list(galore.error_from_norms(whole, projected).unbind())


def projection_report(
    errors: Mapping[str, Tensor], excess_errors: Mapping[str, tuple[float, float]]
) -> dict[str, Any] | None:  # fmt: skip
    """What ``GaLoreAdamW.projection_report`` returns.

    Args:
        errors: projection error of the newest refresh, by matrix.
        excess_errors: excess and sharing excess, by matrix, where diagnosed.
    """
    if not errors:
        return None
    values = [error.item() for error in errors.values()]
    finite = {name: e for name, e in zip(errors, values, strict=True) if math.isfinite(e)}
    excess, sharing = zip(*excess_errors.values(), strict=True) if excess_errors else ((), ())
    return {
        "mean": sum(finite.values()) / max(1, len(finite)),
        "excess": sum(excess) / len(excess) if excess else None,
        "sharing_excess": sum(sharing) / len(sharing) if sharing else None,
        "by_matrix": finite,
    }


def draw_heads(jobs: Sequence[Job], config: GaLoreConfig, seed: int, energy: Callable[[], Tensor]) -> Tensor:
    """The heads that lend their rows, [jobs x blocks, lenders], rising.

    Args:
        jobs: equal matrices.
        config: gives ``head_choice``.
        seed: of the run.
        energy: squared norms of the heads' gradients, [jobs x blocks, heads], where the choice asks for them.
    """
    matrix, device = jobs[0].matrix, jobs[0].parameter.device
    if config.head_choice == "energy":
        return energy().topk(matrix.lenders, dim=-1).indices.sort(dim=-1).values
    if config.head_choice == "random":
        heads = torch.cat([_random_heads(job, seed) for job in jobs])
        return heads.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else heads.to(device)
    return torch.arange(matrix.lenders, dtype=torch.int64, device=device).expand(len(jobs) * matrix.blocks, -1)


def diagnose(stack: Stack, each: Sequence[Tensor], P: Tensor, config: GaLoreConfig, seed: int) -> tuple[Tensor, Tensor]:
    """What randomization and sharing cost, against the best that any basis could do: two tensors [jobs].

    ``excess`` is e(P) / e(exact) - 1 on the rows that were decomposed, ``sharing_excess`` e(P) / e(joint exact) on the
    whole matrix, with one basis of the same rank and side; e is the projection error. Where the best basis loses
    nothing there is nothing to compare with: 0 and 1.
    """
    matrix = stack.matrix
    excess, sharing = [], []
    for G, lent, own in zip(each, lending_rows(stack, each, config, seed), stack.split(P), strict=True):
        best = least_error(lent, matrix.rank)  # 0 where the lending rows have no more directions than the rank
        excess.append(torch.where(best > 1e-6, galore.lost_share(lent, own, matrix.side) / best, 1.0))
        whole = G.reshape(1, matrix.rows, matrix.columns) if matrix.head_dim else G
        least = least_error(whole, matrix.rank)
        sharing.append(torch.where(least > 1e-6, galore.lost_share(G, own, matrix.side) / least, 1.0))
    return torch.cat(excess) - 1.0, torch.cat(sharing)


def _random_heads(job: Job, seed: int) -> Tensor:
    """Drawn on the CPU, so that every type of device lends the same heads: [blocks, lenders]."""
    matrix, refresh = job.matrix, job.state["refreshes"]
    draws = (stream("cpu", seed, job.name, "head", refresh, b) for b in range(matrix.blocks))
    count = matrix.heads_per_block
    heads = torch.stack([torch.randperm(count, generator=g, dtype=torch.int64, device="cpu") for g in draws])
    return heads[:, : matrix.lenders].sort(dim=-1).values


def draw_omega(jobs: Sequence[Job], config: GaLoreConfig, seed: int) -> Tensor:
    """The Gaussian test matrices of equal matrices, [jobs x blocks, n, k]."""
    matrix = jobs[0].matrix
    blocks, m, n = matrix.lending_shape
    k = width_of_sketch(matrix, config, m, n)
    device: Any = jobs[0].parameter.device
    omega = torch.empty(len(jobs) * blocks, n, k, dtype=torch.float32, device=device)
    for i, (job, b) in enumerate(itertools.product(jobs, range(blocks))):
        omega[i].normal_(generator=stream(device, seed, job.name, "omega", job.state["refreshes"], b))
    return omega
