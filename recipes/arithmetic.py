"""``embedded:arithmetic``: generated word problems with a worked solution, so that a first run needs no data.

    user       Leo had 64 shells, lost 4 and shared the rest equally among 10 friends. How many shells did each get?
    assistant  64 - 4 = 60
               60 / 10 = 6
               #### 6

The user's turn is the question alone, before and after training. Flexible scoring takes the last number of whatever the
model writes, so an untrained model can be scored without being told a format: SmolLM2-135M-Instruct got 12 of 96 right
within 64 tokens (9 within 128), and 7 to 10 when told to end with ``####`` and the number.

A problem belongs to the train or the eval split by a hash of its template and its numbers. So no question can be in
both, under any two seeds, not even with other names and objects.
"""

from __future__ import annotations

import hashlib
import math
import operator
import random
from typing import Literal

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import Example, question_example
from galore_trainer.recipes.templates import BOXES, BY_STEPS, PEOPLE, THINGS, Template

Split = Literal["train", "eval"]
EVAL_SHARE = 5  # one in so many problems belongs to the eval split
DRAWS = 500  # sets of numbers tried on a template before another one is taken
TEMPLATES_TRIED = 50

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def generate(split: Split, count: int, *, seed: int, difficulty: int, max_number: int) -> list[Example]:
    """Make ``count`` different problems; example ``i`` is the same for every ``count > i``.

    Args:
        split: ``train`` or ``eval``; the two never share a problem, whatever their seeds.
        count: number of problems.
        seed: which stream of problems.
        difficulty: most steps, 1 to 4; each number of steps is equally likely.
        max_number: largest number in a question or a solution; factors go up to its square root.

    Raises:
        OptionError: the templates have not that many different problems in this range.
    """
    examples: list[Example] = []
    seen: set[str] = set()
    for index in range(count):
        rng = random.Random(f"arithmetic/{seed}/{split}/{index}")
        templates = BY_STEPS[rng.randrange(difficulty)]
        for _ in range(TEMPLATES_TRIED):
            problem = _problem(rng, rng.choice(templates), split, max_number, seen)
            if problem is not None:
                break
        else:
            raise OptionError(
                f"data.{split}_samples",
                count,
                f"at most {index} different problems of difficulty {difficulty} with numbers up to {max_number}",
                "Raise data.max_number or data.difficulty.",
            )
        question, target, answer = problem
        seen.add(question)
        examples.append(question_example(question, target, answer, f"{split}/{index}"))
    return examples


def _problem(
    rng: random.Random, template: Template, split: Split, max_number: int, seen: set[str]
) -> tuple[str, str, str] | None:
    """Fill a template with numbers that belong to ``split``: question, target and answer, or None if none was found."""
    for _ in range(DRAWS):
        numbers = _draw(rng, template, max_number)
        lines = _solve(template, numbers, max_number)
        if lines is None or split_of(template, numbers) != split:
            continue
        question = _fill(rng, template, numbers)
        if question not in seen:
            answer = lines[-1].rpartition(" ")[2]
            return question, "\n".join([*lines, f"#### {answer}"]), answer
    return None


def split_of(template: Template, numbers: dict[str, int]) -> Split:
    """The split a problem belongs to: a stable hash of its template and numbers decides, nothing else."""
    key = f"{template.text}|{sorted(numbers.items())}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % EVAL_SHARE == 0 else "train"


def _draw(rng: random.Random, template: Template, max_number: int) -> dict[str, int]:
    names = [blank for blank in "abcdjkmn" if "{" + blank + "}" in template.text]
    return {name: rng.randint(2, max_number if name in "abcd" else math.isqrt(max_number)) for name in names}


def _solve(template: Template, numbers: dict[str, int], max_number: int) -> list[str] | None:
    """The solution's lines, or None where a result is not a whole number from 2 to ``max_number``."""
    values, lines = dict(numbers), []
    for index, step in enumerate(template.steps, start=1):
        left, sign, right = step.split()
        result = OPERATORS[sign](values[left], values[right])
        if result != int(result) or not 2 <= result <= max_number:
            return None
        values[f"r{index}"] = int(result)
        lines.append(f"{values[left]} {sign} {values[right]} = {int(result)}")
    return lines


def _fill(rng: random.Random, template: Template, numbers: dict[str, int]) -> str:
    (name, he), (other, _) = rng.sample(PEOPLE, 2)
    box, boxes = rng.choice(BOXES)
    words = {"name": name, "other": other, "he": he, "He": he.capitalize(), "box": box, "boxes": boxes}
    return template.text.format(**words, **numbers, things=rng.choice(THINGS))
