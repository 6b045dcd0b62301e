"""``import_state``: a checkpoint of one process becomes one of the backend that this process was launched under.

The backend itself writes the new checkpoint: a callback fills the Trainer just before its first step and has it save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState

from galore_trainer.errors import OptionError
from galore_trainer.hf.backend import SHARDING, training_backend
from galore_trainer.hf.callback import unwrap_optimizer
from galore_trainer.hf.checkpoints import (
    OPTIMIZER,
    SCHEDULER,
    WHOLE_WEIGHTS,
    check_importable,
    check_state,
)
from galore_trainer.hf.reading import OPTION, TRAINER, load_tensors
from galore_trainer.layouts.find import is_cut, local, shard_of
from galore_trainer.targets.names import logical_name


def import_state(trainer: Trainer, checkpoint: str | Path) -> Path:
    """Write a whole checkpoint as the launched backend writes its own, for ``resume_from_checkpoint`` under it.

    Every process calls it with a Trainer that has not trained; the Trainer cannot be used afterwards. The global batch
    (processes x micro-batch x accumulation) should stay the same, because the Trainer finds its place in the data by
    the number of steps.

    Args:
        trainer: made with ``attach`` or ``galore_plugin``, under FSDP2 or DeepSpeed.
        checkpoint: from ``export_state``, or of one process or DDP.

    Returns:
        The new ``checkpoint-N`` in the Trainer's ``output_dir``.

    Raises:
        OptionError: a checkpoint that is not whole or of another method, an ``output_dir`` with checkpoints, or a
            launch under which ``checkpoint`` is resumed as it is.
    """
    source, args = Path(checkpoint).expanduser(), trainer.args
    step = check_importable(checkpoint)
    if training_backend(args) not in SHARDING:
        way_out = f"One process and DDP need no import: resume from {checkpoint} itself."
        raise OptionError("backend", training_backend(args), "FSDP2 or DeepSpeed", way_out)
    if args.save_only_model:
        raise OptionError("save_only_model", True, "false, as the state is to be saved")
    target = Path(str(args.output_dir)) / f"checkpoint-{step}"
    if any(target.parent.glob("checkpoint-*")):
        way_out = "Its checkpoints might be removed by save_total_limit: give another one."
        raise OptionError("output_dir", str(target.parent), "a folder without checkpoints", way_out)
    callback = _ImportCallback(trainer, source)
    trainer.add_callback(callback)
    try:
        trainer.train()
    except _Imported:
        return target
    finally:
        trainer.remove_callback(callback)
    raise AssertionError("the Trainer did not tell its callbacks that it began")


class _Imported(Exception):
    """Ends ``Trainer.train`` before its first step."""


class _ImportCallback(TrainerCallback):
    """Loads a checkpoint into a Trainer before its first step, saves it and raises ``_Imported``."""

    def __init__(self, trainer: Trainer, source: Path) -> None:
        self.trainer, self.source = trainer, source

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, source = self.trainer, self.source
        saved = load_tensors(source / OPTIMIZER)
        check_state(source, saved)
        weights, model = Weights(source), trainer.accelerator.unwrap_model(trainer.model)
        check_shapes(model, weights)
        # the optimizer first, because it refuses a state that does not fit
        unwrap_optimizer(trainer.optimizer).load_whole(saved, weights)
        put_weights(model, weights)
        assert trainer.lr_scheduler is not None
        trainer.lr_scheduler.load_state_dict(torch.load(source / SCHEDULER, weights_only=True))
        trainer.state = TrainerState.load_from_json(str(source / TRAINER))
        trainer.state.train_batch_size = args.train_batch_size
        if trainer.is_deepspeed_enabled:
            # the engine names its folder by its own count of steps
            engine: Any = trainer.model_wrapped
            engine.global_steps = trainer.state.global_step
            engine.global_samples = engine.global_steps * engine.train_batch_size()
        trainer._load_rng_state(str(source))
        trainer._save_checkpoint(trainer.model_wrapped, trial=None)
        trainer.accelerator.wait_for_everyone()
        raise _Imported


class Weights(Mapping[str, Tensor]):
    """The weights in a checkpoint by logical name; ``weights[name]`` reads one from its file.

    Args:
        folder: the checkpoint.

    Attributes:
        shapes: shapes of all weights by logical name.

    Raises:
        OptionError: there are no weights, or (at ``weights[name]``) there is none of this name.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._read: dict[str, Any] = {}
        for path in sorted(folder.iterdir()):
            if not WHOLE_WEIGHTS.fullmatch(path.name) or path.suffix == ".json":
                continue
            if path.suffix == ".safetensors":
                file: Any = safe_open(path, framework="pt")
                for name in file.keys():  # noqa: SIM118
                    self._read[logical_name(name)] = (file.get_tensor, name)
                    self.shapes[logical_name(name)] = tuple(file.get_slice(name).get_shape())
            else:
                loaded = load_tensors(path)
                self._read |= {logical_name(name): (loaded.__getitem__, name) for name in loaded}
                self.shapes |= {logical_name(name): tuple(w.shape) for name, w in loaded.items()}
        if not self._read:
            raise OptionError(OPTION, str(folder), "a checkpoint with the model's weights")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            raise OptionError(OPTION, str(self.folder), f"one with the weight {name}", "Is it of the same model?")
        read, key = self._read[name]
        return read(key)

    def __contains__(self, name: object) -> bool:
        return name in self._read

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def check_shapes(model: nn.Module, weights: Weights) -> None:
    """Raise ``OptionError`` where a weight of a wrapped model has another shape in a checkpoint or is missing."""
    parameters: Any = model.named_parameters()
    for full_name, p in parameters:
        name = logical_name(full_name)
        wanted, got = tuple(getattr(p, "ds_shape", p.shape)), weights.shapes.get(name)
        if got != wanted:
            holds = f"{name} of shape {list(got)}" if got else f"no weight {name}"
            raise OptionError(OPTION, f"{weights.folder}, {holds}", f"shape {list(wanted)}", "Is it of the same model?")


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole weights and persistent buffers into a model, in the model's dtypes. Every process calls it.

    Args:
        model: wrapped by FSDP2 or DeepSpeed.
        weights: by logical name.
    """
    parameters: Any = model.named_parameters()
    for full_name, p in parameters:
        whole = weights[logical_name(full_name)]
        if is_cut(p):
            shard, local_rows = shard_of(p, full_name), local(p)
            local_rows.copy_(whole.reshape(-1)[shard.start : shard.stop].view(local_rows.shape))
        elif hasattr(p, "ds_id"):  # ZeRO-3, which writes the weight of rank 0 back to all ranks
            import deepspeed

            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                if p.numel():  # it is gathered on this rank
                    p.data.copy_(whole)
        else:
            p.data.copy_(whole)
    for full_name, buffer in model.named_buffers():
        if logical_name(full_name) in weights:
            buffer.copy_(weights[logical_name(full_name)])
