"""Refuses parameters and groups that were changed by hand so that the optimizer's state does not fit them any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from galore_trainer.core.galore import compute_dtype
from galore_trainer.errors import OptionError
from galore_trainer.layouts.find import Noted, Placement, address_of
from galore_trainer.optim.group_settings import check_unchanged

WAY_OUT = "Change a model before its optimizer is built, or build a new one."


def noted_of(placement: Placement, group: Mapping[str, Any]) -> Noted:
    """What was noted of a group; raises ``OptionError`` for a group that was put into ``param_groups`` by hand."""
    noted = placement.noted(group)
    if noted is None:
        raise _by_hand("a group put in by hand")
    return noted


def check_groups(placement: Placement, groups: Sequence[dict[str, Any]]) -> None:
    """Raise ``OptionError`` where groups, their parameters or settings were changed so that they cannot be followed."""
    for group in groups:
        check_unchanged(group)
        noted, count = noted_of(placement, group), len(group["params"])
        if len(noted.shapes) != count and not placement.is_flat(group):
            raise _by_hand(f"{count} parameters in a group of {len(noted.shapes)}")
        if noted.projected != group["projected"]:
            raise _by_hand(f"projected {group['projected']} in a group that was added with {noted.projected}")
    names = [group["names"][0] for group in groups if group["names"]]
    if len(set(names)) < len(names):
        raise _by_hand("two groups of the same names")


def check_if_changed(noted: Noted, group: Mapping[str, Any], i: int, state: Mapping[str, Any] | None) -> None:
    """``check_parameter`` ``i`` of a group if its shape or its place in memory is no longer what was noted."""
    p = group["params"][i]
    if p.shape != noted.shapes[i] or address_of(p) != noted.addresses[i]:
        check_parameter(noted, group, i, state)


def check_parameter(noted: Noted, group: Mapping[str, Any], i: int, state: Mapping[str, Any] | None) -> None:
    """Compare a parameter with what was noted of it, and note it anew where it still fits.

    Args:
        noted: of the group, from ``Placement``.
        group: one of ``param_groups``.
        i: position of the parameter in its group.
        state: of the parameter, empty or None before its first step.

    Raises:
        OptionError: it does not fit its state, its logical matrices or its gradient any more.
    """
    p, name = group["params"][i], group["names"][i]
    if p.shape != noted.shapes[i] and (state or group["projected"]):
        now, before = list(p.shape), list(noted.shapes[i])
        raise OptionError("parameters", f"{name} of shape {now}", f"shape {before}, as when it was added", WAY_OUT)
    if p.grad is not None and p.grad.shape != p.shape:
        got = f"{name} of shape {list(p.shape)} with a gradient of shape {list(p.grad.shape)}"
        raise OptionError("parameters", got, "a gradient of its own shape", "Call zero_grad and backward again.")
    if state:
        device = state["skipped"].device
        if device != p.device:
            wanted = f"{device}, where its state lies"
            raise OptionError("parameters", f"{name} on {p.device}", wanted, WAY_OUT)
        if compute_dtype(p.dtype) != compute_dtype(noted.dtypes[i]):
            wanted = f"{noted.dtypes[i]}, which its state was made for"
            raise OptionError("parameters", f"{name} in {p.dtype}", wanted, WAY_OUT)
    noted.note(i, p)


def _by_hand(got: str) -> OptionError:
    return OptionError("param_groups", got, "groups as they were added", "Use add_param_group.")
