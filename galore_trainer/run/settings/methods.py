"""The methods of training as data: what each one means, which settings it reads, and what it needs.

A new method is one entry of ``METHODS``, one name in ``Method`` and, in ``training/methods.py``, what it does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Any, Literal

from galore_trainer.config import ALL_LINEAR, check_fields, check_target_modules
from galore_trainer.errors import OptionError
from galore_trainer.fields import knob
from galore_trainer.versions import check_versions

Method = Literal[
    "galore_plus",
    "galore",
    "adamw",
    "adamw_8bit",
    "lora",
    "dora",
    "galore_torch",
    "apollo",
    "fira",
    "galore_plus_paper",
]

RANK_STABILISED_ALPHA = 16
"""One alpha for every rank: under ``use_rslora`` the adapters' updates keep their size as the rank grows."""
SHARDED = ("fsdp", "deepspeed")
"""Backends under which each process keeps only a part of the optimizer's state."""
ADAPTER = "adapter"
"""The folder, inside a run's, of the adapter that lora and dora trained, beside the merged model."""
GALORE: dict[str, Any] = {
    "galore.head_sharing": "joint",
    "galore.svd": "exact",
    "galore.momentum_transfer": "keep",
    "galore.residual": "none",
    "galore.residual_percent": 0.0,
    "galore.stagger_refresh": False,
    "galore.first_basis": "gradient",
    "galore.layerwise": False,
    "galore.share_output_heads": False,
}
FIXED_SCALE: dict[str, Any] = {"galore.scale": 10.0, "galore.plain_lr_ratio": 1.0}
"""What the papers' methods begin with."""
PACKAGED: dict[str, Any] = {
    **GALORE,
    "galore.stochastic_rounding": False,
    "galore.diagnose_refreshes": 0,
    "galore.state_bits": 32,
    "galore.basis_bits": 32,
    "galore.plain_state_bits": 32,
    "galore.max_grad_norm": None,
}
"""What the optimizers of other packages do; their state has the type of the gradients."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapters of methods ``lora`` and ``dora``: a weight moves by ``alpha / rank`` times the product of two.

    With ``use_rslora`` it moves by ``alpha / sqrt(rank)`` times it (Kalajdzievski 2023, arXiv 2312.03732).
    """

    rank: int = knob(32, "Rank of the adapters of lora and dora.", trajectory=True, minimum=1)
    alpha: int | None = knob(
        None,
        f"Adapters are scaled by alpha / rank; unset means 2 x rank, or {RANK_STABILISED_ALPHA} under use_rslora.",
        trajectory=True,
        minimum=1,
    )
    use_rslora: bool = knob(
        False, "Scale adapters by alpha / sqrt(rank) in place of alpha / rank, as in peft.", trajectory=True
    )
    dropout: float = knob(0.0, "Share of an adapter's inputs that is dropped in training.", minimum=0.0)
    target_modules: str | list[str] = knob(
        ALL_LINEAR,
        "What gets adapters: all-linear (all but the output layer), one regex, or name endings, as in peft.",
        trajectory=True,
    )

    def __post_init__(self) -> None:
        """Check every field; see ``OptionError``."""
        check_fields("lora.", self)
        if self.alpha is None:  # files of a run hold the number
            object.__setattr__(self, "alpha", RANK_STABILISED_ALPHA if self.use_rslora else 2 * self.rank)
        if self.dropout >= 1.0:
            raise OptionError("lora.dropout", self.dropout, "a share of at least 0 and below 1")
        check_target_modules("lora.target_modules", self.target_modules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One method.

    Attributes:
        title: for model cards: its name, and in brackets what it trains.
        defaults: what the method means, by dotted key: below YAML, and not to be contradicted by it.
        suggested: settings that the method begins with, by dotted key: below YAML, which may change them.
        block: the block of settings that this method reads (``galore``, ``lora``); others leave it alone.
        package, extra: what must be installed, by import name, and the extra of this project that brings it.
        cuda: runs on NVIDIA GPUs alone.
        resumable: its optimizer state can be loaded again.
        instead: for a method that is not resumable, one that is, and how it compares.
        scale_power: a projected weight moves with ``lr * scale ** scale_power``.
        sharded: runs under FSDP and DeepSpeed.
        prepare: dotted name of the function that puts the method into a Trainer: (model, config, arguments) to
            ``training.methods.PreparedModel``; it raises ``OptionError`` for what does not fit.
        finish: dotted name of the function that is called with (trainer, config, output folder) after training, before
            the model is saved.
    """

    title: str
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    suggested: dict[str, Any] = dataclasses.field(default_factory=dict)
    block: Literal["galore", "lora"] | None = None
    package: str | None = None
    extra: str = ""
    cuda: bool = False
    resumable: bool = True
    instead: str = ""
    scale_power: float = 1.0
    sharded: bool = False
    prepare: str
    finish: str | None = None


METHODS: dict[str, MethodSpec] = {
    "galore_plus": MethodSpec(
        title="GaLore+ (full-parameter training with projected gradients, one basis for all attention heads)",
        block="galore",
        sharded=True,
        prepare="galore_trainer.run.training.methods.prepare_galore",
    ),
    "galore": MethodSpec(
        title="GaLore (full-parameter training with projected gradients)",
        defaults=GALORE,
        suggested=FIXED_SCALE,
        block="galore",
        sharded=True,
        prepare="galore_trainer.run.training.methods.prepare_galore",
    ),
    "adamw": MethodSpec(
        title="AdamW (full-parameter training)",
        sharded=True,
        prepare="galore_trainer.run.training.methods.prepare_adamw",
    ),
    "adamw_8bit": MethodSpec(
        title="8-bit AdamW (full-parameter training, optimizer of bitsandbytes)",
        package="bitsandbytes",
        extra="bnb",
        cuda=True,
        prepare="galore_trainer.run.training.methods.prepare_adamw_8bit",
    ),
    "lora": MethodSpec(
        title="LoRA (low-rank adapters of peft, merged)",
        block="lora",
        package="peft",
        extra="peft",
        prepare="galore_trainer.run.training.methods.prepare_lora",
        finish="galore_trainer.run.training.methods.merge_lora",
    ),
    "dora": MethodSpec(
        title="DoRA (low-rank adapters of peft with magnitudes of their own, merged)",
        block="lora",
        package="peft",
        extra="peft",
        prepare="galore_trainer.run.training.methods.prepare_lora",
        finish="galore_trainer.run.training.methods.merge_lora",
    ),
    "galore_torch": MethodSpec(
        title="GaLore (full-parameter training with projected gradients, optimizer of galore-torch)",
        defaults=PACKAGED,
        suggested=FIXED_SCALE,
        block="galore",
        package="galore_torch",
        extra="parity",
        resumable=False,
        instead="galore, which takes the same steps and resumes",
        prepare="galore_trainer.run.training.methods.prepare_package",
    ),
    "apollo": MethodSpec(
        title="APOLLO (full-parameter training, gradients scaled channel by channel, optimizer of apollo-torch)",
        # random projections, drawn without a look at the gradient; the scaling is written for the shorter side alone
        defaults={**PACKAGED, "galore.svd": "randomized", "galore.warm_start": False, "galore.proj_type": "std"},
        suggested={"galore.scale": 1.0, "galore.plain_lr_ratio": 1.0},
        block="galore",
        package="apollo_torch",
        extra="apollo",
        resumable=False,
        instead="galore_plus, which resumes",
        scale_power=0.5,
        prepare="galore_trainer.run.training.methods.prepare_package",
    ),
    "fira": MethodSpec(
        title="Fira (full-parameter training, projected gradients and what they lose, optimizer of fira)",
        # at the rank of the shorter side the norms of proj_type left are taken along the wrong dimension
        defaults={**PACKAGED, "galore.proj_type": "std"},
        suggested={"galore.scale": 1.0, "galore.plain_lr_ratio": 1.0},
        block="galore",
        package="fira",
        extra="fira",
        resumable=False,
        instead="galore_plus, which resumes",
        prepare="galore_trainer.run.training.methods.prepare_package",
    ),
    "galore_plus_paper": MethodSpec(
        title="GaLore+ as in its paper (full-parameter training with projected gradients and a sparse residual)",
        defaults={"galore.residual": "sparse"},
        suggested=FIXED_SCALE,
        block="galore",
        sharded=True,
        prepare="galore_trainer.run.training.methods.prepare_galore",
    ),
}
METHOD_DEFAULTS = {name: {**spec.suggested, **spec.defaults} for name, spec in METHODS.items()}
"""What each method puts below YAML, by dotted key."""


def resolve(name: str) -> Callable[..., Any]:
    """Import the function that ``prepare`` or ``finish`` of a method names: settings alone need no torch."""
    function: Callable[..., Any] = pkgutil.resolve_name(name)
    return function


def methods_reading(key: str) -> list[str]:
    """The methods that read the block of a dotted key; empty for a key that every method reads."""
    block = key.partition(".")[0]
    return [name for name, spec in METHODS.items() if spec.block == block]


def require_package(option: str, value: str, package: str, extra: str) -> None:
    """Raise ``OptionError`` with the command that installs a package that is missing or too old."""
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        wanted = f"the package {name} installed"
        raise OptionError(option, value, wanted, f"Run: pip install 'galore-trainer[{extra}]'")
    check_versions(extra)


def check_backend(method: str, backend: str) -> None:
    """Refuse FSDP and DeepSpeed under a method that needs whole weights on every process."""
    if backend in SHARDED and not METHODS[method].sharded:
        raise OptionError(
            "backend",
            backend,
            f"one process or DDP under method {method!r}",
            "Its parameters must be whole on every process: use `--launch-config ddp`, `torchrun --nproc-per-node N` "
            "or `accelerate launch --multi_gpu`.",
        )


def check_resumable(method: str, resume: str) -> None:
    """Refuse ``--resume`` under a method whose saved optimizer state cannot be loaded."""
    if not METHODS[method].resumable:
        raise OptionError(
            "resume",
            resume,
            f"a new run under method {method!r}",
            "That package keeps Python objects in its optimizer state, which the Trainer does not load. Start anew "
            f"with --overwrite, or use --method {METHODS[method].instead}.",
        )
