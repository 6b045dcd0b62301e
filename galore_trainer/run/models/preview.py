"""A preview of a run's data: examples with the tokens that are trained on, counts, lengths, and what is too long."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from galore_trainer.run.settings.run_config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEGEND = "Lines with '>' are trained on; lines with '|' are only read."
MOST_MEASURED = 2000


def preview(config: RunConfig, count: int = 2) -> str:
    """Describe the data of a run in text; loads the tokenizer, no weights.

    Args:
        config: the run.
        count: how many training examples are shown in full.

    Raises:
        OptionError: data or tokenizer that cannot be read.
    """
    from galore_trainer.recipes import load_data
    from galore_trainer.run.models.model import load_tokenizer
    from galore_trainer.run.models.prompts import encode

    data = load_data(config.data)
    tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    step = max(1, -(-len(data.train) // MOST_MEASURED))
    measured = [encode(tokenizer, example, config.max_length) for example in data.train[::step]]
    parts = [f"{data.task} from {config.data.source}: {len(data.train)} to train on, {len(data.eval)} held out"]
    parts += [f"- {note}" for note in data.notes]
    parts += ["", LEGEND]
    for example in data.train[:count]:
        encoded = encode(tokenizer, example, config.max_length)
        parts += ["", *show_example(tokenizer, example.id, encoded)]
    parts += ["", *_summary(measured, config.max_length, stride=step)]
    return "\n".join(parts)


def show_example(tokenizer: PreTrainedTokenizerBase, name: str, encoded: dict[str, Any]) -> list[str]:
    """One encoded example as lines: ``>`` before text with a label, ``|`` before text without."""
    pairs = list(zip(encoded["input_ids"], encoded["labels"], strict=True))
    trained = sum(label != -100 for _, label in pairs)
    left_out = ", left out: longer than max_length" if encoded["truncated"] else ""
    lines = [f"{name}: {len(pairs)} tokens, {trained} trained on{left_out}"]
    for has_label, run in groupby(pairs, key=lambda pair: pair[1] != -100):
        text = str(tokenizer.decode([token for token, _ in run])).removesuffix("\n")
        lines += [f"{'>' if has_label else '|'} {line}" for line in text.split("\n")]
    return lines


def histogram(lengths: list[int], *, bins: int = 8, width: int = 40) -> list[str]:
    """Counts of lengths in equal intervals, one line each, with a bar of at most ``width`` characters."""
    low, high = min(lengths), max(lengths)
    size = max(1, -(-(high - low + 1) // bins))
    counts = [0] * (-(-(high - low + 1) // size))
    for length in lengths:
        counts[(length - low) // size] += 1
    digits, most = len(str(high)), max(counts)
    return [
        f"{low + i * size:>{digits}}-{min(low + (i + 1) * size - 1, high):<{digits}} {count:>6} "
        + "#" * max(round(width * count / most), count > 0)
        for i, count in enumerate(counts)
    ]


def _summary(encoded: list[dict[str, Any]], max_length: int, *, stride: int) -> list[str]:
    if not encoded:
        return ["No training examples."]
    lengths = [len(item["input_ids"]) for item in encoded]
    trained = sum(label != -100 for item in encoded for label in item["labels"])
    long = sum(bool(item["truncated"]) for item in encoded)
    sample = f" (every {stride}th example measured)" if stride > 1 else ""
    return [
        f"tokens per example: {min(lengths)} to {max(lengths)}, mean {sum(lengths) / len(lengths):.0f}, "
        f"of which {trained / len(lengths):.0f} trained on{sample}",
        f"longer than max_length {max_length} and left out: {long} of {len(encoded)} "
        f"({100 * long / len(encoded):.1f} %)",
        "",
        *histogram(lengths),
    ]
