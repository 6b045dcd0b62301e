"""Whatever stands in a file or on a command line, it is used or refused in words: no other error, no endless loop."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fuzzing import FUZZ, SECONDS, fuzz
from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError
from galore_trainer.hf.checkpoints import check_importable
from galore_trainer.metrics.answers import exact_match
from galore_trainer.metrics.nlg import nlg_scores
from galore_trainer.recipes import load_data
from galore_trainer.recipes.base import DataConfig
from galore_trainer.run.launching.checkpoints import choose_checkpoint, damage
from galore_trainer.run.memory.estimate import inspect
from galore_trainer.run.report.write import report
from galore_trainer.run.scoring.score import score_files
from galore_trainer.run.settings.arguments import training_arguments
from galore_trainer.run.settings.run_config import RunConfig, known_keys, load_run_config
from galore_trainer.run.study.grid import load_study
from galore_trainer.run.training.elastic import export_checkpoint
from odd_files import RESULT, SETTINGS, STUDY

NUMBERS = st.one_of(
    st.integers(-3, 5), st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**64, 10**40, 1e308, -0.0])
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "auto", "no", "steps", "epoch", "none", "1e400", ".inf", "[", "{", "\ud800", "../x"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)
# Fields that would start processes, ask the network or change this process for good.
NOT_HERE = {"push_to_hub", "report_to", "ddp_backend", "deepspeed", "fsdp", "fsdp_config", "accelerator_config",
            "torch_compile", "torch_compile_backend", "torch_compile_mode", "debug", "full_determinism", "tf32",
            "local_rank", "parallelism_config", "data.source", "data.eval_source", "use_cpu"}  # fmt: skip
KEYS = sorted(known_keys().keys() - NOT_HERE)


def fitting(key: str) -> st.SearchStrategy[Any]:
    """Values of the type that a key wants, in part within reach."""
    hint = known_keys()[key]
    typed = VALUES if "Any" in str(hint) else st.from_type(hint)
    return st.one_of(typed, st.sampled_from([1, 2, 0.5, True]))


@st.composite
def settings_of_any_kind(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    return {key: draw(fitting(key) if draw(st.integers(0, 5)) else VALUES) for key in keys}


def allowed(action: Callable[[], Any]) -> Any:
    """What an action gives; None where it refuses in words."""
    with contextlib.suppress(OptionError):
        return action()
    return None


def anywhere(draw: st.DrawFn, value: Any) -> Any:
    """The same JSON with one thing in it replaced, added or removed."""
    value = copy.deepcopy(value)
    node, holder, key = value, None, None
    while isinstance(node, dict | list) and node and draw(st.integers(0, 3)):
        holder, key = node, draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        node = holder[key]
    if holder is None:
        return draw(VALUES) if draw(st.booleans()) else {**value, draw(TEXTS): draw(VALUES)}
    if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
        del holder[key]
    else:
        holder[key] = draw(VALUES)
    return value


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    for _ in range(draw(st.integers(1, 2))):
        if not isinstance(value, dict):
            break
        value = anywhere(draw, value)
    return value


def test_a_configuration_is_used_as_written_or_refused(place: Path) -> None:
    saved = place / "saved.yaml"

    @FUZZ
    @given(settings_of_any_kind())
    @example({"galore.scale": 10**400})
    @example({"lr_scheduler_kwargs": {"speed": 2}})
    @example({"num_train_epochs": 1e308})
    @example({"warmup_steps": 2**63})
    @example({"lr_scheduler_kwargs": {"a": [2**63]}})
    @example({"data.columns": {"\x85": "\u2028"}})
    def check(chosen: dict[str, Any]) -> None:
        config = allowed(lambda: RunConfig.from_dict({"use_cpu": True, **chosen}))
        if config is not None:
            saved.write_text(config.to_yaml(), encoding="utf-8", errors="surrogatepass")
            again = allowed(lambda: load_run_config(saved))
            assert repr(again) == repr(config) or "\\ud" in repr(config)  # by repr, as NaN is not equal to itself
            allowed(lambda: training_arguments(config))

    fuzz(check)


def test_any_text_after_an_equals_sign(place: Path) -> None:
    @FUZZ
    @given(st.sampled_from(KEYS), st.one_of(TEXTS, VALUES.map(str), NUMBERS.map(str)))
    @example("galore.rank", "9" * 5000)
    @example("data.columns", "{a: {b: c}}")
    def check(key: str, text: str) -> None:
        allowed(lambda: load_run_config(None, [f"{key}={text}"]))

    fuzz(check)


def test_any_yaml(place: Path) -> None:
    file = place / "any.yaml"
    pieces = st.lists(
        st.one_of(TEXTS, st.sampled_from([
            "a: ", "- ", "&x ", "*x", "!!bool ", "!!set ", "!!int ", "<<: ", "? ", "\n", "  ", "'", '"', "|\n", "{",
            "}", "[", "]", "seed: 1\n", "galore:\n", "methods:\n", "1: 2\n", "0x", "---\n", "...\n", "%", "\t", "#",
        ])), max_size=12,
    )  # fmt: skip

    @FUZZ
    @given(st.one_of(pieces.map("".join).map(lambda text: text.encode(errors="surrogatepass")), st.binary(max_size=40)))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        allowed(lambda: load_run_config(file))
        allowed(lambda: load_study(file))

    fuzz(check)


def test_any_study(place: Path) -> None:
    (place / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    study = {
        "base": "tiny.yaml",
        "grid": {"galore.rank": [4, 8]},
        "cells": [{"name": "a", "seed": 1}],
        "seeds": [0],
        "metrics": ["score"],
        "set": {"galore": {"scale": 2}},
        "title": "t",
        "question": "q",
    }
    file = place / "study.yaml"

    @FUZZ
    @given(mutated(study))
    def check(content: Any) -> None:
        file.write_bytes(yaml.safe_dump(content, allow_unicode=False).encode(errors="surrogatepass"))
        allowed(lambda: load_study(file))

    fuzz(check)


ROWS: dict[str, dict[str, Any]] = {
    "sft": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "gsm8k": {"question": "How many?", "answer": "So it is.\n#### 4"},
    "mawps": {"question": "How many are N_00 and N_01?", "equation": "x = 1 + 2", "answer": 3.0},
    "nlg": {"mr": "name[Larkspur]", "ref": "Larkspur is a pub."},
}


def test_any_rows_of_data(place: Path) -> None:
    @FUZZ
    @given(
        st.sampled_from(sorted(ROWS)).flatmap(lambda t: st.tuples(st.just(t), st.lists(mutated(ROWS[t]), max_size=3)))
    )
    def check(given_rows: tuple[str, list[Any]]) -> None:
        task, rows = given_rows
        file = place / "rows.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in [ROWS[task], *rows])
        file.write_text(lines, encoding="utf-8")
        allowed(lambda: load_data(DataConfig(source=str(file), task=task, eval_samples=1)))

    fuzz(check)


def test_any_bytes_in_a_file_of_data(place: Path) -> None:
    pieces = [
        "{",
        "}",
        "[",
        "]",
        '"',
        ",",
        ":",
        "\n",
        "\r",
        "1",
        "9" * 5000,
        "NaN",
        "1e999",
        "\\ud800",
        "\ufeff",
        "a,b",
        "null",
    ]
    text = st.lists(st.one_of(st.text(max_size=5), st.sampled_from(pieces)), max_size=10).map("".join)

    @FUZZ
    @given(st.sampled_from([".json", ".jsonl", ".csv", ".txt", ".parquet"]), st.one_of(st.binary(max_size=30), text))
    @example(".jsonl", "[" * 100_000)
    @example(".csv", "a,b\n1," + "x" * 200_000)
    def check(suffix: str, content: bytes | str) -> None:
        file = place / f"any{suffix}"
        file.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        allowed(lambda: load_data(DataConfig(source=str(file))))
        allowed(lambda: score_files("gsm8k", str(file), str(file)))
        allowed(lambda: score_files("e2e", str(file), str(file)))

    fuzz(check)


def test_any_manifest_is_damage_or_vouches_for_its_files(place: Path) -> None:
    checkpoint = place / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"abc")
    manifest = {"files": {"weights": [3, 891568578]}}

    @FUZZ
    @given(st.one_of(mutated(manifest).map(json.dumps), st.text(max_size=20), st.just("[" * 100_000)))
    @example(json.dumps({"files": {"../x": [1, 2]}}))
    def check(text: str) -> None:
        (checkpoint / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
        found = damage(checkpoint)
        assert found is None or found
        allowed(lambda: choose_checkpoint("auto", place / "run"))
        allowed(lambda: choose_checkpoint(str(checkpoint), place / "run"))

    fuzz(check)


CHECKPOINTS = Path(__file__).parents[1] / "fixtures" / "checkpoints"


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a file, cut, or with a few of them replaced; of JSON one value is another."""
    kind = draw(st.sampled_from(["value", "cut", "bytes", "other"]))
    if kind == "value" and content.startswith(b"{"):
        return json.dumps(draw(mutated(json.loads(content)))).encode()
    if kind == "other":
        return draw(st.binary(max_size=20))
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    return content[:at] if kind == "cut" else content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at + 8 :]


def test_any_file_of_a_checkpoint(place: Path) -> None:
    @FUZZ
    @given(st.data(), st.sampled_from(["single-8-bit", "fsdp2", "zero2"]))
    def check(data: st.DataObject, name: str) -> None:
        for folder in (place / "checkpoint-6", place / "out"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(CHECKPOINTS / name / "checkpoint-6", place / "checkpoint-6")
        files = sorted(path for path in (place / "checkpoint-6").rglob("*") if path.is_file())
        file = data.draw(st.sampled_from(files))
        file.write_bytes(data.draw(damaged(file.read_bytes())))
        for action in (check_importable, lambda path: export_checkpoint(path, str(place / "out"))):
            allowed(functools.partial(action, str(place / "checkpoint-6")))
        assert {path.name for path in place.iterdir()} <= {"checkpoint-6", "out"}  # nothing is written elsewhere

    fuzz(check)


def test_any_configuration_of_a_model(place: Path, tiny_model_dir: Path) -> None:
    own = json.loads((tiny_model_dir / "config.json").read_text())
    folder = place / "model"
    folder.mkdir()

    @FUZZ
    @given(mutated(own))
    @example({**own, "num_hidden_layers": 10**9})
    @example({**own, "hidden_size": 10**12})
    def check(content: Any) -> None:
        (folder / "config.json").write_text(json.dumps(content))
        allowed(lambda: inspect(load_run_config(None, [f"model_name_or_path={folder}", "galore.rank=4"])))

    fuzz(check)


def test_any_result_log_and_study_of_a_report(place: Path) -> None:
    run, study = place / "run", place / "study"
    for folder in (run, study / "rank-4" / "seed-0"):
        folder.mkdir(parents=True)
    (study / "rank-4" / "seed-0" / "result.json").write_text(json.dumps(RESULT))
    log = [{"step": 1, "loss": 2.0, "eval_loss": 1.0}, {"step": 2, "loss": 1.0}]

    @settings(FUZZ, max_examples=50 if SECONDS else 3)  # each one draws the report's figures
    @given(mutated(RESULT), st.lists(mutated(log[0]), max_size=2), mutated(STUDY))
    @example({**RESULT, "config": {"max_steps": 10**400}}, [], STUDY)
    @example({**RESULT, "config": {"run_name": "a$b$_"}}, [], STUDY)
    @example({key: value for key, value in RESULT.items() if key != "score_after"}, [], STUDY)
    @example({**RESULT, "seconds": {**RESULT["seconds"], "training": 1e308}}, [{"step": 3, "loss": 1e308}], STUDY)
    def check(result: Any, rows: list[Any], record: Any) -> None:
        (run / "result.json").write_text(json.dumps(result))
        (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*log, *rows]))
        (study / "study.json").write_text(json.dumps(record))
        allowed(lambda: report([run], place / "out"))
        allowed(lambda: report([study], place / "out"))

    fuzz(check)


def test_any_prediction_has_a_score() -> None:
    words = st.one_of(
        st.text(max_size=20), st.sampled_from(["#### 1", "$5.00", "1e3", "-.", "١٢", "9" * 400, "inf", "4,"])
    )

    @FUZZ
    @given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
    def check(pairs: list[tuple[str, str]]) -> None:
        scores = exact_match([p for p, _ in pairs], [g for _, g in pairs])
        assert 0.0 <= scores["exact_match_flexible"]["value"] <= 1.0
        texts = nlg_scores([p for p, _ in pairs], [[g, "a b"] for _, g in pairs])
        assert all(math.isfinite(texts[key]) for key in ("bleu", "nist", "rouge_l", "cider"))

    fuzz(check)


def test_any_command_line(place: Path) -> None:
    words = st.sampled_from([
        "train", "eval", "estimate", "inspect", "score", "ablate", "report", "config", "data", "state",
        "validate", "show", "preview", "export", "import", "--rank", "--seed", "--json", "--task",
        "--resume", "--dry-run", "nosuch", "rank", "=", "a=b", "--", "-", "-n", "1", "-1", "", "quickstart",
    ])  # fmt: skip
    harmless = {"ablate": "--dry-run", "quickstart": "model_name_or_path=x/y/z"}  # nothing is to be trained here

    @FUZZ
    @given(st.lists(st.one_of(words, TEXTS), max_size=6))
    def check(line: list[str]) -> None:
        line = [part for word in line for part in ([word, harmless[word]] if word in harmless else [word])]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([word for word in line if word != "--debug"])
        assert code in (0, 1, 2)
        assert "Traceback" not in said.getvalue()

    fuzz(check)
