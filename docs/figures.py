"""Writes the plots and generated tables of README.md and docs/ from the figures in results/: ``make figures``.

Those of the studies of quality come from ``make results`` (docs/evidence.py).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fit
import why_figures
from blocks import table, write_block
from conversions import conversions
from evidence import loss_row
from plots import Panels, bars
from studies import studies
from version_table import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES, README = ROOT / "results", ROOT / "docs" / "images", ROOT / "README.md"
GIB = 1 << 30
SHAPES = {"llama-7b": "LLaMA-7B", "llama3-8b": "Llama-3-8B"}
MEMORY = {  # rows of results/memory/runs.jsonl, and their names in plots and tables
    "AdamW": "AdamW",
    "AdamW 8-bit": "8-bit AdamW",
    "galore-torch": "galore-torch",
    "LoRA": "LoRA r 32 (adapters only)",
    "GaLore+ layer-wise, 8-bit embeddings": "GaLore+ layer-wise",
    "GaLore+ layer-wise, frozen embeddings": "GaLore+ layer-wise, frozen embeddings",
}
STEPS = {  # rows of results/speed/details.json
    "galore-torch": "galore-torch",
    "DoRA": "DoRA r 32",
    "AdamW 8-bit": "8-bit AdamW",
    "LoRA": "LoRA r 32",
    "AdamW fused": "AdamW, fused",
    "GaLore+, layer-wise": "GaLore+ layer-wise",
    "GaLore+": "GaLore+",
}
STUDENT_T = {2: 4.303}
"""97.5 % quantile of Student's t by degrees of freedom."""


def lines(path: str) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file in results/."""
    return [json.loads(line) for line in (RESULTS / path).read_text(encoding="utf-8").splitlines()]


def whole(path: str) -> Any:
    """A JSON file in results/."""
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- the numbers


def memory_panels() -> Panels:
    """Peak memory in GiB: shape -> method, one sequence of 512 tokens, a refresh every 200 steps."""
    rows = [row for row in lines("memory/runs.jsonl") if row["update_proj_gap"] == 200]
    peaks = {(row["shape"], row["name"]): row["peak"] / GIB for row in rows}
    return {
        title: {MEMORY[name]: round(peaks[shape, name], 2) for name in MEMORY if (shape, name) in peaks}
        for shape, title in SHAPES.items()
    }


def step_panels() -> Panels:
    """Milliseconds of a training step with its share of a refresh; layer-wise steps hold their refreshes already."""
    run = whole("speed/details.json")
    found, gap = run["found"]["e2e"], run["bench"]["gap"]
    refresh = {"galore-torch": found["svd"], "GaLore+": found["refresh"]["ms"]}
    steps = {STEPS[name]: found["timings"][name]["ms"] + refresh.get(name, 0) / gap for name in STEPS}
    return {"LLaMA-7B width, 8 layers, 8 x 512 tokens": {name: round(ms, 1) for name, ms in steps.items()}}


def eval_losses(study: str, cell: str) -> list[float]:
    """Eval loss of each seed of a cell."""
    rows = [row for row in lines(f"{study}/runs.jsonl") if row["cell"] == cell and row["run"] != "timing"]
    return [row["score_after"]["eval_loss"] for row in sorted(rows, key=lambda row: row["seed"])]


def paired(study: str, cell: str, other: str) -> str:
    """The mean difference in eval loss over equal seeds, with its 95 % interval."""
    differences = [a - b for a, b in zip(eval_losses(study, cell), eval_losses(study, other), strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    half = STUDENT_T[n - 1] * statistics.stdev(differences) / math.sqrt(n)
    return f"{mean:+.3f} [{mean - half:.3f}, {mean + half:.3f}]"


# ------------------------------------------------------------------------------------------------ the blocks


def measured() -> str:
    """README's block ``measured``."""
    peak = memory_panels()["Llama-3-8B"]
    ratio = {row["name"]: row for row in whole("speed/rows.json")}

    def step(other: str) -> str:
        row = ratio[f"training: GaLore+ / {other}"]
        return f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"

    leanest = "layer-wise, 4 micro-batches, 8-bit, bfloat16 weights"
    return table(
        [
            ("what", "measured", "where"),
            (
                "peak memory, 8B shape, GiB",
                f"**{peak['GaLore+ layer-wise']:.1f}** with every weight trained; AdamW {peak['AdamW']:.1f}, "
                f"LoRA {peak['LoRA r 32 (adapters only)']:.1f}; predictions within 0.8 %",
                "[memory](results/memory/README.md), H100, one run a row",
            ),
            (
                "training step / another's, quartiles",
                f"AdamW {step('AdamW fused')}, LoRA {step('LoRA')}, galore-torch {step('galore-torch')}",
                "[speed](results/speed/README.md), H100, rank 128",
            ),
            loss_row(studies()),
            (
                "eval loss, leanest settings - float32",
                f"{paired('low_memory', leanest, 'float32 states and weights')}: no difference seen",
                "[low_memory](results/low_memory/README.md), 135M, three seeds",
            ),
        ]
    )


def fit_block() -> str:
    """README's block ``fit``: for each model and card the first setting that has room."""
    peaks = {(row["model"], row["task"], row["setting"]): row["peak"] for row in fit.predicted()}

    def cell(model: str, task: str, card: int) -> str:
        for setting in fit.SETTINGS:
            if fit.fits(peak := peaks[model, task, setting], card):
                return f"{setting} {peak / GIB:.1f}"
        return "-"

    head = ("", *(f"{card} GB" for card in fit.CARDS))
    rows = [
        (f"{model} {task}", *(cell(model, task, card) for card in fit.CARDS))
        for model in fit.MODELS
        for task in fit.ROWS
    ]
    return table([head, *rows], numbers=len(fit.CARDS))


def fit_table() -> str:
    """The block ``peaks`` of results/fit: every setting in GiB."""
    peaks = {(row["model"], row["task"], row["setting"]): f"{row['peak'] / GIB:.2f}" for row in fit.predicted()}
    rows = [
        (model, task, *(peaks[model, task, setting] for setting in fit.SETTINGS))
        for model in fit.MODELS
        for task in fit.ROWS
    ]
    return table([("model", "training", *fit.SETTINGS), *rows], numbers=len(fit.SETTINGS))


def memory_table() -> str:
    """docs/memory.md: measured and predicted peaks in GiB."""
    rows = [row for row in lines("memory/runs.jsonl") if row["update_proj_gap"] == 200]
    by = {(row["shape"], row["name"]): row for row in rows}
    head = ("method", *(title for shape in SHAPES.values() for title in (f"{shape} shape", "predicted")))
    names = [
        name for name in dict.fromkeys(row["name"] for row in rows) if all((shape, name) in by for shape in SHAPES)
    ]
    out = [
        (name, *(f"{by[shape, name][key] / GIB:.2f}" for shape in SHAPES for key in ("peak", "predicted")))
        for name in names
    ]
    return table([head, *out], numbers=4)


def ratios() -> str:
    """docs/speed.md: ratios with their bounds."""
    rows = [
        (
            row["name"],
            f"**{row['ratio']:.4g}**" if row["ratio"] > row["bound"] else f"{row['ratio']:.4g}",
            f"{row['low']:.4g} to {row['high']:.4g}",
            f"{row['bound']:.4g}",
        )
        for row in whole("speed/rows.json")
    ]
    return table([("what", "ratio", "quartiles", "at most"), *rows], numbers=3)


def method_support() -> str:
    """docs/support-matrix.md: the methods of the command line by backend."""
    from galore_trainer.run.settings.methods import METHODS

    rows = [
        (
            f"`{name}`",
            *("yes", "yes", *(["yes" if spec.sharded else "refused"] * 2)),
            "yes" if spec.resumable else "no",
            f"`{spec.package}`{', NVIDIA GPU' if spec.cuda else ''}" if spec.package else "",
        )
        for name, spec in METHODS.items()
    ]
    return table([("", *BACKENDS.values(), "resumes", "needs"), *rows])


BACKENDS = {"single": "one GPU", "ddp": "DDP", "fsdp": "FSDP2", "deepspeed": "ZeRO-1, 2, 3"}
CLIPPING = "`max_grad_norm`: clipping inside the step"
SUPPORT: list[tuple[str, list[dict[str, Any]]]] = [  # what, and settings that the code is asked about
    ("`layerwise`", [{"layerwise": True}]),
    (
        "every `head_sharing` and `svd`",
        [{"head_sharing": "per_head", "share_heads_of": ["q"]}, {"head_sharing": "joint", "svd": "exact"}],
    ),
    ("`state_bits`, `plain_state_bits`: 16", [{"state_bits": 16}, {"plain_state_bits": 16}]),
    ("`state_bits`, `plain_state_bits`: 8", [{"state_bits": 8}, {"plain_state_bits": 8}]),
    ("`residual`: scaled, both", [{"residual": "scaled"}, {"residual": "both"}]),
    ("`residual: sparse`", [{"residual": "sparse"}, {"residual": "sparse", "residual_mode": "moments"}]),
    ("`residual_selection: global`", [{"residual": "sparse", "residual_selection": "global"}]),
    ("`proj_type: left`", [{"proj_type": "left"}]),
    (CLIPPING, [{"max_grad_norm": 1.0}]),
    ("`share_output_heads`, `diagnose_refreshes`", [{"share_output_heads": True}, {"diagnose_refreshes": 1}]),
]


def refusal(settings: dict[str, Any], backend: str) -> str:
    """Why the code refuses settings under a backend; empty where it takes them."""
    from galore_trainer.config import GaLoreConfig
    from galore_trainer.errors import OptionError
    from galore_trainer.hf.backend import SHARDING, check_layerwise, for_shards

    try:
        config = GaLoreConfig(**{"head_sharing": "joint", "residual": "none", "proj_type": "right", **settings})
        check_layerwise(config, backend)  # type: ignore[arg-type]
        if backend in SHARDING:
            for_shards(config, backend)
    except OptionError as error:
        reason = error.way_out.removesuffix("DDP takes every setting.").strip()
        reason = f"The backend {reason.removeprefix(f'{backend} ')}" if reason.startswith(backend) else reason
        return reason or f"Only `{error.wanted}`."
    return ""


def support_rows() -> list[tuple[str, list[str], str]]:
    """What, its cells by backend, and why it is refused. The first and the last row are shown by tests/distributed."""
    rows = [("accumulation, clipping, resuming bit for bit", ["yes"] * 4, "")]
    for what, asked in SUPPORT:
        answers = {backend: [refusal(settings, backend) for settings in asked] for backend in BACKENDS}
        for backend, reasons in answers.items():
            assert len({bool(reason) for reason in reasons}) == 1, f"{what} under {backend}: {reasons}"
        why = " ".join(dict.fromkeys(reason for reasons in answers.values() for reason in reasons if reason))
        rows.append((what, ["refused" if reasons[0] else "yes" for reasons in answers.values()], why))
    dropped = "The Trainer drops or refuses it; use `galore_plugin` or `attach`."
    return [*rows, ("`optimizers=(build_optimizer(...), None)`", ["yes", "yes", "refused", "refused"], dropped)]


def support() -> str:
    """README's block ``support``; what few need is in docs/support-matrix.md alone."""
    return table([("", *BACKENDS.values()), *((what, *cells) for what, cells, _ in support_rows() if what != CLIPPING)])


def support_by_mode() -> str:
    """docs/support-matrix.md: the same with reasons, and with layer-wise mode, which goes without FSDP2 and ZeRO."""
    layerwise = {what: [refusal({**one, "layerwise": True}, "ddp") for one in asked] for what, asked in SUPPORT}
    rows = [
        (what, *cells, "refused" if any(layerwise.get(what, ())) else "yes", why) for what, cells, why in support_rows()
    ]
    return table([("", *BACKENDS.values(), "layer-wise, one GPU and DDP", "why"), *rows])


def knob_tables() -> dict[str, str]:
    """The blocks of docs/knobs.md by name."""
    from galore_trainer.config import GaLoreConfig
    from galore_trainer.recipes import DataConfig
    from galore_trainer.run.settings.knobs import knob_table
    from galore_trainer.run.settings.methods import LoraSettings
    from galore_trainer.run.settings.run_config import EvalConfig, RunConfig

    blocks = {"knobs": GaLoreConfig, "run": RunConfig, "data": DataConfig, "eval": EvalConfig, "lora": LoraSettings}
    return {name: knob_table(block) for name, block in blocks.items()}


def blocks() -> dict[tuple[Path, str], str]:
    """Every generated table: (page, name of its block) -> text."""
    pages = ROOT / "docs"
    return {
        (README, "fit"): fit_block(),
        (README, "measured"): measured(),
        (README, "support"): support(),
        (RESULTS / "fit" / "README.md", "peaks"): fit_table(),
        (pages / "choosing.md", "configurations"): fit.configurations_table(),
        (pages / "memory.md", "settings"): fit_table(),
        (pages / "memory.md", "peaks"): memory_table(),
        (pages / "speed.md", "ratios"): ratios(),
        (pages / "support-matrix.md", "support"): support_by_mode(),
        (pages / "support-matrix.md", "methods"): method_support(),
        (pages / "support-matrix.md", "versions"): versions(),
        **{(pages / "knobs.md", name): text for name, text in knob_tables().items()},
        **{(pages / "migrating.md", name): text for name, text in conversions().items()},
        **why_figures.blocks(),
    }


# ------------------------------------------------------------------------------------------------- the plots


PLOTS: dict[str, tuple[Callable[[], Panels], str, str, tuple[float, str] | None]] = {
    "memory.svg": (
        memory_panels, "Peak memory of a training step on one GPU, 1 x 512 tokens", "GiB", (24e9 / GIB, "24 GB"),
    ),
    "speed.svg": (
        step_panels, "A training step on one H100, with 1/200 of a refresh", "ms", None,
    ),
}  # fmt: skip


def main(names: Sequence[str] = tuple(PLOTS)) -> None:
    """Write the plots and the blocks."""
    for name in names:
        numbers, title, unit, line = PLOTS[name]
        bars(numbers(), title, unit, IMAGES / name, line)
    why_figures.draw_all()
    for (page, name), text in blocks().items():
        write_block(page, name, text)


if __name__ == "__main__":
    main()
