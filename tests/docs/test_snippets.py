"""Every snippet and command of README and docs/ runs, on a tiny model; what cannot run here is parsed."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from documents import PAGES, ROOT, Block, blocks, commands, galore_ft, understood

TINY = ["gradient_accumulation_steps=1", "max_steps=2", "save_steps=1", "use_cpu=true", "bf16=false"]
TINY += ["max_length=128", "data.eval_samples=2", "eval.max_new_tokens=2", "report_to=none"]
ELSEWHERE = {"git", "pip", "python3", "accelerate", "torchrun", "srun", "export"}
"""Programs that only parsed blocks call, and the clone of README's first block."""


def names(pages: list[Path], language: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in pages if blocks(page, language)]


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a page's reader, with the files that commands name."""
    files = tmp_path / "path" / "to"
    files.mkdir(parents=True)
    (files / "model").symlink_to(tiny_model_dir)

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    chats = [{"messages": [turn("user", f"Name {i}."), turn("assistant", f"It is {i}.")]} for i in range(64)]
    sums = [{"question": f"{i} + {i} = ?", "answer": f"#### {2 * i}"} for i in range(8)]
    equations = [{"question": f"{i} plus 1", "equation": f"{i} + 1", "answer": f"{i + 1}"} for i in range(256)]
    lines = {"chats": chats, "gsm8k": sums}
    for name, rows in lines.items():
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (files / "mawps.json").write_text(json.dumps(equations))
    table = "mr,ref\n" + "".join(f'"name[Bar {i}], food[Thai]",Bar {i} serves Thai food.\n' for i in range(8))
    (files / "trainset.csv").write_text(table)
    (files / "devset.csv").write_text(table)
    (files / "out.txt").write_text("".join(f"Bar {i} serves food.\n" for i in range(8)))
    (tmp_path / "my.yaml").write_text("model_name_or_path: path/to/model\ngalore: {rank: 4}\nmax_length: 32\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", names(PAGES, "bash"))
def test_commands(page: Path, folder: Path) -> None:
    for block in blocks(page, "bash"):
        for words in commands(block):
            own = galore_ft(words)
            if own is None:
                is_known(words, block)
            elif block.not_run or words[0] != "galore-ft":
                understood(own)
            else:
                runs(own)


def is_known(words: list[str], block: Block) -> None:
    """A command that is not ours names things that exist."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    else:
        assert words[0] in ELSEWHERE, words
        assert block.not_run or words[0] == "git", words


def runs(words: list[str]) -> None:
    """A command of ours ends with 0; ``train`` takes two steps of a tiny model."""
    from galore_trainer.cli.main import main

    tiny: list[str] = []
    given = {word.partition("=")[0] for word in words}
    if words[0] in ("train", "data") and not {"--model", "model_name_or_path"} & given:
        tiny = ["model_name_or_path=path/to/model"]
    if words[0] == "train":
        tiny += [setting for setting in TINY if setting.partition("=")[0] not in given]
        tiny += ["galore.rank=4"] * (not {"--rank", "galore.rank", "--method"} & given)
        words = [re.sub(r"^64$", "4", word) for word in words]
    assert main([*words, *tiny]) == 0, words


@pytest.mark.parametrize("page", names(PAGES, "python"))
def test_python(page: Path, folder: Path) -> None:
    """A block trains the model that it is given, if it makes a Trainer; a page's blocks share their names."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    row = {"input_ids": list(range(3, 11)), "labels": list(range(3, 11))}
    chats = [json.loads(line) for line in Path("path/to/chats.jsonl").read_text().splitlines()]
    scope: dict[str, Any] = {"data": [row] * 8, "chats": Dataset.from_list(chats)}
    for block in blocks(page, "python"):
        if block.not_run:
            ast.parse(block.code)
            continue
        scope["model"] = AutoModelForCausalLM.from_pretrained("path/to/model")
        weight = scope["model"].model.layers[0].mlp.up_proj.weight
        before = weight.detach().clone()
        code = block.code.replace("rank=64", "rank=4").replace('"out", ', '"out", max_steps=2, use_cpu=True, ')
        exec(compile(code, page.name, "exec"), scope)
        if (trainer := scope.pop("trainer", None)) is not None:
            if trainer.state.global_step == 0:
                trainer.train()
            assert not torch.equal(before, weight)


@pytest.mark.parametrize("page", names(PAGES, "yaml"))
def test_yaml(page: Path, folder: Path) -> None:
    from galore_trainer.run.settings.run_config import load_run_config

    for block in blocks(page, "yaml"):
        path = folder / "block.yaml"
        path.write_text(block.code)
        if "compute_environment" in block.code:
            from accelerate.commands.config.config_args import load_config_from_file

            assert load_config_from_file(str(path)).num_machines == 2
        else:
            load_run_config(str(path))


@pytest.mark.parametrize("page", names(PAGES, "json"))
def test_json_lines(page: Path) -> None:
    for block in blocks(page, "json"):
        assert all(json.loads(line) for line in block.code.splitlines())


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = [path for name in ("galore_trainer", "cli") for path in (ROOT / name).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 15
    assert [message for message in messages if message not in source] == []
