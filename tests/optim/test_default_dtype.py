"""torch's default dtype is the user's business: every tensor of ours says its own."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from cut_weights import Run
from galore_trainer.config import GaLoreConfig
from galore_trainer.optim.galore_adamw import GaLoreAdamW

ROOT = Path(__file__).parents[2] / "galore_trainer"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FACTORIES = {"zeros", "ones", "full", "empty", "rand", "randn", "randint", "randperm", "tensor", "arange", "eye",
             "linspace", "logspace", "normal"}  # fmt: skip


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def run(layerwise: bool, bits: int, svd: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (3, 8, 12)]
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float32).to(DEVICE, dtype)) for s in shapes]
    bias = nn.Parameter(torch.randn(40, generator=generator, dtype=torch.float32).to(DEVICE, dtype))
    config = GaLoreConfig(
        rank=4,
        update_proj_gap=3,
        residual_percent=10.0,
        residual_warmup_steps=2,
        layerwise=layerwise,
        state_bits=bits,
        basis_bits=bits,
        plain_state_bits=bits,
        svd=svd,
        diagnose_refreshes=1,
    )
    optimizer = GaLoreAdamW([{"params": params, "projected": True}, {"params": [bias]}], config, lr=1e-2)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for p in (*params, bias):
            factors = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
            (p * factors).sum().backward()
        nn.utils.clip_grad_norm_([*params, bias], 5.0)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.check_finite()
    assert optimizer.projection_report()
    return [p.detach() for p in (*params, bias)]


CASES = [*itertools.product((False, True), (32, 16, 8), ("randomized",)), (False, 32, "exact")]


@pytest.mark.parametrize(("layerwise", "bits", "svd"), CASES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_it_changes_no_bit(layerwise: bool, bits: int, svd: str, weights: torch.dtype, default_dtype: torch.dtype):
    found = run(layerwise, bits, svd, weights)
    torch.set_default_dtype(torch.float32)
    expected = run(layerwise, bits, svd, weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == weights
        assert torch.equal(ours, theirs)


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, rows, bias=False) for rows in (16, 9))
        for layer in self.layers:
            numbers = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float32)
            layer.weight = nn.Parameter(numbers.to(dtype))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_changes_no_bit_of_cut_weights(weights: torch.dtype, default_dtype: torch.dtype) -> None:
    """Three processes, for which threads stand; rows are cut between them."""
    found = []
    for default in (default_dtype, torch.float32):
        torch.set_default_dtype(default)
        config = GaLoreConfig(
            rank=4, update_proj_gap=2, residual_percent=10.0, residual_warmup_steps=2, proj_type="right", state_bits=16
        )
        run = Run(Weights(weights), config, "anywhere")
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            grads = {
                name: torch.randn(w.shape, generator=generator, dtype=torch.float32).to(weights)
                for name, w in run.weights.items()
            }
            run.step(grads)
        found.append(run.weights)
    for name, w in found[0].items():
        assert w.dtype == weights
        assert torch.equal(w, found[1][name])


def test_every_new_tensor_says_its_dtype_and_device() -> None:
    """Where the optimizer is, and what it is made of."""
    silent = []
    for path in [p for folder in ("core", "optim", "layouts", "kernels", "hf") for p in (ROOT / folder).glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in FACTORIES:
                said = {keyword.arg for keyword in node.keywords}
                if not {"dtype", "device"} <= said and path.name != "reference.py":
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not silent, "\n".join(silent)
