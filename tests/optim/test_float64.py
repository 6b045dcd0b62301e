"""float64 weights are trained in float64, complex ones are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.reference import ReferenceMatrix
from galore_trainer.core.sparse import Support
from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GAP, STEPS, WARMUP = 3, 9, 2


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("contiguous", [True, False])
def test_plain_weights_equal_torch_to_1e_14(contiguous: bool) -> None:
    ours, theirs = (nn.Parameter(numbers(0, 12, 7) if contiguous else numbers(0, 7, 12).mT) for _ in range(2))
    with pytest.warns(UserWarning, match="projects nothing"):
        mine = GaLoreAdamW([ours], lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(20):
        ours.grad, theirs.grad = numbers(step, 12, 7), numbers(step, 12, 7)
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_zero_gradients_move_nothing(bits: int) -> None:
    params = [nn.Parameter(numbers(i, 12, 7)) for i in range(2)]
    config = GaLoreConfig(rank=3, plain_state_bits=bits, state_bits=bits)
    optimizer = GaLoreAdamW([{"params": params[:1], "projected": True}, {"params": params[1:]}], config, lr=1e-2)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, numbers(i, 12, 7)) for i, p in enumerate(params))


@pytest.mark.parametrize("transfer", ["keep", "align", "rotate", "reset"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("percent", [0.0, 10.0])
@pytest.mark.parametrize("stacked", [False, True])
def test_projected_weights_equal_the_reference_to_1e_12(
    transfer: str, side: str, svd: str, percent: float, stacked: bool
) -> None:
    shape = (24, 32)
    matrix = LogicalMatrix(length=24, columns=32, side=side, rank=5)
    params = [nn.Parameter(numbers(seed, *shape)) for seed in ((0, 50) if stacked else (0,))]
    config = GaLoreConfig(
        rank=5,
        update_proj_gap=GAP,
        scale=2.0,
        svd=svd,
        momentum_transfer=transfer,
        residual_percent=percent,
        residual_warmup_steps=WARMUP,
    )
    names = [f"w{i}" for i in range(len(params))]
    group = {"params": params, "names": names, "projected": True, "matrices": [[matrix]] * len(params)}
    optimizer = GaLoreAdamW([group], config, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    optimizer.max_stack_elements = 1 << 20 if stacked else None
    p = params[-1]
    settings = {"lr": 1e-2, "scale": 2.0, "betas": (0.9, 0.99), "weight_decay": 0.1, "momentum_transfer": transfer}
    reference = ReferenceMatrix(p.detach().cpu(), side, **settings)
    for step in range(STEPS):
        for q in params:
            q.grad = numbers(100 + step, *shape)
        optimizer.step()
        state = optimizer.state[p]
        P = state["basis"][0].cpu()
        if step % GAP == 0:
            reference.refresh(P)
            assert P.dtype == torch.float64
            torch.testing.assert_close(P.mT @ P, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
        chosen = state.get("residual_index")
        if chosen is not None and reference.S is None and step >= WARMUP:
            rows, columns = Support(chosen.cpu(), 32).coordinates(24)
            reference.choose_support(rows[0], columns[0])
        reference.step(numbers(100 + step, *shape).cpu())
    moments = [value for key, value in state.items() if key.endswith(("exp_avg", "exp_avg_sq"))]
    assert {value.dtype for value in moments} == {torch.float64}
    torch.testing.assert_close(p.detach().cpu(), reference.W, rtol=0, atol=1e-12)


def test_exact_bases_are_those_of_a_float64_svd() -> None:
    p = nn.Parameter(numbers(0, 24, 32))
    config = GaLoreConfig(rank=5, svd="exact", momentum_transfer="keep", residual_percent=0.0, proj_type="right")
    optimizer = GaLoreAdamW([{"params": [p], "projected": True}], config, lr=1e-2)
    p.grad = numbers(1, 24, 32)
    optimizer.step()
    expected = torch.linalg.svd(numbers(1, 24, 32), full_matrices=False).Vh[:5].mT
    torch.testing.assert_close(optimizer.state[p]["basis"][0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layerwise", [False, True])
def test_it_resumes_bit_for_bit_and_takes_float32_state(layerwise: bool) -> None:
    def make(dtype: torch.dtype) -> tuple[nn.Parameter, GaLoreAdamW]:
        p = nn.Parameter(numbers(0, 24, 16).to(dtype))
        config = GaLoreConfig(rank=4, update_proj_gap=GAP, residual_warmup_steps=WARMUP, layerwise=layerwise)
        return p, GaLoreAdamW([{"params": [p], "projected": True}], config, lr=1e-2)

    def train(p: nn.Parameter, optimizer: GaLoreAdamW, steps: range) -> None:
        for step in steps:
            (p * numbers(100 + step, 24, 16).to(p.dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, first = make(torch.float64)
    train(whole, first, range(8))
    narrow, saved = make(torch.float32)
    train(narrow, saved, range(4))
    for source in (make(torch.float64), (narrow, saved)):
        if source[0].dtype == torch.float64:
            train(*source, range(4))
        p, resumed = make(torch.float64)
        p.data.copy_(source[0].data)
        resumed.load_state_dict(source[1].state_dict())
        assert resumed.state[p]["exp_avg"].dtype == torch.float64
        train(p, resumed, range(4, 8))
        exact = source[0].dtype == torch.float64
        torch.testing.assert_close(p, whole, rtol=0, atol=0 if exact else 1e-3)


@pytest.mark.parametrize("projected", [False, True])
def test_complex_weights_are_refused_by_name(projected: bool) -> None:
    good, bad = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8, 8, dtype=torch.complex64))
    with pytest.raises(OptionError, match=r"spectrum in torch\.complex64"):
        GaLoreAdamW([{"params": [bad], "names": ["spectrum"], "projected": projected}], GaLoreConfig(rank=2))
    optimizer = GaLoreAdamW([{"params": [good], "projected": True}], GaLoreConfig(rank=2))
    with pytest.raises(OptionError, match="complex64"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
