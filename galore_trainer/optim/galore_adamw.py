"""``GaLoreAdamW``: a ``torch.optim.Optimizer`` that projects what its groups say and gives the rest to AdamW."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.layouts.find import Placement
from galore_trainer.layouts.shard import Ranks
from galore_trainer.optim import clipping, lenders, lookup, param_groups, refresh
from galore_trainer.optim.guards import Retries, Watch, compare_bases, total_skips
from galore_trainer.optim.kept import Directions, KeptWhole
from galore_trainer.optim.layerwise import Averager, ProjectedGradient, attach_group, drop_projected, is_zero
from galore_trainer.optim.local import LocalWeight, Moved, exchange, moved_together
from galore_trainer.optim.ops_triton import check_wanted
from galore_trainer.optim.plain import make_plain_state, move_plain
from galore_trainer.optim.plan import Plans
from galore_trainer.optim.reshard import put_whole
from galore_trainer.optim.residual import make_support
from galore_trainer.optim.state_dict import pack, unpack
from galore_trainer.optim.state_forms import bare, bytes_by_kind, prepare_state
from galore_trainer.optim.step import Joined, count, update
from galore_trainer.timing import Stopwatch


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
        max_grad_norm: the setting of ``config``, which clips inside the step; see ``grad_norm``.

    Attributes:
        grad_norm: where the step clips, the norm of all gradients of the newest one before clipping: a scalar on the
            device; else None.

    Raises:
        OptionError: an impossible setting; a parameter that cannot be trained, or (at ``step``) that has changed its
            shape, device or precision since its state was made; (at ``load_state_dict``) a state that does not fit.
        FloatingPointError: a parameter's gradient was not usable ten steps in a row (``core.galore.largest_usable``).

    State of a parameter: tensors and integers only. ``calls`` counts steps, ``refreshes`` changes of basis, ``due`` is
    the value of ``calls`` at which the next one happens, ``born`` that of the first one from a whole gradient,
    ``phase`` the place of its refreshes within the gap; ``step`` is the age of its moments; ``skipped`` [in a row, in
    all, longest row] counts unusable gradients.
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
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, projected=False)
        param_groups.check_optimizer_options(defaults)
        defaults["betas"] = tuple(betas)
        self.config = param_groups.given_config(config, max_grad_norm)
        self.grad_norm: Tensor | None = None
        self.seed = seed
        self.stopwatch = Stopwatch()
        self.max_stack_elements: int | None = None  # None chooses by device
        self.projection_errors: dict[str, Tensor] = {}  # by matrix, of the newest refresh
        self.excess_errors: dict[str, tuple[float, float]] = {}  # excess and sharing excess, where diagnosed
        self.settings_before_load: list[dict[str, Any]] = []  # settings of the groups before the newest load
        self.notes: dict[str, str] = {}  # why targeted weights are not projected, by name
        self.placement = Placement()
        self.ranks: Ranks | None = None  # that hold equal weights, under DDP
        self.averager: Averager | None = None
        self._steps = 0
        self._ordinals: dict[str, int] = {}  # of projected weights, by name
        self._retries, self._directions, self._watch, self._plans = Retries(), Directions(), Watch(), Plans()
        super().__init__(params, defaults)
        param_groups.warn_if_plain(self.param_groups)

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; fills in names, logical matrices and the settings that a resume must find again.

        Raises:
            OptionError: a key of the group or one of its parameters cannot be honoured; no group is added then.
        """
        if isinstance(param_group, dict):
            param_groups.prepare_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            param_groups.complete_group(group, self.param_groups[:-1], self.config, self.seed)
        except BaseException:
            self.param_groups.pop()
            raise
        self.placement.note(group)
        self._phases: dict[str, int] = {}  # by name, once a weight without a state asks
        if group["projected"]:
            for name in group["names"]:
                self._ordinals.setdefault(name, len(self._ordinals))
            if self.config.layerwise:
                attach_group(self, len(self.param_groups) - 1)

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
        moved, smallest = self._plans.step(self, bool(self._retries))
        self._steps += 1
        skips = any(some.ok.device.type == "cpu" and not some.ok.all() for some in moved if type(some.ok) is Tensor)
        self._watch.look(self._steps, self._counters, self.model_weights, smallest, skips)
        return loss

    def weights_with_gradients(self) -> list[LocalWeight]:
        """The weights that a step would move now."""
        return list(lookup.weights_with_gradients(self.param_groups, self.state, self.placement, self.config))

    def move(self, weights: Sequence[LocalWeight]) -> list[Moved]:
        """One step of weights, in its order: what crosses processes, plain weights, projected ones, the count.

        Args:
            weights: with gradients; of cut ones every process passes the same, in the same order.
        """
        clips = self.config.max_grad_norm is not None
        exchange(weights, clips)
        weights = [w for w in weights if self._prepare(w)]
        plain, projected = [w for w in weights if not w.matrices], [w for w in weights if w.matrices]
        check_wanted(projected, self.config)
        self._retries.settle()
        staying, due = [w for w in projected if not w.is_due], [w for w in projected if w.is_due]
        moved: list[Moved] = []
        held: list[Joined] = []  # projections of weights that stay, until the norm of all gradients is known
        if clips and weights:
            with self.stopwatch.measure("update", weights[0].weight.device):
                how = (self.config, self.seed, self.max_stack_elements)
                self.grad_norm, held, staying = clipping.clip(plain, staying, due, *how)
        if plain:
            with self.stopwatch.measure("plain", plain[0].weight.device):
                moved += move_plain(plain, self.config, self.seed)
        async_due, checked_due = refresh.part_due(due, self.config)
        norms = refresh.norms_later(checked_due) if checked_due else None  # on their way while the others move
        moved += self._update(staying, held)
        self._refresh(async_due, self._retries)
        fit, without_basis = refresh.part_by_norm(checked_due, norms.tolist() if norms is not None else [], self.config)
        self._refresh(fit)
        waiting = {id(w) for w in without_basis}
        moved += self._update([w for w in (*async_due, *checked_due) if id(w) not in waiting])
        for w in without_basis:
            w.age_keys, w.ok = (), refresh.usable_at_first(w)
        moved += moved_together(without_basis)
        count(moved, self.config)
        if self.config.layerwise:
            drop_projected(w.weight for w in projected)  # their step is over, and they fit nothing any more
        return moved

    def _update(self, weights: Sequence[LocalWeight], held: list[Joined] | None = None) -> list[Moved]:
        if not weights and not held:
            return []
        first = (held[0].weights if held else weights)[0]
        with self.stopwatch.measure("update", first.weight.device):
            return update(weights, self.config, self.seed, self.max_stack_elements, held)

    def _refresh(self, weights: Sequence[LocalWeight], retries: Retries | None = None) -> None:
        """New bases for weights that are due; see ``refresh_together`` for what their gradients have to be."""
        for buckets in refresh.refresh_groups(weights, self.config, self.max_stack_elements):
            device, diagnosed = buckets[0].device, self.config.diagnose_refreshes + self.config.sketches_first
            with self.stopwatch.measure("refresh", device):
                found = refresh.refresh_together(buckets, self.config, self.seed, retries)
                for bucket, P in found:
                    self.projection_errors.update(zip(bucket.names, lenders.projection_errors(bucket, P), strict=True))
            for bucket, P in found:
                if bucket.pieces[0].owner.state["refreshes"] < diagnosed:
                    with self.stopwatch.measure("diagnosis", device):
                        each = zip(
                            *(x.tolist() for x in lenders.diagnose(bucket, P, self.config, self.seed)), strict=True
                        )
                        self.excess_errors.update(zip(bucket.names, each, strict=True))
        for w in weights:
            refresh.count_refresh(w, self.config)
        compare_bases(pair for w in weights for pair in w.named_bases(self.ranks))

    def _prepare(self, w: LocalWeight) -> bool:
        """Make the state of a weight where there is none.

        Returns:
            False where a checkpoint tool calls ``step`` only to make state: on zero gradients at the rate 0.
        """
        if w.shard.is_whole and w.state.get("calls"):
            return True
        makes_state = w.is_fresh and w.group["lr"] == 0.0
        if w.matrices:
            prepare_state(w, self.config, self._phase(w))
        elif not w.state:
            make_plain_state(w.weight, w.state, self.config)
        return not makes_state or not (is_zero(w.grad) if w.energy is None else bool(w.energy == 0.0))

    def _phase(self, w: LocalWeight) -> int:
        """Where in the gap the refreshes of a weight lie."""
        if self.config.staggers and not self._phases:
            self._phases = param_groups.phases(self.param_groups)
        return self._phases.get(w.name, 0)

    @torch.no_grad()
    def refresh_now(self) -> None:
        """Give every projected weight with a whole, finite gradient a new basis now, as if it were due on its grid."""
        dense = [w for w in self.weights_with_gradients() if w.shard.is_whole and w.kept is None]
        weights = [w for w in dense if w.matrices and self._prepare(w)]
        for w in weights:
            w.state["due"] = w.state["calls"]
            w.state["phase"] = w.state["calls"] % param_groups.gap_of(w.group)
        async_due, checked_due = refresh.part_due(weights, self.config)
        self._refresh(async_due, self._retries)
        self._refresh(checked_due)
        self._retries.settle()

    def make_state(self) -> None:
        """Make the state that whole weights have after their first refreshes and warm-ups, of zeros.

        Use: to measure its memory without a step. The next refresh is due at the first step.
        """
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                w = lookup.whole_weight(group, i, p, self.state, self.placement)
                if not w.matrices:
                    make_plain_state(p, w.state, self.config)
                    continue
                prepare_state(w, self.config, self._phase(w))
                w.state.update(refreshes=1 + self.config.sketches_first)
                make_support(w, self.config)

    # ------------------------------------------------------------------ layer-wise mode and DDP

    def replicate_over(self, ranks: Ranks) -> None:
        """Say which processes hold the same weights: their bases are compared every so often.

        In layer-wise mode what is kept of gradients is averaged over them too, before a step uses it: whoever wraps
        the model must leave the gradients of projected weights alone.
        """
        reference, self.ranks = weakref.ref(self), ranks
        if self.config.layerwise:
            self.averager = Averager(ranks, lambda: living.projected_weights() if (living := reference()) else [])

    def keep_gradient(self, group: dict[str, Any], i: int) -> ProjectedGradient | None:
        """What layer-wise mode keeps of the gradient that backward has just made for parameter ``i`` of a group.

        Returns:
            None where the next step needs the dense gradient, or refuses it. Where processes average, a gradient that
            is kept whole.
        """
        p, name = group["params"][i], group["names"][i]
        param_groups.check_if_changed(param_groups.noted_of(self.placement, group), group, i, self.state.get(p))
        if p.grad.is_sparse:
            return None
        self._retries.settle()  # a step before may have left a refresh to this one
        w = lookup.whole_weight(group, i, p.grad, self.state, self.placement)
        prepare_state(w, self.config, self._phase(w))
        if w.has_basis and w.is_due:
            return None if self.averager is None else ProjectedGradient(p.grad, name, [KeptWhole()], self.averager)
        row, rows = self._ordinals[name], len(self._ordinals)
        direction = functools.partial(self._directions.of, row=row, rows=rows, seed=self.seed, calls=w.state["calls"])
        return ProjectedGradient(
            p.grad, name, lookup.kept_gradients(w, self.config, self.seed, direction), self.averager
        )

    # ------------------------------------------------------------------ diagnostics

    def check_finite(self) -> dict[str, int]:
        """Skipped steps by parameter name (those with any); raises after ten unusable gradients in a row."""
        return total_skips(self._counters(), self.bad_gradients())

    def bad_gradients(self) -> list[str]:
        """Names of weights whose own gradients are known to have been unusable, before clipping spread it to others.

        Gradients are looked at from the first skipped step, or the first zero gradients, until a bad one is found.
        """
        return list(self._watch.culprits.names)

    def _counters(self) -> dict[str, Tensor]:
        return {name: state["skipped"] for name, state in self._named_states() if "skipped" in state}

    def _named_states(self) -> list[tuple[str, Any]]:
        return lookup.named_states(self.param_groups, self.state, self.placement)

    def model_weights(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of every weight as the model holds it: under ZeRO not the flat tensors."""
        return lookup.model_weights(self.param_groups, self.placement)

    def projected_weights(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of every projected weight; of a sharded one this process's entries, perhaps none."""
        return lookup.projected_weights(self.param_groups, self.placement)

    def without_gradient(self) -> list[str]:
        """Names of weights that train and have had no gradient; none under DeepSpeed, which fills in zeros."""
        return lookup.without_gradient(self.param_groups, self.state, self.placement)

    def state_of(self, name: str) -> Mapping[str, Any]:
        """The state of a weight by its name; empty before its first step."""
        return next((state for weight, state in self._named_states() if weight == name), {})

    def projection_report(self) -> dict[str, Any] | None:
        """Projection errors of the newest refreshes: ``mean`` and ``by_matrix``; None before the first refresh.

        ``excess`` and ``sharing_excess`` (see ``lenders.diagnose``) are None unless ``diagnose_refreshes`` is set.
        """
        return lenders.projection_report(self.projection_errors, self.excess_errors)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state by kind: basis, moments, residual, plain (AdamW of what is not projected)."""
        return bytes_by_kind(lookup.kept_states(self.param_groups, self.state, self.placement))

    # ------------------------------------------------------------------ state

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or pickle keeps; a copy has no stopwatch and no hooks, and knows of no other processes."""
        self._retries.settle()
        shown = ("projection_errors", "excess_errors", "notes", "_ordinals", "_phases")
        attributes = ("config", "seed", "max_stack_elements", "settings_before_load", "_steps", *shown)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in attributes}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo ``__getstate__``; torch calls it at ``load_state_dict`` too."""
        super().__setstate__(state)
        self.__dict__.setdefault("stopwatch", Stopwatch())
        skips = [int(x[1]) for state in self.state.values() for key, x in state.items() if bare(key) == "skipped"]
        self._retries, self._directions, self._watch, self._plans = Retries(), Directions(), Watch(sum(skips)), Plans()
        for name in ("averager", "ranks", "grad_norm"):
            self.__dict__.setdefault(name, None)
        if "placement" not in self.__dict__:
            self.placement = Placement()
            for group in self.param_groups:
                self.placement.note(group)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state as tensors, numbers and strings, readable with ``torch.load(weights_only=True)``."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._retries.settle()
        saved = pack(self.param_groups, self.state, self.placement, self.config)
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
        loaded = unpack(self.param_groups, self.placement, self.config, state_dict)
        self.settings_before_load = param_groups.settings_of(self.param_groups)
        drop_projected(p for group in self.param_groups for p in group["params"])  # they belong to the state before
        self.__setstate__(loaded)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def load_whole(self, saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Load the state of one process where FSDP2 or DeepSpeed has cut the weights; each process takes its part.

        Args:
            saved: a state dict of one process; this optimizer has taken no step.
            weights: whole, by logical name; DeepSpeed's float32 copies get them.

        Raises:
            OptionError: it was made by another method, or a weight is missing.
        """
        put_whole(self.param_groups, self.state, self.placement, saved, weights, self.config)
