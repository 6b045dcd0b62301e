"""AdamW for weights that are not projected: by torch's fused function, or by a kernel for equal weights together.

Moments have 32, 16 or 8 bits. bfloat16 weights are rounded as projected ones are.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.galore import compute_dtype, stochastic_round
from galore_trainer.core.precision import BLOCK, NOISE, Stored, decode, encode, zero_code
from galore_trainer.core.streams import stream
from galore_trainer.kernels import obstacle
from galore_trainer.optim.bucket import MOMENTS
from galore_trainer.optim.guards import no_skips, usable_flags
from galore_trainer.optim.local import AGE, LocalWeight, Moved, moved_together
from galore_trainer.optim.ops_torch import rounds, weight_noise
from galore_trainer.optim.ops_triton import LIMIT, wanted
from galore_trainer.optim.places import GRADIENTS, KEYS, StepTables

CHUNK = 1 << 22  # entries that are widened at a time, where weight, gradient or moments are stored otherwise


def move_plain(weights: Sequence[LocalWeight], config: GaLoreConfig, seed: int) -> list[Moved]:
    """One step of AdamW on weights that are not projected, or on this process's entries of them.

    Args:
        weights: with states from ``make_plain_state``, and ``ok`` where it is known.
        config, seed: of the optimizer.
    """
    alike, by_torch = equal_for_kernel(weights, config)
    moved = [_move_by_kernel(members, config, seed) for members in alike]
    asked = [w for w in by_torch if w.ok is None]
    for w, ok in zip(asked, usable_flags([w.grad for w in asked]), strict=True):
        w.ok = ok
    for w in by_torch:
        calls, noise = w.state["calls"], None
        if config.plain_state_bits < 32:
            noise = stream(w.weight.device, seed, w.name, "moments", calls)
        assert w.ok is not None
        rounding = weight_noise(w.weight, w.name, calls, config, seed)
        plain_step(w.weight, w.grad, w.state, w.group, w.ok, rounding, noise, w.clip)
    for w in by_torch:
        w.age_keys = ()  # torch has counted it
    return moved + moved_together(by_torch)


def equal_for_kernel(
    weights: Sequence[LocalWeight], config: GaLoreConfig
) -> tuple[list[list[LocalWeight]], list[LocalWeight]]:
    """Weights that one launch each moves, and those that are left to torch."""
    by_torch: list[LocalWeight] = []
    alike: dict[tuple[Any, ...], list[LocalWeight]] = {}
    for w in weights:
        if _kernel_takes(w, config):
            key = (id(w.group), w.weight.numel(), w.weight.dtype, w.grad.dtype, w.weight.device, w.ok is None)
            alike.setdefault(key, []).append(w)
        else:
            by_torch.append(w)
    return list(alike.values()), by_torch


def _kernel_takes(w: LocalWeight, config: GaLoreConfig) -> bool:
    p, grad = w.weight, w.grad
    if not wanted(config, p.device) or obstacle(p.device, p.dtype, grad.dtype) is not None:
        return False
    dense = p.is_contiguous() and grad.is_contiguous() and p.numel() > 0
    return dense and w.state[MOMENTS[0][0]].dtype == torch.float32


class PlainBucket(StepTables):
    """Plain weights of equally many entries, which a kernel moves in one launch where they lie.

    Args:
        weights: of one group, device and dtype, with contiguous gradients of one dtype.
        config, seed: of the optimizer.
    """

    def __init__(self, weights: Sequence[LocalWeight], config: GaLoreConfig, seed: int) -> None:
        first = weights[0]
        self.weights, self._entries = weights, first.weight.numel()
        tensors = {"weights": [w.weight for w in weights], GRADIENTS: [w.grad for w in weights]}
        tensors |= {key: [w.state[key] for w in weights] for key in (*(key for key, _ in MOMENTS), AGE)}
        addresses = {name: [x.data_ptr() for x in each] for name, each in tensors.items()}
        dtypes = {name: each[0].dtype for name, each in tensors.items()}
        seeds = {KEYS: (seed, "")} if rounds(first.weight, config) else {}
        names, calls = [w.name for w in weights], [w.state["calls"] for w in weights]
        super().__init__(addresses, dtypes, first.group, names, seeds, calls, first.weight.device)

    def move(self, known: Tensor | None = None) -> Tensor:
        """One step; which gradients were usable, [weights], where that is not known."""
        from galore_trainer.kernels.adam import adamw_, usable

        ok = usable(self[GRADIENTS], self._entries, LIMIT) if known is None else known
        group, names = self.group, ("weights", GRADIENTS, *(key for key, _ in MOMENTS), AGE)
        W, G, M, V, t = map(self.tables.__getitem__, names)
        adamw_(
            W,
            G,
            M,
            V,
            t,
            ok,
            self._entries,
            rates=self.rates,
            betas=group["betas"],
            eps=group["eps"],
            keys=self.keys,
            clip=self.weights[0].clip,
        )
        return ok


def _move_by_kernel(weights: Sequence[LocalWeight], config: GaLoreConfig, seed: int) -> Moved:
    """One launch for weights of equally many entries."""
    flags = [w.ok for w in weights if w.ok is not None]
    with torch.cuda.device_of(weights[0].weight):
        ok = PlainBucket(weights, config, seed).move(torch.stack(flags) if flags else None)
    return Moved(weights, ok, (AGE,))


def make_plain_state(p: Tensor, state: MutableMapping[str, Any], config: GaLoreConfig) -> None:
    """The state of a parameter that is not projected, before its first step."""
    state.update(plain_state(p, config.plain_state_bits), calls=0, skipped=no_skips(p.device))


def plain_state(p: Tensor, bits: int = 32) -> dict[str, Any]:
    """Fresh moments of a parameter in ``bits`` bits (of a float64 one in float64 for 32); 8 bits have scales too."""
    dtype = {32: compute_dtype(p.dtype), 16: torch.bfloat16, 8: torch.uint8}[bits]
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
    for key, signed in MOMENTS:
        state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        if bits == 8:
            state[key].fill_(zero_code(signed=signed))
            state[f"{key}_scale"] = torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)
    return state


def plain_step(
    p: Tensor,
    grad: Tensor,
    state: MutableMapping[str, Any],
    group: dict[str, Any],
    ok: Tensor,
    rounding: torch.Generator | None,
    noise: torch.Generator | None = None,
    clip: Tensor | None = None,
) -> None:
    """One AdamW step in place.

    Args:
        p: parameter of any shape and strides. A contiguous one is updated directly where it, its gradient and its
            moments have its ``compute_dtype``; all else goes through chunks of that dtype.
        grad: its gradient, of any strides.
        state: from ``plain_state``.
        group: gives lr, betas, eps and weight_decay.
        ok: scalar tensor, 1.0, or 0.0 to leave everything as it is.
        rounding: for stochastic rounding of bf16 weights; None rounds to nearest.
        noise: for the rounding of moments in fewer than 32 bits.
        clip: scalar tensor that multiplies the gradient, in chunks; None is 1.
    """
    options = dict(
        found_inf=1.0 - ok,
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )
    wide = compute_dtype(p.dtype)
    grad = grad.contiguous()  # torch's fused function reads its arguments in memory order, whatever their strides
    direct = p.dtype == grad.dtype == state["exp_avg"].dtype == wide and p.is_contiguous()
    if direct and clip is None:
        adamw([p], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], **options)
        return
    before = state["step"].clone()
    weight, gradient = p.contiguous().view(-1), grad.view(-1)
    state["step"].add_(ok)  # also where this process has no entry
    for start in range(0, p.numel(), CHUNK):
        here = slice(start, start + CHUNK)
        state["step"].copy_(before)
        stored = [_chunk(state, key, here) for key, _ in MOMENTS]
        new = weight[here].to(wide)
        m, v = (decode(x, signed=signed)[0].to(wide) for x, (_, signed) in zip(stored, MOMENTS, strict=True))
        g = gradient[here].to(wide) if clip is None else gradient[here].to(wide) * clip
        adamw([new], [g], [m], [v], [], [state["step"]], **options)
        if not direct:  # else ``new`` is a part of the weight itself
            weight[here] = (
                stochastic_round(new, rounding) if rounding is not None and p.dtype == torch.bfloat16 else new
            )
        if state["exp_avg"].dtype != wide:
            for old, moment, (_, signed) in zip(stored, (m, v), MOMENTS, strict=True):
                _replace_(old, moment.unsqueeze(0), signed, ok, noise)
    if not p.is_contiguous():
        p.copy_(weight.view(p.shape))


def _chunk(state: MutableMapping[str, Any], key: str, here: slice) -> Stored:
    """A part of a stored moment, [1, entries]: views."""
    scale = state.get(f"{key}_scale")
    blocks = slice(here.start // BLOCK, here.stop // BLOCK)
    return Stored(state[key].view(1, -1)[:, here], None if scale is None else scale.view(1, -1)[:, blocks])


def _replace_(old: Stored, x: Tensor, signed: bool, ok: Tensor, noise: torch.Generator | None) -> None:
    """Store new numbers in place; where ``ok`` is 0 what is stored stays, bit for bit."""
    bits = 8 * old.values.element_size()
    drawn = torch.randint(0, NOISE, x.shape, generator=noise, device=x.device, dtype=torch.int32)
    new = encode(x, bits, drawn, signed=signed)
    old.values.copy_(torch.where(ok > 0.0, new.values, old.values))
    if old.scale is not None and new.scale is not None:
        old.scale.copy_(torch.where(ok > 0.0, new.scale, old.scale))
