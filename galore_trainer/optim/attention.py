"""Which rows of a weight are heads: the attention layouts this project understands, from names and the geometry.

A new layout is one line in ``LAYOUTS`` (rows of a fused weight) or one name in ``SEPARATE``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.heads import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.optim.geometry import Heads
from galore_trainer.optim.sides import side_of

SEPARATE = {
    "q": ("q_proj", "query", "q_lin", "wq", "q", "query_proj", "q_b_proj"),
    "k": ("k_proj", "key", "k_lin", "wk", "k", "key_proj"),
    "v": ("v_proj", "value", "v_lin", "wv", "v", "value_proj"),
}
OUTPUT = ("o_proj", "out_proj", "out_lin", "wo", "Wo", "o", "c_proj", "dense")
FUSED_NAMES = (
    *("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj_qkv", "wqkv", "W_pack", "att_proj"),
    *("in_proj_qkvz", "qkv_linear", "kv_b_proj"),
)
HEADLESS = (  # of an attention, and neither q, k nor v
    *OUTPUT,
    *("proj", "projection", "projection_layer", "output", "output_proj", "linear_out", "to_out", "post"),  # outputs
    *("gate_proj", "g_proj", "gate", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj_ba"),  # gates
    *("q_a_proj", "kv_a_proj_with_mqa"),  # latents
    *("linear_pos", "relative_k_proj", "pos_proj", "relative_pos_embeddings", "gru_rel_pos_linear"),  # positions
    *("sampling_offsets", "attention_weights"),
)
WRAPPERS = ("linear", "base_layer")  # a module that is all of the projection its parent stands for


class Part(NamedTuple):
    """Rows of a weight that follow one another: ``heads`` heads of ``head_dim`` rows each."""

    label: str
    heads: int
    head_dim: int
    joint: bool = False  # neither q, k nor v: all of its rows give it its basis


class Layout(NamedTuple):
    """The rows of a weight: ``outer`` times the parts, one after the other."""

    outer: int
    parts: list[Part]

    @property
    def period(self) -> int:
        """Rows of all parts together."""
        return sum(part.heads * part.head_dim for part in self.parts)


def _in_a_row(heads: Heads) -> Layout:
    """All heads of q, all of k, all of v."""
    return Layout(1, [Part(role, *heads.of(role)) for role in "qkv"])


def _by_kv_head(heads: Heads) -> Layout:
    """For each key-value head: the query heads that read it, its key, its value."""
    d, groups = heads.head_dim, heads.num_kv_heads
    return Layout(groups, [Part("q", heads.num_heads // groups, d), Part("k", 1, d), Part("v", 1, d)])


def _gated_q(heads: Heads) -> Layout:
    """For each query head: the query, then the gate of its output."""
    d = heads.head_dim
    return Layout(heads.num_heads, [Part("q", 1, d), Part("gate", 1, d, joint=True)])


def _latent_kv(heads: Heads) -> Layout:
    """For each head of latent attention: the key without its rotary part, then the value."""
    return Layout(heads.num_kv_heads, [Part(role, 1, heads.of(role)[1]) for role in "kv"])


def _by_key_head(heads: Heads) -> Layout:
    """For each key head of linear attention: query, key, the values that belong to it, and their gates."""
    (keys, k_dim), (values, v_dim) = heads.of("k"), heads.of("v")
    value, gate = Part("v", values // keys, v_dim), Part("z", values // keys, v_dim, joint=True)
    return Layout(keys, [Part("q", 1, k_dim), Part("k", 1, k_dim), value, gate])


LAYOUTS: tuple[tuple[str, Callable[[Heads], Layout], str], ...] = (  # leaf name, rows, model families
    ("qkv_proj", _in_a_row, "phi3 phi4_multimodal"),
    ("c_attn", _in_a_row, "gpt2 openai-gpt imagegpt"),
    ("c_attn", _by_kv_head, "gpt_bigcode"),
    ("Wqkv", _in_a_row, "modernbert mpt dbrx"),
    ("att_proj", _in_a_row, "semantic coarse_acoustics fine_acoustics"),  # Bark
    ("query_key_value", _by_kv_head, "gpt_neox gpt_neox_japanese bloom falcon persimmon"),
    ("qkv", _in_a_row, "blip blip_2 instructblip instructblipvideo qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5"),
    ("qkv", _in_a_row, "qwen3_5_moe qwen3_omni_moe glm4v glm4v_moe glm_image glm_ocr ernie4_5_vl_moe exaone4_5"),
    ("qkv", _in_a_row, "got_ocr2 hiera mgp-str sam sam_hq timesformer vitdet"),
    ("q_proj", _gated_q, "qwen3_next qwen3_5 qwen3_5_moe"),
    ("in_proj_qkv", _in_a_row, "qwen3_5 qwen3_5_moe"),
    ("in_proj_qkvz", _by_key_head, "qwen3_next"),
)
FUSED = {(family, leaf): rows for leaf, rows, families in LAYOUTS for family in families.split()}


class HeadsDoNotFit(OptionError):
    """Heads of one weight that are unknown, or that its rows are not; ``head_fallback: joint`` does without them.

    Args:
        option, got, wanted, way_out: as for ``OptionError``.
        reason: why, without the weight's name.
    """

    def __init__(self, option: str, got: Any, wanted: str, way_out: str = "", *, reason: str = "") -> None:
        super().__init__(option, got, wanted, way_out)
        self.reason = reason


def unknown_heads(name: str, config: GaLoreConfig, reason: str) -> HeadsDoNotFit:
    """The error for a weight whose heads cannot be told."""
    way_out = "Use head_fallback joint or head_sharing joint, or leave the module out of target_modules."
    wanted = f"known heads of {name}, but {reason}"
    return HeadsDoNotFit("galore.head_sharing", config.head_sharing, wanted, way_out, reason=reason)


# ---------------------------------------------------------------------- names


def projection_name(module_name: str) -> str:
    """A module's name without the wrappers that stand around its weight: ``q_proj`` for ``q_proj.linear``."""
    while "." in module_name and module_name.rsplit(".", 1)[1] in WRAPPERS:
        module_name = module_name.rsplit(".", 1)[0]
    return module_name


def role_of(module_name: str, output_heads: bool = False) -> str | None:
    """``q``, ``k``, ``v``, ``o`` (if ``output_heads``), ``fused``, or None for a weight without heads."""
    *parents, leaf = projection_name(module_name).split(".")
    if leaf in FUSED_NAMES:
        return "fused"
    names_of = {**SEPARATE, "o": OUTPUT} if output_heads else SEPARATE
    role = next((role for role, names in names_of.items() if leaf in names), None)
    # short names such as "q" or "key" are attention only under a module that says so
    inside = any("att" in parent.lower() for parent in parents)
    clear = role != "o" and leaf.endswith(("_proj", "_lin"))
    return role if role and (inside or clear) else None


def should_have_heads(module_name: str, output_heads: bool = False) -> bool:
    """Whether a weight is q, k or v by its name, or lies directly in an attention under a name that tells nothing."""
    if role_of(module_name, output_heads):
        return True
    *parents, leaf = projection_name(module_name).split(".")
    if parents and parents[-1] == "self":  # BERT's attention.self.query
        parents.pop()
    return bool(parents) and "att" in parents[-1].lower() and leaf not in HEADLESS


# ---------------------------------------------------------------------- rows


def _layout(name: str, role: str, model_type: str, heads: Heads) -> Layout | None:
    """The rows of a weight; None for a fused weight whose order of rows is unknown."""
    # a tower's model_type: qwen3_vl_vision, qwen3_omni_moe_vision_encoder, blip_vision_model
    family = re.sub(r"_(text|vision|audio)(_encoder|_model)?$", "", model_type)
    leaf = projection_name(name).rsplit(".", 1)[-1]
    if (family, leaf) in FUSED:
        return FUSED[family, leaf](heads)
    if leaf == "kv_b_proj" and heads.k_dim:  # all models with latent attention lay it out alike
        return _latent_kv(heads)
    return Layout(1, [Part("", *heads.of(role))]) if role in ("q", "k", "v", "o") else None


def project_heads(
    name: str,
    role: str,
    m: int,
    n: int,
    *,
    model_type: str,
    heads: Heads | None,
    config: GaLoreConfig,
    rank: int,
    transposed: bool,
) -> list[LogicalMatrix]:
    """The logical matrices of an attention weight under a ``head_sharing`` other than joint: q, k, v on the right side.

    Args:
        name: module name, for errors.
        role: from ``role_of``.
        m, n: rows and columns of the weight (after ``transposed``).
        model_type: of the config that governs the weight; names the row order of a fused one.
        heads: geometry, None where unknown.
        config: how to share.
        rank: r of this weight.
        transposed: stored as [in_features, out_features].

    Raises:
        HeadsDoNotFit: heads unknown, rows that are not heads, or a part of a fused weight that cannot span the rank.
        OptionError: a left projection, or a rank that the heads of a group cannot span.
    """
    if config.proj_type in ("left", "reverse_std"):
        wanted = "proj_type std or right with heads that share a basis"
        raise OptionError("galore.proj_type", config.proj_type, wanted, "Use head_sharing joint for the other side.")
    if heads is None:
        raise unknown_heads(name, config, "neither its module nor its config tells their number")
    if role == "o":  # its columns are heads: the rows of the transposed weight
        m, n, transposed = n, m, not transposed
    layout = _layout(name, role, model_type, heads)
    if layout is None:
        raise unknown_heads(name, config, f"the order of rows in a fused weight of {model_type or 'custom'} is unknown")
    if m != layout.outer * layout.period:
        parts = (f"{p.label} {layout.outer * p.heads} heads x {p.head_dim}".strip() for p in layout.parts)
        raise unknown_heads(name, config, f"{' + '.join(parts)} rows are not its {m} rows")
    matrices, start = [], 0
    for part in layout.parts:
        rows: dict[str, Any] = {"length": part.heads * part.head_dim, "transposed": transposed}
        if len(layout.parts) > 1:
            rows |= {"outer": layout.outer, "start": start}
        start += rows["length"]
        matrices.append(_matrix(part, layout.outer * part.heads, heads, n, config, rank, name, rows))
    return matrices


def _matrix(
    part: Part, count: int, heads: Heads, n: int, config: GaLoreConfig, rank: int, name: str, rows: dict[str, Any]
) -> LogicalMatrix:
    label, d = part.label, part.head_dim
    whole = f"{name} ({label})" if label else name
    if rank > n:
        raise OptionError("galore.rank", rank, f"at most {n}, the columns of {whole}")
    group = count if part.joint else _group_size(name, count, heads.num_heads, config)
    needed = math.ceil(rank / d)
    if needed > group:
        wanted = f"at most {min(group * d, n)}: {group} head(s) of {d} rows give {whole} a basis"
        way_out = "Lower the rank, share over more heads, or use joint."
        if label and group == count:
            reason = f"the {count * d} rows of {label} do not span rank {rank}"
            raise HeadsDoNotFit("galore.rank", rank, wanted, way_out, reason=reason)
        raise OptionError("galore.rank", rank, wanted, way_out)
    if part.joint:
        return LogicalMatrix(label=label, columns=n, side=side_of(config.proj_type, count * d, n), rank=rank, **rows)
    return LogicalMatrix(
        label=label, columns=n, side="right", rank=rank, blocks=count // group, head_dim=d, lenders=needed, **rows
    )


def _group_size(name: str, count: int, num_heads: int, config: GaLoreConfig) -> int:
    """Heads that share a basis, of ``count`` heads beside ``num_heads`` query heads."""
    if config.head_sharing == "per_head":
        return 1
    if config.head_sharing == "shared":
        return count
    size = config.head_group_size
    group = max(1, size * count // num_heads)
    uneven = size * count > num_heads and size * count % num_heads
    if num_heads % size or count % group or uneven:
        heads = f"{num_heads} query heads" + (f" (and of {count} key-value heads)" if count != num_heads else "")
        raise OptionError("galore.head_group_size", size, f"a divisor of the {heads} of {name}")
    return group
