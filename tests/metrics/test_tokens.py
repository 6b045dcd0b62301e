import pytest

from galore_trainer.metrics.tokens import mteval, treebank


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It isn't Anna's, they're full.", "it is n't anna 's they 're full"),
        ("I can't, won't and cannot.", "i ca n't wo n't and can not"),
        ("I’m sure you’ve seen “it”", "i 'm sure you 've seen it"),
        ("Prices are £20-25 or £-25.", "prices are # 20-25 or # -25"),
        ("A family-friendly, low-priced café (5 out of 5)", "a family-friendly low-priced café ( 5 out of 5 )"),
        ("1,200 seats,all taken", "1,200 seats all taken"),
        ("50% at 3.5 $ and/or 24/7, A&B", "50 % at 3.5 $ and/or 24/7 a&b"),
        ("Open at 5 p.m. or 10:30, e.g. today...", "open at 5 p.m. or 10:30 e.g. today"),
        ("Mr. Lee's o'clock -- good.. yes - or; no: maybe", "mr. lee 's o'clock good yes or no maybe"),
        ("what?! Yes!", "what ?! yes"),
        ("'quoted' words", "quoted words"),
        ("gonna wanna gimme", "gon na wan na gim me"),
        ("", ""),
    ],
)
def test_treebank_tokens_without_punctuation(text, expected):
    """Checked against the output of Stanford's tokenizer."""
    assert treebank(text) == expected.split()


def test_mteval_tokens_keep_punctuation():
    first, second = mteval(["It's 3.5 km, family-friendly. 20-25!", ""])
    assert " ".join(first) == "it's 3.5 km , family-friendly . 20 - 25 !"
    assert second == []
