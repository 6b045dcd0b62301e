"""What cannot work is refused before anything is loaded: settings out of range, metrics nobody measures, places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.run.files import check_writable, write_file
from galore_trainer.run.settings.arguments import training_arguments
from galore_trainer.run.settings.ranges import BEST_METRICS, RANGES, check_range
from galore_trainer.run.settings.run_config import RunConfig, load_run_config, trainer_hints
from galore_trainer.run.training.train import train


def test_every_range_is_of_a_setting_and_allows_what_transformers_begins_with() -> None:
    arguments = training_arguments(RunConfig(training={"use_cpu": True}))
    assert RANGES.keys() <= trainer_hints().keys()
    for key in RANGES:
        if hasattr(arguments, key):
            check_range(key, getattr(arguments, key))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("max_steps", [-1, 1]),
        ("num_train_epochs", [0.01, 3]),
        ("max_grad_norm", [0, 1.0]),
        ("save_steps", [0.1, 500]),
        ("seed", [0, 2**32 - 1]),
        ("warmup_steps", [0, 0.03, 10]),
        ("learning_rate", [0, 1e-4]),
        ("gradient_accumulation_steps", [1]),
    ],
)
def test_what_works_is_let_through(key: str, values: list[float]) -> None:
    for value in values:
        assert RunConfig(training={key: value}).training == {key: value}


def test_the_place_is_named_where_there_is_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("max_steps: 3\nmethods:\n  adamw:\n    seed: -1\n")
    with pytest.raises(OptionError, match=r"methods\.adamw\.seed: got -1.*mine\.yaml, line 4"):
        load_run_config(file)
    with pytest.raises(OptionError, match=r"^seed: got -1, wanted an integer from 0 to 4294967295\.$"):
        RunConfig(training={"seed": -1})


@pytest.mark.parametrize("trainer", ["hf", "trl"])
def test_a_best_model_is_chosen_by_what_is_measured(trainer: str, short_run: Callable[..., RunConfig]) -> None:
    if trainer == "trl":
        pytest.importorskip("trl")
    for metric in BEST_METRICS[trainer]:
        config = short_run(
            f"run-{metric}",
            trainer=trainer,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model=metric,
        )
        assert train(config).result["steps"] == 2
    for metric in ("accuracy", "eval_bleu", "eval_exact_match_flexible", ""):
        with pytest.raises(OptionError, match="metric_for_best_model"):
            short_run("other", trainer=trainer, metric_for_best_model=metric)


def test_a_schedule_is_tried_once(short_run: Callable[..., RunConfig]) -> None:
    config = short_run(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-5})
    assert training_arguments(config).lr_scheduler_kwargs == {"min_lr": 1e-5}
    for settings in ({"speed": 2}, {"min_lr": "fast"}):
        with pytest.raises(OptionError, match=r"lr_scheduler_kwargs.*schedule 'cosine_with_min_lr'"):
            training_arguments(short_run(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=settings))


def test_checkpointing_goes_by_its_old_name_without_a_warning(
    short_run: Callable[..., RunConfig], recwarn: pytest.WarningsRecorder
) -> None:
    for wanted in (True, False):
        assert training_arguments(short_run(gradient_checkpointing=wanted)).gradient_checkpointing is wanted
    assert not training_arguments(short_run()).gradient_checkpointing
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


def test_a_path_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b" / "rows.json"
    check_writable("--json", new)
    assert list(tmp_path.iterdir()) == []
    write_file(new, "kept")
    check_writable("--json", new)
    assert new.read_text() == "kept"
    assert [path.name for path in new.parent.iterdir()] == ["rows.json"]
    for path in (tmp_path, new / "x.json", tmp_path / ("x" * 300) / "y", Path("/proc/none/rows.json")):
        with pytest.raises(OptionError, match="--json"):
            check_writable("--json", path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
