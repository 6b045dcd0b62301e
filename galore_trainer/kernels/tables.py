"""Where equal matrices lie in memory: tables of addresses, uploaded without waiting for the device."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels import INTERPRETED

ALIGNMENT = 16  # bytes of the widest access of a thread
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies bfloat16 by its bits, and rounds to it by cutting
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.int32: tl.int32}


class Scattered(NamedTuple):
    """Equal tensors anywhere on a device.

    Attributes:
        addresses: of their first entries, int64 [count], on the device.
        dtype: of their entries.
        alignment: bytes that divide every address, at most ``ALIGNMENT``.
    """

    addresses: Tensor
    dtype: torch.dtype
    alignment: int

    @property
    def pointer(self) -> dict[str, object]:
        """What a kernel needs to make pointers of the addresses, besides these."""
        return {"TYPE": TYPES[self.dtype], "ALIGNED": self.alignment}


class Layout(NamedTuple):
    """How equal logical matrices lie in their tensors, in entries; row i begins at
    ``(i // length) * outer_stride + (i % length) * row_stride``.
    """

    rows: int
    columns: int
    length: int
    outer_stride: int
    row_stride: int
    column_stride: int

    @classmethod
    def of(cls, view: Tensor) -> Layout:
        """The layout of a view [outer, length, n]."""
        (outer, length, columns), strides = view.shape, view.stride()
        if outer == 1 or strides[0] == length * strides[1]:
            outer, length, strides = 1, outer * length, (0, *strides[1:])
        return cls(outer * length, columns, length, *strides)

    @property
    def strides(self) -> dict[str, object]:
        """As the kernels take them."""
        return {
            "length": self.length, "outer_stride": self.outer_stride, "row_stride": self.row_stride,
            "column_stride": self.column_stride, "EVEN": self.length == self.rows,
        }  # fmt: skip


def upload(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Columns of equally many 64-bit numbers as an int64 tensor [columns, count] on the device.

    Every column begins at a multiple of 16 bytes, whatever their number: Triton compiles a kernel anew for others.
    """
    count = len(columns[0])
    even = columns if count % 2 == 0 else [[*column, 0] for column in columns]
    numbers = torch.tensor(even, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return numbers.to(device, non_blocking=True)[:, :count]


def scatter(
    addresses: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype], keys: Sequence[int] | None,
    device: torch.device,
) -> tuple[dict[str, Scattered], Tensor | None]:  # fmt: skip
    """Several tables, and numbers of 63 bits beside them, in one upload.

    Args:
        addresses: of the first entries, by name, equally many.
        dtypes: of the entries, by name.
        keys: as many numbers, or None.
        device: where all of it lies.
    """
    columns = list(addresses.values())
    uploaded = upload(columns if keys is None else [*columns, keys], device).unbind()
    found = {
        name: Scattered(table, dtypes[name], alignment_of(column))
        for (name, column), table in zip(addresses.items(), uploaded, strict=keys is None)
    }
    return found, None if keys is None else uploaded[-1]


def alignment_of(addresses: Sequence[int]) -> int:
    """The largest power of two, at most ``ALIGNMENT``, that divides all of them."""
    bits = functools.reduce(operator.or_, addresses, ALIGNMENT)
    return bits & -bits


@triton.jit
def pointer_at(addresses, job, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer at a place of a table."""
    return tl.multiple_of(tl.load(addresses + job).to(tl.pointer_type(TYPE)), ALIGNED)


@triton.jit
def row_starts(rows, length, outer_stride, row_stride, EVEN: tl.constexpr):
    """Where rows of a layout begin, int64."""
    if EVEN:
        return rows.to(tl.int64) * row_stride
    return (rows // length).to(tl.int64) * outer_stride + (rows % length).to(tl.int64) * row_stride


@triton.jit
def multiply(a, b, total):
    """total + a b in float32; a float32 factor as three bfloat16 numbers, which leave out 2^-24 of a product.

    Hopper multiplies TF32 by rows alone, so that six of these are faster than three of those. Tensor cores cut what
    they add, so that long sums drift: small products come first, and ``total`` takes all of them in one addition.
    """
    if a.dtype != tl.float32:
        return dot(a, b, total)
    high, middle, low = split(a)
    upper, between, lower = split(b)
    block = dot(low, upper, tl.zeros_like(total))
    block = dot(high, lower, block)
    block = dot(middle, between, block)
    block = dot(middle, upper, block)
    block = dot(high, between, block)
    return total + dot(high, upper, block)


@triton.jit
def dot(a, b, total):
    """total + a b of bfloat16 factors."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def split(x):
    """The 24 bits of a float32 as three bfloat16 numbers, the largest first."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def mixed(x):
    """A bijection of 32-bit numbers whose every output bit depends on every input bit (Wellons, lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(key, rows):
    """Two 32-bit words of a 64-bit key, mixed with row numbers."""
    return mixed(rows.to(tl.uint32) + key.to(tl.uint32)) + (key >> 32).to(tl.uint32)


@triton.jit
def rounded(x, noise, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """x in another type; to bfloat16 by 16 bits of noise, as ``core.galore.round_bits`` does, or to nearest."""
    if tl.float32 == TYPE:
        return x
    if not STOCHASTIC and not WIDEN:
        return x.to(TYPE)
    bits = x.to(tl.uint32, bitcast=True)
    if STOCHASTIC:
        carry = noise >> 16
    else:
        carry = 0x7FFF + ((bits >> 16) & 1)
    high = ((bits + carry) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), high, x).to(TYPE)
