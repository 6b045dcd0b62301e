"""The Trainer's own optimizer with another learning rate for what GaLore leaves plain: embeddings, output, norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from galore_trainer.config import GaLoreConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments


class EmbeddingRates:
    """What the Trainer calls once it has the model: ``EmbeddingRates()(model, arguments=..., scale=...)``."""

    def __call__(self, model: Any, *, arguments: TrainingArguments, scale: float) -> torch.optim.Optimizer:
        """Build the optimizer that ``arguments.optim`` names.

        Args:
            model: the model to train.
            arguments: give the optimizer, its learning rate and its weight decay, under the Trainer's rule for what
                is not decayed.
            scale: of the learning rate of every weight that is no linear layer of a block.
        """
        from transformers import Trainer

        from galore_trainer.hf.build import galore_groups

        rates = GaLoreConfig(rank=1, head_sharing="joint", plain_lr_ratio=scale)  # any rank: weights are only sorted
        lr, decay = arguments.learning_rate, arguments.weight_decay
        groups = galore_groups(model, rates, lr=lr, weight_decay=decay)
        kept = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        optimizer: torch.optim.Optimizer = optimizer_class(kept, **settings)
        return optimizer
