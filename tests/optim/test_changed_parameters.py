"""A parameter that is no longer what its state was made for is refused by name; what does not matter to it is not."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(layerwise: bool = False, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, nn.Parameter, GaLoreAdamW]:
    generator = torch.Generator().manual_seed(0)
    projected, plain = (nn.Parameter(torch.randn(24, 16, generator=generator).to(DEVICE, dtype)) for _ in range(2))
    groups = [{"params": [projected], "names": ["q"], "projected": True}, {"params": [plain], "names": ["embed"]}]
    config = GaLoreConfig(rank=4, layerwise=layerwise, update_proj_gap=3, residual_warmup_steps=2)
    return projected, plain, GaLoreAdamW(groups, config, lr=1e-2)


def step(optimizer: GaLoreAdamW, seed: int = 1) -> None:
    """By backward, so that layer-wise mode takes gradients in."""
    loss = torch.zeros((), device=DEVICE)
    for group in optimizer.param_groups:
        for p in group["params"]:
            factors = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p)
            loss = loss + (p * factors).sum().float()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("which", ["q", "embed"])
@pytest.mark.parametrize("rows", [25, 23, 400])
def test_another_size_is_refused_naming_both(rows: int, which: str, layerwise: bool) -> None:
    projected, plain, optimizer = make(layerwise)
    step(optimizer)
    p = projected if which == "q" else plain
    p.data = torch.zeros(rows, 16, device=DEVICE)
    with pytest.raises(OptionError, match=re.escape(f"{which} of shape [{rows}, 16]")) as error:
        step(optimizer)
    assert "[24, 16]" in str(error.value)
    assert "before its optimizer is built" in str(error.value)


def test_a_transposed_weight_is_another_size() -> None:
    projected, _, optimizer = make()
    step(optimizer)
    projected.data = projected.data.mT
    with pytest.raises(OptionError, match=re.escape("q of shape [16, 24]")):
        step(optimizer)


def test_embeddings_resized_before_the_first_step_are_trained() -> None:
    _, plain, optimizer = make()
    plain.data = torch.zeros(30, 16, device=DEVICE)
    step(optimizer)
    assert plain.abs().min() > 0.0
    assert optimizer.state[plain]["exp_avg"].shape == (30, 16)


def test_embeddings_resized_by_transformers_after_a_step_are_refused(tiny_llama: nn.Module) -> None:
    from galore_trainer.hf.build import build_optimizer

    optimizer = build_optimizer(tiny_llama, GaLoreConfig(rank=4))
    ids = torch.arange(8)[None]
    for size in (256, 259):
        tiny_llama.resize_token_embeddings(size)
        tiny_llama(input_ids=ids, labels=ids).loss.backward()
        if size == 256:
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(OptionError, match=r"model\.embed_tokens\.weight of shape \[259, 64\]"):
        optimizer.step()


@pytest.mark.parametrize("projected_too", [False, True])
def test_weights_may_move_in_memory_and_change_their_strides(projected_too: bool) -> None:
    results = []
    for moves in (False, True):
        projected, plain, optimizer = make()
        for seed in range(6):
            step(optimizer, seed)
            if moves and seed == 2:
                for p in (projected, plain)[1 - projected_too :]:
                    p.data = p.data.mT.contiguous().mT
        results.append(torch.cat([projected.detach(), plain.detach()]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_weights_may_become_bfloat16() -> None:
    """State is float32 either way: the run goes on, and rounds its weights from then on."""
    results: list[Tensor] = []
    for narrow in (False, True):
        projected, plain, optimizer = make()
        for seed in range(6):
            step(optimizer, seed)
            if narrow and seed == 2:
                projected.data, plain.data = projected.data.bfloat16(), plain.data.bfloat16()
        assert optimizer.state[projected]["exp_avg"].dtype == torch.float32
        results.append(torch.cat([projected.detach(), plain.detach()]).float())
    # a bfloat16 near 2 is rounded by up to 2^-7 in each of four roundings, and moments see gradients rounded to 2^-9
    torch.testing.assert_close(*results, rtol=0, atol=0.1)


@pytest.mark.parametrize("which", ["q", "embed"])
def test_weights_may_not_become_float64(which: str) -> None:
    projected, plain, optimizer = make()
    step(optimizer)
    p = projected if which == "q" else plain
    p.data = p.data.double()
    with pytest.raises(OptionError, match=rf"{which} in torch\.float64"):
        step(optimizer)


def test_a_gradient_of_another_shape_is_refused() -> None:
    _, plain, optimizer = make()
    plain.grad = torch.ones(24, 16, device=DEVICE)
    plain.data = torch.zeros(30, 16, device=DEVICE)
    with pytest.raises(OptionError, match=r"a gradient of shape \[24, 16\]"):
        optimizer.step()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is one device")
@pytest.mark.parametrize("which", ["q", "embed"])
def test_weights_may_not_change_their_device(which: str) -> None:
    projected, plain, optimizer = make()
    step(optimizer)
    p = projected if which == "q" else plain
    p.data, p.grad = p.data.cpu(), None
    p.grad = torch.ones_like(p)
    with pytest.raises(OptionError, match=f"{which} on cpu"):
        optimizer.step()
