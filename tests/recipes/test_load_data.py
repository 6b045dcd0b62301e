import dataclasses
import json
import sys
import types

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.recipes import DataConfig, load_data, score
from galore_trainer.recipes.split import prompt_key


def problem(i):
    return {"question": f"What is {i} plus 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def forty(tmp_path):
    return write(tmp_path / "forty.jsonl", [problem(i) for i in range(40)])


def config(source, **settings):
    return DataConfig(**{"source": source, "eval_samples": 10, **settings})


def keys(examples):
    return {prompt_key(example) for example in examples}


class TestEmbedded:
    def test_default_is_generated_and_disjoint(self):
        data = load_data(DataConfig())
        assert (data.task, len(data.train), len(data.eval)) == ("arithmetic", 2000, 200)
        assert not keys(data.train) & keys(data.eval)
        assert "disjoint by construction" in data.notes[0]

    def test_settings_reach_the_generator(self):
        data = load_data(DataConfig(difficulty=1, max_number=20, train_samples=30, eval_samples=5, split_seed=4))
        assert (len(data.train), len(data.eval)) == (30, 5)
        assert all(example.target.count("\n") == 1 for example in data.train)
        assert data == load_data(
            DataConfig(difficulty=1, max_number=20, train_samples=30, eval_samples=5, split_seed=4)
        )

    @pytest.mark.parametrize(
        ("settings", "option"),
        [
            ({"task": "gsm8k"}, "data.task"),
            ({"split": "test"}, "data.split"),
            ({"subset": "main"}, "data.subset"),
            ({"eval_source": "x.jsonl"}, "data.eval_source"),
            ({"columns": {"question": "q"}}, "data.columns"),
            ({"eval_samples": None}, "data.eval_samples"),
        ],
    )
    def test_options_without_a_use_are_refused(self, settings, option):
        with pytest.raises(OptionError) as error:
            load_data(DataConfig(**settings))
        assert error.value.option == option


class TestHoldOut:
    def test_is_deterministic_and_apart(self, forty):
        data = load_data(config(forty))
        assert (data.task, len(data.train), len(data.eval)) == ("gsm8k", 30, 10)
        assert not keys(data.train) & keys(data.eval)
        assert load_data(config(forty)) == data
        assert keys(load_data(config(forty, split_seed=1)).eval) != keys(data.eval)

    def test_depends_neither_on_order_nor_on_train_samples(self, forty, tmp_path):
        shuffled = write(tmp_path / "s.jsonl", [problem(i) for i in reversed(range(40))])
        held_out = keys(load_data(config(forty)).eval)
        assert keys(load_data(config(shuffled)).eval) == held_out
        fewer = load_data(config(forty, train_samples=7))
        assert len(fewer.train) == 7
        assert keys(fewer.eval) == held_out

    def test_ids_are_stable_names_of_lines(self, forty):
        data = load_data(config(forty))
        lines = {int(e.messages[0]["content"].split()[2]): e.id for e in data.train + data.eval}
        assert lines == {i: f"forty.jsonl:{i + 1}" for i in range(40)}

    def test_duplicates_are_dropped_and_reported(self, tmp_path):
        again = {**problem(0), "question": "what is  0 PLUS 1?"}
        conflict = {**problem(1), "answer": "#### 7"}
        source = write(tmp_path / "d.jsonl", [*(problem(i) for i in range(20)), again, conflict])
        data = load_data(config(source))
        assert len(data.train) + len(data.eval) == 21
        assert "1 duplicate among 22 training examples dropped" in data.notes
        assert "1 more example of a prompt with another answer: kept" in data.notes
        assert not keys(data.train) & keys(data.eval)

    def test_more_than_there_is(self, forty):
        with pytest.raises(
            OptionError, match=r"data\.eval_samples: got 40, wanted fewer than the 40 different prompts"
        ):
            load_data(config(forty, eval_samples=40))
        with pytest.raises(OptionError, match=r"data\.train_samples: got 31, wanted at most the 30"):
            load_data(config(forty, train_samples=31))

    def test_no_evaluation_at_all(self, forty):
        data = load_data(config(forty, eval_samples=0))
        assert (len(data.train), len(data.eval)) == (40, 0)


class TestEvalSource:
    def test_shared_prompts_leave_the_training_data(self, forty, tmp_path):
        other = write(tmp_path / "eval.jsonl", [problem(i) for i in range(35, 60)])
        data = load_data(config(forty, eval_source=other, eval_samples=None))
        assert (len(data.train), len(data.eval)) == (35, 25)
        assert "5 training examples with a prompt of the evaluation data dropped" in data.notes

    def test_a_part_of_it_is_picked_and_said(self, forty, tmp_path):
        other = write(tmp_path / "eval.jsonl", [problem(i) for i in range(35, 60)])
        data = load_data(config(forty, eval_source=other))
        assert (len(data.train), len(data.eval)) == (35, 10)
        assert "evaluating on 10 of 25, picked by split_seed 0" in data.notes

    def test_wrong_mawps_equations_are_evaluated_on_but_not_trained_on(self, tmp_path):
        good = [{"original_text": f"{i} and 1 ?", "equation": f"x={i}+1", "ans": i + 1} for i in range(4)]
        bad = [{"original_text": "40 in 7 ?", "equation": "x=40/7", "ans": 5}]
        trained = write(tmp_path / "t.jsonl", good[:2] + bad)
        evaluated = write(tmp_path / "e.jsonl", [*good[2:], {**bad[0], "original_text": "40 by 7 ?"}])
        data = load_data(config(trained, eval_source=evaluated))
        assert data.task == "mawps"
        assert [e.id for e in data.train] == ["t.jsonl:1", "t.jsonl:2"]
        assert [e.answer for e in data.eval] == ["3", "4", "5"]

    @pytest.mark.parametrize(
        ("settings", "option"),
        [
            ({"eval_split": "test"}, "data.eval_split"),
            ({"eval_source": "owner/name"}, "data.eval_split"),
            ({"eval_source": "embedded:arithmetic"}, "data.eval_source"),
            ({"eval_source": "missing.jsonl"}, "data.eval_source"),
            ({"subset": "main"}, "data.subset"),
            ({"difficulty": 3}, "data.difficulty"),
            ({"task": "arithmetic"}, "data.task"),
            ({"columns": {"solution": "answer"}}, "data.columns"),
        ],
    )
    def test_options_that_do_not_fit_a_file_are_refused(self, forty, settings, option):
        with pytest.raises(OptionError) as error:
            load_data(config(forty, **settings))
        assert error.value.option == option


class TestTask:
    @pytest.mark.parametrize(
        ("row", "task"),
        [
            ({"question": "q{}", "answer": "#### 1"}, "gsm8k"),
            ({"original_text": "q{}", "equation": "x=1+1", "ans": 2}, "mawps"),
            ({"question": "q{}", "equation": "x=1+1", "answer": 2}, "mawps"),
            ({"prompt": "q{}", "completion": "c"}, "sft"),
        ],
    )
    def test_auto_reads_the_columns(self, tmp_path, row, task):
        name = next(iter(row))
        rows = [{**row, name: row[name].format(i)} for i in range(3)]
        assert load_data(config(write(tmp_path / "a.jsonl", rows), eval_samples=1)).task == task

    def test_columns_of_another_name(self, tmp_path):
        rows = [{"Problem": f"q{i}", "Solution": "#### 1"} for i in range(3)]
        source = write(tmp_path / "c.jsonl", rows)
        with pytest.raises(OptionError, match=r"data\.task.*has Problem, Solution.*data\.columns"):
            load_data(config(source))
        columns = {"question": "Problem", "answer": "Solution"}
        assert load_data(config(source, columns=columns, eval_samples=1)).task == "gsm8k"

    def test_named_task_whose_field_is_missing(self, forty):
        with pytest.raises(OptionError, match=r"forty\.jsonl.*field 'prompt' of line 1"):
            load_data(config(forty, task="sft"))


class TestReasoningGym:
    def test_missing_package_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "reasoning_gym", None)
        with pytest.raises(OptionError, match=r"pip install galore-trainer\[reasoning\]"):
            load_data(DataConfig(source="reasoning_gym:gsm_symbolic"))

    def test_problems_are_cleaned_and_apart(self, monkeypatch):
        seeds = []

        def create_dataset(name, seed, size):
            seeds.append(seed)
            ask = "Give the result as your final answer. Do not include units."
            return [
                {
                    "question": f"What is {n} halved? {ask}",
                    "answer": str(n // 2),
                    "metadata": {"answer_cot": f"{n}/2 = {n / 2}\n#### {n / 2}"},
                }
                for n in range(seed // 10**5, seed // 10**5 + 2 * size, 2)
            ]

        stub = types.ModuleType("reasoning_gym")
        stub.create_dataset = create_dataset
        monkeypatch.setitem(sys.modules, "reasoning_gym", stub)
        data = load_data(DataConfig(source="reasoning_gym:gsm_symbolic", train_samples=20, eval_samples=10))
        assert abs(seeds[0] - seeds[1]) >= 1_000_000
        assert (data.task, len(data.train), len(data.eval)) == ("gsm8k", 20, 10)
        assert not keys(data.train) & keys(data.eval)
        assert data.train[0].messages[0]["content"].endswith("halved?")
        assert ".0" not in data.train[0].target


class TestConfig:
    @pytest.mark.parametrize(
        "settings",
        [
            {"difficulty": 5},
            {"difficulty": 0},
            {"max_number": 10},
            {"max_number": 10**6},
            {"train_samples": 0},
            {"eval_samples": -1},
            {"task": "chess"},
            {"source": 3},
            {"columns": {"question": 1}},
        ],
    )
    def test_impossible_values_name_the_option(self, settings):
        with pytest.raises(OptionError) as error:
            DataConfig(**settings)
        assert error.value.option.startswith(f"data.{next(iter(settings))}")

    def test_every_field_has_help_and_goes_round(self):
        assert all(field.metadata["help"] for field in dataclasses.fields(DataConfig))
        changed = DataConfig(source="a.jsonl", columns={"question": "q"}, eval_samples=None)
        assert DataConfig(**changed.to_dict()) == changed


class TestScore:
    def test_targets_score_full_marks_under_every_extraction(self):
        data = load_data(DataConfig(train_samples=1, eval_samples=50, difficulty=4))
        result = score("arithmetic", [e.target for e in data.eval], data.eval)
        assert result["n"] == 50
        for name in ("flexible", "strict", "last_number"):
            assert result[f"exact_match_{name}"]["correct"] == 50

    def test_per_example_names_the_example(self):
        data = load_data(DataConfig(train_samples=1, eval_samples=2))
        right, wrong = data.eval[0].target, "I do not know."
        rows = score("arithmetic", [right, wrong], data.eval)["per_example"]
        assert [row["id"] for row in rows] == ["eval/0", "eval/1"]
        assert [row["strict_correct"] for row in rows] == [True, False]
        assert rows[0]["prediction"] == right
        assert rows[1]["strict"] is None

    def test_a_gold_answer_that_is_no_integer_has_a_tolerance(self, tmp_path):
        rows = [{"original_text": f"q{i}", "equation": "x=11/6", "ans": "1.8333333333333333"} for i in range(2)]
        example = load_data(config(write(tmp_path / "m.jsonl", rows), eval_samples=1)).eval
        assert score("mawps", ["#### 1.8333"], example)["exact_match_strict"]["correct"] == 1
        assert score("mawps", ["#### 1.8353"], example)["exact_match_strict"]["correct"] == 0

    def test_free_text_has_no_score(self, tmp_path):
        rows = [{"prompt": f"q{i}", "completion": "c"} for i in range(3)]
        data = load_data(config(write(tmp_path / "s.jsonl", rows), eval_samples=2))
        assert score("sft", ["a", "b"], data.eval) == {"n": 2}
