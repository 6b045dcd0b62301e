"""Routes of a step beside each other: which products and tiles are fastest at which rank, and small state.

    python benchmarks/speed_probe.py --json probe.json    # one GPU of 40 GB or more; at most 100 s
    TRITON_INTERPRET=1 python benchmarks/speed_probe.py --device cpu    # small: shows that the script works

First, processes compile every route and hold its products at full size to float32 ones on the GPU: a route that fails
is named and left out. Then routes take turns. A step's milliseconds are a quarter of four in a row; those of a pass lie
between events. Bases are random, since finding them takes long and changes no time of a step. What is printed last for
each rank joins the fastest passes, and is timed as well: it is what ``TABLE`` of ``kernels/routes.py`` may take.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import gc
import itertools
import json
import multiprocessing
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core import galore
from galore_trainer.kernels.routes import TABLE, ProjectRoute, Route, UpdateRoute, forced
from galore_trainer.optim.ops_triton import TritonOps
from galore_trainer.run.bench.limit import limit_ms, passes
from galore_trainer.run.bench.measure import copy_bandwidth, timed
from galore_trainer.run.bench.ranks import RandomBases
from galore_trainer.run.bench.weights import Bench, galore_plus, linear_weights, peer
from galore_trainer.run.results.artifacts import environment

IN_A_ROW = 4
WORKERS = 14
COPIES = 24  # of one matrix in a launch, so that the projection chooses the tiles that it takes for many
PASSES = ("project", "adam_", "line_factors", "apply_")
ORDER = (128, 512, 256, 1024, 32)
NOW = Route()
LOOPED = functools.partial(UpdateRoute, warps=8, looped=True, depth=64)
DESCRIBED = functools.partial(LOOPED, described=True)
TILES = [
    UpdateRoute(64, 128, 8),
    UpdateRoute(64, 128, 4),
    UpdateRoute(32, 256, 8),
    UpdateRoute(64, 256, 8),
    UpdateRoute(32, 128, 8),
    DESCRIBED(128, 128, registers=128),
]
DEEP = [
    UpdateRoute(64, 128, 8, depth=256),
    UpdateRoute(64, 128, 4, depth=256),
    DESCRIBED(128, 128, registers=128),
    DESCRIBED(128, 256, early=False),
    DESCRIBED(64, 256),
]
HIGH = [
    LOOPED(128, 256, early=False),
    DESCRIBED(128, 256),
    DESCRIBED(128, 256, early=False),
    DESCRIBED(128, 128, registers=128),
    LOOPED(128, 128, registers=128),
    DESCRIBED(256, 128, early=False),
]
CANDIDATES: dict[int, tuple[list[ProjectRoute], list[UpdateRoute]]] = {
    32: ([ProjectRoute(lines=256)], TILES),
    128: ([ProjectRoute(lines=256)], TILES),
    256: ([ProjectRoute(columns=128)], DEEP),
    512: ([ProjectRoute(columns=256)], HIGH),
    1024: ([ProjectRoute(columns=256)], HIGH),
}
SMALL = {
    4: ([ProjectRoute(lines=32)], [LOOPED(32, 32)]),
    20: ([ProjectRoute(columns=16)], [LOOPED(32, 32, early=False)]),
}


def routes_of(rank: int, candidates: dict[int, Any]) -> list[Route]:
    """Today's route, and enough others that every candidate for a pass is in one of them."""
    projects, updates = candidates[rank]
    pairs = itertools.zip_longest(projects, updates, fillvalue=None)
    return [NOW, *(Route(project or projects[0], update or updates[0]) for project, update in pairs)]


# ---------------------------------------------------------------------- parity


def check(rank: int, route: Route, device: str) -> dict[str, str]:
    """Compile a route, and compare it at full size; why a pass fails, by its name."""
    failures: dict[str, str] = {}
    square, long = (4096, 11008) if device == "cuda" else (48, 80)
    for side, columns in (("right", square), ("left", long)):
        for name, compare in (("project", _compare_project), ("update", _compare_update)):
            try:
                with forced(route):
                    why = compare(rank, side, square, columns, torch.device(device), route)
            except Exception:
                why = traceback.format_exc(limit=1)[-400:]
            if why:
                failures[name] = f"{side}: {why}"
    return failures


def _places(x: Tensor, copies: int = 1) -> Any:
    from galore_trainer.kernels.tables import Layout, Scattered

    addresses = torch.full((copies,), x.data_ptr(), dtype=torch.int64, device=x.device)
    return Scattered(addresses, x.dtype, 16), Layout.of(x[None])


def _compare_project(rank: int, side: str, rows: int, columns: int, device: torch.device, route: Route) -> str:
    from galore_trainer.kernels.project import project

    G = torch.randn(rows, columns, device=device).bfloat16()
    P = torch.randn(1, columns if side == "right" else rows, rank, device=device).bfloat16()
    places, layout = _places(G, COPIES if device.type == "cuda" else 1)
    many = P.expand(len(places.addresses), -1, -1).contiguous()
    R, ok = project(places, layout, many, side, 1, 1e18)
    if not bool(ok.all()):
        return "a usable gradient is taken for one that is not"
    exact = G.float() @ P[0].float() if side == "right" else P[0].float().mT @ G.float()
    return _far(R[0], exact, 1e-4) or _far(R[-1], exact, 1e-4)


def _compare_update(rank: int, side: str, rows: int, columns: int, device: torch.device, _: Route) -> str:
    from galore_trainer.kernels.tables import packed
    from galore_trainer.kernels.update import apply_update_

    W = torch.randn(rows, columns, device=device).bfloat16()
    N = torch.randn(*((1, rows, rank) if side == "right" else (1, rank, columns)), device=device).bfloat16()
    P = torch.randn(1, columns if side == "right" else rows, rank, device=device).bfloat16()
    one, key, step = torch.ones(1, device=device), 12345678901, 0.3 / rank**0.5
    here = W.clone()
    places, layout = _places(here)
    keys, rates = (torch.full((1,), x, device=device) for x in (key, packed(step, 0.01)))
    apply_update_(places, layout, N, P, side, one, 1, rates=rates, keys=keys)
    lifted = N[0].float() @ P[0].float().mT if side == "right" else P[0].float() @ N[0].float()
    exact = W.float() * 0.99 - step * lifted
    if bool(((here.float() - exact).abs() > 2**-7 * exact.abs() + 1e-4).any()):
        return "a weight is further away than rounding takes it"
    same = float((here == galore.round_bits(exact, _noise(key, rows, columns, device))).float().mean())
    return "" if same > 0.99 else f"only {same:.4f} of the weights are rounded as they should be"


def _noise(key: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """The noise that rounds a weight: the upper 16 bits of a hash for even columns, the lower ones for odd ones."""
    low = 0xFFFFFFFF

    def mixed(x: Tensor) -> Tensor:
        x = (x ^ (x >> 16)) * 0x7FEB352D & low
        x = (x ^ (x >> 15)) * 0x846CA68B & low
        return x ^ (x >> 16)

    i, pair = (torch.arange(size, device=device) for size in (rows, columns // 2))
    by_row = (mixed((i + (key & low)) & low) + (key >> 32)) & low
    drawn = mixed(by_row[:, None] ^ (pair * 0x9E3779B1 & low)[None, :])
    return torch.stack((drawn >> 16, drawn & 0xFFFF), dim=-1).view(rows, columns).int()


def _far(mine: Tensor, exact: Tensor, most: float) -> str:
    error = float((mine - exact).norm() / exact.norm())
    return "" if error < most else f"relative error {error:.2e}"


def check_all(candidates: dict[int, Any], device: str) -> dict[tuple[int, Route], dict[str, str]]:
    """``check`` of every route, in processes on a GPU, since compiling takes longest."""
    tasks = [(rank, route) for rank in candidates for route in routes_of(rank, candidates)]
    if device == "cpu":
        return {task: check(*task, device) for task in tasks}
    found = _in_processes(tasks[::-1], device)  # high ranks compile longest
    for task, why in list(found.items()):
        if any("CUDA" in text or "BrokenProcess" in text for text in why.values()):  # perhaps another's fault
            found |= _in_processes([task], device)
    return found


def _in_processes(tasks: Sequence[tuple[int, Route]], device: str) -> dict[tuple[int, Route], dict[str, str]]:
    found: dict[tuple[int, Route], dict[str, str]] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(WORKERS, len(tasks)), mp_context=context) as pool:
        futures = {pool.submit(check, *task, device): task for task in tasks}
        for future in concurrent.futures.as_completed(futures):
            error = future.exception()
            found[futures[future]] = {"project": repr(error), "update": repr(error)} if error else future.result()
    return found


# ---------------------------------------------------------------------- timing


class Watch:
    """Adds up the milliseconds of the passes of ``TritonOps`` while it is open."""

    def __enter__(self) -> Watch:
        """Put events around the verbs."""
        self._spans: list[tuple[str, Any, Any]] = []
        self._verbs = {name: getattr(TritonOps, name) for name in PASSES}
        for name, verb in self._verbs.items():
            setattr(TritonOps, name, self._watched(name, verb))
        return self

    def __exit__(self, *_: object) -> None:
        """Put the verbs back."""
        for name, verb in self._verbs.items():
            setattr(TritonOps, name, verb)

    def _watched(self, name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            if not torch.cuda.is_available():
                return verb(*args, **options)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = verb(*args, **options)
            end.record()
            self._spans.append((name, begin, end))
            return result

        return watched

    def take(self) -> dict[str, float]:
        """The sums since the last call; the device has to be done."""
        sums: dict[str, float] = dict.fromkeys(PASSES, 0.0)
        for name, begin, end in self._spans:
            sums[name] += begin.elapsed_time(end)
        self._spans.clear()
        return sums


Timed = dict[str, float]


def take_turns(steps: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, Timed]:
    """Medians of a step of four in a row, and of its passes."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in steps}
    with Watch() as watch:
        for turn in range(rounds + 1):
            for name, step in steps.items():
                ms, host = timed(lambda step=step: [step() for _ in range(IN_A_ROW)], device)  # type: ignore[misc]
                sums = watch.take()
                if turn:  # the first round warms up
                    for key, value in {"ms": ms, "host": host, **sums}.items():
                        found[name][key].append(value / IN_A_ROW)
    return {name: {key: statistics.median(values) for key, values in lists.items()} for name, lists in found.items()}


def on_route(step: Callable[[], Any], route: Route) -> Callable[[], None]:
    """A step on a route."""

    def run() -> None:
        with forced(route):
            step()

    return run


def measure(bench: Bench, model: Any, rank: int, routes: list[Route], bandwidth: float, rounds: int) -> dict[str, Any]:
    """Routes at one rank, and the join of the fastest passes."""
    optimizer = galore_plus(bench, model, rank=rank)
    with forced(NOW), RandomBases():
        optimizer.step()
    limit = limit_ms(passes(optimizer), bandwidth)
    steps = {str(i): on_route(optimizer.step, route) for i, route in enumerate(routes)}
    found = take_turns(steps, rounds, bench.torch_device)
    by_project = min(found, key=lambda i: found[i]["project"] or found[i]["ms"])
    by_update = min(found, key=lambda i: found[i]["apply_"] or found[i]["ms"])
    joined = Route(routes[int(by_project)].project, routes[int(by_update)].update)
    both = {"today": on_route(optimizer.step, NOW), "joined": on_route(optimizer.step, joined)}
    pair = take_turns(both, rounds, bench.torch_device)
    rows = [{"route": _dict(route), **found[str(i)]} for i, route in enumerate(routes)]
    rows += [{"route": name, **pair[name]} for name in both]
    return {"rank": rank, "limit": limit, "rows": rows, "joined": _dict(joined), "chosen": joined}


def others(bench: Bench, model: Any, rank: int, route: Route, rounds: int) -> dict[str, Timed]:
    """Small state and the scaled residual, on today's route and on another."""
    small = route._replace(small_state=True)
    steps: dict[str, Callable[[], Any]] = {}
    for name, settings, ways in (
        ("32-bit state", {}, (NOW, route)),
        ("16-bit state", {"state_bits": 16}, (NOW, small)),
        ("8-bit state", {"state_bits": 8}, (NOW, small)),
        ("scaled residual", {"residual": "scaled"}, (NOW, route)),
    ):
        if "residual" in settings and rank > 128:  # its kernels were not compiled before
            continue
        optimizer = galore_plus(bench, model, rank=rank, **settings)
        for title, way in zip(("today", "joined"), ways, strict=True):
            steps[f"{name}, {title}"] = on_route(optimizer.step, way)
    alive = {}
    for name, step in steps.items():
        try:
            with RandomBases():
                step()
            alive[name] = step
        except Exception as error:
            print(f"r {rank} {name}: FAILED {str(error)[:300]}")
    return take_turns(alive, rounds, bench.torch_device)


def _dict(route: Route) -> dict[str, Any]:
    return {"project": route.project._asdict(), "update": route.update._asdict(), "small_state": route.small_state}


def short(route: Any) -> str:
    """A route in few letters: what differs from today's, in the order of its fields."""
    if isinstance(route, str):
        return route
    project, update = ProjectRoute(**route["project"]), UpdateRoute(**route["update"])
    left = f"{project.lines}x{project.columns if project.columns < 1 << 29 else 'r'}"
    kind = "loop" if update.looped else "stack"
    right = f"{kind} {update.rows}x{update.columns}x{update.depth} w{update.warps}"
    flags = {"late": not update.early, "tma": update.described, str(update.registers): update.registers}
    right = " ".join([right, *(name for name, has in flags.items() if has)])
    return f"{left} | {right}"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The table of one rank."""
    yield f"rank {found['rank']}: limit {found['limit']:.2f} ms;  project | update"
    for row in found["rows"]:
        name = short(row["route"]) if row["route"] != "joined" else f"joined: {short(found['joined'])}"
        times = "  ".join(f"{row[key]:7.2f}" for key in ("project", "adam_", "apply_", "ms", "host"))
        yield f"  {name:<52}{times}  {row['ms'] / found['limit']:.2f}"


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=100.0, help="what would begin later is left out")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    begin = time.perf_counter()
    cuda = args.device == "cuda"
    candidates = CANDIDATES if cuda else SMALL
    size: dict[str, Any] = {} if cuda else {"shape": "tiny", "layers": 1}
    bench = Bench(device=args.device, dtype="bfloat16", kernels="triton", **size)
    failures = check_all(candidates, args.device)
    for (rank, route), why in failures.items():
        for name, text in why.items():
            print(f"r {rank} {short(_dict(route))}: {name} FAILED {text}")
    print(f"{len(failures)} routes compiled and compared in {time.perf_counter() - begin:.0f} s", flush=True)
    bandwidth = copy_bandwidth(bench.torch_device)
    model = linear_weights(bench)
    device = torch.cuda.get_device_name() if cuda else "cpu"
    content: dict[str, Any] = {"device": device, "environment": environment(), "bandwidth": bandwidth, "ranks": []}
    adamw = take_turns({"AdamW": peer(bench, "adamw", model).step}, args.rounds, bench.torch_device)["AdamW"]
    content |= {"adamw": adamw, "now": [(rank, _dict(route)) for rank, route in TABLE], "others": {}}
    print(f"{device}: copy {bandwidth / 1e12:.2f} TB/s, fused AdamW {adamw['ms']:.2f} ms")
    print(f"  {'':<52}{'project':>7}  moments   update     step     host  step / limit")
    for rank in ORDER if cuda else candidates:
        if time.perf_counter() - begin > args.seconds:
            print(f"rank {rank}: left out, {args.seconds:.0f} s are over")
            continue
        routes = [route for route in routes_of(rank, candidates) if not failures[rank, route]] or [NOW]
        found = measure(bench, model, rank, routes, bandwidth, min(args.rounds, 2) if rank >= 1024 else args.rounds)
        chosen = found.pop("chosen")
        content["ranks"].append(found)
        print("\n".join(lines(found)), flush=True)
        if rank in (128, 512, min(candidates)) and time.perf_counter() - begin < args.seconds:
            content["others"][rank] = others(bench, model, rank, chosen, 3)
            for name, times in content["others"][rank].items():
                print(
                    f"  {name:<52}"
                    + "  ".join(f"{times[k]:7.2f}" for k in ("project", "adam_", "apply_", "ms", "host"))
                )
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        if args.json:
            args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
