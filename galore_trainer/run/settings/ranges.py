"""Ranges of the trainers' own settings: a number that no run could use is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from galore_trainer.config import check_integers
from galore_trainer.errors import OptionError

MOST = 2**31 - 1  # limit of counts: libraries store batches, steps, epochs and processes as 32-bit numbers
LARGEST_SEED = 2**32 - 1  # numpy takes no larger one


class Range(NamedTuple):
    """A test of a number, and the allowed numbers in words."""

    allows: Callable[[float], bool]
    wanted: str
    way_out: str = ""


def _is_count(value: float) -> bool:
    return 1 <= value <= MOST


def _is_size(value: float) -> bool:
    return 0 <= value < math.inf


COUNT = Range(_is_count, f"an integer from 1 to {MOST}")
SEED = Range(lambda value: 0 <= value <= LARGEST_SEED, f"an integer from 0 to {LARGEST_SEED}")
FINITE = Range(lambda value: -math.inf < value < math.inf, "a finite number")
SIZE = Range(_is_size, "a finite number of at least 0")
BETA = Range(lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
EVERY = Range(lambda value: 0 < value <= MOST, f"a number above 0, at most {MOST}; below 1 it is a share of all steps")

RANGES: dict[str, Range] = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "max_steps": Range(
        lambda value: value == -1 or _is_count(value),
        f"an integer from 1 to {MOST}, or -1",
        "With -1, num_train_epochs decides.",
    ),
    "num_train_epochs": Range(
        lambda value: 0 < value <= MOST, f"a number above 0, at most {MOST}", "max_steps ends a run by its steps."
    ),
    "learning_rate": SIZE,
    "weight_decay": SIZE,
    "adam_beta1": BETA,
    "adam_beta2": BETA,
    "adam_epsilon": SIZE,
    "max_grad_norm": SIZE._replace(way_out="0 switches clipping off."),
    "warmup_steps": SIZE,
    "label_smoothing_factor": BETA,
    "neftune_noise_alpha": SIZE,
    "logging_steps": EVERY,
    "eval_steps": EVERY,
    "save_steps": EVERY._replace(way_out="Without checkpoints: save_strategy: no."),
    "eval_delay": SIZE,
    "save_total_limit": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": Range(lambda value: 0 <= value <= MOST, f"an integer from 0 to {MOST}"),
    "dataloader_prefetch_factor": COUNT,
    "torch_empty_cache_steps": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "pad_to_multiple_of": COUNT,
    "router_aux_loss_coef": SIZE,
}
BEST_METRICS: dict[str, tuple[str, ...]] = {"hf": ("loss",), "trl": ("loss", "mean_token_accuracy", "entropy")}
"""What an evaluation during training measures, under each trainer."""


def check_range(key: str, value: Any, *, option: str = "", place: str = "") -> None:
    """Refuse a number that no run could use.

    Args:
        key: of TrainingArguments or of TRL's; one without a range of its own must be finite.
        value: of the right type already; None where the key may be unset.
        option: the key with what stands before it, for example ``methods.adamw.seed``.
        place: where it was written, for example ``gsm8k.yaml, line 7``.

    Raises:
        OptionError: naming the range.
    """
    check_integers(option or key, value)
    allowed = RANGES.get(key, FINITE)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or allowed.allows(value):
        return
    place_text = f"({place})" if place and not place.startswith(option or key) else ""
    raise OptionError(option or key, value, allowed.wanted, f"{allowed.way_out} {place_text}".strip())


def check_best_metric(metric: Any, trainer: str) -> None:
    """Refuse a ``metric_for_best_model`` that no evaluation of this trainer measures; None is the loss."""
    if metric is not None and str(metric).removeprefix("eval_") not in BEST_METRICS[trainer]:
        raise OptionError(
            "metric_for_best_model",
            metric,
            f"one of {', '.join(BEST_METRICS[trainer])}, which the evaluation during training measures",
            "The scores of eval: are measured before and after training alone.",
        )
