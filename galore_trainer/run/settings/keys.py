"""The keys that a configuration may hold, the type of each, and the error for any other key."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import operator
import re
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from galore_trainer.config import ALL_LINEAR, COMMAS, EVERY_LINEAR, check_type, describe_type
from galore_trainer.errors import OptionError
from galore_trainer.run.settings.yaml_io import parse_value

FROM_PYTHON = "TRL's trainer takes GaLore+ from Python, too: SFTTrainer(..., **galore_plugin(config, args))."

ALIASES = {"torch_dtype": "dtype"}
"""Names that users of transformers know, and the key that each stands for."""

# Fields that trl.SFTConfig adds and 'trainer: trl' passes on: those that do not change how examples are encoded.
TRL_HINTS: dict[str, Any] = {
    "packing_strategy": Literal["bfd", "bfd_split"],  # "wrapped" cuts answers and lets examples see each other
    "eval_packing": bool | None,
    "padding_free": bool,
    "pad_to_multiple_of": int | None,
    "loss_type": Literal["nll", "dft"],
    "activation_offloading": bool,
    "router_aux_loss_coef": float | None,
}

# Key -> the way out. {value} is what the user wrote.
OUR_NAMES = {
    "galore_rank": "Write 'galore.rank={value}'.",
    "galore_update_interval": "Write 'galore.update_proj_gap={value}'.",
    "galore_target": "Write 'galore.target_modules={value}'.",
    "galore_scale": "Write 'galore.scale={value}'.",
    "galore_proj_type": "Write 'galore.proj_type={value}'.",
    "use_galore": "Write 'method: galore_plus', 'method: galore' or 'method: adamw'.",
    "lora_rank": "Write 'lora.rank={value}'.",
    "lora_r": "Write 'lora.rank={value}'.",
    "lora.r": "Write 'lora.rank={value}'.",
    "lora_alpha": "Write 'lora.alpha={value}'.",
    "lora_dropout": "Write 'lora.dropout={value}'.",
    "use_rslora": "Write 'lora.use_rslora={value}'.",
    "lora_target_modules": "Write 'lora.target_modules={value}'.",
    "use_peft": "Write 'method: lora'.",
    "use_dora": "Write 'method: dora'.",
    "cutoff_len": "Write 'max_length: {value}'.",
    "model": "Write 'model_name_or_path: {value}'; the flag is --model.",
    "lr": "Write 'learning_rate: {value}'.",
    "batch_size": "Write 'per_device_train_batch_size: {value}', or 'eval.batch_size={value}' for generation.",
    "epochs": "Write 'num_train_epochs: {value}'.",
}
GONE = {
    "evaluation_strategy": "Write 'eval_strategy: {value}'.",
    "warmup_ratio": "Write 'warmup_steps: {value}'; below 1 it is a share of all steps.",
    "overwrite_output_dir": "Give the flag --overwrite on the command line.",
    "group_by_length": "Write 'train_sampling_strategy: group_by_length'.",
    "logging_dir": "Set the environment variable TENSORBOARD_LOGGING_DIR; our own log stands in output_dir.",
    "no_cuda": "Write 'use_cpu: {value}'.",
    "save_safetensors": "Remove it: weights are always saved as safetensors.",
}
NOT_OURS = {
    "optim": "Write 'method: galore_plus', 'method: galore', 'method: adamw' or 'method: adamw_8bit'.",
    "optim_args": "Write its values into the block 'galore:', for example 'galore.rank=32'.",
    "optim_target_modules": "Write 'galore.target_modules={value}'.",
    "resume_from_checkpoint": "Give the flag --resume auto, or --resume PATH, on the command line.",
    "do_train": "Remove it: 'galore-ft train' trains.",
    "do_eval": "Write 'eval_strategy: steps' or 'eval_strategy: no'; 'galore-ft eval' scores a model.",
    "do_predict": "Remove it: 'galore-ft eval MODEL_OR_RUN' writes predictions.",
    "hub_token": "Set the environment variable HF_TOKEN, or run 'hf auth login'; a run writes its configuration down.",
}
ONLY_TRL = {
    "assistant_only_loss": "Remove it: the loss is on the assistant's turns alone; 'data.train_on' chooses which. "
    + FROM_PYTHON,
    "completion_only_loss": "Remove it: the loss is on the answer alone, as with true. " + FROM_PYTHON,
    "dataset_text_field": "Remove it: texts stand in the column text; 'data.columns={{text: {value}}}' names another.",
    "dataset_kwargs": "Write the block 'data:'.",
    "dataset_num_proc": "Remove it: examples are tokenized once and kept.",
    "max_seq_length": "Write 'max_length: {value}'.",
    "truncation_mode": "Remove it: longer examples are left out whole; 'galore-ft data preview' counts them.",
    "model_init_kwargs": "Write dtype, attn_implementation and trust_remote_code at the top. " + FROM_PYTHON,
    "chat_template_path": "Save the tokenizer with that template beside the model.",
    "eos_token": "Save the tokenizer with that token beside the model.",
    "pad_token": "Save the tokenizer with that token beside the model.",
    "shuffle_dataset": "Remove it: training data are shuffled; 'train_sampling_strategy' chooses how.",
    "use_liger": "Write 'use_liger_kernel: {value}'.",
}
REFUSED: tuple[tuple[dict[str, str], str], ...] = (
    (OUR_NAMES, "this project's name for it"),
    (GONE, "a TrainingArguments field of transformers 5"),
    (NOT_OURS, "the setting that stands for it here"),
    (ONLY_TRL, "no setting of TRL's SFTConfig that would change how examples are read"),
)


@functools.cache
def training_hints() -> dict[str, Any]:
    """The fields of ``transformers.TrainingArguments`` that a configuration may set, with their types."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    fields = {name: _plain(hints[name]) for name in names if not any(name in table for table, _ in REFUSED)}
    del fields["output_dir"]  # RunConfig has it
    fields["bf16"] = bool | Literal["auto"]
    return fields


def refuse_key(
    key: str,
    value: Any,
    known: Iterable[str],
    accept: Callable[[str, Any], Any],
    *,
    option: str = "",
    place: str = "",
    brief: bool = False,
) -> OptionError:
    """The error for a key that is not known: its replacement where it has one, else the nearest match.

    Args:
        key: dotted, as the user wrote it.
        value: what stands there.
        known: every dotted key that would have been accepted.
        accept: raises ``OptionError`` for a known key with a value that it does not take, which is not advised then.
        option: the key with what stands before it, for example ``methods.adamw.lr``.
        place: where it was written, for example ``gsm8k.yaml, line 7``.
        brief: leave out the list of known keys where none is near.
    """
    option = option or key
    place_text = _written_at(option, place)
    for table, wanted in REFUSED:
        if key in table:
            return OptionError(option, value, wanted, _advice(table[key], value, accept) + place_text)
    known = list(known)
    block = key.partition(".")[0] + "."
    siblings = [name for name in known if name.startswith(block)]
    if inside := next((name for name in known if key.startswith(f"{name}.")), None):
        way_out = f"Write {inside + '={' + key.removeprefix(inside + '.') + f': {_as_yaml(value)}' + '}'!r}."
    elif match := nearest_key(key, known):
        way_out = f"Did you mean {match!r}?"
    elif brief:
        way_out = "No known key is near it."
    elif siblings:
        way_out = f"{block[:-1]!r} takes {', '.join(name.removeprefix(block) for name in siblings)}."
    else:
        way_out = top_level(known)
    return OptionError(option, value, "a known key", way_out + place_text)


def refuse_all(refusals: Sequence[OptionError], way_out: str) -> OptionError:
    """One error for several, with the way out of each on a line of its own.

    Args:
        refusals: at least one, each for a name.
        way_out: a last line; empty for none.
    """
    if len(refusals) == 1:
        return refusals[0]
    lines = [f"  {error.option}: {error.way_out or f'wanted {error.wanted}.'}" for error in refusals]
    text = "\n".join(["Each with its way out:", *lines, *([way_out] if way_out else [])])
    return OptionError("configuration", [error.option for error in refusals], "known keys", text)


def top_level(known: Iterable[str]) -> str:
    """What stands at the top of a configuration, in words."""
    names = ", ".join(name for name in known if "." not in name and name not in (*ALIASES, *training_hints()))
    return f"The top level takes {names}, the blocks, and every field of transformers.TrainingArguments."


def modules_in_our_words(value: Any) -> Any:
    """What other programs write for a choice of modules, as ``target_modules`` takes it."""
    if isinstance(value, str) and value in EVERY_LINEAR:
        return ALL_LINEAR
    if isinstance(value, str) and COMMAS.fullmatch(value):
        return [part.strip() for part in value.split(",")]
    return value


def _advice(template: str, value: Any, accept: Callable[[str, Any], Any]) -> str:
    """The way out with the user's value, or with what is wanted in its place where the other key would refuse it."""
    if target := re.search(r"'([\w.]+)(?:=|: )\{value\}'", template):
        value = modules_in_our_words(value) if target[1].endswith("target_modules") else value
        try:
            accept(target[1], value)
        except OptionError as error:
            return f"{template.format(value='...')} It takes {error.wanted}."
    return template.format(value=_as_yaml(value))


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The known key that ``key`` most likely means: the same last name elsewhere, else the closest spelling."""
    block, _, leaf = key.rpartition(".")
    in_block = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == block}
    anywhere = {name.rpartition(".")[2]: name for name in reversed(list(known))}
    if leaf in anywhere:
        return anywhere[leaf]
    for names in (in_block, anywhere):
        if close := difflib.get_close_matches(leaf, names, n=1, cutoff=0.7):
            return names[close[0]]
    return None


def coerce(option: str, value: Any, hint: Any, *, written: str | None = None, place: str = "") -> Any:
    """Return ``value`` as the type ``hint`` wants it: ``"1e-4"`` becomes a number where a number is wanted.

    Args:
        option: dotted name for the error.
        value: what YAML made of it.
        hint: the field's annotation.
        written: the characters on the command line, taken as they are where a text is wanted.
        place: where it was written, for the error.

    Raises:
        OptionError: no reading of ``value`` fits the type.
    """
    for candidate in _readings(value, written):
        try:
            check_type(option, candidate, hint)
        except OptionError:
            continue
        return candidate
    way_out = "Put it in quotes." if not isinstance(value, str | list | dict) and _takes_text(hint) else ""
    way_out = "Write one, or remove the key." if value is None else way_out
    raise OptionError(option, value, describe_type(hint), (way_out + _written_at(option, place)).strip())


def _readings(value: Any, written: str | None) -> Iterable[Any]:
    if isinstance(value, enum.Enum):
        value = value.value
    yield value
    if isinstance(value, str):
        yield parse_value(value)
        if value.lower() == "none":
            yield None
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if written is not None:
        yield written


def _plain(hint: Any) -> Any:
    """An annotation without what YAML cannot write: ``SchedulerType | str`` becomes the Literal of its values."""
    if hint is dict:
        return dict[str, Any]
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    arguments = get_args(hint)
    values = tuple(m.value for a in arguments if isinstance(a, type) and issubclass(a, enum.Enum) for m in a)
    if values:
        arguments = (Literal[values], *(a for a in arguments if a is type(None)))
    return functools.reduce(operator.or_, map(_plain, arguments))


def _written_at(option: str, place: str) -> str:
    return f" ({place})" if place and not place.startswith(option) else ""


def _takes_text(hint: Any) -> bool:
    return hint is str or str in get_args(hint)


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, dict):
        return "..."
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))
