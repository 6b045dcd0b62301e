"""The two tokenizations of the E2E scorer: mteval-v13a for BLEU and NIST, Penn Treebank for its other metrics.

``treebank`` does without Java what Stanford's PTBTokenizer 3.4.1 does for the COCO caption scorers: lower case, ``#``
for ``£``, no punctuation. Of the 9,365 references in E2E's development and test sets nine differ: they contain
``center.`` before a lower-case letter, which Stanford takes for an abbreviation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = frozenset(("'", '"', "`", "``", "''", ".", "..", "...", ",", ":", ";", "?", "!", "-", "--", "---"))
ONE_SPELLING = str.maketrans(dict(zip("‘’“”–—…£€", "''\"\"--.#$", strict=True)))
WORD = r"(?:(?!n't\b)\w)+"
JOINT = r"(?:[-./&@]|(?<=\d)[,:](?=\d)|'(?!(?:s|m|d|re|ve|ll|t)\b))"
TOKENS = (  # the first that matches counts
    r"(?:[^\W\d_]\.){2,}",  # e.g.
    r"(?:mrs?|ms|dr|st|prof|jr|sr|vs|etc|inc|ltd|co)\.(?!\w)",
    r"can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b)",
    r"n't\b|'(?:s|m|d|re|ve|ll)\b",  # the ends of isn't and it's
    rf"{WORD}(?:{JOINT}{WORD})*",  # family-friendly, o'clock, 1,200, and/or
    r"-\d+(?:[.,]\d+)*|\.{2,}|-{2,}|[?!]+|\S",
)
TOKEN = re.compile("|".join(TOKENS))


def treebank(text: str) -> list[str]:
    """Lower-cased Penn Treebank tokens without punctuation: ``It isn't £20-25.`` becomes ``it is n't # 20-25``."""
    return [token for token in TOKEN.findall(text.lower().translate(ONE_SPELLING)) if token not in PUNCTUATION]


def mteval(texts: Sequence[str]) -> list[list[str]]:
    """Lower-cased tokens of mteval-v13a, punctuation included, as sacrebleu splits texts for BLEU."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    return [tokenize(text.lower().rstrip()).split() for text in texts]
