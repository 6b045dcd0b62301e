"""The columns of a report's tables: how each figure is read from a run's result, and how it is shown."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from galore_trainer.metrics.nlg import TEXT_METRICS
from galore_trainer.recipes.base import CHANGE

Result = Mapping[str, Any]  # the content of a run's result.json
Group = Literal["quality", "time", "memory", "projection"]
Read = Callable[[Result, Result], float | None]

MIB = 1 / 2**20
LOSS_ON = "loss_on_"
"""How the keys of the columns of ``eval.also`` begin."""
PARTS = {"forward_backward": "forward + backward", "update": "update", "refresh": "refresh"}
"""The parts of a training step, and their names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column: one figure of each run.

    Args:
        key: as a study's ``metrics:`` name it.
        title: the table's head, with the unit.
        group: the table it stands in.
        read: takes a run's result, and the result that its times are taken from; None where the run has no such figure.
        factor: on the figure, to get the unit of ``title``.
        digits: after the point; None shows three significant ones, of a mean four.
        missing: why a run may lack it, in words.
    """

    key: str
    title: str
    group: Group
    read: Read
    factor: float = 1.0
    digits: int | None = None
    missing: str = ""

    def show(self, values: Sequence[float]) -> str:
        """Mean, with the standard deviation over seeds where there are two or more; ``-`` for none."""
        if not values:
            return "-"
        scaled = [self.factor * value for value in values]
        mean = statistics.fmean(scaled)
        digits = self.digits if self.digits is not None else _digits(mean, 3 if len(scaled) == 1 else 4)
        deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
        return f"{round(mean, digits) + 0.0:,.{digits}f}{deviation}"  # + 0.0: never -0.0


def columns(results: Iterable[Result] = ()) -> dict[str, Column]:
    """Every column by key, in the order of the tables.

    Args:
        results: of the runs to be shown; they add the text metrics and the kinds of optimizer state they have, and say
            what their score is. Without any, the columns a study may name.
    """
    results = list(results)
    scores = [result["score_after"] for result in results if result.get("score_after")]
    texts = [key for key in TEXT_METRICS if not results or any(key in score for score in scores)]
    others = dict.fromkeys(name for score in scores for name in score.get("also") or {})
    kinds = dict.fromkeys(kind for result in results for kind in result.get("optimizer_state_bytes", {}))
    table = [
        _score(scores),
        *(Column(key=key, title=TEXT_METRICS[key], group="quality", read=_after(key), digits=4, missing=_skipped(key))
          for key in texts if not (key == "bleu" and scores)),
        Column(key="eval_loss", title="eval loss, nats per token", group="quality", read=_after("eval_loss"), digits=4,
               missing="the run held nothing out"),
        *(column for name in others for column in _losses_on(name)),
        Column(key="fine_tuning_seconds", title="fine-tuning, s", group="time", read=_fine_tuning),
        Column(key="seconds_per_step", title="s per step", group="time", read=_per_step("training")),
        *(Column(key=key, title=f"{name}, ms per step", group="time", read=_per_step(key), factor=1e3)
          for key, name in PARTS.items()),
        Column(key="refresh_seconds", title="refresh, ms each", group="time", read=seconds_per_refresh, factor=1e3,
               missing=_PLAIN),
        Column(key="peak_memory", title="peak memory, MiB", group="memory", factor=MIB, digits=1,
               read=lambda result, _: result["peak_memory"]["peak_bytes"], missing="the system does not tell it"),
        Column(key="predicted_peak", title="predicted, MiB", group="memory", factor=MIB, digits=1,
               read=lambda result, _: predicted_peak(result), missing="the model could not be counted beforehand"),
        Column(key="state_bytes", title="optimizer state, MiB", group="memory", factor=MIB, digits=2,
               read=lambda result, _: sum(result["optimizer_state_bytes"].values())),
        *(Column(key=f"state_{kind}", title=f"{kind}, MiB", group="memory", read=_state(kind), factor=MIB, digits=2,
                 missing="the method keeps none") for kind in kinds),
        Column(key="projection_error", title="projection error", group="projection", read=_projection("mean"),
               digits=4, missing=_PLAIN),
        Column(key="excess", title="excess over exact SVD, %", group="projection", read=_projection("excess"),
               factor=100.0, digits=2, missing=_UNDIAGNOSED),
        Column(key="sharing_excess", title="sharing excess, ratio", group="projection", digits=3,
               read=_projection("sharing_excess"), missing=_UNDIAGNOSED),
    ]  # fmt: skip
    return {column.key: column for column in table}


def metric_names() -> tuple[str, ...]:
    """What a study's ``metrics:`` may name."""
    return tuple(columns())


def seconds_per_refresh(result: Result, timed: Result) -> float | None:
    """Seconds that one new basis for every matrix takes; None for a method without them."""
    if not (timed and projects(result)):
        return None
    galore = timed["config"].get("galore") or {}
    if "update_proj_gap" not in galore:
        return None
    count = refreshes(
        timed.get("resumed_from_step") or 0,
        timed["steps"],
        galore["update_proj_gap"],
        staggered=galore.get("stagger_refresh", False),
    )
    return timed["seconds"]["refresh"] / count if count else None


def refreshes(start: int, end: int, gap: int, *, staggered: bool = False) -> float:
    """Refreshes of a matrix in the steps after ``start`` up to ``end``: the mean over matrices where staggered.

    Steps are counted from 0. A weight of phase f is refreshed at the steps f, f + gap, ... and, for its first basis, at
    step 0; phases are spread evenly over the gap.
    """
    if not staggered:
        return -(-end // gap) - -(-start // gap)
    first = gap - 1 if start == 0 < end else 0  # every phase but 0 has one refresh more
    return (end - start + first) / gap


def projects(result: Result) -> bool:
    """Whether a run's method projects gradients."""
    return bool(result.get("projection_error"))


def predicted_peak(result: Result) -> float | None:
    """The peak that was predicted beforehand, counted as the measured one is: on a CPU without the weights."""
    predicted = result.get("predicted_memory") or {}
    beside = 0 if "weights included" in result["peak_memory"]["meaning"] else predicted.get("weights_bytes")
    if predicted.get("peak_bytes") is None or beside is None:
        return None
    return float(predicted["peak_bytes"] - beside)


def timed_steps(result: Result) -> int:
    """Steps that a run's seconds are about: those since it was resumed, else all."""
    return int(result["steps"]) - (result.get("resumed_from_step") or 0)


_PLAIN = "the method projects nothing"
_UNDIAGNOSED = "measured at the first refreshes (galore.diagnose_refreshes), if the run was not resumed after them"


def _skipped(key: str) -> str:
    return f"the run's evaluation skipped {TEXT_METRICS[key]}"


def _score(scores: Sequence[Mapping[str, Any]]) -> Column:
    metric = next((score["metric"] for score in scores if score.get("metric")), None)
    if metric == "bleu":
        return Column(key="score", title="BLEU", group="quality", read=_after("score"), digits=4)
    how = f" ({metric.removeprefix('exact_match_').replace('_', ' ')})" if metric else ""
    title = "score" if scores and metric is None else f"exact match{how}, %"
    return Column(
        key="score",
        title=title,
        group="quality",
        read=_after("score"),
        factor=100.0,
        digits=1,
        missing="the task has no answers to compare, or nothing was held out",
    )


def _after(key: str) -> Read:
    return lambda result, _: (result.get("score_after") or {}).get(key)


def _losses_on(name: str) -> tuple[Column, Column]:
    """The loss on the held-out part of other data after training, and by how much training changed it."""

    def loss(result: Result, when: str = "after") -> float | None:
        return (((result.get(f"score_{when}") or {}).get("also") or {}).get(name) or {}).get("eval_loss")

    def change(result: Result) -> float | None:
        before, after = loss(result, "before"), loss(result)
        return None if before is None or after is None else after - before

    title, key = f"loss on {name}", f"{LOSS_ON}{name}"
    return (
        Column(key=key, title=title, group="quality", read=lambda result, _: loss(result), digits=4,
               missing="the run did not score it (eval.also)"),
        Column(key=f"{key}{CHANGE}", title=f"{title}, change by training", group="quality", digits=4,
               read=lambda result, _: change(result), missing="the run did not score it before training (eval.before)"),
    )  # fmt: skip


def _state(kind: str) -> Read:
    return lambda result, _: result["optimizer_state_bytes"].get(kind)


def _projection(key: str) -> Read:
    return lambda result, _: (result.get("projection_error") or {}).get(key)


def _per_step(part: str) -> Read:
    def read(result: Result, timed: Result) -> float | None:
        steps = timed_steps(timed) if timed else 0
        return timed["seconds"][part] / steps if steps > 0 else None

    return read


def _fine_tuning(result: Result, timed: Result) -> float | None:
    per_step = _per_step("training")(result, timed)
    return None if per_step is None else per_step * result["steps"]


def _digits(value: float, significant: int) -> int:
    """Digits after the point that show so many significant ones."""
    if value == 0.0 or not math.isfinite(value):
        return 1
    return min(max(significant - 1 - math.floor(math.log10(abs(value))), 0), 6)
