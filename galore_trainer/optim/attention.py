"""Which rows of a weight are heads: the attention layouts this project understands, from names and the model's config.

A new layout is one line in ``FUSED`` (rows of a fused weight) or one name in ``SEPARATE``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.heads import LogicalMatrix
from galore_trainer.errors import OptionError

SEPARATE = {
    "q": ("q_proj", "query", "q_lin", "wq", "q", "query_proj"),
    "k": ("k_proj", "key", "k_lin", "wk", "k", "key_proj"),
    "v": ("v_proj", "value", "v_lin", "wv", "v", "value_proj"),
}
OUTPUT = ("o_proj", "out_proj", "out_lin", "wo", "Wo", "o", "c_proj", "dense")
FUSED_NAMES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj_qkv", "wqkv", "W_pack", "att_proj")
ROWS, PER_HEAD = "q, k, v one after the other", "q, k, v of each head together"
FUSED = {  # by (model_type, leaf name)
    ("phi3", "qkv_proj"): ROWS,
    ("gpt2", "c_attn"): ROWS,
    ("modernbert", "Wqkv"): ROWS,
    ("gpt_neox", "query_key_value"): PER_HEAD,
    ("bloom", "query_key_value"): PER_HEAD,
}
JOINT = "Use head_sharing joint, or leave the module out of target_modules."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention geometry of a model: query heads, key-value heads, rows of a head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def heads_from_config(config: Any) -> Heads | None:
    """Read the geometry from a transformers config; None where it says nothing about heads."""
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_heads = _first(text, "num_attention_heads", "n_head", "num_heads", "n_heads")
    if not num_heads:
        return None
    head_dim = _first(text, "head_dim", "d_kv")
    if not head_dim:
        hidden = _first(text, "hidden_size", "n_embd", "d_model", "dim")
        if not hidden or hidden % num_heads:
            return None
        head_dim = hidden // num_heads
    return Heads(num_heads=num_heads, num_kv_heads=_first(text, "num_key_value_heads") or num_heads, head_dim=head_dim)


def _first(config: Any, *names: str) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and v > 0), None)


def role_of(module_name: str, output_heads: bool = False) -> str | None:
    """``q``, ``k``, ``v``, ``o`` (if ``output_heads``), ``fused``, or None for a weight without heads."""
    *parents, leaf = module_name.split(".")
    if leaf in FUSED_NAMES:
        return "fused"
    names_of = {**SEPARATE, "o": OUTPUT} if output_heads else SEPARATE
    role = next((role for role, names in names_of.items() if leaf in names), None)
    # short names such as "q" or "key" are attention only under a module that says so
    inside = any("att" in parent.lower() for parent in parents)
    clear = role != "o" and leaf.endswith(("_proj", "_lin"))
    return role if role and (inside or clear) else None


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
    """The logical matrices of an attention weight under a ``head_sharing`` other than joint: always the right side.

    Args:
        name: module name, for errors.
        role: from ``role_of``.
        m, n: rows and columns of the weight (after ``transposed``).
        model_type: of the model's config; names the row order of a fused weight.
        heads: geometry, None where unknown.
        config: how to share.
        rank: r of this weight.
        transposed: stored as [in_features, out_features].

    Raises:
        OptionError: heads unknown, rows that are not heads, a left projection, or a rank that heads cannot span.
    """
    option = "galore.head_sharing"
    if config.proj_type in ("left", "reverse_std"):
        wanted = "proj_type std or right with heads that share a basis"
        raise OptionError("galore.proj_type", config.proj_type, wanted, "Use head_sharing joint for the other side.")
    if heads is None:
        raise OptionError(option, config.head_sharing, f"a model whose config tells the heads of {name}", JOINT)
    d = heads.head_dim
    if role == "o":  # its columns are heads: the rows of the transposed weight
        m, n, transposed = n, m, not transposed
    if role != "fused":
        count = heads.num_heads if role in "qo" else heads.num_kv_heads
        if m != count * d:
            wanted = f"{name} with {count} heads x {d} rows, but it has {m} rows"
            raise OptionError(option, config.head_sharing, wanted, JOINT)
        return [_matrix("", count, heads, n, config, rank, name, transposed=transposed, length=count * d)]
    order = FUSED.get((model_type, name.rsplit(".", 1)[-1]))
    counts = {"q": heads.num_heads, "k": heads.num_kv_heads, "v": heads.num_kv_heads}
    if order is None:
        wanted = f"a known order of rows in the fused weight {name} of a {model_type or 'custom'} model"
        raise OptionError(option, config.head_sharing, wanted, JOINT)
    if m != sum(counts.values()) * d or (order == PER_HEAD and heads.num_heads != heads.num_kv_heads):
        wanted = f"{name} with {' + '.join(map(str, counts.values()))} heads x {d} rows, but it has {m} rows"
        raise OptionError(option, config.head_sharing, wanted, JOINT)
    if order == PER_HEAD:
        return [
            _matrix(label, count, heads, n, config, rank, name, transposed=transposed, outer=count, start=i * d,
                    length=d)
            for i, (label, count) in enumerate(counts.items())
        ]  # fmt: skip
    starts = {"q": 0, "k": heads.num_heads * d, "v": (heads.num_heads + heads.num_kv_heads) * d}
    return [
        _matrix(label, count, heads, n, config, rank, name, transposed=transposed, start=starts[label],
                length=count * d)
        for label, count in counts.items()
    ]  # fmt: skip


def _matrix(
    label: str, count: int, heads: Heads, n: int, config: GaLoreConfig, rank: int, name: str, **rows: Any
) -> LogicalMatrix:
    d, whole = heads.head_dim, f"{name} ({label})" if label else name
    group = _group_size(count, heads, config)
    needed = math.ceil(rank / d)
    if needed > group:
        wanted = f"at most {min(group * d, n)}: {group} head(s) of {d} rows give {whole} a basis"
        raise OptionError("galore.rank", rank, wanted, "Lower the rank, share over more heads, or use joint.")
    if rank > n:
        raise OptionError("galore.rank", rank, f"at most {n}, the columns of {whole}")
    return LogicalMatrix(
        label=label, columns=n, side="right", rank=rank, blocks=count // group, head_dim=d, lenders=needed, **rows
    )


def _group_size(count: int, heads: Heads, config: GaLoreConfig) -> int:
    if config.head_sharing == "per_head":
        return 1
    if config.head_sharing == "shared":
        return count
    group = config.head_group_size if count == heads.num_heads else max(
        1, config.head_group_size * heads.num_kv_heads // heads.num_heads
    )  # fmt: skip
    uneven = config.head_group_size * heads.num_kv_heads > heads.num_heads and (
        config.head_group_size * heads.num_kv_heads % heads.num_heads
    )
    if heads.num_heads % config.head_group_size or count % group or uneven:
        wanted = f"a divisor of the {heads.num_heads} query heads (and of {heads.num_kv_heads} key-value heads)"
        raise OptionError("galore.head_group_size", config.head_group_size, wanted)
    return group
