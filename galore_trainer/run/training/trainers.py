"""The two trainers of a run: transformers' ``Trainer`` and TRL's ``SFTTrainer``, on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError
from galore_trainer.run.models.packing import PackedRows, PackingCollator, uses_flash
from galore_trainer.run.models.prompts import IGNORED, make_collator

if TYPE_CHECKING:
    from transformers import Trainer

    from galore_trainer.run.settings.run_config import RunConfig

Rows = Sequence[dict[str, list[int]]] | PackedRows


def build_trainer(
    config: RunConfig, arguments: Any, model: Any, tokenizer: Any, rows: Rows, held_out: Rows | None, **plugin: Any
) -> Trainer:
    """Build the trainer that ``config.trainer`` names.

    Args:
        config: the run.
        arguments: from ``training_arguments``.
        model: on its device.
        tokenizer: of the model.
        rows: ``input_ids`` and ``labels`` to train on, as ``encode_all`` or ``PackedRows`` makes them.
        held_out: the same, for the loop's own evaluation.
        plugin: further keyword arguments of the Trainer.

    Raises:
        OptionError: TRL refuses the settings; its own words are passed on.
    """
    common = {"model": model, "args": arguments, "processing_class": tokenizer, **plugin}
    if config.trainer == "trl":
        return _sft_trainer(train_dataset=_data_set(rows), eval_dataset=_data_set(held_out), **common)
    from transformers import Trainer

    class RunTrainer(_LoadsTiedWeights, Trainer):
        """Transformers' Trainer as a run uses it."""

    multiple = 1 if arguments.device.type == "cpu" else 8
    if config.packing:
        packing = PackingCollator(tokenizer.pad_token_id, multiple, joined=uses_flash(model))
        return RunTrainer(train_dataset=rows, eval_dataset=held_out, data_collator=packing, **common)
    collator = make_collator(tokenizer, pad_to_multiple_of=multiple)
    return RunTrainer(train_dataset=rows, eval_dataset=held_out, data_collator=collator, **common)


class _LoadsTiedWeights:
    """A Trainer that does not call a weight missing whose other name was loaded, as an output layer's is.

    Files hold a tied weight under one of its names.
    """

    def _issue_warnings_after_load(self: Any, load_result: Any) -> None:
        parameters = {name: id(p) for name, p in self.model.named_parameters(remove_duplicate=False)}
        missing = load_result.missing_keys
        loaded = {number for name, number in parameters.items() if name not in missing}
        lost = [name for name in missing if parameters.get(name) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=lost))  # type: ignore[misc]


def _sft_trainer(**settings: Any) -> Trainer:
    from datasets.utils.logging import disable_progress_bar
    from trl import SFTTrainer

    class Quiet(_LoadsTiedWeights, SFTTrainer):
        """Writes no model card of its own beside ours, and reports to nobody."""

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            pass

        def _send_telemetry(self) -> None:
            pass

    arguments = settings["args"]
    if arguments.activation_offloading and arguments.device.type == "cpu":
        raise OptionError("activation_offloading", True, "a GPU whose memory it would spare", "Remove it here.")
    if arguments.disable_tqdm:
        disable_progress_bar()
    try:
        return Quiet(**settings)
    except ValueError as error:
        raise OptionError("trainer", "trl", "settings that TRL accepts", f"It says: {error}") from error


def _data_set(rows: Rows | None) -> Any:
    """Rows as TRL reads them: it makes labels from a mask that is 1 where the loss is taken."""
    from datasets import Dataset

    if rows is None:
        return None
    return Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "completion_mask": [int(label != IGNORED) for label in row["labels"]]}
            for row in (rows[i] for i in range(len(rows)))
        ]
    )
