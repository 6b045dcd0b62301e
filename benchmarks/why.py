"""Measures on real gradients what the settings rest on: heads' subspaces, their drift, what the projection loses.

Trains with GaLore+ as the configuration says. Before the weights move in some steps it looks at the gradient of the
step, and at gradients of held-out batches at the same weights; training goes on as if nobody had looked.

    python benchmarks/why.py gsm8k data.source=path/to/train.jsonl data.eval_samples=600 max_steps=430 --json why.json

``docs/why_figures.py`` draws what it writes. Everything is exact (no randomized decomposition) and outside the timed
part of a step.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import why_measures as measures
from torch import Tensor
from transformers import TrainerCallback

RANKS = (8, 32, 128)
AT, LAGS = (1, 10, 50, 100, 200, 430), (1, 10, 50, 100, 200)
LARGE = 0.012
"""Share of the entries of D that a sparse residual would take."""
SHARED = ("q_proj", "k_proj", "v_proj")
KINDS = (*SHARED, "o_proj", "gate_proj", "up_proj", "down_proj")
LEFT = ("down_proj",)
PAIRS = (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules with the same inputs, whose subspaces can be compared."""
Gradients = dict[str, Tensor]
"""[L, rows, n] of every kind of module, transposed where the left side is projected."""


class Weights:
    """The projected weights of some layers.

    Args:
        model: a decoder with modules named as in ``KINDS``.
        layers: number of layers, evenly spaced over the depth; the first and the last are among them.
    """

    def __init__(self, model: Any, layers: int) -> None:
        by_kind: dict[str, dict[int, Any]] = {kind: {} for kind in KINDS}
        for name, module in model.named_modules():
            kind, layer = name.rpartition(".")[2], re.search(r"\.(\d+)\.", name)
            if kind in by_kind and layer:
                by_kind[kind][int(layer[1])] = module.weight
        depth = len(by_kind["q_proj"])
        count = min(layers, depth)
        self.layers = sorted({round(i * (depth - 1) / max(1, count - 1)) for i in range(count)})
        self.weights = {kind: [of_kind[layer] for layer in self.layers] for kind, of_kind in by_kind.items()}
        queries, keys = model.config.num_attention_heads, model.config.num_key_value_heads
        self.heads = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}

    def gradients(self) -> Gradients:
        """Copies of the gradients that the weights have now, in float32."""
        stacked = {kind: torch.stack([w.grad.float() for w in weights]) for kind, weights in self.weights.items()}
        return {kind: G.mT.contiguous() if kind in LEFT else G for kind, G in stacked.items()}

    def by_head(self, kind: str, X: Tensor) -> Tensor:
        """[L, heads, d, n]: rows of q, k, v; columns of o, whose subspaces lie among its outputs."""
        X = X.mT if kind == "o_proj" else X
        return X.unflatten(1, (self.heads[kind], -1))


class Probe(TrainerCallback):
    """Measures in some steps, and stops the training after the last of them.

    Args:
        trainer: with a ``GaLoreAdamW``.
        at: steps of all measures, from 1.
        lags: after so many steps the subspaces are looked at again.
        layers: see ``Weights``.
        batches: number of held-out batches, of the size of a step's.
    """

    def __init__(self, trainer: Any, at: Sequence[int], lags: Sequence[int], layers: int, batches: int) -> None:
        self.trainer, self.at, self.lags, self.batches = trainer, sorted(at), lags, batches
        self.weights = Weights(trainer.model, layers)
        smallest = min(min(w[0].shape) for w in self.weights.weights.values())
        self.ranks = [rank for rank in RANKS if rank <= smallest]
        self.again = {step + lag for step in at for lag in lags if step + lag <= max(at)}
        self.found: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("heads", "modules", "drift", "same_data", "residual", "signal", "update")
        }
        self.limited: list[Tensor] = []
        self.norms: Tensor | None = None
        self.seconds = 0.0
        self._bases: dict[int, Gradients] = {}
        self._held: dict[int, tuple[Gradients, Gradients]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients."""
        step = state.global_step + 1
        if step in self.at or step in self.again:
            start = time.perf_counter()
            with torch.no_grad():
                self._look(step)
            self.seconds += time.perf_counter() - start

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the update and its limit."""
        from galore_trainer.optim.residual import NORM

        step = state.global_step + 1
        optimizer = inner(self.trainer)
        norms = [s[NORM] for p in projected(optimizer) if NORM in (s := optimizer.state[p])]
        if norms:
            new = torch.stack(norms)
            if self.norms is not None:
                self.limited.append(is_limited(new, self.norms).float().mean())
            if step in self.at:
                with torch.no_grad():
                    self.found["update"] += self._update(step, optimizer)
            self.norms = new
        if step >= self.at[-1]:
            control.should_training_stop = True

    # ------------------------------------------------------------------ subspaces and their drift

    def _look(self, step: int) -> None:
        X = self.weights.gradients()
        P = {kind: measures.top(of_kind, self.ranks[-1]) for kind, of_kind in X.items()}
        for lag in self.lags:
            if (old := self._bases.get(step - lag)) is not None and step - lag in self.at:
                self.found["drift"] += self._compared(old, P, X, at=step - lag, lag=lag)
        if step not in self.at:
            return
        self._bases[step] = P
        held = list(self._held_out())
        mean = {kind: torch.stack([some[kind] for some in held]).mean(dim=0) for kind in KINDS}
        of_one, of_mean = (
            {k: measures.top(of_kind, self.ranks[-1]) for k, of_kind in Y.items()} for Y in (held[0], mean)
        )
        self.found["drift"] += self._compared(P, of_one, held[0], at=step, lag=0)
        for before, (one, many) in self._held.items():
            self.found["same_data"] += self._compared(one, of_one, held[0], at=before, to=step, batches=1)
            self.found["same_data"] += self._compared(many, of_mean, mean, at=before, to=step, batches=len(held))
        self._held[step] = of_one, of_mean
        self.found["heads"] += self._heads(step, X, P, held[0])
        self.found["modules"] += self._modules(step, P)
        self.found["residual"] += self._residual(step, X, P, held)
        self.found["signal"] += self._signal(step, X, P, held)

    def _compared(self, old: Gradients, P: Gradients, X: Gradients, **where: int) -> Iterator[dict[str, Any]]:
        """Similarity of two bases, and how much of X, from which P is, each keeps."""
        for kind in KINDS:
            for rank in self.ranks:
                before, now = old[kind][..., :rank], P[kind][..., :rank]
                yield {
                    **where,
                    "kind": kind,
                    "rank": rank,
                    "similarity": mean(measures.similarity(before, now)),
                    "chance": short(rank / before.shape[-2]),
                    "kept": mean(measures.kept(X[kind], before)),
                    "kept_by_own": mean(measures.kept(X[kind], now)),
                }

    def _held_out(self) -> Iterator[Gradients]:
        """Gradients of held-out batches, the same in every step; those of the weights stay as they are."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        rows, size = trainer.eval_dataset, trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
        kept = [(p, p.grad) for p in model.parameters()]
        for i in range(self.batches):
            for p, _ in kept:
                p.grad = None
            batch = trainer.data_collator([rows[j] for j in range(i * size, (i + 1) * size)])
            inputs = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
            with torch.enable_grad(), trainer.compute_loss_context_manager():
                trainer.compute_loss(model, inputs).backward()
            yield self.weights.gradients()
        for p, grad in kept:
            p.grad = grad

    # ------------------------------------------------------------------ heads

    def _heads(self, step: int, X: Gradients, P: Gradients, other: Gradients) -> Iterator[dict[str, Any]]:
        for kind in self.weights.heads:
            heads, elsewhere = (self.weights.by_head(kind, Y[kind]) for Y in (X, other))
            joint = P[kind] if kind in SHARED else measures.top(heads.flatten(1, 2), self.ranks[-1])
            for rank in (r for r in self.ranks if r <= heads.shape[2]):
                bases, others = measures.top(heads, rank), measures.top(elsewhere, rank)
                pairs, _ = measures.head_pairs(bases, bases)
                pairs_apart, itself = measures.head_pairs(bases, others)
                by_other, by_own = measures.kept_by_heads(heads, bases)
                by_joint = measures.kept(heads, joint[:, None, :, :rank]).mean(dim=1)
                columns = {
                    "similarity": pairs,
                    "other_batch": pairs_apart,
                    "same_head_other_batch": itself,
                    "kept_by_other": by_other,
                    "kept_by_own": by_own,
                    "kept_by_joint": by_joint,
                }
                for i, layer in enumerate(self.weights.layers):
                    row = {
                        "step": step,
                        "kind": kind,
                        "rank": rank,
                        "layer": layer,
                        "chance": short(rank / joint.shape[1]),
                    }
                    yield row | {name: short(values[i]) for name, values in columns.items()}

    def _modules(self, step: int, P: Gradients) -> Iterator[dict[str, Any]]:
        for one, other in PAIRS:
            for rank in self.ranks:
                value = mean(measures.similarity(P[one][..., :rank], P[other][..., :rank]))
                chance = short(rank / P[one].shape[1])
                yield {"step": step, "kinds": [one, other], "rank": rank, "similarity": value, "chance": chance}

    # ------------------------------------------------------------------ what the projection loses

    def _residual(self, step: int, X: Gradients, P: Gradients, held: Sequence[Gradients]) -> Iterator[dict[str, Any]]:
        for kind in KINDS:
            participation, stable = measures.effective_ranks(X[kind])
            columns = {"participation_ratio": participation, "stable_rank": stable}
            for rank in self.ranks:
                basis = P[kind][..., :rank]
                columns[f"outside_joint_{rank}"] = 1.0 - measures.kept(X[kind], basis)
                columns[f"outside_joint_{rank}_other_batch"] = 1.0 - measures.kept(held[0][kind], basis)
                lost = [lose(some[kind], basis) for some in held]
                columns[f"large_{rank}"] = measures.concentration(lose(X[kind], basis), LARGE)
                chosen_by = torch.stack(lost[1:]).mean(dim=0)
                columns[f"large_again_{rank}"] = measures.found_again(chosen_by, lost[0], LARGE)
                if kind in SHARED:
                    lent = measures.lent_bases(self.weights.by_head(kind, X[kind]), rank)
                    for name, Y in (("", X), ("_other_batch", held[0])):
                        outside = 1.0 - torch.stack([measures.kept(Y[kind], of_head) for of_head in lent])
                        columns[f"outside_shared_{rank}{name}"] = outside.mean(dim=0)
            for i, layer in enumerate(self.weights.layers):
                row: dict[str, Any] = {"step": step, "kind": kind, "layer": layer}
                yield row | {name: short(values[i]) for name, values in columns.items()}

    def _signal(self, step: int, X: Gradients, P: Gradients, held: Sequence[Gradients]) -> Iterator[dict[str, Any]]:
        for kind in KINDS:
            batches = [some[kind] for some in held]
            for rank in self.ranks:
                bases = {"joint": P[kind][..., :rank]}
                if kind in SHARED:
                    bases["shared"] = measures.lent_bases(self.weights.by_head(kind, X[kind]), rank)[0]
                for basis, columns in bases.items():
                    found = measures.persistent(batches, columns)
                    row: dict[str, Any] = {"step": step, "kind": kind, "rank": rank, "basis": basis}
                    yield row | {name: short(value) for name, value in found.items()}

    def _update(self, step: int, optimizer: Any) -> Iterator[dict[str, Any]]:
        """||phi D|| / ||lift(N)|| of the optimizer's own bases, before the limit of its growth and after it."""
        for kind in KINDS:
            wanted, done, lost = zip(*(self._parts(optimizer, w) for w in self.weights.weights[kind]), strict=True)
            means = {
                name: short(statistics.fmean(v)) for name, v in (("wanted", wanted), ("done", done), ("lost", lost))
            }
            yield {"step": step, "kind": kind, **means}

    def _parts(self, optimizer: Any, w: Tensor) -> tuple[float, float, float]:
        """Of one weight: the ratio before the limit, the ratio after it, and the share of G that its basis loses."""
        from galore_trainer.core import galore, scaled
        from galore_trainer.optim.bucket import BASIS
        from galore_trainer.optim.residual import NORM

        state, G, betas = optimizer.state[w], w.grad.float()[None], optimizer.param_groups[0]["betas"]
        M, V, P, t = state["exp_avg"], state["exp_avg_sq"], state[BASIS].float(), state["step"]
        side = "right" if M.shape[-2] == G.shape[-2] else "left"
        R, ok = galore.project(G, P, side), torch.ones(1, 1, 1, device=G.device)
        bias = [galore.decay_sum(beta, t.to(M.dtype)) for beta in betas]
        N = (M / bias[0]) / ((V / bias[1]).sqrt() + optimizer.param_groups[0]["eps"])
        squares = scaled.squared_norms(G, side, R.dtype)
        _, d = scaled.line_factors(squares, R, N, ok, side, residual_scale=1.0, noise=0.0)
        size = torch.linalg.vector_norm(N)
        lost = 1.0 - measures.energy(R).sum() / measures.energy(G).sum()
        return float(d.sum().sqrt() / size), float(state[NORM] / size), float(lost)


def inner(trainer: Any) -> Any:
    """The Trainer's ``GaLoreAdamW``."""
    from galore_trainer.hf.callback import inner_optimizer

    return inner_optimizer(trainer.optimizer)


def projected(optimizer: Any) -> Iterator[Tensor]:
    """The weights that have a basis, always in the same order."""
    from galore_trainer.optim.bucket import BASIS

    return (p for group in optimizer.param_groups for p in group["params"] if BASIS in optimizer.state[p])


def is_limited(new: Tensor, old: Tensor) -> Tensor:
    """Whether ||phi D|| grew by as much as it may."""
    from galore_trainer.core.scaled import GROWTH

    return new >= old * GROWTH * (1.0 - 1e-6)  # float32 rounds the product


def lose(X: Tensor, P: Tensor) -> Tensor:
    """What the projection loses, D."""
    return X - (X @ P) @ P.mT


def short(value: Any) -> float:
    """A number as it is written down."""
    return round(float(value), 4)


def mean(values: Tensor) -> float:
    """The mean over layers, as it is written down."""
    return short(values.mean())


def measure(config: Any, at: Sequence[int], lags: Sequence[int], layers: int, batches: int) -> dict[str, Any]:
    """Train, and measure.

    Args:
        config: a ``RunConfig``.
        at, lags, layers, batches: as for ``Probe``.

    Returns:
        The content of the JSON file.
    """
    from galore_trainer.run.results.artifacts import environment
    from galore_trainer.run.training.train import prepare

    start = time.perf_counter()
    trainer = prepare(config).trainer
    probe = Probe(trainer, at, lags, layers, batches)
    trainer.add_callback(probe)
    trainer.train()
    names = ("rank", "residual", "head_sharing", "update_proj_gap")
    return {
        "settings": {
            "batch": trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
            "learning_rate": trainer.args.learning_rate,
            "steps": trainer.state.global_step,
            "of": trainer.state.max_steps,
            "seed": trainer.args.seed,
            **{name: getattr(config.galore, name) for name in names},
            "at": list(at),
            "layers": probe.weights.layers,
            "batches": batches,
            "large": LARGE,
        },
        "environment": environment(),
        "seconds": {"all": round(time.perf_counter() - start), "measuring": round(probe.seconds)},
        "gaussian": short(measures.gaussian_concentration(LARGE)),
        "limited": [short(value) for value in probe.limited],
        **probe.found,
    }


def main() -> None:
    """Measure, and write JSON: a row a line."""
    from galore_trainer.run.settings.run_config import load_run_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument(
        "--at", type=int, nargs="+", default=AT, help="steps to measure in; training ends after the last"
    )
    parser.add_argument(
        "--lags", type=int, nargs="+", default=LAGS, help="steps after which to look at subspaces again"
    )
    parser.add_argument("--layers", type=int, default=8, help="how many layers to measure")
    parser.add_argument("--batches", type=int, default=8, help="how many held-out batches to measure")
    parser.add_argument("--json", type=Path, default=Path("why.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*args.overrides, f"output_dir={folder}", "save_strategy=no", "eval.before=false"]
        content = measure(load_run_config(args.config, overrides), args.at, args.lags, args.layers, args.batches)
    parts = (f"{json.dumps(name)}: {in_lines(value)}" for name, value in content.items())
    args.json.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def in_lines(value: Any) -> str:
    """JSON with a row of a table on each line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
    return json.dumps(value)


if __name__ == "__main__":
    main()
