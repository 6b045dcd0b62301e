"""What a weight's name says: the wrappers around it, its module, and its role in an attention.

Another name for a query, key or value is one entry of ``SEPARATE``.
"""

from __future__ import annotations

MODEL_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
LAYER_WRAPPERS = ("linear", "base_layer")
"""Modules that hold the weight of the projection which their parent is, for example ``q_proj.base_layer`` of peft."""

# leaf names of modules, in the models of transformers
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
HEADLESS = (  # layers of an attention that are neither q, k nor v
    *OUTPUT,
    *("proj", "projection", "projection_layer", "output", "output_proj", "linear_out", "to_out", "post"),  # outputs
    *("gate_proj", "g_proj", "gate", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj_ba"),  # gates
    *("q_a_proj", "kv_a_proj_with_mqa"),  # latents
    *("linear_pos", "relative_k_proj", "pos_proj", "relative_pos_embeddings", "gru_rel_pos_linear"),  # positions
    *("sampling_offsets", "attention_weights"),
)


def logical_name(name: str) -> str:
    """A parameter's name without what wrappers of the model (DDP, torch.compile, FSDP, peft) add to it."""
    for wrapper in MODEL_WRAPPERS:
        name = name.replace("." + wrapper, ".").removeprefix(wrapper)
    return name


def module_of(name: str) -> str:
    """The name of the module whose weight has this name; the name itself where it does not end with ``.weight``."""
    return name.removesuffix(".weight")


def projection_name(module_name: str) -> str:
    """A module's name without the wrappers that stand around its weight: ``q_proj`` for ``q_proj.linear``."""
    while "." in module_name and module_name.rsplit(".", 1)[1] in LAYER_WRAPPERS:
        module_name = module_name.rsplit(".", 1)[0]
    return module_name


def role_of(module_name: str, output_heads: bool = False) -> str | None:
    """``q``, ``k``, ``v``, ``o`` (if ``output_heads``), ``fused``, or None for a weight without heads."""
    *parents, leaf = projection_name(module_name).split(".")
    if leaf in FUSED_NAMES:
        return "fused"
    names_of = {**SEPARATE, "o": OUTPUT} if output_heads else SEPARATE
    role = next((role for role, names in names_of.items() if leaf in names), None)
    # short names such as "q" or "key" and those of outputs count only inside a module with "att" in its name
    in_attention = any("att" in parent.lower() for parent in parents)
    unmistakable = role != "o" and leaf.endswith(("_proj", "_lin"))
    return role if role and (in_attention or unmistakable) else None


def should_have_heads(module_name: str, output_heads: bool = False) -> bool:
    """Whether a weight is q, k or v by its name, or lies directly in an attention and is not in ``HEADLESS``."""
    if role_of(module_name, output_heads):
        return True
    *parents, leaf = projection_name(module_name).split(".")
    if parents and parents[-1] == "self":  # BERT's attention.self.query
        parents.pop()
    return bool(parents) and "att" in parents[-1].lower() and leaf not in HEADLESS
