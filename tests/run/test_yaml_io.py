"""YAML that is refused: the file and the line are named, and it takes no time and no memory."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError
from galore_trainer.run.settings.yaml_io import MOST_VALUES, dump, parse_value, read_mapping

TEN = ",".join(["x"] * 10)
SEVEN = [", ".join([f"*a{i}"] * 10) for i in range(12)]
BOMB = f"a0: &a0 [{TEN}]\n" + "".join(f"a{i + 1}: &a{i + 1} [{SEVEN[i]}]\n" for i in range(11))
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{i + 1}: &a{i + 1}\n  <<: [{SEVEN[i]}]\n" for i in range(11))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: !!bool x", 2, "!!bool"),
        ("a: !!set {x, y}", 1, "!!set"),
        ("a: !!int abc", 1, "without a tag"),
        ("a: !!timestamp x", 1, "without a tag"),
        ("a:\n- !!binary '='", 2, "without a tag"),
        ("a: !own 3", 1, "!own"),
        ("a: !!python/object/apply:os.getcwd []", 1, "without a tag"),
        ("1: x", 1, "Quote it: '1'"),
        ("a:\n  b:\n    - 2.5: x", 3, "Quote it: '2.5'"),
        ("null: x", 1, "a text as key"),
        ("yes: 1\ntrue: 2", 2, "a text as key"),
        ("? [a, b]\n: 1", 1, "a text as key"),
        ("a: 1\nlearning_rate: " + "9" * 400, 2, "an integer of 64 bits"),
        ("a: " + "9" * 5000, 1, "an integer of 64 bits"),
        ("a: 0x" + "f" * 400, 1, "an integer of 64 bits"),
        ("a: -9223372036854775808", 1, "an integer of 64 bits"),
        ("a: 1e400", 1, "below 1.8e308"),
        ("a: [1, -" + "9" * 400 + ".5]", 1, "below 1.8e308"),
        (BOMB, 4, f"at most {MOST_VALUES} values"),
        (MERGES, 7, f"at most {MOST_VALUES} values"),
        ("a: 1\n" * (MOST_VALUES), MOST_VALUES // 2 + 1, f"at most {MOST_VALUES} values"),
        ("a: &a [*a]", 1, "*a"),
        ("a: &a {b: *a}", 1, "*a"),
        ("a: &a\n  <<: *a", 2, "*a"),
        ("a: " + "[" * 100_000, 1, "at most 50 levels"),
        ("- " * 100_000, 1, "at most 50 levels"),
        ("a: 1\nb: " + "x" * 300_000, 2, "characters"),
        ('a: "\\ud800"', 1, "surrogate"),
        ('a: 1\n"\\udfff": 1', 2, "surrogate"),
        ('a: "\\U00110000"', 1, "valid YAML"),
        ("a: 1\n\nb: \x07", 3, "no such character"),
        ("a: *nowhere", 1, "nowhere"),
        ("<<: 3", 1, "merging"),
        ("a: 1\n---\nb: 2", 2, "document"),
    ],
)
def test_the_file_and_the_line_are_named(text: str, line: int, said: str) -> None:
    with pytest.raises(OptionError) as error:
        read_mapping(text, "mine.yaml")
    assert error.value.option == f"mine.yaml, line {line}"
    assert said in str(error.value)


def test_aliases_merges_and_the_largest_numbers_are_read() -> None:
    text = "a: &a {p: 1, q: [2]}\nb: {<<: *a, q: *a}\nc: 9223372036854775807\nd: 1.7e308\ne: [.inf, -.INF, .nan]\n"
    data = read_mapping(text, "x").data
    assert data["b"] == {"p": 1, "q": {"p": 1, "q": [2]}}
    assert (data["c"], data["d"]) == (2**63 - 1, 1.7e308)
    assert data["e"][:2] == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "text", ["[" * 300, "{1: 2}", "9" * 400, "1e400", '"\\ud800"', "!!bool x", "[*a]", "[&a [*a]]"]
)
def test_on_the_command_line_what_is_no_value_is_text(text: str) -> None:
    assert parse_value(text) == text


def test_the_command_ends_with_2_for_a_run_a_study_and_a_launch(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(MERGES)
    for words in (
        ["train", str(path)],
        ["ablate", str(path)],
        ["train", str(path), "--show-config"],
        ["train", "quickstart", "use_cpu=true", "--launch-config", str(path)],
    ):
        assert main(words) == 2, words
        assert "bomb.yaml, line 7" in capsys.readouterr().err


keys = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False) | keys,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(st.dictionaries(keys, values, min_size=1, max_size=4))
def test_what_is_written_is_read_back(data: dict) -> None:
    assert read_mapping(dump(data), "x").data == data


@settings(max_examples=40)
@given(st.text(max_size=60) | st.text("[]{}*&!:-,<> ab1\n\"'", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(OptionError):
        read_mapping(text, "x")
    parse_value(text)
