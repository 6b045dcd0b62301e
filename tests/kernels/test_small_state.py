"""Moments of 16 and 8 bits: one kernel has the bits of decoding, the float32 kernel and ``core``'s encoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.precision import BLOCK, NOISE, Stored, decode, encode, table
from galore_trainer.kernels import small_state
from galore_trainer.kernels.adam import adam_
from galore_trainer.kernels.routes import Route, forced
from galore_trainer.kernels.small_state import Small, adam_small_
from galore_trainer.optim import refresh
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from scattered import JOBS, MATRICES, flags, keys_of, places, random, stored

BLOCKS = 2


@pytest.fixture(autouse=True)
def exact_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correctly rounded, as on a GPU; torch's own on a CPU err in the last bit."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.pow(x.double(), 0.5).to(x.dtype))


def noise_of(keys: Tensor, blocks: int, entries: int) -> tuple[Tensor, Tensor]:
    """The noise of M and V in numpy: the upper and the lower 16 bits of a hash of key, block of 256 and position."""

    def mixed(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)

    groups = -(-entries // BLOCK)
    rows = np.arange(blocks * groups, dtype=np.uint32)
    lane = np.arange(BLOCK, dtype=np.uint32) * np.uint32(0x9E3779B1)
    drawn = []
    for key in keys.tolist():
        low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
        bits = mixed((mixed(rows + low) + high)[:, None] ^ lane[None, :])
        drawn.append(bits.reshape(blocks, -1)[:, :entries])
    bits = torch.from_numpy(np.concatenate(drawn).astype(np.int64)).to(keys.device)
    return (bits >> 16).int(), (bits & 0xFFFF).int()


def small(moments: list[Stored]) -> Small:
    scales = [moment.scale for moment in moments if moment.scale is not None]
    return Small(places([moment.values for moment in moments]), places(scales) if scales else None)


def codes(device: torch.device) -> tuple[Tensor, Tensor]:
    return table(True, device), table(False, device)


@pytest.mark.parametrize("shape", [(40, 32), (37, 29), (3, 5), (90, 24)])  # blocks of 256 that are full, and that end
@pytest.mark.parametrize("bits", [16, 8])
def test_one_pass_has_the_bits_of_three(bits: int, shape: tuple[int, int], device: torch.device) -> None:
    """Ages 1 and 1000; gradients over many decades, and zeros; a matrix whose flag is 0 keeps its bits."""
    R = random(device, JOBS * BLOCKS, *shape, seed=20)
    R *= 10.0 ** random(device, *R.shape, seed=21)
    R[0, 0], R[-1] = 0.0, 0.0
    t, ok = flags(device, 0.0, 3.0, 999.0), flags(device, 1.0, 0.0, 1.0)
    drawn = torch.randint(0, NOISE, R.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32).to(device)
    wide = [random(device, *R.shape, seed=1), random(device, *R.shape, seed=2).square()]
    wide[0][-1], wide[1][-1] = 0.0, 0.0
    olds = [encode(x, bits, drawn, signed=signed) for x, signed in zip(wide, (True, False), strict=True)]
    forms = [[Stored(*(None if x is None else x.clone() for x in pair)) for pair in parts(old)] for old in olds]
    keys = keys_of(device, 7)
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "dtype": torch.float32}
    ages = places(list(t.unbind()))
    N = adam_small_(*(small(form) for form in forms), ages, R, ok, keys, codes(device), **options)

    decoded = [decode(old, signed=signed).clone() for old, signed in zip(olds, (True, False), strict=True)]
    M, V = ([x.contiguous() for x in moment.split(BLOCKS)] for moment in decoded)
    expected = adam_(places(M), places(V), ages, R, ok, **options)
    noises = [x.view(R.shape) for x in noise_of(keys, BLOCKS, R[0].numel())]
    here = ok.repeat_interleave(BLOCKS) > 0.0
    assert torch.equal(N[here], expected[here])
    for form, old, moment, noise, signed in zip(forms, olds, (M, V), noises, (True, False), strict=True):
        new = encode(torch.cat(moment), bits, noise, signed=signed)
        values = torch.cat([part.values for part in form])
        assert torch.equal(values[here], new.values[here])
        assert torch.equal(values[~here], old.values[~here])
        if new.scale is not None and old.scale is not None:
            scale = torch.cat([part.scale for part in form if part.scale is not None])
            assert torch.equal(scale[here], new.scale[here])
            assert torch.equal(scale[~here], old.scale[~here])


def parts(whole: Stored) -> list[Stored]:
    """A moment of every matrix."""
    scales = [None] * JOBS if whole.scale is None else whole.scale.split(BLOCKS)
    return [Stored(values, scale) for values, scale in zip(whole.values.split(BLOCKS), scales, strict=True)]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_next_to_every_value_of_the_table(signed: bool, device: torch.device) -> None:
    """The value itself and its neighbours among float32 numbers, at which the largest code below changes."""
    exact = table(signed, torch.device("cpu"))
    near = [exact, *(torch.nextafter(exact, torch.full_like(exact, end)) for end in (-2.0, 2.0))]
    x = torch.cat([*near, random(torch.device("cpu"), 3 * BLOCK, seed=3) * 0.3]).clamp(-1.0 if signed else 0.0, 1.0)
    x[::BLOCK] = 1.0  # the scale of every block
    x = x.to(device)[None]
    zero, one = torch.zeros_like(x), flags(device, 1.0)
    keys = keys_of(device, 3)[:1]
    first, second = (encode(zero, 8, zero.int(), signed=s) for s in (True, False))
    # betas of 0 leave the gradient: M = R, and V = R^2, whose root is |R|
    options = {"betas": (0.0, 0.0), "eps": 1e-8, "dtype": torch.float32}
    adam_small_(small([first]), small([second]), places([zero[0, 0]]), x, one, keys, codes(device), **options)
    noises = noise_of(keys, 1, x.numel())
    M = encode(x, 8, noises[0].view_as(x), signed=True)
    V = encode(x * x, 8, noises[1].view_as(x), signed=False)
    for mine, other in ((first, M), (second, V)):
        assert torch.equal(mine.values, other.values)
        assert mine.scale is not None
        assert other.scale is not None
        assert torch.equal(mine.scale, other.scale)


def test_blocks_are_those_of_core() -> None:
    assert small_state.BLOCK == BLOCK


def spread_out(optimizer: GaLoreAdamW) -> None:
    """Moments with gaps between blocks, as in checkpoints of versions that stored a view of padded codes."""
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    for key in ("exp_avg", "exp_avg_sq"):
        x = state[key]
        padded = torch.zeros(len(x), 7 + x[0].numel(), dtype=x.dtype, device=x.device)
        state[key] = padded[:, 7:].view(x.shape).copy_(x)
        assert not state[key].is_contiguous()


CASES: dict[str, dict[str, object]] = {
    "none": {"residual_percent": 0.0},
    "sparse": {"residual_percent": 6.0, "residual_warmup_steps": 1},
    "scaled": {"residual": "scaled"},
}


@pytest.mark.parametrize(("bits", "case"), [(16, "none"), (8, "sparse"), (8, "scaled")])
def test_the_optimizer_moves_weights_as_by_torch(
    bits: int, case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other random numbers round the moments: a step is 0.01, and its mean is the same."""
    monkeypatch.setattr(refresh, "LIBRARY", 0)  # torch's eigenvectors: ours take long where they are interpreted
    names = ["PLAIN", "HEADS", "CONV1D"]

    def train(kernels: str) -> tuple[list[Tensor], GaLoreAdamW]:
        params = [torch.nn.Parameter(stored(name, device, torch.float32)[0]) for name in names]
        group = {"params": params, "projected": True, "matrices": [[MATRICES[n]] for n in names], "names": names}
        config = GaLoreConfig(kernels=kernels, state_bits=bits, scale=1.0, **CASES[case])  # type: ignore[arg-type]
        optimizer = GaLoreAdamW([group], config, lr=1e-2)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = random(device, *p.shape, seed=100 * step + i)
            if step == 2:
                params[0].grad[3, 4] = float("nan")  # type: ignore[index]
            optimizer.step()
        return [p.detach() for p in params], optimizer

    with forced(Route(small_state=True)):
        first, mine = train("triton")
        if case == "none":  # the random numbers depend on seed, name and step alone
            assert all(torch.equal(a, b) for a, b in zip(first, train("triton")[0], strict=True))
    other, theirs = train("torch")
    assert mine.check_finite() == theirs.check_finite() == {"PLAIN": 1}
    start = [stored(name, device, torch.float32)[0] for name in names]
    for a, b, c in zip(first, other, start, strict=True):
        assert not torch.equal(a, b)
        assert (a - b).norm() < 0.1 * (b - c).norm()
