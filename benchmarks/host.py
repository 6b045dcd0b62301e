"""Host time of a step with kernels, without a GPU: what passes before the first launch, and in all.

Kernels are compiled for Hopper and launched through Triton, whose last call, into the driver, is left out. Tensors lie
on the CPU and are small, so that torch's own operations take a few microseconds each, as their launches do on a GPU.
What a GPU adds is left out: pinned memory, events, and the driver's share of each launch.

    python benchmarks/host.py [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from typing import Any

import torch

from galore_trainer import kernels
from galore_trainer.config import GaLoreConfig
from galore_trainer.optim.galore_adamw import GaLoreAdamW

STEPS, WARM_UP = 50, 5
SHRINK = 48  # each side of a matrix by this factor, so that the caches of a CPU hold all of them
MODELS: dict[str, tuple[int, list[tuple[int, int]], bool]] = {  # layers, matrices of a layer, whether others train
    "LLaMA-7B, 16 layers": (16, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], False),
    "SmolLM2-135M": (30, [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)], True),
}
launches: list[float] = []  # when each one of a step was made


class Driver:
    """A Hopper GPU that launches nothing."""

    class utils:
        """What Triton asks of its devices."""

        @staticmethod
        def get_device_properties(index: int) -> dict[str, int]:
            """Bytes of shared memory for a program."""
            return {"max_shared_mem": 227 << 10}

    def get_current_target(self) -> Any:
        """For which Triton compiles."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0


def launch_nothing() -> None:
    """Have Triton do all of a launch but the last call; kernels take tensors on the CPU."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    import galore_trainer.kernels.tables  # noqa: F401  with the kernels of a GPU

    def prepare(self: Any) -> None:
        vars(self).update(module=1, function=1, _run=lambda *_: launches.append(time.perf_counter()))

    driver.set_active(Driver())
    for name, replacement in {"_init_handles": prepare}.items():
        setattr(CompiledKernel, name, replacement)
    kernels.INTERPRETED = True


def optimizer_of(model: str, residual: Any) -> GaLoreAdamW:
    """Of small weights in bfloat16."""
    layers, shapes, trains_others = MODELS[model]
    small = [(m // SHRINK, n // SHRINK) for m, n in shapes] * layers
    others = [(576 // SHRINK,)] * (2 * layers + 1) + [(64, 576 // SHRINK)] if trains_others else []
    params, plain = ([torch.nn.Parameter(torch.randn(x).bfloat16()) for x in some] for some in (small, others))
    groups = [{"params": params, "projected": True}, *([{"params": plain}] if plain else [])]
    config = GaLoreConfig(rank=4, update_proj_gap=1 << 20, kernels="triton", residual=residual)
    return GaLoreAdamW(groups, config)


def measure(optimizer: GaLoreAdamW, profile: cProfile.Profile | None) -> tuple[float, float, int]:
    """Milliseconds of a step, and of what comes before its first launch: medians; launches."""
    times, firsts = [], []
    for step in range(WARM_UP + STEPS):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        launches.clear()
        begin = time.perf_counter()
        if profile is not None and step >= WARM_UP:
            profile.runcall(optimizer.step)
        else:
            optimizer.step()
        times.append(time.perf_counter() - begin)
        firsts.append(launches[0] - begin)
    return 1e3 * statistics.median(times[WARM_UP:]), 1e3 * statistics.median(firsts[WARM_UP:]), len(launches)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="print where the time goes; it takes longer then")
    args = parser.parse_args()
    torch.set_num_threads(1)
    launch_nothing()
    torch.empty = torch.zeros  # type: ignore[assignment]  # no kernel writes: norms and bases stay finite
    for model in MODELS:
        for residual in ("none", "scaled"):
            profile = cProfile.Profile() if args.profile else None
            ms, first, count = measure(optimizer_of(model, residual), profile)
            print(f"{model}, residual {residual}: {ms:.2f} ms, first launch after {first:.2f} ms, {count} launches")
            if profile is not None:
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
