"""The memory of one of several processes: a step counted on one process, divided as DDP, FSDP2 and ZeRO divide it.

Buffers are those of the packaged launch configurations (``configs/launch``) at the defaults of torch 2.11 to 2.13,
accelerate 1.15 and DeepSpeed 0.19.8. Against four GPUs: ``results/scaling``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from galore_trainer.errors import OptionError
from galore_trainer.optim.bucket import STACK_ELEMENTS

if TYPE_CHECKING:
    from galore_trainer.run.memory.simulate import StepMemory

LAYOUTS = {"ddp": "ddp", "fsdp2": "fsdp", "zero1": "deepspeed", "zero2": "deepspeed", "zero3": "deepspeed"}
"""Names of packaged launch configurations, and their backends."""
BUCKET = 500_000_000  # entries that DeepSpeed reduces at a time (reduce_bucket_size)
LIVE = 1_000_000_000  # entries that ZeRO-3 keeps gathered (stage3_max_live_parameters), and those of a sub-group
MASTER = 4  # bytes of DeepSpeed's own copy of a weight, and of the gradient its optimizer sees


class Layout(NamedTuple):
    """A name of ``LAYOUTS``, and how many processes."""

    name: str
    processes: int

    @property
    def backend(self) -> str:
        """``ddp``, ``fsdp`` or ``deepspeed``."""
        return LAYOUTS[self.name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Entries of a model's weights: of those that have gradients, of the largest layer, of all outside layers."""

    trained: int
    layer: int
    outside: int


def layout_of(name: str, processes: int) -> Layout:
    """Raises ``OptionError`` for an unknown name or number."""
    if name not in LAYOUTS:
        raise OptionError("--launch-config", name, f"one of {', '.join(LAYOUTS)}", "Only these can be counted.")
    if processes < 1:
        raise OptionError("--num-processes", processes, "at least 1")
    return Layout(name, processes)


def sizes_of(model: nn.Module) -> Sizes:
    """Count a model; its layers are the outermost modules that it wants to be kept on one device."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers: list[int] = []
    pending = [model]
    while pending:
        module = pending.pop()
        if type(module).__name__ in kinds:
            layers.append(sum(p.numel() for p in module.parameters()))
        else:
            pending += module.children()
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Sizes(trained=trained, layer=max(layers, default=0), outside=total - sum(layers))


def share_out(
    memory: StepMemory, sizes: Sizes, layout: Layout, *, element: int, averaged: int, adamw: bool
) -> StepMemory:
    """The memory of one of the processes.

    Args:
        memory: of the step on one process, with weights as the backend keeps them (DeepSpeed: in 16 bits).
        sizes: of the model.
        layout: the backend and how many processes share.
        element: bytes of a weight's entry where it is gathered or reduced.
        averaged: bytes of the gradients that DDP averages.
        adamw: the optimizer is PyTorch's, whose moments have the precision of what it is given.
    """
    n = layout.processes
    if layout.backend == "ddp":
        return dataclasses.replace(memory, gradients=memory.gradients + (averaged if n > 1 else 0))  # its buckets
    state = {kind: size if kind == "basis" else size // n for kind, size in memory.state.items()}
    if layout.backend == "fsdp":
        # The root's weights stay gathered. Two layers are gathered at a time, and the gradient of one of them is held
        # twice while it is reduced.
        gathered = element * (sizes.outside + 4 * sizes.layer if sizes.layer else 3 * sizes.outside)
        return _replace(memory, memory.weights // n, state, memory.gradients // n, gathered, memory.step)
    stage = int(layout.name[-1])
    master = MASTER * sizes.trained // n
    if adamw:
        state = {"plain": 2 * master}
    weights = memory.weights // n if stage == 3 else memory.weights
    gradients = memory.gradients // n if stage > 1 else memory.gradients
    bucket = element * min(BUCKET, sizes.trained)
    gathered = bucket
    if stage == 3:  # ZeRO-3 keeps the bucket
        gradients, gathered = gradients + bucket, min(element * LIVE, memory.weights)
    copies = (
        0 if adamw else 2 * MASTER * min(STACK_ELEMENTS, sizes.trained)
    )  # of rows and gradients that are put together
    unflattened = MASTER * min(sizes.trained // n, LIVE if stage == 3 else sizes.trained)  # the optimizer's gradient
    step = memory.step + copies + unflattened
    return _replace(memory, weights + master, state, gradients, gathered, step)


def _replace(
    memory: StepMemory, weights: int, state: dict[str, int], gradients: int, gathered: int, step: int
) -> StepMemory:
    backward = None if memory.backward is None else memory.backward + gathered
    return dataclasses.replace(memory, weights=weights, state=state, gradients=gradients, backward=backward, step=step)


def as_kept(dtype: Any, layout: Layout, *, bf16: bool) -> tuple[Any, int]:
    """The dtype of a run's weights under a layout, and the bytes of an entry that is gathered or reduced.

    Args:
        dtype: of the configuration.
        layout: the backend.
        bf16: the Trainer's mixed precision. DeepSpeed then keeps weights in bfloat16 beside its master weights, FSDP
            keeps float32 and gathers bfloat16.
    """
    if bf16 and layout.backend == "deepspeed":
        return "bfloat16", 2
    if bf16 and layout.backend == "fsdp":
        return "float32", 2
    return dtype, 2 if dtype in ("bfloat16", "float16") else 4
