"""A folder of files that commands are given by mistake, and the two good ones that they are compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

SETTINGS: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "use_cpu": True,
    "max_steps": 2,
    "max_length": 64,
    "output_dir": "run",
    "galore": {"rank": 4},
    "data": {"train_samples": 20, "eval_samples": 2},
    "eval": {"max_new_tokens": 2},
}
RESULT: dict[str, Any] = {
    "method": "galore_plus",
    "task": "arithmetic",
    "seed": 0,
    "steps": 2,
    "resumed_from_step": None,
    "score_after": {
        "n": 2,
        "metric": "exact_match_flexible",
        "score": 0.5,
        "interval": [0.1, 0.9],
        "eval_loss": 1.5,
    },
    "seconds": {"training": 1.0, "forward_backward": 0.5, "update": 0.3, "refresh": 0.2, "evaluation": 0.1},
    "peak_memory": {"peak_bytes": 100, "meaning": "allocated on the device, weights included"},
    "optimizer_state_bytes": {"basis": 10, "moments": 10, "plain": 10},
    "projection_error": {"mean": 0.2, "excess": 0.1, "sharing_excess": 2.0, "by_matrix": {}},
    "environment": {
        "versions": {"python": "3.11"},
        "platform": "Linux x86_64",
        "device": "cpu",
        "accelerators": 0,
        "cores": 2,
        "commit": None,
        "uncommitted_changes": None,
    },
    "config": {"method": "galore_plus", "galore": {"rank": 4, "update_proj_gap": 2}},
}
STUDY: dict[str, Any] = {
    "name": "small",
    "title": "small",
    "question": "",
    "base": "tiny.yaml",
    "metrics": ["score"],
    "commands": [],
    "cells": [
        {
            "name": "rank 4",
            "slug": "rank-4",
            "values": {"galore.rank": 4},
            "timing": {},
            "runs": [{"seed": 0, "folder": "rank-4/seed-0", "status": "finished", "exclusive": True, "reason": None}],
        }
    ],
}

CONFIGS: dict[str, str | bytes] = {
    "empty.yaml": "",
    "null.yaml": "null\n",
    "list.yaml": "- seed\n",
    "twice.yaml": "seed: 1\ngalore:\n  rank: 8\n  rank: 9\n",
    "broken.yaml": "seed: 1\n  a: b: c\n",
    "unknown.yaml": "seed: 1\nlerning_rate: 1\n",
    "python.yaml": "a: !!python/object/apply:os.getcwd []\n",
    "set.yaml": "report_to: !!set {wandb}\n",
    "number.yaml": "1: 2\n",
    "digits.yaml": f"seed: {'9' * 400}\n",
    "deep.yaml": "report_to: " + "[" * 1000 + "]" * 1000 + "\n",
    "bomb.yaml": "a: &a [x, x]\n"
    + "".join(
        f"{name}: &{name} [*{chr(ord(name) - 1)}, *{chr(ord(name) - 1)}]\n" for name in "bcdefghijklmnopqrstuvwxyz"
    ),
    "latin.yaml": b"run_name: caf\xe9\n",
    "foo.yaml": "methods: {foo: {}}\n",
    "foo_null.yaml": "methods: {foo: null}\n",
    "foo_zero.yaml": "methods: {adamw: 0}\n",
    "other_seed.yaml": "methods:\n  adamw: {seed: -1}\n",
    "minus_seed.yaml": "max_steps: 3\nseed: -1\n",
    "typos.yaml": "lerning_rate: 1\ngalore: {rnak: 8}\nmethods:\n  adamw: {max_stpes: 2}\n  foo: {seed: 1}\nzzz: 0\n",
    "factory.yaml": "stage: sft\nuse_galore: true\ngalore_target: mlp,self_attn\ngalore_proj_type: full\n"
    "galore_rank: 0\ncutoff_len: 1024\n",
    "compose.yaml": "services: {web: {image: nginx}}\nvolumes: {}\n",
    "nearly.yaml": "output_dir: out\nper_device_train_batch_size: 1\nvolumes: {}\n",
}
STUDIES: dict[str, Any] = {
    "nothing.yaml": {"base": "tiny.yaml"},
    "no_axis.yaml": {"base": "tiny.yaml", "grid": {}},
    "no_values.yaml": {"base": "tiny.yaml", "grid": {"galore.rank": []}},
    "one_value.yaml": {"base": "tiny.yaml", "grid": {"galore.rank": 4}},
    "bad_value.yaml": {"base": "tiny.yaml", "grid": {"galore.rank": [4, 0]}},
    "bad_metric.yaml": {"base": "tiny.yaml", "grid": {"galore.rank": [4]}, "metrics": ["beauty"]},
    "bad_key.yaml": {"base": "tiny.yaml", "gird": {"galore.rank": [4]}},
    "bad_keys.yaml": {"base": "tiny.yaml", "gird": {"galore.rank": [4]}, "sedes": [1]},
    "bad_seeds.yaml": {"base": "tiny.yaml", "grid": {"galore.rank": [4]}, "seeds": [-1]},
    "own_seed.yaml": {"base": "tiny.yaml", "grid": {"seed": [1, 2]}},
    "alike.yaml": {"base": "tiny.yaml", "cells": [{"galore.rank": 4}, {"galore.rank": 4}]},
    "no_base.yaml": {"base": "nosuch", "grid": {"galore.rank": [4]}},
    "huge.yaml": {
        "base": "tiny.yaml",
        "grid": {key: list(range(1, 229)) for key in ("galore.rank", "galore.update_proj_gap", "eval.limit")},
    },
    "small.yaml": {"base": "tiny.yaml", "grid": {"galore.rank": [4, 8]}, "seeds": [0]},
}
DATA: dict[str, str | bytes] = {
    "two.jsonl": '{"prediction": "3", "answer": "3"}\n{"prediction": "4", "answer": "4"}\n',
    "one.jsonl": '{"prediction": "3", "answer": "3"}\n',
    "none.jsonl": "",
    "half.jsonl": '{"prediction": "3"\n',
    "numbers.jsonl": '{"prediction": 3, "answer": "three"}\n',
    "texts.txt": "a\nb\n",
    "deep.jsonl": "[" * 100_000 + "\n",
    "digits.jsonl": '{"question": "q", "answer": ' + "9" * 5000 + "}\n",
    "half_letter.jsonl": '{"question": "\\ud800", "answer": "#### 1"}\n',
    "binary.jsonl": b"\xff\xfe\x00\x01",
}


def changed(value: dict[str, Any], path: str, new: Any) -> dict[str, Any]:
    """A copy of nested mappings with another value at a dotted path."""
    head, _, rest = path.partition(".")
    return {**value, head: changed(value[head], rest, new) if rest else new}


def results() -> dict[str, Any]:
    """Folders of runs: the content of ``result.json``, a good one first."""
    return {
        "good": RESULT,
        "braces": {},
        "nothing": None,
        "brackets": [],
        "binary": b"\xff\xfe",
        "null_config": changed(RESULT, "config", None),
        "text_config": changed(RESULT, "config", "rank: 4"),
        "null_seconds": changed(RESULT, "seconds", None),
        "nan": changed(RESULT, "seconds.training", float("nan")),
        "text_steps": changed(RESULT, "steps", "2"),
        "minus_steps": changed(RESULT, "steps", -2),
        "no_gap": changed(RESULT, "config.galore.update_proj_gap", 0),
        "one_limit": changed(RESULT, "score_after.interval", [0.5]),
        "half_letter": changed(RESULT, "task", "\ud800"),
        "gsm8k": changed(RESULT, "task", "gsm8k"),
        "binary_log": RESULT,
        "list_log": RESULT,
        "no_step": RESULT,
    }


def models() -> dict[str, Any]:
    """Changes to the tiny model's ``config.json``; None in place of the whole."""
    return {
        "m_empty": None,
        "m_nulls": {"hidden_size": None},
        "m_heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
        "m_keys": {"num_key_value_heads": 3},
        "m_no_keys": {"num_key_value_heads": 0},
        "m_minus": {"hidden_size": -64},
        "m_layers": {"num_hidden_layers": 10**9},
        "m_wide": {"hidden_size": 10**12},
        "m_letters": {"hidden_act": "nosuch"},
    }


def write_odd_files(folder: Path, model: Path) -> None:
    """Fill a folder; ``model`` is a complete tiny model."""
    shutil.copytree(model, folder / "tiny")
    (folder / "vacant").mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    for name, text in {**CONFIGS, **DATA}.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, study in STUDIES.items():
        (folder / name).write_text(yaml.safe_dump(study, sort_keys=False))
    for name, result in results().items():
        (folder / name).mkdir()
        content = result if isinstance(result, bytes) else json.dumps(result).encode()
        (folder / name / "result.json").write_bytes(content)
    (folder / "binary_log" / "log.jsonl").write_bytes(b"\x80\x81\x82")
    (folder / "list_log" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n[1, 2]\n')
    (folder / "no_step" / "log.jsonl").write_text('{"loss": 2.0}\n')
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.resolved.yaml").write_text("max_steps: 3\n")
    records = {
        "s_braces": {},
        "s_null": None,
        "s_cells": changed(STUDY, "cells", None),
        "s_runs": {**STUDY, "cells": [{}]},
        "s_unfinished": STUDY,
        "s_other": changed(STUDY, "name", "other"),
    }
    for name, record in records.items():
        (folder / name).mkdir()
        (folder / name / "study.json").write_text(json.dumps(record))
    own = json.loads((model / "config.json").read_text())
    for name, changes in models().items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({} if changes is None else {**own, **changes}))
