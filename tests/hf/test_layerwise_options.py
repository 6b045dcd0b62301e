"""Layer-wise mode takes every option of docs/support-matrix.md but the residuals that need the whole gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

import figures
from galore_trainer import GaLoreConfig, attach
from galore_trainer.errors import OptionError
from galore_trainer.hf.callback import unwrap_optimizer
from tiny_training import arguments, rows


@pytest.mark.parametrize("settings", [settings for _, asked in figures.SUPPORT for settings in asked], ids=str)
def test_layer_wise_mode_trains_with_an_option(settings: dict[str, Any], tiny_llama: Any, tmp_path: Path) -> None:
    sharing = "shared" if "share_output_heads" in settings else "joint"  # heads that share are right alone
    percent = 5.0 if "residual_mode" in settings else 0.0
    common = {"rank": 4, "update_proj_gap": 2, "residual_percent": percent, "head_sharing": sharing}
    if settings.get("residual") in ("scaled", "both"):
        with pytest.raises(OptionError, match=r"galore\.residual"):
            GaLoreConfig(**{**common, **settings, "layerwise": True})
        return
    config = GaLoreConfig(**{**common, **settings, "layerwise": True})
    own = {"max_grad_norm": 0.0} if "max_grad_norm" in settings else {}  # the Trainer's, which may not clip, too
    args = arguments(tmp_path, gradient_accumulation_steps=2, **own)
    trainer = attach(Trainer(model=tiny_llama, args=args, train_dataset=rows()), config)
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer).config == config
    assert trainer.state.global_step == 3
