"""The step of a stack by the kernels: the page of ``core/galore.py`` on weights, gradients and moments where they lie.

Not for every step: a refresh (but for its small factorizations), the warm-up of a residual, and what ``why_not`` names
are left to ``core/``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.linalg import Tools, by_cholesky, by_eigh, by_householder
from galore_trainer.errors import OptionError
from galore_trainer.kernels import obstacle
from galore_trainer.optim import residual_state
from galore_trainer.optim.group_settings import scale_of
from galore_trainer.optim.native import Incoming, take_in
from galore_trainer.optim.plain import PlainJob
from galore_trainer.optim.skips import Flag
from galore_trainer.optim.stack import AGE, BASIS, MOMENTS, Job, Stack, entries
from galore_trainer.optim.streams import rounding_key

FIRST_ELEMENTS = 1 << 29  # ``stack.entries`` that move in one go at first, then twice as many each time,
STACK_ELEMENTS = 1 << 30  # and at most: what is made of their projections is held meanwhile
INDEX, SKIPPED = "residual_index", "skipped"
LIMIT = galore.largest_usable(torch.float32)
_LAYOUTS: dict[tuple[Any, ...], Any] = {}  # a few, by form, shape and strides
LIBRARY = 3_000_000  # k^3 / this: so many k x k matrices the library decomposes while the kernel does them all


def wanted(config: GaLoreConfig, device: torch.device) -> bool:
    """Whether kernels shall be used on a device, if they can be."""
    return config.kernels == "triton" or (config.kernels == "auto" and device.type == "cuda")


def why_not(job: Job, config: GaLoreConfig) -> str | None:
    """Why the kernels do not move a matrix; None where they do."""
    if not wanted(config, job.parameter.device):
        return "it lies elsewhere than on a GPU"
    dtypes = {job.parameter.dtype} if job.part is not None else {job.parameter.dtype, job.grad.dtype}
    return obstacle(job.parameter.device, *dtypes)


def divide(jobs: Iterable[Job], config: GaLoreConfig, rest: list[Job], most: int | None = None) -> Iterator[Stack]:
    """Stacks that the kernels move, each as soon as its jobs are there: the device works while the host goes on.

    Args:
        jobs: of one device; those of one shape come one after the other.
        config: of the optimizer.
        rest: takes the jobs that are left to ``core/``.
        most: ``stack.entries`` in a stack; None begins with few, so that the device need not wait long.
    """
    if config.kernels == "torch":
        rest.extend(jobs)
        return
    size = FIRST_ELEMENTS if most is None else most
    for _, alike in itertools.groupby(jobs, key=lambda job: job.parameter.shape):
        gathered: dict[tuple[Any, ...], list[Job]] = {}
        for job in alike:
            key = key_of(job, config)
            members = gathered.setdefault(key, [])
            members.append(job)
            if (len(members) + 1) * entries(job.matrix) > size:
                del gathered[key]
                if _moves(members, config, rest):
                    yield Stack(members)
                if most is None:
                    size = min(2 * size, STACK_ELEMENTS)
        for members in gathered.values():
            if _moves(members, config, rest):
                yield Stack(members)


def _moves(members: list[Job], config: GaLoreConfig, rest: list[Job]) -> bool:
    """Whether the kernels move equal jobs; else the rest takes them."""
    first = members[0]
    by_row = config.residual_selection == "row" and first.prefix + INDEX in first.state
    moves = why_not(first, config) is None and (by_row or not residual_state.residual_lives(first, config))
    if not moves:
        rest += members
    return moves


def check_wanted(jobs: Iterable[Job], config: GaLoreConfig) -> None:
    """Refuse weights that the kernels cannot move where ``kernels: triton`` asks for them.

    Raises:
        OptionError: there is an obstacle.
    """
    if config.kernels != "triton":
        return
    for job in jobs:
        if (reason := why_not(job, config)) is not None:
            way_out = f"{job.name}: {reason}. Use auto, which takes torch there."
            raise OptionError("galore.kernels", "triton", "weights that the kernels can move", way_out)


def key_of(job: Job, config: GaLoreConfig) -> tuple[Any, ...]:
    """Equal for jobs that the kernels take in one go: the age of their bases does not matter to them."""
    p, g, matrix, part = job.parameter, job.grad, job.matrix, job.part
    residual = None
    if config.residual_percent > 0.0:
        residual = (residual_state.residual_lives(job, config), matrix.prefix + INDEX in job.state)
    strides = None if part is None and p.is_contiguous() and g.is_contiguous() else (p.stride(), g.stride())
    kept = (part is None, job.grad_ok is None, residual)
    return (id(job.group), matrix.form, kept, p.shape, strides, p.dtype, g.dtype, job.factors, p.get_device())


def update(stack: Stack, config: GaLoreConfig, seed: int) -> None:
    """One step of equal matrices with the bases they have; steps that are skipped are counted."""
    with torch.cuda.device_of(stack.jobs[0].parameter):  # kernels are launched on the current one
        _update(stack, config, seed)


def _update(stack: Stack, config: GaLoreConfig, seed: int) -> None:
    from galore_trainer.kernels.count import count_
    from galore_trainer.kernels.project import project
    from galore_trainer.kernels.update import add_at_, apply_update_

    matrix, group, jobs = stack.matrix, stack.group, stack.jobs
    side, blocks, first = matrix.side, matrix.blocks, jobs[0]
    places = Places(stack, config, seed)
    layout = places.layout(first.parameter)
    if first.part is None:
        G = places["gradients"]
        R, ok = project(G, places.layout(first.grad), places.bases(first.factors or G.dtype), side, blocks, LIMIT)
    else:
        R = stack.kept("projected")
        ok = galore.usable_parts(R, len(jobs))
    if first.grad_ok is not None:
        ok = ok * torch.stack([job.grad_ok for job in jobs if job.grad_ok is not None])
    D = _lost(stack, places, R, ok) if places.has_residual else None  # before moments move: it can be unusable too
    W, low = places["weights"], first.factors or first.parameter.dtype
    N = _moments(stack, places, MOMENTS, AGE, R, ok, low)
    lr = float(group["lr"])  # torch takes tensors, too
    movement: dict[str, Any] = {"step": lr * scale_of(group, config), "keys": places.keys}
    decay = lr * group["weight_decay"]
    apply_update_(W, layout, N, places.bases(low), side, ok, blocks, decay=decay, **movement)
    if D is not None:
        N = _moments(stack, places, residual_state.MOMENTS, residual_state.AGE, D, ok, torch.float32)
        movement["step"] *= config.residual_scale
        add_at_(W, layout, places[INDEX], N, ok, **movement)
    count_([places[age] for age in places.ages], places[SKIPPED], ok)


def _moments(
    stack: Stack, places: Places, keys: Sequence[tuple[str, bool]], age: str, R: Tensor, ok: Tensor, dtype: torch.dtype
) -> Tensor:
    """Take R into a pair of moments; the normalised update N. Moments in fewer bits do not go through a kernel."""
    from galore_trainer.kernels.adam import adam_

    group = stack.group
    if not places.ages:
        return take_in([Incoming(stack, R, stack.spread(ok))], keys, age)[0].to(dtype)
    M, V = (places[key] for key, _ in keys)
    return adam_(M, V, places[age], R, ok, dtype=dtype, betas=group["betas"], eps=group["eps"])


def _lost(stack: Stack, places: Places, R: Tensor, ok: Tensor) -> Tensor:
    """D[S], [jobs x blocks, rows, k], the basis in the precision that projected; ``ok`` is 0 where it is unusable."""
    from galore_trainer.kernels.residual import loss_at

    first, matrix = stack.jobs[0], stack.matrix
    count = first.state[first.prefix + INDEX].shape[-1]
    if first.part is None:
        G, layout = places["gradients"], places.layout(first.grad)
    else:
        G, layout = places["sampled"], None
    P = places.bases(first.factors or first.grad.dtype)
    D = loss_at(G, layout, places[INDEX], R, P, matrix.side, matrix.blocks, count)
    ok.mul_(galore.usable_parts(D, len(ok)))
    return D


class Places:
    """Where everything of a stack lies, by key of the state or name; one upload for all of it.

    Attributes:
        has_residual: whether the matrices have sparse moments.
        ages: keys of what is counted where it lies: none where moments have fewer than 32 bits.
        keys: for the rounding of bfloat16 weights, int64 [jobs]; None rounds to nearest.
    """

    def __init__(self, stack: Stack, config: GaLoreConfig, seed: int) -> None:
        from galore_trainer.kernels.tables import scatter

        self._stack, first = stack, stack.jobs[0]
        self.has_residual = residual_state.residual_lives(first, config)
        self._bases: dict[torch.dtype, Tensor] = {}
        self.ages: list[str] = []
        keys = [BASIS, *([INDEX] if self.has_residual else [])]
        if stack.group["galore"]["state_bits"] == 32:
            self.ages = [AGE, *([residual_state.AGE] if self.has_residual else [])]
            pairs = [*MOMENTS, *(residual_state.MOMENTS if self.has_residual else ())]
            keys += [*self.ages, *(key for key, _ in pairs)]
        columns = stack.addresses(keys)
        dtypes = {key: first.state[first.prefix + key].dtype for key in keys} | {SKIPPED: torch.int32}
        columns[SKIPPED] = [job.state[SKIPPED].data_ptr() if job.last else 0 for job in stack.jobs]
        columns["weights"] = self._begin([job.parameter for job in stack.jobs])
        dtypes["weights"] = first.parameter.dtype
        if first.part is None:
            columns["gradients"] = self._begin([job.grad for job in stack.jobs])
            dtypes["gradients"] = first.grad.dtype
        elif self.has_residual:
            self._sampled = stack.kept("sampled")  # lives as long as its addresses
            columns["sampled"] = [x.data_ptr() for x in stack.split(self._sampled)]
            dtypes["sampled"] = self._sampled.dtype
        noise = None
        if rounds(first.parameter, config):
            noise = [rounding_key(seed, job.name, job.state["calls"]) for job in stack.jobs]
        self._found, self.keys = scatter(columns, dtypes, noise, stack.device)

    def _begin(self, stored: Sequence[Tensor]) -> list[int]:
        """Where the logical matrices begin in weights or gradients."""
        row = stored[0].element_size() * self.layout(stored[0]).row_stride
        return [x.data_ptr() + job.matrix.start * row for x, job in zip(stored, self._stack.jobs, strict=True)]

    def __getitem__(self, name: str) -> Any:
        """Weights, gradients, or tensors of the state by their key."""
        return self._found[name]

    def layout(self, stored: Tensor) -> Any:
        """How the logical matrices lie in tensors like this one."""
        matrix = self._stack.matrix
        key = (matrix.form, stored.shape, stored.stride())
        if key not in _LAYOUTS:
            from galore_trainer.kernels.tables import Layout

            _LAYOUTS[key] = Layout.of(matrix.rows_of(stored))
        return _LAYOUTS[key]

    def bases(self, dtype: torch.dtype) -> Tensor:
        """The bases of all jobs in a dtype, [jobs x blocks, ...]."""
        from galore_trainer.kernels.project import join

        if dtype not in self._bases:
            stored: Any = self._found[BASIS]
            if stored.dtype == dtype:
                self._bases[dtype] = self._stack.get(BASIS)
            elif stored.dtype == torch.int8:
                self._bases[dtype] = self._stack.get_basis().to(dtype)
            else:
                self._bases[dtype] = join(stored, self._stack.matrix.basis_shape, dtype)
        return self._bases[dtype]


def plain_update(jobs: Sequence[PlainJob], config: GaLoreConfig, seed: int) -> tuple[list[Flag], list[PlainJob]]:
    """AdamW by the kernel, equal parameters together; the flags of what has moved, and the rest."""
    rest: list[PlainJob] = []
    alike: dict[tuple[Any, ...], list[PlainJob]] = {}
    for job in jobs:
        p, grad, moment = job.p, job.grad, job.state["exp_avg"]
        dense = p.is_contiguous() and grad.is_contiguous() and p.numel() > 0 and moment.dtype == torch.float32
        if wanted(config, p.device) and dense and obstacle(p.device, p.dtype, grad.dtype) is None:
            alike.setdefault((id(job.group), p.numel(), p.dtype, grad.dtype, p.device), []).append(job)
        else:
            rest.append(job)
    flags: list[Flag] = []
    for members in alike.values():
        with torch.cuda.device_of(members[0].p):
            flags += _plain_update(members, config, seed)
    return flags, rest


def _plain_update(jobs: list[PlainJob], config: GaLoreConfig, seed: int) -> list[Flag]:
    from galore_trainer.kernels.plain import adamw_
    from galore_trainer.kernels.tables import scatter

    first, group = jobs[0], jobs[0].group
    tensors = {"weights": [job.p for job in jobs], "gradients": [job.grad for job in jobs]}
    tensors |= {key: [job.state[key] for job in jobs] for key in ("exp_avg", "exp_avg_sq")}
    numbers = {name: [x.data_ptr() for x in each] for name, each in tensors.items()}
    dtypes = {name: each[0].dtype for name, each in tensors.items()}
    keys = None
    if rounds(first.p, config):
        keys = [rounding_key(seed, job.name, job.state["calls"]) for job in jobs]
    found, uploaded_keys = scatter(numbers, dtypes, keys, first.p.device)
    W, G, M, V = (found[name] for name in tensors)
    ok = torch.stack([job.ok for job in jobs])
    t = torch.stack([job.state["step"] for job in jobs]) + ok
    adamw_(
        W, G, M, V, t, ok, first.p.numel(), lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
        weight_decay=group["weight_decay"], keys=uploaded_keys,
    )  # fmt: skip
    for job, age in zip(jobs, t.unbind(), strict=True):
        job.state["step"] = age
        job.state["calls"] += 1
    return [(job.state, job.ok) for job in jobs]


def tools_for(config: GaLoreConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Tools:
    """What to try first at a refresh on a device, for state of a dtype; ``CERTAIN`` where nothing is faster."""
    cuda = device.type == "cuda"
    by_kernel = wanted(config, device) and obstacle(device, dtype) is None
    find = _eigenvectors if by_kernel else _by_library if cuda else by_eigh
    return Tools(by_cholesky if cuda else by_householder, find)


def _eigenvectors(C: Tensor) -> Tensor:
    """``core.linalg.Eigenvectors``: many at once by the kernel; the library takes one after the other."""
    from galore_trainer.kernels.jacobi import eigenvectors

    count, k, _ = C.shape
    if k == 1 or count * LIBRARY < k**3:
        return _by_library(C)
    with torch.cuda.device_of(C):
        return eigenvectors(C)


def _by_library(C: Tensor) -> Tensor:
    """``by_eigh``, which raises an error at NaN; what these vectors multiply is NaN then, too."""
    return by_eigh(C.nan_to_num())


def rounds(p: Tensor, config: GaLoreConfig) -> bool:
    """Whether a weight is rounded stochastically."""
    return p.dtype == torch.bfloat16 and config.stochastic_rounding
