"""Several sources: shares by weight, what is held out of each, and what is refused by name."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galore_trainer.errors import OptionError
from galore_trainer.recipes import DataConfig, Example, TaskData, load_data, score
from galore_trainer.recipes.mixture import apportion
from galore_trainer.recipes.split import prompt_key
from galore_trainer.run.settings.run_config import RunConfig, load_run_config


def chat(name: str, i: int) -> dict[str, Any]:
    return {"prompt": f"{name} asks {i}", "completion": f"answer {i}"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    files = {name: [chat(name, i) for i in range(n)] for name, n in (("a", 60), ("b", 30), ("c", 10))}
    (tmp_path / "other").mkdir()
    return {
        **{name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()},
        "again": write(tmp_path / "other" / "a.jsonl", [chat("a", 3), chat("again", 1), chat("again", 2)]),
        "texts": write(tmp_path / "t.jsonl", [{"text": f"text {i}"} for i in range(20)]),
        "math": write(tmp_path / "m.jsonl", [{"q": f"{i} + 1?", "r": f"#### {i + 1}"} for i in range(20)]),
        "nlg": write(tmp_path / "n.jsonl", [{"mr": f"name[{i}]", "ref": f"{i}."} for i in range(20)]),
    }


def load(*sources: dict[str, Any], **more: Any) -> TaskData:
    return load_data(DataConfig(**{"sources": [*sources], "eval_samples": 0, **more}))


def counts(examples: list[Example]) -> dict[str, int]:
    return collections.Counter(example.messages[0]["content"].split()[0] for example in examples)


def test_without_weights_everything_is_trained_on_and_each_source_gives_its_part_to_the_evaluation(files) -> None:
    data = load({"source": files["a"]}, {"source": files["b"]}, {"source": files["c"]}, eval_samples=10)
    assert counts(data.eval) == {"a": 6, "b": 3, "c": 1}
    assert counts(data.train) == {"a": 54, "b": 27, "c": 9}
    assert not {prompt_key(e) for e in data.train} & {prompt_key(e) for e in data.eval}
    assert f"6 of {files['a']}, 3 of {files['b']}, 1 of {files['c']}" in " ".join(data.notes)
    assert f"training on 54 of {files['a']}, 27 of {files['b']}, 9 of {files['c']}" in data.notes


def test_weights_are_shares_of_what_is_trained_on_as_much_as_the_scarcest_source_allows(files) -> None:
    weighted = [{"source": files["a"], "weight": 1}, {"source": files["b"], "weight": 3}]
    data = load(*weighted)
    assert counts(data.train) == {"a": 10, "b": 30}
    assert counts(load(*weighted, train_samples=20).train) == {"a": 5, "b": 15}
    data = load(*weighted, eval_samples=4)
    assert (counts(data.eval), counts(data.train)) == ({"a": 1, "b": 3}, {"a": 9, "b": 27})
    half = load({"source": files["a"], "weight": 0.5}, {"source": files["b"]}, train_samples=30)
    assert counts(half.train) == {"a": 10, "b": 20}


def test_what_is_drawn_is_decided_by_split_seed_alone(files) -> None:
    sources = [{"source": files["a"], "weight": 1}, {"source": files["b"], "weight": 1}]
    drawn = [
        [e.id for e in load(*sources, train_samples=20, split_seed=seed, eval_samples=4).train] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) != set(drawn[2])
    fewer = load(*sources, train_samples=10, split_seed=0, eval_samples=4).train
    assert {e.id for e in fewer} < set(drawn[0])


@given(st.integers(0, 1000), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_whole_and_within_one_of_what_the_weights_say(total: int, weights: list[float]) -> None:
    shares = apportion(total, weights)
    assert sum(shares) == total
    assert all(abs(n - total * w / sum(weights)) < 1 + 1e-6 for n, w in zip(shares, weights, strict=True))


def test_duplicates_among_sources_are_dropped_and_files_of_one_name_told_apart(files) -> None:
    data = load({"source": files["a"]}, {"source": files["again"]})
    assert counts(data.train) == {"a": 60, "again": 2}
    assert "1 duplicate among 63 examples dropped" in data.notes
    assert len({example.id for example in data.train}) == 62


def test_a_prompt_that_is_held_out_of_one_source_is_trained_on_from_none(files, tmp_path: Path) -> None:
    other = write(tmp_path / "o.jsonl", [{**chat("a", i), "completion": "another"} for i in range(60)])
    data = load({"source": files["a"]}, {"source": other}, eval_samples=10)
    assert not {prompt_key(e) for e in data.train} & {prompt_key(e) for e in data.eval}
    assert len(data.train) == 100


def test_an_evaluation_source_is_one_for_all(files) -> None:
    data = load({"source": files["a"]}, {"source": files["b"]}, eval_source=files["again"], eval_samples=None)
    assert (counts(data.eval), counts(data.train)) == ({"a": 1, "again": 2}, {"a": 59, "b": 30})


def test_each_source_has_its_own_task_and_columns_and_answers_alone_are_scored(files) -> None:
    columns = {"question": "q", "answer": "r"}
    sources = [{"source": files["math"], "columns": columns, "task": "gsm8k"}, {"source": files["texts"]}]
    data = load(*sources, {"source": files["a"]}, {"source": "embedded:arithmetic"}, eval_samples=40)
    assert data.task == "mixed"
    right = [example.target for example in data.eval]
    result = score(data.task, right, data.eval)
    answered = sum(example.answer is not None for example in data.eval)
    assert 0 < answered < len(data.eval) == len(result["per_example"])
    assert result["exact_match_strict"]["correct"] == result["n"] == answered


def test_one_task_of_several_sources_stays_that_task(files) -> None:
    data = load({"source": files["nlg"]}, {"source": "embedded:restaurants"}, eval_samples=6)
    assert data.task == "nlg"
    assert all(example.references for example in data.eval)


@pytest.mark.parametrize(
    ("sources", "more", "option", "said"),
    [
        ([], {}, "data.sources", "at least one source"),
        ([{"weight": 1}], {}, "data.sources[0]", "an entry with a source"),
        ([{"source": "a", "weigth": 1}], {}, "data.sources[0].weigth", "one of source, weight"),
        ([{"source": "a", "weight": 0}], {}, "data.sources[0].weight", "a finite number above 0"),
        ([{"source": "a", "weight": "1"}], {}, "data.sources[0].weight", "a finite number above 0"),
        ([{"source": "a"}, {"source": "b", "task": "chess"}], {}, "data.sources[1].task", "one of auto"),
        ([{"source": "a"}, {"source": "b", "columns": 3}], {}, "data.sources[1].columns", "a mapping"),
        ([{"source": 3}], {}, "data.sources[0].source", "a text"),
        ([{"source": "a"}], {"source": "b.jsonl"}, "data.source", "unset beside data.sources"),
        ([{"source": "a"}], {"columns": {"text": "b"}}, "data.columns", "unset beside data.sources"),
        ([{"source": "a"}], {"task": "sft"}, "data.task", "into the entries"),
        ([{"source": "a"}], {"max_number": 50}, "data.max_number", "unset beside data.sources"),
        ([{"source": "a"}], {"eval_split": "test"}, "data.eval_split", "Name a data.eval_source"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(sources, more, option: str, said: str) -> None:
    with pytest.raises(OptionError, match=said) as error:
        DataConfig(sources=sources, **more)
    assert error.value.option == option


def test_an_evaluation_source_is_of_the_sources_task(files) -> None:
    with pytest.raises(OptionError, match=r"data\.eval_source.*data of the sources' task, sft"):
        load({"source": files["a"]}, eval_source=files["nlg"])


def test_what_cannot_be_read_or_drawn_names_its_entry(files, tmp_path: Path) -> None:
    a, missing = {"source": files["a"]}, {"source": str(tmp_path / "none.jsonl")}
    bad = {"source": write(tmp_path / "bad.jsonl", [{"messages": []}])}
    for sources, more, option, said in [
        ([a, missing], {}, "data.sources[1].source", "an existing file"),
        ([a, bad], {}, "data.sources[1].source", "line 1"),
        ([a, {"source": files["math"]}], {}, "data.sources[1].task", r"data\.sources\[1\]\.columns="),
        ([a, {"source": files["b"], "split": "test"}], {}, "data.sources[1].split", "no use for it"),
        ([a, {**a, "weight": 3}], {}, "data.sources[1].source", "at least one example"),
        ([{**a, "weight": 1}, {"source": files["b"], "weight": 1}], {"train_samples": 70}, "data.train_samples", "60"),
        (
            [{**a, "weight": 1}, {"source": files["c"], "weight": 9}],
            {"eval_samples": 20},
            "data.eval_samples",
            "c.json",
        ),
        ([a], {"eval_samples": None}, "data.eval_samples", "hold out"),
        ([a, {"source": files["nlg"]}], {}, "data.sources[1].task", "scored by whole texts"),
    ]:
        with pytest.raises(OptionError, match=said) as error:
            load(*sources, **more)
        assert error.value.option == option


def test_sources_are_written_in_yaml_and_take_the_place_of_a_file_s_source(files, tmp_path: Path) -> None:
    sources = [{"source": files["a"], "weight": 2}, {"source": files["b"]}]
    config = load_run_config("sft", [f"data.sources={json.dumps(sources)}"])
    assert config.data.sources == sources
    assert config.data.shown_source == f"{files['a']}, {files['b']}"
    assert RunConfig.from_dict(config.to_dict()) == config
    (tmp_path / "mine.yaml").write_text(config.to_yaml())
    again = load_run_config(tmp_path / "mine.yaml", [f"data.source={files['c']}"])
    assert (again.data.source, again.data.sources) == (files["c"], None)
    with pytest.raises(OptionError, match=r"data\.source: .*beside data\.sources"):
        load_run_config("sft", [f"data.sources={json.dumps(sources)}", f"data.source={files['c']}"])
