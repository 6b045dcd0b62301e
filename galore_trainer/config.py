"""``GaLoreConfig``: the only place where a setting ("knob") of the method is declared.

The YAML keys under ``galore:``, the command-line flags, ``docs/knobs.md``, the resolved configuration of a run and
the check at resume are all generated from the fields below.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from galore_trainer.errors import OptionError
from galore_trainer.fields import knob

ProjType = Literal["std", "reverse_std", "left", "right"]
Embeddings = Literal["plain", "frozen", "projected"]
HeadSharing = Literal["shared", "grouped", "per_head", "joint"]
HeadRole = Literal["q", "k", "v"]
HeadChoice = Literal["random", "energy", "fixed"]
HeadFallback = Literal["joint", "refuse"]
Svd = Literal["randomized", "exact"]
MomentumTransfer = Literal["rotate", "align", "keep", "reset"]
FirstBasis = Literal["gradient", "sketch"]
Bits = Literal[32, 16, 8]
Kernels = Literal["auto", "triton", "torch"]
Residual = Literal["auto", "scaled", "sparse", "both", "none"]
ResidualMode = Literal["separate", "moments"]
ResidualSelection = Literal["row", "global"]
AUTO = "auto"
HEAD_ROLES: tuple[HeadRole, ...] = get_args(HeadRole)
OF_SPARSE = "residual: sparse, both"
SPARSE_PERCENT = 1.2
"""Share of entries with sparse moments where ``residual_percent`` is unset."""

ALL_LINEAR = "all-linear"
EVERY_LINEAR = ("all", "all_linear", ALL_LINEAR)
"""What programs call the choice of every linear layer."""
COMMAS = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)+")
"""Names with commas between them, which some programs take in place of a list."""
LARGEST_INTEGER = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaLoreConfig:
    """How gradients are projected. Every field is optional; an impossible value raises ``OptionError``.

    Names follow GaLore, transformers and peft where they have one. The learning rate, betas, eps and weight decay
    belong to the optimizer, not to this class.
    """

    rank: int = knob(32, "Directions kept of each projected gradient.", trajectory=True, minimum=1)
    rank_pattern: dict[str, int] = knob(
        {}, "Ranks for single modules, {name ending or regex: rank}, as in peft.", trajectory=True
    )
    update_proj_gap: int = knob(200, "Steps between two refreshes of the projection.", trajectory=True, minimum=1)
    scale: float | Literal["auto"] = knob(
        AUTO,
        "Factor on the lifted update: a projected weight moves with lr x scale. auto: sqrt(n / rank) of each weight, "
        "where n is the length of what is projected, so that one lr serves every rank and width.",
        minimum=0.0,
    )
    plain_lr_ratio: float = knob(0.25, "Factor on lr for the parameters that are not projected.", minimum=0.0)
    proj_type: ProjType = knob(
        "std", "Side of the projection: std (the shorter one), reverse_std, left, right.", trajectory=True
    )
    target_modules: str | list[str] = knob(
        ALL_LINEAR,
        "What is projected: all-linear (the linear layers of the blocks), one regex, or a list: name endings, as in "
        "peft; parts of names or regexes, as in transformers.",
        trajectory=True,
    )
    embeddings: Embeddings = knob(
        "plain",
        "Embeddings and output layer: plain (AdamW), frozen (not trained), or projected like the blocks' weights.",
        trajectory=True,
    )
    head_sharing: HeadSharing = knob(
        "shared",
        "Whose gradient gives q, k, v their basis: shared (one head), grouped, per_head, joint.",
        trajectory=True,
    )
    share_heads_of: list[HeadRole] = knob(
        list(HEAD_ROLES),
        "Which of q, k, v share bases as head_sharing says; each of the others has one basis of all its rows.",
        trajectory=True,
        only_with="head_sharing: shared, grouped, per_head",
    )
    head_group_size: int = knob(
        1, "Query heads in a group.", trajectory=True, minimum=1, only_with="head_sharing: grouped"
    )
    head_choice: HeadChoice = knob(
        "random",
        "Which head lends its basis: random, energy (the largest gradient), fixed (the first).",
        trajectory=True,
        only_with="head_sharing: shared, grouped",
    )
    head_fallback: HeadFallback = knob(
        "joint",
        "An attention weight whose heads are unknown, or do not fit its rows: joint (projected whole, named in the "
        "start table and the log) or refuse.",
    )
    svd: Svd = knob("randomized", "How a basis is found: randomized subspace iteration, or an exact SVD.")
    subspace_iterations: int = knob(
        2, "Power iterations of the randomized SVD.", minimum=0, only_with="svd: randomized"
    )
    oversampling: int | None = knob(
        None,
        "Extra directions the randomized SVD and a sketch look at; unset means max(8, rank / 8).",
        minimum=0,
        only_with="svd: randomized; first_basis: sketch; layerwise: true",
    )
    warm_start: bool = knob(False, "Begin the randomized SVD from the previous basis.")
    stagger_refresh: bool = knob(
        False, "Spread the refreshes of the weights over the gap, so that no step does them all.", trajectory=True
    )
    first_basis: FirstBasis = knob(
        "gradient",
        "Where a weight's first basis comes from: gradient (as all others), or sketch (one random sketch of the first "
        "gradient; the weight moves from the second step on).",
        trajectory=True,
    )
    layerwise: bool = knob(
        False,
        "Project each gradient inside backward and free it, accumulation and clipping included; implies "
        "stagger_refresh and first_basis sketch.",
        trajectory=True,
    )
    share_output_heads: bool = knob(
        False, "Treat o_proj's columns as heads too, which share a basis as q, k, v do.", trajectory=True
    )
    diagnose_refreshes: int = knob(
        0,
        "First refreshes at which the excess error of randomizing and of sharing is measured (outside the timed part).",
        minimum=0,
    )
    momentum_transfer: MomentumTransfer = knob(
        "rotate", "What happens to the moments at a refresh: rotate, align (signs only), keep (GaLore), reset."
    )
    residual: Residual = knob(
        AUTO,
        "What the projection loses moves the weight too: scaled (all of it, without state), sparse (moments of a few "
        "entries), both (sparse entries, and scaled elsewhere), none. auto: sparse where residual_percent is set (none "
        "at 0) and in layer-wise mode, else scaled.",
        trajectory=True,
    )
    residual_percent: float | None = knob(
        None,
        "Share of entries, in percent, that get sparse moments; unset: 1.2 where residual is sparse or both.",
        trajectory=True,
        minimum=0.0,
        only_with=OF_SPARSE,
    )
    residual_mode: ResidualMode = knob(
        "separate",
        "What sparse moments do: separate (a normalised update of their own, beside the lifted one) or moments (they "
        "correct the lifted moments before these are normalised; with residual sparse alone, by torch).",
        trajectory=True,
    )
    residual_scale: float = knob(
        1.0,
        "Factor on the residual's update, beside lr x scale.",
        minimum=0.0,
        only_with="residual: scaled, sparse, both",
    )
    residual_warmup_steps: int = knob(
        20,
        "Steps over which candidates are averaged before the sparse entries are chosen.",
        trajectory=True,
        minimum=0,
        only_with=OF_SPARSE,
    )
    residual_selection: ResidualSelection = knob(
        "row",
        "Where sparse entries are chosen: row (as many in each row) or global (anywhere in the matrix).",
        trajectory=True,
        only_with=OF_SPARSE,
    )
    state_bits: Bits = knob(
        32,
        "Bits of the moments of projected weights and of the residual: 32, 16 (bfloat16) or 8 (block-wise).",
        trajectory=True,
    )
    basis_bits: Bits = knob(32, "Bits of the bases: 32, 16 (bfloat16) or 8 (a scale for each column).", trajectory=True)
    plain_state_bits: Bits = knob(
        32, "Bits of the moments of what is not projected: embeddings, output layer, norms.", trajectory=True
    )
    max_grad_norm: float | None = knob(
        None,
        "Norm to which the step clips all gradients as it reads them, without writing them; unset: off. Needs the "
        "Trainer's max_grad_norm to be 0; not under DeepSpeed, which clips itself.",
    )
    stochastic_rounding: bool = knob(True, "Round updates of bfloat16 weights stochastically, so that none is lost.")
    kernels: Kernels = knob(
        "auto",
        "What computes a step between refreshes, and small eigenvectors at one: torch, triton (an error for projected "
        "weights of other devices or types), or auto (triton where it can). Warm-ups and global supports of the "
        "residual, and scattered rows, are torch's.",
    )

    def __post_init__(self) -> None:
        """Check every field; raises ``OptionError`` for the first that is impossible."""
        check_fields("galore.", self)
        check_target_modules("galore.target_modules", self.target_modules)
        if self.warm_start and self.svd == "exact":
            raise OptionError("galore.warm_start", True, "svd randomized", "An exact SVD starts from nothing.")
        if self.residual_percent is not None and self.residual_percent > 100.0:
            raise OptionError("galore.residual_percent", self.residual_percent, "a share from 0 to 100 percent")
        if self.residual == "both" and self.residual_percent == 0.0:
            raise OptionError("galore.residual_percent", 0.0, "more than 0 beside residual both", "Or use scaled.")
        if not self.share_heads_of or len(set(self.share_heads_of)) < len(self.share_heads_of):
            way_out = "Use head_sharing joint to share no heads."
            raise OptionError("galore.share_heads_of", self.share_heads_of, "some of q, k, v, each once", way_out)
        if self.max_grad_norm is not None and not 0.0 < self.max_grad_norm < math.inf:
            wanted = "a finite number above 0"
            raise OptionError("galore.max_grad_norm", self.max_grad_norm, wanted, "Leave it unset to switch it off.")
        if self.residual_mode == "moments":
            self._check_moments()
        if self.layerwise and self.residual in ("scaled", "both"):
            way_out = "It needs the whole gradient, which layer-wise mode never keeps. Use auto, sparse or none."
            raise OptionError("galore.residual", self.residual, "sparse or none in layer-wise mode", way_out)
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                raise OptionError(f"galore.rank_pattern[{key!r}]", rank, "an integer of at least 1")

    def _check_moments(self) -> None:
        """Raise ``OptionError`` where there are no sparse moments alone, or where kernels have to move the weights."""
        if self.resolved_residual != "sparse":
            got = f"moments beside residual {self.resolved_residual}"
            way_out = "Set residual to sparse (and residual_percent above 0), or use separate."
            raise OptionError("galore.residual_mode", got, "separate, or moments beside residual sparse", way_out)
        if self.kernels == "triton":
            way_out = "The kernels do not compute this step. Use auto, which takes torch for it."
            raise OptionError("galore.kernels", "triton", "auto or torch beside residual_mode moments", way_out)

    @property
    def shared_roles(self) -> tuple[HeadRole, ...]:
        """Which of q, k, v share bases by head, in this order; none under ``head_sharing: joint``."""
        return () if self.head_sharing == "joint" else tuple(r for r in HEAD_ROLES if r in self.share_heads_of)

    @property
    def staggers(self) -> bool:
        """Whether refreshes are spread over the gap."""
        return self.stagger_refresh or self.layerwise

    @property
    def sketches_first(self) -> bool:
        """Whether the first basis comes from a sketch."""
        return self.first_basis == "sketch" or self.layerwise

    @property
    def resolved_residual(self) -> Literal["scaled", "sparse", "both", "none"]:
        """The residual in force; see the field."""
        if self.residual == "auto":
            if self.residual_percent is None:
                return "sparse" if self.layerwise else "scaled"
            return "sparse" if self.residual_percent > 0.0 else "none"
        return "none" if self.residual == "sparse" and self.residual_percent == 0.0 else self.residual

    @property
    def scales_residual(self) -> bool:
        """Whether all that the projection loses moves the weight."""
        return self.resolved_residual in ("scaled", "both")

    @property
    def sparse_percent(self) -> float:
        """Share of entries with sparse moments, in percent; 0 where there are none."""
        if self.resolved_residual not in ("sparse", "both"):
            return 0.0
        return SPARSE_PERCENT if self.residual_percent is None else self.residual_percent

    def resolved_oversampling(self, rank: int) -> int:
        """Oversampling for a matrix of this rank: the field, or max(8, rank / 8)."""
        return self.oversampling if self.oversampling is not None else max(8, rank // 8)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, in declaration order."""
        return dataclasses.asdict(self)

    @classmethod
    def trajectory_fields(cls) -> tuple[str, ...]:
        """Names of the fields that a resumed run must not change."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.metadata["trajectory"])

    def trajectory(self) -> dict[str, Any]:
        """Names and values of these fields; of the residual and of shared heads what is in force."""
        values = {name: value for name, value in self.to_dict().items() if name in self.trajectory_fields()}
        in_force = {"residual": self.resolved_residual, "residual_percent": self.sparse_percent}
        return values | in_force | {"share_heads_of": list(self.shared_roles or HEAD_ROLES)}


def check_settings(config: GaLoreConfig, where: str) -> None:
    """Raise ``OptionError`` for a setting that needs whole weights, where weights are cut into shards of rows.

    Args:
        config: as the user gave it.
        where: the backend that cuts the weights, for the message.
    """
    refusals = [  # field, whether it is refused, accepted values, why
        ("proj_type", config.proj_type == "left", "std or right", "Rows are cut, so columns are projected."),
        ("share_output_heads", config.share_output_heads, "false", "Heads that are columns need whole rows."),
        ("residual_selection", config.sparse_percent > 0.0 and config.residual_selection == "global", "row", ""),
        ("state_bits", config.state_bits == 8, "32 or 16", "8-bit blocks would cross processes."),
        ("plain_state_bits", config.plain_state_bits == 8, "32 or 16", "8-bit blocks would cross processes."),
        ("diagnose_refreshes", config.diagnose_refreshes > 0, "0", "An exact SVD needs whole weights."),
        ("first_basis", config.first_basis == "sketch", "gradient", "A sketch sees whole columns."),
    ]
    for field, refused, wanted, why in refusals:
        if refused:
            got = f"{getattr(config, field)!r} under {where}"
            raise OptionError(f"galore.{field}", got, wanted, f"{why} DDP takes every setting.".strip())


def check_fields(prefix: str, config: Any) -> None:
    """Check every field of a settings dataclass against its annotation and its declared minimum.

    Args:
        prefix: of the dotted names in errors, for example ``galore.``.
        config: an instance whose fields were declared with ``knob``.

    Raises:
        OptionError: for the first field that does not fit.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, low = getattr(config, field.name), field.metadata.get("minimum")
        check_type(prefix + field.name, value, hints[field.name])
        check_integers(prefix + field.name, value)
        if low is None or not isinstance(value, int | float):
            continue
        is_integer = isinstance(value, int)  # math.isfinite overflows for large integers
        if not ((is_integer or math.isfinite(value)) and value >= low):
            kind = "an integer" if is_integer else "a finite number"
            raise OptionError(prefix + field.name, value, f"{kind} of at least {low:g}")


def check_target_modules(option: str, value: str | list[str]) -> None:
    """Raise ``OptionError`` for a choice of modules that other programs take and no model here could match."""
    entries = [value] if isinstance(value, str) else value
    if not all(entry.strip() for entry in entries) or not entries:
        raise OptionError(option, value, "at least one name", f"Use {ALL_LINEAR!r} for all of them.")
    if value != ALL_LINEAR and any(entry in EVERY_LINEAR for entry in entries):
        raise OptionError(option, value, "all-linear, one regex, or a list of names", f"Write {ALL_LINEAR!r}.")
    if any(COMMAS.fullmatch(entry) for entry in entries):
        names = ", ".join(part.strip() for entry in entries for part in entry.split(","))
        raise OptionError(option, value, "all-linear, one regex, or a list of names", f"Write a list: [{names}].")


def check_integers(option: str, value: Any) -> None:
    """Raise ``OptionError`` for an integer of more than 64 bits, also in lists and mappings.

    Neither tensors nor the files of a run can hold larger ones.
    """
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for item in items:
        check_integers(option, item)
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise OptionError(option, value, f"an integer of at most {LARGEST_INTEGER}")


def check_type(option: str, value: Any, hint: Any) -> None:
    """Raise ``OptionError`` unless ``value`` fits the annotation ``hint`` (scalars, Literal, list, dict, unions)."""
    if not _fits(value, hint):
        raise OptionError(option, value, describe_type(hint))


def describe_type(hint: Any) -> str:
    """An annotation in words, for help texts and errors: ``one of a, b``, ``an integer``, ..."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    if hint in words:
        return words[hint]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(a) for a in get_args(hint))
    if get_origin(hint) is list:
        items = get_args(hint)[0]
        return "a list" + (f" of {', '.join(map(str, get_args(items)))}" if get_origin(items) is Literal else "")
    if get_origin(hint) is dict:
        of = get_args(hint)[1]
        return "a mapping" + ("" if of is Any else f" of text to {describe_type(of)}")
    return " or ".join(describe_type(a) for a in get_args(hint)) or str(hint)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in arguments)
    if origin is list:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, arguments[0]) for v in value)
    if origin is dict:
        key, item = arguments
        return isinstance(value, Mapping) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if arguments:  # a union
        return any(_fits(value, a) for a in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)
