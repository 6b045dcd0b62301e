"""Examples are tokenized once: a second run reads what the first one wrote, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.recipes import DataConfig, Example, load_data
from galore_trainer.run.models import encoded as module
from galore_trainer.run.models.encoded import encoded
from galore_trainer.run.models.model import load_tokenizer
from galore_trainer.run.models.prompts import encode_all
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train

EXAMPLES = load_data(DataConfig(train_samples=6, eval_samples=2)).train
LONG = 140  # tokens, of which some of the examples have more


@pytest.fixture
def tokenizer(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GALORE_TRAINER_CACHE", str(tmp_path / "cache"))
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each call of ``encode_all`` was given."""
    calls: list[int] = []

    def count(tokenizer: Any, examples: list[Example], max_length: int) -> Any:
        calls.append(len(examples))
        return encode_all(tokenizer, examples, max_length)

    monkeypatch.setattr(module, "encode_all", count)
    return calls


def folders(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache" / "tokenized").iterdir() if path.is_dir()]


def test_the_second_time_nothing_is_tokenized(tokenizer: Any, made: list[int]) -> None:
    expected = encode_all(tokenizer, EXAMPLES, LONG)
    assert 0 < len(expected.dropped) < len(EXAMPLES)
    for _ in range(2):
        rows, dropped = encoded(tokenizer, EXAMPLES, LONG)
        assert [dict(row) for row in rows] == expected.rows
        assert dropped == expected.dropped
    assert made == [len(EXAMPLES)]


def test_a_second_run_on_the_same_data_tokenizes_nothing(
    tokenizer: Any, made: list[int], short_run: Callable[..., RunConfig]
) -> None:
    first = train(short_run("first", max_steps=2, save_strategy="no")).result
    assert sorted(made) == [4, 40]
    second = train(short_run("second", max_steps=2, save_strategy="no")).result
    assert sorted(made) == [4, 40]
    assert second["train_loss"] == first["train_loss"]


def test_whatever_decides_the_ids_is_in_the_key(tokenizer: Any, made: list[int], monkeypatch: Any) -> None:
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    example = Example(messages=turns, target="d", answer=None, id="x:1", trained=(1,))
    changes: list[Callable[[], Any]] = [
        lambda: encoded(tokenizer, [example], 100),
        lambda: encoded(tokenizer, [example], 101),
        lambda: encoded(tokenizer, [dataclasses.replace(example, trained=())], 100),
        lambda: encoded(tokenizer, [dataclasses.replace(example, target="e")], 100),
        lambda: encoded(tokenizer, [example, example], 100),
    ]
    for change in changes:
        change()
    tokenizer.chat_template = tokenizer.chat_template.replace("\n{% endfor", "\n\n{% endfor")
    encoded(tokenizer, [example], 100)
    tokenizer.add_tokens(["b<|"])
    encoded(tokenizer, [example], 100)
    monkeypatch.setattr("galore_trainer.__version__", "0.0.0")
    encoded(tokenizer, [example], 100)
    assert made == [1, 1, 1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("damage", ["cut", "flip", "record", "file", "state"])
def test_a_damaged_folder_is_made_anew(damage: str, tokenizer: Any, made: list[int], tmp_path: Path) -> None:
    expected = encoded(tokenizer, EXAMPLES, 512).rows[:]
    (folder,) = folders(tmp_path)
    arrow, record = next(folder.glob("*.arrow")), folder / module.RECORD
    content = arrow.read_bytes()
    if damage == "cut":
        arrow.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = len(content) // 2
        arrow.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "record":
        record.write_text("{")
    elif damage == "file":
        arrow.unlink()
    else:
        (folder / "state.json").write_text("{}")
    assert encoded(tokenizer, EXAMPLES, 512).rows[:] == expected
    assert encoded(tokenizer, EXAMPLES, 512).rows[:] == expected
    assert made == [len(EXAMPLES)] * 2


def test_one_of_several_makes_the_rows_and_the_others_wait(tokenizer: Any, made: list[int]) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: encoded(tokenizer, EXAMPLES, 512).rows[:], range(4)))
    assert made == [len(EXAMPLES)]
    assert all(rows == results[0] for rows in results)


def test_the_oldest_go_where_there_is_too_much(
    tokenizer: Any, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded(tokenizer, EXAMPLES, 512)
    (first,) = folders(tmp_path)
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setattr(module, "MOST_BYTES", int(2.5 * size))
    encoded(tokenizer, EXAMPLES, 513)
    encoded(tokenizer, EXAMPLES, 512)  # used again, so the other one is older now
    encoded(tokenizer, EXAMPLES, 514)
    assert first in folders(tmp_path)
    assert len(folders(tmp_path)) == 2
    assert len(made) == 3


def test_a_cache_that_cannot_be_written_is_done_without_and_said(
    tokenizer: Any, made: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    assert len(encoded(tokenizer, EXAMPLES, 512).rows) == len(EXAMPLES)
    assert "are not kept in" in caplog.text
    assert made == [len(EXAMPLES)]


def test_nothing_is_kept_of_what_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(OptionError, match="max_length"):
            encoded(tokenizer, EXAMPLES, 4)
    assert folders(tmp_path) == []
