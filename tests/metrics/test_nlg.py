"""Each text metric equals a calculation of its own from the definition, on texts whose tokens anyone can see."""

from __future__ import annotations

import math
import random
import re
import sys
from functools import cache
from itertools import product

import pytest

from galore_trainer.metrics import meteor as meteor_module
from galore_trainer.metrics.meteor import meteor_missing
from galore_trainer.metrics.nlg import METRICS, bleu, cider, nist, nlg_scores, rouge_l

EXAMPLES = [  # what a system wrote, and what people wrote
    (
        "Larkspur is a cheap pub in the old town.",
        ["Larkspur is a cheap pub in the old town.", "In the old town, Larkspur is a pub with low prices."],
    ),
    (
        "Paper Moon serves Greek food near Castle Hill.",
        [
            "Paper Moon is a Greek place near Castle Hill.",
            "Near Castle Hill, Paper Moon serves Greek food.",
            "Greek food is served at Paper Moon, near Castle Hill.",
        ],
    ),
    (
        "The Red Kettle is a family-friendly coffee shop. It is rated high.",
        [
            "The Red Kettle is a coffee shop with high ratings. It is family-friendly.",
            "Families like the Red Kettle, a coffee shop rated high.",
        ],
    ),
    (
        "Willow Court is expensive.",
        [
            "Willow Court is an expensive bistro by the harbour, not for children.",
            "By the harbour, Willow Court is expensive. It is not for children.",
            "Bring no children to Willow Court, an expensive bistro by the harbour.",
        ],
    ),
    (
        "Stone Bridge has Korean food, Korean food and Korean food.",
        ["Stone Bridge cooks Korean food.", "Korean dishes and Korean drinks are on the menu of Stone Bridge."],
    ),
    (
        "You will find Blue Lantern in the market quarter, close to Rose Theatre.",
        ["Blue Lantern is in the market quarter near Rose Theatre.", "Close to Rose Theatre is Blue Lantern."],
    ),
    (
        "White Rabbit is a tavern.",
        ["White Rabbit is a tavern near Queen Street.", "White Rabbit, near Queen Street, is a tavern.", "A tavern."],
    ),
    ("Nothing in common here.", ["Velvet Spoon serves Turkish food.", "Try Turkish food at Velvet Spoon."]),
    ("", ["Copper Fox has a rating of 4 out of 5.", "Copper Fox is rated 4 out of 5."]),
]
PREDICTIONS = [prediction for prediction, _ in EXAMPLES]
REFERENCES = [references for _, references in EXAMPLES]


def spaced(text: str) -> list[str]:
    return text.split()


def tokens(text: str, *, punctuation: bool) -> list[str]:
    return re.findall(r"[a-z0-9-]+|[.,]" if punctuation else r"[a-z0-9-]+", text.lower())


def split(*, punctuation: bool) -> tuple[list[list[str]], list[list[list[str]]]]:
    words = [tokens(text, punctuation=punctuation) for text in PREDICTIONS]
    return words, [[tokens(text, punctuation=punctuation) for text in group] for group in REFERENCES]


def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def matches(words: list[str], group: list[list[str]], n: int) -> list[tuple[str, ...]]:
    """The n-grams that match, each as often as it may count."""
    found = []
    for gram in grams(words, n):
        if found.count(gram) < max(grams(reference, n).count(gram) for reference in group):
            found.append(gram)
    return found


def reference_bleu() -> float:
    words, groups = split(punctuation=True)
    logs = 0.0
    for n in range(1, 5):
        hits = sum(len(matches(w, group, n)) for w, group in zip(words, groups, strict=True))
        logs += math.log(hits / sum(len(grams(w, n)) for w in words)) / 4
    closest = [min((abs(len(r) - len(w)), len(r)) for r in group)[1] for w, group in zip(words, groups, strict=True)]
    return math.exp(logs + min(0.0, 1 - sum(closest) / sum(map(len, words))))


def reference_nist() -> float:
    words, groups = split(punctuation=True)
    everything = [reference for group in groups for reference in group]
    size = sum(map(len, everything))

    @cache
    def count(gram: tuple[str, ...]) -> int:
        return sum(grams(reference, len(gram)).count(gram) for reference in everything) if gram else size

    score = 0.0
    for n in range(1, 6):
        hits = [gram for w, group in zip(words, groups, strict=True) for gram in matches(w, group, n)]
        told = math.fsum(math.log(count(gram[:-1]) / count(gram), 2) for gram in hits)
        score += told / sum(len(grams(w, n)) for w in words)
    ratio = sum(map(len, words)) / (size / len(everything) * len(words))
    return score * (0.5 ** ((math.log(ratio) / math.log(1.5)) ** 2) if ratio < 1 else 1.0)


def reference_rouge_l() -> list[float]:
    @cache
    def common(left: tuple[str, ...], right: tuple[str, ...]) -> int:
        if not left or not right:
            return 0
        if left[0] == right[0]:
            return 1 + common(left[1:], right[1:])
        return max(common(left[1:], right), common(left, right[1:]))

    scores = []
    for words, group in zip(*split(punctuation=False), strict=True):
        lengths = [common(tuple(words), tuple(reference)) for reference in group]
        if not max(lengths):
            scores.append(0.0)
            continue
        precision = max(lengths) / len(words)
        recall = max(length / len(reference) for length, reference in zip(lengths, group, strict=True))
        scores.append(2.44 / (1 / precision + 1.44 / recall) if precision and recall else 0.0)
    return scores


def reference_cider() -> list[float]:
    """Dense tf-idf vectors over every n-gram there is."""
    import numpy

    words, groups = split(punctuation=False)
    scores = numpy.zeros(len(words))
    for n in range(1, 5):
        space = sorted({gram for text in (*words, *(r for group in groups for r in group)) for gram in grams(text, n)})
        frequency = [sum(any(gram in grams(r, n) for r in group) for group in groups) for gram in space]
        idf = numpy.log(len(groups)) - numpy.log(numpy.maximum(frequency, 1))
        for i, (written, group) in enumerate(zip(words, groups, strict=True)):
            left = numpy.array([grams(written, n).count(gram) for gram in space]) * idf
            for reference in group:
                right = numpy.array([grams(reference, n).count(gram) for gram in space]) * idf
                lengths = max(len(written), 1) - len(reference)  # an empty text has as many bigrams as one word
                norm = numpy.linalg.norm(left) * numpy.linalg.norm(right)
                if norm:
                    cosine = numpy.minimum(left, right) @ right / norm
                    scores[i] += 10 / 4 / len(group) * cosine * numpy.exp(-(lengths**2) / 72)
    return scores.tolist()


@pytest.fixture(autouse=True)
def without_meteor(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.cls is not TestMeteor:
        monkeypatch.setattr("galore_trainer.metrics.nlg.meteor_missing", lambda: "METEOR is skipped: here.")


def test_every_metric_equals_its_own_definition() -> None:
    scores = nlg_scores(PREDICTIONS, REFERENCES)
    assert scores["n"] == len(EXAMPLES)
    assert scores["bleu"] == pytest.approx(reference_bleu(), abs=1e-12)
    assert scores["nist"] == pytest.approx(reference_nist(), abs=1e-12)
    for key, expected in (("rouge_l", reference_rouge_l()), ("cider", reference_cider())):
        assert [row[key] for row in scores["per_example"]] == pytest.approx(expected, abs=1e-12)
        assert scores[key] == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    assert 0.3 < scores["bleu"] < 0.8
    assert 1 < scores["cider"] < 5
    assert scores["bleu_signature"].startswith("nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:")


def test_rouge_by_hand_takes_precision_and_recall_from_different_references() -> None:
    text = spaced("the pub is cheap")
    one = rouge_l([text], [[spaced("the cheap pub")]])[0]
    assert one == pytest.approx(2.44 * (2 / 4) * (2 / 3) / (2 / 3 + 1.44 * (2 / 4)))
    both = rouge_l([text], [[spaced("cheap"), spaced("people say that the pub is cheap today")]])[0]
    assert both == 1.0  # recall 1 of the first, precision 1 of the second


def test_nist_by_hand() -> None:
    assert nist([spaced("a b c d")], [[spaced("a b c d")]]) == pytest.approx(math.log2(4))
    assert nist([spaced("a b")], [[spaced("a b c")]]) == pytest.approx(math.log2(3) / 2)  # two thirds of the length
    assert nist([spaced("c")], [[spaced("a b")]]) == 0


def test_nist_compares_with_the_average_reference_of_the_whole_set() -> None:
    six = spaced("a b c d e f")
    predictions, references = [["x", "y"], six], [[["x", "y"]], [six] * 3]
    told = (2 * math.log2(20) + 6 * math.log2(20 / 3)) / 8  # x and y occur once among 20 tokens, the others thrice
    penalty = 0.5 ** ((math.log(8 / 10) / math.log(1.5)) ** 2)  # 20 tokens in 4 references, 2 examples; not 2 + 6
    assert nist(predictions, references) == pytest.approx(told * penalty)


def test_bleu_is_smoothed_where_no_four_tokens_match() -> None:
    score, _ = bleu(["one two three four six"], [["one two three five four six"]])
    assert score == pytest.approx((5 / 5 * 3 / 4 * 1 / 3 * 1 / (2 * 2)) ** 0.25 * math.exp(1 - 6 / 5))


def test_cider_knows_nothing_rare_in_a_set_of_one() -> None:
    assert cider([["a", "b"]], [[["a", "b"]]]) == [0.0]
    assert cider([["a"], ["b"]], [[["a"]], [["b"]]]) == [2.5, 2.5]  # of the four orders a single word has one


def test_a_text_that_is_a_reference_is_perfect() -> None:
    last = [references[-1] for references in REFERENCES]
    scores = nlg_scores([text.upper() for text in last], REFERENCES)
    assert scores["bleu"] == pytest.approx(1.0)
    assert scores["rouge_l"] == 1.0
    alone = nlg_scores(last, [[text] for text in last])
    assert alone["cider"] == pytest.approx(10 - 5 / 9)  # "A tavern." has no runs of three and four words


def test_order_of_references_and_of_examples_does_not_matter() -> None:
    scores, rng = nlg_scores(PREDICTIONS, REFERENCES), random.Random(0)
    mixed = rng.sample(EXAMPLES, len(EXAMPLES))
    again = nlg_scores([p for p, _ in mixed], [rng.sample(group, len(group)) for _, group in mixed])
    assert {key: again[key] for key in METRICS} == pytest.approx({key: scores[key] for key in METRICS})


def test_a_better_text_scores_better_under_every_metric() -> None:
    better = nlg_scores([REFERENCES[0][1], *PREDICTIONS[1:-1], REFERENCES[-1][0]], REFERENCES)
    before = nlg_scores(PREDICTIONS, REFERENCES)
    assert all(better[key] > before[key] for key in METRICS if key != "meteor")


def test_nothing_written_scores_nothing() -> None:
    scores = nlg_scores([""] * 3, REFERENCES[:3])
    assert [scores[key] for key in METRICS] == [0, 0, None, 0, 0]
    assert scores["notes"][0] == "METEOR is skipped: here."


class TestMeteor:
    """The program is replaced by one that speaks its protocol, so that neither Java nor its jar is needed."""

    @pytest.fixture
    def program(self, tmp_path, monkeypatch):
        """Install a ``java`` of the given Python code, and a package with a jar."""
        jar = tmp_path / "packages" / "pycocoevalcap" / "meteor" / "meteor-1.5.jar"
        jar.parent.mkdir(parents=True)
        jar.write_text("")
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        java = tmp_path / "bin" / "java"
        java.parent.mkdir()
        monkeypatch.setenv("PATH", str(java.parent))

        def install(code: str) -> None:
            java.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
            java.chmod(0o755)

        return install

    def test_tokens_go_in_and_the_corpus_score_comes_out(self, program, tmp_path):
        program(
            "log = open(sys.argv[4] + '.log', 'w')\n"
            "for line in iter(sys.stdin.readline, ''):\n"
            "    print(line.strip(), file=log, flush=True)\n"
            "    kind, *rest = line.strip().split(' ||| ')\n"
            "    answers = ['1 2 3'] if kind == 'SCORE' else ['0.5'] * len(rest) + ['0.25']\n"
            "    print(*answers, sep='\\n', flush=True)\n"
        )
        scores = nlg_scores(["It isn't cheap.", ""], [["Not cheap!", "It is £20-25."], ["A café."]])
        assert (scores["meteor"], scores["notes"]) == (0.25, [])
        (log,) = tmp_path.rglob("*.log")
        assert log.read_text(encoding="utf-8").splitlines() == [
            "SCORE ||| not cheap ||| it is # 20-25 ||| it is n't cheap",
            "SCORE ||| a café |||",
            "EVAL ||| 1 2 3 ||| 1 2 3",
        ]

    @pytest.mark.parametrize("code", ["", "print('Error')"])
    def test_a_program_that_fails_is_skipped_with_its_last_words(self, program, code):
        program(f"{code}\nsys.exit('needs a newer Java')")
        scores = nlg_scores(["a"] * 3, [["a"]] * 3)
        assert scores["meteor"] is None
        assert scores["notes"] == ["METEOR is skipped: its program failed (needs a newer Java)."]

    @pytest.mark.parametrize(("java", "package"), [pair for pair in product((True, False), repeat=2) if not all(pair)])
    def test_what_is_missing_is_named_with_the_way_to_get_it(self, program, monkeypatch, java, package):
        program("") if java else None
        monkeypatch.setattr(meteor_module, "_jar", lambda: "jar" if package else None)
        note = meteor_missing()
        assert ("apt-get install" in note) is not java
        assert ("pip install 'galore-trainer[meteor]'" in note) is not package
        assert nlg_scores(["a"], [["a"]])["notes"] == [note]

    @pytest.mark.skipif(meteor_missing() is not None, reason="needs Java and pycocoevalcap")
    def test_the_real_program(self):
        scores = nlg_scores(["A cat sat on the mat.", ""], [["The cat sat on the mat.", "A cat on a mat."], ["Hello."]])
        assert 0.2 < scores["meteor"] < 0.6
        assert nlg_scores(["A cat sat."], [["A cat sat."]])["meteor"] == pytest.approx(1.0)
