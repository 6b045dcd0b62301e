"""GaLore+ inside ms-swift: a file for ``--external_plugins`` that calls ``register``, and ``--optimizer galore_plus``.

ms-swift makes an ``OptimizerCallback`` of the name in ``optimizers_map`` for each of its Trainers, and asks it for the
optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.hf.build import galore_plugin
from galore_trainer.optim.galore_adamw import GaLoreAdamW

OF_SWIFT = "galore_"
"""How ms-swift's settings for its own GaLore begin."""


def register(config: GaLoreConfig | None = None, name: str = "galore_plus") -> None:
    """Make ``--optimizer galore_plus`` known to ms-swift; call it in the file that ``--external_plugins`` names.

    Args:
        config: how to project; ``GaLoreConfig()`` if None.
        name: what ``--optimizer`` is given.

    Raises:
        OptionError: ``config`` is no ``GaLoreConfig``.
    """
    config = config if config is not None else GaLoreConfig()
    if not isinstance(config, GaLoreConfig):
        raise OptionError("config", config, "a GaLoreConfig", "Use register(GaLoreConfig(rank=128)).")
    optimizers_map[name] = functools.partial(GaLoreOptimizer, config=config)


class GaLoreOptimizer(OptimizerCallback):
    """Makes the optimizer of one of ms-swift's Trainers, and adds the callback that checks and reports.

    Args:
        args: ms-swift's ``TrainingArguments``: learning rate, betas, eps, weight decay and seed are theirs.
        trainer: the Trainer, which is not initialised yet.
        config: how to project.

    Raises:
        OptionError: what ``galore_plugin`` refuses, and settings for ms-swift's own GaLore, which would be ignored.
    """

    def __init__(self, args: Any, trainer: Any, *, config: GaLoreConfig) -> None:
        super().__init__(args, trainer)
        for field in dataclasses.fields(args) if dataclasses.is_dataclass(args) else ():
            value = getattr(args, field.name)
            if field.name.startswith(OF_SWIFT) and value != field.default:
                way_out = "It is for ms-swift's own GaLore: set the field of GaLoreConfig in the plugin's file."
                raise OptionError(field.name, value, "its default, beside this optimizer", way_out)
        plugin = galore_plugin(config, args)
        self._factory_and_settings = plugin["optimizer_cls_and_kwargs"]
        (self._callback,) = plugin["callbacks"]

    def create_optimizer(self, model: Any = None) -> GaLoreAdamW:
        """The optimizer of the Trainer's model, or of ``model`` where the Trainer passes one."""
        if self._callback not in self.trainer.callback_handler.callbacks:
            self.trainer.add_callback(self._callback)
        factory, settings = self._factory_and_settings
        return factory()(self.trainer.model if model is None else model, **settings)
