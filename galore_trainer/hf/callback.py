"""``GaLoreCallback``: tells what is projected, what that loses and costs; stops a run that stands still."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from galore_trainer.errors import OptionError
from galore_trainer.hf.arguments import check_kept, overruled
from galore_trainer.hf.backend import check_averaged, training_backend
from galore_trainer.hf.checkpoints import lacks_state
from galore_trainer.hf.membership import Membership
from galore_trainer.hf.table import weight_table
from galore_trainer.layouts.shard import checksum
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.guards import some_of
from galore_trainer.optim.param_groups import scale_of

logger = logging.getLogger(__name__)
STEPS_TO_MOVE = 3


class GaLoreCallback(TrainerCallback):
    """Reports on a ``GaLoreAdamW`` inside a Trainer; ``galore_plugin`` adds it by itself.

    At the start it prints one table of projected, plain and frozen weights. Every log gets

    - ``galore/projection_error``: mean over matrices of ||G - lift(project(G))|| / ||G|| at their newest refresh,
    - ``galore/refresh_seconds`` and ``galore/update_seconds``: since the last log (update: plain parameters too),
    - ``galore/state_bytes``: optimizer state on this process.

    They reach ``log_history``, every tracker (``report_to``) and every other callback: it goes to the front of the
    Trainer's list.

    Args:
        print_table: whether to print the table.
        plugin: the keyword arguments of ``GaLoreFactory``, from ``galore_plugin``; they get the Trainer's own ``args``.

    Raises:
        OptionError: the Trainer's optimizer is not a ``GaLoreAdamW`` (for example because it dropped ``optimizers=``),
            or it does not hold the weights that the model trains, at the start or after a later change; the state of
            the optimizer is missing in a checkpoint; an argument changed after ``galore_plugin``'s optimizer was made;
            several processes train without averaging gradients.
        RuntimeError: a projected weight did not change in three steps with lr > 0 and a non-zero gradient.
    """

    def __init__(self, print_table: bool = True, *, plugin: dict[str, Any] | None = None) -> None:
        self.print_table, self._plugin = print_table, plugin
        self._forget()

    def _forget(self) -> None:
        """Become what it was before any training."""
        self._optimizer: GaLoreAdamW | None = None
        self._membership: Membership | None = None
        self._before: dict[str, torch.Tensor] = {}
        self._steps_with_lr = self._first_step = 0
        self._logged: dict[str, float] = {}
        self._skipped: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle knows no training: neither its weights nor its optimizer."""
        fresh = GaLoreCallback(self.print_table, plugin=self._plugin)
        return {**self.__dict__, **fresh.__dict__}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the Trainer's arguments, of which the plugin may have seen a copy; go to the front of the callbacks."""
        if self._plugin is not None:
            self._plugin["args"] = args
        self._go_first()

    def _go_first(self) -> None:
        """Stand before the trackers, which the Trainer puts first and which read a log as they find it."""
        handler = _calling_handler()
        if handler is not None and self in handler.callbacks:
            handler.callbacks.remove(self)  # moves those before it, which were called, and nothing after it
            handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the Trainer kept the optimizer and that it holds the model's weights; print the table."""
        self._go_first()
        self._forget()
        self._first_step = state.global_step
        self._optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if state.global_step and not self._optimizer.state:
            raise lacks_state(args, state.global_step)
        if self._plugin is not None:
            check_kept(self._optimizer, args)
        if (changed := overruled(self._optimizer)) and state.is_world_process_zero:
            logger.warning(
                "the checkpoint's settings go on: %s; begin a new run from its weights for others (model_name_or_path: "
                "the checkpoint's folder, no resume)",
                changed,
            )
        self._optimizer.asked = []
        if (model := kwargs.get("model")) is not None:
            check_averaged(model, args)
            self._membership = Membership(model, self._optimizer, training_backend(args))
            self._membership.check()
        self._logged = self._optimizer.stopwatch.seconds()
        if self._optimizer.config.layerwise and args.gradient_accumulation_steps > 1:
            logger.warning(
                "layer-wise mode over %d micro-batches: grad_norm, and what is clipped by it, is an unbiased estimate "
                "from one random direction of each weight; with one micro-batch on one process it is exact",
                args.gradient_accumulation_steps,
            )
        if self.print_table and state.is_world_process_zero:
            print(weight_table(self._optimizer, kwargs.get("model")), flush=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what the optimizer holds; note the weights before the first step that should move them."""
        if self._membership is not None:
            self._membership.check()
        if self._optimizer is None or self._steps_with_lr >= STEPS_TO_MOVE:
            return
        config, groups = self._optimizer.config, self._optimizer.param_groups
        if any(g["projected"] and g["lr"] * scale_of(g, config) > 0.0 for g in groups):
            self._steps_with_lr += 1
            if self._steps_with_lr == 1:
                self._before = {name: checksum(p) for name, p in self._projected()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After three steps: every projected weight with a non-zero gradient must have changed."""
        if self._steps_with_lr != STEPS_TO_MOVE or not self._before:
            return
        before, self._before = self._before, {}
        still = [n for n, p in self._projected() if self._had_gradient(n) and torch.equal(before[n], checksum(p))]
        if still:
            assert self._optimizer is not None
            groups, config = self._optimizer.param_groups, self._optimizer.config
            lr, scale = max((float(g["lr"]), scale_of(g, config)) for g in groups if g["projected"])
            raise RuntimeError(
                f"{len(still)} projected weights did not change in {STEPS_TO_MOVE} steps, among them {still[0]}: "
                f"lr {lr:.3g} x scale {scale:g} is too small for their precision, or something "
                "restores them. Raise learning_rate or galore.scale, or keep galore.stochastic_rounding on."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of steps that no log has told of, and of weights that never had a gradient.

        It stops a run in whose last steps a parameter had no finite gradient.
        """
        self._membership = None
        self._tell_skipped()
        if self._optimizer is None or not self._optimizer.state or state.global_step <= self._first_step:
            return
        if (idle := self._optimizer.without_gradient()) and state.is_world_process_zero:
            logger.warning("these weights had no gradient in any step, and stay as they were: %s", some_of(idle))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the projection's figures to the log of a training step."""
        if self._optimizer is None or logs is None or "loss" not in logs:
            return
        seconds = self._optimizer.stopwatch.seconds()
        since = {k: v - self._logged.get(k, 0.0) for k, v in seconds.items()}
        self._logged = seconds
        added = {
            "galore/refresh_seconds": since.get("refresh", 0.0),
            "galore/update_seconds": since.get("update", 0.0) + since.get("plain", 0.0),
            "galore/state_bytes": sum(self._optimizer.state_bytes().values()),
        }
        errors = list(self._optimizer.projection_errors.values())
        if errors:
            added["galore/projection_error"] = torch.stack([e.to(errors[0].device) for e in errors]).mean().item()
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)
        self._tell_skipped()

    def _tell_skipped(self) -> None:
        """Warn of skipped steps, where there are more of them than before."""
        skipped = self._optimizer.check_finite() if self._optimizer is not None else {}
        if skipped != self._skipped:
            worst = ", ".join(f"{n} ({c})" for n, c in sorted(skipped.items(), key=lambda x: -x[1])[:5])
            logger.warning("steps skipped for a non-finite gradient, so far: %s (%d parameters)", worst, len(skipped))
            self._skipped = skipped

    def _projected(self) -> list[tuple[str, torch.Tensor]]:
        assert self._optimizer is not None
        return [(name, p) for name, p in self._optimizer.projected_weights() if p.numel()]

    def _had_gradient(self, name: str) -> bool:
        assert self._optimizer is not None
        state = self._optimizer.state_of(name)
        return any(value.any().item() for key, value in state.items() if key.endswith("exp_avg"))


def _calling_handler() -> CallbackHandler | None:
    """The handler that is calling a callback: all that transformers does not hand over, so it is read off the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def unwrap_optimizer(optimizer: Any) -> GaLoreAdamW:
    """The ``GaLoreAdamW`` inside accelerate's wrappers; ``OptionError`` where there is none."""
    inner = optimizer
    while inner is not None and not isinstance(inner, GaLoreAdamW):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise OptionError(
            "optimizers", type(optimizer).__name__, "a GaLoreAdamW in the Trainer that has GaLoreCallback",
            "Pass optimizers=(build_optimizer(model, config), None), or **galore_plugin(config, args), which is kept "
            "where the Trainer drops optimizers=.",
        )  # fmt: skip
    return inner
