"""Layer-wise mode against the ordinary one: the same weights, whatever the split into micro-batches."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.hf.build import galore_groups
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.layerwise import ProjectedGradient

STEPS, BATCH, LR = 10, 8, 1e-2
# Weights move by about 0.09. Sums of micro-batches are float32 in another order, go through Adam, a division, and up to
# four bases; with one micro-batch the runs were equal bit for bit where this was written.
CLOSE = 1e-5
METHOD: dict[str, Any] = {
    "rank": 4,
    "update_proj_gap": 4,
    "scale": 1.0,
    "plain_lr_ratio": 1.0,
    "residual": "sparse",  # layer-wise mode has no other
    "residual_warmup_steps": 2,
}


def make_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def make_optimizer(model: nn.Module, config: GaLoreConfig, **more: Any) -> GaLoreAdamW:
    groups = galore_groups(model, config, lr=LR, weight_decay=0.1)
    return GaLoreAdamW(groups, config, lr=LR, seed=7, **more)


def batches(steps: int = STEPS) -> Tensor:
    return torch.randint(0, 48, (steps, BATCH, 12), generator=torch.Generator().manual_seed(5))


def train(
    model: nn.Module, optimizer: GaLoreAdamW, data: Tensor, micro: int = 1, max_norm: float | None = None
) -> list[float]:
    """Steps over the data, each batch in ``micro`` equal parts; the gradient norms where they are asked for."""
    norms = []
    for batch in data:
        for part in batch.chunk(micro):
            (model(input_ids=part, labels=part).loss / micro).backward()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def ordinary(config: GaLoreConfig) -> GaLoreConfig:
    """The same method without hooks: gradients stay whole until the step."""
    settings = config.to_dict() | {"layerwise": False, "stagger_refresh": True, "first_basis": "sketch"}
    return GaLoreConfig(**settings)


@pytest.mark.parametrize("residual", [0.0, 5.0])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize(
    ("sharing", "proj_type"), [("shared", "std"), ("per_head", "right"), ("grouped", "right"), ("joint", "left")]
)
def test_it_equals_the_ordinary_run(residual: float, micro: int, sharing: str, proj_type: str) -> None:
    more = {"head_group_size": 2} if sharing == "grouped" else {}
    config = GaLoreConfig(
        **METHOD, layerwise=True, residual_percent=residual, head_sharing=sharing, proj_type=proj_type, **more
    )
    start, one, other = make_model(), make_model(), make_model()
    train(one, make_optimizer(one, config), batches(), micro)
    reference = make_optimizer(other, ordinary(config))
    train(other, reference, batches())
    refreshes = [s["refreshes"] for s in reference.state.values() if "refreshes" in s]
    assert min(refreshes) >= 3
    assert distance(start, other) > 0.05
    assert distance(one, other) < CLOSE


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("residual", [0.0, 5.0])
def test_it_equals_the_ordinary_run_under_gradient_checkpointing(reentrant: bool, residual: float) -> None:
    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=residual)
    one, other = make_model(), make_model()
    one.gradient_checkpointing_enable({"use_reentrant": reentrant})
    one.enable_input_require_grads()
    one.train()
    other.train()
    train(one, make_optimizer(one, config), batches(), 2)
    train(other, make_optimizer(other, ordinary(config)), batches())
    assert distance(one, other) < CLOSE


def test_clipping_is_exact_for_one_backward_and_close_for_several() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=5.0)
    one, other = make_model(), make_model()
    exact = train(one, make_optimizer(one, config), batches(), 1, max_norm=0.3)
    wanted = train(other, make_optimizer(other, ordinary(config)), batches(), 1, max_norm=0.3)
    assert exact == pytest.approx(wanted, rel=1e-4)
    assert min(wanted) > 0.3
    assert distance(one, other) < CLOSE
    third = make_model()
    estimated = train(third, make_optimizer(third, config), batches(), 4, max_norm=0.3)
    # one random direction for each of 14 weights: an unbiased estimate of the norm, not the norm
    assert estimated == pytest.approx(wanted, rel=0.2)
    assert sum(estimated) == pytest.approx(sum(wanted), rel=0.05)
    assert estimated[1:] != pytest.approx(wanted[1:], rel=1e-5)


def test_only_what_is_due_keeps_its_gradient() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True)
    model = make_model()
    optimizer = make_optimizer(model, config)
    projected = [p for g in optimizer.param_groups if g["projected"] for p in g["params"]]
    held = []
    for batch in batches():
        model(input_ids=batch, labels=batch).loss.backward()
        held.append(sum(not isinstance(p.grad, ProjectedGradient) for p in projected))
        assert all(p.grad.shape == p.shape for p in projected)
        optimizer.step()
        optimizer.zero_grad()
    assert held[0] == 0  # first bases come from sketches
    assert max(held) <= len(projected) // 4 + 1
    assert sum(held[1:5]) == len(projected)


@pytest.mark.parametrize("residual", [0.0, 5.0])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(residual: float, stop: int) -> None:
    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=residual)
    whole, first = make_model(), make_model()
    train(whole, make_optimizer(whole, config), batches(), 2, max_norm=1.0)
    optimizer = make_optimizer(first, config)
    train(first, optimizer, batches()[:stop], 2, max_norm=1.0)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make_model()
    second.load_state_dict(saved["model"])
    resumed = make_optimizer(second, config)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, batches()[stop:], 2, max_norm=1.0)
    assert distance(whole, second) == 0.0


def test_bfloat16_weights_take_part() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True)
    one, other = make_model().bfloat16(), make_model().bfloat16()
    train(one, make_optimizer(one, config), batches())
    train(other, make_optimizer(other, ordinary(config)), batches())
    assert distance(make_model().bfloat16(), one) > 0.05
    assert distance(one, other) < 0.02  # gradients are equal; sums of sketches are rounded to bfloat16 in other places


def test_weights_used_twice_frozen_or_left_out_of_a_step() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(12, 12, bias=False) for _ in range(3)])

        def forward(self, x: Tensor, with_last: bool) -> Tensor:
            x = torch.tanh(self.blocks[0](torch.tanh(self.blocks[0](x))))
            x = torch.tanh(self.blocks[1](x))
            return self.blocks[2](x) if with_last else x

    def run(config: GaLoreConfig) -> Net:
        torch.manual_seed(0)
        net = Net()
        net.blocks[1].weight.requires_grad_(False)
        weights = [net.blocks[0].weight, net.blocks[2].weight]
        optimizer = GaLoreAdamW([{"params": weights, "projected": True}], config, lr=LR, seed=1)
        for step in range(9):
            x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
            net(x, with_last=step not in (0, 3, 4)).square().mean().backward()
            assert (net.blocks[2].weight.grad is None) == (step in (0, 3, 4))
            optimizer.step()
            optimizer.zero_grad()
        return net

    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=0.0, target_modules="all-linear")
    assert distance(run(config), run(ordinary(config))) < CLOSE


def test_a_non_finite_gradient_is_skipped_and_counted() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=5.0)
    models = [make_model(), make_model()]
    for model, method in zip(models, (config, ordinary(config)), strict=True):
        optimizer = make_optimizer(model, method)
        for step, batch in enumerate(batches()):
            loss = model(input_ids=batch, labels=batch).loss
            (loss * float("inf") if step in (0, 3) else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert set(optimizer.check_finite().values()) == {2}
    assert all(p.isfinite().all() for p in models[0].parameters())
    assert distance(*models) < CLOSE


def test_a_gradient_can_be_zeroed_in_place() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=0.0)
    one, other = make_model(), make_model()
    for model, to_none in ((one, True), (other, False)):
        optimizer = make_optimizer(model, config)
        for batch in batches():
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.zero_grad(set_to_none=to_none)  # as after a batch that was thrown away
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(one, other) < CLOSE


def test_what_needs_the_whole_gradient_is_refused() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True)
    model = make_model()
    optimizer = make_optimizer(model, config)
    data = batches()[0]
    model(input_ids=data, labels=data).loss.backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert "up_proj" in repr(weight.grad)
    with pytest.raises(RuntimeError, match=r"does not keep whole.*up_proj.*without galore\.layerwise"):
        weight.grad.abs()
    with pytest.raises(OptionError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_a_weight_that_is_hooked_already_is_refused() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True)
    model = make_model()
    first = make_optimizer(model, config)
    with pytest.raises(OptionError, match=r"post-accumulate-grad hook.*built before"):
        make_optimizer(model, config)
    del first
    gc.collect()
    make_optimizer(model, config)  # hooks live as long as their optimizer


def test_a_copied_optimizer_takes_whole_gradients() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=0.0)
    model = make_model()
    optimizer = make_optimizer(model, config)
    train(model, optimizer, batches()[:3])
    both = copy.deepcopy((model, optimizer))
    train(*both, batches()[3:])
    train(model, optimizer, batches()[3:])
    assert distance(model, both[0]) < CLOSE


def test_a_step_uses_its_gradients_up() -> None:
    """Zeroing in place after a step, a second step on the same gradients, a state loaded between backward and step."""
    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=5.0)
    one, other = make_model(), make_model()
    usual, odd = make_optimizer(one, config), make_optimizer(other, config)
    plain = [p for g in odd.param_groups if not g["projected"] for p in g["params"]]
    fresh = copy.deepcopy(odd.state_dict())
    other(input_ids=batches()[0], labels=batches()[0]).loss.backward()
    odd.load_state_dict(fresh)
    odd.zero_grad()
    for batch in batches():
        for model, optimizer in ((one, usual), (other, odd)):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        usual.zero_grad()
        assert not any(isinstance(p.grad, ProjectedGradient) for p in other.parameters())
        for p in plain:
            p.grad = None
        odd.zero_grad(set_to_none=False)
    assert distance(one, other) < CLOSE


def test_a_step_of_nothing_at_rate_zero_changes_nothing() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True)
    model = make_model()
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    (model(input_ids=batches()[0]).logits * 0.0).sum().backward()
    optimizer.step()
    assert {s["calls"] for s in optimizer.state.values()} == {0}
    assert distance(model, make_model()) == 0.0


def test_bases_in_fewer_bits_are_not_held_in_float32() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True, basis_bits=8)
    model = make_model()
    optimizer = make_optimizer(model, config)
    train(model, optimizer, batches()[:2])
    model(input_ids=batches()[2], labels=batches()[2]).loss.backward()
    held = [
        x
        for p in model.parameters()
        if isinstance(p.grad, ProjectedGradient)
        for part in p.grad.parts
        for x in (part._basis.values, part._basis.scale)
    ]
    stored = {s[key].data_ptr() for s in optimizer.state.values() for key in ("basis", "basis_scale") if key in s}
    assert held
    assert {x.data_ptr() for x in held} <= stored


def test_groups_by_hand_may_hold_frozen_weights_and_float64() -> None:
    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=0.0)
    weights = [nn.Parameter(torch.randn(12, 8, dtype=torch.float64)) for _ in range(2)]
    weights[1].requires_grad_(False)
    before = [w.detach().clone() for w in weights]
    optimizer = GaLoreAdamW([{"params": weights, "projected": True}], config, lr=LR, seed=1)
    for _ in range(6):
        weights[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(weights[0], before[0])
    assert torch.equal(weights[1], before[1])


@pytest.mark.parametrize("residual", [0.0, 5.0])
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_factors_are_taken_in_whenever_they_come(residual: float, kernels: str) -> None:
    """Scaled, zeroed, added to, each weight by its own number: what a whole gradient would have been."""
    config = GaLoreConfig(**METHOD, layerwise=True, residual_percent=residual, kernels=kernels)
    weights = []
    for own in (config, ordinary(config)):
        generator = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(24, 16, generator=generator)) for _ in range(3)]
        optimizer = GaLoreAdamW([{"params": params, "projected": True, "names": ["a", "b", "c"]}], own, lr=LR, seed=7)
        for at in range(10):
            shared = torch.tensor(0.5)
            for part in range(2):
                torch.stack([(p * torch.randn(24, 16, generator=generator)).sum() for p in params]).sum().backward()
                grads: list[Any] = [p.grad for p in params]
                if part == 0 and at % 3 == 0:
                    grads[0].mul_(3.0)
                    grads[1].zero_()
                for grad in grads:
                    grad.mul_(shared)
                if part == 1 and at % 3 == 1:
                    grads[2].div_(torch.tensor(4.0))
                shared.fill_(2.0)  # what was multiplied before stays as it was
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.stack([p.detach() for p in params]))
    assert (weights[0] - weights[1]).abs().max() <= CLOSE


def test_the_norm_follows_what_happens_to_a_gradient() -> None:
    p = nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(1)))
    config = GaLoreConfig(**METHOD, layerwise=True)
    optimizer = GaLoreAdamW([{"params": [p], "projected": True, "names": ["a"]}], config, lr=LR, seed=7)
    for _ in range(2):  # with a sketch, and with a basis
        G = torch.randn(24, 16)
        (p * G).sum().backward()
        grad: Any = p.grad
        torch.testing.assert_close(torch.linalg.vector_norm(grad), G.norm())
        grad.mul_(torch.tensor(0.25))
        grad.mul_(-2.0)
        torch.testing.assert_close(torch.linalg.vector_norm(grad), 0.5 * G.norm())
        optimizer.step()
        optimizer.zero_grad()
    (p * G).sum().backward()
    grad = p.grad
    assert torch.linalg.vector_norm(grad.zero_()) == 0.0


def test_groups_may_not_share_a_name() -> None:
    """A random direction and a state belong to a name."""
    params = [nn.Parameter(torch.randn(24, 16)) for _ in range(4)]
    groups = [
        {"params": params[:2], "projected": True, "names": ["a", "b"]},
        {"params": params[2:], "projected": True, "names": ["b", "c"]},
    ]
    with pytest.raises(OptionError, match="names: got 'b'"):
        GaLoreAdamW(groups, GaLoreConfig(**METHOD, layerwise=True), lr=LR)
