"""Every snippet and command of README and docs/ runs, on a tiny model; what cannot run here is parsed."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from documents import PAGES, ROOT, Block, blocks, commands, galore_ft, understood

TINY = ["gradient_accumulation_steps=1", "max_steps=2", "save_steps=1", "use_cpu=true", "bf16=false"]
TINY += ["max_length=128", "data.eval_samples=2", "eval.max_new_tokens=2", "report_to=none"]
ELSEWHERE = {"git", "pip", "python3", "accelerate", "torchrun", "srun", "export", "axolotl", "swift", "hf"}
"""Programs that only parsed blocks call, and the clone of README's first block."""


RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
EXAMPLES = dict(
    (path, rows) for rows, path in re.findall(r"^```json\n([^`]+)```\n```bash\n[^`]*?data\.source=(\S+)", RECIPES, re.M)
)
"""The lines of data in docs/recipes.md, by the file that the command below them names."""


def names(pages: list[Path], language: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in pages if blocks(page, language)]


def snippets() -> list[Any]:
    """The Python blocks, each named by its page and number."""
    numbered = [(page, i, block) for page in PAGES for i, block in enumerate(blocks(page, "python"), 1)]
    return [pytest.param(block, id=f"{page.name}-{i}") for page, i, block in numbered]


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a page's reader, with the files that commands and snippets name."""
    for place in ("path/to/model", "model", "teacher"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(tiny_model_dir)
    pairs = [{"prompt": f"Name {i}.", "chosen": " yes", "rejected": " no"} for i in range(8)]
    table = "mr,ref\n" + "".join(f'"name[Bar {i}], food[Thai]",Bar {i} serves Thai food.\n' for i in range(8))
    files = {
        **EXAMPLES,
        "chats.jsonl": lines({"messages": chat(f"Name {i}.", f"It is {i}.")} for i in range(64)),
        "pairs.jsonl": lines(pairs),
        "triples.jsonl": lines({**pair, "reference": " yes!"} for pair in pairs),
        "judged.jsonl": lines({"prompt": "Name it.", "completion": " yes", "label": i % 2 == 0} for i in range(8)),
        "prompts.jsonl": lines({"prompt": pair["prompt"]} for pair in pairs),
        "hints.jsonl": lines({"prompt": pair["prompt"], "privileged_context": "say yes"} for pair in pairs),
        "my.yaml": "model_name_or_path: path/to/model\ngalore: {rank: 4}\nmax_length: 32\n",
        "path/to/chats.jsonl": lines({"messages": chat(f"Name {i}.", f"It is {i}.")} for i in range(64)),
        "path/to/gsm8k.jsonl": lines({"question": f"{i} + {i} = ?", "answer": f"#### {2 * i}"} for i in range(8)),
        "path/to/mawps.json": json.dumps(
            [{"question": f"{i} plus 1", "equation": f"{i} + 1", "answer": f"{i + 1}"} for i in range(256)]
        ),
        "path/to/trainset.csv": table,
        "path/to/devset.csv": table,
        "path/to/llama_factory.yaml": (ROOT / "tests/fixtures/peers/llama_factory_galore.yaml").read_text(),
        "path/to/out.txt": "".join(f"Bar {i} serves food.\n" for i in range(8)),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture
def t5(folder: Path) -> None:
    """``t5/``: a tiny encoder-decoder with a tokenizer."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    shape = dict(d_model=64, d_kv=16, num_heads=4, num_layers=1, d_ff=64, vocab_size=256)
    with torch.random.fork_rng():
        model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=2, pad_token_id=2))
    model.save_pretrained(folder / "t5")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "t5")


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
    if ">" in words:
        *words, _, file = words
        with Path(file).open("w") as out, contextlib.redirect_stdout(out):
            assert main(words) == 0, words
    else:
        assert main([*words, *tiny]) == 0, words


@pytest.mark.parametrize("block", snippets())
def test_python(block: Block, folder: Path, request: pytest.FixtureRequest) -> None:
    """A block runs as it stands; a Trainer that it makes trains two steps with our optimizer."""
    if block.not_run:
        ast.parse(block.code)
        return
    if "t5" in block.code:
        request.getfixturevalue("t5")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from galore_trainer import GaLoreAdamW
    from galore_trainer.hf.callback import unwrap_optimizer

    row = {"input_ids": list(range(3, 11)), "labels": list(range(3, 11))}
    chats = [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines()]
    scope: dict[str, Any] = {"data": [row] * 8, "chats": Dataset.from_list(chats)}
    scope["model"] = AutoModelForCausalLM.from_pretrained("model")
    try:
        exec(compile(made_tiny(block.code), "snippet", "exec"), scope)
    except ImportError as error:
        if "trl" not in str(error.name):
            raise
        pytest.skip(str(error))  # trainers move between versions of trl
    if (trainer := scope.get("trainer")) is not None:
        if trainer.state.global_step == 0:
            trainer.train()
        assert trainer.state.global_step == 2
        assert isinstance(unwrap_optimizer(trainer.optimizer), GaLoreAdamW)


def made_tiny(code: str) -> str:
    """A block with a small rank, two steps on the CPU, and short generated texts."""
    settings = "max_steps=2, use_cpu=True, report_to='none'"
    if re.search(r"(GRPO|RLOO|GMPO|SDFT|Distillation)Trainer", code):
        settings += ", max_completion_length=4"
    if re.search(r"(OnlineDPO|GKD)Trainer", code):
        settings += ", max_new_tokens=4"
    return code.replace("rank=64", "rank=4").replace('"out", ', f'"out", {settings}, ')


@pytest.mark.parametrize("page", names(PAGES, "yaml"))
def test_yaml(page: Path, folder: Path) -> None:
    from galore_trainer.run.settings.run_config import load_run_config
    from galore_trainer.run.settings.yaml_io import read_mapping

    for block in blocks(page, "yaml"):
        path = folder / "block.yaml"
        path.write_text(block.code)
        if "compute_environment" in block.code:
            from accelerate.commands.config.config_args import load_config_from_file

            assert load_config_from_file(str(path)).num_machines == 2
        elif block.not_run:
            read_mapping(block.code, page.name)
        else:
            load_run_config(str(path))


@pytest.mark.parametrize("page", names(PAGES, "json"))
def test_json_lines(page: Path) -> None:
    for block in blocks(page, "json"):
        assert all(json.loads(line) for line in block.code.splitlines())


@pytest.mark.parametrize("path", EXAMPLES)
def test_each_line_of_data_is_an_example(path: str, folder: Path) -> None:
    from galore_trainer.recipes import DataConfig, load_data

    rows = EXAMPLES[path].splitlines()
    (folder / path).write_text(EXAMPLES[path])
    columns = {"prompt": "request", "completion": "reply"} if "replies" in path else {}
    data = load_data(DataConfig(source=path, columns=columns, eval_samples=0))
    assert data.task == ("text" if "texts" in path else "sft")
    assert len(data.train) == len(rows) == 3
    assert sum(len(example.trained) for example in data.train) == EXAMPLES[path].count("A lake?")


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = [path for name in ("galore_trainer", "cli") for path in (ROOT / name).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 15
    assert [message for message in messages if message not in source] == []
