"""``GaLoreCallback``: reports what is projected, its error and its cost; stops a run whose weights do not change."""

from __future__ import annotations

import logging
import sys
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from galore_trainer.errors import OptionError
from galore_trainer.hf.arguments import check_kept, overruled, rebuilt_schedule
from galore_trainer.hf.backend import check_averaged, check_clipping, training_backend
from galore_trainer.hf.checkpoints import lacks_state, saved_steps
from galore_trainer.hf.membership import Membership
from galore_trainer.hf.table import show_weights
from galore_trainer.layouts.shard import checksum
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.guards import some_of
from galore_trainer.optim.param_groups import scale_of

logger = logging.getLogger(__name__)
Caller = TypeVar("Caller")
STEPS_TO_MOVE = 3
"""Steps with a learning rate above 0 after which every projected weight must have changed."""


class GaLoreCallback(TrainerCallback):
    """Reports on a ``GaLoreAdamW`` inside a Trainer; ``attach`` and ``galore_plugin`` add it.

    At the start it prints one table of projected, plain and frozen weights. Every log gets

    - ``galore/projection_error``: mean over matrices of ||G - lift(project(G))|| / ||G|| at their newest refresh,
    - ``galore/refresh_seconds`` and ``galore/update_seconds``: seconds since the last log, on this process; the update
      includes plain parameters,
    - ``galore/state_bytes``: bytes of optimizer state on this process,
    - ``grad_norm``, before clipping, where the optimizer clips (``max_grad_norm``): it is read at a log alone, and the
      Trainer measures none of its own.

    They reach ``log_history``, every tracker (``report_to``) and every other callback, because the callback moves
    itself to the front of the Trainer's list.

    Args:
        print_table: whether to print the table.
        plugin: the keyword arguments of ``GaLoreFactory``, from ``galore_plugin``; their ``args`` are replaced by the
            Trainer's.

    Raises:
        OptionError: the Trainer's optimizer is not a ``GaLoreAdamW`` (for example because it dropped ``optimizers=``);
            it does not hold the weights that the model trains, at the start or after a later change; a checkpoint
            lacks the optimizer's state; an argument changed after ``galore_plugin``'s optimizer was made; several
            processes train without averaging gradients; the Trainer clips gradients, and the optimizer too.
        RuntimeError: a projected weight did not change in three steps with lr > 0 and a non-zero gradient.
    """

    def __init__(self, print_table: bool = True, *, plugin: dict[str, Any] | None = None) -> None:
        self.print_table, self._plugin = print_table, plugin
        self._reset()

    def _reset(self) -> None:
        """Drop everything that belongs to one call of ``train()``."""
        self._optimizer: GaLoreAdamW | None = None
        self._membership: Membership | None = None
        self.overruled = ""  # what a resumed checkpoint kept in place of what was asked for
        self._checksums: dict[str, torch.Tensor] = {}
        self._steps_with_lr = self._first_step = 0
        self._logged_seconds: dict[str, float] = {}
        self._reported_skips: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle keeps the arguments only: weights and optimizer belong to one call of ``train()``."""
        fresh = GaLoreCallback(self.print_table, plugin=self._plugin)
        return {**self.__dict__, **fresh.__dict__}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Use the Trainer's arguments, as ``galore_plugin`` may have got a copy; move to the front of the callbacks."""
        if self._plugin is not None:
            self._plugin["args"] = args
        self._move_to_front()

    def _move_to_front(self) -> None:
        """Move before the trackers, which the Trainer puts first, so that they see what ``on_log`` adds."""
        handler = _calling(CallbackHandler)
        if handler is not None and self in handler.callbacks:
            # the handler is iterating over this list: only callbacks that it has called already change their places
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the Trainer kept the optimizer and that it holds the model's weights; print the table."""
        self._move_to_front()
        self._reset()
        self._first_step = state.global_step
        optimizer = kwargs.get("optimizer")
        if self._plugin is not None and inner_optimizer(optimizer) is None:
            raise _other_optimizer(optimizer)
        self._optimizer = unwrap_optimizer(optimizer)
        if state.global_step and not self._optimizer.state:
            raise lacks_state(args, state.global_step)
        if self._plugin is not None:
            check_kept(self._optimizer, args)
        self.overruled = changed = overruled(self._optimizer)
        if changed and state.is_world_process_zero:
            logger.warning(
                "the checkpoint's settings go on: %s; begin a new run from its weights for others (model_name_or_path: "
                "the checkpoint's folder, no resume)",
                changed,
            )
        self._optimizer.settings_before_load = []
        if self._optimizer.config.max_grad_norm is not None:
            from transformers import Trainer

            check_clipping(self._optimizer.config, args)
            leave_norm_to_step(_calling(Trainer))
        if state.is_world_process_zero:
            tell_rebuilt_schedule(state, self._optimizer, kwargs.get("lr_scheduler"))
        if (model := kwargs.get("model")) is not None:
            check_averaged(model, args)
            self._membership = Membership(model, self._optimizer, training_backend(args))
            self._membership.check()
        self._logged_seconds = self._optimizer.stopwatch.seconds()
        if self._optimizer.config.layerwise and args.gradient_accumulation_steps > 1:
            logger.warning(
                "layer-wise mode over %d micro-batches: grad_norm, and what is clipped by it, is an unbiased estimate "
                "from one random direction of each weight; with one micro-batch on one process it is exact",
                args.gradient_accumulation_steps,
            )
        if self.print_table and state.is_world_process_zero:
            show_weights(self._optimizer, kwargs.get("model"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what the optimizer holds; keep checksums of the weights before the first step that should move them."""
        if self._membership is not None:
            self._membership.check()
        if self._optimizer is None or self._steps_with_lr >= STEPS_TO_MOVE:
            return
        if any(lr * scale > 0.0 for lr, scale in self._rates()):
            self._steps_with_lr += 1
            if self._steps_with_lr == 1:
                self._checksums = {name: checksum(p) for name, p in self._projected()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After three steps raise where a projected weight with a non-zero gradient has not changed."""
        if self._steps_with_lr != STEPS_TO_MOVE or not self._checksums:
            return
        before, self._checksums = self._checksums, {}
        unchanged = [
            name
            for name, p in self._projected()
            if self._has_had_gradient(name) and torch.equal(before[name], checksum(p))
        ]
        if unchanged:
            lr, scale = max(self._rates())
            raise RuntimeError(
                f"{len(unchanged)} projected weights did not change in {STEPS_TO_MOVE} steps, among them "
                f"{unchanged[0]}: lr {lr:.3g} x scale {scale:g} is too small for their precision, or something "
                "restores them. Raise learning_rate or galore.scale, or keep galore.stochastic_rounding on."
            )

    def _rates(self) -> list[tuple[float, float]]:
        """The learning rate and the scale of every projected weight."""
        assert self._optimizer is not None
        config, groups = self._optimizer.config, self._optimizer.param_groups
        return [
            (float(group["lr"]), scale_of(group, config, matrix))
            for group in groups
            if group["projected"]
            for of_weight in group["matrices"]
            for matrix in of_weight
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn of skipped steps that no log has reported, and of weights that never had a gradient.

        Raises:
            FloatingPointError: a parameter had no finite gradient in the last steps.
        """
        self._membership = None
        self._warn_of_skipped_steps()
        if self._optimizer is None or not self._optimizer.state or state.global_step <= self._first_step:
            return
        if (idle := self._optimizer.without_gradient()) and state.is_world_process_zero:
            logger.warning("these weights had no gradient in any step, and stay as they were: %s", some_of(idle))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add ``galore/...`` values to the log of a training step."""
        if self._optimizer is None or logs is None or "loss" not in logs:
            return
        seconds = self._optimizer.stopwatch.seconds()
        since_last_log = {name: total - self._logged_seconds.get(name, 0.0) for name, total in seconds.items()}
        self._logged_seconds = seconds
        added = {
            "galore/refresh_seconds": since_last_log.get("refresh", 0.0),
            "galore/update_seconds": since_last_log.get("update", 0.0) + since_last_log.get("plain", 0.0),
            "galore/state_bytes": sum(self._optimizer.state_bytes().values()),
        }
        errors = list(self._optimizer.projection_errors.values())
        if errors:
            added["galore/projection_error"] = torch.stack([e.to(errors[0].device) for e in errors]).mean().item()
        if self._optimizer.grad_norm is not None:
            added["grad_norm"] = self._optimizer.grad_norm.item()
        logs.update(added)
        # the Trainer has put a copy of the log into the history before it called
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)
        self._warn_of_skipped_steps()

    def _warn_of_skipped_steps(self) -> None:
        """Warn of steps skipped for a non-finite gradient, where their number has changed since the last warning."""
        skipped = self._optimizer.check_finite() if self._optimizer is not None else {}
        if skipped != self._reported_skips:
            worst = ", ".join(f"{n} ({c})" for n, c in sorted(skipped.items(), key=lambda x: -x[1])[:5])
            logger.warning("steps skipped for a non-finite gradient, so far: %s (%d parameters)", worst, len(skipped))
            self._reported_skips = skipped

    def _projected(self) -> list[tuple[str, torch.Tensor]]:
        assert self._optimizer is not None
        return [(name, p) for name, p in self._optimizer.projected_weights() if p.numel()]

    def _has_had_gradient(self, name: str) -> bool:
        assert self._optimizer is not None
        state = self._optimizer.state_of(name)
        return any(value.any().item() for key, value in state.items() if key.endswith("exp_avg"))


def tell_rebuilt_schedule(state: Any, optimizer: Any, scheduler: Any) -> None:
    """Warn, when training begins, where a resumed run's learning rate jumps; see ``rebuilt_schedule``."""
    if jump := rebuilt_schedule(state, optimizer, scheduler, saved_steps()):
        logger.warning("%s", jump)


def leave_norm_to_step(trainer: Any) -> None:
    """Let a Trainer measure no norm of gradients before a step that clips: it would read and write each of them.

    A Trainer whose ``max_grad_norm`` is 0 still calls ``clip_grad_norm_``, with an infinite limit, to log the norm.
    """
    if hasattr(trainer, "_get_grad_norm"):
        trainer._get_grad_norm = _norm_as_given


def _norm_as_given(model: Any, grad_norm: Any = None) -> Any:
    """In the place of ``Trainer._get_grad_norm``."""
    return grad_norm


def _calling(kind: type[Caller]) -> Caller | None:
    """The handler or Trainer that is calling; read from the stack, because transformers does not pass it."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def inner_optimizer(optimizer: Any) -> GaLoreAdamW | None:
    """The ``GaLoreAdamW`` inside accelerate's wrappers; None where there is none."""
    while optimizer is not None and not isinstance(optimizer, GaLoreAdamW):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _other_optimizer(optimizer: Any) -> OptionError:
    """The error where the Trainer did not make the optimizer of ``galore_plugin``."""
    made = type(getattr(optimizer, "optimizer", optimizer)).__name__
    return OptionError(
        "Trainer.create_optimizer",
        made,
        "the GaLoreAdamW of attach or galore_plugin",
        "The Trainer's class or its script makes an optimizer of its own: let its create_optimizer return "
        "super().create_optimizer(), or, on one process and under DDP, pass optimizers=(build_optimizer(model, config, "
        "lr=...), None) and callbacks=[GaLoreCallback()] in the place of attach.",
    )


def unwrap_optimizer(optimizer: Any) -> GaLoreAdamW:
    """The ``GaLoreAdamW`` inside accelerate's wrappers; ``OptionError`` where there is none."""
    inner = inner_optimizer(optimizer)
    if inner is None:
        raise OptionError(
            "optimizers",
            type(optimizer).__name__,
            "a GaLoreAdamW in the Trainer that has GaLoreCallback",
            "Make the Trainer without optimizers= and GaLoreCallback, then call attach(trainer, config) or pass "
            "**galore_plugin(config, args): the Trainer keeps both where it drops optimizers=.",
        )
    return inner
