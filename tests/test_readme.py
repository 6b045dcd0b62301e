"""The README's promises: its table of knobs, its commands, its snippets. ``test_documents.py`` has its links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from galore_trainer.config import GaLoreConfig
from galore_trainer.run.settings.knobs import knob_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_knobs_is_the_one_the_code_writes() -> None:
    table = README.split("checked by tests/test_readme.py -->\n")[1].split("<!-- end of knobs -->")[0]
    assert table.strip() == knob_table(GaLoreConfig).strip(), (
        "run `python -m galore_trainer.run.settings.knobs README.md`"
    )


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    found = (shlex.split(line, comments=True) for line in lines if line.startswith("galore-ft "))
    return [words for words in found if words]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_understood(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command parses, and each training configuration resolves with its overrides."""
    from galore_trainer.run.settings.run_config import load_run_config, packaged_configs

    name, rest = words[1], words[2:]
    if name not in ("train", "data", "estimate"):
        assert name in ("config", "eval", "doctor", "ablate", "bench", "report", "score", "inspect", "state")
        if name == "state":
            understood_state_command(*rest)
        if name == "bench":
            from galore_trainer.cli.bench import CHOICES

            assert rest[0] in CHOICES
        if name == "inspect":
            load_run_config(None, [f"model_name_or_path={rest[0]}", *rest[1:]])
        if name == "ablate":
            from galore_trainer.run.study.grid import load_study

            load_study(rest[0], [word for word in rest if "=" in word], None)
        return
    rest = rest[1:] if name == "data" else rest
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("model_name_or_path: embedded:smollm2-135m\n")
    settings = {"galore.layerwise": True} if "--layerwise" in rest else {}
    rest = [word for word in rest if word != "--layerwise"]
    flags = {rest[i]: rest[i + 1] for i in range(len(rest) - 1) if rest[i].startswith("--")}
    keys = {"--rank": "galore.rank", "--model": "model_name_or_path", "--method": "method"}
    settings |= {keys[flag]: value for flag, value in flags.items() if flag in keys}
    assert set(flags) <= {*keys, "--resume", "--ranks", "--num-processes", "--launch-config"}
    assert flags.get("--launch-config", "ddp") in packaged_configs("launch")
    assert rest[0] in packaged_configs() or rest[0] == "my.yaml"
    load_run_config(rest[0], [word for word in rest if "=" in word], settings)


def understood_state_command(name: str, checkpoint: str, *rest: str) -> None:
    """``export CHECKPOINT OUTPUT_DIR``, or ``import CHECKPOINT`` and what ``train`` takes."""
    from galore_trainer.run.settings.run_config import load_run_config, packaged_configs

    assert re.fullmatch(r"\S+/checkpoint-\d+", checkpoint)
    if name == "export":
        assert len(rest) == 1
        return
    assert name == "import"
    config, *words = rest
    flags = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
    assert set(flags) == {"--num-processes", "--launch-config"}
    assert flags["--launch-config"] in packaged_configs("launch")
    load_run_config(config, [word for word in words if "=" in word])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_python_snippets_run(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    row = {"input_ids": list(range(3, 11)), "labels": list(range(3, 11))}
    scope: dict = {"model": AutoModelForCausalLM.from_pretrained(tiny_model_dir), "data": [row] * 8}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        code = code.replace("rank=64", "rank=4").replace('"out", ', '"out", max_steps=2, use_cpu=True, ')
        exec(compile(code, "README.md", "exec"), scope)
        trainer = scope["trainer"]
        before = scope["model"].model.layers[0].mlp.up_proj.weight.detach().clone()
        trainer.train()
        assert not torch.equal(before, scope["model"].model.layers[0].mlp.up_proj.weight)
