"""The memory of one training step, counted on fake tensors: no weight is loaded, nothing is computed, no GPU needed.

Forward, backward, the hooks of layer-wise mode and the optimizer's step are the real code, run under torch's
``FakeTensorMode``; a dispatch mode adds up the storages that are alive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from galore_trainer.core import galore
from galore_trainer.optim.bucket import REFRESH_ELEMENTS, STACK_ELEMENTS
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.refresh import refresh_buckets, refresh_groups, refresh_together

NEVER = 1 << 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one training step.

    Attributes:
        weights: parameters and buffers.
        state: optimizer state by kind.
        gradients: what is left of gradients after backward: dense ones, and what layer-wise mode keeps.
        backward: the peak of forward and backward beside weights, state and gradients; None if the model did not run.
        step: the peak of the optimizer's step beside them, a refresh included.
        note: why ``backward`` is None.
    """

    weights: int
    state: dict[str, int]
    gradients: int
    backward: int | None
    step: int
    note: str = ""

    @property
    def peak(self) -> int | None:
        """The most that is alive at one time; None where activations could not be counted."""
        if self.backward is None:
            return None
        return self.weights + sum(self.state.values()) + self.gradients + max(self.backward, self.step)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all living storages that operations returned."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        self.count(out)
        return out

    def count(self, tensors: Any) -> None:
        """Count tensors, however nested, each storage once."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and not hasattr(tensor, "parts"):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[int]]:
        """The peak inside the block, as the only element of a list, filled when the block ends."""
        peak: list[int] = []
        self.peak = self.now
        yield peak
        peak.append(self.peak)


def simulate_step(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Any],
    *,
    batch_size: int,
    length: int,
    autocast: bool = False,
    accumulates: bool = False,
) -> StepMemory:
    """Count one step of a causal language model.

    Args:
        make_model: no arguments; the model, ready to be trained, on the meta device.
        make_optimizer: (model) to a ``GaLoreAdamW``, or, of another optimizer, to its state in bytes by kind and the
            bytes that its step needs besides.
        batch_size, length: of one micro-batch.
        autocast: run forward in bf16 autocast, as the Trainer does with ``bf16`` and float32 weights.
        accumulates: several micro-batches a step.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = make_model()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # ``note`` says what failed
    with warnings.catch_warnings(), _as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        _make_fake(model)
        optimizer = make_optimizer(model)
        live = LiveBytes()
        with live:
            live.count([*model.parameters(), *model.buffers()])
            weights = live.now
            is_galore = isinstance(optimizer, GaLoreAdamW)
            state, step = (_make_state(optimizer), 0) if is_galore else optimizer
            if not is_galore:
                live.now += sum(state.values())
            before = live.now
            backward, note = None, ""
            try:
                with live.watching() as peak:
                    for _ in range(2 if accumulates else 1):
                        _loss(model, batch_size, length, autocast).backward()
                backward = peak[0] - live.now
            except Exception as error:  # some architectures cannot run on fake tensors
                note = f"activations could not be counted: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
                model.zero_grad()
                _give_gradients(model, optimizer)
            gradients = live.now - before
            step = _step(optimizer, live) if is_galore else step
    return StepMemory(weights=weights, state=state, gradients=gradients, backward=backward, step=step, note=note)


def _make_fake(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake ones; tied weights stay tied."""
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    if id(value) not in memo:
                        fake = torch.empty(value.shape, dtype=value.dtype)
                        grad = value.requires_grad
                        memo[id(value)] = nn.Parameter(fake, grad) if isinstance(value, nn.Parameter) else fake
                    tensors[name] = memo[id(value)]  # type: ignore[assignment]


def _loss(model: nn.Module, batch_size: int, length: int, autocast: bool) -> Tensor:
    """The loss of full rows. On fake tensors transformers builds the causal mask that it leaves out on real ones."""
    ids = torch.zeros(batch_size, length, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(input_ids=ids, labels=ids)
        if autocast:
            output.logits = output.logits.float()  # accelerate returns them so
        return output.loss


def _give_gradients(model: nn.Module, optimizer: Any) -> None:
    """Give every parameter the gradient that backward would leave, for a model that cannot run on fake tensors."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    if isinstance(optimizer, GaLoreAdamW) and optimizer.config.layerwise:
        for group in (g for g in optimizer.param_groups if g["projected"]):
            for i, p in enumerate(group["params"]):
                kept = optimizer.keep_gradient(group, i)
                p.grad = p.grad if kept is None else kept


def _make_state(optimizer: GaLoreAdamW) -> dict[str, int]:
    """The state that a run has after its first refreshes and warm-ups."""
    config = optimizer.config
    optimizer.make_state()
    for _, state in _projected(optimizer):
        state.update(calls=NEVER // 2, due=NEVER, born=0)
    if config.layerwise:  # weights of one phase keep dense gradients at the same step: count the largest phase
        by_phase: dict[int, list[tuple[Tensor, dict[str, Any]]]] = {}
        for p, state in _projected(optimizer):
            by_phase.setdefault(state["phase"], []).append((p, state))
        for _, state in max(by_phase.values(), key=lambda due: sum(p.nbytes for p, _ in due)):
            state["due"] = 0
    return optimizer.state_bytes()


def _step(optimizer: GaLoreAdamW, live: LiveBytes) -> int:
    """The peak of the step above what is alive before it: of the update, and of the largest refresh."""
    before = live.now
    weights = [w for w in optimizer.weights_with_gradients() if w.matrices and w.kept is None]
    config, peaks = optimizer.config, []
    if config.staggers:  # single matrices: hardly more are due at a time
        groups = [[bucket] for bucket in refresh_buckets(weights, config, 0)]
    else:
        groups = list(refresh_groups(weights, config, REFRESH_ELEMENTS))
    for buckets in sorted(groups, key=lambda some: -sum(len(b.pieces) * b.pieces[0].weight.numel() for b in some))[:3]:
        with live.watching() as peak:
            refresh_together(buckets, config, optimizer.seed)
        peaks += peak
    for _, state in _projected(optimizer):
        state["due"] = NEVER
    optimizer.max_stack_elements = STACK_ELEMENTS
    with live.watching() as peak:
        optimizer.step()
    return max(*peaks, *peak, before) - before


def _projected(optimizer: GaLoreAdamW) -> list[tuple[Tensor, dict[str, Any]]]:
    return [(p, optimizer.state[p]) for g in optimizer.param_groups if g["projected"] for p in g["params"]]


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let fake tensors on the CPU take the paths of CUDA tensors: bfloat16 factors are multiplied without a cast."""
    before = set(galore.MULTIPLIES_BF16)
    galore.MULTIPLIES_BF16.add("cpu")
    try:
        yield
    finally:
        galore.MULTIPLIES_BF16.clear()
        galore.MULTIPLIES_BF16.update(before)
