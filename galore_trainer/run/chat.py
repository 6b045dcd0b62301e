"""A conversation with a trained model: which model a name means, and turns that fit into its context."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError
from galore_trainer.run.device import device_type, uses_bf16
from galore_trainer.run.launching.checkpoints import NAME, newest_whole
from galore_trainer.run.models.adapters import ADAPTER_CONFIG, load_adapted
from galore_trainer.run.models.generation import decoding, inference, stop_ids
from galore_trainer.run.models.model import load_model
from galore_trainer.run.models.prompts import render_prompt, token_ids
from galore_trainer.run.settings.arguments import check_attention
from galore_trainer.run.settings.methods import ADAPTER
from galore_trainer.run.settings.run_config import RESOLVED_CONFIG, RunConfig, load_run_config
from galore_trainer.run.settings.sources import command_line_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUN, LENGTH = "RUN", "--max-new-tokens"
MODEL = "model"


@dataclasses.dataclass(frozen=True)
class Target:
    """What a name means.

    Attributes:
        name: of a model, as ``load_model`` takes it, or a folder with an adapter.
        config: the run's, or the defaults with the weights' own type.
        base: the model before training; None for anything but a run.
    """

    name: str
    config: RunConfig
    base: str | None


def find_target(name: str, overrides: Sequence[str] = ()) -> Target:
    """Find the model, and the configuration that it was trained with.

    Args:
        name: a run's folder, a folder inside it (``model``, ``adapter``, ``checkpoint-N``), a model's folder, a hub id
            or ``embedded:smollm2-135m``.
        overrides: ``key=value`` texts above that configuration.

    Raises:
        OptionError: an unfinished run, whose newest checkpoint is named; a setting that is refused.
    """
    folder = Path(name).expanduser()
    if (folder / RESOLVED_CONFIG).is_file():
        _check_finished(name, folder)
        saved: Path | None = folder / RESOLVED_CONFIG
    else:
        inside = folder.name in (MODEL, ADAPTER) or NAME.fullmatch(folder.name)
        saved = folder.parent / RESOLVED_CONFIG if inside else None
    if saved is not None and saved.is_file():
        config = load_run_config(saved, overrides)
        return Target(name, config, config.model_name_or_path)
    config = load_run_config(None, overrides)
    if not any(setting.key in ("dtype", "torch_dtype") for setting in command_line_settings(overrides, {})):
        config = dataclasses.replace(config, dtype="auto")
    return Target(name, config, None)


def _check_finished(name: str, run: Path) -> None:
    """Refuse a run without a model, with the newest checkpoint that can be talked to."""
    if (run / MODEL / "config.json").is_file():
        return
    newest = newest_whole(run)
    if newest is not None and _has_whole_weights(newest):
        way_out = f"Talk to its newest checkpoint: {shlex.join(['galore-ft', 'chat', str(newest)])}."
    else:
        held = "It has no whole checkpoint yet" if newest is None else f"{newest.name} holds its weights in parts"
        way_out = f"{held}: let it go on to its end with the command that began it and --resume auto."
    raise OptionError(RUN, name, "a finished run", way_out)


def _has_whole_weights(checkpoint: Path) -> bool:
    described = any((checkpoint / file).is_file() for file in ("config.json", ADAPTER_CONFIG))
    return described and any(checkpoint.glob("*.safetensors"))


class Conversation:
    """Turns with one model.

    Args:
        model: on its device.
        tokenizer: of the model.
        system: the first turn, which ``reset`` keeps; None for none.
        max_new_tokens: longest answer; None takes ``most``, or half of a short context.
        most: the run's ``eval.max_new_tokens``.
        temperature: of sampling; 0 for greedy answers.
        bf16: compute in bfloat16 (autocast) whatever the weights are.

    Raises:
        OptionError: answers longer than the model's context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        most: int = 256,
        temperature: float = 0.0,
        bf16: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.temperature, self.bf16 = model, tokenizer, temperature, bf16
        self.system = [{"role": "system", "content": system}] if system else []
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if self.context is not None and max_new_tokens is not None and max_new_tokens >= self.context:
            raise OptionError(LENGTH, max_new_tokens, f"below {self.context}, all that this model can read and write")
        self.max_new_tokens = max_new_tokens or (most if self.context is None else min(most, self.context // 2))
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self.turns = []

    def take(self, text: str) -> int:
        """Take a turn of the user's; the oldest turns go where they leave no room for an answer.

        Returns:
            How many turns went.

        Raises:
            OptionError: the text alone leaves no room; nothing was taken.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        length = self._length(turns)
        while self.context is not None and length + self.max_new_tokens > self.context:
            if len(turns) == 1:
                room = f"at most {self.context - self.max_new_tokens} tokens, with {self.max_new_tokens} for the answer"
                raise OptionError("prompt", f"{length} tokens", room, f"Shorten it, or lower {LENGTH}.")
            turns = turns[2:]
            length = self._length(turns)
        dropped, self.turns = len(self.turns) + 1 - len(turns), turns
        return dropped

    def answer(self, emit: Callable[[str], None]) -> None:
        """Generate the next turn and emit its text as it comes.

        Ctrl-C ends it: what was emitted stays in the conversation, and ``KeyboardInterrupt`` is passed on.
        """
        said, blanks = "", ""

        def take(text: str) -> None:
            nonlocal said, blanks
            text = blanks + text if said else text.lstrip()
            blanks = text[len(text.rstrip()) :]  # which end an answer where nothing follows
            if text := text.rstrip():
                said += text
                emit(text)

        try:
            self._generate(take)
        finally:
            if said:
                self.turns.append({"role": "assistant", "content": said})
            else:  # two turns of the user's in a row would break many templates
                self.turns.pop()

    def _length(self, turns: Sequence[dict[str, str]]) -> int:
        return len(self._ids(turns))

    def _ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        return token_ids(self.tokenizer, render_prompt(self.tokenizer, [*self.system, *turns], "this conversation"))

    def _generate(self, take: Callable[[str], None]) -> None:
        import torch
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                take(text)

        tokenizer: Any = self.tokenizer
        streamer: Any = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = torch.tensor([self._ids(self.turns)], device=self.model.device)
        stops = stop_ids(self.model, self.tokenizer)
        pad: Any = self.tokenizer.pad_token_id
        with (
            inference(self.model, self.bf16),
            decoding(self.model, self.max_new_tokens, stops, pad, self.temperature),
        ):
            self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)  # type: ignore[operator]


def converse(
    target: Target, *, system: str | None, max_new_tokens: int | None, temperature: float, compare: bool
) -> dict[str, Conversation]:
    """Load what a name means, and the model before training where that is asked for.

    Returns:
        A conversation with each: ``before`` and ``after``, or ``after`` alone.

    Raises:
        OptionError: a model that cannot be loaded; a comparison without a model before training.
    """
    config = target.config
    if compare and target.base is None:
        wanted = "a run's folder, which says what it was trained from"
        raise OptionError("--compare", target.name, wanted, "Leave out --compare.")
    device = device_type(use_cpu=bool(config.training.get("use_cpu")))
    bf16 = uses_bf16(config.training.get("bf16"), device)
    check_attention(config, device, sixteen_bits=bf16)

    def load(name: str) -> Conversation:
        folder = Path(name).expanduser()
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            model, tokenizer = load_adapted(folder, target.base, **config.loading)
        else:
            model, tokenizer = load_model(name, **config.loading)
        return Conversation(
            model.to(device),
            tokenizer,
            system=config.data.system_prompt if system is None else system,
            max_new_tokens=max_new_tokens,
            most=config.eval.max_new_tokens,
            temperature=temperature,
            bf16=bf16,
        )

    names = {"before": target.base} if compare else {}
    return {label: load(str(name)) for label, name in {**names, "after": target.name}.items()}
