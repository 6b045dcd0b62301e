"""What sharing and randomizing cost: projection errors and refresh times on one real gradient.

The gradient of a model's loss on a batch of a recipe's training data is decomposed once for each setting. Errors are
means over the projected matrices. Times are of one refresh of all of them, the second of two: the first warms up.

    python benchmarks/projection.py mawps data.source=path/to/train.json --output projection.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("joint, exact", {"head_sharing": "joint", "svd": "exact"}),
    *((f"joint, randomized q={q}", {"head_sharing": "joint", "subspace_iterations": q}) for q in range(4)),
    ("per_head, exact", {"head_sharing": "per_head", "svd": "exact"}),
    ("per_head, randomized q=2", {"head_sharing": "per_head"}),
    ("grouped (3 query heads), exact", {"head_sharing": "grouped", "head_group_size": 3, "svd": "exact"}),
    ("grouped (3 query heads), randomized q=2", {"head_sharing": "grouped", "head_group_size": 3}),
    ("shared random, exact", {"head_sharing": "shared", "svd": "exact"}),
    *((f"shared random, randomized q={q}", {"head_sharing": "shared", "subspace_iterations": q}) for q in range(4)),
    ("shared energy, randomized q=2", {"head_sharing": "shared", "head_choice": "energy"}),
    ("all, from one sketch (first step of layer-wise mode)", {"head_sharing": "joint", "first_basis": "sketch"}),
]


def gradients(config: Any, batch_size: int, device: str) -> Any:
    """The model with the gradient of one batch."""
    from galore_trainer.recipes import load_data
    from galore_trainer.run.models.model import load_model
    from galore_trainer.run.models.prompts import encode, make_collator

    model, tokenizer = load_model(config.model_name_or_path)
    model.to(device).train()
    examples = load_data(config.data).train[:batch_size]
    rows = [encode(tokenizer, example, config.max_length) for example in examples]
    batch = make_collator(tokenizer)(rows)
    model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
    return model


def matrices(model: Any, galore: Any) -> list[Any]:
    """Buckets of matrices without a basis, as the optimizer groups them for a refresh."""
    from galore_trainer.hf.build import galore_groups
    from galore_trainer.optim.galore_adamw import GaLoreAdamW
    from galore_trainer.optim.refresh import refresh_buckets
    from galore_trainer.optim.state_forms import prepare_state

    optimizer = GaLoreAdamW(galore_groups(model, galore, lr=0.0, weight_decay=0.0), galore, lr=0.0, seed=0)
    weights = [w for w in optimizer.weights_with_gradients() if w.matrices]
    for w in weights:
        prepare_state(w, galore, phase=0)
    return list(refresh_buckets(weights, galore))


def figures_of(model: Any, rank: int, changes: dict[str, Any], device: str) -> dict[str, Any]:
    """Errors and time of one setting: of all matrices, and of q, k, v alone."""
    from galore_trainer.config import GaLoreConfig
    from galore_trainer.core.galore import lost_share
    from galore_trainer.core.linalg import least_error
    from galore_trainer.optim.lenders import lending_rows
    from galore_trainer.optim.refresh import refresh_together

    galore = GaLoreConfig(rank=rank, residual_percent=0.0, **changes)
    seconds = []
    for _ in range(2):
        buckets = matrices(model, galore)
        _wait(device)
        start = time.perf_counter()
        for bucket in buckets:
            refresh_together([bucket], galore, 0)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    errors: dict[str, list[tuple[float, float, float]]] = {"all": [], "qkv": []}
    for bucket in buckets:
        G, P, matrix, parts = bucket.G, bucket.get_basis(), bucket.matrix, len(bucket.pieces)
        lent = torch.cat(list(lending_rows(bucket, galore, 0)[0]))
        whole = G.reshape(parts, matrix.rows, matrix.columns) if matrix.head_dim else G
        error, excess = lost_share(G, P, matrix.side, parts), lost_share(lent, P, matrix.side, parts)
        best, joint = least_error(lent, matrix.rank, parts), least_error(whole, matrix.rank, parts)
        for piece, *figures in zip(bucket.pieces, *(x.tolist() for x in (error, excess, best, joint)), strict=True):
            e, on_lent, least, least_joint = figures
            values = (e, on_lent / least - 1.0 if least > 1e-6 else 0.0, e / least_joint)
            errors["all"].append(values)
            if any(part in piece.name for part in ("q_proj", "k_proj", "v_proj")):
                errors["qkv"].append(values)
    names = ("error", "excess", "sharing_excess")
    means = {
        kind: {name: sum(v[i] for v in values) / len(values) for i, name in enumerate(names)}
        for kind, values in errors.items()
        if values
    }
    return {**means, "seconds": seconds[-1], "matrices": len(errors["all"])}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| setting | error | error, q k v | excess over exact, % | sharing excess, q k v | refresh, s |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in rows:
        everything, qkv = row["all"], row.get("qkv", row["all"])
        yield (
            f"| {row['setting']} | {everything['error']:.4f} | {qkv['error']:.4f} | {100 * everything['excess']:.2f} "
            f"| {qkv['sharing_excess']:.3f} | {row['seconds']:.2f} |"
        )


def main() -> None:
    """Measure every setting, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("projection.json"))
    arguments = parser.parse_args()

    from galore_trainer.run.results.artifacts import environment
    from galore_trainer.run.settings.run_config import load_run_config

    model = gradients(load_run_config(arguments.config, arguments.overrides), arguments.batch_size, arguments.device)
    rows = []
    for setting, changes in SETTINGS:
        rows.append({"setting": setting, **figures_of(model, arguments.rank, changes, arguments.device)})
        print(list(_table(rows))[-1], flush=True)
    content = {"rank": arguments.rank, "batch_size": arguments.batch_size, "environment": environment(), "rows": rows}
    arguments.output.write_text(json.dumps(content, indent=1))
    arguments.output.with_suffix(".md").write_text("\n".join(_table(rows)) + "\n")


if __name__ == "__main__":
    main()
