"""Settings that have no effect beside others: what is declared, and what is said."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from torch import nn

from galore_trainer import GaLoreConfig, build_optimizer
from galore_trainer.fields import idle_settings, requirements
from galore_trainer.hf.table import weight_table
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.run_config import EvalConfig, RunConfig, load_run_config, packaged_configs


@pytest.mark.parametrize("cls", [GaLoreConfig, EvalConfig])
def test_what_gives_an_effect_is_a_field_with_such_a_value(cls: type) -> None:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for name, values in requirements(field):
            allowed = {"true"} if hints[name] is bool else set(map(str, get_args(hints[name])))
            assert get_origin(hints[name]) is Literal or not values or hints[name] is bool
            assert set(values) <= allowed, (field.name, name)


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"residual": "scaled", "residual_percent": 2.0}, ["residual_percent"]),
        ({"residual": "none", "residual_percent": 2.0, "residual_scale": 0.5}, ["residual_percent", "residual_scale"]),
        ({"residual": "none", "residual_percent": 0.0}, []),  # both say the same
        ({"residual_percent": 2.0, "residual_warmup_steps": 5}, []),  # auto is sparse
        ({"residual_warmup_steps": 5, "residual_selection": "global"}, ["residual_warmup_steps", "residual_selection"]),
        ({"layerwise": True, "residual_warmup_steps": 5}, []),  # auto is sparse here
        ({"residual": "both", "residual_warmup_steps": 5, "residual_scale": 0.5}, []),
        ({"residual": "scaled", "residual_warmup_steps": 20, "residual_selection": "row"}, []),  # the defaults
        ({"head_group_size": 3}, ["head_group_size"]),
        ({"head_sharing": "grouped", "head_group_size": 3, "head_choice": "energy"}, []),
        ({"head_sharing": "joint", "share_heads_of": ["q", "k"]}, ["share_heads_of"]),
        ({"head_sharing": "joint", "share_heads_of": ["q", "k", "v"]}, []),
        ({"head_sharing": "per_head", "share_heads_of": ["q", "k"], "head_choice": "fixed"}, ["head_choice"]),
        ({"svd": "exact", "oversampling": 4, "subspace_iterations": 1}, ["subspace_iterations", "oversampling"]),
        ({"svd": "exact", "oversampling": 4, "first_basis": "sketch"}, []),
    ],
)
def test_what_is_idle(settings: dict[str, Any], idle: list[str]) -> None:
    sentences = idle_settings("galore", GaLoreConfig(**settings))
    assert [sentence.split()[0] for sentence in sentences] == [f"galore.{name}" for name in idle]


def test_the_start_table_names_it_once() -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    table = weight_table(build_optimizer(model, GaLoreConfig(rank=2, target_modules=["0"], residual_warmup_steps=5)))
    note = (
        "note: galore.residual_warmup_steps 5 has no effect beside galore.residual scaled: it needs "
        "galore.residual: sparse or both"
    )
    assert table.splitlines().count(note) == table.count("no effect") == 1


def test_a_run_says_what_its_table_does_not() -> None:
    config = RunConfig.from_dict({"galore": {"head_group_size": 3}, "eval": {"generate": False, "extract": "strict"}})
    assert [sentence.split()[0] for sentence in config.idle_settings()] == ["galore.head_group_size", "eval.extract"]
    assert [sentence.split()[0] for sentence in config.idle_settings(told=True)] == ["eval.extract"]
    others = RunConfig.from_dict({"method": "adamw", "galore": {"head_group_size": 3}})
    assert others.idle_settings() == []  # it reads nothing of that block


@pytest.mark.parametrize("method", ["galore_plus", "galore", "galore_plus_paper", "galore_torch"])
def test_no_method_and_no_packaged_file_has_an_idle_setting(method: str) -> None:
    assert METHODS[method].block == "galore"
    assert RunConfig.from_dict({"method": method}).idle_settings() == []
    for name in packaged_configs():
        assert load_run_config(name, flags={"method": method}).idle_settings() == [], name
