"""Conversations in every form that people keep them in are told by their columns and give the same turns."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.recipes import DataConfig, TaskData, load_data, score
from galore_trainer.recipes.base import Example

ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


def turns(i: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Name colour {i}."},
        {"role": "assistant", "content": f"Colour {i}."},
        {"role": "user", "content": "Another one.\nPlease."},
        {"role": "assistant", "content": f"Colour {i + 1}."},
    ]


def share_gpt(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"from": ROLES[turn["role"]], "value": turn["content"]} for turn in chat]


def alpaca(i: int) -> dict[str, Any]:
    chat = [turn["content"] for turn in turns(i)]
    row = {"instruction": "Another one.", "input": "Please.", "output": chat[4]}
    return {**row, "system": chat[0], "history": [chat[1:3]]}


FORMS = {
    "messages": lambda i: {"messages": turns(i)},
    "messages beside others": lambda i: {"prompt": "?", "text": "?", "messages": turns(i)},
    "messages in ShareGPT's keys": lambda i: {"messages": share_gpt(turns(i))},
    "ShareGPT": lambda i: {"conversations": share_gpt(turns(i))},
    "ShareGPT in OpenAI's keys": lambda i: {"id": i, "conversations": turns(i)},
    "ShareGPT with a system column": lambda i: {"conversations": share_gpt(turns(i)[1:]), "system": "Be brief."},
    "Alpaca": alpaca,
    "Alpaca with its text": lambda i: {**alpaca(i), "text": "Below is an instruction ..."},
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, **more: Any) -> TaskData:
    return load_data(DataConfig(**{"source": path, "eval_samples": 1, **more}))


def everything(data: TaskData) -> list[Example]:
    return sorted([*data.train, *data.eval], key=lambda example: int(example.id.rpartition(":")[2]))


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_turns_of_the_chat(form: str, tmp_path: Path) -> None:
    data = load(write(tmp_path / "c.jsonl", [FORMS[form](i) for i in range(4)]))
    assert data.task == "sft"
    for i, example in enumerate(everything(data)):
        assert list(example.messages) == turns(i)[:4]
        assert (example.target, example.trained) == (f"Colour {i + 1}.", (2,))


@pytest.mark.parametrize("form", ["messages", "ShareGPT", "Alpaca"])
def test_a_table_holds_lists_as_json(form: str, tmp_path: Path) -> None:
    rows = [FORMS[form](i) for i in range(4)]
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
        )
    examples = [*load(str(tmp_path / "c.csv")).train]
    assert all(example.trained == (2,) for example in examples)


def test_the_last_turn_alone_is_trained_on_where_that_is_asked_for(tmp_path: Path) -> None:
    data = load(write(tmp_path / "c.jsonl", [{"messages": turns(i)} for i in range(4)]), train_on="last")
    assert all(example.trained == () for example in everything(data))
    with pytest.raises(OptionError, match=r"data\.train_on.*all, last"):
        DataConfig(train_on="first")  # type: ignore[arg-type]


def test_of_a_pair_the_completion_is_trained_on_and_not_the_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": turns(i)[:4], "completion": [turns(i)[4], *turns(i)[3:]]} for i in range(3)]
    assert all(example.trained == (4,) for example in everything(load(write(tmp_path / "c.jsonl", rows))))


def test_an_alpaca_row_without_input_is_its_instruction(tmp_path: Path) -> None:
    rows = [{"instruction": f"Count to {i}.", "input": "", "output": "1"} for i in range(3)]
    first = everything(load(write(tmp_path / "c.jsonl", rows)))[0]
    assert first.messages == ({"role": "user", "content": "Count to 0."},)
    renamed = [{"request": f"Count to {i}.", "reply": "1"} for i in range(3)]
    columns = {"instruction": "request", "output": "reply"}
    again = load(write(tmp_path / "d.jsonl", renamed), columns=columns)
    assert everything(again)[0].messages == first.messages


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"question": "1 + 1?", "answer": "#### 2"}, "gsm8k"),
        ({"question": "1 + 1?", "equation": "1 + 1", "answer": "2"}, "mawps"),
        ({"mr": "name[A]", "ref": "A."}, "nlg"),
        ({"text": "Once."}, "text"),
        ({"text": "Once.", "question": "1 + 1?", "answer": "#### 2"}, "gsm8k"),
        ({"prompt": "Hi", "completion": "Hello."}, "sft"),
    ],
)
def test_tasks_are_told_apart(row: dict[str, Any], task: str, tmp_path: Path) -> None:
    assert load(write(tmp_path / "c.jsonl", [row, row]), eval_samples=0).task == task


def test_a_renamed_column_chooses_the_task(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"messages": turns(i), "body": f"Text {i}."} for i in range(3)])
    assert load(path).task == "sft"
    assert load(path, columns={"text": "body"}).task == "text"


def test_raw_texts_are_split_by_their_text(tmp_path: Path) -> None:
    data = load(write(tmp_path / "t.jsonl", [{"text": f"Text {i % 5}."} for i in range(10)]), eval_samples=2)
    assert (data.task, len(data.train), len(data.eval)) == ("text", 3, 2)
    assert all(example.messages == () for example in everything(data))
    assert not {e.target for e in data.train} & {e.target for e in data.eval}
    assert score("text", ["", ""], data.eval) == {"n": 2}
    with pytest.raises(OptionError, match=r"data\.system_prompt.*raw texts have no turns"):
        load(str(tmp_path / "t.jsonl"), system_prompt="Be brief.")


def test_turns_that_answer_nothing_are_read_only(tmp_path: Path) -> None:
    empty = [*turns(0)[:2], {"role": "assistant", "content": " "}, *turns(0)[3:]]
    greeting = [{"from": "gpt", "value": "Hello!"}, *share_gpt(turns(1)[1:])]
    data = load(write(tmp_path / "c.jsonl", [{"messages": empty}, {"conversations": greeting}]), eval_samples=0)
    assert [example.trained for example in everything(data)] == [(), (2,)]
    assert "2 turns of the assistant read, not trained on: empty, or the first of a chat" in data.notes


def test_no_answer_to_an_evaluated_prompt_is_trained_on_in_a_longer_chat(tmp_path: Path) -> None:
    train = write(tmp_path / "c.jsonl", [{"messages": turns(i)} for i in range(4)])
    held = write(tmp_path / "e.jsonl", [{"messages": turns(2)[:3]}])
    assert len(load(train, eval_source=held).train) == 3
    assert len(load(train, eval_source=held, train_on="last").train) == 4


TOOL = {"role": "tool", "content": "22 C"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": turns(0)[:2]}, r"at least one turn of the assistant in field 'messages' of line 2"),
        ({"conversations": share_gpt(turns(0)[:2])}, r"turn of the assistant in field 'conversations' of line 2"),
        ({"conversations": []}, r"a list of turns in field 'conversations' of line 2"),
        ({"conversations": [{"from": "robot", "value": "?"}]}, r"'from' \(human, gpt, system\).*turn 1, in field"),
        ({"messages": [*turns(0)[:3], TOOL, *turns(0)[3:]]}, r"no turn of a tool, as turn 4 is, in field 'messages'"),
        ({"conversations": [{"from": "observation", "value": "22 C"}]}, r"no turn of a tool, as turn 1 is"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, r"no turn of a tool"),
        ({"messages": turns(0), "tools": "[{}]"}, r"no tools in field 'tools' of line 2"),
        ({"instruction": "Go.", "output": None}, r"a text in field 'output' of line 2"),
        ({"instruction": "Go.", "output": " "}, r"an answer that is not empty in field 'output' of line 2"),
        ({"instruction": "", "output": "a"}, r"a text in field 'instruction' of line 2"),
        ({"instruction": "Go.", "output": "a", "input": 3}, r"a text in field 'input' of line 2"),
        ({"instruction": "Go.", "output": "a", "history": [["a"]]}, r"a list of pairs of texts in field 'history'"),
        ({"instruction": "Go.", "output": "a", "system": 1}, r"a text in field 'system' of line 2"),
        ({"prompt": "Go.", "chosen": "a", "rejected": "b"}, r"field 'completion' of line 2"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = {"messages": turns(0)}
    with pytest.raises(OptionError, match=rf"data\.source.*c\.jsonl.*{said}"):
        load(write(tmp_path / "c.jsonl", [good, row]))


def test_a_text_column_with_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"a text in field 'text' of line 2"):
        load(write(tmp_path / "t.jsonl", [{"text": "a"}, {"text": " "}]))
