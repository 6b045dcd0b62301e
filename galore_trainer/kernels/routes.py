"""How a step is computed, by rank: the one place where tiles are chosen.

``TABLE`` holds what was fastest where it was measured. Every route gives the same step up to the order of float32 sums;
stochastic rounding takes the same random numbers on every route.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

WHOLE = 1 << 30  # more columns than any rank has


class ProjectRoute(NamedTuple):
    """How R = G P or P^T G is computed.

    Attributes:
        lines: most lines of R in a program of ``kernels.project``.
        columns: most entries of each line in a program; at a higher rank, several programs share the lines.
        norms: whether norms of lines, where they are wanted, come with R; else a kernel of their own reads G again.
    """

    lines: int = 128
    columns: int = WHOLE
    norms: bool = True


class UpdateRoute(NamedTuple):
    """How W <- W - step lift(N) is computed from bfloat16 factors.

    Attributes:
        rows, columns: of a tile of W.
        warps: of a program.
        looped: ``kernels.looped``: a program moves one tile, and loops over the rank in steps of ``depth``. Else
            ``kernels.update``: it moves several tiles, one below the other, and keeps ``depth`` rows of P^T or N.
        depth: as above.
        early: where looped, W is read before the products, and waits in registers.
        described: where looped, N and P are read by Hopper's copy engine, if their strides allow it.
        registers: most of a thread, so that more programs share a multiprocessor; None sets no limit.
    """

    rows: int = 32
    columns: int = 128
    warps: int = 4
    looped: bool = False
    depth: int = 128
    early: bool = True
    described: bool = False
    registers: int | None = None


class Route(NamedTuple):
    """How a step is computed.

    Attributes:
        project, update: the two products.
        dense: the update with the scaled residual, whose gradients need registers, too; None for ``update``.
        small_state: whether kernels read and write moments of 16 and 8 bits; else torch does.
    """

    project: ProjectRoute = ProjectRoute()
    update: UpdateRoute = UpdateRoute()
    small_state: bool = False
    dense: UpdateRoute | None = None


_LOOPED = UpdateRoute(128, 128, 8, looped=True, depth=64, described=True, registers=128)
_DENSE = UpdateRoute(64, 128, 4, looped=True, depth=64, early=False, described=True)

TABLE: tuple[tuple[int, Route], ...] = (
    (128, Route(small_state=True)),
    (256, Route(ProjectRoute(norms=False), _LOOPED, small_state=True, dense=_DENSE)),
    (WHOLE, Route(ProjectRoute(columns=256, norms=False), _LOOPED, small_state=True, dense=_DENSE)),
)
"""Largest rank, and its route, in rising order; for bfloat16 factors. Measured on an H200 (``results/routes``)."""

_forced: list[Route] = []


def route_of(rank: int, factors: torch.dtype) -> Route:
    """The route of a rank.

    Args:
        rank: r.
        factors: dtype of the products' factors. Tiles of float32 factors, which are split in three, have no choice.
    """
    route = _forced[-1] if _forced else next(route for largest, route in TABLE if rank <= largest)
    return route if factors == torch.bfloat16 else Route(small_state=route.small_state)


@contextlib.contextmanager
def forced(route: Route) -> Iterator[None]:
    """Take this route at every rank inside the ``with``: for tests and measurements."""
    _forced.append(route)
    try:
        yield
    finally:
        _forced.pop()
