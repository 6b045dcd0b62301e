"""``embedded:restaurants``: invented places as slots and values, each with several texts that describe it.

    user       Describe this place in one or two sentences: name[Blue Lantern], food[Greek], familyFriendly[yes]
    assistant  Blue Lantern is a family-friendly eatery. It serves Greek food.
    or         There is a Greek eatery called Blue Lantern. It is a good place to bring children.

The slots are those of E2E; names, values and wording are our own. A meaning representation belongs to the train or the
eval split by a hash of itself, so none can be in both, under any two seeds. Every text states every slot.
"""

from __future__ import annotations

import hashlib
import random
from typing import Literal

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import Example
from galore_trainer.recipes.nlg import pair
from galore_trainer.recipes.split import gather

Split = Literal["train", "eval"]
EVAL_SHARE = 5  # one in so many meaning representations belongs to the eval split
DRAWS = 500

SLOTS: dict[str, tuple[str, ...]] = {
    "name": (
        "Blue Lantern",
        "Copper Fox",
        "Fig and Thistle",
        "Harbour Lights",
        "Juniper House",
        "Larkspur",
        "Old Mill Yard",
        "Paper Moon",
        "Quiet Corner",
        "Red Kettle",
        "Saffron Table",
        "Seven Steps",
        "Stone Bridge",
        "The Brass Bell",
        "The Green Door",
        "The Night Heron",
        "The Tin Whistle",
        "Velvet Spoon",
        "White Rabbit",
        "Willow Court",
    ),
    "eatType": ("bistro", "coffee shop", "pub", "restaurant", "tavern"),
    "food": ("Ethiopian", "Greek", "Korean", "Lebanese", "Mexican", "Spanish", "Turkish", "Vietnamese"),
    "priceRange": ("cheap", "moderate", "high", "under £10", "£10-15", "over £25"),
    "customer rating": ("low", "average", "high", "2 out of 5", "4 out of 5", "5 out of 5"),
    "area": ("garden district", "harbour", "market quarter", "old town"),
    "familyFriendly": ("yes", "no"),
    "near": ("Castle Hill", "Foundry Lane", "Mason's Wharf", "Queen's Park", "Rose Theatre", "Union Station"),
}
ADJECTIVES = {
    "priceRange": {"cheap": "cheap", "moderate": "moderately priced", "high": "expensive"},
    "familyFriendly": {"yes": "family-friendly"},
}
CLAUSES: dict[str, dict[str, tuple[str, ...]]] = {
    "food": {"": ("serves {} food", "offers {} dishes", "has a kitchen that cooks {} food")},
    "priceRange": {
        "cheap": ("is cheap", "has low prices"),
        "moderate": ("is moderately priced", "has average prices"),
        "high": ("is expensive", "has high prices"),
        "": ("charges {} a head", "has meals for {}"),
    },
    "customer rating": {
        **dict.fromkeys(("low", "average", "high"), ("has {} ratings", "is rated {} by its customers")),
        "": ("has a customer rating of {}", "is rated {} by its customers", "got {} from its customers"),
    },
    "familyFriendly": {
        "yes": ("is family-friendly", "welcomes children", "is a good place to bring children"),
        "no": ("is not family-friendly", "is not meant for children", "is a place for adults"),
    },
    "area": {"": ("is in the {}", "can be found in the {}")},
    "near": {"": ("is near {}", "is close to {}", "is not far from {}")},
}


def generate(split: Split, count: int, *, seed: int) -> list[Example]:
    """Make ``count`` examples; example ``i`` is the same for every ``count > i``.

    Args:
        split: ``train``: one example for each text; ``eval``: one for each meaning representation, with all its texts
            as references. The two never share a meaning representation, whatever their seeds.
        count: number of examples.
        seed: which stream of examples.

    Raises:
        OptionError: there are not that many different meaning representations.
    """
    examples: list[Example] = []
    seen: set[str] = set()
    while len(examples) < count:
        index = len(seen)
        rng = random.Random(f"restaurants/{seed}/{split}/{index}")
        facts = next((f for f in (_draw(rng) for _ in range(DRAWS)) if _belongs(meaning(f), split, seen)), None)
        if facts is None:
            raise OptionError(f"data.{split}_samples", count, f"at most the {len(examples)} that were found")
        mr = meaning(facts)
        seen.add(mr)
        group = [pair(mr, text, f"{split}/{index}/{j}") for j, text in enumerate(texts(rng, facts))]
        examples += group if split == "train" else gather(group)
    return examples[:count]


def meaning(facts: dict[str, str]) -> str:
    """The meaning representation as E2E writes it: ``name[Larkspur], food[Greek]``."""
    return ", ".join(f"{slot}[{value}]" for slot, value in facts.items())


def split_of(mr: str) -> Split:
    """The split a meaning representation belongs to: a stable hash decides, nothing else."""
    digest = hashlib.blake2b(mr.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % EVAL_SHARE == 0 else "train"


def texts(rng: random.Random, facts: dict[str, str]) -> list[str]:
    """Three to five different texts that state all ``facts``, one for each of as many ways to begin."""
    openings = rng.sample((_plain, _place_first, _apposition, _subject, _imperative), rng.randint(3, 5))
    return list(dict.fromkeys(opening(rng, dict(facts)) for opening in openings))


def _draw(rng: random.Random) -> dict[str, str]:
    others = [slot for slot in SLOTS if slot != "name"]
    chosen = {"name", *rng.sample(others, rng.randint(2, len(others)))}
    return {slot: rng.choice(values) for slot, values in SLOTS.items() if slot in chosen}


def _belongs(mr: str, split: Split, seen: set[str]) -> bool:
    return split_of(mr) == split and mr not in seen


# An opening removes the facts that it states from ``facts``; ``_rest`` states the others in further sentences.


def _plain(rng: random.Random, facts: dict[str, str]) -> str:
    name = facts.pop("name")
    return f"{name} is {_noun(rng, facts)}{_place(rng, facts)}. {_rest(rng, facts)}".strip()


def _place_first(rng: random.Random, facts: dict[str, str]) -> str:
    name, place = facts.pop("name"), _place(rng, facts, always=True).strip()
    there = rng.choice(("there is", "you will find", "you can visit"))
    begin = f"{place}, {there}" if place else there
    return f"{begin[0].upper()}{begin[1:]} {_noun(rng, facts)} called {name}. {_rest(rng, facts)}".strip()


def _apposition(rng: random.Random, facts: dict[str, str]) -> str:
    name, noun = facts.pop("name"), _noun(rng, facts)
    if not facts:
        return f"{name} calls itself {noun}."
    return f"{name}, {noun}, {_clause(rng, facts, rng.choice(list(facts)))}. {_rest(rng, facts)}".strip()


def _subject(rng: random.Random, facts: dict[str, str]) -> str:
    name, noun = facts.pop("name"), _noun(rng, facts, article="the")
    if not facts:
        return f"{noun[0].upper()}{noun[1:]} here is called {name}."
    return f"{noun[0].upper()}{noun[1:]} {name} {_rest(rng, facts, subject=False)}"


def _imperative(rng: random.Random, facts: dict[str, str]) -> str:
    name = facts.pop("name")
    verb = rng.choice(("Try", "Visit", "Have a look at"))
    return f"{verb} {name}, {_noun(rng, facts)}{_place(rng, facts)}. {_rest(rng, facts)}".strip()


def _noun(rng: random.Random, facts: dict[str, str], article: str = "a") -> str:
    """``an expensive Greek pub``, with some of the facts that an adjective can state."""
    words = [
        by_value[facts.pop(slot)]
        for slot, by_value in ADJECTIVES.items()
        if facts.get(slot) in by_value and rng.random() < 0.5
    ]
    if "food" in facts and rng.random() < 0.5:
        words.append(facts.pop("food"))
    words.append(facts.pop("eatType", "eatery"))
    article = "an" if article == "a" and words[0][0] in "aeiouAEIOU" else article
    return " ".join([article, *words])


def _place(rng: random.Random, facts: dict[str, str], always: bool = False) -> str:
    """`` in the old town near Castle Hill``, as far as it is known, or nothing."""
    if not always and rng.random() < 0.3:
        return ""
    area, near = facts.pop("area", None), facts.pop("near", None)
    return (f" in the {area}" if area else "") + (f" {rng.choice(('near', 'close to'))} {near}" if near else "")


def _clause(rng: random.Random, facts: dict[str, str], slot: str) -> str:
    value, forms = facts.pop(slot), CLAUSES[slot]
    return rng.choice(forms.get(value) or forms[""]).format(value)


def _rest(rng: random.Random, facts: dict[str, str], subject: bool = True) -> str:
    """The remaining facts in random order, one to three a sentence; without ``subject`` the first has no subject."""
    clauses = [_clause(rng, facts, slot) for slot in rng.sample(list(facts), len(facts))]
    sentences = []
    while clauses:
        count = rng.randint(1, 3)
        *head, last = clauses[:count]
        sentences.append(f"{', '.join(head)} and {last}." if head else f"{last}.")
        del clauses[:count]
    return " ".join(s if i == 0 and not subject else f"It {s}" for i, s in enumerate(sentences))
