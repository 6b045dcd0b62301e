"""Score texts against several references: the five metrics of the E2E challenge (github.com/tuetschek/e2e-metrics).

These equal the challenge's scorer, so that results can be compared with published ones: BLEU and NIST on the tokens of
mteval-v13a; METEOR, ROUGE-L and CIDEr on Penn Treebank tokens. All are corpus scores. CIDEr weighs n-grams by their
rarity in the evaluated set: values on different sets cannot be compared, and on a set of one example it is 0.

Beside them stand the ROUGE scores of Google's package (``metrics/rouge.py``), which papers on summaries quote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from galore_trainer.metrics.meteor import meteor, meteor_missing
from galore_trainer.metrics.rouge import ROUGE, rouge, rouge_missing
from galore_trainer.metrics.tokens import mteval, treebank

METRICS = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
"""Key and usual name of each metric of the challenge."""
TEXT_METRICS = {**METRICS, **ROUGE}
"""Those, and beside them Google's ROUGE."""
PER_EXAMPLE = ("rouge_l", "cider", *ROUGE)
"""Metrics that each example has, where their package is installed."""

Tokens = Sequence[str]


def nlg_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Score texts by all of ``TEXT_METRICS``.

    Args:
        predictions: one text for each example; it may be empty.
        references: for each example its right answers, at least one.

    Returns:
        ``n``, ``bleu``, ``nist``, ``meteor``, ``rouge_l``, ``cider``, ``rouge1``, ``rouge2``, ``rougeL`` (None where a
        metric's package is not installed); ``bleu_signature`` (sacrebleu's); ``notes``, sentences on what was skipped;
        ``per_example`` with those of ``PER_EXAMPLE`` that ran. BLEU, METEOR and ROUGE go from 0 to 1, CIDEr from 0 to
        10, NIST has no upper bound.
    """
    assert predictions, "nothing to score"
    assert len(predictions) == len(references), f"{len(predictions)} predictions for {len(references)} examples"
    assert all(references), "an example without references"
    bleu_score, signature = bleu(predictions, references)
    words = [treebank(text) for text in predictions]
    right = [[treebank(text) for text in group] for group in references]
    overlaps, consensus = rouge_l(words, right), cider(words, right)
    meteor_score, skipped = None, meteor_missing()
    if skipped is None:
        try:
            meteor_score = meteor(words, right)
        except RuntimeError as error:
            skipped = str(error)
    no_rouge = rouge_missing()
    googles = rouge(predictions, references) if no_rouge is None else [{} for _ in predictions]
    return {
        "n": len(predictions),
        "bleu": bleu_score,
        "nist": nist(mteval(predictions), [mteval(group) for group in references]),
        "meteor": meteor_score,
        "rouge_l": sum(overlaps) / len(overlaps),
        "cider": sum(consensus) / len(consensus),
        **{key: None if no_rouge else sum(scores[key] for scores in googles) / len(googles) for key in ROUGE},
        "bleu_signature": signature,
        "notes": [note for note in (skipped, no_rouge) if note],
        "per_example": [{"rouge_l": r, "cider": c, **g} for r, c, g in zip(overlaps, consensus, googles, strict=True)],
    }


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Lower-cased BLEU (Papineni et al., ACL 2002) by sacrebleu, from 0 to 1; and sacrebleu's signature.

    Orders of which no n-gram matches are smoothed as in mteval-v13a (``smooth:exp``).
    """
    from sacrebleu.metrics import BLEU

    # sacrebleu takes the first references of all examples, then the second ones; None where an example has fewer
    most_references = max(map(len, references))
    columns = [[group[i] if i < len(group) else None for group in references] for i in range(most_references)]
    metric = BLEU(lowercase=True, smooth_method="exp", force=True)
    score = metric.corpus_score(list(predictions), columns)  # type: ignore[arg-type]
    return score.score / 100, str(metric.get_signature())


def nist(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 5) -> float:
    """NIST (Doddington, HLT 2002) of tokens: matching n-grams weighed by their information, times a length penalty.

    The information of an n-gram, in bits, is log2 of how often its first n - 1 tokens occur in the references over how
    often all n occur. The length is compared with the average reference of the whole set, as mteval-v13a.pl does and
    papers quote. The E2E scorer's ``-p`` averages within each example first, which differs where examples have
    different numbers of references.
    """
    occurrences: Counter[tuple[str, ...]] = Counter()
    for group in references:
        for n in range(1, order + 1):
            for tokens in group:
                occurrences.update(ngrams(tokens, n))
    total = sum(len(tokens) for group in references for tokens in group)
    occurrences[()] = total
    score = 0.0
    for n in range(1, order + 1):
        information, written = 0.0, 0
        for tokens, group in zip(predictions, references, strict=True):
            predicted = ngrams(tokens, n)
            written += predicted.total()
            matches = predicted & _most_in_one(group, n)
            information += sum(
                count * math.log2(occurrences[gram[:-1]] / occurrences[gram]) for gram, count in matches.items()
            )
        score += information / max(written, 1)
    average = total / (sum(map(len, references)) / len(references))
    ratio = min(1.0, sum(map(len, predictions)) / average) if average else 0.0
    beta = -math.log(0.5) / math.log(1.5) ** 2  # the penalty is 0.5 at two thirds of the reference's length
    return score * math.exp(-beta * math.log(ratio) ** 2) if ratio else 0.0


def rouge_l(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], beta: float = 1.2) -> list[float]:
    """ROUGE-L (Lin, 2004) of each example, from 0 to 1: the longest common subsequence as an F measure.

    As in COCO's scorer the best precision and the best recall count, which may come from different references.
    """
    scores = []
    for tokens, group in zip(predictions, references, strict=True):
        common = [(_common_length(tokens, reference), len(reference)) for reference in group]
        precision = max(length / max(len(tokens), 1) for length, _ in common)
        recall = max(length / max(size, 1) for length, size in common)
        weighted_sum = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / weighted_sum if weighted_sum else 0.0)
    return scores


def cider(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D (Vedantam et al., CVPR 2015) of each example, from 0 to 10: similarity of rarity-weighted n-grams.

    The rarity of an n-gram is log(N / d): d of the N examples have it in their references.
    """
    documents: Counter[tuple[str, ...]] = Counter()
    for group in references:
        documents.update({gram for tokens in group for n in range(1, 5) for gram in ngrams(tokens, n)})

    def vector(tokens: Tokens, n: int) -> dict[tuple[str, ...], float]:
        return {
            gram: count * math.log(len(references) / max(documents[gram], 1))
            for gram, count in ngrams(tokens, n).items()
        }

    def similarity(tokens: Tokens, reference: Tokens) -> float:
        bigrams = max(len(tokens) - 1, 0) - max(len(reference) - 1, 0)
        cosines = 0.0
        for n in range(1, 5):
            left, right = vector(tokens, n), vector(reference, n)
            size = math.hypot(*left.values()) * math.hypot(*right.values())
            clipped = sum(min(weight, right[gram]) * right[gram] for gram, weight in left.items() if gram in right)
            cosines += clipped / size if size else 0.0
        return cosines / 4 * math.exp(-(bigrams**2) / (2 * sigma**2))

    return [
        10 * sum(similarity(tokens, reference) for reference in group) / len(group)
        for tokens, group in zip(predictions, references, strict=True)
    ]


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    """How often each run of ``n`` tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _most_in_one(group: Sequence[Tokens], n: int) -> Counter[tuple[str, ...]]:
    """For each n-gram, how often it occurs in the reference that has it most often."""
    most: Counter[tuple[str, ...]] = Counter()
    for tokens in group:
        most |= ngrams(tokens, n)
    return most


def _common_length(left: Tokens, right: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for token in left:
        diagonal = 0
        for j, other in enumerate(right, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]
