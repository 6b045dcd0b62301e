"""The device memory that a run would need, for each method, from the model's configuration alone."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError, one_line
from galore_trainer.run.memory.per_process import Layout, Sizes, as_kept, share_out, sizes_of
from galore_trainer.run.memory.simulate import StepMemory, simulate_step
from galore_trainer.run.models.model import refused_setting, resolve_model
from galore_trainer.run.settings.methods import METHODS, check_backend
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.tables import TextTable

LAYERWISE = "galore_plus, layer-wise"
CHOICES = ("adamw", "adamw_8bit", "lora", "dora", "galore_torch", "apollo", "fira", "galore", "galore_plus", LAYERWISE)
# Of packages' optimizers: tensors as large as a projected weight that its step makes at most, and those that the
# variables of the step hold on to until the next projected weight.
WHOLE_TENSORS = {"galore_torch": (2, 0), "apollo": (2, 1), "fira": (4, 2)}
LOW_RANK_TENSORS = 3  # besides, of the moments' size: the projected gradient, the denominator and the update
EMBEDDING_BITS = 32  # of bitsandbytes' moments, as the Trainer asks for
SMALL = 4096  # entries below which bitsandbytes keeps 32 bits
GIB = 1 << 30
MOST_LAYERS, MOST_WEIGHTS = 1000, 10**14  # beyond which counting would never end
SAMPLE = 2000  # rows that are looked at for the longest


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one rank (0 where rank plays no part)."""

    method: str
    rank: int
    memory: StepMemory


def estimate(
    config: RunConfig,
    methods: Sequence[str] = (),
    ranks: Sequence[int] = (),
    layout: Layout | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """Count one training step of each method; no weights are loaded.

    Args:
        config: model, precision, batch size, length, checkpointing, settings of the methods.
        methods: of ``CHOICES``; all that the layout allows where empty.
        ranks: in place of the configuration's.
        layout: count one of several processes.
        say: takes a line of progress before each method.

    Raises:
        OptionError: an unknown method, a model whose configuration cannot be read, a rank that does not fit, a method
            or setting that the layout does not allow.
    """
    rows = []
    for method in methods or [m for m in CHOICES if layout is None or _allowed(m, layout)]:
        if method not in CHOICES:
            raise OptionError("--methods", method, f"some of {', '.join(CHOICES[:-1])}, layerwise")
        if layout is not None and not _allowed(method, layout):
            check_backend(method.split(",")[0], layout.backend)
            raise OptionError(
                "--methods", method, "galore_plus", f"Layer-wise mode runs alone or under DDP, not {layout.name}."
            )
        block = METHODS[method.split(",")[0]].block
        default_rank = config.lora.rank if block == "lora" else config.galore.rank
        for rank in (ranks or (default_rank,)) if block else (0,):
            say(f"counting a step of {method}{f', rank {rank}' if rank else ''}")
            rows.append(Row(method, rank, estimate_one(config, method, rank, layout)))
    return rows


def _allowed(method: str, layout: Layout) -> bool:
    try:
        check_backend(method.split(",")[0], layout.backend)
    except OptionError:
        return False
    return layout.backend == "ddp" or method != LAYERWISE


def estimate_one(config: RunConfig, method: str, rank: int = 0, layout: Layout | None = None) -> StepMemory:
    """Count one training step; see ``estimate``."""
    from galore_trainer.optim.galore_adamw import GaLoreAdamW
    from galore_trainer.run.settings.arguments import training_arguments

    arguments = training_arguments(config)
    text = _model_config(config)
    bf16 = bool(arguments.bf16)
    projects = METHODS[method.split(",")[0]].block == "galore"
    element, sizes, averaged = 4, list[Sizes](), list[int]()
    if layout is not None:
        dtype, element = as_kept(config.dtype, layout, bf16=bf16)
        config = dataclasses.replace(config, dtype=dtype)

    def make_model() -> Any:
        model = _build(text, config)
        model.train()
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs or {"use_reentrant": False})
        if METHODS[method.split(",")[0]].block == "lora":
            from galore_trainer.run.models.adapters import add_adapters

            settings = dataclasses.replace(config.lora, rank=rank)
            if arguments.gradient_checkpointing:
                model.enable_input_require_grads()
            return add_adapters(model, settings, seed=0, dora=method == "dora")
        return model

    def make_optimizer(model: Any) -> Any:
        optimizer = make_own(model)  # which may freeze weights
        sizes.append(sizes_of(model))
        averaged.append(sum(p.nbytes for p in model.parameters() if p.requires_grad))
        if isinstance(optimizer, GaLoreAdamW) and optimizer.config.layerwise:
            averaged[-1] -= sum(p.nbytes for _, p in optimizer.projected_weights())
        return optimizer

    def make_own(model: Any) -> Any:
        if not projects:
            return adam_state(model, eight_bit=method == "adamw_8bit"), 0
        galore = dataclasses.replace(method_settings(config.galore, method, rank), kernels="torch")  # fake tensors
        if method in WHOLE_TENSORS:
            return _package_memory(model, galore, method)
        from galore_trainer.hf.backend import for_shards
        from galore_trainer.hf.build import galore_groups

        if layout is not None and layout.backend != "ddp":
            # the norm of cut weights comes before their projection, so that nothing is held for it
            galore = dataclasses.replace(for_shards(galore, layout.backend), max_grad_norm=None)
        groups = galore_groups(model, galore, lr=1.0, weight_decay=arguments.weight_decay)
        return GaLoreAdamW(groups, galore, lr=1.0)

    memory = simulate_step(
        make_model,
        make_optimizer,
        batch_size=arguments.per_device_train_batch_size,
        length=config.max_length,
        autocast=bf16 and config.dtype != "bfloat16",
        accumulates=arguments.gradient_accumulation_steps > 1,
    )
    if layout is None:
        return memory
    return share_out(memory, sizes[-1], layout, element=element, averaged=averaged[-1], adamw=not projects)


def estimate_run(config: RunConfig, layout: Layout | None = None) -> StepMemory:
    """Count one training step of a run as it is configured."""
    galore = METHODS[config.method].block == "galore"
    method = LAYERWISE if galore and config.galore.layerwise else config.method
    return estimate_one(config, method, config.galore.rank if galore else config.lora.rank, layout)


def method_settings(galore: GaLoreConfig, method: str, rank: int) -> GaLoreConfig:
    """The settings that a method means, at a rank."""
    defaults = METHODS[method.split(",")[0]].defaults
    fixed = {key.removeprefix("galore."): value for key, value in defaults.items()}
    return GaLoreConfig(**{**galore.to_dict(), **fixed, "layerwise": method == LAYERWISE, "rank": rank})


def predict(config: RunConfig, rows: Any, processes: int = 1) -> dict[str, Any]:
    """The predicted memory of a run: ``peak_bytes``, of them ``weights_bytes``, for rows of ``length`` tokens.

    Args:
        config: of the run.
        rows: its training data, tokenized; the longest of the first 2000 gives the length.
        processes: of the run, under DDP where there are several.

    Returns:
        ``peak_bytes`` is None, and ``note`` says why, where the model could not be counted.
    """
    longest = max((len(rows[i]["input_ids"]) for i in range(min(len(rows), SAMPLE))), default=config.max_length)
    config = dataclasses.replace(config, max_length=max(min(longest, config.max_length), 2))
    try:
        memory = estimate_run(config, Layout("ddp", processes) if processes > 1 else None)
    except Exception as error:  # a model that cannot be built without its weights must not end a finished run
        return {"peak_bytes": None, "length": config.max_length, "note": f"{type(error).__name__}: {error}"}
    return {
        "peak_bytes": memory.peak,
        "weights_bytes": memory.weights,
        "length": config.max_length,
        "note": memory.note,
    }


def as_table(rows: Sequence[Row]) -> str:
    """The rows in GiB, with what could not be counted below, as plain text."""
    return str(memory_table(rows))


def memory_table(rows: Sequence[Row]) -> TextTable:
    """The rows in GiB, with what could not be counted below."""
    titles = ("method", "rank", "weights", "gradients", "state", "activations", "step", "peak")
    lines = []
    for row in rows:
        m = row.memory
        parts = (m.weights, m.gradients, sum(m.state.values()), m.backward, m.step, m.peak)
        cells = ["-" if part is None else f"{part / GIB:.2f}" for part in parts]
        lines.append(("layerwise" if row.method == LAYERWISE else row.method, str(row.rank or "-"), *cells))
    notes = dict.fromkeys(row.memory.note for row in rows if row.memory.note)
    return TextTable(titles, lines, titles[1:], [f"- {note}" for note in notes])


def inspect(config: RunConfig) -> TextTable:
    """The table of projected, plain and frozen weights that a run would begin with; no weights are loaded.

    Raises:
        OptionError: what training would refuse, in the same words.
    """
    from galore_trainer.hf.table import plan_table
    from galore_trainer.optim.param_groups import scale_of
    from galore_trainer.targets.groups import plan_weights

    model = empty_model(config)
    galore = config.galore
    power = METHODS[config.method].scale_power
    rates = {"plain": f"lr x {galore.plain_lr_ratio:g}", "frozen": "-"}

    def rate(weight: Any) -> str:
        scales = [scale_of({}, galore, matrix) ** power for matrix in weight.matrices]
        return rates.get(weight.kind) or "lr x " + " / ".join(dict.fromkeys(f"{scale:.3g}" for scale in scales))

    return plan_table([(weight, rate(weight)) for weight in plan_weights(model, galore)], galore)


def empty_model(config: RunConfig) -> Any:
    """A run's model on the meta device, where it has shapes and no weights.

    Raises:
        OptionError: there is no such model, or its configuration cannot be read.
    """
    import torch

    with torch.device("meta"):
        return _build(_model_config(config), config)


def _model_config(config: RunConfig) -> Any:
    from transformers import AutoConfig

    source = resolve_model(config.model_name_or_path)
    options = source.options(trust_remote_code=config.trust_remote_code)
    with _explained(config):
        model_config = AutoConfig.from_pretrained(source.path, **options)
        _check_sizes(config, model_config.get_text_config(decoder=True))
    return model_config


def _build(text: Any, config: RunConfig) -> Any:
    """Build the model without weights on torch's default device."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(text, "dtype", None) or torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    # Attentions other than eager and sdpa need a GPU and their package; they take about the memory of sdpa.
    counted = config.attn_implementation if config.attn_implementation in (None, "eager") else "sdpa"
    attention = {"attn_implementation": counted} if counted else {}
    with _quiet(), _explained(config):
        model = AutoModelForCausalLM.from_config(
            text, dtype=dtype, trust_remote_code=config.trust_remote_code, **attention
        )
        if (total := sum(p.numel() for p in model.parameters())) > MOST_WEIGHTS:
            raise _refuse(config, f"It says {total:.2g} weights; at most {MOST_WEIGHTS:.0e} are counted.")
    return model


def _check_sizes(config: RunConfig, text: Any) -> None:
    """Refuse a configuration whose model could not run, or would take transformers too long to build."""
    layers, heads, keys = (
        getattr(text, name, None) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise _refuse(config, f"It says {layers} layers; at most {MOST_LAYERS} are counted.")
    if isinstance(heads, int) and isinstance(keys, int) and (keys < 1 or heads % keys):
        raise _refuse(config, f"Its {keys} key-value heads do not divide its {heads} query heads.")


def _refuse(config: RunConfig, reason: str) -> OptionError:
    wanted = "a causal language model whose config.json transformers can read"
    return OptionError("model_name_or_path", config.model_name_or_path, wanted, reason)


@contextlib.contextmanager
def _explained(config: RunConfig) -> Iterator[None]:
    """Turn whatever transformers raises about a configuration into an ``OptionError``."""
    try:
        yield
    except OptionError:
        raise
    except Exception as error:
        if refusal := refused_setting(error, config.model_name_or_path, config.attn_implementation):
            raise refusal from error
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise _refuse(config, kind + one_line(error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def adam_state(model: Any, *, eight_bit: bool) -> dict[str, int]:
    """Torch keeps moments in the parameter's dtype; bitsandbytes in 8 bits with a scale for each 256."""
    from torch import nn

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    total = 0
    for p in model.parameters():
        if p.requires_grad:
            quantized = eight_bit and id(p) not in embeddings and p.numel() >= SMALL
            bytes_each = 1 + 4 / 256 if quantized else EMBEDDING_BITS // 8 if eight_bit else p.element_size()
            total += int(2 * bytes_each * p.numel())
    return {"plain": total}


def _package_memory(model: Any, galore: GaLoreConfig, method: str) -> tuple[dict[str, int], int]:
    """Bytes of a package's optimizer state by kind, and the peak of its step; all of it has the gradient's dtype.

    Its step allocates a denominator and an update for each parameter, and frees them while it allocates the next ones.
    """
    from galore_trainer.targets.groups import plan_weights

    most, kept = WHOLE_TENSORS[method]
    state, last, step, held = {"basis": 0, "moments": 0, "plain": 0}, 0, 0, 0
    weights = plan_weights(model, galore)
    for weight in [w for w in weights if w.kind == "projected"]:  # which come first in a step
        p, number = weight.parameter, weight.state_bytes(galore)
        low_rank = number["moments"] // 2 * p.element_size() // 4
        state["basis"] += number["basis"] * p.element_size() // 4
        state["moments"] += 2 * low_rank + (p.element_size() if kept else 0)  # the norm that limits growth
        step = max(step, most * p.nbytes + LOW_RANK_TENSORS * low_rank)
        held = kept * p.nbytes
    for weight in [w for w in weights if w.kind == "plain"]:
        entry = weight.parameter.nbytes
        state["plain"] += 2 * entry
        if weight.parameter.dim() > 1:  # vectors, which are not decayed, have a group of their own
            step, last = max(step, held + 2 * last + entry, held + last + 2 * entry), entry
    return state, step
