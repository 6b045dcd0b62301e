"""A system prompt goes before prompts that have none, in training and evaluation alike."""

from __future__ import annotations

import json
from pathlib import Path

from galore_trainer.recipes import DataConfig, load_data


def test_a_system_prompt_is_added_where_there_is_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "cat"}]
    chats = [
        [*own, {"role": "assistant", "content": "hat"}],
        [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "fog"}],
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = load_data(DataConfig(source=str(path), eval_samples=0, system_prompt="Answer."))
    by_question = {e.messages[-1]["content"]: e.messages for e in data.train}
    assert [m["content"] for m in by_question["cat"]] == ["Rhyme.", "cat"]
    assert [m["content"] for m in by_question["dog"]] == ["Answer.", "dog"]
    generated = load_data(DataConfig(train_samples=3, eval_samples=2, system_prompt="Answer."))
    assert all(e.messages[0]["content"] == "Answer." for e in [*generated.train, *generated.eval])
