"""Random streams that need no broadcast and survive a resume: one generator for each (seed, name, purpose, index)."""

from __future__ import annotations

import functools
import hashlib

import torch


def stream(device: torch.device | str, seed: int, name: str, purpose: str, *index: int) -> torch.Generator:
    """A generator on ``device``, seeded by a stable hash of its arguments: equal on equal device types.

    Args:
        device: where the numbers are drawn.
        seed: the run's seed.
        name: logical name of the matrix.
        purpose: ``head``, ``omega`` or ``rounding``.
        index: refresh or step, and block.
    """
    return torch.Generator(device=device).manual_seed(_hashed(seed, name, purpose, *index))


def rounding_key(seed: int, name: str, calls: int) -> int:
    """63 bits that seed the noise of one step where a kernel draws it; cheap for the steps that follow the first."""
    return (_first_key(seed, name) + calls * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)


@functools.lru_cache(maxsize=1 << 16)
def _first_key(seed: int, name: str) -> int:
    return _hashed(seed, name, "kernel rounding")


def _hashed(seed: int, name: str, purpose: str, *index: int) -> int:
    key = "|".join([str(seed), name, purpose, *map(str, index)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
