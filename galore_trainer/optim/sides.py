"""Which side of a matrix is projected, and whether a rank fits it."""

from __future__ import annotations

from collections.abc import Sequence

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.heads import LogicalMatrix, Side
from galore_trainer.errors import OptionError


def side_of(proj_type: str, m: int, n: int) -> Side:
    """GaLore's rule: ``std`` projects the shorter side (right when m >= n), ``reverse_std`` the longer one."""
    if proj_type == "left" or proj_type == "right":
        return proj_type  # type: ignore[return-value]
    return "right" if (m >= n) == (proj_type == "std") else "left"


def project_whole(
    shape: Sequence[int], name: str, config: GaLoreConfig, rank: int | None = None, transposed: bool = False
) -> LogicalMatrix:
    """The logical matrix of a weight that is projected whole: one basis, or one an expert for a 3-D stack.

    Args:
        shape: [m, n], [n, m] where ``transposed``, or [experts, m, n].
        name: the parameter's name, for errors.
        config: gives ``proj_type`` and ``rank``.
        rank: instead of the config's.
        transposed: the weight is stored as [in_features, out_features].

    Raises:
        OptionError: the weight is neither 2-D nor a 3-D stack, or the rank exceeds its smaller side.
    """
    if len(shape) not in (2, 3):
        raise OptionError(name, tuple(shape), "a 2-D weight or a 3-D stack of experts", "Leave it out of the group.")
    m, n = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    rank = config.rank if rank is None else rank
    if rank > min(m, n):
        raise OptionError("galore.rank", rank, f"at most {min(m, n)}, the smaller side of {name} ({m} x {n})")
    experts = shape[0] if len(shape) == 3 else 1
    return LogicalMatrix(
        outer=experts, length=m, columns=n, transposed=transposed, side=side_of(config.proj_type, m, n), rank=rank,
        blocks=experts,
    )  # fmt: skip
