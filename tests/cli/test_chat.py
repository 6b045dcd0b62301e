"""``galore-ft chat``: whom a name means, what is printed, and turns that fit into the context."""

from __future__ import annotations

import builtins
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from galore_trainer.cli.main import main
from galore_trainer.run.chat import Conversation, find_target
from galore_trainer.run.launching.checkpoints import seal
from galore_trainer.run.models.generation import generate
from galore_trainer.run.models.model import load_model
from galore_trainer.run.models.prompts import render_prompt

SETTINGS = {
    "max_length": 400,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "save_steps": 1,
    "use_cpu": True,
    "galore": {"rank": 4, "update_proj_gap": 2},
    "lora": {"rank": 4, "alpha": 8},
    "data": {"train_samples": 8, "eval_samples": 0, "system_prompt": "Be brief."},
    "eval": {"before": False, "max_new_tokens": 6},
}


@pytest.fixture(scope="module")
def talker(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model whose greedy answers are not empty."""
    folder = tmp_path_factory.mktemp("talker")
    shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
    model, _ = load_model(str(tiny_model_dir))
    with torch.no_grad():  # the next token depends on the whole prompt, and is a printable character
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)), alpha=0.3)
    model.save_pretrained(folder)
    return folder


def make_run(talker: Path, output: Path, *words: str) -> Path:
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(SETTINGS | {"model_name_or_path": str(talker), "output_dir": str(output)}))
    assert main(["train", str(file), *words]) == 0
    return output


@pytest.fixture(scope="module")
def run(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("galore_trainer.run.memory.estimate.predict", lambda *args: {"peak_bytes": None})
        patch.setattr("galore_trainer.run.results.result.plot_losses", lambda *args, **more: None)
        yield make_run(talker, tmp_path_factory.mktemp("chat") / "run")


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``piped("lines", "words", ...)``: the exit code and what is printed."""

    def talk(text: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        capsys.readouterr()
        code = main(["chat", *words])
        return (code, *capsys.readouterr())

    return talk


def expected(folder: Path, *turns: str, system: str | None = None) -> str:
    """The greedy answer to the last of these turns, by the function that scores."""
    model, tokenizer = load_model(str(folder))
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    [text] = generate(model, tokenizer, [render_prompt(tokenizer, messages)], max_new_tokens=6, batch_size=1)
    return text


# ------------------------------------------------------------------------------------------ answers


def test_lines_of_a_pipe_are_turns_of_one_conversation(talker: Path, piped: Any) -> None:
    first = expected(talker, "1 + 1?")
    second = expected(talker, "1 + 1?", first, "And 2?")
    again = expected(talker, "And 2?")
    assert first
    assert second != again
    text = "1 + 1?\n\nAnd 2?\n/reset\nAnd 2?\n/exit\nnever asked\n"
    code, out, err = piped(text, str(talker), "--max-new-tokens", "6")
    assert (code, out.split("\n"), err) == (0, [first, second, again, ""], "")  # no colours, nothing else


def test_a_run_answers_by_its_own_settings_and_is_compared(run: Path, talker: Path, piped: Any) -> None:
    before, after = (expected(folder, "1 + 1?", system="Be brief.") for folder in (talker, run / "model"))
    assert piped("1 + 1?\n", str(run))[:2] == (0, f"{after}\n")
    assert piped("1 + 1?\n", str(run), "--compare")[:2] == (0, f"before: {before}\nafter: {after}\n")
    other = expected(run / "model", "1 + 1?", system="Sing.")
    assert piped("1 + 1?\n", str(run), "--system", "Sing.")[:2] == (0, f"{other}\n")
    assert piped("1 + 1?\n", str(run), "data.system_prompt=null")[1] == f"{expected(run / 'model', '1 + 1?')}\n"


def test_a_model_without_a_template_is_asked_in_the_plain_form(talker: Path, tmp_path: Path, piped: Any) -> None:
    shutil.copytree(talker, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    answer = expected(tmp_path, "1 + 1?")
    assert answer
    assert piped("1 + 1?\n", str(tmp_path), "--max-new-tokens", "6")[:2] == (0, f"{answer}\n")


def test_answers_are_sampled_at_a_temperature(talker: Path, piped: Any) -> None:
    answers = {piped("1 + 1?\n", str(talker), "--max-new-tokens", "6", "--temperature", "2")[1] for _ in range(4)}
    assert len(answers) > 1


def test_adapters_answer_as_the_merged_model(talker: Path, tmp_path: Path, piped: Any, short_end: None) -> None:
    run = make_run(talker, tmp_path / "lora", "--method", "lora", "learning_rate=0.05")
    _, merged, _ = piped("1 + 1?\n", str(run))
    assert merged != piped("1 + 1?\n", str(run), "--compare")[1].split("before: ")[1].split("after")[0]
    for part in ("adapter", "checkpoint-2", "model"):
        assert piped("1 + 1?\n", str(run / part)) == (0, merged, "")
    shutil.copytree(run / "adapter", tmp_path / "alone")  # outside the run the adapter names its base itself
    file = tmp_path / "alone" / "adapter_config.json"
    assert "adapter_model.safetensors" in {path.name for path in file.parent.iterdir()}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(talker)}))
    assert piped("1 + 1?\n", str(tmp_path / "alone"), "data.system_prompt=null", "--max-new-tokens", "6")[0] == 0
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    assert "base_model_name_or_path" in piped("", str(tmp_path / "alone"))[2]


@pytest.fixture
def short_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galore_trainer.run.memory.estimate.predict", lambda *args: {"peak_bytes": None})
    monkeypatch.setattr("galore_trainer.run.results.result.plot_losses", lambda *args, **more: None)


# ------------------------------------------------------------------------------------------ the context


def test_the_oldest_turns_go_where_no_room_is_left(talker: Path) -> None:
    model, tokenizer = load_model(str(talker))
    model.config.max_position_embeddings = 120
    conversation = Conversation(model, tokenizer, system="Be brief.", max_new_tokens=6)
    texts: list[str] = []
    dropped = []
    for text in ("first", "second", "third", "fourth"):
        dropped.append(conversation.take(text))
        conversation.answer(texts.append)
        length = len(tokenizer(render_prompt(tokenizer, [*conversation.system, *conversation.turns]))["input_ids"])
        assert length <= 120 + len("<|im_start|>assistant\n")
    assert dropped[0] == 0
    assert sum(dropped) >= 2
    assert conversation.turns[0] != {"role": "user", "content": "first"}
    assert conversation.turns[0]["role"] == "user"
    before = list(conversation.turns)
    with pytest.raises(Exception, match="tokens") as caught:
        conversation.take("x" * 200)
    assert caught.value.option == "prompt"
    assert conversation.turns == before
    conversation.reset()
    assert conversation.turns == []


def test_a_prompt_that_fits_nowhere_is_refused(talker: Path, piped: Any) -> None:
    code, _, err = piped("x" * 2000 + "\n", str(talker))
    assert (code, "prompt: got '20" in err, "Shorten it" in err) == (2, True, True)
    code, _, err = piped("hello\n", str(talker), "--max-new-tokens", "1024")
    assert (code, "below 1024" in err) == (2, True)


# ------------------------------------------------------------------------------------------ a terminal


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``typed([line or exception, ...], "words", ...)``: as ``piped``, by somebody at a terminal."""

    def talk(lines: list[Any], *words: str) -> tuple[int, str, str]:
        left = iter([*lines, EOFError])

        def read(prompt: str) -> str:
            line = next(left)
            if isinstance(line, str):
                return line
            raise line

        stdin = io.StringIO()
        stdin.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(builtins, "input", read)
        capsys.readouterr()
        code = main(["chat", *words])
        return (code, *capsys.readouterr())

    return talk


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt, "/exit"])
def test_a_terminal_is_left_in_three_ways(leave: Any, talker: Path, typed: Any) -> None:
    words = str(talker), "--max-new-tokens", "6"
    code, out, err = typed(["1 + 1?", "x" * 2000, "/nothing", leave], *words)
    assert (code, out.split("\n")[0]) == (0, expected(talker, "1 + 1?"))
    assert "Ctrl-C stops an answer" in err
    assert "Shorten it" in err  # and the conversation goes on
    assert "/reset, /exit or a prompt" in err


def test_ctrl_c_stops_an_answer_which_the_conversation_keeps(talker: Path, typed: Any, monkeypatch: Any) -> None:
    heard: list[list[dict[str, str]]] = []
    generate = Conversation._generate

    def stopped(self: Conversation, take: Callable[[str], None]) -> None:
        heard.append(list(self.turns))
        if len(heard) == 1:
            take("half an ")
            raise KeyboardInterrupt
        if len(heard) == 2:
            raise KeyboardInterrupt
        generate(self, take)

    monkeypatch.setattr(Conversation, "_generate", stopped)
    code, out, _ = typed(["one", "two", "three"], str(talker), "--max-new-tokens", "6")
    assert code == 0
    assert out.startswith("half an\n")
    contents = [[turn["content"] for turn in turns] for turns in heard]
    assert contents == [["one"], ["one", "half an", "two"], ["one", "half an", "three"]]  # no answer, no question


def test_ctrl_c_ends_a_pipe(talker: Path, piped: Any, monkeypatch: Any) -> None:
    def stopped(self: Conversation, take: Callable[[str], None]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "_generate", stopped)
    assert piped("one\ntwo\n", str(talker))[0] == 130


# ------------------------------------------------------------------------------------------ refusals


def test_an_unfinished_run_names_its_newest_checkpoint(run: Path, tmp_path: Path, piped: Any) -> None:
    unfinished = tmp_path / "half a run"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "model")
    code, _, err = piped("1 + 1?\n", str(unfinished))
    assert code == 2
    command = err.split("galore-ft chat ")[1].rstrip().rstrip(".")
    assert command == f"'{unfinished / 'checkpoint-2'}'"
    code, out, _ = piped("1 + 1?\n", command.strip("'"))
    assert (code, out) == (0, f"{expected(run / 'model', '1 + 1?', system='Be brief.')}\n")

    newest = unfinished / "checkpoint-2"
    (newest / "model.safetensors").unlink()  # as FSDP2 leaves it, with weights in a folder
    seal(newest)
    assert "checkpoint-2 holds its weights in parts" in piped("", str(unfinished))[2]
    for folder in unfinished.glob("checkpoint-*"):
        shutil.rmtree(folder)
    code, _, err = piped("", str(unfinished))
    assert (code, "no whole checkpoint yet" in err, "--resume auto" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--compare"], "a run's folder, which says what it was trained from"),
        (["--temperature", "nan"], "a finite number"),
        (["--temperature", "-1"], "a finite number"),
        (["attn_implementation=flash_attention_2"], "flash-attn"),
        (["galore.rnk=3"], "galore.rank"),
    ],
)
def test_what_cannot_be_honoured_is_refused(words: list[str], told: str, talker: Path, piped: Any) -> None:
    code, out, err = piped("1 + 1?\n", str(talker), *words)
    assert (code, out) == (2, "")
    assert told in err


def test_weights_keep_their_own_type_unless_told_otherwise(talker: Path) -> None:
    assert find_target(str(talker)).config.dtype == "auto"
    assert find_target(str(talker), ["torch_dtype=bfloat16"]).config.dtype == "bfloat16"
    assert find_target(str(talker), ["dtype=float32"]).config.dtype == "float32"


def test_a_name_of_nothing_is_refused(tmp_path: Path, piped: Any) -> None:
    code, _, err = piped("", str(tmp_path / "none" / "such"))
    assert (code, "an existing folder" in err) == (2, True)
