"""The command line: what reaches the run, what is printed where, and what each outcome exits with."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from galore_trainer.cli.main import main
from galore_trainer.cli.options import all_flags
from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError

HEAVY = {"torch", "transformers", "datasets", "accelerate", "trl", "numpy", "matplotlib"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Calls of the training function, which is replaced by one that only remembers; its outcome can be set."""
    seen: list[tuple] = []
    outcome = types.SimpleNamespace(interrupted=False, error=None)

    def train(config, *, resume=None, overwrite=False):
        seen.append((config, resume, overwrite))
        if outcome.error:
            raise outcome.error
        return outcome

    fake = types.ModuleType("galore_trainer.run.training.train")
    fake.train, fake.outcome = train, outcome
    monkeypatch.setitem(sys.modules, "galore_trainer.run.training.train", fake)
    monkeypatch.delenv("RANK", raising=False)
    return seen


def outcome() -> types.SimpleNamespace:
    return sys.modules["galore_trainer.run.training.train"].outcome


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom galore_trainer.cli.main import main\n"
        "codes = [main(words) for words in (['--help'], ['train', '--help'], ['config', 'list'], ['--version'])]\n"
        f"assert codes == [0, 0, 0, 0], codes\nloaded = {HEAVY!r} & set(sys.modules)\nassert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_only_the_hub_has_is_asked_for_before_libraries_are_imported(tmp_path: Path) -> None:
    commands = [
        ["train", "gsm8k"],
        ["train", "gsm8k", "--dry-run"],
        ["train", "quickstart", "--model", "owner/name"],
        ["train", "quickstart", "data.source=a.jsonl", "data.eval_source=owner/name"],
        ["eval", "owner/name", "quickstart"],
        ["data", "preview", "gsm8k"],
    ]
    code = (
        "import sys\nfrom galore_trainer.cli.main import main\n"
        f"for words in {commands!r}:\n    print(*words, file=sys.stderr)\n    assert main(words) == 2\n"
        "    loaded = {'torch', 'transformers'} & set(sys.modules)\n    assert not loaded, loaded\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("http://127.0.0.1:9 cannot be reached") == len(commands), done.stderr


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "galore_trainer.cli", "trian"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "trian" in done.stderr


def test_every_knob_is_a_flag_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(GaLoreConfig):
        assert f"--{field.name.replace('_', '-')}" in words
    assert "--head-sharing shared|grouped|per_head|joint" in words
    assert "(default shared, galore: joint, galore_torch: joint, apollo: joint, fira: joint)" in words
    assert "(default auto, galore: 10.0, galore_torch: 10.0, apollo: 1.0, fira: 1.0, galore_plus_paper: 10.0)" in words
    assert "--lora-rank INTEGER" in words
    assert "--trainer hf|trl" in words
    assert "--stochastic-rounding / --no-stochastic-rounding" in words


def test_a_new_field_is_a_new_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    from galore_trainer.cli import options
    from galore_trainer.fields import knob

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Larger(GaLoreConfig):
        new_share: float = knob(0.5, "Something new.")

    monkeypatch.setattr(options, "GaLoreConfig", Larger)
    added = {flag.key: flag for flag in all_flags()}["galore.new_share"]
    assert added.parameter == "new_share"
    assert added.help == "Something new. (default 0.5)"


def test_flags_overrides_and_file_reach_the_run(calls: list[tuple]) -> None:
    words = "train quickstart data.train_samples=5 --rank 8 --no-stochastic-rounding max_steps=3 --learning-rate 1e-3"
    assert main([*words.split(), "--resume", "auto", "--output-dir", "runs/x", "--rank-pattern", "{o_proj: 4}"]) == 0
    config, resume, overwrite = calls[0]
    assert (resume, overwrite) == ("auto", False)
    assert (config.galore.rank, config.galore.stochastic_rounding) == (8, False)
    assert config.galore.rank_pattern == {"o_proj": 4}
    assert (config.training["max_steps"], config.training["learning_rate"]) == (3, 1e-3)
    assert (config.data.train_samples, config.output_dir) == (5, "runs/x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], "quickstart"),
        (["train", "max_steps=3"], "CONFIG"),
        (["train", "quikstart"], "Did you mean 'quickstart'?"),
        (["train", "quickstart", "--rnak", "8"], "--rank"),
        (["train", "quickstart", "--rank", "8", "galore.rank=9"], "galore.rank=9 and --rank 8"),
        (["train", "quickstart", "--rank", "many"], "galore.rank: got 'many', wanted an integer"),
        (["train", "quickstart", "--rank", "0"], "at least 1"),
        (["train", "quickstart", "max_step=3"], "'max_steps'"),
        (["train", "quickstart", "twice"], "key=value"),
        (["train", "quickstart", "--method", "adamw", "--rank", "8"], "--rank 8"),
        (["train", "quickstart", "--method", "galore", "--svd", "randomized"], "galore_plus"),
        (["train", "quickstart", "--resume", "auto", "--overwrite"], "--overwrite"),
        (["config", "show", "quikstart"], "'quickstart'"),
        (["eval", "some/model"], "CONFIG"),
    ],
)
def test_what_cannot_be_honoured_exits_with_2_and_says_why(
    calls: list[tuple], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("no\nmemory"), 1, "Failed: no memory"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (OptionError("output_dir", "x", "an empty folder", "Use --overwrite."), 2, "Use --overwrite."),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_failing_run_exits_with_its_code_and_one_message(
    calls: list[tuple], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    outcome().error = error
    assert main(["train", "quickstart"]) == code
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


def test_debug_and_errors_of_our_own_making_show_the_traceback(calls, capsys: pytest.CaptureFixture[str]) -> None:
    for error, words in ((RuntimeError("x"), ["--debug"]), (AssertionError("x"), [])):
        outcome().error = error
        assert main(["train", "quickstart", *words]) == 1
        assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_run_exits_with_130(calls: list[tuple]) -> None:
    outcome().interrupted = True
    assert main(["train", "quickstart"]) == 130


def test_other_ranks_print_nothing_but_their_own_failures_after_rank_0_had_its_time(
    calls: list[tuple], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "quickstart", "--show-config"]) == 0
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    for words, said in ((["train", "quikstart"], "quickstart"), (["train", "quickstart", "--rnak", "3"], "--rnak")):
        assert main(words) == 2
        text = capsys.readouterr().err
        assert text.startswith("Error on rank 3: ")
        assert said in text
    assert waited == [3.0, 3.0]
    outcome().error = RuntimeError("lost")
    assert main(["train", "quickstart"]) == 1
    assert "Failed on rank 3: lost" in capsys.readouterr().err
    assert len(waited) == 2


def test_show_config_prints_yaml_that_loads_back(
    calls: list[tuple], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from galore_trainer.run.settings.run_config import load_run_config

    assert main(["train", "quickstart", "--show-config", "--method", "galore", "--seed", "7"]) == 0
    saved = tmp_path / "saved.yaml"
    saved.write_text(capsys.readouterr().out)
    assert load_run_config(saved) == load_run_config("quickstart", ["method=galore", "seed=7"])
    assert calls == []


def test_a_dry_run_prints_the_plan_and_trains_nothing(calls: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["data.train_samples=20", "per_device_train_batch_size=16", "--max-steps", "4"]
    assert main(["train", "quickstart", "--dry-run", *settings]) == 0
    out = capsys.readouterr().out
    assert "20 to train on" in out
    assert "4 steps of 16 examples each" in out
    assert calls == []


def test_configs_are_listed_shown_and_validated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "list"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["config", "show", "gsm8k"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["source"] == "openai/gsm8k"
    file = tmp_path / "mine.yaml"
    file.write_text("galore: {head_sharing: grouped}\n")
    assert main(["config", "validate", str(file)]) == 0
    out = capsys.readouterr().out
    assert "valid, runs galore_plus" in out
    assert "--method galore: refused" in out
    file.write_text("galore: {head_sharing: groupd}\n")
    assert main(["config", "validate", str(file)]) == 2


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    from galore_trainer.run.scoring import evaluate

    seen: list[tuple] = []

    def fake(model_or_run, config, *, predictions_path=None, progress=None):
        seen.append((model_or_run, config, predictions_path))
        progress(4, 4)
        match = {"value": 0.75, "low": 0.3, "high": 0.95, "correct": 3}
        return {"task": "arithmetic", "n": 4, "exact_match_flexible": match, "eval_loss": 0.5, "interval": None}

    monkeypatch.setattr(evaluate, "evaluate", fake)
    return seen


def test_eval_scores_a_run_with_its_own_configuration(
    evaluations: list[tuple], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from galore_trainer.run.settings.run_config import RESOLVED_CONFIG, load_run_config

    saved = load_run_config("quickstart", ["data.split_seed=5", "eval.limit=50"])
    (tmp_path / RESOLVED_CONFIG).write_text(saved.to_yaml())
    assert main(["eval", str(tmp_path), "eval.batch_size=2", "--limit", "4", "--json", "--predictions", "p.jsonl"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exact_match_flexible"]["correct"] == 3
    assert "generated 4 of 4" in captured.err
    target, config, predictions = evaluations[0]
    assert (target, predictions) == (str(tmp_path), "p.jsonl")
    assert (config.eval.limit, config.eval.batch_size, config.data.split_seed) == (4, 2, 5)


def test_eval_prints_scores_for_people(
    evaluations: list[tuple], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["eval", str(tmp_path), "quickstart"]) == 0
    out = capsys.readouterr().out
    assert "75.0 % (95 % interval 30.0 to 95.0, 3 of 4)" in out
    assert "eval_loss" in out


def test_data_preview_marks_what_is_trained_on(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "preview", "quickstart", f"model_name_or_path={tiny_model_dir}", "data.train_samples=30"]
    assert main([*words, "-n", "1", "max_length=300"]) == 0
    out = capsys.readouterr().out
    trained = [line[2:] for line in out.splitlines() if line.startswith("> ")]
    assert trained[-1].startswith("#### ")
    assert trained[-1].endswith("<|im_end|>")
    assert any(line.startswith("| <|im_start|>user") for line in out.splitlines())
    assert "30 to train on" in out
    assert "longer than max_length 300 and left out" in out


def test_a_histogram_counts_every_length() -> None:
    from galore_trainer.run.models.preview import histogram

    lengths = [3, 3, 4, 10, 18, 40]
    lines = histogram(lengths, bins=4, width=10)
    assert sum(int(line.split()[1]) for line in lines) == len(lengths)
    assert lines[0] == " 3-12      4 ##########"
    assert histogram([7, 7]) == ["7-7      2 ########################################"]


def test_doctor_reports_versions_and_the_way_to_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from galore_trainer.run import doctor

    installed = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name in ("trl", "deepspeed") else installed(name))
    monkeypatch.setattr(doctor, "hub", lambda: {"endpoint": "https://hub", "reachable": False, "problem": "no network"})
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == installed("torch")
    assert report["packages"]["deepspeed"] is None
    assert report["missing_extras"]["trl"].startswith("pip install 'trl>=")
    assert report["machine"]["cores"] <= os.cpu_count()
    text = doctor.render(report)
    assert "no network" in text
    assert "not installed" in text
