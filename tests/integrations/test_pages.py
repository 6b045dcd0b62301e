"""The snippets of docs/integrations.md train with GaLore+ inside the published interfaces of the programs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments

import published
from documents import ROOT, blocks
from galore_trainer import OptionError
from galore_trainer.hf.callback import unwrap_optimizer
from tiny_training import arguments, rows

PAGE = ROOT / "docs" / "integrations.md"


def snippet(word: str) -> str:
    """The block of the page that names a program, with a small rank and two steps on the CPU."""
    (block,) = (block for block in blocks(PAGE, "python") if word in block.code)
    tiny = "max_steps=2, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to='none', save_strategy='no'"
    return block.code.replace("rank=64", "rank=4").replace('output_dir="out"', f'output_dir="out", {tiny}')


def run(code: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(code, "snippet", "exec"), scope)
    return scope


def llama_factory(installed: Any, model: Any, folder: Path, custom_optimizer: Any) -> list[Any]:
    """Install LLaMA-Factory's interface, whose ``run_exp`` trains three steps; return its Trainers."""
    trainers: list[Any] = []

    def trains(trainer_class: Any) -> Any:
        finetuning_args = SimpleNamespace(custom_optimizer=custom_optimizer)
        args = arguments(folder, Seq2SeqTrainingArguments)
        more = {"args": args, "train_dataset": rows(), "tokenizer": None, "callbacks": []}
        trainers.append(trainer_class(model=model, finetuning_args=finetuning_args, **more))
        trainers[-1].train()

    installed(published.llamafactory(trains))
    return trainers


def test_the_script_for_llama_factory_trains(installed: Any, tiny_llama: Any, tmp_path: Path) -> None:
    trainers = llama_factory(installed, tiny_llama, tmp_path, lambda model: None)
    run(snippet("llamafactory"))
    assert unwrap_optimizer(trainers[0].optimizer).config.layerwise
    assert trainers[0].state.global_step == 3


def test_an_optimizer_of_llama_factory_is_refused(installed: Any, tiny_llama: Any, tmp_path: Path) -> None:
    llama_factory(installed, tiny_llama, tmp_path, lambda model: torch.optim.SGD(model.parameters()))
    with pytest.raises(OptionError, match=r"Trainer\.create_optimizer: got 'SGD'"):
        run(snippet("llamafactory"))


def test_the_script_for_unsloth_trains(
    installed: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="trl extra not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model_dir)
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(8)]
    Dataset.from_dict({"messages": chats}).to_json("chats.jsonl")
    installed(published.unsloth())
    scope = run(snippet("unsloth"))
    assert scope["trainer"].state.global_step == 2
    assert unwrap_optimizer(scope["trainer"].optimizer).config.rank == 4
    with pytest.raises(OptionError, match="embedding_learning_rate: got 'out'"):
        run(snippet("unsloth").replace('output_dir="out"', '"out"'))


def test_every_program_of_the_page_has_its_snippet() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for program in ("axolotl", "ms-swift", "LLaMA-Factory", "unsloth"):
        assert f"\n## {program}\n" in page
        assert f"\n| {program} |" in page
