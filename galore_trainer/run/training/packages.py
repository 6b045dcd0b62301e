"""Optimizers of other packages as baselines, on the weights that our ``galore`` projects.

``galore_torch`` is GaLore; ``apollo_torch`` scales each channel of the gradient by what Adam does to a random
projection of it; ``fira`` adds to GaLore's update what its projection loses, scaled line by line. The last two let the
norm of a weight's update grow by one percent a step at most. All three know no refusal of gradients that are not
finite, and round to the weights' type.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.timing import Stopwatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """How a package's optimizer is built.

    Attributes:
        optimizer: dotted name of its AdamW.
        projector: dotted name of the class whose ``get_orthogonal_matrix`` finds a basis.
        scale: the key of a projected group that takes ``galore.scale``.
        fixed: further keys of a projected group.
    """

    optimizer: str
    projector: str
    scale: str = "scale"
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)


PACKAGES = {
    "galore_torch": Package(
        optimizer="galore_torch.GaLoreAdamW", projector="galore_torch.galore_projector.GaLoreProjector"
    ),
    "apollo": Package(
        optimizer="apollo_torch.APOLLOAdamW",
        projector="apollo_torch.random_projector.GradientProjector",
        fixed={"proj": "random", "scale_type": "channel"},
    ),
    "fira": Package(optimizer="fira.FiraAdamW", projector="fira.gradient_projection.GradientProjector", scale="alpha"),
}
"""By method."""


def package_groups(
    model: torch.nn.Module, *, method: str, config: GaLoreConfig, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of a package's optimizer: what is projected carries rank, gap, scale and side.

    Args:
        model: the model to train.
        method: of ``PACKAGES``.
        config: head_sharing is joint; targets, ranks, ``plain_lr_ratio`` and the Trainer's rule for what is not
            decayed are honoured as for ``GaLoreAdamW``.
        lr, weight_decay: as the Trainer has them.

    Raises:
        OptionError: as ``plan_weights``; a projected weight that is no matrix, such as a stack of experts.
    """
    from galore_trainer.hf.build import galore_groups
    from galore_trainer.optim.param_groups import scale_of

    package = PACKAGES[method]
    shared = {"update_proj_gap": config.update_proj_gap, "proj_type": config.proj_type, **package.fixed}
    groups = []
    for group in galore_groups(model, config, lr=lr, weight_decay=weight_decay):
        common = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        if not group["projected"]:
            groups.append({**common, "params": group["params"]})
            continue
        alike = defaultdict(list)
        for name, p, matrices in zip(group["names"], group["params"], group["matrices"], strict=True):
            if p.dim() != 2:
                raise OptionError(
                    "method",
                    f"{method} with {name} of {p.dim()} dimensions",
                    "matrices to project",
                    "Leave it out by galore.target_modules, or use --method galore.",
                )
            alike[matrices[0].rank, scale_of(group, config, matrices[0])].append(p)
        groups += [
            {**common, **shared, "rank": rank, package.scale: scale, "params": params}
            for (rank, scale), params in alike.items()
        ]
    return groups


class PackageFactory:
    """What the Trainer calls once it has the model: ``PackageFactory()(model, **settings)``."""

    def __call__(
        self,
        model: torch.nn.Module,
        *,
        method: str,
        config: GaLoreConfig,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> torch.optim.Optimizer:
        """Build the package's AdamW; its refreshes are timed as ours are, under ``stopwatch``."""
        groups = package_groups(model, method=method, config=config, lr=lr, weight_decay=weight_decay)
        return _timed(PACKAGES[method])(groups, lr=lr, betas=betas, eps=eps, no_deprecation_warning=True)


def _timed(package: Package) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer class, measuring while it steps how long its projectors look for bases."""
    base: Any = pkgutil.resolve_name(package.optimizer)
    projector_class: Any = pkgutil.resolve_name(package.projector)

    class Timed(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.stopwatch = Stopwatch()

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            find = projector_class.get_orthogonal_matrix

            def timed(projector: Any, weights: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                with self.stopwatch.measure("refresh", weights.device):
                    return find(projector, weights, *args, **kwargs)

            projector_class.get_orthogonal_matrix = timed
            try:
                return super().step(closure)
            finally:
                projector_class.get_orthogonal_matrix = find

    return Timed
