"""Random streams seeded by (seed, name, purpose, index): equal on every process and after a resume."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch

STRIDE, MASK = 0x9E3779B97F4A7C15, (1 << 63) - 1  # an odd constant between the keys of two steps; 63 bits


def stream(device: torch.device | str, seed: int, name: str, purpose: str, *index: int) -> torch.Generator:
    """A generator seeded by a stable hash of the arguments after ``device``.

    Equal arguments give equal numbers on devices of one type.

    Args:
        device: where the numbers are drawn.
        seed: of the run.
        name: logical name of the matrix.
        purpose: ``head``, ``omega`` or ``rounding``, for example.
        index: index of the refresh or step, and of the block.
    """
    return torch.Generator(device=device).manual_seed(_hashed(seed, name, purpose, *index))


def rounding_key(seed: int, name: str, calls: int) -> int:
    """A 63-bit seed for the rounding noise that a kernel draws in one step.

    Only the first call for a name hashes; later ones add a multiple of an odd constant, since this runs every step.

    Args:
        seed: of the run.
        name: logical name of the matrix.
        calls: number of the step.
    """
    return later_keys([_first_key(seed, name)], [calls])[0]


def later_keys(first: Sequence[int], calls: Sequence[int]) -> list[int]:
    """``rounding_key`` for many names in a step, from their keys at ``calls`` 0."""
    offsets = {step: step * STRIDE & MASK for step in set(calls)}
    return [(key + offsets[step]) & MASK for key, step in zip(first, calls, strict=True)]


@functools.lru_cache(maxsize=1 << 16)
def _first_key(seed: int, name: str) -> int:
    return _hashed(seed, name, "kernel rounding")


def _hashed(seed: int, name: str, purpose: str, *index: int) -> int:
    key = "|".join([str(seed), name, purpose, *map(str, index)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
