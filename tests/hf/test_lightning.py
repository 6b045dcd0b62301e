"""Modules of Lightning: the optimizer is built for the model inside, and layer-wise mode names manual optimization."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from galore_trainer import GaLoreConfig, OptionError, attach, build_optimizer
from tiny_training import rows

CONFIG = GaLoreConfig(rank=4, update_proj_gap=2, residual="sparse", first_basis="sketch", stagger_refresh=True)
LAYERWISE = GaLoreConfig(rank=4, update_proj_gap=2, first_basis="sketch", stagger_refresh=True, layerwise=True)


class Module(nn.Module):
    """What this package needs of a ``LightningModule``: three names."""

    automatic_optimization = True

    def __init__(self, model: nn.Module, config: GaLoreConfig, *, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.galore = config
        self.model = model
        self.teacher = copy.deepcopy(model).requires_grad_(False)

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return build_optimizer(self, self.galore, lr=2e-3)


def names(optimizer: Any) -> list[str]:
    return [name for name, _ in optimizer.model_weights()]


def batches() -> torch.Tensor:
    return torch.tensor([row["input_ids"] for row in rows()]).view(4, 4, 8)


def test_the_model_inside_gives_the_names_and_the_embeddings(tiny_llama: Any) -> None:
    config = GaLoreConfig(rank=4, embeddings="projected", rank_pattern={"model.layers.0.mlp.up_proj": 2})
    inside, bare = build_optimizer(Module(tiny_llama, config), config), build_optimizer(tiny_llama, config)
    assert names(inside) == names(bare)
    assert [g.get("matrices") for g in inside.param_groups] == [g.get("matrices") for g in bare.param_groups]


def test_a_module_with_more_weights_than_those_of_its_model_is_taken_whole(tiny_llama: Any) -> None:
    module = Module(tiny_llama, CONFIG)
    module.head = nn.Linear(64, 4)
    assert {"head.weight", "head.bias", "model.model.norm.weight"} <= set(names(module.configure_optimizers()))
    del module.head
    module.temperature = nn.Parameter(torch.zeros(1))
    assert "temperature" in names(module.configure_optimizers())


def test_any_other_module_is_its_own_model(tiny_llama: Any) -> None:
    outer = nn.Sequential(tiny_llama)
    assert names(build_optimizer(outer, CONFIG))[0].startswith("0.model.")


def test_layer_wise_mode_names_manual_optimization(tiny_llama: Any) -> None:
    with pytest.raises(OptionError, match=r"automatic optimization.*manual_backward\(loss\)") as refused:
        Module(tiny_llama, LAYERWISE).configure_optimizers()
    assert refused.value.option == "galore.layerwise"
    Module(tiny_llama, CONFIG).configure_optimizers()


def test_layer_wise_mode_of_several_processes_is_refused(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(OptionError, match=r"Lightning on several processes.*one process"):
        Module(tiny_llama, LAYERWISE, manual=True).configure_optimizers()


def test_layer_wise_mode_trains_by_steps_with_lightnings_closure(tiny_llama: Any) -> None:
    """Lightning passes a closure under manual optimization too; it runs no backward."""
    layerwise, ordinary = Module(copy.deepcopy(tiny_llama), LAYERWISE, manual=True), Module(tiny_llama, CONFIG)
    calls: list[bool] = []
    for module in (layerwise, ordinary):
        optimizer = module.configure_optimizers()
        for batch in batches():
            module.loss(batch).backward()
            optimizer.step(closure=lambda: calls.append(torch.is_grad_enabled()))
            optimizer.zero_grad()
    assert calls == [True] * 8
    for a, b in zip(layerwise.model.parameters(), ordinary.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # sums of gradients in another order


def test_attach_says_where_a_module_gets_its_optimizer(tiny_llama: Any) -> None:
    with pytest.raises(OptionError, match=r"configure_optimizers of the LightningModule\.$"):
        attach(Module(tiny_llama, CONFIG), CONFIG)
    with pytest.raises(OptionError, match=r"configure_optimizers.*manual_backward"):
        attach(Module(tiny_llama, CONFIG), LAYERWISE)


@pytest.mark.parametrize("config", [CONFIG, LAYERWISE])
def test_lightning_itself_trains(tiny_llama: Any, config: GaLoreConfig, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning not installed")

    class Real(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not config.layerwise
            self.model = copy.deepcopy(tiny_llama)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(input_ids=batch[0], labels=batch[0]).loss
            if self.automatic_optimization:
                return loss
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
            return None

        def configure_optimizers(self) -> Any:
            return build_optimizer(self, config, lr=2e-3)

    module = Real()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_steps=3, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(batches()))
    assert trainer.global_step == 3
    projected = trainer.optimizers[0].projected_weights()
    before = dict(tiny_llama.named_parameters())
    assert not [name for name, p in projected if torch.equal(p, before[name])]
    with pytest.raises(OptionError, match="configure_optimizers"):
        attach(trainer, config)
