"""Several examples in one row, told apart by their position ids, so that a batch holds little padding.

A row holds whole examples of at most ``max_length`` tokens in all; positions begin at 0 with each. A batch has no
attention mask: transformers makes one from the position ids, so that a token sees its own example alone. No example's
first token is a target, so that losses and gradients are those of the same examples in rows of their own.
"""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError
from galore_trainer.run.models.prompts import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Row = dict[str, list[int]]

PROBE = (5, 7)  # tokens of the two examples by which a model is tried
WAY_OUT = "Remove packing, or take a model whose layers are all attention, such as Llama, Qwen3 or SmolLM2."


class PackedRows:
    """Rows of several examples: ``input_ids``, ``labels`` and ``position_ids``, made when they are asked for.

    Each example goes to the fullest row that still has room for it, the longest examples first.

    Args:
        rows: examples of at most ``max_length`` tokens, as ``encode_all`` makes them.
        max_length: tokens of a row.
    """

    def __init__(self, rows: Sequence[Row], max_length: int) -> None:
        self.rows, self.bins = rows, fill([len(row["input_ids"]) for row in rows], max_length)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Row:
        packed: Row = {"input_ids": [], "labels": [], "position_ids": []}
        for i in self.bins[index]:
            row = with_positions(self.rows[i])
            for key, values in packed.items():
                values += row[key]
        return packed


def fill(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices of ``lengths`` in groups of a sum of at most ``most``, by best fit of decreasing lengths."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, number of the group), in order
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[i], -1))
        left, group = room.pop(place) if place < len(room) else (most, len(bins))
        if group == len(bins):
            bins.append([])
        bins[group].append(i)
        bisect.insort(room, (left - lengths[i], group))
    return bins


def with_positions(row: Row) -> Row:
    """A row with position ids from 0, whose first token is no target."""
    if "position_ids" in row:
        return row
    length = len(row["input_ids"])
    labels = [IGNORED, *row["labels"][1:]]
    return {"input_ids": row["input_ids"], "labels": labels, "position_ids": list(range(length))}


class PackingCollator:
    """Makes a batch of rows with position ids: ``input_ids``, ``labels`` and ``position_ids``, int64.

    Padding at the end of a row is an example of its own without targets. FlashAttention tells examples apart in one row
    alone, so for it all rows of a batch are joined.

    Args:
        pad_id: fills ``input_ids``.
        multiple: lengths are rounded up to a multiple of it.
        joined: one row of all, without padding.
    """

    def __init__(self, pad_id: int, multiple: int = 1, *, joined: bool = False) -> None:
        self.pad_id, self.multiple, self.joined = pad_id, multiple, joined

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The batch of these rows, with position ids of their own or as ``encode_all`` makes them."""
        import torch

        rows = [with_positions(row) for row in rows]
        keys = ("input_ids", "labels", "position_ids")
        if self.joined:
            return {key: torch.tensor([[value for row in rows for value in row[key]]]) for key in keys}
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        fillers = {"input_ids": [self.pad_id] * width, "labels": [IGNORED] * width, "position_ids": [*range(width)]}
        padded = {key: [row[key] + fillers[key][: width - len(row[key])] for row in rows] for key in keys}
        return {key: torch.tensor(values) for key, values in padded.items()}


def uses_flash(model: PreTrainedModel) -> bool:
    """Whether the model's attention is a form of FlashAttention."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


def check_packing(model: PreTrainedModel) -> None:
    """Refuse packing for a model in which one example of a row would change another.

    A model whose weights are whole and can run where they are is tried on two short examples as well.

    Raises:
        OptionError: the model takes no position ids, keeps a state along the row, or its outputs show that it fails.
    """
    name, reason = type(model).__name__, ""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        reason = "takes no position ids, by which examples are told apart"
    elif getattr(model, "_is_stateful", False):
        reason = "keeps a state along the row, which would pass from one example to the next"
    elif _runs_here(model) and _mixes(model):
        reason = "gives other outputs for an example in a row with another one"
    if reason:
        wanted = f"false with {name}, which {reason}"
        raise OptionError("packing", True, wanted, WAY_OUT)


def _runs_here(model: Any) -> bool:
    import torch

    weights = list(model.parameters())
    whole = all(type(p) in (torch.Tensor, torch.nn.Parameter) and p.numel() and not p.is_meta for p in weights)
    return whole and not (uses_flash(model) and model.device.type == "cpu")


def _mixes(model: Any) -> bool:
    """Whether an example's outputs depend on the other one in its row, or differ from those of a row of its own."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().num_embeddings
    first, other = (torch.randint(size, (1, PROBE[0]), generator=generator) for _ in range(2))
    second = torch.randint(size, (1, PROBE[1]), generator=generator)
    positions = [torch.arange(length)[None] for length in PROBE]

    def logits(ids: list[torch.Tensor], at: list[torch.Tensor]) -> torch.Tensor:
        batch = {"input_ids": torch.cat(ids, 1), "position_ids": torch.cat(at, 1)}
        batch = {key: value.to(model.device) for key, value in batch.items()}
        return model(**batch, use_cache=False).logits[0].float()

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    flash = uses_flash(model)  # which takes 16 bits alone
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=flash):
            apart = torch.cat([logits([ids], [at]) for ids, at in zip((first, second), positions, strict=True)])
            packed, changed = (logits([ids, second], positions) for ids in (first, other))
    finally:
        for module, training in modes:
            module.training = training
    # Rounding, perhaps to TF32, differs between rows of different lengths. In rows of the same length the outputs of
    # the second example are the same numbers.
    rounding = 1e-2 if model.dtype == torch.float32 and not flash else 5e-2
    scale = apart.abs().max()
    leaks = (packed - changed)[PROBE[0] :].abs().max() > 1e-3 * scale
    return bool(leaks | ((packed - apart).abs().max() > rounding * scale))
