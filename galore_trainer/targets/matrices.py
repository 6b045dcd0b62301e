"""The logical matrices of a weight: one for a weight that is projected whole, one for each part of a fused weight.

A new order of rows in a fused attention weight is one line in ``LAYOUTS``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from galore_trainer.config import HEAD_ROLES, GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix, Side
from galore_trainer.core.residual import support_size
from galore_trainer.errors import OptionError
from galore_trainer.targets.geometry import Heads
from galore_trainer.targets.names import projection_name


class Part(NamedTuple):
    """Adjacent rows of a weight: ``heads`` heads of ``head_dim`` rows each.

    Attributes:
        label: ``q``, ``k``, ``v``, ``gate`` or ``z``; empty where the weight is one part.
        heads: number of heads.
        head_dim: rows of a head.
        joint: one basis from all rows: the part is neither q, k nor v, or shares none by ``share_heads_of``.
    """

    label: str
    heads: int
    head_dim: int
    joint: bool = False


class Layout(NamedTuple):
    """The order of a weight's rows: the parts one after the other, repeated ``outer`` times."""

    outer: int
    parts: list[Part]

    @property
    def period(self) -> int:
        """Rows of all parts together, before they repeat."""
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


LAYOUTS: tuple[tuple[str, Callable[[Heads], Layout], str], ...] = (  # leaf name, layout, model families
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
FUSED_LAYOUTS = {(family, leaf): layout for leaf, layout, families in LAYOUTS for family in families.split()}


class HeadsDoNotFit(OptionError):
    """The heads of a weight are unknown, or its rows cannot be cut into them.

    Under ``head_fallback: joint`` the weight is projected without heads instead.

    Args:
        option, got, wanted, way_out: as for ``OptionError``.
        reason: the cause, without the weight's name.
    """

    def __init__(self, option: str, got: Any, wanted: str, way_out: str = "", *, reason: str = "") -> None:
        super().__init__(option, got, wanted, way_out)
        self.reason = reason


def unknown_heads(name: str, config: GaLoreConfig, reason: str) -> HeadsDoNotFit:
    """The error for a weight whose heads are unknown; ``reason`` completes "known heads of ..., but"."""
    way_out = "Use head_fallback joint or head_sharing joint, or leave the module out of target_modules."
    wanted = f"known heads of {name}, but {reason}"
    return HeadsDoNotFit("galore.head_sharing", config.head_sharing, wanted, way_out, reason=reason)


def side_of(proj_type: str, m: int, n: int) -> Side:
    """GaLore's rule: ``std`` projects the shorter side (right when m >= n), ``reverse_std`` the longer one."""
    if proj_type == "left" or proj_type == "right":
        return proj_type  # type: ignore[return-value]
    return "right" if (m >= n) == (proj_type == "std") else "left"


def project_whole(
    shape: Sequence[int], name: str, config: GaLoreConfig, rank: int | None = None, transposed: bool = False
) -> LogicalMatrix:
    """The logical matrix of a weight that is projected whole: one basis, or one basis for each expert of a 3-D stack.

    Args:
        shape: [m, n], [n, m] where ``transposed``, or [experts, m, n].
        name: the parameter's name, for errors.
        config: gives ``proj_type`` and ``rank``.
        rank: r; ``config.rank`` if None.
        transposed: the weight is stored as [in_features, out_features].

    Raises:
        OptionError: the weight is neither 2-D nor a 3-D stack, or the rank exceeds its smaller side.
    """
    if len(shape) not in (2, 3):
        raise OptionError(name, tuple(shape), "a 2-D weight or a 3-D stack of experts", "Leave it out of the group.")
    m, n = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    rank = config.rank if rank is None else rank
    if rank > min(m, n):
        raise OptionError("galore.rank", rank, f"at most {min(m, n)}, the smaller side of {name} ({m} x {n})")
    experts = shape[0] if len(shape) == 3 else 1
    return LogicalMatrix(
        outer=experts,
        length=m,
        columns=n,
        transposed=transposed,
        side=side_of(config.proj_type, m, n),
        rank=rank,
        blocks=experts,
    )


# ---------------------------------------------------------------------- heads


def _layout(name: str, role: str, model_type: str, heads: Heads) -> Layout | None:
    """The order of a weight's rows; None for a fused weight whose order is unknown."""
    # a tower's model_type has a suffix: qwen3_vl_vision, qwen3_omni_moe_vision_encoder, blip_vision_model
    family = re.sub(r"_(text|vision|audio)(_encoder|_model)?$", "", model_type)
    leaf = projection_name(name).rsplit(".", 1)[-1]
    if (family, leaf) in FUSED_LAYOUTS:
        return FUSED_LAYOUTS[family, leaf](heads)
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
        heads: number and size of the heads, None where unknown.
        config: how heads share a basis.
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
        if part.label in HEAD_ROLES and part.label not in config.shared_roles:
            part = part._replace(joint=True)
        rows: dict[str, Any] = {"length": part.heads * part.head_dim, "transposed": transposed}
        if len(layout.parts) > 1:
            rows |= {"outer": layout.outer, "start": start}
        start += rows["length"]
        matrices.append(_matrix_of(part, name, rows, layout.outer * part.heads, heads.num_heads, n, rank, config))
    return matrices


def _matrix_of(
    part: Part, name: str, rows: dict[str, Any], count: int, num_heads: int, n: int, rank: int, config: GaLoreConfig
) -> LogicalMatrix:
    """The logical matrix of one part of a weight.

    Args:
        part: its label and the size of its heads.
        name: of the module, for errors.
        rows: where the part lies, as fields of ``LogicalMatrix``.
        count: heads of the part in the whole weight.
        num_heads: query heads of the attention.
        n: columns.
        rank: r.
        config: how heads share a basis.

    Raises:
        HeadsDoNotFit: a part of a fused weight has fewer rows than the rank.
        OptionError: the rank exceeds the columns, or the rows of the heads that share a basis.
    """
    label, d = part.label, part.head_dim
    part_name = f"{name} ({label})" if label else name
    if rank > n:
        raise OptionError("galore.rank", rank, f"at most {n}, the columns of {part_name}")
    group_size = count if part.joint else _group_size(name, count, num_heads, config)
    lenders = math.ceil(rank / d)  # the fewest heads whose rows span the rank
    if lenders > group_size:
        wanted = f"at most {min(group_size * d, n)}: {group_size} head(s) of {d} rows give {part_name} a basis"
        way_out = "Lower the rank, share over more heads, or use joint."
        # all heads of this part are too few; the whole weight has more rows, so it can be projected jointly
        if label and group_size == count:
            reason = f"the {count * d} rows of {label} do not span rank {rank}"
            raise HeadsDoNotFit("galore.rank", rank, wanted, way_out, reason=reason)
        raise OptionError("galore.rank", rank, wanted, way_out)
    if part.joint:
        return LogicalMatrix(label=label, columns=n, side=side_of(config.proj_type, count * d, n), rank=rank, **rows)
    blocks = count // group_size
    return LogicalMatrix(
        label=label, columns=n, side="right", rank=rank, blocks=blocks, head_dim=d, lenders=lenders, **rows
    )


def _group_size(name: str, count: int, num_heads: int, config: GaLoreConfig) -> int:
    """How many of a weight's ``count`` heads share a basis; the attention has ``num_heads`` query heads."""
    if config.head_sharing == "per_head":
        return 1
    if config.head_sharing == "shared":
        return count
    # head_group_size counts query heads; key-value heads, which may be fewer, are grouped in proportion
    size = config.head_group_size
    group_size = max(1, size * count // num_heads)
    uneven = size * count > num_heads and size * count % num_heads
    if num_heads % size or count % group_size or uneven:
        heads = f"{num_heads} query heads" + (f" (and of {count} key-value heads)" if count != num_heads else "")
        raise OptionError("galore.head_group_size", size, f"a divisor of the {heads} of {name}")
    return group_size


# ---------------------------------------------------------------------- residual and shards


def support_shape(matrix: LogicalMatrix, config: GaLoreConfig) -> tuple[int, int, int]:
    """Shape of the residual's support in one matrix: [blocks, lines, entries in a line]; lines are rows, or one."""
    balanced = config.residual_selection == "row"
    size = support_size(matrix.block_rows, matrix.columns, config.sparse_percent, balanced)
    return matrix.blocks, *size


def has_sparse(matrix: LogicalMatrix, config: GaLoreConfig) -> bool:
    """Whether a matrix gets a sparse residual: it is switched on, and the rank is below full rank."""
    return config.sparse_percent > 0.0 and matrix.loses


def has_scaled(matrix: LogicalMatrix, config: GaLoreConfig) -> bool:
    """Whether a matrix gets the dense scaled residual, as above."""
    return config.scales_residual and matrix.loses


def check_shardable(matrix: LogicalMatrix, name: str) -> None:
    """Raise ``OptionError`` for a matrix that cannot be cut into shards of rows: stored transposed, or projected left.

    Shards are cut by the rows of the stored tensor, and only the right projection works on each row alone.
    """
    if matrix.transposed:
        raise OptionError(
            "galore.target_modules",
            f"{name}, stored as [in, out], in shards",
            "weights stored as [out, in]",
            "Train this model under DDP, or leave the module out of target_modules.",
        )
    if matrix.side != "right":
        raise OptionError(
            "galore.proj_type",
            f"the left side of {name}, in shards",
            "proj_type right under FSDP and DeepSpeed",
            "Set galore.proj_type=right (attach and galore_plugin do so by themselves).",
        )
