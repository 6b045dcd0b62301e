"""The device of a run on this machine: its kind, whether it computes in bfloat16, and one GPU for one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments


def device_type(*, use_cpu: bool = False) -> str:
    """The kind of device a run uses here: ``cuda``, ``mps``, ..., or ``cpu``."""
    import torch

    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def uses_bf16(setting: bool | str | None, device_type: str) -> bool:
    """Whether a run computes in bfloat16 on a device: ``auto`` means where the hardware supports it."""
    if setting != "auto":
        return bool(setting)
    import torch

    if device_type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def use_one_device(arguments: TrainingArguments) -> str | None:
    """Restrict a run that was not launched on several processes to one GPU; return a warning where there are more.

    The Trainer would split each batch over all GPUs in one process (``torch.nn.DataParallel``), which copies the model
    at every step.
    """
    if arguments.n_gpu < 2:
        return None
    count, arguments._n_gpu = arguments.n_gpu, 1
    return f"{count} GPUs are visible, this run uses one: for all of them, galore-ft train ... --num-processes {count}"
