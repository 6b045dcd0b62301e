"""The word problems behind ``embedded:arithmetic``: text with blanks, and the steps that solve it.

Blanks: ``{a}`` to ``{d}`` are whole numbers up to the range of the difficulty, ``{j}`` to ``{n}`` small factors;
``{name}`` and ``{other}`` are two people, ``{he}`` and ``{He}`` stand for the first; ``{things}``, ``{box}`` and
``{boxes}`` are objects and what holds them. A step is ``left operator right`` over blanks and ``r1``, ``r2``, ... (the
results of earlier steps); the last result is the answer. Every number is at least 2, so plurals are always right.
"""

from __future__ import annotations

from dataclasses import dataclass

PEOPLE = (
    ("Anna", "she"),
    ("Ben", "he"),
    ("Clara", "she"),
    ("David", "he"),
    ("Emma", "she"),
    ("Felix", "he"),
    ("Grace", "she"),
    ("Henry", "he"),
    ("Ivy", "she"),
    ("Jack", "he"),
    ("Kate", "she"),
    ("Leo", "he"),
    ("Maria", "she"),
    ("Noah", "he"),
    ("Olivia", "she"),
    ("Peter", "he"),
    ("Rosa", "she"),
    ("Sam", "he"),
    ("Tina", "she"),
    ("Victor", "he"),
)
THINGS = (
    "apples",
    "balloons",
    "books",
    "buttons",
    "cards",
    "coins",
    "cookies",
    "marbles",
    "oranges",
    "pencils",
    "shells",
    "stamps",
    "stickers",
    "toys",
)
BOXES = (("bag", "bags"), ("basket", "baskets"), ("box", "boxes"), ("crate", "crates"))


@dataclass(frozen=True)
class Template:
    """One word problem: its text with blanks and the steps of its solution."""

    text: str
    steps: tuple[str, ...]


ONE_STEP = (
    Template("{name} has {a} {things} and gets {b} more. How many {things} does {he} have now?", ("a + b",)),
    Template(
        "{name} had {a} {things} and gave {b} of them to {other}. How many {things} does {name} have left?", ("a - b",)
    ),
    Template("There are {m} {boxes} with {n} {things} in each {box}. How many {things} are there in all?", ("m * n",)),
    Template(
        "{name} shares {a} {things} equally among {m} friends. How many {things} does each friend get?", ("a / m",)
    ),
    Template(
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?", ("a - b",)
    ),
    Template(
        "A baker made {a} rolls in the morning and {b} in the afternoon. How many rolls did the baker make that day?",
        ("a + b",),
    ),
    Template("{name} buys {m} tickets at {n} dollars each. How many dollars does {he} pay in all?", ("m * n",)),
    Template("{name} packs {a} {things} into {boxes} of {m}. How many {boxes} does {he} fill?", ("a / m",)),
    Template("{name} has to read {a} pages and has read {b} of them. How many pages are left?", ("a - b",)),
    Template(
        "A train carries {a} passengers. At a stop, {b} more get on. How many passengers are on the train now?",
        ("a + b",),
    ),
)
TWO_STEPS = (
    Template(
        "{name} had {a} {things}, bought {b} more and then gave {c} to {other}. "
        "How many {things} does {name} have now?",
        ("a + b", "r1 - c"),
    ),
    Template(
        "{name} had {m} {boxes} with {n} {things} in each and gave away {b} {things}. How many {things} are left?",
        ("m * n", "r1 - b"),
    ),
    Template(
        "{name} buys {m} pens at {n} dollars each and pays with {a} dollars. How many dollars does {he} get back?",
        ("m * n", "a - r1"),
    ),
    Template(
        "{name} had {a} {things} and found {b} more. {He} puts them equally into {m} {boxes}. "
        "How many {things} are in each {box}?",
        ("a + b", "r1 / m"),
    ),
    Template(
        "{name} had {a} {things}, lost {b} and shared the rest equally among {m} friends. "
        "How many {things} did each friend get?",
        ("a - b", "r1 / m"),
    ),
    Template(
        "{name} has {a} {things} and {other} has {m} times as many. How many {things} do they have together?",
        ("a * m", "a + r1"),
    ),
    Template(
        "{name} has {a} {things} and {other} has {b} fewer than {name}. How many {things} do they have together?",
        ("a - b", "a + r1"),
    ),
    Template(
        "A farmer packs {a} eggs into cartons of {m} and sells each carton for {n} dollars. "
        "How many dollars does the farmer get?",
        ("a / m", "r1 * n"),
    ),
    Template(
        "{name} read {m} pages a day for {n} days and still has {b} pages left. How many pages does the book have?",
        ("m * n", "r1 + b"),
    ),
    Template(
        "A bus carries {a} people. At a stop, {b} get off and {c} get on. How many people are on the bus now?",
        ("a - b", "r1 + c"),
    ),
)
THREE_STEPS = (
    Template(
        "{name} had {a} {things}, bought {b} more, gave {c} to {other} and put the rest equally into {m} {boxes}. "
        "How many {things} are in each {box}?",
        ("a + b", "r1 - c", "r2 / m"),
    ),
    Template(
        "{name} buys {m} notebooks at {n} dollars each and a bag for {b} dollars. {He} pays with {a} dollars. "
        "How many dollars does {he} get back?",
        ("m * n", "r1 + b", "a - r2"),
    ),
    Template(
        "{name} has {m} {boxes} of {n} red beads and {k} {boxes} of {j} blue beads. How many beads does {he} have?",
        ("m * n", "k * j", "r1 + r2"),
    ),
    Template(
        "{name} saved {m} dollars a week for {n} weeks, spent {b} dollars and then got {c} dollars as a gift. "
        "How many dollars does {he} have now?",
        ("m * n", "r1 - b", "r2 + c"),
    ),
    Template(
        "{name} has {a} {things} and {other} has {b} fewer than {name}. They share all their {things} equally among "
        "{m} children. How many {things} does each child get?",
        ("a - b", "a + r1", "r2 / m"),
    ),
    Template(
        "A school sends {m} classes of {n} students on a trip. That day {b} students stay at home, and the others fill "
        "vans of {k} seats. How many vans do they fill?",
        ("m * n", "r1 - b", "r2 / k"),
    ),
)
FOUR_STEPS = (
    Template(
        "{name} buys {m} shirts at {n} dollars each and {k} hats at {j} dollars each, and pays with {a} dollars. "
        "How many dollars does {he} get back?",
        ("m * n", "k * j", "r1 + r2", "a - r3"),
    ),
    Template(
        "{name} has {a} {things} and {other} has {b} fewer than {name}. Together they give away {c} and put the rest "
        "equally into {m} {boxes}. How many {things} are in each {box}?",
        ("a - b", "a + r1", "r2 - c", "r3 / m"),
    ),
    Template(
        "{name} sold {m} cakes for {n} dollars each and {k} pies for {j} dollars each. Baking them cost {b} dollars. "
        "How many dollars did {he} earn after paying for that?",
        ("m * n", "k * j", "r1 + r2", "r3 - b"),
    ),
    Template(
        "A gardener has {m} trays of {n} plants and buys {b} more plants. After {c} plants are sold, the rest are set "
        "in rows of {k}. How many rows are there?",
        ("m * n", "r1 + b", "r2 - c", "r3 / k"),
    ),
)
BY_STEPS = (ONE_STEP, TWO_STEPS, THREE_STEPS, FOUR_STEPS)
