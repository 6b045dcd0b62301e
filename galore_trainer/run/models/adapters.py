"""LoRA and DoRA by peft: adapters on the linear layers, saved by themselves and merged into the model at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from galore_trainer.run.settings.methods import LoraSettings

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_adapters(model: Any, settings: LoraSettings, *, seed: int, dora: bool) -> Any:
    """Freeze a model and put adapters into it, in place; they are float32 whatever the weights are.

    Args:
        model: a transformers model.
        settings: rank, alpha, scaling, dropout and targets, as peft understands them.
        seed: of the adapters' random start.
        dora: give each adapted matrix a magnitude of its own.

    Returns:
        The ``peft.PeftModel`` around ``model``.

    Raises:
        OptionError: targets that peft does not find, or that could not be merged.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import set_seed

    assert settings.alpha is not None, "LoraSettings fills it in"
    set_seed(seed)
    model.name_or_path = ""  # peft would ask the hub about this name at every checkpoint
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        use_dora=dora,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        wanted = "linear layers of this model, as peft names them"
        raise OptionError("lora.target_modules", settings.target_modules, wanted, f"peft says: {error}") from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.get_text_config().tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise OptionError(
            "lora.target_modules",
            settings.target_modules,
            "neither the embeddings nor the output layer of this model",
            "They share one weight: an adapter of the one would be merged into both.",
        )
    return adapted


def merge_adapters(trainer: Trainer, folder: Path, *, base_model: str) -> None:
    """Save the adapter, merge it, and give the trainer the merged model, which loads without peft.

    Args:
        trainer: its model is a ``PeftModel``; afterwards the model that was adapted.
        folder: of the adapter.
        base_model: what the adapter's configuration names as its base.
    """
    adapted: Any = trainer.model
    if trainer.args.should_save:
        adapted.peft_config[adapted.active_adapter].base_model_name_or_path = base_model
        adapted.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's template; the model's own card is beside it
    trainer.model = trainer.model_wrapped = adapted.merge_and_unload()


def load_adapted(folder: Path, base: str | None, **loading: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model and merge an adapter into it.

    Args:
        folder: of the adapter.
        base: the model that it was trained on; None takes the one that the adapter names.
        loading: as for ``load_model``.

    Returns:
        The merged model, on the CPU, and its tokenizer.

    Raises:
        OptionError: no base, or no weights of an adapter that fit it.
    """
    from peft import PeftModel

    from galore_trainer.run.models.model import OPTION, load_model

    wanted = "an adapter that peft can put into its model"
    try:
        base = base or json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not base:
        raise OptionError(OPTION, str(folder), wanted, f"Its {ADAPTER_CONFIG} names no base_model_name_or_path.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise OptionError(OPTION, str(folder), wanted, f"It has no {ADAPTER_WEIGHTS}.")
    model, tokenizer = load_model(base, **loading)
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
        return adapted.merge_and_unload(), tokenizer
    except Exception as error:  # peft raises many kinds of errors for what does not fit
        raise OptionError(OPTION, str(folder), wanted, f"peft says: {one_line(error)}") from error
