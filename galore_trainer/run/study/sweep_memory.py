"""How many runs of a sweep fit side by side: ``--jobs auto``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.run.settings.run_config import RunConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARE = 0.9  # of the free memory: allocators leave gaps
PROCESS = {"cuda": 600 << 20, "cpu": 800 << 20}  # bytes of a process without a model: libraries, CUDA's context
FREE = (
    "import json, torch; print(json.dumps([torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]))"
)


def visible_devices(environment: dict[str, str]) -> list[str]:
    """The CUDA devices that runs may have, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    if VISIBLE in environment:
        return [name.strip() for name in environment[VISIBLE].split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]  # does not create a context on a device


def choose_jobs(configs: Sequence[RunConfig], devices: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
    """As many runs at a time as fit into the memory that is free now, by the estimate of the largest of them.

    Args:
        configs: the runs.
        devices: CUDA devices that they may have; none means the CPU.
        environment: of this process, for one that asks the devices.

    Returns:
        A number of at least 1, and the reason in words.

    Raises:
        OptionError: a model that cannot be counted.
    """
    from galore_trainer.tables import human_bytes

    on_gpu = bool(devices) and not all(config.training.get("use_cpu") for config in configs)
    needs: dict[str, int] = {}
    for config in configs:
        same = str({**config.to_dict(), "output_dir": "", "seed": 0})
        if same not in needs:
            needs[same] = run_bytes(config) + PROCESS["cuda" if on_gpu else "cpu"]
    largest = max(needs.values(), default=1)
    free = _free_of_devices(environment) if on_gpu else [_free_of_system()]
    jobs = sum(int(SHARE * available) // largest for available in free)
    if not on_gpu:
        jobs = min(jobs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    jobs = max(min(jobs, len(configs)), 1)
    where = f"{len(free)} GPUs with {human_bytes(min(free))}" if on_gpu else f"{human_bytes(free[0])} of memory"
    return jobs, f"{jobs} at a time: the largest run takes about {human_bytes(largest)}, and {where} are free"


def run_bytes(config: RunConfig) -> int:
    """About the most memory of a run: of a training step, or of scoring the model beside the optimizer's state.

    Raises:
        OptionError: a model that cannot be counted.
    """
    from galore_trainer.run.memory.estimate import estimate_run

    memory = estimate_run(config)
    if memory.peak is None:
        raise OptionError("--jobs", "auto", "a number for this model", f"It cannot be counted: {memory.note}.")
    scoring = memory.weights + sum(memory.state.values()) + scoring_bytes(config)
    return max(memory.peak, scoring if config.data.eval_samples != 0 else 0)


def scoring_bytes(config: RunConfig) -> int:
    """What scoring takes beside the weights: keys and values of a batch of answers, or the logits of a loss."""
    from galore_trainer.run.memory.estimate import empty_model
    from galore_trainer.run.settings.arguments import training_arguments

    model = empty_model(config)
    text: Any = model.config.get_text_config()
    arguments = training_arguments(config)
    element = 2 if arguments.bf16 else next(model.parameters()).element_size()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    length = config.max_length + config.eval.max_new_tokens
    batch = config.eval.batch_size
    # The cache grows by a copy of one layer's; logits of the last position are kept in float32, too.
    cache = batch * length * (text.num_hidden_layers + 1) * 2 * heads * dim * element
    generation = cache + batch * text.vocab_size * (element + 4)
    loss = arguments.per_device_eval_batch_size * config.max_length * text.vocab_size * (element + 2 * 4)
    return max(generation, loss) if config.eval.generate else loss


def _free_of_devices(environment: dict[str, str]) -> list[int]:
    """Free bytes of each device, asked by another process: this one would keep a context on each of them."""
    done = subprocess.run([sys.executable, "-c", FREE], env=environment, capture_output=True, text=True, check=True)
    return [int(free) for free in done.stdout.splitlines()[-1].split()]


def _free_of_system() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
