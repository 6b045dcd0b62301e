"""Data files that are refused name the file and the line; large and odd ones that are valid are read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_trainer.errors import OptionError
from galore_trainer.recipes import DataConfig, load_data
from galore_trainer.recipes.sources import MalformedJson, decode_json, read_file

GOOD = json.dumps({"question": "q", "answer": "#### 1"})
DEEP = '{"question": ' + "[" * 100_000 + "]" * 100_000 + "}"
LONG = '{"question": "q", "answer": ' + "9" * 5000 + "}"
HALF = '{"question": "a \\ud83d b", "answer": "#### 1"}'


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (DEEP, "nested too deeply"),
        (LONG, "too many digits"),
        (HALF, "surrogate"),
        ('{"\\udc00": 1}', "surrogate"),
        ('{"a": 1} 2', "more than one value"),
        ('{"a": 1', "delimiter"),
        ("{'a': 1}", "double quotes"),
    ],
)
def test_json_that_cannot_be_used_is_named_with_its_line(bad: str, said: str, tmp_path: Path) -> None:
    lines, array = tmp_path / "l.jsonl", tmp_path / "a.json"
    lines.write_text(f"{GOOD}\n\n{bad}\n")
    array.write_text(f"[{GOOD},\n\n{bad}\n]")
    for path in (lines, array):
        with pytest.raises(OptionError) as error:
            read_file("data.source", str(path))
        assert path.name in str(error.value)
        assert "line 3" in str(error.value) or bad == '{"a": 1', str(error.value)
        assert said in str(error.value) or path == array


@pytest.mark.parametrize(
    ("text", "line"),
    [("[{},\n]", 2), ("[{}\n{}]", 2), ("[{}]\n{}", 2), ("[\n{},\n\n,{}]", 4), ("[{}", 1), ("[", 1)],
)
def test_brackets_and_commas_of_an_array(text: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=f"line {line} is not"):
        read_file("data.source", str(path))


def test_emoji_written_as_two_halves_and_long_numbers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text(json.dumps({"question": "😀", "answer": 10**400, "more": [[[[1]]]]}))
    assert "\\ud83d" in path.read_text()
    row = read_file("data.source", str(path))[0]
    assert row.fields == {"question": "😀", "answer": 10**400, "more": [[[[1]]]]}


def test_csv_cells_of_any_length_are_read(tmp_path: Path) -> None:
    path, limit = tmp_path / "c.csv", csv.field_size_limit()
    path.write_text(f'prompt,completion\n"{"a" * 200_000}",b\nc,"{"d" * 131_073}"\n')
    first, second = read_file("data.source", str(path))
    assert (len(first.fields["prompt"]), len(second.fields["completion"])) == (200_000, 131_073)
    assert csv.field_size_limit() == limit
    path.write_text(f'prompt,completion\n"{"a" * 200_000}",b\nc\n')
    with pytest.raises(OptionError, match="line 3"):
        read_file("data.source", str(path))


def test_a_cell_that_opens_like_turns_and_is_none_is_text(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        prompts = ["[" * 50_000, "[" + "9" * 5000 + "]", '["\\ud800"]', "[1] and more"]
        writer.writerows([("prompt", "completion"), *((p, "c") for p in prompts)])
    data = load_data(DataConfig(source=str(path), eval_samples=1))
    assert {e.messages[0]["content"] for e in data.train + data.eval} == set(prompts)


def test_a_row_whose_field_is_nested_deeply_is_still_named(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"question": ' + "[" * 400 + "]" * 400 + ', "answer": "#### 1"}\n')
    with pytest.raises(OptionError, match=r"'answer'|'question' of line 1"):
        load_data(DataConfig(source=str(path)))


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_decoding_is_that_of_the_standard_library(value: object) -> None:
    text = f" {json.dumps(value)} \n"
    try:
        found, end = decode_json(text)
    except MalformedJson:
        with pytest.raises(UnicodeEncodeError):
            json.dumps(value, ensure_ascii=False).encode()
        return
    assert (found, end) == (json.loads(text), len(text))
