"""``RunConfig``: all settings of one run, from defaults, a YAML file and the command line, in that order."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

from galore_trainer.config import GaLoreConfig, check_fields
from galore_trainer.errors import OptionError
from galore_trainer.fields import idle_settings, knob
from galore_trainer.recipes.base import ALSO, OF_A_SOURCE, DataConfig, also_blocks
from galore_trainer.run.settings.convert_tables import FOREIGN, recognise
from galore_trainer.run.settings.keys import (
    ALIASES,
    TRL_HINTS,
    coerce,
    refuse_all,
    refuse_key,
    top_level,
    training_hints,
)
from galore_trainer.run.settings.methods import METHOD_DEFAULTS, METHODS, LoraSettings, Method, methods_reading
from galore_trainer.run.settings.ranges import check_best_metric, check_range
from galore_trainer.run.settings.sources import Setting, Source, collect, command_line_settings, file_settings
from galore_trainer.run.settings.yaml_io import Document, dump, read_mapping

Extract = Literal["flexible", "strict", "last_number"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]

RESOLVED_CONFIG = "config.resolved.yaml"
"""The file in a run's folder that holds its resolved configuration."""
_LEAF = re.compile(r"methods\.[^.]+\.")
_ARGUMENT = {"train": "CONFIG", "studies": "STUDY", "launch": "--launch-config"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a model is scored: greedy generation on held-out problems."""

    limit: int | None = knob(None, "Problems to score; unset means all that are held out.", minimum=1)
    batch_size: int = knob(32, "Prompts generated at a time.", minimum=1, only_with="generate: true; samples")
    max_new_tokens: int = knob(256, "Longest answer, in tokens.", minimum=1, only_with="generate: true; samples")
    extract: Extract = knob(
        "flexible",
        "The number that counts: flexible (the last, as lm-evaluation-harness reads it), strict (the one after ####), "
        "last_number (the last once commas are removed).",
        only_with="generate: true",
    )
    before: bool = knob(True, "Score the model before training too.")
    generate: bool = knob(True, "Write answers and score them; off, the loss on the held-out targets is all.")
    also: dict[str, dict[str, Any]] = knob(
        {},
        "Other data whose held-out part is scored by its loss, before training (eval.before) and after it: "
        "{name: {source, task, eval_samples, ...}}, each with the keys of the block data. Training is unchanged.",
    )
    samples: int = knob(
        0,
        "Held-out prompts that the model answers during training, greedily, for the terminal, log.jsonl, TensorBoard "
        "and W&B; training itself is unchanged.",
        minimum=0,
    )
    samples_steps: int | None = knob(
        None,
        "Steps between two such samples, beside the first and the last step; unset means at each evaluation of the "
        "Trainer, or, under eval_strategy: no, at each checkpoint.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        """Check every field; see ``OptionError``."""
        check_fields("eval.", self)
        also_blocks(self.also)
        if self.samples_steps is not None and not self.samples:
            wanted = "a number of samples beside it"
            raise OptionError("eval.samples_steps", self.samples_steps, wanted, "Add eval.samples=2, or remove it.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: model, method, data, evaluation, and the fields of ``transformers.TrainingArguments`` as given.

    Args:
        training: TrainingArguments fields the user set, verbatim; ``bf16`` may be ``auto``. Under ``trainer: trl``
            those that ``trl.SFTConfig`` adds, too.
        methods: {method: {dotted key: value}} for the methods not chosen; the chosen one's are merged already.

    Raises:
        OptionError: naming the dotted key, what was got, what is wanted and the way out.
    """

    model_name_or_path: str = knob(
        "embedded:smollm2-135m", "Model to fine-tune: embedded:smollm2-135m, a local folder, or a hub id."
    )
    dtype: Literal["float32", "bfloat16", "auto"] = knob(
        "float32", "Type of the weights; auto keeps what the model's files hold. Also called torch_dtype."
    )
    attn_implementation: Attention | None = knob(
        None, "What computes the attention, as in transformers; unset leaves it to the model."
    )
    trust_remote_code: bool = knob(
        False, "Run Python code that comes with the model's files, for models that transformers does not have."
    )
    method: Method = knob(
        "galore_plus",
        "galore_plus, or a baseline: galore (joint basis, exact SVD, moments kept), adamw, adamw_8bit (bitsandbytes), "
        "lora and dora (peft), galore_torch, apollo and fira (those packages).",
    )
    trainer: Literal["hf", "trl"] = knob("hf", "Whose loop runs: transformers' Trainer (hf) or TRL's SFTTrainer (trl).")
    max_length: int = knob(512, "Longest example, prompt and answer together, in tokens.", minimum=2)
    packing: bool = knob(
        False,
        "Put several examples into each training row of at most max_length tokens; they do not see each other, and "
        "per_device_train_batch_size counts rows.",
    )
    embedding_lr_scale: float = knob(
        1.0,
        "Factor on learning_rate for embeddings, output layer and norms under method adamw; where gradients are "
        "projected it is galore.plain_lr_ratio.",
        minimum=0.0,
    )
    output_dir: str = dataclasses.field(
        default="runs/run", metadata={"help": "Folder of the run.", "shown_default": "runs/CONFIG-METHOD"}
    )
    galore: GaLoreConfig = dataclasses.field(default_factory=GaLoreConfig)
    lora: LoraSettings = dataclasses.field(default_factory=LoraSettings)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field, the training arguments' names and types, and that no field contradicts the method."""
        check_fields("", self)
        for key in ("model_name_or_path", "output_dir"):
            if not getattr(self, key).strip():
                raise OptionError(key, getattr(self, key), "a name or a path")
        if self.embedding_lr_scale != 1.0 and self.method != "adamw":
            way_out = "Use galore.plain_lr_ratio." if METHODS[self.method].block == "galore" else "Use --method adamw."
            raise OptionError("embedding_lr_scale", self.embedding_lr_scale, f"1 under method {self.method!r}", way_out)
        for key, value in METHODS[self.method].defaults.items():
            got = getattr(self.galore, key.removeprefix("galore."))
            if got != value:
                raise OptionError(
                    key,
                    got,
                    f"{value!r}, which is what method {self.method!r} means",
                    "Use method: galore_plus to choose, or set it under 'methods: {galore_plus: ...}' alone.",
                )
        if self.eval.also and self.data.eval_samples == 0:
            raise OptionError("data.eval_samples", 0, f"at least 1 beside {ALSO}", f"Or leave {ALSO} out.")
        training, hints = {}, trainer_hints() if self.training else {}
        if unknown := [key for key in self.training if key not in hints]:
            brief = len(unknown) > 1
            errors = [refuse_key(key, self.training[key], hints, _accept, brief=brief) for key in unknown]
            raise refuse_all(errors, top_level(known_keys()) if brief else "")
        for key, value in self.training.items():
            if key in TRL_HINTS and self.trainer != "trl":
                raise OptionError(
                    key,
                    value,
                    f"no such setting under trainer {self.trainer!r}",
                    "It is one of TRL's SFTTrainer: add 'trainer: trl' (--trainer trl), or remove it.",
                )
            training[key] = coerce(key, value, hints[key])
            check_range(key, training[key])
        check_best_metric(training.get("metric_for_best_model"), self.trainer)
        object.__setattr__(self, "training", training)

    @property
    def loading(self) -> dict[str, Any]:
        """The keyword arguments of ``load_model``."""
        return {name: getattr(self, name) for name in ("dtype", "attn_implementation", "trust_remote_code")}

    def idle_settings(self, *, told: bool = False) -> list[str]:
        """Sentences about settings that have no effect; ``told`` leaves out those that the start table names."""
        method = METHODS[self.method]
        blocks = [*([method.block] if method.block and not (told and method.package is None) else []), "eval"]
        return [sentence for block in blocks for sentence in idle_settings(block, getattr(self, block))]

    def to_dict(self) -> dict[str, Any]:
        """Nested as in YAML: own keys and training arguments at the top, then the blocks; ``from_dict`` undoes it."""
        top_level = {name: getattr(self, name) for name in OWN}
        blocks = {name: dataclasses.asdict(getattr(self, name)) for name in BLOCKS}
        return {**top_level, **self.training, **blocks, **({"methods": self.methods} if self.methods else {})}

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, which ``load_run_config`` reads back to an equal one."""
        return dump(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunConfig:
        """Resolve settings nested as in YAML, the method's own defaults included."""
        return _resolve(Document("settings", dict(data), {}), (), {})


BLOCKS: dict[str, type] = {"galore": GaLoreConfig, "lora": LoraSettings, "data": DataConfig, "eval": EvalConfig}
OWN = tuple(f.name for f in dataclasses.fields(RunConfig) if f.name not in (*BLOCKS, "methods", "training"))


def load_run_config(
    config: str | Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """Resolve one run: defaults < the method's defaults < YAML < its ``methods:`` block < overrides and flags.

    Args:
        config: packaged name or YAML file; None means the defaults.
        overrides: ``key=value`` texts, the key dotted, the value read as a YAML 1.2 scalar.
        flags: values by dotted key, from the command line's flags.

    Raises:
        OptionError: a file that cannot be read; a key that is unknown, set twice, or of another type; a value that
            is not possible; a setting that the method would ignore or that contradicts it.
    """
    document = Document("run", {}, {}) if config is None else read_config(config)
    return _resolve(document, overrides, flags or {})


def load_own_settings(
    config: str | Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """As ``load_run_config`` without the trainers' own keys: it needs no transformers, whose import takes seconds."""
    document = Document("run", {}, {}) if config is None else read_config(config)
    return _resolve(document, overrides, flags or {}, own_only=True)


def packaged_configs(kind: str = "train") -> dict[str, str]:
    """The packaged configurations (``train``), ``studies`` or launch configurations (``launch``): name to YAML text."""
    folder = importlib.resources.files("galore_trainer.configs") / kind
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files}


def read_packaged(name: str, wanted: str = "a packaged name", kind: str = "train") -> str:
    """The YAML text of a packaged file; ``OptionError`` with the nearest name for an unknown one."""
    packaged = packaged_configs(kind)
    if name not in packaged:
        close = difflib.get_close_matches(name, packaged, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Packaged: {', '.join(packaged)}."
        raise OptionError(_ARGUMENT[kind], name, wanted, hint)
    return packaged[name]


def read_config(config: str | Path, kind: str = "train") -> Document:
    """Read a packaged file by name, or a YAML file by path, without resolving it."""
    path = Path(config).expanduser()
    if str(config) in packaged_configs(kind) or not path.is_file():
        text = read_packaged(str(config), "a packaged name or the path of a YAML file", kind)
        return read_mapping(text, f"{config}.yaml")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(_ARGUMENT[kind], str(config), "a readable UTF-8 file", f"{error}.") from None
    return read_mapping(text, str(config))


def has_foreign_keys(config: str | Path, overrides: Sequence[str]) -> bool:
    """Whether a configuration has keys that are surely unknown here; it needs no transformers to tell."""
    keys = {*read_config(config).data, *(text.partition("=")[0].strip() for text in overrides)}
    return not keys.isdisjoint(FOREIGN.difference(own_keys()))


def trainer_hints() -> dict[str, Any]:
    """The fields of TrainingArguments, and those of TRL's that are passed on, with their types."""
    return {**training_hints(), **TRL_HINTS}


@functools.cache
def own_keys() -> dict[str, Any]:
    """The dotted keys that this project declares, with their types."""
    hints = get_type_hints(RunConfig)
    blocks = {f"{name}.{key}": hint for name, cls in BLOCKS.items() for key, hint in get_type_hints(cls).items()}
    aliases = {alias: hints[key] for alias, key in ALIASES.items()}
    return {**{key: hints[key] for key in OWN}, **aliases, **blocks}


@functools.cache
def known_keys() -> dict[str, Any]:
    """Every dotted key a configuration may hold, with its type."""
    return {**own_keys(), **trainer_hints()}


def _resolve(
    document: Document, overrides: Sequence[str], flags: Mapping[str, Any], own_only: bool = False
) -> RunConfig:
    sources: list[Iterable[Setting]] = [file_settings(document), command_line_settings(overrides, flags)]
    if own_only:
        hints = own_keys()
        sources = [[s for s in source if _LEAF.sub("", s.key) in hints] for source in sources]
    else:
        hints = known_keys()
    file, command_line = (collect(source, hints, _check_method) for source in sources)
    if own_only and (file.methodless or command_line.methodless):
        return _resolve(document, overrides, flags)  # which names the trainers' unknown keys, too
    _check_names(document, file, command_line)
    method = command_line.values.get("method", file.values.get("method", RunConfig.method))
    for key in command_line.values:
        readers = methods_reading(key)
        if readers and method not in readers:
            block = key.partition(".")[0]
            raise OptionError(
                key,
                command_line.places[key],
                f"no {block} setting under method {method!r}, which would ignore it",
                f"Remove it, or use --method {' or '.join(readers)}.",
            )
    methods = {
        m: {**file.methods.get(m, {}), **command_line.methods.get(m, {})}
        for m in (*file.methods, *command_line.methods)
    }
    _replace_sources(file.values, command_line.values)
    output_dir = {"output_dir": f"runs/{Path(document.name).stem}-{method}"}
    values = {**output_dir, **METHOD_DEFAULTS[method], **file.values, **methods.pop(method, {}), **command_line.values}

    blocks: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in BLOCKS}}
    for key, value in values.items():
        block, _, name = key.rpartition(".")
        blocks[block][name] = value
    top = blocks.pop("")
    return RunConfig(
        **{key: value for key, value in top.items() if key in OWN},
        **{name: BLOCKS[name](**fields) for name, fields in blocks.items()},
        methods=methods,
        training={key: value for key, value in top.items() if key not in OWN},
    )


def _replace_sources(file: dict[str, Any], command_line: Mapping[str, Any]) -> None:
    """Drop what a file says of its data where the command line names data in the other of the two ways."""
    if "data.sources" in command_line:
        for name in OF_A_SOURCE:
            file.pop(f"data.{name}", None)
    elif "data.source" in command_line:
        file.pop("data.sources", None)


def _check_names(document: Document, *sources: Source) -> None:
    """Raise one ``OptionError`` for every unknown key and method of a file and a command line."""
    refusals = [error for source in sources for error in source.methodless.values()]
    unknown = [pair for source in sources for pair in source.unknown]
    brief = len(refusals) + len(unknown) > 1
    for key, setting in unknown:
        known = [k for k in known_keys() if not (setting.key.startswith("methods.") and k == "method")]
        options: dict[str, Any] = {"option": setting.key, "place": setting.place, "brief": brief}
        refusals.append(refuse_key(key, setting.value, known, _accept, **options))
    if refusals:
        tool = recognise(document.data, known_keys(), 2)
        command = f"'galore-ft config convert {document.name}'"
        converter = f"This looks like a file of {tool.name}: {command} prints what stands for it here." if tool else ""
        raise refuse_all(refusals, converter or (top_level(known_keys()) if unknown and brief else ""))


def _accept(key: str, value: Any) -> None:
    """Raise ``OptionError`` for a value that the known key ``key`` does not take under any method and trainer."""
    trainer = {"trainer": "trl"} if key in TRL_HINTS else {}
    _resolve(Document("advice", {key: value, **trainer}, {}), (), {})


def _check_method(name: str) -> None:
    if name not in METHOD_DEFAULTS:
        close = difflib.get_close_matches(name, METHOD_DEFAULTS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"methods.{name}", name, f"one of {', '.join(METHODS)}", hint)
