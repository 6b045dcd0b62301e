"""``galore-ft config validate``: what is still to be filled in, and settings that have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from galore_trainer.cli.main import main

FILLED = "still to be filled in before it can run: "


def validated(text: str, folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """The exit code, and the lines of both streams."""
    (folder / "mine.yaml").write_text(text)
    code = main(["config", "validate", str(folder / "mine.yaml"), *words])
    told = capsys.readouterr()
    return code, [*told.out.splitlines(), *told.err.splitlines()]


def test_a_converted_file_names_what_it_could_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("stage: sft\nfinetuning_type: full\ntemplate: llama3\ncutoff_len: 512\n")
    assert main(["config", "convert", str(theirs)]) == 0
    text = capsys.readouterr().out
    code, lines = validated(text, tmp_path, capsys)
    both = ["model_name_or_path (path/to/model)", "data.source (path/to/train.jsonl)"]
    assert (code, lines[1]) == (0, FILLED + ", ".join(both))
    code, lines = validated(text, tmp_path, capsys, "model_name_or_path=gpt2")
    assert (code, lines[1]) == (0, FILLED + both[1])
    assert not any(line.startswith(FILLED) for line in validated("data: {source: a/b}\n", tmp_path, capsys)[1])


def test_every_value_that_is_missing_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "model_name_or_path:\nlearning_rate: ???\ndata:\n  sources: [{source: <yours>}]\neval: {limit: null}\n"
    code, lines = validated(text, tmp_path, capsys)
    file = tmp_path / "mine.yaml"
    assert code == 2
    assert lines[0].endswith("wanted a value for each. Still to be filled in:")
    assert lines[1:] == [
        f"  model_name_or_path:  ({file}, line 1)",
        f"  learning_rate: ??? ({file}, line 2)",
        f"  data.sources[0].source: <yours> ({file}, line 4)",
    ]


def test_an_empty_text_is_a_value_where_none_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty ``system_prompt`` takes the place of the one of a chat template."""
    code, lines = validated('run_name: ""\ndata: {system_prompt: ""}\n', tmp_path, capsys)
    assert (code, [line for line in lines if line.startswith(FILLED)]) == (0, [])
    code, lines = validated('model_name_or_path: ""\n', tmp_path, capsys)
    assert (code, lines[1]) == (2, f"  model_name_or_path:  ({tmp_path / 'mine.yaml'}, line 1)")


def test_another_mistake_is_told_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = validated("model_name_or_path: path/to/model\ngalore: {rank: 0}\n", tmp_path, capsys)
    assert (code, lines[0].split(":")[1]) == (2, " galore.rank")


def test_settings_without_effect_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = validated("galore: {head_group_size: 4}\neval: {generate: false, batch_size: 8}\n", tmp_path, capsys)
    assert code == 0
    assert lines[1:3] == [
        "note: galore.head_group_size 4 has no effect beside galore.head_sharing shared: it needs "
        "galore.head_sharing: grouped",
        "note: eval.batch_size 8 has no effect beside eval.generate false and eval.samples 0: it needs "
        "eval.generate: true, or eval.samples",
    ]
