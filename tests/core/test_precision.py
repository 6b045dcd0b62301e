"""State in 16 and 8 bits: bounded, unbiased, exact where it must be, and the size that is told beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galore_trainer.core.precision import (
    NOISE,
    Stored,
    decode,
    decode_basis,
    encode,
    encode_basis,
    stored_basis_bytes,
    stored_bytes,
    zero_code,
)


def noise(shape: torch.Size, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, NOISE, shape, dtype=torch.int32, generator=generator)


def numbers(signed: bool, *shape: int) -> Tensor:
    """Magnitudes over five decades."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=generator) * 10.0 ** (-5 * torch.rand(*shape, generator=generator))
    return x if signed else x.square()


def there_and_back(x: Tensor, bits: int, signed: bool, seed: int = 0) -> Tensor:
    return decode(encode(x, bits, noise(x.shape, seed), signed=signed), signed=signed)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_what_comes_back_is_near(bits: int, signed: bool) -> None:
    x = numbers(signed, 3, 40, 17)
    back = there_and_back(x, bits, signed)
    if bits == 32:
        assert torch.equal(back, x)
    elif bits == 16:
        assert ((back - x).abs() <= x.abs() * 2**-7).all()
    else:
        root, back_root = (v if signed else v.sqrt() for v in (x, back))
        # steps of the top decade: 0.9 / 64 of the block's largest (0.9 / 128 without a sign)
        assert ((back_root - root).abs() <= root.abs().amax() * (0.9 / 64 if signed else 0.9 / 128) + 1e-7).all()
        assert ((back_root - root).abs() <= root.abs() + 4e-6 * root.abs().amax()).all()


@pytest.mark.parametrize("bits", [16, 8])
def test_rounding_is_unbiased(bits: int) -> None:
    x = numbers(True, 2, 300)
    draws = torch.stack([there_and_back(x, bits, True, seed) for seed in range(400)])
    span = draws.amax(dim=0) - draws.amin(dim=0)  # the two neighbours, where both were drawn
    often = draws.std(dim=0) > 0.3 * span  # each of them in more than a tenth of the draws
    deviations = ((draws.mean(dim=0) - x) / (draws.std(dim=0) / 20.0))[often & (span > 0.0)]
    assert len(deviations) > 300
    assert deviations.abs().max() < 5.0
    assert abs(deviations.mean()) < 5.0 / len(deviations) ** 0.5


@pytest.mark.parametrize("bits", [16, 8])
def test_a_slow_average_does_not_stand_still(bits: int) -> None:
    """V <- V + 0.001 (0.25 - V), 2000 times from 1: a rounding to nearest would never leave 1."""
    x = torch.ones(1, 4096)
    for step in range(2000):
        x = there_and_back(torch.lerp(x, torch.full_like(x, 0.25), 1e-3), bits, False, step)
    assert x.mean().item() == pytest.approx(0.25 + 0.75 * 0.999**2000, rel=0.03)


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_stay_and_nothing_else_becomes_zero_below_a_root(signed: bool) -> None:
    x = numbers(signed, 2, 700)
    x[:, ::5] = 0.0
    stored = encode(x, 8, noise(x.shape), signed=signed)
    back = decode(stored, signed=signed)
    assert (back[x == 0.0] == 0.0).all()
    assert (stored.values[x == 0.0] == zero_code(signed=signed)).all()
    if not signed:
        assert (back[x > 0.0] > 0.0).all()
    nothing = torch.zeros(2, 300)
    assert torch.equal(there_and_back(nothing, 8, signed), nothing)


def test_the_largest_of_a_block_is_kept_whatever_its_sign() -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 7] = -9.0, 9.0
    back = there_and_back(x, 8, True)
    assert (back[0, 3], back[1, 7]) == (-9.0, 9.0)


@pytest.mark.parametrize("signed", [True, False])
def test_every_matrix_has_blocks_of_its_own(signed: bool) -> None:
    x, drawn = numbers(signed, 3, 5, 70), noise(torch.Size((3, 5, 70)))
    whole = encode(x, 8, drawn, signed=signed)
    for i in range(3):
        part = encode(x[i : i + 1], 8, drawn[i : i + 1], signed=signed)
        assert torch.equal(part.values[0], whole.values[i])
        assert torch.equal(part.scale[0], whole.scale[i])


@pytest.mark.parametrize(("bits", "error"), [(32, 0.0), (16, 2**-8), (8, 0.5 / 127)])
def test_a_basis_comes_back(bits: int, error: float) -> None:
    P = torch.linalg.qr(torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))).Q
    stored = encode_basis(P, bits)
    largest = P.abs().amax(dim=-2, keepdim=True)
    assert ((decode_basis(stored) - P).abs() <= error * largest * 1.0001).all()
    assert sum(t.numel() * t.element_size() for t in stored if t is not None) == stored_basis_bytes((2, 60, 8), bits)


@pytest.mark.parametrize("shape", [(1, 256), (3, 5, 70), (2, 1, 257)])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_the_size_is_known_beforehand(shape: tuple[int, ...], bits: int) -> None:
    stored: Stored = encode(torch.rand(shape), bits, noise(torch.Size(shape)), signed=False)
    assert sum(t.numel() * t.element_size() for t in stored if t is not None) == stored_bytes(shape, bits)
