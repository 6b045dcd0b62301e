"""Ages of moments, and counters of skipped steps, where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.tables import Scattered


def count_(ages: Sequence[Scattered], skipped: Scattered, ok: Tensor) -> None:
    """One step more for moments that took a gradient in; what ``optim.skips.count_skips`` does for the others.

    Args:
        ages: up to two tables of scalars, float32; each grows by ``ok``.
        skipped: int32 [3] of every job, as ``optim.skips`` describes them; nothing is counted at the address 0.
        ok: 1.0 or 0.0 for each job, [jobs].
    """
    kernel: Any = _count
    first, second = [age.addresses for age in ages] + [ok] * (2 - len(ages))
    kernel[(len(ok),)](first, second, skipped.addresses, ok, AGES=len(ages), num_warps=1)


@triton.jit
def _count(first, second, skipped, ok, AGES: tl.constexpr):
    job = tl.program_id(0)
    good = tl.load(ok + job)
    if AGES > 0:
        age = tl.load(first + job).to(tl.pointer_type(tl.float32))
        tl.store(age, tl.load(age) + good)
    if AGES > 1:
        age = tl.load(second + job).to(tl.pointer_type(tl.float32))
        tl.store(age, tl.load(age) + good)
    address = tl.load(skipped + job)
    if address != 0:
        counters = address.to(tl.pointer_type(tl.int32))
        bad = 1 - good.to(tl.int32)
        in_a_row = (tl.load(counters) + 1) * bad
        tl.store(counters, in_a_row)
        tl.store(counters + 1, tl.load(counters + 1) + bad)
        tl.store(counters + 2, tl.maximum(tl.load(counters + 2), in_a_row))
