"""A whole run: files, resume, Ctrl-C, damaged checkpoints, a full disk, folders that are taken."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forked import python
from galore_trainer.errors import OptionError
from galore_trainer.run.launching.checkpoints import choose_checkpoint, damage, seal
from galore_trainer.run.settings.run_config import RunConfig, load_run_config
from galore_trainer.run.training.train import train
from times import times


def make_config(model: Path, output: Path, **more: Any) -> RunConfig:
    settings = {
        "model_name_or_path": str(model),
        "output_dir": str(output),
        "max_length": 400,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "galore": {"rank": 4, "update_proj_gap": 2},
        "data": {"source": "embedded:arithmetic", "train_samples": 40, "eval_samples": 4},
        "eval": {"max_new_tokens": 4},
    }
    return RunConfig.from_dict({**settings, **more})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    train(make_config(tiny_model_dir, output))
    return output


def test_a_run_leaves_everything_that_tells_what_it_did(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["method"] == "galore_plus"
    assert result["steps"] == 6
    assert result["seed"] == 5
    seconds = result["seconds"]
    parts = seconds["forward_backward"] + seconds["refresh"] + seconds["update"]
    assert parts == pytest.approx(seconds["training"])
    assert min(seconds.values()) > 0
    assert {"basis", "moments", "residual", "plain"} == set(result["optimizer_state_bytes"])
    assert 0 < result["parameters"]["trained"] <= result["parameters"]["total"]
    assert result["learning_rate"] == 1e-3
    assert 0 < result["projection_error"]["mean"] < 1
    assert len(result["projection_error"]["by_matrix"]) == 14
    for when in ("score_before", "score_after"):
        assert result[when]["n"] == 4
        assert result[when]["eval_loss"] > 0
    assert result["score_after"]["eval_loss"] < result["score_before"]["eval_loss"]
    assert load_run_config(finished / "config.resolved.yaml").to_dict() == result["config"]
    assert len((finished / "predictions.jsonl").read_text().splitlines()) == 4
    steps = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert all("galore/projection_error" in row for row in steps if "loss" in row)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "fine-tuned" in (finished / "model" / "README.md").read_text()


def test_the_model_loads_with_from_pretrained(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model(**tokenizer("hello", return_tensors="pt")).logits.isfinite().all()


def start_and_signal(config: RunConfig, folder: Path, number: int) -> tuple[int, str]:
    """Start a run in a process of its own, signal it once its first checkpoint is whole; its exit code and output."""
    (folder / "run.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "galore_trainer.cli", "train", str(folder / "run.yaml")]
    first = Path(config.output_dir) / "checkpoint-2" / "manifest.json"
    deadline = time.monotonic() + 120
    with (folder / "output.txt").open("w") as output, python(command, stdout=output, stderr=output) as process:
        while not first.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(60), (folder / "output.txt").read_text()


def test_ctrl_c_saves_a_checkpoint_says_how_to_go_on_and_exits_130(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_dir, tmp_path / "run", max_steps=100_000, save_steps=2)
    code, output = start_and_signal(config, tmp_path, signal.SIGINT)
    assert code == 130, output
    assert "--resume auto" in output
    step = int(output.split("interrupted at step ")[1].split(";")[0])
    assert damage(tmp_path / "run" / f"checkpoint-{step}") is None


def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert choose_checkpoint("auto", run)[0] == run / "checkpoint-6"
    optimizer = run / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    chosen, notes = choose_checkpoint("auto", run)
    assert chosen == run / "checkpoint-4"
    assert "checkpoint-6 is not used: optimizer.pt has" in notes[0]
    model = run / "checkpoint-4" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-5] ^= 1  # one flipped bit
    model.write_bytes(content)
    (run / "checkpoint-2" / "manifest.json").unlink()
    chosen, notes = choose_checkpoint("auto", run)
    assert chosen is None
    assert "model.safetensors was changed" in notes[1]
    assert "never finished" in notes[2]
    assert notes[3] == f"no whole checkpoint in {run}: starting from the beginning"
    with pytest.raises(OptionError, match="--resume auto"):
        choose_checkpoint(str(run / "checkpoint-4"), run)
    seal(run / "checkpoint-4")
    assert choose_checkpoint("auto", run)[0] == run / "checkpoint-4"


def test_a_damaged_checkpoint_does_not_change_the_outcome(finished: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    broken = run / "checkpoint-6" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    result = train(make_config(tiny_model_dir, run), resume="auto").result
    assert result["resumed_from_step"] == 4
    whole, again = weights(finished), weights(run)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_resume_without_a_checkpoint_starts_from_the_beginning(
    finished: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    result = train(make_config(tiny_model_dir, tmp_path / "new"), resume="auto").result
    assert result["resumed_from_step"] is None
    whole, again = weights(finished), weights(tmp_path / "new")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "option", "words"),
    [
        ({"galore": {"rank": 8, "update_proj_gap": 2}}, "galore.rank", ("8", "4")),
        ({"galore": {"rank": 4, "update_proj_gap": 3}}, "galore.update_proj_gap", ("3", "2")),
        ({"galore": {"rank": 4, "update_proj_gap": 2, "head_sharing": "joint"}}, "galore.head_sharing", ("shared",)),
        ({"seed": 6}, "seed", ("6", "5")),
        ({"method": "adamw"}, "method", ("galore_plus",)),
    ],
)
def test_resume_under_another_method_is_refused_and_loses_nothing(
    change: dict, option: str, words: tuple[str, ...], finished: Path, tiny_model_dir: Path
) -> None:
    before = times(finished)
    with pytest.raises(OptionError) as error:
        train(make_config(tiny_model_dir, finished, **change), resume="auto")
    assert error.value.option == option
    assert all(word in str(error.value) for word in (*words, "Resume with", "--output-dir"))
    assert before == times(finished)


def test_a_taken_folder_is_left_alone(finished: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--resume auto"):
        train(make_config(tiny_model_dir, finished))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match="It holds other files"):
        train(make_config(tiny_model_dir, tmp_path), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwrite_replaces_a_run_only_once_the_new_one_can_start(
    finished: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with pytest.raises(OptionError, match=r"galore\.rank"):
        train(make_config(tiny_model_dir, run, galore={"rank": 4000}), overwrite=True)
    assert (run / "result.json").exists()
    assert damage(run / "checkpoint-6") is None
    train(make_config(tiny_model_dir, run, max_steps=2, save_steps=1), overwrite=True)
    assert not (run / "checkpoint-6").exists()
    assert json.loads((run / "result.json").read_text())["steps"] == 2


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import errno

    from transformers import Trainer

    real = Trainer._save_optimizer_and_scheduler

    def fails_later(self: Any, output_dir: str) -> None:
        if self.state.global_step >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", fails_later)
        with pytest.raises(RuntimeError, match=r"disk is full.*checkpoint-2 is whole.*--resume auto"):
            train(make_config(tiny_model_dir, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    assert train(make_config(tiny_model_dir, tmp_path / "run"), resume="auto").result["resumed_from_step"] == 2


@pytest.mark.parametrize("method", ["galore", "adamw"])
def test_the_other_methods_run_and_resume(method: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_dir, tmp_path / "run", method=method)
    first = train(config).result
    assert first["method"] == method
    assert first["score_after"]["eval_loss"] < first["score_before"]["eval_loss"]
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6" / "manifest.json").unlink()
    train(config, resume="auto")
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluation_and_trackers_of_the_trainer_work(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_dir, tmp_path / "run", eval_strategy="steps", eval_steps=2)
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "eval_loss" in row]) == 3
