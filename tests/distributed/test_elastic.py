"""A checkpoint of the third step goes on under another launch as the run that wrote it went on.

The checkpoints are those that ``test_backends`` trains for; fp32, gloo, no accelerator.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from galore_trainer import GaLoreAdamW, GaLoreConfig, OptionError, export_state, galore_plugin, import_state
from galore_trainer.hf.checkpoints import check_layout
from galore_trainer.hf.state_import import Weights, check_shapes

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed not installed")
SCRIPT = Path(__file__).with_name("script.py")
Launch = Callable[..., Any]


@pytest.fixture(scope="session")
def whole(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """What ``galore-ft state export`` makes of a backend's checkpoint."""
    return functools.cache(lambda *written: export_state(launch(*written).checkpoint, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize(
    ("processes", "backend", "written"),
    [
        pytest.param(1, "single", [(2, "zero2"), (2, "fsdp2"), (2, "ddp")], marks=needs_deepspeed),
        pytest.param(2, "ddp", [(2, "fsdp2"), (2, "zero3")], marks=needs_deepspeed),
        pytest.param(2, "zero3", [(2, "zero2"), (1, "single")], marks=needs_deepspeed),
        (2, "fsdp2", [(1, "single")]),
    ],
)
def test_checkpoints_go_on_elsewhere(
    processes: int, backend: str, written: list[Any], launch: Launch, whole: Launch, tmp_path: Path
) -> None:
    # what one process or DDP wrote is whole
    sources = tuple(launch(*w).checkpoint if w[1] in ("single", "ddp") else whole(*w) for w in written)
    there = launch(processes, backend, checkpoints=sources)
    for i, (each, source) in enumerate(zip(written, sources, strict=True)):
        assert_goes_on(launch(*each).found[0], there.found[i])
        if backend in ("zero3", "fsdp2"):  # nothing was lost on the way
            again = export_state(there.folder / f"{i}/imported/checkpoint-3", tmp_path / str(i))
            assert_same_numbers(source, again)


def test_fsdp2_itself_goes_on_in_one_process(launch: Launch) -> None:
    written = launch(2, "fsdp2")
    assert_goes_on(written.found[0], launch(1, "fsdp2", checkpoints=(written.checkpoint,)).found[0])


def assert_goes_on(written: Any, resumed: Any) -> None:
    for name, w in written["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_what_is_exported_is_what_one_process_saves(backend: str, launch: Launch, whole: Launch) -> None:
    alone, made = launch(1, "single").checkpoint, whole(2, backend)
    expected, found = (torch.load(path / "optimizer.pt", weights_only=True) for path in (alone, made))
    assert [g["names"] for g in found["param_groups"]] == [g["names"] for g in expected["param_groups"]]
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        own = found["state"][number]
        assert {k: getattr(v, "shape", v) for k, v in own.items()} == {
            k: getattr(v, "shape", v) for k, v in state.items()
        }
        torch.testing.assert_close(own["exp_avg"], state["exp_avg"], rtol=0, atol=1e-6)
    for name, w in load_file(alone / "model.safetensors").items():
        torch.testing.assert_close(load_file(made / "model.safetensors")[name], w, rtol=0, atol=1e-5)
    assert {path.name for path in made.iterdir()} >= {"scheduler.pt", "trainer_state.json", "rng_state.pth"}


def assert_same_numbers(one: Path, two: Path) -> None:
    states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (one, two)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        for key, value in state.items():
            other = states[1][number][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    assert all(torch.equal(w, second[name]) for name, w in first.items() if name in second)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def alone(odd_model: Path, tmp_path: Path) -> Launch:
    """Go on from a checkpoint on one process, this one, with other settings."""
    spec = importlib.util.spec_from_file_location("distributed_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return lambda checkpoint, **settings: script.train(
        "single", str(odd_model), str(tmp_path / "alone"), settings, str(checkpoint)
    )


@needs_deepspeed
def test_a_direct_resume_elsewhere_names_the_way_out(launch: Launch, alone: Launch) -> None:
    """The Trainer itself would go on with an optimizer that knows nothing."""
    checkpoint = launch(2, "zero2").checkpoint
    with pytest.raises(OptionError, match=r"at step 3 whose optimizer has no state.*galore-ft state export"):
        alone(checkpoint)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(is_zero3=lambda: False))
    check_layout(checkpoint, SimpleNamespace(deepspeed_plugin=plugin, world_size=2))
    named = SimpleNamespace(resume_from_checkpoint=str(checkpoint))
    for args, words in (
        (SimpleNamespace(deepspeed_plugin=plugin, world_size=1), "ZeRO-1 or 2 on 1.*ZeRO-1 or 2 on 2"),
        (SimpleNamespace(fsdp=True), "under fsdp.*under deepspeed"),
        (named, "under ddp.*under deepspeed"),
    ):
        with pytest.raises(OptionError, match=f"{words}.*galore-ft state export {checkpoint}"):
            check_layout(checkpoint, args)
    with pytest.raises(OptionError, match="galore-ft state export"):
        galore_plugin(GaLoreConfig(), named)


def test_other_settings_are_refused(whole: Launch, alone: Launch) -> None:
    with pytest.raises(OptionError, match=r"galore\.head_sharing: got 'joint', wanted 'shared' as in the checkpoint"):
        alone(whole(2, "fsdp2"), head_sharing="joint")


def test_an_import_asks_for_a_whole_checkpoint_and_a_backend_that_cuts(
    launch: Launch, odd_model: Path, tmp_path: Path
) -> None:
    trainer: Any = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path), save_only_model=False))
    with pytest.raises(OptionError, match="galore-ft state export"):
        import_state(trainer, launch(2, "fsdp2").checkpoint)
    checkpoint = launch(2, "ddp").checkpoint
    with pytest.raises(OptionError, match=f"resume from {checkpoint} itself"):
        import_state(trainer, checkpoint)
    trainer.args.fsdp = True
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(OptionError, match="a folder without checkpoints"):
        import_state(trainer, checkpoint)


def test_weights_of_another_model_are_refused_before_anything_is_taken(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    check_shapes(torch.nn.Linear(2, 3), Weights(tmp_path))
    with pytest.raises(OptionError, match=r"weight of shape \[3, 2\].*wanted shape \[4, 2\].*same model"):
        check_shapes(torch.nn.Linear(2, 4), Weights(tmp_path))
    with pytest.raises(OptionError, match=r"no weight 0\.weight"):
        check_shapes(torch.nn.Sequential(torch.nn.Linear(2, 3)), Weights(tmp_path))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"proj_type": "std"}, "proj_type std.*wanted proj_type right.*cut, unless it began with proj_type right"),
        ({"layerwise": True}, "layerwise True.*Layer-wise mode runs alone and under DDP"),
    ],
)
def test_what_only_whole_weights_can_go_on_with_is_told(settings: dict[str, Any], says: str) -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    groups = [{"params": [model.weight], "names": ["w"], "projected": True}]
    whole = GaLoreAdamW([dict(group) for group in groups], GaLoreConfig(rank=2, **settings))
    cut = GaLoreAdamW([dict(group) for group in groups], GaLoreConfig(rank=2, proj_type="right"))
    if "layerwise" in settings:
        whole.param_groups[0]["galore"]["proj_type"] = "right"
    with pytest.raises(OptionError, match=says):
        cut.load_whole(whole.state_dict(), {})


def damaged(checkpoint: Path, tmp_path: Path, *patterns: str) -> Path:
    folder = Path(shutil.copytree(checkpoint, tmp_path / f"damaged{len(list(tmp_path.iterdir()))}"))
    for pattern in patterns:
        for path in list(folder.glob(pattern)):
            path.unlink()
    return folder


@needs_deepspeed
def test_missing_files_are_named(launch: Launch, tmp_path: Path) -> None:
    for backend, pattern, words in (
        ("zero2", "global_step3/zero_pp_rank_1_*", "the files of all processes"),
        ("zero2", "global_step3/*_optim_states.pt", "DeepSpeed ZeRO-1, 2 or 3"),
        ("zero3", "global_step3/*_model_states.pt", r"no \*_model_states.pt"),
        ("fsdp2", "optimizer_0/__1_0.distcp", "with all of its files"),
        ("ddp", "model.safetensors", "no model.safetensors"),
        ("ddp", "optimizer.pt", "optimizer.pt"),
        ("ddp", "scheduler.pt", "no scheduler.pt"),
    ):
        folder = damaged(launch(2, backend).checkpoint, tmp_path, pattern)
        with pytest.raises(OptionError, match=words):
            export_state(folder, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(OptionError, match="no such folder"):
        export_state(tmp_path / "nothing", tmp_path / "never")


@needs_deepspeed
def test_the_universal_format_and_other_optimizers_are_refused(launch: Launch, tmp_path: Path) -> None:
    folder = damaged(launch(2, "zero2").checkpoint, tmp_path)
    (folder / "global_step3" / "zero").mkdir()
    with pytest.raises(OptionError, match="universal format"):
        export_state(folder, tmp_path / "never")
    args = SimpleNamespace(
        deepspeed="x", hf_deepspeed_config=SimpleNamespace(config={"checkpoint": {"load_universal": True}})
    )
    with pytest.raises(OptionError, match=r"load_universal.*galore-ft state export"):
        galore_plugin(GaLoreConfig(), args)
    folder = damaged(launch(2, "ddp").checkpoint, tmp_path)
    model = torch.nn.Linear(2, 2)
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), folder / "optimizer.pt")
    with pytest.raises(OptionError, match="GaLoreAdamW"):
        export_state(folder, tmp_path / "never")


def test_a_folder_that_is_taken_is_left_alone(whole: Launch) -> None:
    made = whole(2, "fsdp2")
    with pytest.raises(OptionError, match="without checkpoint-3"):
        export_state(made, made.parent)
