"""The package galore-torch as a baseline: its own optimizer, on the weights that our ``galore`` projects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.timing import Stopwatch


def torch_groups(model: torch.nn.Module, config: GaLoreConfig, *, lr: float, weight_decay: float) -> list[dict]:
    """Parameter groups of ``galore_torch.GaLoreAdamW``: what is projected carries rank, gap, scale and side.

    Args:
        model: the model to train.
        config: head_sharing is joint; targets, ranks, ``plain_lr_ratio`` and the Trainer's rule for what is not
            decayed are honoured as for ``GaLoreAdamW``.
        lr, weight_decay: as the Trainer has them.

    Raises:
        OptionError: as ``plan_weights``; a projected weight that is no matrix, such as a stack of experts.
    """
    from galore_trainer.hf.build import galore_groups

    groups = []
    for group in galore_groups(model, config, lr=lr, weight_decay=weight_decay):
        common = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        if not group["projected"]:
            groups.append({**common, "params": group["params"]})
            continue
        by_rank = defaultdict(list)
        for name, p, matrices in zip(group["names"], group["params"], group["matrices"], strict=True):
            if p.dim() != 2:
                raise OptionError(
                    "method",
                    f"galore_torch with {name} of {p.dim()} dimensions",
                    "matrices to project",
                    "Leave it out by galore.target_modules, or use --method galore.",
                )
            by_rank[matrices[0].rank].append(p)
        shared = {"update_proj_gap": config.update_proj_gap, "scale": config.scale, "proj_type": config.proj_type}
        groups += [{**common, **shared, "rank": rank, "params": params} for rank, params in by_rank.items()]
    return groups


class GaLoreTorchFactory:
    """What the Trainer calls once it has the model: ``GaLoreTorchFactory()(model, **settings)``."""

    def __call__(
        self,
        model: torch.nn.Module,
        *,
        config: GaLoreConfig,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> torch.optim.Optimizer:
        """Build galore-torch's AdamW; its refreshes are timed as ours are, under ``stopwatch``."""
        from galore_torch import GaLoreAdamW

        groups = torch_groups(model, config, lr=lr, weight_decay=weight_decay)
        return _timed(GaLoreAdamW)(groups, lr=lr, betas=betas, eps=eps, no_deprecation_warning=True)


def _timed(base: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer class, measuring the SVDs of its projectors while it steps."""
    from galore_torch.galore_projector import GaLoreProjector

    class Timed(base):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.stopwatch = Stopwatch()

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            find = GaLoreProjector.get_orthogonal_matrix

            def timed(projector: Any, weights: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                with self.stopwatch.measure("refresh", weights.device):
                    return find(projector, weights, *args, **kwargs)

            GaLoreProjector.get_orthogonal_matrix = timed
            try:
                return super().step(closure)
            finally:
                GaLoreProjector.get_orthogonal_matrix = find

    return Timed
