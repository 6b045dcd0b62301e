"""The number of heads of an attention and the rows of each head, read from the module itself, then from its config."""

from __future__ import annotations

import dataclasses
from typing import Any

# names of attributes in the modules and configs of transformers
COUNTS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "num_attn_heads")
KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
SIDES = ("encoder", "decoder")
SIZES = ("head_dim", "attention_head_size", "d_kv", "key_value_proj_dim", "head_size")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention geometry.

    Attributes:
        num_heads: number of query heads.
        num_kv_heads: number of key-value heads.
        head_dim: rows of a query head.
        k_dim, v_dim: rows of a key head and of a value head; None where they are ``head_dim``. They differ in latent
            and linear attention.
        num_v_heads: number of value heads; None where it is ``num_kv_heads``. Linear attention has more.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    k_dim: int | None = None
    v_dim: int | None = None
    num_v_heads: int | None = None

    def of(self, role: str) -> tuple[int, int]:
        """Number of heads and rows of a head for the role ``q``, ``k`` or ``v``; for ``o`` its columns are heads."""
        v_dim = self.v_dim or self.head_dim
        return {
            "q": (self.num_heads, self.head_dim),
            "k": (self.num_kv_heads, self.k_dim or self.head_dim),
            "v": (self.num_v_heads or self.num_kv_heads, v_dim),
            "o": (self.num_v_heads or self.num_heads, v_dim),
        }[role]


def heads_of(name: str, attention: Any, config: Any) -> Heads | None:
    """The geometry of an attention; None where neither the module nor its config gives its number of heads.

    The module is read first: layers, the sides of an encoder-decoder and the stages of a hierarchy can differ, and one
    config describes all of them.

    Args:
        name: of the weight, which contains ``encoder`` or ``decoder`` in an encoder-decoder.
        attention: the module that holds the projections; None to read the config alone.
        config: of the nearest module around the weight that has one; None where none has.
    """
    keys, values, k_dim, v_dim = (
        _first(attention, key) for key in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    )
    if keys and values and k_dim and v_dim:  # linear attention
        return Heads(num_heads=keys, num_kv_heads=keys, head_dim=k_dim, v_dim=v_dim, num_v_heads=values)
    config = _of_layer(_text(config), attention)
    by_config, kv_by_config = _counts(name, config)
    num_heads = _first(attention, *COUNTS) or by_config
    if not num_heads:
        return None
    k_dim, v_dim = _first(attention, "qk_nope_head_dim"), _first(attention, "v_head_dim")
    if k_dim and v_dim:  # latent attention
        q_dim = k_dim + (_first(attention, "qk_rope_head_dim") or 0)
        return Heads(num_heads=num_heads, num_kv_heads=num_heads, head_dim=q_dim, k_dim=k_dim, v_dim=v_dim)
    head_dim = _first(attention, *SIZES) or _first(config, *SIZES)
    if not head_dim:
        hidden = _first(attention, *WIDTHS) or _first(config, *WIDTHS)
        if not hidden or hidden % num_heads:
            return None
        head_dim = hidden // num_heads
    num_kv_heads = _first(attention, *KV_COUNTS)
    if not num_kv_heads and (groups := _first(attention, "num_key_value_groups")):
        num_kv_heads = num_heads // groups
    # where the counts of query heads differ, the config describes another attention
    if not num_kv_heads and num_heads == by_config:
        num_kv_heads = kv_by_config
    return Heads(num_heads=num_heads, num_kv_heads=num_kv_heads or num_heads, head_dim=head_dim)


def _counts(name: str, config: Any) -> tuple[int | None, int | None]:
    """Numbers of query and key-value heads in a config; for encoder or decoder where the config has one for each."""
    side = next((part for part in reversed(name.split(".")) if part in SIDES), None)
    names = (f"{side}_attention_heads", f"num_{side}_attention_heads", f"{side}_num_attention_heads")
    if side and (heads := _first(config, *names)):
        return heads, _first(config, f"{side}_num_key_value_heads")
    return _first(config, *COUNTS), _first(config, *KV_COUNTS)


def _text(config: Any) -> Any:
    """The text config of a model with several towers; the config itself where it has no text config or several."""
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:
        return config


def _of_layer(config: Any, attention: Any) -> Any:
    """The config of one layer where layers differ, else the config itself."""
    layer = getattr(attention, "layer_idx", None)
    if getattr(config, "is_heterogeneous", False) and isinstance(layer, int):
        return config.per_layer_config[layer]
    return config


def _first(source: Any, *names: str) -> int | None:
    """The first positive integer that an object has under one of these names."""
    values = (_read(source, name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def _read(source: Any, name: str) -> Any:
    try:
        return getattr(source, name, None)
    except RuntimeError:  # transformers raises it where a config's layers differ, rather than an AttributeError
        return None
