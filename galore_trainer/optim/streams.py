"""Random streams that need no broadcast and survive a resume: one generator for each (seed, name, purpose, index)."""

from __future__ import annotations

import hashlib

import torch

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")


def logical_name(name: str) -> str:
    """A parameter's name without what wrappers (DDP, torch.compile, FSDP, peft) add to it."""
    for wrapper in WRAPPERS:
        name = name.replace("." + wrapper, ".").removeprefix(wrapper)
    return name


def stream(device: torch.device | str, seed: int, name: str, purpose: str, *index: int) -> torch.Generator:
    """A generator on ``device``, seeded by a stable hash of its arguments: equal on equal device types.

    Args:
        device: where the numbers are drawn.
        seed: the run's seed.
        name: logical name of the matrix.
        purpose: ``head``, ``omega`` or ``rounding``.
        index: refresh or step, and block.
    """
    key = "|".join([str(seed), name, purpose, *map(str, index)]).encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
    return torch.Generator(device=device).manual_seed(number)
