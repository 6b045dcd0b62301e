"""GaLore+ for PyTorch and the Hugging Face Trainer: full-parameter fine-tuning with low-rank gradient projection."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "GaLoreConfig": "galore_trainer.config",
    "OptionError": "galore_trainer.errors",
    "GaLoreAdamW": "galore_trainer.optim.galore_adamw",
    "GaLoreCallback": "galore_trainer.hf.callback",
    "attach": "galore_trainer.hf.attach",
    "build_optimizer": "galore_trainer.hf.build",
    "check_checkpoint": "galore_trainer.hf.unpickling",
    "export_state": "galore_trainer.hf.state_export",
    "galore_plugin": "galore_trainer.hf.build",
    "import_state": "galore_trainer.hf.state_import",
}
__all__ = [
    "GaLoreAdamW",
    "GaLoreCallback",
    "GaLoreConfig",
    "OptionError",
    "attach",
    "build_optimizer",
    "check_checkpoint",
    "export_state",
    "galore_plugin",
    "import_state",
]

if TYPE_CHECKING:
    from galore_trainer.config import GaLoreConfig
    from galore_trainer.errors import OptionError
    from galore_trainer.hf.attach import attach
    from galore_trainer.hf.build import build_optimizer, galore_plugin
    from galore_trainer.hf.callback import GaLoreCallback
    from galore_trainer.hf.state_export import export_state
    from galore_trainer.hf.state_import import import_state
    from galore_trainer.hf.unpickling import check_checkpoint
    from galore_trainer.optim.galore_adamw import GaLoreAdamW


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line starts without torch."""
    if name == "__version__":
        from galore_trainer.versions import DISTRIBUTION, version

        return version(DISTRIBUTION)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from galore_trainer.versions import check_versions

    check_versions()
    return getattr(importlib.import_module(_HOMES[name]), name)
