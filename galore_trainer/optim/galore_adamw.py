"""``GaLoreAdamW``: a ``torch.optim.Optimizer`` that projects what its groups say and gives the rest to AdamW."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig, check_settings
from galore_trainer.core.galore import compute_dtype
from galore_trainer.errors import OptionError
from galore_trainer.layouts.dtensor import is_dtensor, local
from galore_trainer.layouts.find import PLAIN_TYPES, Placement
from galore_trainer.layouts.shard import Ranks, Shard
from galore_trainer.optim import param_groups, refresh
from galore_trainer.optim.guards import Retries, check_bases, total_skips, usable_flags
from galore_trainer.optim.kept import Directions, KeptGradient, KeptWhole, sketch_matrices
from galore_trainer.optim.layerwise import Averager, ProjectedGradient, attach, drop_projected, is_zero, norms_of
from galore_trainer.optim.local import LocalWeight, Moved, exchange, moved_together
from galore_trainer.optim.ops_triton import check_wanted
from galore_trainer.optim.plain import make_plain_state, move_plain
from galore_trainer.optim.reshard import put_whole
from galore_trainer.optim.state_dict import pack, unpack
from galore_trainer.optim.state_forms import StateInFlat, bare, bytes_by_kind, prepare_state
from galore_trainer.optim.step import count, update
from galore_trainer.optim.timing import Stopwatch
from galore_trainer.optim.watch import Watch
from galore_trainer.targets.matrices import check_shardable


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
    ) -> None:
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, projected=False)
        param_groups.check_optimizer_options(defaults)
        self.config = param_groups.given_config(config)
        self.seed = seed
        self.stopwatch = Stopwatch()
        self.max_stack_elements: int | None = None  # None chooses by device
        self.projection_errors: dict[str, Tensor] = {}  # by matrix, of the newest refresh
        self.excess_errors: dict[str, tuple[float, float]] = {}  # excess and sharing excess, where diagnosed
        self.asked: list[dict[str, Any]] = []  # settings of the groups before the newest load
        self.notes: dict[str, str] = {}  # why targeted weights are not projected, by name
        self.placement = Placement()
        self.ranks: Ranks | None = None  # that hold equal weights, under DDP
        self.averager: Averager | None = None
        self._steps = 0
        self._places: dict[str, int] = {}  # of projected weights, by name
        self._retries, self._directions, self._watch = Retries(), Directions(), Watch()
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
        if group["projected"]:
            for name in group["names"]:
                self._places.setdefault(name, len(self._places))
            if self.config.layerwise:
                self._attach_hooks(group)

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
        weights = list(self._weights_with_gradients())
        moved = self.move(weights)
        self._steps += 1
        skips = any(some.ok.device.type == "cpu" and not some.ok.all() for some in moved if type(some.ok) is Tensor)
        smallest = functools.partial(_smallest_gradient, weights)
        self._watch.look(self._steps, self._counters, self.model_weights, smallest, skips)
        return loss

    def move(self, weights: Sequence[LocalWeight]) -> list[Moved]:
        """One step of weights, in its order: what crosses processes, plain weights, projected ones, the count.

        Args:
            weights: with gradients; of cut ones every process passes the same, in the same order.
        """
        exchange(weights)
        moving = [w for w in weights if self._prepare(w)]
        plain = [w for w in moving if not w.matrices]
        projected = [w for w in moving if w.matrices]
        check_wanted(projected, self.config)
        moved: list[Moved] = []
        if plain:
            with self.stopwatch.measure("plain", plain[0].weight.device):
                moved += move_plain(plain, self.config, self.seed)
        self._retries.settle()
        due = [w for w in projected if w.is_due]
        async_due, checked_due = refresh.part_due(due, self.config)
        norms = refresh.norms_later(checked_due) if checked_due else None  # on their way while the others move
        moved += self._update([w for w in projected if not w.is_due])
        self._refresh(async_due, self._retries)
        fit, without_basis = refresh.part_by_norm(checked_due, norms.tolist() if norms is not None else [], self.config)
        self._refresh(fit)
        waiting = {id(w) for w in without_basis}
        moved += self._update([w for w in (*async_due, *checked_due) if id(w) not in waiting])
        for w in without_basis:
            w.ages, w.ok = (), _usable_at_first(w)
        moved += moved_together(without_basis)
        count(moved, self.config)
        drop_projected(w.parameter for w in projected)  # their gradients have had their step, and fit nothing any more
        return moved

    def _update(self, weights: Sequence[LocalWeight]) -> list[Moved]:
        if not weights:
            return []
        with self.stopwatch.measure("update", weights[0].weight.device):
            return update(weights, self.config, self.seed, self.max_stack_elements)

    def _refresh(self, weights: Sequence[LocalWeight], retries: Retries | None = None) -> None:
        """New bases for weights that are due; see ``refresh_bucket`` for what their gradients have to be."""
        for bucket in refresh.refresh_buckets(weights, self.config, self.max_stack_elements):
            refreshes = bucket.pieces[0].owner.state["refreshes"]
            with self.stopwatch.measure("refresh", bucket.device):
                if bucket.is_kept or (refreshes == 0 and self.config.sketches_first):
                    refresh.first_basis(bucket, self.config, self.seed)
                    continue
                P = refresh.refresh_bucket(bucket, self.config, self.seed, retries)
                names = [piece.name for piece in bucket.pieces]
                self.projection_errors.update(zip(names, refresh.projection_errors(bucket, P), strict=True))
            if refreshes < self.config.diagnose_refreshes + self.config.sketches_first:
                with self.stopwatch.measure("diagnosis", bucket.device):
                    figures = refresh.diagnose(bucket, P, self.config, self.seed)
                    self.excess_errors.update(zip(names, zip(*(x.tolist() for x in figures), strict=True), strict=True))
        for w in weights:
            refresh.count_refresh(w, self.config)
        self._compare_bases(weights)

    def _compare_bases(self, refreshed: Sequence[LocalWeight]) -> None:
        """See to it that every process that holds a weight, or a part of it, found the same bases."""
        by_ranks: dict[Ranks, list[tuple[str, str, Mapping[str, Any]]]] = {}
        for w in refreshed:
            ranks = w.shard.ranks or self.ranks
            if ranks is not None:
                matrices = [(m.logical(w.name), m.prefix, w.state) for m in w.matrices]
                by_ranks.setdefault(ranks, []).extend(matrices)
        for ranks, matrices in by_ranks.items():
            check_bases(ranks, matrices)

    def _prepare(self, w: LocalWeight) -> bool:
        """Make the state of a weight where there is none; False where that was all that was wanted.

        Checkpoint tools make state by a step on zero gradients at the rate 0, which changes nothing else.
        """
        makes_state = w.is_fresh and w.group["lr"] == 0.0
        if w.matrices:
            prepare_state(w, self.config, self._phase(w.name, w.group))
        elif not w.state:
            make_plain_state(w.weight, w.state, self.config)
        return not makes_state or not (is_zero(w.grad) if w.energy is None else bool(w.energy == 0.0))

    def _phase(self, name: str, group: dict[str, Any]) -> int:
        """Where in the gap this weight's refreshes lie: 0, or spread evenly over all projected weights."""
        places = len(self._places)
        return self._places[name] * param_groups.gap_of(group) // places if self.config.staggers else 0

    # ------------------------------------------------------------------ weights with gradients

    def _weights_with_gradients(self) -> Iterator[LocalWeight]:
        """The weights that this step moves, wherever they lie.

        Whole projected weights of one shape come one after the other, large ones first: a device has most to do when
        it begins.

        Raises:
            OptionError: a gradient is sparse, or a parameter is no longer what its state was made for.
        """
        param_groups.check_groups(self.placement, self.param_groups)
        for group in self.param_groups:
            flat, noted = self.placement.is_flat(group), param_groups.noted_of(self.placement, group)
            params, names, projected = group["params"], group["names"], group["projected"] and not flat
            for i in noted.by_size if projected else range(len(params)):
                p = params[i]
                if (grad := p.grad) is None:
                    continue
                if grad.layout is not torch.strided:
                    raise OptionError(names[i], "a sparse gradient", "a dense one", "Use sparse=False.")
                if grad.is_neg() or (grad.dtype != p.dtype and compute_dtype(grad.dtype) != compute_dtype(p.dtype)):
                    grad = grad.resolve_neg().to(compute_dtype(p.dtype))
                moved = type(p) in PLAIN_TYPES and p.data_ptr() != noted.addresses[i]
                if not flat and (moved or p.shape != noted.shapes[i]):
                    param_groups.check_parameter(noted, group, i, self.state.get(p))
                matrices = group["matrices"][i] if projected else ()
                if flat or is_dtensor(p):
                    self._check_cuttable(group)
                    yield from self._in_flat(group, p) if flat else [self._dtensor(group, i, p, grad)]
                else:
                    kept = None
                    if isinstance(grad, ProjectedGradient):
                        grad, kept = (grad, grad.parts) if grad.whole is None else (grad.whole, None)
                    yield LocalWeight(names[i], group, self.state[p], noted.shards[i], p, grad, matrices, kept)

    def _check_cuttable(self, group: dict[str, Any]) -> None:
        if not self.placement.is_cut:
            check_settings(self.config, "shards")
        if group["projected"] and not group.get("cuttable"):
            for name, matrices in zip(group["names"], group["matrices"], strict=True):
                for matrix in matrices:
                    check_shardable(matrix, name)

    def _dtensor(self, group: dict[str, Any], i: int, p: Tensor, grad: Tensor) -> LocalWeight:
        shard = param_groups.checked_shard(self.placement, p, group["names"][i])
        matrices = group["matrices"][i] if group["projected"] else ()
        weight, local_grad = local(p).detach().view(-1), local(grad).reshape(-1)
        return LocalWeight(group["names"][i], group, self.state[p], shard, weight, local_grad, matrices)

    def _in_flat(self, group: dict[str, Any], flat: Tensor) -> Iterator[LocalWeight]:
        """The weights inside a flat tensor of DeepSpeed; plain ones are moved entry by entry, all at once."""
        slices, names, state = self.placement.slices(group, flat), group["names"], self.state[flat]
        weight, grad, low = flat.detach(), flat.grad, torch.bfloat16
        assert grad is not None
        if not group["projected"]:
            shard = Shard(rows=flat.numel(), columns=1, start=0, stop=flat.numel(), ranks=slices[0].shard.ranks)
            yield LocalWeight(names[0], group, state, shard, weight, grad)
            return
        for part in slices:
            name, matrices = names[part.index], group["matrices"][part.index]
            made_in = low if part.dtype == low else None  # in which gradients are made, whatever adds them up
            yield LocalWeight(
                name,
                group,
                StateInFlat(state, name),
                part.shard,
                part.of(weight),
                part.of(grad),
                matrices,
                factors=made_in,
            )

    # ------------------------------------------------------------------ layer-wise mode and DDP

    def replicate_over(self, ranks: Ranks) -> None:
        """Say which processes hold the same weights: their bases are compared every so often.

        In layer-wise mode what is kept of gradients is averaged over them too, before a step uses it: whoever wraps
        the model must leave the gradients of projected weights alone.
        """
        reference, self.ranks = weakref.ref(self), ranks
        if self.config.layerwise:
            self.averager = Averager(ranks, lambda: living.projected_weights() if (living := reference()) else [])

    def _attach_hooks(self, group: dict[str, Any]) -> None:
        """Hook every trained parameter of the newest group for as long as this optimizer lives."""
        reference, place = weakref.ref(self), len(self.param_groups) - 1
        for i, (p, name) in enumerate(zip(group["params"], group["names"], strict=True)):

            def take(_: Tensor, i: int = i) -> ProjectedGradient | None:
                living = reference()  # ``load_state_dict`` puts new groups there
                return None if living is None else living.keep_gradient(living.param_groups[place], i)

            if p.requires_grad:
                weakref.finalize(self, attach(p, name, take).remove)

    def keep_gradient(self, group: dict[str, Any], i: int) -> ProjectedGradient | None:
        """What layer-wise mode keeps of the gradient that backward has just made for parameter ``i`` of a group.

        Returns:
            None where the next step needs the whole gradient, or refuses it.
        """
        p, name, noted = group["params"][i], group["names"][i], param_groups.noted_of(self.placement, group)
        assert p.grad is not None
        param_groups.check_if_changed(noted, group, i, self.state.get(p))
        if p.grad.is_sparse:
            return None
        self._retries.settle()  # a step before may have left a refresh to this one
        w = LocalWeight(name, group, self.state[p], noted.shards[i], p, p.grad, group["matrices"][i])
        prepare_state(w, self.config, self._phase(name, group))
        if w.has_basis and w.is_due:
            return None if self.averager is None else ProjectedGradient(p.grad, name, [KeptWhole()], self.averager)
        direction = functools.partial(
            self._directions.of,
            row=self._places[name],
            rows=len(self._places),
            seed=self.seed,
            calls=w.state["calls"],
            like=p.grad,
        )
        parts = []  # no stopwatch: it would take the host a fifth of all this, and device time belongs to backward
        for m in w.matrices:
            sketches = functools.partial(sketch_matrices, m, self.config, self.seed, m.logical(name), p.device)
            parts.append(KeptGradient(m, w.state, sketches, direction(m) if w.has_basis else None))
        return ProjectedGradient(p.grad, name, parts, self.averager)

    # ------------------------------------------------------------------ diagnostics

    def check_finite(self) -> dict[str, int]:
        """Skipped steps by parameter name (those with any); raises after ten unusable gradients in a row."""
        return total_skips(self._counters(), self.bad_gradients())

    def bad_gradients(self) -> list[str]:
        """Names of weights whose own gradients are known to have been unusable, before clipping spread it to others.

        Gradients are looked at from the first skipped step, or the first zero gradients, until a bad one is found.
        """
        return list(self._watch.culprits.found)

    def _counters(self) -> dict[str, Tensor]:
        states = [pair for group in self.param_groups for pair in self._named_states(group)]
        return {name: state["skipped"] for name, state in states if "skipped" in state}

    def _named_states(self, group: dict[str, Any]) -> list[tuple[str, Any]]:
        """Name and state of every weight of a group that has one."""
        if not self.placement.is_flat(group):
            pairs = zip(group["names"], group["params"], strict=True)
            return [(name, self.state[p]) for name, p in pairs if p in self.state]
        states = [self.state[flat] for flat in self.placement.stepped_flats(group) if self.state.get(flat)]
        if not group["projected"]:
            return [(group["names"][0], state) for state in states]
        return [(name, one) for state in states for name in group["names"] if (one := StateInFlat(state, name))]

    def model_weights(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of every weight as the model holds it: under ZeRO not the flat tensors."""
        weights: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            flat = self.placement.is_flat(group)
            params = self.placement.originals(group) if flat else group["params"]
            weights += [(name, p) for name, p in zip(group["names"], params, strict=True) if p is not None]
        return weights

    def projected_weights(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of every projected weight; of a sharded one this process's entries, perhaps none."""
        weights: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            if group["projected"] and self.placement.is_flat(group):
                flats = self.placement.stepped_flats(group) or group["params"]
                pairs = [(flat, part) for flat in flats for part in self.placement.slices(group, flat)]
                weights += [(group["names"][part.index], part.of(flat)) for flat, part in pairs]
            elif group["projected"]:
                weights += [(name, local(p)) for name, p in zip(group["names"], group["params"], strict=True)]
        return weights

    def without_gradient(self) -> list[str]:
        """Names of weights that train and have had no gradient; none under DeepSpeed, which fills in zeros."""
        groups = [group for group in self.param_groups if not self.placement.is_flat(group)]
        pairs = [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]
        return [name for name, p in pairs if p.requires_grad and not self.state.get(p)]

    def shapes_of(self, group: dict[str, Any]) -> list[torch.Size]:
        """The whole shapes of the weights of one of ``param_groups``, however they are cut."""
        return self.placement.shapes(group)

    def state_of(self, name: str) -> Mapping[str, Any]:
        """The state of a weight by its name; empty before its first step."""
        return next((state for g in self.param_groups for n, state in self._named_states(g) if n == name), {})

    def projection_report(self) -> dict[str, Any] | None:
        """Projection errors of the newest refreshes: ``mean``, ``by_matrix``, and the means of what was diagnosed.

        ``excess`` and ``sharing_excess`` (see ``optim/refresh.py``) are None unless ``diagnose_refreshes`` is set;
        the whole is None before the first refresh.
        """
        return refresh.projection_report(self.projection_errors, self.excess_errors)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state by kind: basis, moments, residual, plain (AdamW of what is not projected)."""
        states = []
        for group in self.param_groups:
            flat = self.placement.is_flat(group)
            tensors = self.placement.stepped_flats(group) if flat else group["params"]
            states += [(group["projected"], self.state[p]) for p in tensors if p in self.state]
        return bytes_by_kind(states)

    # ------------------------------------------------------------------ state

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or pickle keeps: torch's part, and what this class adds but the stopwatch."""
        self._retries.settle()
        shown = ("projection_errors", "excess_errors", "notes")
        attributes = ("config", "seed", "max_stack_elements", "asked", "_steps", "_places", *shown)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in attributes}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo ``__getstate__``; torch calls it at ``load_state_dict`` too."""
        super().__setstate__(state)
        self.__dict__.setdefault("stopwatch", Stopwatch())
        skips = [int(x[1]) for own in self.state.values() for key, x in own.items() if bare(key) == "skipped"]
        self._retries, self._directions, self._watch = Retries(), Directions(), Watch(sum(skips))
        self.__dict__.setdefault("averager", None)
        self.__dict__.setdefault("ranks", None)
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
        self.asked = param_groups.settings_of(self.param_groups)
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


def _smallest_gradient(weights: Sequence[LocalWeight]) -> Tensor | None:
    """The gradient with the fewest entries, if any is whole."""
    grads = [w.grad for w in weights if w.shard.is_whole and type(w.grad) is Tensor and w.grad.numel()]
    return min(grads, key=Tensor.numel, default=None)


def _usable_at_first(w: LocalWeight) -> Tensor:
    """The flag of a weight without a basis; a norm that overflows tells as much as an entry."""
    if w.ok is not None and not w.shard.is_whole:
        return w.ok
    usable = w.grad.usable() if isinstance(w.grad, ProjectedGradient) else usable_flags([w.grad])[0]
    return usable * torch.isfinite(norms_of([w.grad])[0])
