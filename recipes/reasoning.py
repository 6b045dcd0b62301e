"""``reasoning_gym:gsm_symbolic``: generated problems in GSM8K's form from the optional package reasoning-gym.

Problem ``i`` of a seed is drawn from ``seed + i``, so near seeds repeat problems. Training and evaluation use seeds far
apart, and problems that they still share are removed like other duplicates. Floating-point noise in a solution
(``45.0``) is cleaned, and the request for a bare number at the end of a question is cut off.
"""

from __future__ import annotations

import re
from typing import Literal

from galore_trainer.errors import OptionError
from galore_trainer.metrics.answers import extract_strict, same_number
from galore_trainer.recipes.base import REASONING_GYM, Example, Parsed, question_example

SEEDS_APART = 10_000_000
REQUEST = re.compile(r"\s*Give the result as your final answer\. Do not include units\.\s*$")
POINT_ZERO = re.compile(r"(?<![\d.])(\d+)\.0+(?!\d)")


def generate(split: Literal["train", "eval"], count: int, *, seed: int) -> Parsed:
    """``count`` different problems, and some to spare, as deduplication against the other part drops some."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise OptionError(
            "data.source",
            REASONING_GYM,
            "the package reasoning-gym, which is not installed",
            "pip install galore-trainer[reasoning] (it needs a C compiler), or use embedded:arithmetic.",
        ) from error
    size = count + count // 4 + 50
    start = (2 * seed + (split == "eval")) * SEEDS_APART
    examples: dict[str, Example] = {}
    for index, item in enumerate(reasoning_gym.create_dataset("gsm_symbolic", seed=start, size=size)):
        target = POINT_ZERO.sub(r"\1", item["metadata"]["answer_cot"]).strip()
        answer = POINT_ZERO.sub(r"\1", str(item["answer"]))
        if same_number(extract_strict(target), answer) and not answer.startswith("-"):  # ages below zero happen
            question = REQUEST.sub("", item["question"]).strip()
            examples.setdefault(question, question_example(question, target, answer, f"{split}/{index}"))
    return Parsed(list(examples.values()), [])
