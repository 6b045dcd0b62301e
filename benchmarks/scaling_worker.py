"""One launch of ``scaling.py``: every process of it trains the same cells, one after the other.

A cell is a method, a batch and a number of steps under the launch's backend. Backends are set up without accelerate, by
``DistributedDataParallel``, ``fully_shard`` and ``deepspeed.initialize``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from galore_trainer.config import GaLoreConfig
from galore_trainer.hf.backend import for_shards
from galore_trainer.hf.build import build_optimizer, galore_groups
from galore_trainer.optim.galore_adamw import GaLoreAdamW

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
WARM_UP = 4  # steps before anything is timed
PROFILED = 2  # the step whose collectives are counted
SHARDED = {"fsdp2": "fsdp", "zero1": "deepspeed", "zero2": "deepspeed", "zero3": "deepspeed"}
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@dataclasses.dataclass(frozen=True)
class Training:
    """A model under a backend, and the calls of a step."""

    forward: Any
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]
    optimizer: Any
    model: Any
    close: Callable[[], None] = lambda: None  # frees the backend's memory


def build(cell: dict[str, Any], backend: str, device: torch.device) -> Training:
    """Random weights, the same on every process, cut or wrapped as the backend does, and the method's optimizer."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**cell["model"]), dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    if backend == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = optimizer_for(cell, backend, model)
    if backend in ("zero1", "zero2", "zero3"):
        import deepspeed

        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_settings(cell, backend))[0]
        return Training(engine, engine.backward, engine.step, optimizer, model, engine.destroy)
    wrapped: Any = model
    if backend.startswith("ddp") and WORLD > 1:
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Training(wrapped, lambda loss: loss.backward(), step, optimizer, model)


def optimizer_for(cell: dict[str, Any], backend: str, model: Any) -> Any:
    """Fused AdamW, or GaLore+ with the cell's settings."""
    if cell["method"] == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=cell["lr"], fused=True, **ADAM)
    config = GaLoreConfig(**cell["galore"], layerwise=backend == "ddp layer-wise")
    if backend not in SHARDED:
        return build_optimizer(model, config, lr=cell["lr"], **ADAM)
    config = for_shards(config, SHARDED[backend])
    groups = galore_groups(model, config, lr=cell["lr"], weight_decay=0.0)
    return GaLoreAdamW(groups, config, lr=cell["lr"], **ADAM)


def deepspeed_settings(cell: dict[str, Any], backend: str) -> dict[str, Any]:
    """DeepSpeed's configuration as the Trainer makes it for bf16 and clipping at 1.0."""
    return {
        "train_micro_batch_size_per_gpu": cell["batch"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": int(backend[-1])},
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def batch_of(cell: dict[str, Any], step: int, device: torch.device) -> torch.Tensor:
    """This process's sequences of a step: each counts in steps of one width, which a model can learn.

    With one global batch the sequences do not depend on the number of processes.
    """
    rows = torch.arange(cell["batch"]) + cell["batch"] * (RANK + WORLD * step)
    width, start = 1 + rows % 7, rows * 7919 % 997
    ids = (start[:, None] + width[:, None] * torch.arange(cell["length"])) % 997
    return (ids % cell["model"]["vocab_size"]).to(device)


def measure(cell: dict[str, Any], backend: str, device: torch.device) -> dict[str, Any]:
    """Train a cell; returns its figures. Every process calls it; the figures differ in times alone."""
    on_gpu = device.type == "cuda"
    held = torch.cuda.memory_allocated() if on_gpu else 0
    training = build(cell, backend, device)
    losses: list[torch.Tensor] = []
    seconds: list[float] = []
    collectives: dict[str, Any] = {}
    parts: dict[str, list[float]] = {}
    kept: list[dict[str, int]] = []  # bytes that layer-wise mode has handed to all-reduce, by kind, step by step
    before = sampled_weights(training.model) if "weights" in cell else {}
    for step in range(cell["steps"]):
        if step == 1 and on_gpu:  # building the model is not training: leave it out of the peak
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        ids = batch_of(cell, step, device)
        with contextlib.ExitStack() as stack:
            if step == PROFILED and WORLD > 1:
                collectives = stack.enter_context(counted(on_gpu))
            wait(device)
            start = time.perf_counter()
            loss = training.forward(input_ids=ids, labels=ids).loss
            training.backward(loss)
            training.step()
            wait(device)
            seconds.append(time.perf_counter() - start)
        if isinstance(training.optimizer, GaLoreAdamW):
            for name, total in training.optimizer.stopwatch.seconds().items():
                of_steps = parts.setdefault(name, [0.0] * step)
                of_steps.append(total - sum(of_steps))
            if training.optimizer.averager is not None:
                kept.append(dict(training.optimizer.averager.sent))
                training.optimizer.averager.sent.clear()
        losses.append(loss.detach())
    mean = torch.stack(losses).float()
    if WORLD > 1:
        dist.all_reduce(mean)
        mean /= WORLD
    result: dict[str, Any] = {
        "loss": mean.tolist(),
        "seconds": seconds[WARM_UP:],
        "refresh_steps": refresh_steps(cell, backend),
        "collectives": collectives,
        "peak": max_over_processes(peak(on_gpu), device),
        "parameters": parameters(cell["model"]),
        "tokens": cell["batch"] * cell["length"] * WORLD,
        "held_before": held,
        "staggered": backend == "ddp layer-wise",
        "kept": kept,
    }
    if before:
        after = sampled_weights(training.model)
        result["moved"] = torch.cat([(w - before[name]).abs() for name, w in after.items()]).mean().item()
        if RANK == 0:
            torch.save(after, cell["weights"])
    optimizer = training.optimizer
    if isinstance(optimizer, GaLoreAdamW):
        result["state_bytes"] = optimizer.state_bytes()
        result["optimizer_seconds"] = {
            name: values[WARM_UP:] for name, values in parts.items()
        }  # of every timed step: refresh, update, plain
    training.close()
    return result


def sampled_weights(model: Any) -> dict[str, torch.Tensor]:
    """Some entries of every weight, in float32 on the CPU. Every process calls it, as weights may be sharded."""
    samples = {}
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([p]):
                samples[name] = sample(p.data)
        else:
            samples[name] = sample(p.full_tensor() if hasattr(p, "full_tensor") else p.data)
    return samples


def sample(weight: torch.Tensor) -> torch.Tensor:
    """About 20,011 entries at equal distances; a prime, so that they do not fall into the same columns."""
    return weight.detach().flatten()[:: max(1, weight.numel() // 20011)].float().cpu()


def parameters(m: dict[str, Any]) -> dict[str, int]:
    """Numbers of entries of projected (linear, in the layers) and of plain weights of a Llama."""
    head = m["hidden_size"] // m["num_attention_heads"]
    attention = m["hidden_size"] * head * 2 * (m["num_attention_heads"] + m["num_key_value_heads"])
    layer = attention + 3 * m["hidden_size"] * m["intermediate_size"]
    plain = 2 * m["vocab_size"] * m["hidden_size"] + (2 * m["num_hidden_layers"] + 1) * m["hidden_size"]
    return {"projected": layer * m["num_hidden_layers"], "plain": plain}


def refresh_steps(cell: dict[str, Any], backend: str) -> list[int]:
    """Steps, counted from the first timed one, in which all bases are refreshed; layer-wise mode staggers them."""
    if cell["method"] == "adamw" or backend == "ddp layer-wise":
        return []
    gap = cell["galore"]["update_proj_gap"]
    return [step - WARM_UP for step in range(gap, cell["steps"], gap) if step >= WARM_UP]


@contextlib.contextmanager
def counted(on_gpu: bool) -> Iterator[dict[str, Any]]:
    """Count calls of collectives and their bytes in and out of this process, by name and dtype.

    Only NCCL reports them to the profiler.
    """
    from torch.profiler import ProfilerActivity, profile

    counts: dict[str, Any] = {}
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds, record_shapes=True) as profiler:
        yield counts
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    sizes = {"BFloat16": 2, "Half": 2, "Float": 4, "Int": 4, "Long": 8, "Double": 8, "Byte": 1, "Bool": 1, "Char": 1}
    for event in events:
        call = event.get("args", {})
        if event.get("name") != "record_param_comms" or "In msg nelems" not in call:
            continue
        key = f"{call['Collective name'].lstrip('_')} {call['dtype']}"
        count = counts.setdefault(key, {"calls": 0, "in": 0, "out": 0})
        count["calls"] += 1
        count["in"] += call["In msg nelems"] * sizes.get(call["dtype"], 4)
        count["out"] += call["Out msg nelems"] * sizes.get(call["dtype"], 4)


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(on_gpu: bool) -> int:
    """Bytes: of the allocator on a GPU, of the process elsewhere."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def max_over_processes(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    x = torch.tensor(value, dtype=torch.int64, device=device)
    if WORLD > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return int(x)


def main() -> None:
    """``scaling_worker.py PLAN``: wait for the turn, then train the plan's cells and append a line for each."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    backend, on_gpu = plan["backend"], plan["device"] == "cuda"
    if backend in SHARDED:
        os.environ[f"ACCELERATE_USE_{SHARDED[backend].upper()}"] = "true"  # as a launcher says it
    if SHARDED.get(backend) == "deepspeed":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler
    while not Path(plan["turn"]).exists():
        time.sleep(0.05)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=plan["timeout"]))
    if SHARDED.get(backend) == "deepspeed":
        deepspeed.init_distributed()
    for cell in plan["cells"]:
        try:
            figures = measure(cell, backend, device)
        except Exception as error:  # ends the launch, as the other processes wait in a collective
            figures = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        if not math.isfinite(figures.get("loss", [math.nan])[-1]) and "error" not in figures:
            figures["error"] = "the loss is not finite"
        if RANK == 0 or "peak" not in figures:
            with Path(plan["results"]).open("a") as lines:
                lines.write(json.dumps({"id": cell["id"], **figures}) + "\n")
        if "peak" not in figures:
            os._exit(1)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
