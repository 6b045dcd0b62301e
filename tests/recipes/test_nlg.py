"""Meaning representations and their texts: columns, the split by meaning representation, references, scores."""

import json
import re

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.metrics.nlg import METRICS
from galore_trainer.recipes import DataConfig, load_data, nlg, restaurants, score
from galore_trainer.recipes.nlg import REQUEST
from galore_trainer.recipes.sources import Row

WAY_TO_METEOR = "METEOR is skipped: install it."


@pytest.fixture(autouse=True)
def without_meteor(monkeypatch):
    for module in ("galore_trainer.recipes", "galore_trainer.metrics.nlg"):
        monkeypatch.setattr(f"{module}.meteor_missing", lambda: WAY_TO_METEOR)


def places(first, last, texts=3):
    """Rows of a table, the texts of one place apart from each other."""
    return [
        (f"name[Place {i}], food[Greek]", f"Place {i} is Greek, {j}.") for j in range(texts) for i in range(first, last)
    ]


def write_csv(path, rows, header="mr,ref"):
    path.write_text(header + "\n" + "".join(f'"{mr}","{ref}"\n' for mr, ref in rows))
    return str(path)


@pytest.fixture
def table(tmp_path):
    return write_csv(tmp_path / "table.csv", places(0, 20))


def meaning_of(example):
    return example.messages[-1]["content"].removeprefix(REQUEST)


class TestColumns:
    @pytest.mark.parametrize("header", ["mr,ref", "MR,ref", "MR,REF", "meaning_representation,human_reference"])
    def test_names_in_use(self, tmp_path, header):
        data = load_data(DataConfig(source=write_csv(tmp_path / "t.csv", places(0, 4), header), eval_samples=1))
        assert (data.task, len(data.train), len(data.eval)) == ("nlg", 9, 1)

    def test_jsonl_and_other_names(self, tmp_path):
        rows = [{"Meaning": mr, "Text": ref, "mr_id": 3} for mr, ref in places(0, 4)]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(source=str(tmp_path / "t.jsonl"), columns={"mr": "Meaning", "ref": "Text"}, eval_samples=1)
        assert load_data(config).task == "nlg"

    def test_parquet(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        names = ("meaning_representation", "human_reference")
        rows = [dict(zip(names, row, strict=True)) for row in places(0, 4)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
        data = load_data(DataConfig(source=str(tmp_path / "t.parquet"), eval_samples=1))
        assert (data.task, len(data.train)) == ("nlg", 9)

    def test_missing_text_names_the_line(self):
        row = Row({"MR": "name[A]"}, "line 7", "t.csv:7", "data.source", "t.csv")
        with pytest.raises(OptionError, match=r"a text in field 'ref' of line 7 \(its columns are MR\)"):
            nlg.parse([row])

    def test_prompt_and_target(self):
        row = Row({"mr": " name[A], food[Thai] ", "ref": "A is\n Thai. "}, "line 2", "t.csv:2", "data.source", "t.csv")
        (example,) = nlg.parse([row]).examples
        assert example.messages == ({"role": "user", "content": REQUEST + "name[A], food[Thai]"},)
        assert (example.target, example.answer, example.references) == ("A is Thai.", None, ())


class TestSplit:
    def test_held_out_are_whole_meaning_representations_with_all_their_texts(self, table):
        data = load_data(DataConfig(source=table, eval_samples=5))
        assert (len(data.train), len(data.eval)) == (45, 5)
        assert not {meaning_of(e) for e in data.train} & {meaning_of(e) for e in data.eval}
        for example in data.eval:
            name = re.search(r"Place \d+", meaning_of(example)).group()
            assert example.references == tuple(f"{name} is Greek, {j}." for j in range(3))
            assert example.target == example.references[0]
        assert all(example.references == () for example in data.train)
        (note,) = [note for note in data.notes if "by meaning representation, not by row" in note]
        assert note.startswith("evaluating on 5 meaning representations with 15 references")
        assert not any("another answer" in note for note in data.notes)

    def test_rows_that_repeat_are_one(self, tmp_path):
        rows = places(0, 4)
        data = load_data(DataConfig(source=write_csv(tmp_path / "t.csv", rows + rows), eval_samples=2))
        assert [len(example.references) for example in data.eval] == [3, 3]
        assert len(data.train) == 6

    def test_evaluation_source_is_grouped_and_leaves_the_training_data(self, table, tmp_path):
        other = write_csv(tmp_path / "other.csv", places(18, 30, texts=2))
        data = load_data(DataConfig(source=table, eval_source=other, eval_samples=None))
        assert [meaning_of(e) for e in data.eval] == [f"name[Place {i}], food[Greek]" for i in range(18, 30)]
        assert [len(e.references) for e in data.eval] == [2] * 12
        assert len(data.train) == 18 * 3
        assert "6 training examples with a prompt of the evaluation data dropped" in data.notes
        assert len(load_data(DataConfig(source=table, eval_source=other, eval_samples=4)).eval) == 4

    def test_missing_meteor_is_said_before_the_run(self, table):
        assert WAY_TO_METEOR in load_data(DataConfig(source=table, eval_samples=5)).notes
        assert WAY_TO_METEOR not in load_data(DataConfig(source=table, eval_samples=0)).notes


class TestScore:
    def test_all_five_and_what_each_example_has_to_do_with_it(self, table):
        examples = load_data(DataConfig(source=table, eval_samples=5)).eval
        result = score("nlg", [example.references[1] for example in examples], examples)
        assert result["n"] == 5
        assert set(METRICS) <= set(result)
        assert result["bleu"] == pytest.approx(1.0)
        assert result["notes"][0] == WAY_TO_METEOR
        assert result["per_example"][2]["id"] == examples[2].id
        assert result["per_example"][2]["references"] == list(examples[2].references)
        assert result["per_example"][2]["rouge_l"] == 1.0

    def test_an_example_without_references_is_scored_against_its_target(self, table):
        examples = load_data(DataConfig(source=table, eval_samples=5)).train[:3]
        assert score("nlg", [example.target for example in examples], examples)["rouge_l"] == 1.0


class TestRestaurants:
    def make(self, split, count, seed=0):
        return restaurants.generate(split, count, seed=seed)

    def test_example_depends_on_seed_and_index_alone(self):
        assert self.make("train", 40) == self.make("train", 100)[:40]
        assert self.make("eval", 10) == self.make("eval", 30)[:10]
        assert self.make("train", 40) != self.make("train", 40, seed=1)

    def test_no_meaning_representation_is_in_both_parts_or_twice_in_one(self):
        train = {meaning_of(e) for seed in range(3) for e in self.make("train", 1000, seed)}
        evaluation = [meaning_of(e) for e in self.make("eval", 300)]
        assert len(set(evaluation)) == 300
        assert not train & set(evaluation)

    def test_each_has_three_to_five_different_texts(self):
        counts = {len(example.references) for example in self.make("eval", 300)}
        assert counts == {3, 4, 5}
        assert all(len(set(e.references)) == len(e.references) for e in self.make("eval", 300))

    def test_texts_are_sentences_that_state_every_slot(self):
        said = {
            ("priceRange", "cheap"): "cheap|low prices",
            ("priceRange", "moderate"): "moderately priced|average prices",
            ("priceRange", "high"): "expensive|high prices",
            ("familyFriendly", "yes"): "(?<!not )family-friendly|welcomes children|bring children",
            ("familyFriendly", "no"): "is not family-friendly|not meant for children|for adults",
        }
        seen = set()
        for example in self.make("eval", 300):
            facts = dict(re.findall(r"([\w ]+)\[([^\]]+)\]", meaning_of(example).replace(", ", ",")))
            assert facts.keys() <= restaurants.SLOTS.keys()
            assert len(facts) >= 3
            for text in example.references:
                assert re.fullmatch(r"[A-Z][^{}\[\]]*\.", text)
                assert not re.search(r"  |\.\.| a [AEIOUaeiou]| an [^AEIOUaeiou]|\. [a-z]", text)
                for slot, value in facts.items():
                    assert re.search(said.get((slot, value), re.escape(value)), text), (slot, value, text)
            seen |= facts.items()
        assert seen == {(slot, value) for slot, values in restaurants.SLOTS.items() for value in values}

    def test_as_a_source(self):
        data = load_data(DataConfig(source="embedded:restaurants", train_samples=50, eval_samples=20, split_seed=3))
        assert (data.task, len(data.train), len(data.eval)) == ("nlg", 50, 20)
        assert data.train == self.make("train", 50, seed=3)
        assert "none is in both, by construction" in data.notes[0]

    @pytest.mark.parametrize(
        ("settings", "option"),
        [
            ({"task": "arithmetic"}, "data.task"),
            ({"difficulty": 3}, "data.difficulty"),
            ({"max_number": 50}, "data.max_number"),
            ({"split": "test"}, "data.split"),
            ({"eval_samples": None}, "data.eval_samples"),
        ],
    )
    def test_options_without_a_use_are_refused(self, settings, option):
        with pytest.raises(OptionError) as error:
            load_data(DataConfig(source="embedded:restaurants", **settings))
        assert error.value.option == option

    def test_running_out_is_an_error_not_a_repetition(self, monkeypatch):
        few = {"name": ("A", "B"), "food": ("Greek",), "area": ("harbour",)}
        monkeypatch.setattr(restaurants, "SLOTS", few)
        possible = [restaurants.split_of(f"name[{name}], food[Greek], area[harbour]") for name in "AB"].count("train")
        with pytest.raises(OptionError, match=r"data\.train_samples: got 100, wanted at most"):
            self.make("train", 100)
        assert len({meaning_of(e) for e in self.make("train", 3 * possible)}) <= possible
