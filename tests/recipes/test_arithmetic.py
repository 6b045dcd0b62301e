import re

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.metrics.answers import extract_strict, same_number
from galore_trainer.recipes import arithmetic
from galore_trainer.recipes.arithmetic import generate, split_of
from galore_trainer.recipes.templates import BY_STEPS, PEOPLE, Template

LINE = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
DEFAULT = {"difficulty": 2, "max_number": 100}


def make(split, count, seed=0, **settings):
    return generate(split, count, seed=seed, **{**DEFAULT, **settings})


def question(example):
    return example.messages[-1]["content"]


def test_problem_depends_on_seed_and_index_alone():
    assert make("train", 60) == make("train", 200)[:60]
    assert make("train", 60) != make("train", 60, seed=1)
    assert [e.id for e in make("eval", 2)] == ["eval/0", "eval/1"]


def test_first_problem_never_changes():
    first = make("train", 1)[0]
    assert question(first) == "Sam shares 86 buttons equally among 2 friends. How many buttons does each friend get?"
    assert first.target == "86 / 2 = 43\n#### 43"
    assert first.answer == "43"


def test_train_and_eval_share_no_problem_even_with_other_names():
    def bare(example):
        words = re.findall(r"[\w']+", question(example))
        people = {name for name, _ in PEOPLE}
        return " ".join(w for w in words if w not in people), example.target

    train = {bare(e) for seed in range(3) for e in make("train", 1500, seed=seed)}
    evaluation = {bare(e) for seed in range(3) for e in make("eval", 300, seed=seed)}
    assert not train & evaluation


@pytest.mark.parametrize("settings", [{"difficulty": 1}, {"difficulty": 4}, {"difficulty": 4, "max_number": 1000}])
def test_no_duplicates(settings):
    questions = [question(e) for e in make("train", 1500, **settings)]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
@pytest.mark.parametrize("max_number", [20, 100, 1000])
def test_solutions_are_right_and_in_range(difficulty, max_number):
    lengths = set()
    for example in make("train", 150, difficulty=difficulty, max_number=max_number):
        *steps, last = example.target.split("\n")
        lengths.add(len(steps))
        known = {int(n) for n in re.findall(r"\d+", question(example))}
        for step in steps:
            left, sign, right, result = LINE.fullmatch(step).groups()
            left, right, result = int(left), int(right), int(result)
            assert {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[sign] == result
            assert {left, right} <= known, "a number that is neither in the question nor a result"
            assert 2 <= result <= max_number
            known.add(result)
        assert last == f"#### {result}"
        assert same_number(extract_strict(example.target), example.answer)
        assert all(2 <= int(n) <= max_number for n in re.findall(r"\d+", question(example)))
    assert lengths == set(range(1, difficulty + 1))


def test_every_template_is_used_and_filled():
    assert 24 <= sum(map(len, BY_STEPS)) <= 30
    seen = set()
    for example in make("train", 1500, difficulty=4):
        text = question(example)
        assert re.fullmatch(r"[A-Z][^{}]*\?", text)
        assert "  " not in text
        for templates in BY_STEPS:
            for template in templates:
                pattern = re.sub(r"\\\{\w+\\\}", r"[A-Za-z0-9]+", re.escape(template.text))
                if re.fullmatch(pattern, text):
                    seen.add(template.text)
    assert len(seen) == sum(map(len, BY_STEPS))


def test_one_and_two_step_problems_are_short():
    examples = make("train", 800)
    words = [len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", question(e))) for e in examples]  # digits are tokens of their own
    assert max(words) <= 40
    assert max(len(e.target) for e in examples) <= 40


def test_running_out_of_problems_is_an_error_not_a_repetition(monkeypatch):
    lonely = Template("What is {m} times {n}?", ("m * n",))
    monkeypatch.setattr(arithmetic, "BY_STEPS", ((lonely,),))
    possible = sum(split_of(lonely, {"m": m, "n": n}) == "train" for m in (2, 3, 4) for n in (2, 3, 4))
    assert len(make("train", possible, difficulty=1, max_number=20)) == possible
    with pytest.raises(OptionError, match=rf"data\.train_samples.*at most {possible} different") as error:
        make("train", possible + 1, difficulty=1, max_number=20)
    assert error.value.got == possible + 1
