"""Starting a run on several processes: the command, what is refused beforehand, and real runs on two CPU processes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from forked import start_python
from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError
from galore_trainer.hf.checkpoints import written_by
from galore_trainer.run.launching import launch
from galore_trainer.run.launching.checkpoints import damage
from galore_trainer.run.launching.distributed import check_sharding, check_trainer
from galore_trainer.run.launching.launch import CONFIG, PROCESSES, Launch, plan_launch, without_launch_options
from galore_trainer.run.settings.run_config import RunConfig, packaged_configs
from galore_trainer.run.training.train import train

Run = Callable[..., RunConfig]
NAMES = sorted(packaged_configs("launch"))


def plan(config: RunConfig, processes: int | None = None, name: str | None = None) -> Launch | None:
    return plan_launch(config, num_processes=processes, launch_config=name)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device_type", lambda use_cpu=False: "cpu" if use_cpu else "cuda")
    monkeypatch.setattr(launch, "_device_count", lambda: 4)


@pytest.mark.parametrize(
    "words",
    [
        "train gsm8k --num-processes 4 --launch-config zero3 --rank 8 a=b",
        "train --num-processes=4 gsm8k --launch-config=zero3 --rank 8 a=b",
        "train gsm8k --rank 8 --launch-config fsdp2 a=b --num-processes 2",
    ],
)
def test_the_processes_get_the_same_words_without_the_two_options(words: str) -> None:
    assert without_launch_options(words.split()) == ["train", "gsm8k", "--rank", "8", "a=b"]


def test_words_after_two_hyphens_are_left_alone() -> None:
    words = ["train", "--num-processes", "2", "--", "--launch-config", "x"]
    assert without_launch_options(words) == ["train", "--", "--launch-config", "x"]


def test_the_number_alone_means_ddp_and_the_name_alone_all_gpus(short_run: Run, four_gpus: None) -> None:
    config = short_run(use_cpu=False)
    assert plan(config) is None
    some, whole = plan(config, 2), plan(config, None, "fsdp2")
    assert some is not None
    assert whole is not None
    assert (some.name, some.backend, some.processes) == ("ddp", "ddp", 2)
    assert (whole.backend, whole.processes, whole.on_cpu) == ("fsdp", 4, False)
    command = whole.command(["train", "x.yaml", CONFIG, "fsdp2"])
    assert command == [
        "--config_file",
        str(whole.file),
        "--num_processes",
        "4",
        "--module",
        "galore_trainer.cli",
        "train",
        "x.yaml",
    ]
    assert set(whole.environment({"PATH": "/bin"})) == {"PATH"}


def test_on_a_cpu_the_cores_are_shared(short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    found = plan(short_run(), 2)
    assert found is not None
    assert found.environment({})["OMP_NUM_THREADS"] == "4"
    assert found.environment({})["DS_ACCELERATOR"] == "cpu"
    assert "OMP_NUM_THREADS" not in found.environment({"OMP_NUM_THREADS": "3"})


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_packaged_configurations(name: str, short_run: Run, four_gpus: None) -> None:
    text = packaged_configs("launch")[name]
    assert text.startswith("# ")
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    found = plan(short_run(use_cpu=False), 3, name)
    assert found is not None
    assert found.backend == {"d": "ddp", "f": "fsdp", "z": "deepspeed"}[name[0]]
    assert "optimizer" not in yaml.safe_load(text).get("deepspeed_config", {})


def test_a_configuration_of_one_s_own_brings_its_number(short_run: Run, tmp_path: Path, four_gpus: None) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    found = [plan(short_run(use_cpu=False), number, str(path)) for number in (None, 2)]
    assert [launch.processes for launch in found if launch] == [3, 2]


@pytest.mark.parametrize(
    ("processes", "name", "option", "words"),
    [
        (2, "zer03", CONFIG, "Did you mean 'zero3'"),
        (2, "missing/file.yaml", CONFIG, "ddp, fsdp2, zero1"),
        (0, None, PROCESSES, "at least 1"),
        (-2, "ddp", PROCESSES, "at least 1"),
        (5, "ddp", PROCESSES, "at most 4.*use_cpu=true"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    short_run: Run, four_gpus: None, processes: int, name: str | None, option: str, words: str
) -> None:
    with pytest.raises(OptionError, match=words) as error:
        plan(short_run(use_cpu=False), processes, name)
    assert error.value.option == option


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1e-4\n", "distributed_type"),
        ("distributed_type: FSDP\nfsdp_sort: 3\n", "unknown keys.*fsdp_sort"),
        ("[1, 2", "accelerate config"),
        ("just words", "accelerate config"),
        ("distributed_type: MULTI_CPU\n", "Use --launch-config ddp"),
        ("distributed_type: 'NO'\n", "MULTI_GPU, FSDP or DEEPSPEED"),
    ],
)
def test_a_file_that_is_no_launch_configuration_is_refused(
    short_run: Run, tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=words):
        plan(short_run(), 2, str(path))


def test_a_cpu_has_no_fsdp_and_no_number_of_its_own(short_run: Run) -> None:
    with pytest.raises(OptionError, match=r"accelerate runs FSDP on them alone.*zero3 or ddp"):
        plan(short_run(), 2, "fsdp2")
    with pytest.raises(OptionError, match="Add --num-processes 2"):
        plan(short_run(), None, "ddp")


def test_a_launch_inside_a_launch_is_refused(short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan(short_run()) is None
    for processes, name, option in ((2, None, PROCESSES), (None, "zero2", CONFIG)):
        with pytest.raises(OptionError, match=f"WORLD_SIZE=2.*leave out {option}"):
            plan(short_run(), processes, name)


def test_deepspeed_is_named_where_it_is_missing(short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else found(name))
    with pytest.raises(OptionError, match=r"pip install 'galore-trainer\[deepspeed\]'"):
        plan(short_run(), 2, "zero2")


def test_a_method_that_needs_whole_weights_is_refused_before_the_launch(short_run: Run, four_gpus: None) -> None:
    with pytest.raises(OptionError, match=r"method 'lora'.*--launch-config ddp"):
        plan(short_run(method="lora", use_cpu=False), 2, "fsdp2")


def test_show_config_and_dry_run_launch_nothing(
    short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "run_launch", lambda *_: pytest.fail("launched"))
    path = tmp_path / "run.yaml"
    path.write_text(short_run().to_yaml())
    assert main(["train", str(path), PROCESSES, "3", "--show-config"]) == 0
    assert main(["train", str(path), PROCESSES, "3", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "3 processes, ddp" in told
    assert "6 steps of 6 examples each" in told
    assert main(["train", str(path), PROCESSES, "0", "--dry-run"]) == 2


def test_a_folder_that_is_taken_is_refused_before_the_launch(
    short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "run_launch", lambda *_: pytest.fail("launched"))
    config = short_run()
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "something").touch()
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert main(["train", str(path), PROCESSES, "2"]) == 2


# ------------------------------------------------------------------------------------------ what sharding changes


def sharded(stage: int | None, gather: bool = True, world: int = 2) -> Any:
    zero = SimpleNamespace(is_zero3=lambda: stage == 3, get_value=lambda key: gather)
    plugin = None if stage is None else SimpleNamespace(hf_ds_config=zero)
    return SimpleNamespace(deepspeed_plugin=plugin, world_size=world)


def test_a_checkpoint_is_refused_under_another_backend_or_number(tmp_path: Path) -> None:
    state = tmp_path / "checkpoint-3" / "global_step3"
    state.mkdir(parents=True)
    for rank in (0, 1):
        (state / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check_sharding(sharded(2), state.parent)
    with pytest.raises(OptionError, match=r"ZeRO-1 or 2 on 4.*ZeRO-1 or 2 on 2.*galore-ft state export"):
        check_sharding(sharded(2, world=4), state.parent)
    with pytest.raises(OptionError, match=r"ZeRO-3 on 2.*ZeRO-1 or 2 on 2, which wrote it"):
        check_sharding(sharded(3), state.parent)
    with pytest.raises(OptionError, match=r"under ddp.*under deepspeed, which wrote it"):
        check_sharding(sharded(None), state.parent)
    for name, backend in (("optimizer.pt", "ddp"), ("optimizer_0", "fsdp"), ("optimizer.bin", "fsdp")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        assert written_by(folder) == backend


def test_zero3_without_a_whole_model_at_the_end_is_refused_at_the_start() -> None:
    check_sharding(sharded(2, gather=False), None)
    with pytest.raises(OptionError, match="zero3_save_16bit_model: true"):
        check_sharding(sharded(3, gather=False), None)


def test_a_backend_that_accelerate_drops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="MULTI_CPU"))
    trainer: Any = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")), accelerator=accelerator)
    with pytest.raises(OptionError, match=r"fsdp on cpu.*MULTI_CPU.*needs GPUs"):
        check_trainer(trainer)


# ------------------------------------------------------------------------------------------ two processes


@pytest.fixture
def galore_ft(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command and return what it prints; its launcher forks the processes where it is told to."""

    def run(*words: str, forked: bool = True) -> str:
        with monkeypatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            if forked:
                patch.setattr(subprocess_handler, "Popen", start_python)
            code = main(words)
        told = capfd.readouterr()
        assert code == 0, told.out + told.err
        return told.out

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_equals_one_process(run: Path, alone: RunConfig) -> None:
    """The whole batch on one process gives the same model and the same score."""
    result = train(alone).result
    told = json.loads((run / "result.json").read_text())
    assert told["score_after"]["eval_loss"] == pytest.approx(result["score_after"]["eval_loss"], abs=1e-4)
    assert told["parameters"] == result["parameters"]
    assert told["processes"] == 2
    expected = weights(Path(alone.output_dir))
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, expected.get(name, weight), atol=1e-4, rtol=0)


SETTINGS = {"max_steps": 4, "save_steps": 2, "adam_epsilon": 1e-5}


@pytest.mark.alone
def test_ddp_trains_the_model_of_one_process(short_run: Run, galore_ft: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    samples = {"max_new_tokens": 4, "before": False, "samples": 2}
    path.write_text(short_run("two", **SETTINGS, eval=samples).to_yaml())
    told = galore_ft("train", str(path), PROCESSES, "2", forked=False)
    assert f"accelerate launch --config_file {launch._find('ddp')} --num_processes 2" in told
    assert told.count("step 4/4") == 1
    rows = map(json.loads, (tmp_path / "two" / "log.jsonl").read_text().splitlines())
    assert [(row["step"], len(row["samples"])) for row in rows if "samples" in row] == [(0, 2), (2, 2), (4, 2)]
    assert_equals_one_process(tmp_path / "two", short_run("one", **SETTINGS, per_device_train_batch_size=4))


@pytest.mark.alone
def test_zero3_trains_scores_saves_and_resumes_a_whole_model_which_goes_on_elsewhere(
    short_run: Run, galore_ft: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deepspeed")
    path, run = tmp_path / "run.yaml", tmp_path / "two"
    settings = {**SETTINGS, "galore": {"rank": 4, "update_proj_gap": 2, "proj_type": "right"}}
    path.write_text(short_run("two", **settings, eval={"max_new_tokens": 4, "before": True}).to_yaml())
    words = ["train", str(path), PROCESSES, "2", CONFIG, "zero3"]
    galore_ft(*words)
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 4
    before = json.loads((run / "score_before.json").read_text())["eval_loss"]
    assert json.loads((run / "result.json").read_text())["score_after"]["eval_loss"] < before
    whole = weights(run)
    assert_equals_one_process(run, short_run("one", **settings, per_device_train_batch_size=4))

    shutil.rmtree(run / "checkpoint-4")
    told = galore_ft(*words, "--resume", "auto")
    assert f"resuming from {run / 'checkpoint-2'}" in told
    assert all(torch.equal(whole[name], again) for name, again in weights(run).items())

    # on one process, by way of a whole checkpoint, and from there under ZeRO-2
    elsewhere = str(tmp_path / "elsewhere")
    assert main(["state", "export", str(run / "checkpoint-2"), elsewhere]) == 0
    going_on = ["train", str(path), f"output_dir={elsewhere}", "per_device_train_batch_size=4", "--resume", "auto"]
    assert main(going_on) == 0
    third = [str(path), f"output_dir={tmp_path / 'third'}", PROCESSES, "2", CONFIG, "zero2"]
    told = galore_ft("state", "import", f"{elsewhere}/checkpoint-2", *third)
    assert f"{tmp_path / 'third' / 'checkpoint-2'}: galore-ft train goes on" in told
    assert damage(tmp_path / "third" / "checkpoint-2") is None
    assert written_by(tmp_path / "third" / "checkpoint-2") == "deepspeed"
    for name, weight in weights(Path(elsewhere)).items():
        torch.testing.assert_close(weight, whole[name], atol=1e-4, rtol=0)
    for words, told in (
        (["export", str(tmp_path / "nothing"), elsewhere], "There is no such folder"),
        (["import", str(run / "checkpoint-2"), *third], "galore-ft state export"),
        (["import", f"{elsewhere}/checkpoint-2", str(path), PROCESSES, "2"], "--resume"),
    ):
        assert main(["state", *words]) == 2
        assert told in capfd.readouterr().err
