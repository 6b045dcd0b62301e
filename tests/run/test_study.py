"""Studies: the packaged ones say what they must, layers stand in their order, and every mistake is refused by name."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from galore_trainer.errors import OptionError
from galore_trainer.optim.param_groups import next_due
from galore_trainer.run.results.columns import columns, metric_names, refreshes
from galore_trainer.run.settings.run_config import load_run_config
from galore_trainer.run.study.grid import Study, comparable, load_study, packaged_studies


def write(tmp_path: Path, **study: Any) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def values(study: Study, key: str) -> list[Any]:
    """A setting of every cell, as its runs have it."""
    return [comparable(cell.configs[study.seeds[0]])[key] for cell in study.cells]


def test_the_packaged_studies_vary_what_they_are_named_after() -> None:
    assert values(load_study("rank"), "galore.rank") == [16, 32, 64, 128]
    assert values(load_study("residual"), "galore.residual_percent") == [0.0, 0.6, 1.2, 1.8]
    cross_head = load_study("cross_head")
    assert values(cross_head, "galore.head_sharing") == ["shared", "grouped", "per_head", "joint"]
    assert set(values(cross_head, "galore.head_group_size")) == {3}
    svd = load_study("svd")
    assert values(svd, "galore.svd") == ["exact", "randomized", "randomized", "randomized"]
    assert values(svd, "galore.subspace_iterations")[1:] == [1, 2, 3]
    methods = load_study("methods")
    assert values(methods, "method") == ["adamw", "lora", "dora", "galore", "galore_plus", "galore_plus"]
    assert values(methods, "galore.residual_percent")[3:] == [0.0, 0.0, 1.2]


@pytest.mark.parametrize("name", packaged_studies())
def test_a_packaged_study_runs_offline_with_three_seeds_and_its_metrics(name: str) -> None:
    study = load_study(name)
    assert (study.base, study.seeds) == ("arithmetic", (0, 1, 2))
    assert set(values(study, "data.source")) == {"embedded:arithmetic"}
    assert {"score", "eval_loss", "fine_tuning_seconds"} <= set(study.metrics) <= set(metric_names())
    assert study.question.endswith("?")
    for cell in study.cells:
        assert [config.training["seed"] for config in cell.configs.values()] == [0, 1, 2]
        assert not any(config.eval.before for config in cell.configs.values())
    first = packaged_studies()[name].splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 110


def test_all_but_what_is_varied_is_equal_in_all_cells() -> None:
    for name, varied in (("rank", {"galore.rank"}), ("svd", {"galore.svd", "galore.subspace_iterations"})):
        cells = [comparable(cell.configs[0]) for cell in load_study(name).cells]
        assert {key for key in cells[0] for cell in cells if cell[key] != cells[0][key]} == varied


def test_layers_stand_in_order(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("max_steps: 5\nlearning_rate: 1e-4\nmethods: {galore_plus: {max_steps: 6}}\n")
    file = write(
        tmp_path, base="base.yaml", set={"max_steps": 7, "data": {"eval_samples": 3}}, grid={"galore": {"rank": [4]}}
    )
    study = load_study(file, ["data.eval_samples=9", "galore.svd=exact"], seeds=[5])
    (cell,) = study.cells
    assert (study.name, study.seeds, cell.name, cell.slug) == ("mine", (5,), "rank 4", "rank-4")
    config = cell.configs[5]
    assert (config.training["max_steps"], config.training["seed"], config.data.eval_samples) == (7, 5, 9)
    assert (config.galore.rank, config.galore.svd) == (4, "exact")


def test_the_base_can_be_replaced(tmp_path: Path) -> None:
    study = load_study("rank", ["base=mawps", "data.source=path/to/train.json"])
    assert values(study, "data.task") == ["mawps"] * 4
    assert values(study, "data.source") == ["path/to/train.json"] * 4
    expected = load_run_config(
        "mawps",
        ["data.source=path/to/train.json", "galore.rank=64", "eval.before=false", "galore.diagnose_refreshes=2"],
    )
    assert comparable(study.cells[2].configs[0]) == {**comparable(expected), "seed": 0}


def test_what_only_some_methods_read_reaches_those_alone(tmp_path: Path) -> None:
    file = write(tmp_path, grid={"method": ["adamw", "galore_plus"]}, set={"galore.rank": 8})
    study = load_study(file, ["galore.scale=3"])
    plus = study.cells[1].configs[0]
    assert (plus.galore.rank, plus.galore.scale) == (8, 3.0)
    with pytest.raises(OptionError, match="No cell reads it"):
        load_study(write(tmp_path, grid={"method": ["adamw"]}), ["galore.scale=3"])


def test_cells_are_the_product_of_pairs_and_axes(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        cells=[{"name": "exact", "galore.svd": "exact"}, {"name": "fast", "galore.subspace_iterations": 1}],
        grid={"galore.rank": [4, 8], "weight_decay": [0.0, 0.1]},
    )
    cells = load_study(file).cells
    expected = itertools.product(("exact", "fast"), (4, 8), (0.0, 0.1))
    assert [cell.name for cell in cells] == [f"{name}, rank {r}, weight_decay {w}" for name, r, w in expected]
    assert len({cell.slug for cell in cells}) == 8
    assert [cell.values["galore.rank"] for cell in cells] == [4, 4, 8, 8] * 2


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    file = write(tmp_path, grid={"galore.target_modules": [["q_proj"], "[qk]_proj"], "eval.limit": [None, 3]})
    names = [cell.name for cell in load_study(file).cells]
    assert names[0] == 'target_modules ["q_proj"], limit null'
    assert names[3] == "target_modules [qk]_proj, limit 3"
    file = write(tmp_path, base="arithmetic", grid={"galore.rank": [1, 2], "lora.rank": [1]})
    with pytest.raises(OptionError, match=r"lora\.rank.*galore_plus"):
        load_study(file)


GOOD = {"grid": {"galore.rank": [4, 8]}}


@pytest.mark.parametrize(
    ("study", "overrides", "option", "said"),
    [
        ({**GOOD, "seed": [0]}, [], "seed", "Did you mean 'seeds'?"),
        ({**GOOD, "title": 3}, [], "title (", "a text"),
        ({**GOOD, "seeds": ["a"]}, [], "seeds (", "a list"),
        ({**GOOD, "seeds": [1, 1]}, [], "seeds", "different integers"),
        ({**GOOD, "seeds": []}, [], "seeds", "at least one"),
        ({**GOOD, "metrics": ["scores"]}, [], "metrics", "Did you mean 'score'?"),
        ({**GOOD, "base": "arithmetics"}, [], "base", "Did you mean 'arithmetic'?"),
        ({**GOOD, "set": {"galore.rnk": 3}}, [], "galore.rnk", "Did you mean 'galore.rank'?"),
        ({**GOOD, "set": {"galore.rank": 3}}, [], "galore.rank", "varies"),
        ({"grid": {"galore.rnk": [4]}}, [], "galore.rnk", "Did you mean 'galore.rank'?"),
        ({"grid": {"galore.rank": []}}, [], "grid.galore.rank", "at least one value"),
        ({"grid": {"galore.rank": 4}}, [], "grid.galore.rank", "a list"),
        ({"grid": {"galore.rank": [4, "many"]}}, [], "galore.rank", "'many', wanted an integer. (cell 'rank many'"),
        ({"grid": {"galore.rank": [4, 0]}}, [], "galore.rank", "at least 1"),
        ({"grid": {"galore.rank": [4, 8, 4]}}, [], "grid", "'rank 4' and 'rank 4'"),
        ({"grid": {"weight_decay": [0, 0.0]}}, [], "grid", "remove one"),
        ({"grid": {"seed": [1, 2]}}, [], "seed", "--seeds"),
        ({"cells": [{"name": "none"}]}, [], "cells[0]", "at least one setting"),
        ({"cells": [{"galore.rank": 3}], **GOOD}, [], "cells[0].galore.rank", "does not vary"),
        ({"title": "nothing"}, [], "mine.yaml", "something to vary"),
        (GOOD, ["galore.rank=3"], "galore.rank", "config show"),
        (GOOD, ["galore.rnk=3"], "galore.rnk", "Did you mean 'galore.rank'?"),
        (GOOD, ["output_dir=x"], "output_dir", "--output-dir"),
        (GOOD, ["seed=3"], "seed", "--seeds"),
        (GOOD, ["base=mwps"], "base", "Did you mean 'mawps'?"),
        (GOOD, ["twice"], "argument", "key=value"),
    ],
)
def test_a_mistake_is_refused_by_name(
    tmp_path: Path, study: dict[str, Any], overrides: list[str], option: str, said: str
) -> None:
    with pytest.raises(OptionError) as error:
        load_study(write(tmp_path, **study), overrides)
    assert option in error.value.option
    assert said in str(error.value)


def test_an_unknown_study_has_a_nearest_match() -> None:
    with pytest.raises(OptionError, match=r"STUDY.*Did you mean 'residual'"):
        load_study("residuals")


@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize(
    ("start", "end", "gap"), [(0, 12, 5), (0, 10, 5), (0, 3, 5), (7, 12, 5), (0, 40, 1), (5, 31, 7)]
)
def test_refreshes_are_counted_as_the_optimizer_makes_them(start: int, end: int, gap: int, staggered: bool) -> None:
    counts = []
    for phase in range(gap) if staggered else [0]:
        due, count = 0, 0
        for calls in range(end):
            if calls >= due:
                due = next_due(calls, gap, phase)
                count += calls >= start
        counts.append(count)
    assert refreshes(start, end, gap, staggered=staggered) == pytest.approx(sum(counts) / len(counts))


def test_a_column_shows_mean_and_deviation_in_its_unit() -> None:
    table = columns()
    assert table["score"].show([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert table["score"].show([0.25]) == "25.0"
    assert table["score"].show([]) == "-"
    assert table["excess"].show([-1e-9]) == "0.00"
    assert table["state_bytes"].show([3 * 2**30]) == "3,072.00"
    assert table["seconds_per_step"].show([0.012345]) == "0.0123"
    assert table["seconds_per_step"].show([0.010, 0.012]) == "0.01100 ± 0.00141"
