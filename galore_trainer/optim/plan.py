"""A step that repeats the one before: the same weights in the same buckets, with new gradients and no new basis.

To look up every weight, open it and join it to its equals takes the host longer than a GPU needs to move small ones.
``Plan`` keeps what comes of it: buckets whose tables lie on the device. Before each step it looks at all weights,
gradients and tensors of the state again; where one is not what it was, the step takes the long way. The launches of a
small model's step are recorded.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.kernels.recording import MOST_BYTES, Recording
from galore_trainer.layouts.find import PLAIN_TYPES
from galore_trainer.optim.bucket import Bucket
from galore_trainer.optim.local import AGE, LocalWeight, Moved
from galore_trainer.optim.lookup import smallest_of, whole_gradients
from galore_trainer.optim.ops_triton import TritonOps, buckets_for_triton, wanted
from galore_trainer.optim.param_groups import check_groups
from galore_trainer.optim.places import GRADIENTS, Places, StepTables
from galore_trainer.optim.plain import PlainBucket, equal_for_kernel
from galore_trainer.optim.step import Joined, whole_step
from galore_trainer.timing import Stopwatch

logger = logging.getLogger(__name__)

MOST_WAIT = 1 << 10  # steps
_kind, _kind_of_grad = operator.attrgetter("dtype", "shape"), operator.attrgetter("dtype", "layout")
_calls, _due = operator.itemgetter("calls"), operator.itemgetter("due")


class Part:
    """Weights that move together.

    Args:
        tables: where they lie.
        weights: with the states they have.
    """

    def __init__(self, tables: StepTables, weights: Sequence[LocalWeight]) -> None:
        self.tables, self.states = tables, [w.state for w in weights]
        keys = [key for key, x in self.states[0].items() if isinstance(x, Tensor)]
        self._tensors = operator.itemgetter(*(key for key in keys if all(key in state for state in self.states)))

    def addresses(self) -> list[int]:
        """Of all tensors of the states."""
        return list(map(Tensor.data_ptr, itertools.chain.from_iterable(map(self._tensors, self.states))))

    @property
    def constants(self) -> tuple[Any, ...]:
        """What launches hold as numbers."""
        return self.tables.group["betas"], self.tables.group["eps"]

    def columns(self, addresses: list[int]) -> dict[str, list[int]]:
        """What a step uploads, by name: addresses of gradients, rates and random keys."""
        return {GRADIENTS: addresses, **self.tables.brought(list(map(_calls, self.states)))}


class Plan:
    """What a step of whole weights repeats while nothing but gradients changes. It keeps no gradient alive.

    Args:
        groups, states: of the optimizer.
        weights: that moved in the step before, as ``lookup`` found them; their gradients are still there.
        config, seed, asked: as for ``step.update``.

    Attributes:
        is_whole: whether kernels move all of the weights; else the plan is of no use.
    """

    def __init__(
        self,
        groups: Sequence[Any],
        states: Any,
        weights: Sequence[LocalWeight],
        config: GaLoreConfig,
        seed: int,
        asked: int | None,
    ) -> None:
        from galore_trainer.kernels.tables import Columns

        self._config, self._settings = config, (config, seed, asked)
        self._groups, self._params, self._device = list(groups), _params(groups), weights[0].weight.device
        self._types = [type(p.grad) for p in self._params]
        left: list[Any] = []
        pieces = (piece for w in weights if w.matrices for piece in w.open())
        buckets = list(buckets_for_triton(pieces, config, left, asked))
        plain, by_torch = equal_for_kernel([w for w in weights if not w.matrices], config)
        self.is_whole = not left and not by_torch
        for bucket in buckets:
            bucket.places = Places(bucket, config, seed)
            self.is_whole &= bucket.places.moves_state
        if not self.is_whole:
            return
        ops = TritonOps(config, seed)
        projected = [[piece.owner for piece in bucket.pieces] for bucket in buckets]
        self._joined = [Joined(members, ops, [bucket]) for members, bucket in zip(projected, buckets, strict=True)]
        self._plain = [PlainBucket(members, config, seed) for members in plain]
        tables = [*(bucket.places for bucket in buckets), *self._plain]
        self._parts = [Part(*pair) for pair in zip(tables, projected + plain, strict=True)]
        lengths = [len(part.states) for part in self._parts for _ in part.columns([])]
        self._columns = Columns(lengths, self._device)
        self._may_record = self._device.type == "cuda" and is_small(buckets)
        self._recording: Recording | None = None
        self._constants: Any = None  # of the step before
        self._weights = list(itertools.chain(*projected, *plain))
        place = {id(p): i for i, p in enumerate(self._params)}
        self._order = operator.itemgetter(*(place[id(w.weight)] for w in self._weights), 0)  # a tuple also for one
        self._kinds = _kinds([w.weight for w in self._weights], [w.grad for w in self._weights])
        self._states = list(states), list(states.values())
        self._addresses = self._addresses_now([w.weight for w in self._weights])
        self._counters = self._tables_of_counters()
        for w in self._weights:  # all that is asked of a gradient but its entries
            w.grad = torch.empty_like(w.grad, device="meta")
        for bucket in buckets:
            bucket.pieces = [piece._replace(grad=piece.owner.grad) for piece in bucket.pieces]

    @property
    def is_due(self) -> bool:
        """Whether a new basis is."""
        parts = self._parts[: len(self._joined)]
        return any(any(map(operator.ge, map(_calls, part.states), map(_due, part.states))) for part in parts)

    def gradients(self, groups: Sequence[Any], states: Any, settings: Sequence[Any]) -> Any:
        """The gradients of this step in the order of the plan; None where anything else has changed.

        Args:
            groups, states: of the optimizer.
            settings: what are config, seed and asked now.
        """
        params = _params(groups)
        if settings != self._settings or not (_same(groups, self._groups) and _same(params, self._params)):
            return None
        grads = [p.grad for p in params]
        if list(map(type, grads)) != self._types:  # as many, all whole
            return None
        params, grads = self._order(params)[:-1], self._order(grads)[:-1]
        if _kinds(params, grads) != self._kinds or not _are_dense(params, grads):
            return None
        if not (_same(list(states), self._states[0]) and _same(list(states.values()), self._states[1])):
            return None
        return grads if self._addresses_now(params) == self._addresses else None

    def move(self, grads: Sequence[Tensor], stopwatch: Stopwatch) -> Moved:
        """One step with these gradients."""
        constants = self._give(grads)
        with torch.cuda.device_of(grads[0]):
            launch = self._recorded(constants)
            with stopwatch.measure("update", self._device):
                ok = launch()
        for part in self._parts:
            for state in part.states:
                state["calls"] += 1
        return Moved(self._weights, ok, ())

    def _recorded(self, constants: Any) -> Callable[[], Tensor]:
        """What makes the launches of this step; they are recorded at the second step with the same constants."""
        if constants != self._constants:
            self._constants, self._recording = constants, None
        elif self._recording is None and self._may_record:
            try:
                self._recording = Recording(self._launch)
            except RuntimeError as error:  # out of memory, for example: nothing has been launched
                self._may_record = False
                logger.warning("the launches of a step could not be recorded, and are made one by one: %s", error)
        return self._launch if self._recording is None else self._recording.repeat

    def _launch(self) -> Tensor:
        """All launches of a step; which gradients were usable, [weights]."""
        from galore_trainer.kernels.adam import count_

        oks: list[Tensor] = []
        for joined in self._joined:
            try:
                oks += [taken.ok for taken in whole_step(joined, self._config)]
            finally:
                joined.buckets[0].end_step()
        oks += [plain.move() for plain in self._plain]
        ok = oks[0] if len(oks) == 1 else torch.cat(oks)
        count_([self._counters[AGE]], self._counters["skipped"], ok)
        return ok

    def _give(self, grads: Sequence[Tensor]) -> Any:
        """Upload what is new in this step; what launches hold as numbers."""
        from galore_trainer.kernels.tables import alignment_of

        addresses_of = map(Tensor.data_ptr, grads)
        columns = [part.columns(list(itertools.islice(addresses_of, len(part.states)))) for part in self._parts]
        self._columns.write([column for each in columns for column in each.values()])
        tensors, alignments = iter(self._columns.tensors), [alignment_of(each[GRADIENTS]) for each in columns]
        for part, each, alignment in zip(self._parts, columns, alignments, strict=True):
            part.tables.renew({name: next(tensors) for name in each}, alignment)
        return alignments, [part.constants for part in self._parts]

    def _addresses_now(self, params: Sequence[Tensor]) -> list[list[int]]:
        return [list(map(Tensor.data_ptr, params)), *(part.addresses() for part in self._parts)]

    def _tables_of_counters(self) -> Any:
        from galore_trainer.kernels.tables import scatter

        columns = {key: [w.state[key].data_ptr() for w in self._weights] for key in (AGE, "skipped")}
        dtypes = {key: self._weights[0].state[key].dtype for key in columns}
        return scatter(columns, dtypes, self._device)


def is_small(buckets: Iterable[Bucket]) -> bool:
    """Whether what a step makes of these weights may stay allocated between steps."""
    return all(len(bucket.pieces) * _bytes_made(bucket.matrix) <= MOST_BYTES for bucket in buckets)


def _bytes_made(matrix: LogicalMatrix) -> int:
    """R, N, N - phi R and the basis in the dtype of the products: at most 4 bytes an entry."""
    return 4 * (3 * math.prod(matrix.moment_shape) + math.prod(matrix.basis_shape))


def _params(groups: Sequence[Any]) -> list[Any]:
    return [p for group in groups for p in group["params"]]


def _same(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _kinds(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Any]:
    return [*map(_kind, params), *map(_kind_of_grad, grads)]


def _are_dense(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    dense = all(map(Tensor.is_contiguous, params)) and all(map(Tensor.is_contiguous, grads))
    return dense and not any(map(Tensor.is_neg, grads))


# ---------------------------------------------------------------------- when there is a plan


class Plans:
    """Makes a plan where the same weights moved in two steps in a row, and drops it where it fits no more."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._moved: list[str] = []  # names of the weights that moved in the step before
        self._wait, self._tries = 0, 0  # steps until a plan is made, and how many were of no use any more

    def step(self, optimizer: Any, waits: bool) -> tuple[list[Moved], Callable[[], Tensor | None]]:
        """One step of a ``GaLoreAdamW``: as planned, or by looking its weights up.

        Args:
            optimizer: to step.
            waits: whether answers of the device have to be read first.

        Returns:
            What moved; what finds its gradient with the fewest entries.
        """
        settings = optimizer.config, optimizer.seed, optimizer.max_stack_elements
        grads = None if waits else self._gradients(optimizer, settings)
        if grads is not None and self._plan is not None:
            return [self._plan.move(grads, optimizer.stopwatch)], functools.partial(smallest_of, grads)
        weights = optimizer.weights_with_gradients()
        moved = optimizer.move(weights)
        grads = whole_gradients(weights)
        if self._plan is None:
            self._learn(optimizer, weights, settings)
        return moved, functools.partial(smallest_of, grads)

    def _gradients(self, optimizer: Any, settings: Sequence[Any]) -> Sequence[Tensor] | None:
        """The gradients of a step that repeats the one before; None for any other step."""
        if self._plan is None or self._plan.is_due:
            return None
        check_groups(optimizer.placement, optimizer.param_groups)
        grads: Sequence[Tensor] | None = self._plan.gradients(optimizer.param_groups, optimizer.state, settings)
        if grads is None:
            self._plan = None
            self._wait_longer()
        return grads

    def _learn(self, optimizer: Any, weights: Sequence[LocalWeight], settings: tuple[Any, ...]) -> None:
        """Make a plan from weights that have just moved, if that may be of use. It takes their gradients away."""
        self._wait -= 1
        before, self._moved = self._moved, [w.name for w in weights]
        if self._wait > 0 or before != self._moved or not weights or not _can_repeat(weights, optimizer.config):
            return
        plan = Plan(optimizer.param_groups, optimizer.state, weights, *settings)
        if plan.is_whole:
            self._plan = plan
        else:
            self._wait_longer()

    def _wait_longer(self) -> None:
        """Try again after twice as many steps, since making a plan takes as long as a step."""
        self._tries += 1
        self._wait = min(2**self._tries, MOST_WAIT)


def _can_repeat(weights: Sequence[LocalWeight], config: GaLoreConfig) -> bool:
    """Whether the next step of weights may be as this one."""
    device = weights[0].weight.device
    simple = not config.layerwise and config.sparse_percent == 0.0 and config.max_grad_norm is None
    return simple and wanted(config, device) and all(w.weight.device == device and _is_simple(w) for w in weights)


def _is_simple(w: LocalWeight) -> bool:
    """Whether a weight is whole, as its gradient, and one matrix, or plain."""
    if not (w.shard.is_whole and w.kept is None and type(w.weight) in PLAIN_TYPES and w.weight.grad is w.grad):
        return False
    if type(w.grad) is not Tensor or not _are_dense([w.weight], [w.grad]):
        return False
    if not w.matrices:
        return True
    return len(w.matrices) == 1 and w.matrices[0].start == 0 and w.ok is None and w.has_basis
