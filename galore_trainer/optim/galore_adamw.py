"""``GaLoreAdamW``: a ``torch.optim.Optimizer`` that projects what its groups say and gives the rest to AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.basis import BASES, sketch_width
from galore_trainer.core.heads import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.optim.plain import plain_state, plain_step
from galore_trainer.optim.state import check_same_method, restore_dtypes
from galore_trainer.optim.streams import stream
from galore_trainer.optim.timing import Stopwatch

NON_FINITE_LIMIT = 10  # steps in a row


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW whose moments live in a low-rank projection of the gradient (GaLore+).

    Args:
        params: parameter groups. ``galore_trainer.optim.groups.parameter_groups`` makes them from a model. By hand, a
            group ``{"params": [...], "projected": True}`` projects each of its 2-D weights whole; a group without
            ``projected`` takes ordinary AdamW. ``names`` (one a parameter) seed the random streams.
        config: how to project; see ``GaLoreConfig``.
        lr: learning rate as for AdamW; projected weights move with ``lr * config.scale``.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``; decay is decoupled and in full space.
        seed: seeds heads, test matrices and rounding.

    Raises:
        OptionError: an impossible setting, or (at ``load_state_dict``) a state made under another one.
        FloatingPointError: a parameter's gradient was not finite ten steps in a row.

    State of a parameter: tensors and integers only. ``calls`` counts steps, ``refreshes`` changes of basis, ``due`` is
    the value of ``calls`` at which the next one happens, ``skipped`` [in a row, in all] counts non-finite gradients.
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
        for option, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise OptionError(option, value, "a number of at least 0")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise OptionError(f"betas[{i}]", beta, "a number in [0, 1)")
        self.config = config or GaLoreConfig()
        self.seed = seed
        self.stopwatch = Stopwatch()
        self.projection_errors: dict[str, Tensor] = {}  # by matrix, of the newest refresh
        self._steps = 0
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, projected=False))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; fills in names, logical matrices and the settings that a resume must find again."""
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        group.setdefault("names", [f"{index}.{i}" for i in range(len(group["params"]))])
        if group["projected"]:
            if "matrices" not in group:
                group["matrices"] = [[self._whole(p, n)] for p, n in zip(group["params"], group["names"], strict=True)]
            fields = self.config.to_dict()
            group["galore"] = {k: fields[k] for k in GaLoreConfig.trajectory_fields()} | {"seed": self.seed}

    def _whole(self, p: Tensor, name: str) -> LogicalMatrix:
        from galore_trainer.optim.sides import project_whole

        return project_whole(p.shape, name, self.config)

    # ------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise OptionError(group["names"][i], "a sparse gradient", "a dense one", "Use sparse=False.")
                if group["projected"]:
                    self._projected_step(p, grad, group["names"][i], group["matrices"][i], group)
                else:
                    with self.stopwatch.measure("plain", p.device):
                        self._plain_step(p, grad, group["names"][i], group)
        self._steps += 1
        if self._steps % NON_FINITE_LIMIT == 0:
            self.check_finite()
        return loss

    def _projected_step(
        self, p: Tensor, grad: Tensor, name: str, matrices: list[LogicalMatrix], group: dict[str, Any]
    ) -> None:
        state = self.state[p]
        if not state:
            state.update(calls=0, refreshes=0, due=0, skipped=torch.zeros(2, dtype=torch.int32, device=p.device))
            for matrix in matrices:
                _write(state, matrix.label, _empty_state(matrix, p.device))
            if group["lr"] == 0.0 and not grad.any():
                return  # how checkpoint tools create state: nothing else may change
        if state["calls"] >= state["due"]:
            with self.stopwatch.measure("refresh", p.device):
                self._refresh(p, grad, name, matrices, state, group)
        with self.stopwatch.measure("update", p.device):
            rounding = self._rounding(p, name, state["calls"])
            old = [_read(state, matrix.label) for matrix in matrices]
            pairs = list(zip(matrices, old, strict=True))
            Rs = [galore.project(matrix.take(grad), s.P, matrix.side) for matrix, s in pairs]
            ok = galore.all_finite(Rs)
            for (matrix, s), R in zip(pairs, Rs, strict=True):
                new, N = galore.step_moments(s, R, ok, betas=group["betas"], eps=group["eps"])
                W = matrix.take(p)
                galore.apply_update_(
                    W, N, new.P, matrix.side, lr=group["lr"], scale=self.config.scale,
                    weight_decay=group["weight_decay"], ok=ok, generator=rounding,
                )  # fmt: skip
                matrix.put(p, W)
                _write(state, matrix.label, new)
            _count_skipped(state, ok)
        state["calls"] += 1

    def _plain_step(self, p: Tensor, grad: Tensor, name: str, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(plain_state(p), calls=0, skipped=torch.zeros(2, dtype=torch.int32, device=p.device))
            if group["lr"] == 0.0 and not grad.any():
                return
        ok = plain_step(p, grad, state, group, self._rounding(p, name, state["calls"]))
        _count_skipped(state, ok)
        state["calls"] += 1

    def _rounding(self, p: Tensor, name: str, calls: int) -> torch.Generator | None:
        if p.dtype != torch.bfloat16 or not self.config.stochastic_rounding:
            return None
        return stream(p.device, self.seed, name, "rounding", calls)

    # ------------------------------------------------------------------ refresh

    def _refresh(
        self,
        p: Tensor,
        grad: Tensor,
        name: str,
        matrices: list[LogicalMatrix],
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> None:
        """Find new bases from the current gradient; an all-zero or non-finite gradient leaves the refresh due."""
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32).item()
        if not 0.0 < norm < float("inf"):
            return
        config, refresh = self.config, state["refreshes"]
        for matrix in matrices:
            full_name = f"{name}.{matrix.label}" if matrix.label else name
            G = matrix.take(grad)
            lending = matrix.lend(G, self._lending_heads(G, matrix, full_name, refresh)).float()
            P = BASES[config.svd](
                lending,
                matrix.rank,
                matrix.side,
                omega=self._omega(matrix, full_name, refresh, p.device) if config.svd != "exact" else None,
                iterations=config.subspace_iterations,
                raw_signs=config.momentum_transfer == "keep",
            )
            old = _read(state, matrix.label)
            if refresh == 0:
                new = old._replace(P=P)
            else:
                new = galore.change_basis(old, P, matrix.side, config.momentum_transfer, betas=group["betas"])
            _write(state, matrix.label, new)
            self.projection_errors[full_name] = galore.projection_error(G, new.P, matrix.side)
        state["refreshes"] = refresh + 1
        state["due"] = (state["calls"] // config.update_proj_gap + 1) * config.update_proj_gap

    def _lending_heads(self, G: Tensor, matrix: LogicalMatrix, name: str, refresh: int) -> Tensor | None:
        if not matrix.lenders or matrix.lenders == matrix.heads_per_block:
            return None
        if self.config.head_choice == "energy":
            return matrix.energy(G).topk(matrix.lenders, dim=-1).indices.sort(dim=-1).values
        heads = torch.arange(matrix.lenders).expand(matrix.blocks, -1)
        if self.config.head_choice == "random":  # drawn on the CPU, so that every device type lends the same head
            draws = (stream("cpu", self.seed, name, "head", refresh, b) for b in range(matrix.blocks))
            heads = torch.stack([torch.randperm(matrix.heads_per_block, generator=g) for g in draws])
            heads = heads[:, : matrix.lenders].sort(dim=-1).values
        return heads.to(G.device)

    def _omega(self, matrix: LogicalMatrix, name: str, refresh: int, device: torch.device) -> Tensor:
        blocks, m, n = matrix.lending_shape
        k = sketch_width(matrix.rank, self.config.resolved_oversampling(matrix.rank), m, n)
        draws = (stream(device, self.seed, name, "omega", refresh, b) for b in range(blocks))
        return torch.stack([torch.randn(n, k, generator=g, device=device) for g in draws])

    # ------------------------------------------------------------------ diagnostics and state

    def check_finite(self) -> dict[str, int]:
        """Skipped steps by parameter name (those with any); raises after ten non-finite gradients in a row."""
        names = [n for g in self.param_groups for n, p in zip(g["names"], g["params"], strict=True) if p in self.state]
        states = [self.state[p] for g in self.param_groups for p in g["params"] if p in self.state]
        if not states:
            return {}
        counts = torch.stack([s["skipped"].to(states[0]["skipped"].device) for s in states]).tolist()
        stuck = [n for n, (in_a_row, _) in zip(names, counts, strict=True) if in_a_row >= NON_FINITE_LIMIT]
        if stuck:
            some = ", ".join(stuck[:5]) + (f" and {len(stuck) - 5} more" if len(stuck) > 5 else "")
            raise FloatingPointError(
                f"gradients were not finite in {NON_FINITE_LIMIT} steps in a row: {some}. Their weights were left as "
                "they were. Lower the learning rate, look for a bad batch, or train in float32 or bfloat16."
            )
        return {n: total for n, (_, total) in zip(names, counts, strict=True) if total}

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state by kind: basis, moments, plain (AdamW of what is not projected)."""
        kinds = {"basis": 0, "moments": 0, "plain": 0}
        for group in self.param_groups:
            for p in group["params"]:
                for key, value in self.state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        kind = "plain" if not group["projected"] else "basis" if key.endswith("basis") else "moments"
                        kinds[kind] += value.numel() * value.element_size()
        return kinds

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors, numbers and strings, readable with ``torch.load(weights_only=True)``."""
        saved = super().state_dict()
        saved["param_groups"] = [{k: v for k, v in g.items() if k != "matrices"} for g in saved["param_groups"]]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made under the same method; every tensor keeps its dtype.

        Raises:
            OptionError: rank, gap, seed, names or another setting that shapes the state differs; both values and the
                way out are named.
        """
        check_same_method(state_dict["param_groups"], self.param_groups)
        own: list[dict[str, Any]] = [{k: g[k] for k in ("matrices", "galore") if k in g} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept)
            group["betas"] = tuple(group["betas"])
        restore_dtypes(self, state_dict)


# ---------------------------------------------------------------------- state of one matrix, by key


def _key(label: str, name: str) -> str:
    return f"{label}.{name}" if label else name


def _empty_state(matrix: LogicalMatrix, device: torch.device) -> galore.MatrixState:
    return galore.MatrixState(
        P=torch.zeros(matrix.basis_shape, device=device),
        M=torch.zeros(matrix.moment_shape, device=device),
        V=torch.zeros(matrix.moment_shape, device=device),
        t=torch.zeros((), device=device),
    )


def _read(state: dict[str, Any], label: str) -> galore.MatrixState:
    return galore.MatrixState(*(state[_key(label, k)] for k in ("basis", "exp_avg", "exp_avg_sq", "step")))


def _write(state: dict[str, Any], label: str, new: galore.MatrixState) -> None:
    for k, value in zip(("basis", "exp_avg", "exp_avg_sq", "step"), new, strict=True):
        state[_key(label, k)] = value


def _count_skipped(state: dict[str, Any], ok: Tensor) -> None:
    bad = (1.0 - ok).to(torch.int32)
    in_a_row, total = state["skipped"]
    state["skipped"] = torch.stack([(in_a_row + 1) * bad, total + bad])
