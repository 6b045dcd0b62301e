"""Tables of the addresses of equal matrices, uploaded without waiting for the device, and what all kernels share."""

from __future__ import annotations

import array
import functools
import operator
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels import INTERPRETED

ALIGNMENT = 16  # bytes of the widest memory access of a thread
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies bit patterns of bfloat16, and truncates to bfloat16
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # smallest normal float32
GOLDEN = tl.constexpr(0x9E3779B1)  # odd 32-bit multiplier near 2^32 / golden ratio: spreads consecutive numbers
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.int32: tl.int32, torch.uint8: tl.uint8}


class Scattered(NamedTuple):
    """Tensors of equal shape and dtype anywhere on a device.

    Attributes:
        addresses: of their first entries, int64 [matrices], on the device.
        dtype: of their entries.
        alignment: largest power of two that divides every address, at most ``ALIGNMENT`` bytes.
    """

    addresses: Tensor
    dtype: torch.dtype
    alignment: int

    @property
    def pointer(self) -> dict[str, object]:
        """Keyword arguments of a kernel that turns the addresses into pointers."""
        return {"TYPE": TYPES[self.dtype], "ALIGNED": self.alignment}


class Layout(NamedTuple):
    """Shape and strides of a logical matrix inside its tensor, in entries.

    Row i begins at ``(i // length) * outer_stride + (i % length) * row_stride``.
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
        if outer == 1 or strides[0] == length * strides[1]:  # equal distances between all rows
            outer, length, strides = 1, outer * length, (0, *strides[1:])
        return cls(outer * length, columns, length, *strides)

    @property
    def strides(self) -> dict[str, object]:
        """Keyword arguments of a kernel that computes positions of rows."""
        return {
            "length": self.length,
            "outer_stride": self.outer_stride,
            "row_stride": self.row_stride,
            "column_stride": self.column_stride,
            "EVEN": self.length == self.rows,
        }


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's takes the host two microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; Triton's takes the host two microseconds."""
    return 1 << (n - 1).bit_length()


def upload(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Columns of 64-bit numbers, of one length, as an int64 tensor [columns, length] on the device.

    Every column begins at a multiple of 16 bytes, since Triton would compile a kernel again for another alignment.
    """
    count = len(columns[0])
    even = columns if count % 2 == 0 else [[*column, 0] for column in columns]
    numbers = torch.tensor(even, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return numbers.to(device, non_blocking=True)[:, :count]


class Columns:
    """Columns of 64-bit numbers, each of its own length, that stay where they lie on the device; see ``upload``.

    Args:
        lengths: of the columns.
        device: where they lie.

    Attributes:
        tensors: the columns, int64.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        sizes = [size for length in lengths for size in (length, length % 2)]
        self._all = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.tensors = self._all.split_with_sizes(sizes)[::2]

    def write(self, columns: Sequence[Sequence[int]]) -> None:
        """Replace all numbers, without waiting for the device."""
        numbers = array.array("q")  # of which torch makes a tensor in half of the time
        for column in columns:
            numbers.extend(column)
            if len(column) % 2:
                numbers.append(0)
        tensor = torch.frombuffer(numbers, dtype=torch.int64)
        self._all.copy_(tensor.pin_memory() if self._all.is_cuda else tensor, non_blocking=True)


def scatter(
    columns: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype], device: torch.device
) -> dict[str, Scattered]:
    """Several tables in one upload.

    Args:
        columns: for every name of a table the addresses of first entries, one a matrix, or other 64-bit numbers.
        dtypes: for every name the dtype of the entries.
        device: where the tensors lie.
    """
    uploaded = upload(list(columns.values()), device).unbind()
    return {
        name: Scattered(table, dtypes[name], alignment_of(column))
        for (name, column), table in zip(columns.items(), uploaded, strict=True)
    }


def alignment_of(addresses: Sequence[int]) -> int:
    """The largest power of two that divides all addresses, at most ``ALIGNMENT``."""
    bits = functools.reduce(operator.or_, addresses, ALIGNMENT)
    return bits & -bits


def packed(step: float, decay: float) -> int:
    """-step and decay in float32 as one number of 64 bits, for a table of rates: they change without another launch."""
    number: int = struct.unpack("<q", struct.pack("<ff", -step, decay))[0]
    return number


@triton.jit
def unpacked(rates, matrix):
    """-step and decay of a matrix.

    Were the step stored as it is, LLVM would negate what tensor cores have added up, and ptxas of CUDA 12.8 leaves out
    products whose sums are negated.
    """
    pair = rates.to(tl.pointer_type(tl.float32)) + 2 * matrix
    return tl.load(pair), tl.load(pair + 1)


@triton.jit
def pointer_at(addresses, matrix, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to the first entry of a matrix."""
    return tl.multiple_of(tl.load(addresses + matrix).to(tl.pointer_type(TYPE)), ALIGNED)


@triton.jit
def row_starts(rows, length, outer_stride, row_stride, EVEN: tl.constexpr):
    """Positions of the first entries of rows of a layout, int64."""
    if EVEN:
        return rows.to(tl.int64) * row_stride
    return (rows // length).to(tl.int64) * outer_stride + (rows % length).to(tl.int64) * row_stride


@triton.jit
def multiply(a, b, total):
    """total + a b in float32.

    A float32 factor is split into three bfloat16 numbers. The three smallest of nine products, about 2^-24 of the
    result, are left out. Six bfloat16 products are faster on Hopper than three TF32 products, since TF32 operands
    need a contiguous inner dimension. Tensor cores truncate when they add, so that long sums drift. Hence small
    products come first, and one ordinary addition adds them to ``total``.
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
    """total + a b for bfloat16 factors, in float32."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def split(x):
    """The 24 significant bits of a float32 as three bfloat16 summands, the largest first."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def mixed(x):
    """A bijective hash of 32-bit numbers (lowbias32 by Wellons): every output bit depends on every input bit."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(key, rows):
    """A 32-bit key for every row number, from a 64-bit key."""
    return mixed(rows.to(tl.uint32) + key.to(tl.uint32)) + (key >> 32).to(tl.uint32)


@triton.jit
def rounded(x, noise, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """A float32 ``x`` in another type: to nearest, or as ``core.galore.round_bits`` with the upper 16 bits of noise."""
    if tl.float32 == TYPE:
        return x
    if not STOCHASTIC and not WIDEN:
        return x.to(TYPE)
    bits = x.to(tl.uint32, bitcast=True)
    if STOCHASTIC:
        carry = noise >> 16
    else:
        carry = 0x7FFF + ((bits >> 16) & 1)  # ties to even
    high = ((bits + carry) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), high, x).to(TYPE)


@triton.jit
def moved(w, lifted, minus_step, decay, key, row, pair, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """A tile of w (1 - decay) - step lifted, rounded once. 32 random bits serve a ``pair`` of neighbouring columns."""
    new = w.to(tl.float32) * (1.0 - decay) + minus_step * lifted
    noise = 0
    if STOCHASTIC:
        drawn = mixed(row_keys(key, row)[:, None] ^ pair[None, :])
        noise = tl.interleave(drawn, drawn << 16)
    return rounded(new, noise, TYPE, STOCHASTIC)
