"""``GaLoreAdamW``: a ``torch.optim.Optimizer`` that projects what its groups say and gives the rest to AdamW."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.layouts.shard import Ranks
from galore_trainer.optim.averaging import Averager, check_bases
from galore_trainer.optim.fused import check_wanted
from galore_trainer.optim.group_settings import (
    check_optimizer_options,
    complete_group,
    gap_of,
    given_config,
    prepare_group,
    settings_of,
    warn_if_plain,
)
from galore_trainer.optim.jobs import Projected, jobs_of, smallest_of, with_gradients
from galore_trainer.optim.layerwise import ProjectedGradient, attach_group, drop_projected
from galore_trainer.optim.locate import Locator
from galore_trainer.optim.parts import Directions, Part, Whole, sketch_matrices
from galore_trainer.optim.plain import PlainJob
from galore_trainer.optim.refresh import (
    Doubts,
    count_refresh,
    diagnose,
    errors_of,
    first_basis,
    norms_on_host,
    part_by_norm,
    part_due,
    projection_report,
    refresh_stack,
    usable_at_first,
)
from galore_trainer.optim.sharded import step_sharded
from galore_trainer.optim.skips import Flag, count_skips, no_skips, total_skips, usable_flags
from galore_trainer.optim.stack import Job, Stack, make_stacks
from galore_trainer.optim.state import bare, bytes_by_kind
from galore_trainer.optim.state_dict import pack, unpack
from galore_trainer.optim.timing import Stopwatch
from galore_trainer.optim.update import (
    REFRESH_ELEMENTS,
    STACK_ELEMENTS,
    make_plain_state,
    move,
    move_plain,
    stack_elements,
)
from galore_trainer.optim.watch import Watch


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW whose moments live in a low-rank projection of the gradient (GaLore+).

    Args:
        params: parameter groups. ``galore_trainer.targets.groups.parameter_groups`` makes them from a model. By hand, a
            group ``{"params": [...], "projected": True}`` projects each of its 2-D weights whole; so does a group with
            ``rank``, ``update_proj_gap``, ``scale`` or ``proj_type``, as for galore-torch, which win over ``config``.
            Any other group takes ordinary AdamW. Names seed the random streams: those of
            ``model.named_parameters()``, or ``names`` in a group (one a parameter).
        config: how to project; see ``GaLoreConfig``.
        lr: learning rate as for AdamW; projected weights move with ``lr * config.scale``.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``; decay is decoupled and in full space.
        seed: seeds heads, test matrices and rounding.

    Raises:
        OptionError: an impossible setting; a parameter that cannot be trained, or (at ``step``) that has changed its
            shape, device or precision since its state was made; (at ``load_state_dict``) a state that does not fit.
        FloatingPointError: a parameter's gradient was not usable ten steps in a row (``core.galore.largest_usable``).

    State of a parameter: tensors and integers only. ``calls`` counts steps, ``refreshes`` changes of basis, ``due`` is
    the value of ``calls`` at which the next one happens, ``born`` that of the first one from a whole gradient,
    ``phase`` the place of its refreshes within the gap; ``skipped`` [in a row, in all, longest row] counts unusable
    gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        config: GaLoreConfig | None = None,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, projected=False)
        check_optimizer_options(defaults)
        self.config = given_config(config)
        self.seed = seed
        self.stopwatch = Stopwatch()
        self.max_stack_elements: int | None = None  # None chooses by device
        self.projection_errors: dict[str, Tensor] = {}  # by matrix, of the newest refresh
        self.excess_errors: dict[str, tuple[float, float]] = {}  # excess and sharing excess, where diagnosed
        self.asked: list[dict[str, Any]] = []  # settings of the groups before the newest load
        self.notes: dict[str, str] = {}  # why targeted weights are not projected, by name
        self._steps = 0
        self._places: dict[str, int] = {}  # of projected weights, by name
        self._locator = Locator(self)
        self._doubts, self._directions, self._watch = Doubts(), Directions(), Watch()
        self.ranks: Ranks | None = None  # that hold equal weights, under DDP
        self.averager: Averager | None = None
        super().__init__(params, defaults)
        warn_if_plain(self.param_groups)

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; fills in names, logical matrices and the settings that a resume must find again.

        Raises:
            OptionError: a key of the group or one of its parameters cannot be honoured; no group is added then.
        """
        if isinstance(param_group, dict):
            prepare_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            complete_group(group, self.param_groups[:-1], self.config, self.seed)
        except BaseException:
            self.param_groups.pop()
            raise
        self._locator.note(group)
        if group["projected"]:
            for name in group["names"]:
                self._places.setdefault(name, len(self._places))
            if self.config.layerwise:
                attach_group(self, group)

    # ------------------------------------------------------------------ step

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            if self.config.layerwise:
                raise OptionError("step(closure)", "a closure", "none in layer-wise mode", "Call backward before.")
            with torch.enable_grad():
                loss = closure()
        if self.averager is not None:
            self.averager.settle()
        plain, whole, held = with_gradients(self.param_groups, self._locator)
        flags = step_sharded(self, self._locator.held() if held else [])
        if plain:
            with self.stopwatch.measure("plain", plain[0][0].device):
                usable = usable_flags([grad for _, grad, _, _ in plain])
                moving_plain = [
                    PlainJob(*each, ok, self.state[each[0]])
                    for each, ok in zip(plain, usable, strict=True)
                    if self._wakes(*each)
                ]
                flags += move_plain(moving_plain, self.config, self.seed)
        flags += self._move_projected(whole)
        count_skips(flags)
        self._steps += 1
        skips = any(type(ok) is Tensor and ok.device.type == "cpu" and not ok for _, ok in flags)
        self._watch.look(self._steps, self._counters, self._locator.leaves, lambda: smallest_of(plain, whole), skips)
        return loss

    def _jobs(self, whole: Iterable[Projected]) -> Iterator[Job]:
        """The logical matrices of whole weights, one after the other; their states are made where there are none."""
        for p, grad, name, matrices, group in whole:
            yield from jobs_of(p, grad, name, matrices, group, self._projected_state(p, name, matrices, group))

    def every_job(self) -> Iterator[Job]:
        """What a step would do to each logical matrix of projected weights that are whole and have gradients."""
        return self._jobs(with_gradients(self.param_groups, self._locator)[1])

    def _move_projected(self, whole: list[Projected]) -> list[Flag]:
        """Weights that keep their bases move before the refresh of the others, which may wait for the device."""
        check_wanted(self._jobs(whole), self.config)
        self._doubts.settle()
        due: list[Projected] = []
        kept: list[Projected] = []
        for each in whole:
            state = self.state[each[0]]
            (due if not state or state["calls"] >= state["due"] else kept).append(each)
        bold, careful = part_due(self._jobs(due), self.config)
        norms = norms_on_host(careful) if careful else None  # on their way while the others move
        flags = self._update(self._jobs(kept))
        self._refresh(bold, self._doubts)
        fit, waiting = part_by_norm(careful, norms.tolist() if norms is not None else [], self.config)
        self._refresh(fit)
        flags += [(job.state, usable_at_first(job.grad)) for job in waiting if job.last]
        still = {id(job) for job in waiting}
        flags += self._update(job for job in bold + careful if id(job) not in still)
        _count(waiting)
        return flags

    def _update(self, jobs: Iterator[Job]) -> list[Flag]:
        first = next(jobs, None)
        if first is None:
            return []
        moved: list[Job] = []

        def each() -> Iterator[Job]:
            for job in itertools.chain([first], jobs):
                moved.append(job)
                yield job

        with self.stopwatch.measure("update", first.parameter.device):
            flags = move(each(), self.config, self.seed, self.max_stack_elements)
        _count(moved)
        return flags

    def _projected_state(
        self, p: Tensor, name: str, matrices: list[LogicalMatrix], group: dict[str, Any]
    ) -> dict[str, Any]:
        """The state of a projected parameter, made where there is none."""
        state = self.state[p]
        if state:
            return state
        state.update(calls=0, refreshes=0, due=0, born=0, phase=self._phase(name, group), skipped=no_skips(p.device))
        for matrix in matrices:
            Stack([Job(p, p, name, matrix, state, group)]).create()
        return state

    def replicate_over(self, ranks: Ranks) -> None:
        """Say which processes hold the same weights: their bases are compared every so often.

        In layer-wise mode what is kept of gradients is averaged over them too, before a step uses it: whoever wraps
        the model must leave the gradients of projected weights alone.
        """
        own, self.ranks = weakref.ref(self), ranks
        if self.config.layerwise:
            self.averager = Averager(ranks, lambda: optimizer.projected_weights() if (optimizer := own()) else [])

    def _take(
        self, p: Tensor, name: str, matrices: list[LogicalMatrix], group: dict[str, Any]
    ) -> ProjectedGradient | None:
        """What is kept of a gradient that backward has just made; None where the next step needs it whole."""
        assert p.grad is not None
        if p.grad.is_sparse:
            return None  # the step refuses it
        self._doubts.settle()  # a step before may have left a refresh to this one
        state = self._projected_state(p, name, matrices, group)
        if state["refreshes"] > 0 and state["calls"] >= state["due"]:
            return None if self.averager is None else ProjectedGradient(p.grad, name, [Whole()], self.averager)
        direction = functools.partial(
            self._directions.of, row=self._places[name], rows=len(self._places), seed=self.seed, calls=state["calls"],
            like=p.grad,
        )  # fmt: skip
        parts = []  # no stopwatch: it would take the host a fifth of all this, and device time belongs to backward
        for m in matrices:
            sketches = functools.partial(sketch_matrices, m, self.config, self.seed, m.logical(name), p.device)
            parts.append(Part(m, state, sketches, direction(m) if state["refreshes"] else None))
        return ProjectedGradient(p.grad, name, parts, self.averager)

    def _phase(self, name: str, group: dict[str, Any]) -> int:
        """Where in the gap this weight's refreshes lie: 0, or spread evenly over all projected weights."""
        return self._places[name] * gap_of(group) // len(self._places) if self.config.staggers else 0

    def _wakes(self, p: Tensor, grad: Tensor, name: str, group: dict[str, Any]) -> bool:
        """Whether a plain parameter moves; its state is made, which may be all that checkpoint tools want."""
        state = self.state[p]
        if state:
            return True
        make_plain_state(p, state, self.config)
        return group["lr"] != 0.0 or bool(grad.any())

    def _refresh(self, jobs: list[Job], doubts: Doubts | None = None) -> None:
        """New bases for weights that are due; see ``refresh_stack`` for what their gradients have to be."""
        if not jobs:
            return
        copies = self.config.svd == "exact" or jobs[0].grad.dtype == torch.float16  # in float32, of whole gradients
        most = STACK_ELEMENTS if copies else REFRESH_ELEMENTS
        most = stack_elements(jobs[0].parameter.device, self.max_stack_elements, most)
        for stack in make_stacks(jobs, most):
            with self.stopwatch.measure("refresh", stack.device):
                G, first = stack.each_gradient(), stack.jobs[0].state["refreshes"] == 0
                if not G or (first and self.config.sketches_first):
                    first_basis(stack, G, self.config, self.seed)
                    continue
                new = refresh_stack(stack, G, self.config, self.seed, doubts)
                errors = errors_of(stack, G, new.P)
            self.projection_errors.update(zip((job.name for job in stack.jobs), errors, strict=True))
            if stack.jobs[0].state["refreshes"] < self.config.diagnose_refreshes + self.config.sketches_first:
                with self.stopwatch.measure("diagnosis", stack.device):
                    found = diagnose(stack, G, new.P, self.config, self.seed)
                    for job, excess, sharing in zip(stack.jobs, *(x.tolist() for x in found), strict=True):
                        self.excess_errors[job.name] = (excess, sharing)
        for job in jobs:
            if job.last:
                count_refresh(job.state, job.group, self.config)
        if self.ranks is not None:
            check_bases(self.ranks, [(job.name, job.prefix, job.state) for job in jobs])

    # ------------------------------------------------------------------ diagnostics and state

    def check_finite(self) -> dict[str, int]:
        """Skipped steps by parameter name (those with any); raises after ten unusable gradients in a row."""
        return total_skips(self._counters(), self.bad_gradients())

    def bad_gradients(self) -> list[str]:
        """Names of weights whose own gradients are known to have been unusable, before clipping spread it to others.

        Gradients are looked at from the first skipped step, or the first zero gradients, until a bad one is found.
        """
        return list(self._watch.culprits.found)

    def _counters(self) -> dict[str, Tensor]:
        states = [pair for group in self.param_groups for pair in self._locator.named_states(group)]
        return {name: state["skipped"] for name, state in states if "skipped" in state}

    def projected_weights(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of every projected weight; of a sharded one this process's entries, perhaps none."""
        return [pair for g in self.param_groups if g["projected"] for pair in self._locator.weights(g)]

    def shapes_of(self, group: dict[str, Any]) -> list[torch.Size]:
        """The whole shapes of the weights of one of ``param_groups``, however they are cut."""
        return self._locator.shapes(group)

    def state_of(self, name: str) -> Mapping[str, Any]:
        """The state of a weight by its name; empty before its first step."""
        return next((own for g in self.param_groups for n, own in self._locator.named_states(g) if n == name), {})

    def projection_report(self) -> dict[str, Any] | None:
        """Projection errors of the newest refreshes: ``mean``, ``by_matrix``, and the means of what was diagnosed.

        ``excess`` and ``sharing_excess`` (see ``optim/refresh.py``) are None unless ``diagnose_refreshes`` is set;
        the whole is None before the first refresh.
        """
        return projection_report(self.projection_errors, self.excess_errors)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state by kind: basis, moments, residual, plain (AdamW of what is not projected)."""
        return bytes_by_kind((g["projected"], state) for g in self.param_groups for state in self._locator.states(g))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or pickle keeps: torch's part, and what this class adds but the stopwatch."""
        self._doubts.settle()
        shown = ("projection_errors", "excess_errors", "notes")
        own = ("config", "seed", "max_stack_elements", "asked", "_steps", "_places", *shown)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo ``__getstate__``; torch calls it at ``load_state_dict`` too."""
        super().__setstate__(state)
        self.__dict__.setdefault("stopwatch", Stopwatch())
        skips = [int(x[1]) for own in self.state.values() for key, x in own.items() if bare(key) == "skipped"]
        self._doubts, self._directions, self._watch = Doubts(), Directions(), Watch(sum(skips))
        self.__dict__.setdefault("averager", None)
        self.__dict__.setdefault("ranks", None)
        if "_locator" not in self.__dict__:
            self._locator = Locator(self)
            for group in self.param_groups:
                self._locator.note(group)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state as tensors, numbers and strings, readable with ``torch.load(weights_only=True)``."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._doubts.settle()
        saved = pack(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, saved)
            saved = saved if changed is None else changed
        return saved

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made under the same method; every tensor keeps its dtype.

        Raises:
            OptionError: rank, gap, seed, names or another setting that shapes the state differs (both values and the
                way out are named), or the state is not whole.
        """
        state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict  # hooks may change it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        loaded = unpack(self, state_dict)
        self.asked = settings_of(self.param_groups)
        drop_projected(p for group in self.param_groups for p in group["params"])  # they belong to the state before
        self.__setstate__(loaded)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _count(jobs: Sequence[Job]) -> None:
    """Weights have had their step: their gradients, if projected, fit nothing any more."""
    for job in jobs:
        job.state["calls"] += job.last
    drop_projected(job.parameter for job in jobs)
