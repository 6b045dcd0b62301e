"""The forms of ``target_modules``: those of peft and of transformers, each compared with its own rule."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import check_target_module_exists

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.targets.groups import plan_weights


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return llama(layers=12)


def llama(layers: int) -> LlamaForCausalLM:
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes))


def projected(model: nn.Module, target_modules: str | list[str]) -> set[str]:
    plan = plan_weights(model, GaLoreConfig(rank=4, target_modules=target_modules))
    return {w.name.removesuffix(".weight") for w in plan if w.matrices}


@pytest.mark.parametrize(
    "target_modules",
    [
        ["attn", "mlp"],
        ["self_attn"],
        ["attn"],
        ["proj"],
        ["layers.11."],
        [r".*\.[qk]_proj", r"model\.layers\.[0-3]\.mlp\..*"],
        [r".*attn.*", r".*mlp.*"],
        ["q_proj", r".*mlp\.down.*"],
        ["layers.2.", "lm_head", ".*gate.*"],
        r".*\.(q|v)_proj",
    ],
)
def test_lists_choose_what_transformers_would(model: nn.Module, target_modules: str | list[str]) -> None:
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if check_target_module_exists(target_modules, name)}
    assert expected
    assert projected(model, target_modules) == expected


def test_a_list_of_endings_is_read_as_in_peft() -> None:
    falcon = FalconForCausalLM(FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    assert {name.rsplit(".", 1)[1] for name in projected(falcon, ["dense"])} == {"dense"}
    assert len(projected(falcon, ["dense"])) == 1
    assert len(projected(falcon, [r".*dense.*"])) == 3
    with pytest.raises(OptionError, match="meaning") as caught:  # mlp is a part of names, so dense could be one, too
        projected(falcon, ["mlp", "dense"])
    assert "'dense'" in str(caught.value.got)
    assert "dense_4h_to_h" in caught.value.got
    for regex in re.findall("'(.*?)' for", caught.value.way_out):
        assert projected(falcon, ["mlp", regex]) >= projected(falcon, ["mlp"])


@pytest.mark.parametrize(
    ("target_modules", "got", "way_out"),
    [
        (["attn", "nosuch"], "nosuch", ""),
        (["q_proj", "nosuch"], "nosuch", ""),
        ("attn", "attn", "[attn]"),
        (["layers.1"], "layers.10", "'layers.1.'"),
        (["*attn*"], "*attn*", ""),
        ([r".*\.Q_proj"], "Q_proj", ""),
    ],
)
def test_an_entry_without_one_meaning_is_refused(model: nn.Module, target_modules, got: str, way_out: str) -> None:
    with pytest.raises(OptionError) as caught:
        projected(model, target_modules)
    assert caught.value.option == "galore.target_modules"
    assert got in str(caught.value.got)
    assert way_out in caught.value.way_out


@pytest.mark.parametrize(
    ("target_modules", "way_out"),
    [
        ("all", "Write 'all-linear'."),
        ("all_linear", "Write 'all-linear'."),
        (["all-linear"], "Write 'all-linear'."),
        ("mlp,self_attn", "Write a list: [mlp, self_attn]."),
        ("q_proj, v_proj", "Write a list: [q_proj, v_proj]."),
        (["q_proj,v_proj"], "Write a list: [q_proj, v_proj]."),
        ([""], "Use 'all-linear' for all of them."),
        ("", "Use 'all-linear' for all of them."),
    ],
)
def test_the_words_of_other_programs_are_refused_before_there_is_a_model(target_modules, way_out: str) -> None:
    with pytest.raises(OptionError) as caught:
        GaLoreConfig(target_modules=target_modules)
    assert caught.value.way_out == way_out


def test_what_a_part_of_a_name_chose_may_stay_plain() -> None:
    small = llama(layers=1)
    small.model.layers[0].mlp.gate = nn.Linear(32, 2, bias=False)  # a router: smaller than the rank
    assert "model.layers.0.mlp.gate" not in projected(small, ["attn", "mlp"])
    with pytest.raises(OptionError, match="at most 2"):
        projected(small, ["mlp.gate"])
