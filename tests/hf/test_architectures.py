"""Every architecture of architectures.yaml: which rows are heads, what falls back to joint, and that it learns.

``python tests/hf/test_architectures.py`` writes docs/architectures.md.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.hf.build import build_optimizer
from galore_trainer.hf.table import weight_table
from galore_trainer.targets.groups import Weight, plan_weights
from galore_trainer.targets.names import projection_name, role_of

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "architectures.md"
CONFIG = GaLoreConfig(rank=4, update_proj_gap=2)
OUTPUTS = ("o_proj", "out_proj", "out_lin", "o", "c_proj", "dense", "proj", "projection", "projection_layer", "Wo")
IMAGE = 63  # the token that stands for a patch of an image
TOWERS = {"vision": "vis", "audio": "audio", "text": "text|language", "decoder": "decoder", "encoder": "encoder"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One entry; see architectures.yaml."""

    kind: str
    class_: str
    config: dict[str, Any]
    inputs: dict[str, Any] = dataclasses.field(default_factory=lambda: {"input_ids": "ids", "labels": "ids"})
    heads: str | dict[str, str] = ""
    joint: str = ""
    refused: str = ""


def architectures() -> dict[str, Architecture]:
    entries = yaml.safe_load((HERE / "architectures.yaml").read_text(encoding="utf-8"))
    return {
        name: Architecture(class_=fields.pop("class"), **fields)
        for name, fields in entries.items()
        if not name.startswith("x-")
    }


ARCHITECTURES = architectures()


def build(architecture: Architecture) -> nn.Module:
    cls = getattr(transformers, architecture.class_, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.class_}")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(cls.config_class(**architecture.config)).eval()


def tensor(spec: Any, sizes: dict[str, Any]) -> Any:
    """A list is the shape of random numbers; words name tokens, labels and positions."""
    ids = torch.arange(1, 17).reshape(2, 8)
    pictures = 1 if sizes.get("input_ids") == "with one picture" else 4
    pictured = torch.cat([torch.full((2, pictures), IMAGE), ids[:, pictures:]], dim=1)
    named = {
        "ids": ids,
        "pictured": pictured,
        "with one picture": pictured,
        "where pictured": (pictured == IMAGE).long(),
        "classes": torch.tensor([0, 1]),
        "targets": torch.tensor([[1, 2], [3, 4]]),
        "grid 4": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, 16, 2),
    }
    if isinstance(spec, list):
        return torch.randn(spec, generator=torch.Generator().manual_seed(0))
    if isinstance(spec, dict):
        return torch.ones(spec["ones"], dtype=torch.long) if "ones" in spec else torch.tensor(spec["values"])
    return named[spec] if isinstance(spec, str) else spec


def run(model: nn.Module, architecture: Architecture) -> Tensor:
    """The model's loss; where it has none, how far its first output is from one."""
    output = model(**{name: tensor(spec, architecture.inputs) for name, spec in architecture.inputs.items()})
    return output.loss if getattr(output, "loss", None) is not None else (output[0] - 1).square().mean()


# ---------------------------------------------------------------------- what the plan says


def parts(weight: Weight) -> dict[str, str]:
    """Heads of q, k and v inside a weight: {"q": "4x8"}."""
    role = role_of(weight.name.removesuffix(".weight"))
    return {m.label or str(role): f"{m.rows // m.head_dim}x{m.head_dim}" for m in weight.matrices if m.head_dim}


def in_words(heads: dict[str, str]) -> str:
    """``4/2x8`` for {"q": "4x8", "k": "2x8", "v": "2x8"}."""
    q, k = heads["q"], heads["k"]
    if heads.get("v", k) != k or q.split("x")[1] != k.split("x")[1]:
        return ", ".join(f"{role} {heads[role]}" for role in "qkv")
    return q if q == k else f"{q.split('x')[0]}/{k}"


def summary(plan: list[Weight]) -> tuple[str | dict[str, str], str]:
    """Heads by tower, and the leaf names of what fell back, as in architectures.yaml."""
    attentions: dict[str, dict[str, str]] = {}
    for weight in plan:
        attention = projection_name(weight.name.removesuffix(".weight")).rpartition(".")[0]
        if found := parts(weight):
            attentions.setdefault(attention, {}).update(found)
    towers: dict[str, dict[str, None]] = {}
    for attention, found in attentions.items():
        tower = next((name for name, pattern in TOWERS.items() if re.search(pattern, attention)), "")
        towers.setdefault(tower, {})[in_words(found)] = None
    heads = {tower: " and ".join(found) for tower, found in towers.items()}
    joint = {w.name.removesuffix(".weight").rsplit(".", 1)[-1] for w in plan if w.falls_back(CONFIG)}
    return (heads if len(set(heads.values())) > 1 else next(iter(heads.values()), "")), ", ".join(sorted(joint))


# ---------------------------------------------------------------------- what the model does


def mixed(model: nn.Module, architecture: Architecture, attention: nn.Module) -> Tensor:
    """What an attention hands to its output projection, [tokens, heads x size]."""
    seen: list[Tensor] = []
    outputs = [module for name, module in attention.named_children() if name in OUTPUTS]
    if outputs:
        hook = outputs[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:  # BERT's self-attention leaves the projection to its parent
        hook = attention.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with torch.no_grad():
        run(model, architecture)
    hook.remove()
    return seen[0].flatten(0, -2)


def check_rows(model: nn.Module, architecture: Architecture, weight: Weight) -> None:
    """The last head of each part, with its sign turned, changes what the heads that read it hand on, and no other."""
    attention = model.get_submodule(projection_name(weight.name.removesuffix(".weight")).rpartition(".")[0])
    before = mixed(model, architecture, attention)
    for matrix in weight.matrices:
        if not matrix.head_dim:
            continue
        kept = weight.parameter.detach().clone()
        with torch.no_grad():
            blocks = matrix.take(weight.parameter).clone()
            by_head = blocks.view(-1, matrix.head_dim, matrix.columns)
            by_head[-1].neg_()
            matrix.put(weight.parameter, blocks)
            changed = (mixed(model, architecture, attention) - before).abs().amax(0) > 1e-6 * before.abs().max()
            weight.parameter.copy_(kept)
        own = torch.zeros_like(changed)
        own[len(own) - len(own) // len(by_head) :] = True  # heads that read one key are neighbours
        assert torch.equal(changed, own), (weight.name, matrix.label)


def of_the_last_layer(plan: list[Weight]) -> Iterator[Weight]:
    last = {re.sub(r"\d+", "*", w.name) + str(parts(w)): w for w in plan if parts(w)}
    yield from last.values()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_are_known_or_named_and_the_loss_falls(name: str, caplog: pytest.LogCaptureFixture) -> None:
    architecture = ARCHITECTURES[name]
    model = build(architecture)
    if architecture.refused:
        with pytest.raises(OptionError, match=architecture.refused):
            plan_weights(model, CONFIG)
        return
    plan = plan_weights(model, CONFIG)
    assert summary(plan) == (architecture.heads, architecture.joint)

    joint = [w.name.removesuffix(".weight") for w in plan if w.falls_back(CONFIG)]
    if joint and not architecture.heads:
        with pytest.raises(OptionError, match="head_fallback joint or head_sharing joint"):
            plan_weights(model, dataclasses.replace(CONFIG, head_fallback="refuse"))
    with caplog.at_level(logging.WARNING, logger="galore_trainer"):
        optimizer = build_optimizer(model, CONFIG, lr=1e-3)
    told = " ".join(r.getMessage() for r in caplog.records if r.name.startswith("galore_trainer"))
    assert bool(told) == bool(joint)
    assert not joint or f" {joint[0]} (" in told
    table = [line for line in weight_table(optimizer, model).splitlines() if "unknown: joint" in line]
    assert {re.sub(r"\.\d+\.", ".*.", n) for n in joint} == {line.split("x ")[-1].split()[0] for line in table}

    losses = []
    for _ in range(5):
        loss = run(model, architecture)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert run(model, architecture).item() < losses[0]


# WavLM's attention reads its weights past the modules that hold them, so no hook sees what it hands on.
@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.heads and n != "WavLM"])
def test_the_rows_of_a_head_move_its_part_of_the_output_alone(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = build(architecture)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:  # fresh weights weigh all tokens almost alike
                p.normal_(std=0.3)
    for weight in of_the_last_layer(plan_weights(model, CONFIG)):
        check_rows(model, architecture, weight)


# ---------------------------------------------------------------------- the document


def document() -> str:
    """docs/architectures.md."""
    lines = [
        "# Architectures",
        "",
        "Models of transformers that are tested at tiny size (`tests/hf/architectures.yaml`): which attention weights",
        "share bases by head, and which are projected jointly because their heads are unknown. `4/2x8` means 4 query",
        "heads and 2 key-value heads of 8 rows each, `4x8` as many of both. Written by",
        "`python tests/hf/test_architectures.py`.",
    ]
    for kind in dict.fromkeys(a.kind for a in ARCHITECTURES.values()):
        lines += [
            "",
            f"## {kind.capitalize()}",
            "",
            "| Model | Class | Heads | Projected jointly |",
            "|---|---|---|---|",
        ]
        for name, a in ARCHITECTURES.items():
            if a.kind == kind:
                heads = ", ".join(f"{k}: {v}" for k, v in a.heads.items()) if isinstance(a.heads, dict) else a.heads
                heads = f"refused: {a.refused}" if a.refused else heads or "-"
                joint = ", ".join(f"`{leaf}`" for leaf in a.joint.split(", ")) if a.joint else "-"
                lines.append(f"| {name} | `{a.class_}` | {heads} | {joint} |")
    return "\n".join(lines) + "\n"


def test_the_document_is_the_one_the_table_writes() -> None:
    assert len(ARCHITECTURES) >= 40
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run `python tests/hf/test_architectures.py`"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
