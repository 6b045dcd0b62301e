"""What a plugin meets inside axolotl 0.19, ms-swift 4.6, LLaMA-Factory 0.9.5 and unsloth 2026.10, by their signatures.

They are written from the packages' published interfaces, for machines on which the packages are not installed. Each
function returns modules by name, for ``sys.modules``.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, Seq2SeqTrainer, Trainer, TrainingArguments

Modules = dict[str, types.ModuleType]


def modules(**contents: dict[str, Any]) -> Modules:
    """Modules by dotted name (``a__b`` is ``a.b``), those above them included."""
    made: Modules = {}
    for name, names in contents.items():
        parts = name.split("__")
        for i in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i]))).__path__ = []
            if i > 1:
                setattr(made[".".join(parts[: i - 1])], parts[i - 1], made[".".join(parts[:i])])
        vars(made[".".join(parts)]).update(names)
    return made


# ------------------------------------------------------------------------------------------ axolotl


class BasePlugin:
    """The hooks of axolotl's plugins that concern settings, optimizers and callbacks."""

    def get_input_args(self) -> str | None:
        return None

    def create_optimizer(self, cfg: Any, trainer: Any) -> Any:
        return None

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []


class PluginManager:
    """Loads plugins by name and calls their hooks."""

    def __init__(self) -> None:
        self.plugins: dict[str, BasePlugin] = {}

    def register(self, plugin_name: str) -> None:
        module, name = plugin_name.rsplit(".", 1)
        self.plugins[plugin_name] = getattr(importlib.import_module(module), name)()

    def get_input_args(self) -> list[str]:
        return [name for plugin in self.plugins.values() if (name := plugin.get_input_args())]

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [
            callback for plugin in self.plugins.values() for callback in plugin.add_callbacks_post_trainer(cfg, trainer)
        ]


class OptimizerMixin(Trainer):
    """How axolotl's Trainers call a factory of optimizers: with their arguments after the model."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            factory, settings = self.optimizer_cls_and_kwargs
            self.optimizer = factory()(self.model if model is None else model, self.args, **settings)
        return self.optimizer or super().create_optimizer(model)


def axolotl() -> Modules:
    return modules(
        axolotl__integrations__base={"BasePlugin": BasePlugin, "PluginManager": PluginManager},
        axolotl__core__trainers__mixins__optimizer={"OptimizerMixin": OptimizerMixin},
    )


# ------------------------------------------------------------------------------------------ ms-swift


class OptimizerCallback:
    """Makes the optimizer of a Trainer of ms-swift."""

    def __init__(self, args: Any, trainer: Any) -> None:
        self.args, self.trainer = args, trainer

    def create_optimizer(self, model: Any = None) -> Any:
        return Trainer.create_optimizer(self.trainer, *([] if model is None else [model]))


@dataclasses.dataclass
class SwiftArguments(TrainingArguments):
    """Arguments of ms-swift that concern its optimizers."""

    optimizer: str | None = None
    use_galore: bool = False
    galore_rank: int = 128
    vit_lr: float | None = None
    max_epochs: int | None = None  # read by every Trainer once ms-swift is imported


def swift_trainer(optimizers_map: dict[str, Any]) -> type[Trainer]:
    """A Trainer that asks ``optimizers_map`` for its optimizer, as ms-swift's do."""

    class SwiftTrainer(Trainer):
        def __init__(self, model: Any, args: Any, **more: Any) -> None:
            self.optimizer_callback = optimizers_map[args.optimizer or "default"](args, self)
            super().__init__(model=model, args=args, **more)

        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = self.optimizer_callback.create_optimizer(model=model)
            self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
            return self.optimizer

    return SwiftTrainer


def swift() -> Modules:
    names = {"OptimizerCallback": OptimizerCallback, "optimizers_map": {"default": OptimizerCallback}}
    return modules(swift__optimizers=names)


# ------------------------------------------------------------------------------------------ LLaMA-Factory, unsloth


class CustomSeq2SeqTrainer(Seq2SeqTrainer):
    """LLaMA-Factory's Trainer of its stage sft."""

    def __init__(self, finetuning_args: Any, processor: Any = None, **kwargs: Any) -> None:
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)
        self.finetuning_args = finetuning_args

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            self.optimizer = self.finetuning_args.custom_optimizer(self.model)
        return super().create_optimizer(*args, **kwargs)


def llamafactory(run: Callable[[type[Trainer]], Trainer]) -> Modules:
    """LLaMA-Factory whose ``run_exp`` calls ``run`` with the Trainer that its workflow names."""
    made = modules(
        llamafactory__train__sft__workflow={"CustomSeq2SeqTrainer": CustomSeq2SeqTrainer},
        llamafactory__train__tuner={},
    )
    workflow = made["llamafactory.train.sft.workflow"]
    made["llamafactory.train.tuner"].run_exp = lambda args=None, callbacks=None: run(workflow.CustomSeq2SeqTrainer)
    return made


class FastLanguageModel:
    """Loads a model and its tokenizer."""

    @staticmethod
    def from_pretrained(model_name: str, full_finetuning: bool = False, **settings: Any) -> tuple[Any, Any]:
        assert full_finetuning
        return AutoModelForCausalLM.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)


def unsloth() -> Modules:
    from trl import SFTConfig, SFTTrainer

    class UnslothTrainingArguments(SFTConfig):
        def __init__(self, embedding_learning_rate: float | None = None, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.embedding_learning_rate = embedding_learning_rate

    class UnslothTrainer(SFTTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            return super().create_optimizer(*([] if model is None else [model]))

    names = {
        "FastLanguageModel": FastLanguageModel,
        "UnslothTrainer": UnslothTrainer,
        "UnslothTrainingArguments": UnslothTrainingArguments,
    }
    return modules(unsloth=names)
