"""Models for tests: a tiny Llama made in memory, the same in a folder with a tokenizer, and the embedded SmolLM2."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# For tiny models: on a busy machine two threads that wait for each other took six times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU Triton interprets its kernels, which it has to know when it is first imported, by whomever.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background makes them ignore SIGINT, which the tests of Ctrl-C send themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several workers
        from workers import Turns

        config.pluginmanager.register(Turns())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        from workers import in_order

        items[:] = in_order(items)


def pytest_collection_finish() -> None:
    """accelerate collects garbage after each training, which takes long where it looks at all imported modules."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from workers import Scheduling

    return Scheduling(config, log)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_llama() -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=112,
        num_hidden_layers=2,
        vocab_size=256,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, special tokens and pad = eos as in SmolLM2; reads and writes any text without loss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # leaves room for the special tokens in 256 ids
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}  # byte-level BPE shifts the others
    shifted = [byte for byte in range(0x100) if byte not in printable]
    letters = [
        chr(byte) if byte in printable else chr(0x100 + shifted.index(byte))
        for byte in range(0x100)
        if byte not in never_in_utf8
    ]
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """Hidden 64, 4 heads, 2 key-value heads, 2 layers, vocabulary 256; equal weights in every test."""
    return make_tiny_llama()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tiny Llama and its tokenizer, for reading."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_tiny_llama().save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded_model_dir() -> Path:
    """Folder of the converted SmolLM2-135M-Instruct, in the user's cache; the first conversion takes half a minute."""
    from galore_trainer.run.models.model import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Run a script in several processes, ``torchrun(2, script, *words)``; its tests run alone."""
    from forked import run_ranks

    return lambda count, script, *words: run_ranks(count, tmp_path_factory.mktemp("ranks"), script, *words)
