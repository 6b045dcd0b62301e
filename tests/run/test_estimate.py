"""Memory told beforehand: what is counted on fake tensors is what real tensors take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError
from galore_trainer.run.memory.estimate import CHOICES, LAYERWISE, as_table, estimate, estimate_one
from galore_trainer.run.memory.per_process import BUCKET, Layout, layout_of, sizes_of
from galore_trainer.run.memory.simulate import LiveBytes
from galore_trainer.run.settings.run_config import load_run_config

HIDDEN, LAYERS, VOCABULARY = 128, 2, 512
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


@pytest.fixture
def brief_runs() -> None:
    """Runs count their memory."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of which nothing but its configuration is there."""
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def configure(folder: Path, *more: str) -> Any:
    words = [f"model_name_or_path={folder}", "max_length=64", "per_device_train_batch_size=2", "galore.rank=8"]
    words += ["data.source=a.jsonl", "use_cpu=true", "bf16=false", "gradient_accumulation_steps=1"]
    more = more if "gradient_checkpointing=true" in more else (*more, "gradient_checkpointing=false")
    return load_run_config("sft", [*words, *more])


def count(config: Any) -> int:
    one = HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + HIDDEN * HIDDEN + 3 * HIDDEN * 192 + 2 * HIDDEN
    return LAYERS * one + HIDDEN + 2 * VOCABULARY * HIDDEN


def test_weights_gradients_and_state_are_those_of_the_formulas(folder: Path) -> None:
    config = configure(folder)
    rows = {row.method: row.memory for row in estimate(config)}
    assert list(rows) == list(CHOICES)
    elements = count(config)
    adamw = rows["adamw"]
    assert adamw.weights == pytest.approx(4 * elements, rel=0.001)  # and the buffers of the rotary embedding
    assert adamw.gradients == 4 * elements
    assert adamw.state == {"plain": 8 * elements}
    assert rows["adamw_8bit"].state["plain"] < 0.6 * adamw.state["plain"]
    assert rows["lora"].gradients < 0.5 * adamw.gradients
    assert rows["galore"].state["residual"] == 0 < rows["galore_plus"].state["residual"]
    assert rows["galore_plus"].state["plain"] == 8 * (2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN) + 16 * (
        2 + 2 * LAYERS + 1
    )
    assert rows[LAYERWISE].gradients < rows["galore_plus"].gradients
    assert rows[LAYERWISE].state["residual"] > rows["galore_plus"].state["residual"]  # sparse in place of scaled
    assert all(row.peak is not None for row in rows.values())


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("more", [(), ("gradient_checkpointing=true",), ("dtype=bfloat16", "galore.state_bits=8")])
def test_what_is_counted_on_fake_tensors_is_what_real_ones_take(
    layerwise: bool, more: tuple[str, ...], folder: Path
) -> None:
    """The same step on real tensors, counted by the same storages: nothing depends on the numbers in them."""
    from transformers import AutoModelForCausalLM

    from galore_trainer.hf.build import galore_groups
    from galore_trainer.optim.galore_adamw import GaLoreAdamW
    from galore_trainer.run.memory.estimate import method_settings

    config = configure(folder, *more, "galore.residual_warmup_steps=1", "galore.update_proj_gap=1000")
    method = LAYERWISE if layerwise else "galore_plus"
    told = estimate_one(config, method, 8)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=getattr(torch, config.dtype)).train()
    if "gradient_checkpointing=true" in more:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = method_settings(config.galore, method, 8)
    optimizer = GaLoreAdamW(galore_groups(model, settings, lr=1e-3, weight_decay=0.0), settings, lr=1e-3)
    ids = torch.randint(0, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    live = LiveBytes()
    # under checkpointing little else is left than a layer's attention, whose causal mask only fake tensors need
    close = 0.07 if "gradient_checkpointing=true" in more else 0.02
    for step in range(3 if layerwise else 2):
        if step == 1 and layerwise:  # the first whole gradient of every weight, so that the residual begins
            for p, state in ((p, s) for p, s in optimizer.state.items() if "due" in s):
                assert p.grad is None
                state["due"] = 0
        last = step == (2 if layerwise else 1)
        if last and layerwise:  # one weight of 14 is due in a step
            largest = max(optimizer.state, key=lambda p: p.numel() if "due" in optimizer.state[p] else 0)
            optimizer.state[largest]["due"] = 0
        with live if last else torch.enable_grad():
            live.count([*model.parameters(), *model.buffers(), *optimizer.state.values()])
            base = live.now
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
            assert not last or live.peak - base == pytest.approx(told.gradients + told.backward, rel=close)
            assert not last or live.now - base == pytest.approx(told.gradients, rel=0.01)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state_bytes() == told.state


def test_the_command_prints_a_row_for_each_method_and_rank(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "sft", "data.source=a.jsonl", f"model_name_or_path={folder}", "use_cpu=true", "max_length=32"]
    assert main([*words, "--methods", "adamw,galore_plus,layerwise", "--ranks", "4,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("adamw ")
    assert len(lines) == 1 + 1 + 2 + 2
    assert main([*words, "--methods", "sgd"]) == 2
    assert "--methods: got 'sgd', wanted some of adamw" in capsys.readouterr().err
    assert main([*words, "--ranks", "many"]) == 2
    assert main([*words, "--ranks", "4000", "--methods", "galore_plus"]) == 2


def test_a_model_that_cannot_run_so_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def forward(self: Any, **inputs: Any) -> Any:
        return self.lm_head(torch.zeros(1, HIDDEN))[0, 0].item()

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    (row,) = estimate(configure(folder), ["galore_plus"])
    assert row.memory.peak is None
    assert row.memory.gradients == 4 * count(None)
    (layerwise,) = estimate(configure(folder), [LAYERWISE])
    assert layerwise.memory.gradients < row.memory.gradients
    text = as_table([row])
    assert "activations could not be counted" in text
    assert text.splitlines()[1].split()[-1] == "-"


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(OptionError, match="transformers can read"):
        estimate(configure(tmp_path), ["adamw"])


def test_inspect_shows_the_plan_and_refuses_what_training_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(folder), "galore.rank=8", "galore.embeddings=frozen", "galore.scale=10"]) == 0
    text = capsys.readouterr().out
    assert "2 x model.layers.*.self_attn.k_proj" in text
    assert "2, one lends" in text
    assert "lr x 10" in text
    assert {line.split()[1] for line in text.splitlines() if line.startswith(("lm_head", "model.embed"))} == {"frozen"}
    assert main(["inspect", str(folder), "galore.rank=4000"]) == 2
    assert "galore.rank: got 4000, wanted at most 128" in capsys.readouterr().err


def test_a_finished_run_tells_what_was_predicted(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [
        "train",
        "quickstart",
        f"model_name_or_path={tiny_model_dir}",
        "max_steps=2",
        "galore.rank=4",
        "data.train_samples=20",
        "data.eval_samples=2",
        "eval.before=false",
        "use_cpu=true",
    ]
    assert main([*words, "bf16=false", "eval.max_new_tokens=4", "--output-dir", str(out)]) == 0
    told = json.loads((out / "result.json").read_text())["predicted_memory"]
    assert told["peak_bytes"] > told["weights_bytes"] > 0
    assert told["note"] == ""
    assert 10 < told["length"] <= 256


def test_ddp_has_buckets_for_the_gradients_that_it_averages(folder: Path) -> None:
    config, plain = configure(folder), 4 * (2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN)
    for method, buckets in (("adamw", 4 * count(config)), ("galore_plus", 4 * count(config)), (LAYERWISE, plain)):
        alone, one = estimate_one(config, method, 8), estimate_one(config, method, 8, Layout("ddp", 2))
        assert one.gradients - alone.gradients == buckets, method
        assert one.peak is not None
        assert alone.peak is not None
        assert one.peak - alone.peak == buckets
        assert estimate_one(config, method, 8, Layout("ddp", 1)) == alone


@pytest.mark.parametrize("processes", [2, 5])
def test_fsdp_cuts_everything_but_bases_and_what_is_gathered(folder: Path, processes: int) -> None:
    config = configure(folder, "galore.proj_type=right")
    layer = (count(config) - (2 * VOCABULARY + 1) * HIDDEN) // LAYERS
    gathered = 4 * ((2 * VOCABULARY + 1) * HIDDEN + 4 * layer)
    alone, one = (estimate_one(config, "galore_plus", 8, layout) for layout in (None, Layout("fsdp2", processes)))
    assert one.weights == alone.weights // processes
    assert one.gradients == alone.gradients // processes
    assert one.state["basis"] == alone.state["basis"]
    assert one.state["plain"] == alone.state["plain"] // processes
    assert one.backward is not None
    assert alone.backward is not None
    assert one.backward - alone.backward == gathered


def test_zero_adds_master_weights_and_cuts_stage_by_stage(folder: Path) -> None:
    config = configure(folder, "dtype=bfloat16")
    elements = count(config)
    bucket = 2 * min(BUCKET, elements)
    for stage, weights, gradients in (
        (1, 2 * elements, 2 * elements),
        (2, 2 * elements, elements),
        (3, elements, elements + bucket),
    ):
        one = estimate_one(config, "adamw", 0, Layout(f"zero{stage}", 2))
        assert one.weights == pytest.approx(weights + 2 * elements, rel=0.002)  # rotary buffers
        assert one.gradients == gradients
        assert one.state == {"plain": 4 * elements}  # two float32 moments, cut in two
        assert one.step == 2 * elements  # the optimizer's float32 gradient


def test_what_a_launch_refuses_is_not_counted(folder: Path) -> None:
    config = configure(folder)
    assert [row.method for row in estimate(config, layout=Layout("zero2", 2))] == ["adamw", "galore", "galore_plus"]
    assert len(estimate(config, layout=Layout("ddp", 2))) == len(CHOICES)
    for method, layout in (("lora", "fsdp2"), (LAYERWISE, "zero3")):
        with pytest.raises(OptionError):
            estimate(config, [method], layout=Layout(layout, 2))
    with pytest.raises(OptionError, match="state_bits"):
        estimate(configure(folder, "galore.state_bits=8"), ["galore_plus"], layout=Layout("fsdp2", 2))
    with pytest.raises(OptionError, match="one of ddp"):
        layout_of("megatron", 2)
    with pytest.raises(OptionError, match="at least 1"):
        layout_of("ddp", 0)


def test_frozen_embeddings_have_no_gradients_on_several_processes_either(folder: Path) -> None:
    config = configure(folder, "galore.embeddings=frozen", "galore.kernels=triton")  # kernels are not counted
    embeddings = 2 * VOCABULARY * HIDDEN
    one, two = estimate_one(config, "galore_plus", 8), estimate_one(config, "galore_plus", 8, Layout("ddp", 2))
    assert two.gradients - one.gradients == 4 * (count(config) - embeddings)
    zero = estimate_one(
        configure(folder, "galore.embeddings=frozen", "dtype=bfloat16"), "galore_plus", 8, Layout("zero2", 2)
    )
    assert zero.weights == pytest.approx(2 * count(config) + 2 * (count(config) - embeddings), rel=0.002)


def test_layers_are_counted_once() -> None:
    class Inner(torch.nn.Linear):
        pass

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = Inner(3, 3, bias=False), torch.nn.Linear(1, 2, bias=False)

    class Model(torch.nn.Module):
        _no_split_modules = ("Outer", "Inner")

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = torch.nn.Linear(5, 1, bias=False), torch.nn.ModuleList([Outer(), Outer()])

    sizes = sizes_of(Model())
    assert (sizes.trained, sizes.layer, sizes.outside) == (27, 11, 5)
    alone = sizes_of(torch.nn.Linear(4, 4, bias=False))
    assert (alone.trained, alone.layer, alone.outside) == (16, 0, 16)
