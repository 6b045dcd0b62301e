"""How optimizer state is stored: in 32, 16 or 8 bits.

Arithmetic is in float32. For float64 weights arithmetic and "32-bit" state are float64.

- 16 bits are bfloat16.
- 8 bits are block-wise and dynamic (Dettmers et al. 2022, arXiv 2110.02861). A block of 256 numbers shares a scale: its
  entry of largest magnitude, with its sign. The quotients are rounded to a table of 256 values over seven decades,
  densest near zero: from -0.993 to 1 for signed numbers, from 0 to 1 for second moments.

Moments are rounded stochastically, since rounding to nearest would undo small changes of a moving average. 8-bit second
moments are stored as square roots, and positive ones never become zero, so that M / sqrt(V) stays bounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from galore_trainer.core.galore import round_bits, widen

BLOCK = 256
NOISE = 1 << 16  # rounding noise is uniform in 0 ... NOISE - 1


class Stored(NamedTuple):
    """A tensor as it is stored.

    Attributes:
        values: float32, float64 or bfloat16 numbers, or uint8 (bases: int8) codes, in the tensor's shape [N, ...].
        scale: scales of 8-bit codes, float32: [N, blocks of 256] for moments, [N, r] for bases; else None.
    """

    values: Tensor
    scale: Tensor | None = None


def encode(x: Tensor, bits: int, noise: Tensor | None, *, signed: bool) -> Stored:
    """Store moments in ``bits`` bits.

    Args:
        x: [N, ...], float32 or float64. No block of 256 spans two of the N.
        bits: 32 (x unchanged), 16 or 8.
        noise: for stochastic rounding, int32 in 0 ... ``NOISE`` - 1, in the shape of x; unused for 32 bits.
        signed: False for second moments, which are at least 0.
    """
    if bits == 32:
        return Stored(x)
    assert noise is not None
    x = x.float()
    if bits == 16:
        return Stored(round_bits(x, noise))
    blocks = _blocks(x if signed else x.sqrt())
    largest = blocks.abs().argmax(dim=-1, keepdim=True)
    scale = blocks.gather(-1, largest)  # signed, so that this entry is exactly 1: the table has no -1
    values = table(signed, x.device)
    quotients = blocks / torch.where(scale == 0.0, 1.0, scale)
    below = (torch.bucketize(quotients, values, right=True, out_int32=True) - 1).clamp_(0, len(values) - 2)
    low, high = values[below], values[below + 1]
    codes = below.add_(quotients - low > (high - low) * (_blocks(noise).float() / NOISE))
    if not signed:  # code 0 of a positive number would divide M by zero
        codes = torch.where(blocks > 0.0, codes.clamp(min=1), codes)
    kept = codes.to(torch.uint8).flatten(1)[:, : x[0].numel()].contiguous()  # without the last block's padding
    return Stored(kept.view(x.shape), scale.squeeze(-1))


def decode(stored: Stored, *, signed: bool) -> Tensor:
    """The moments that ``encode`` stored, in ``compute_dtype``."""
    values, scale = stored
    if scale is None:
        return widen(values)
    quotients = table(signed, values.device)[_blocks(values).long()]
    x = (quotients * scale.unsqueeze(-1)).flatten(1)[:, : values[0].numel()].view(values.shape)
    return x if signed else x.square()


def encode_basis(P: Tensor, bits: int) -> Stored:
    """Store bases [N, rows, r], rounded to nearest; 8 bits are linear, with one scale a column."""
    if bits == 32:
        return Stored(P)
    if bits == 16:
        return Stored(P.to(torch.bfloat16))
    P = P.float()
    scale = P.abs().amax(dim=-2) / 127.0
    codes = (P / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-2)).round()
    return Stored(codes.to(torch.int8), scale)


def decode_basis(stored: Stored) -> Tensor:
    """The bases that ``encode_basis`` stored, in ``compute_dtype``."""
    values, scale = stored
    return widen(values) if scale is None else values.float() * scale.unsqueeze(-2)


def zero_code(*, signed: bool) -> int:
    """The 8-bit code of zero."""
    return 127 if signed else 0


class Form(NamedTuple):
    """Shapes and dtypes of a ``Stored``.

    Attributes:
        shape, dtype: of the values.
        scale: shape of the float32 scales; None where there are none.
        below: bound of the values where these are positions; None for other values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: tuple[int, ...] | None = None
    below: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return math.prod(self.shape) * self.dtype.itemsize + (4 * math.prod(self.scale) if self.scale else 0)


def stored_form(shape: Sequence[int], bits: int, wide: torch.dtype = torch.float32) -> Form:
    """The form in which ``encode`` stores moments [N, ...] of ``compute_dtype`` ``wide``."""
    dtype = {32: wide, 16: torch.bfloat16, 8: torch.uint8}[bits]
    return Form(tuple(shape), dtype, (shape[0], -(-math.prod(shape[1:]) // BLOCK)) if bits == 8 else None)


def stored_basis_form(shape: Sequence[int], bits: int, wide: torch.dtype = torch.float32) -> Form:
    """The form in which ``encode_basis`` stores bases [N, rows, r] of ``compute_dtype`` ``wide``."""
    dtype = {32: wide, 16: torch.bfloat16, 8: torch.int8}[bits]
    return Form(tuple(shape), dtype, (shape[0], shape[2]) if bits == 8 else None)


def stored_bytes(shape: Sequence[int], bits: int, wide: torch.dtype = torch.float32) -> int:
    """Bytes of a moment that ``encode`` has stored."""
    return stored_form(shape, bits, wide).nbytes


def stored_basis_bytes(shape: Sequence[int], bits: int, wide: torch.dtype = torch.float32) -> int:
    """Bytes of bases that ``encode_basis`` has stored."""
    return stored_basis_form(shape, bits, wide).nbytes


def _blocks(x: Tensor) -> Tensor:
    """[N, ...] as [N, blocks, 256], padded with zeros."""
    flat = x.reshape(len(x), -1)
    missing = -flat.shape[1] % BLOCK
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(len(x), -1, BLOCK)


def table(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of 8-bit codes, in rising order, cached by device."""
    values = _TABLES.get((signed, device))
    if values is None:
        values = torch.tensor(_values(signed), dtype=torch.float32, device=device)
        if type(values) is Tensor:  # fake tensors, from tracing or memory estimates, must not reach later calls
            _TABLES[signed, device] = values
    return values


_TABLES: dict[tuple[bool, torch.device], Tensor] = {}


@functools.cache
def _values(signed: bool) -> list[float]:
    """0, 1 and the midpoints of equal parts of every decade, in rising order; each lower decade has half as many."""
    values = [0.0, 1.0]
    for decade in range(7):
        parts = (64 if signed else 128) >> decade
        values += [(0.1 + 0.9 * (i + 0.5) / parts) * 10.0**-decade for i in range(parts)]
    if signed:
        values += [-v for v in values if 0.0 < v < 1.0]
    return sorted(values)
