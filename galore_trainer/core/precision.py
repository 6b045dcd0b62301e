"""How optimizer state is stored: in 32, 16 or 8 bits. Computing is in float32; where the weight is float64, computing
and "32-bit" state are float64.

16 bits are bfloat16. 8 bits are block-wise and dynamic (Dettmers et al. 2022, arXiv 2110.02861): every 256 numbers
share a scale, the one of largest magnitude, and each is one of 256 values between -1 and 1 (0 and 1 for what has no
sign), dense near zero over seven decades. There is no -1: what lies beyond -0.993 goes there. Rounding is stochastic,
so that a moving average which changes by a thousandth a step does not stand still; in 8 bits second moments are stored
by their roots, never rounded to zero, so that M / sqrt(V) stays bounded.
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
        values: float32, float64, bfloat16 or uint8 codes, in the tensor's shape [N, ...].
        scale: of 8-bit codes, float32 [N, blocks of 256]; else None.
    """

    values: Tensor
    scale: Tensor | None = None


def encode(x: Tensor, bits: int, noise: Tensor | None, *, signed: bool) -> Stored:
    """Store a float32 tensor in ``bits`` bits; a float64 one as it is in place of 32 bits.

    Args:
        x: [N, ...]; each of the N gets blocks of its own.
        bits: 32, 16 or 8.
        noise: int32 in 0 ... ``NOISE`` - 1, in the shape of x; not looked at for 32 bits.
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
    scale = blocks.gather(-1, largest)  # with its sign: the table has 1, but not -1
    table = _table(signed, x.device)
    share = blocks / torch.where(scale == 0.0, 1.0, scale)
    below = (torch.bucketize(share, table, right=True, out_int32=True) - 1).clamp_(0, len(table) - 2)
    low, high = table[below], table[below + 1]
    codes = below.add_(share - low > (high - low) * (_blocks(noise).float() / NOISE))
    if not signed:
        codes = torch.where(blocks > 0.0, codes.clamp(min=1), codes)
    return Stored(codes.to(torch.uint8).flatten(1)[:, : x[0].numel()].view(x.shape), scale.squeeze(-1))


def decode(stored: Stored, *, signed: bool) -> Tensor:
    """The tensor that was stored, in float32, or float64 where it was kept so."""
    values, scale = stored
    if scale is None:
        return widen(values)
    share = _table(signed, values.device)[_blocks(values).long()]
    x = (share * scale.unsqueeze(-1)).flatten(1)[:, : values[0].numel()].view(values.shape)
    return x if signed else x.square()


def encode_basis(P: Tensor, bits: int) -> Stored:
    """Store a basis [N, rows, r], to nearest; 8 bits are linear with a scale for each column, float32 [N, r]."""
    if bits == 32:
        return Stored(P)
    if bits == 16:
        return Stored(P.to(torch.bfloat16))
    P = P.float()
    scale = P.abs().amax(dim=-2) / 127.0
    codes = (P / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-2)).round()
    return Stored(codes.to(torch.int8), scale)


def decode_basis(stored: Stored) -> Tensor:
    """The basis in float32, or float64 where it was kept so."""
    values, scale = stored
    return widen(values) if scale is None else values.float() * scale.unsqueeze(-2)


def zero_code(*, signed: bool) -> int:
    """The 8-bit code of zero."""
    return 127 if signed else 0


class Form(NamedTuple):
    """Shapes and dtypes of a ``Stored``; scales are float32.

    Attributes:
        shape, dtype: of the values.
        scale: shape of the scales, None where there are none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return math.prod(self.shape) * self.dtype.itemsize + (4 * math.prod(self.scale) if self.scale else 0)


def stored_form(shape: Sequence[int], bits: int, wide: torch.dtype = torch.float32) -> Form:
    """How ``encode`` stores a moment [N, ...] of a weight that is computed in the dtype ``wide``."""
    dtype = {32: wide, 16: torch.bfloat16, 8: torch.uint8}[bits]
    return Form(tuple(shape), dtype, (shape[0], -(-math.prod(shape[1:]) // BLOCK)) if bits == 8 else None)


def stored_basis_form(shape: Sequence[int], bits: int, wide: torch.dtype = torch.float32) -> Form:
    """How ``encode_basis`` stores bases [N, rows, r] of a weight that is computed in the dtype ``wide``."""
    dtype = {32: wide, 16: torch.bfloat16, 8: torch.int8}[bits]
    return Form(tuple(shape), dtype, (shape[0], shape[2]) if bits == 8 else None)


def stored_bytes(shape: Sequence[int], bits: int, wide: torch.dtype = torch.float32) -> int:
    """Bytes of a moment as ``encode`` stores it."""
    return stored_form(shape, bits, wide).nbytes


def stored_basis_bytes(shape: Sequence[int], bits: int, wide: torch.dtype = torch.float32) -> int:
    """Bytes of bases as ``encode_basis`` stores them."""
    return stored_basis_form(shape, bits, wide).nbytes


def _blocks(x: Tensor) -> Tensor:
    """[N, ...] as [N, blocks, 256], filled up with zeros."""
    flat = x.reshape(len(x), -1)
    missing = -flat.shape[1] % BLOCK
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(len(x), -1, BLOCK)


def _table(signed: bool, device: torch.device) -> Tensor:
    """The 256 values as a tensor, kept for each device (but not one that tracing or counting has faked)."""
    table = _TABLES.get((signed, device))
    if table is None:
        table = torch.tensor(_values(signed), dtype=torch.float32, device=device)
        if type(table) is Tensor:
            _TABLES[signed, device] = table
    return table


_TABLES: dict[tuple[bool, torch.device], Tensor] = {}


@functools.cache
def _values(signed: bool) -> list[float]:
    """0, 1, and midpoints of equal parts of each decade, rising: half as many in a decade as in the one above."""
    values = [0.0, 1.0]
    for decade in range(7):
        parts = (64 if signed else 128) >> decade
        values += [(0.1 + 0.9 * (i + 0.5) / parts) * 10.0**-decade for i in range(parts)]
    if signed:
        values += [-v for v in values if 0.0 < v < 1.0]
    return sorted(values)
