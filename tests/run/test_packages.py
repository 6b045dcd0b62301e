"""Optimizers of other packages: they take the steps of the package used by hand, and take the memory that is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.run.launching.plan import learning_rates
from galore_trainer.run.memory.estimate import estimate_one, method_settings
from galore_trainer.run.memory.simulate import LiveBytes
from galore_trainer.run.results.figures import state_bytes
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.run_config import RunConfig, load_run_config
from galore_trainer.run.training.packages import PACKAGES, PackageFactory
from galore_trainer.run.training.train import train

Run = Callable[..., RunConfig]
LR, RANK, GAP = 1e-2, 4, 2
IDS = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
LINEAR = ("self_attn", "mlp")


def needs(method: str) -> Any:
    return pytest.importorskip(str(METHODS[method].package), reason=f"extra {METHODS[method].extra} is not installed")


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def split(model: Any) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Weights that are projected, and all others."""
    linear = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    inside = {id(p) for p in linear}
    return linear, [p for p in model.parameters() if id(p) not in inside]


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int = 5) -> Iterator[float]:
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def by_hand(method: str, package: Any, model: Any) -> torch.optim.Optimizer:
    """The optimizer as the package's own documentation makes it."""
    linear, others = split(model)
    if method == "fira":
        groups = package.divide_params(model, target_modules_list=LINEAR, rank=RANK, update_proj_gap=GAP, alpha=0.5)
        return package.FiraAdamW(groups, lr=LR, no_deprecation_warning=True)
    projected = {"params": linear, "rank": RANK, "update_proj_gap": GAP, "scale": 0.5, "proj_type": "std"}
    if method == "apollo":  # seeds its projections by the order of the parameters
        projected |= {"proj": "random", "scale_type": "channel"}
        return package.APOLLOAdamW([projected, {"params": others}], lr=LR)
    return package.GaLoreAdamW([projected, {"params": others}], lr=LR, no_deprecation_warning=True)


@pytest.mark.parametrize("method", PACKAGES)
def test_it_takes_the_steps_of_the_package_used_by_hand(method: str, tiny_model_dir: Path) -> None:
    package = needs(method)
    ours, theirs = model_of(tiny_model_dir), model_of(tiny_model_dir)
    config = GaLoreConfig(rank=RANK, update_proj_gap=GAP, scale=0.5, plain_lr_ratio=1.0, head_sharing="joint")
    adam: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-6}  # the packages' own
    mine = PackageFactory()(ours, method=method, config=config, **adam)
    losses = list(steps(ours, mine))
    assert losses == list(steps(theirs, by_hand(method, package, theirs)))
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert mine.stopwatch.seconds()["refresh"] > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", PACKAGES)
@pytest.mark.parametrize(("vocabulary", "dtype"), [(1024, torch.float32), (16, torch.bfloat16)])
def test_its_state_and_its_step_take_what_the_estimate_says(
    method: str, vocabulary: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Once the embeddings are what is largest, once the weights of the layers."""
    needs(method)
    llama = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    llama.save_pretrained(tmp_path)
    words = [f"model_name_or_path={tmp_path}", "data.source=a.jsonl", "use_cpu=true", "bf16=false", "max_length=8"]
    config = load_run_config("sft", [*words, f"dtype={str(dtype).removeprefix('torch.')}"], {"galore.rank": RANK})
    told = estimate_one(config, method, RANK)
    model = AutoModelForCausalLM.from_config(llama, dtype=dtype)
    settings = dataclasses.replace(method_settings(config.galore, method, RANK), scale=1.0)
    adam: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = PackageFactory()(model, method=method, config=settings, **adam)
    ids = IDS % vocabulary
    for step in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        live = LiveBytes()
        live.count([[p, p.grad] for p in model.parameters()])
        for state in optimizer.state.values():
            live.count([*state.values(), getattr(state.get("projector"), "ortho_matrix", None)])
        before = live.now
        with live if step else torch.enable_grad():
            optimizer.step()
    assert live.peak - before == pytest.approx(told.step, rel=0.02)  # scalars and the norms of lines besides
    assert state_bytes(optimizer) == told.state


@pytest.mark.parametrize("method", ["apollo", "fira"])
def test_it_trains_by_the_command_s_code_and_is_not_resumed(method: str, short_run: Run) -> None:
    needs(method)
    config = short_run(method=method, learning_rate=5e-3, eval={"max_new_tokens": 4, "before": True})
    result = train(config).result
    assert result["score_after"]["eval_loss"] < result["score_before"]["eval_loss"]
    assert result["seconds"]["refresh"] > 0
    assert set(result["optimizer_state_bytes"]) == {"basis", "moments", "plain"}
    start = load_file(Path(config.model_name_or_path) / "model.safetensors")
    end = load_file(Path(config.output_dir) / "model" / "model.safetensors")
    assert all((end[name] - start[name]).abs().max() > 0 for name in start)
    with pytest.raises(OptionError, match=rf"method '{method}'.*--method galore_plus") as error:
        train(config, resume="auto")
    assert error.value.option == "resume"


@pytest.mark.parametrize("method", ["apollo", "fira"])
def test_its_scale_begins_at_1_and_may_be_chosen(method: str, short_run: Run) -> None:
    assert short_run(method=method).galore.scale == 1.0
    chosen = short_run(method=method, galore={"scale": 16})
    rate = 1e-3 * 16 ** METHODS[method].scale_power
    assert f"projected weights 0.001 x {rate / 1e-3:g} = {rate:g}" in learning_rates(chosen, 1e-3)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("apollo", "proj_type", "right"),
        ("apollo", "svd", "exact"),
        ("apollo", "warm_start", True),
        ("fira", "proj_type", "left"),
        ("fira", "svd", "randomized"),
        ("fira", "residual_percent", 1.2),
        ("fira", "layerwise", True),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(method: str, key: str, value: object, short_run: Run) -> None:
    with pytest.raises(OptionError, match=rf"which is what method '{method}' means") as error:
        short_run(method=method, galore={key: value})
    assert error.value.option == f"galore.{key}"
