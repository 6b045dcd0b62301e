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
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import why_measures as measures
import why_rows as rows
from torch import Tensor
from transformers import TrainerCallback
from why_rows import KINDS, LEFT, SHARED, Gradients, Row

from galore_trainer.errors import OptionError

AT, LAGS = (1, 10, 50, 100, 200, 430), (1, 10, 50, 100, 200)
TABLES = ("heads", "modules", "drift", "same_data", "lost", "signal", "sources", "sides", "update")


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
        smallest = min(min(of_kind[0].shape) for of_kind in self.weights.values())
        self.rank = max(rank for rank in rows.RANKS if rank <= smallest)

    def gradients(self) -> Gradients:
        """Copies of the gradients that the weights have now, in float32."""
        stacked = {kind: torch.stack([w.grad.float() for w in weights]) for kind, weights in self.weights.items()}
        return {kind: G.mT.contiguous() if kind in LEFT else G for kind, G in stacked.items()}

    def by_head(self, kind: str, X: Tensor) -> Tensor:
        """[L, heads, d, n]: rows of q, k, v; columns of o, whose subspaces lie among its outputs."""
        X = X.mT if kind == "o_proj" else X
        return X.unflatten(1, (self.heads[kind], -1))

    def lenders(self, kind: str, X: Tensor) -> Tensor | None:
        """``by_head`` where a head may lend its basis to all."""
        return self.by_head(kind, X) if kind in SHARED else None


class Probe(TrainerCallback):
    """Measures in some steps, and stops the training after the last of them.

    Raises OptionError where too few examples are held out, or training ends before the last step.

    Args:
        trainer: with a ``GaLoreAdamW``.
        config: of its run.
        at: steps of all measures, from 1.
        lags: after so many steps the subspaces are looked at again.
        layers: see ``Weights``.
        batches: number of held-out batches, of the size of a step's; at least 3.

    Attributes:
        tables: rows by name of the table.
        limited: in every step but the first the share of weights whose scaled residual was limited.
        bases: of the steps of all measures, from the gradient of the step.
        held: of these steps, bases of the first held-out batch and of the mean of all but the last.
    """

    def __init__(
        self, trainer: Any, config: Any, at: Sequence[int], lags: Sequence[int], layers: int, batches: int
    ) -> None:
        self.trainer, self.config, self.at, self.lags, self.batches = trainer, config, sorted(at), lags, batches
        needed, there = batches * batch_size(trainer), len(trainer.eval_dataset or ())
        if there < needed:
            raise OptionError("data.eval_samples", there, f"at least {needed}", "Or measure fewer --batches.")
        self.weights = Weights(trainer.model, layers)
        self.again = {step + lag for step in at for lag in lags if step + lag <= max(at)}
        self.tables: dict[str, list[Row]] = {name: [] for name in TABLES}
        self.limited: list[Tensor] = []
        self.seconds = 0.0
        self.norms: Tensor | None = None
        self.bases: dict[int, Gradients] = {}
        self.held: dict[int, tuple[Gradients, Gradients]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse steps that training does not reach."""
        if self.at[-1] > state.max_steps:
            raise OptionError("--at", self.at[-1], f"at most {state.max_steps}, the steps of this run", "Train longer.")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients."""
        step = state.global_step + 1
        if step in self.at or step in self.again:
            start = time.perf_counter()
            with torch.no_grad():
                self.look(step)
            self.seconds += time.perf_counter() - start

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the scaled residual and its limit."""
        step, optimizer = state.global_step + 1, inner(self.trainer)
        if norms := list(residual_norms(optimizer)):
            new, old = torch.stack(norms), self.norms
            if old is not None:
                self.limited.append(is_limited(new, old).float().mean())
            self.norms = new
            if step in self.at or step in self.again:
                with torch.no_grad():
                    scale, weights = self.config.galore.residual_scale, self.weights.weights
                    self.add("update", step, (rows.update_row(kind, optimizer, weights[kind], scale) for kind in KINDS))
        if step >= self.at[-1]:
            control.should_training_stop = True

    def add(self, table: str, step: int, found: Iterable[Row]) -> None:
        self.tables[table] += ({"step": step, **row} for row in found)

    def look(self, step: int) -> None:
        weights, rank = self.weights, self.weights.rank
        X = weights.gradients()
        P = rows.bases_of(X, rank)
        for lag in self.lags:
            if (old := self.bases.get(step - lag)) is not None:
                self.add("drift", step - lag, rows.compared(old, P, X, lag=lag))
        if step not in self.at:
            return
        self.bases[step] = P
        held = list(self.held_out_gradients())
        mean = {kind: torch.stack([some[kind] for some in held[:-1]]).mean(dim=0) for kind in KINDS}
        of_one, of_mean = rows.bases_of(held[0], rank), rows.bases_of(mean, rank)
        self.add("drift", step, rows.compared(P, of_one, held[0], lag=0))
        for before, (one, many) in self.held.items():
            self.add("same_data", before, rows.compared(one, of_one, held[0], to=step, batches=1))
            self.add("same_data", before, rows.compared(many, of_mean, mean, to=step, batches=len(held) - 1))
        self.held[step] = of_one, of_mean
        self.add("modules", step, rows.module_rows(P))
        self.add("sources", step, rows.source_rows(of_one, of_mean, X, held))
        self.add("sides", step, rows.side_rows(P, X, held))
        for kind in KINDS:
            of_kind, lenders = [some[kind] for some in held], weights.lenders(kind, X[kind])
            self.add("lost", step, rows.lost_rows(kind, X[kind], P[kind], lenders, of_kind, weights.layers))
            self.add("signal", step, rows.signal_rows(kind, P[kind], lenders, of_kind))
            if kind in weights.heads:
                heads, elsewhere = (weights.by_head(kind, Y) for Y in (X[kind], of_kind[0]))
                self.add("heads", step, rows.head_rows(kind, heads, elsewhere, rows.ranks_of(P), weights.layers))

    def held_out_gradients(self) -> Iterator[Gradients]:
        """Gradients of held-out batches, the same in every step; those of the weights stay as they are."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        examples, size = trainer.eval_dataset, batch_size(trainer)
        kept = [(p, p.grad) for p in model.parameters()]
        for i in range(self.batches):
            for p, _ in kept:
                p.grad = None
            batch = trainer.data_collator([examples[j] for j in range(i * size, (i + 1) * size)])
            inputs = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
            with torch.enable_grad(), trainer.compute_loss_context_manager():
                trainer.compute_loss(model, inputs).backward()
            yield self.weights.gradients()
        for p, grad in kept:
            p.grad = grad


def batch_size(trainer: Any) -> int:
    """Examples of a step on one process."""
    size: int = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    return size


def inner(trainer: Any) -> Any:
    """The Trainer's ``GaLoreAdamW``."""
    from galore_trainer.hf.callback import inner_optimizer

    return inner_optimizer(trainer.optimizer)


def residual_norms(optimizer: Any) -> Iterator[Tensor]:
    """||phi D|| of the last step, of all weights that have a scaled residual, always in the same order."""
    from galore_trainer.optim.residual import NORM

    states = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"])
    return (state[NORM] for state in states if NORM in state)


def is_limited(new: Tensor, old: Tensor) -> Tensor:
    """Whether ||phi D|| grew by as much as it may."""
    from galore_trainer.core.scaled import GROWTH

    return new >= old * GROWTH * (1.0 - 1e-6)  # float32 rounds the product


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
    probe = Probe(trainer, config, at, lags, layers, batches)
    trainer.add_callback(probe)
    trainer.train()
    names = ("rank", "residual", "residual_scale", "head_sharing", "update_proj_gap")
    return {
        "settings": {
            "batch": batch_size(trainer),
            "learning_rate": trainer.args.learning_rate,
            "steps": trainer.state.global_step,
            "of": trainer.state.max_steps,
            "seed": trainer.args.seed,
            **{name: getattr(config.galore, name) for name in names},
            "at": list(at),
            "layers": probe.weights.layers,
            "batches": batches,
            "large": rows.LARGE,
        },
        "environment": environment(),
        "seconds": {"all": round(time.perf_counter() - start), "measuring": round(probe.seconds)},
        "gaussian": rows.short(measures.gaussian_concentration(rows.LARGE)),
        "limited": [rows.short(value) for value in probe.limited],
        **probe.tables,
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
    parser.add_argument("--layers", type=int, default=6, help="how many layers to measure")
    parser.add_argument("--batches", type=int, default=8, help="how many held-out batches to measure")
    parser.add_argument("--json", type=Path, default=Path("why.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*args.overrides, f"output_dir={folder}", "save_strategy=no"]
        content = measure(load_run_config(args.config, overrides), args.at, args.lags, args.layers, args.batches)
    parts = (f"{json.dumps(name)}: {in_lines(value)}" for name, value in content.items())
    args.json.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def in_lines(value: Any) -> str:
    """JSON with a row of a table on each line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in value) + "\n]"
    return json.dumps(value)


if __name__ == "__main__":
    main()
