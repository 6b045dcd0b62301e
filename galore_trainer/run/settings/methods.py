"""The methods of training: what each one means, which settings it reads, what it needs, how it is put into a Trainer.

A new method is one entry of ``METHODS`` and one name in ``Method``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from galore_trainer.errors import OptionError

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from galore_trainer.run.settings.run_config import RunConfig

Method = Literal["galore_plus", "galore", "adamw", "adamw_8bit", "lora", "dora", "galore_torch"]


class Prepared(NamedTuple):
    """A model as it goes into the Trainer, and the Trainer's further keyword arguments."""

    model: Any
    plugin: dict[str, Any]


def _prepare_adamw(model: Any, config: RunConfig, arguments: TrainingArguments) -> Prepared:
    return Prepared(model, {})


def _prepare_galore(model: Any, config: RunConfig, arguments: TrainingArguments) -> Prepared:
    from galore_trainer.hf.build import galore_plugin
    from galore_trainer.optim.groups import plan_weights

    plan_weights(model, config.galore)  # refuses now what the Trainer would meet after the first scoring
    return Prepared(model, galore_plugin(config.galore, arguments))


def _prepare_adamw_8bit(model: Any, config: RunConfig, arguments: TrainingArguments) -> Prepared:
    from bitsandbytes.optim import AdamW

    # optim_bits rather than AdamW8bit: the Trainer then keeps 32 bits for embeddings, as bitsandbytes asks for
    return Prepared(model, {"optimizer_cls_and_kwargs": (AdamW, {**_adam(arguments), "optim_bits": 8})})


def _prepare_lora(model: Any, config: RunConfig, arguments: TrainingArguments) -> Prepared:
    from galore_trainer.run.models.adapters import add_adapters

    return Prepared(add_adapters(model, config.lora, seed=arguments.seed, dora=config.method == "dora"), {})


def _merge_lora(trainer: Trainer, config: RunConfig, output: Path) -> None:
    from galore_trainer.run.models.adapters import merge_adapters
    from galore_trainer.run.models.model import public_name

    merge_adapters(trainer, output / ADAPTER, base_model=public_name(config.model_name_or_path))


def _prepare_galore_torch(model: Any, config: RunConfig, arguments: TrainingArguments) -> Prepared:
    from galore_trainer.run.training.galore_torch import GaLoreTorchFactory, torch_groups

    settings = {"config": config.galore, "weight_decay": arguments.weight_decay, **_adam(arguments)}
    torch_groups(model, config.galore, lr=arguments.learning_rate, weight_decay=0.0)  # refuses now, as above
    return Prepared(model, {"optimizer_cls_and_kwargs": (GaLoreTorchFactory, settings)})


def _adam(arguments: TrainingArguments) -> dict[str, Any]:
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}


ADAPTER = "adapter"
"""The folder, inside a run's, of the adapter that lora and dora trained, beside the merged model."""
GALORE: dict[str, Any] = {
    "galore.head_sharing": "joint",
    "galore.svd": "exact",
    "galore.momentum_transfer": "keep",
    "galore.residual_percent": 0.0,
    "galore.stagger_refresh": False,
    "galore.first_basis": "gradient",
    "galore.layerwise": False,
    "galore.share_output_heads": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One method.

    Attributes:
        title: for model cards: its name, and in brackets what it trains.
        defaults: what the method means, by dotted key: below YAML, and not to be contradicted by it.
        block: the block of settings that this method reads (``galore``, ``lora``); others leave it alone.
        package, extra: what must be installed, by import name, and the extra of this project that brings it.
        cuda: runs on NVIDIA GPUs alone.
        resumable: its optimizer state can be loaded again.
        sharded: runs under FSDP and DeepSpeed.
        prepare: (model, config, arguments) to what the Trainer gets; raises ``OptionError`` for what does not fit.
        finish: called with (trainer, config, output folder) after training, before the model is saved.
    """

    title: str
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    block: Literal["galore", "lora"] | None = None
    package: str | None = None
    extra: str = ""
    cuda: bool = False
    resumable: bool = True
    sharded: bool = False
    prepare: Callable[[Any, RunConfig, TrainingArguments], Prepared]
    finish: Callable[[Trainer, RunConfig, Path], None] | None = None


METHODS: dict[str, MethodSpec] = {
    "galore_plus": MethodSpec(
        title="GaLore+ (full-parameter training with projected gradients, one basis for all attention heads)",
        block="galore",
        sharded=True,
        prepare=_prepare_galore,
    ),
    "galore": MethodSpec(
        title="GaLore (full-parameter training with projected gradients)",
        defaults=GALORE,
        block="galore",
        sharded=True,
        prepare=_prepare_galore,
    ),
    "adamw": MethodSpec(title="AdamW (full-parameter training)", sharded=True, prepare=_prepare_adamw),
    "adamw_8bit": MethodSpec(
        title="8-bit AdamW (full-parameter training, optimizer of bitsandbytes)",
        package="bitsandbytes",
        extra="bnb",
        cuda=True,
        prepare=_prepare_adamw_8bit,
    ),
    "lora": MethodSpec(
        title="LoRA (low-rank adapters of peft, merged)",
        block="lora",
        package="peft",
        extra="peft",
        prepare=_prepare_lora,
        finish=_merge_lora,
    ),
    "dora": MethodSpec(
        title="DoRA (low-rank adapters of peft with magnitudes of their own, merged)",
        block="lora",
        package="peft",
        extra="peft",
        prepare=_prepare_lora,
        finish=_merge_lora,
    ),
    "galore_torch": MethodSpec(
        title="GaLore (full-parameter training with projected gradients, optimizer of galore-torch)",
        defaults={
            **GALORE,
            "galore.stochastic_rounding": False,
            "galore.diagnose_refreshes": 0,
            "galore.state_bits": 32,
            "galore.basis_bits": 32,
            "galore.plain_state_bits": 32,
        },
        block="galore",
        package="galore_torch",
        extra="parity",
        resumable=False,
        prepare=_prepare_galore_torch,
    ),
}
METHOD_DEFAULTS = {name: spec.defaults for name, spec in METHODS.items()}


def require_package(option: str, value: str, package: str, extra: str) -> None:
    """Raise ``OptionError`` with the command that installs a missing package."""
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        wanted = f"the package {name} installed"
        raise OptionError(option, value, wanted, f"Run: pip install 'galore-trainer[{extra}]'")


def check_method(config: RunConfig, arguments: TrainingArguments) -> None:
    """Refuse a method whose package, device or kind of launch is not there, before anything is loaded.

    Raises:
        OptionError: naming what is missing and the way out.
    """
    from galore_trainer.hf.backend import training_backend

    spec = METHODS[config.method]
    if spec.package:
        require_package("method", config.method, spec.package, spec.extra)
    if spec.cuda and arguments.device.type != "cuda":
        device = f"{config.method} on {arguments.device.type}"
        raise OptionError("method", device, "an NVIDIA GPU for this method", "Here, use --method adamw.")
    check_backend(config.method, training_backend(arguments))


def check_backend(method: str, backend: str) -> None:
    """Refuse FSDP and DeepSpeed under a method that needs whole weights on every process."""
    if backend in ("fsdp", "deepspeed") and not METHODS[method].sharded:
        raise OptionError(
            "backend", backend, f"one process or DDP under method {method!r}",
            "Its parameters must be whole on every process: use `--launch-config ddp`, `torchrun --nproc-per-node N` "
            "or `accelerate launch --multi_gpu`.",
        )  # fmt: skip


def check_resumable(method: str, resume: str) -> None:
    """Refuse ``--resume`` under a method whose saved optimizer state cannot be loaded."""
    if not METHODS[method].resumable:
        raise OptionError(
            "resume", resume, f"a new run under method {method!r}",
            "That package keeps Python objects in its optimizer state, which the Trainer does not load. Start anew "
            "with --overwrite, or use --method galore, which takes the same steps and resumes.",
        )  # fmt: skip
