"""What the model reads is what it is trained on; the loss is on target and end token; padding is by position."""

from __future__ import annotations

import pytest
import torch

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import Example
from galore_trainer.run.models.model import load_tokenizer
from galore_trainer.run.models.prompts import IGNORED, encode, encode_all, make_collator, pad_prompts, render_prompt


@pytest.fixture
def tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir))


def example(question: str = "2 + 3?", target: str = "5\n#### 5", id: str = "train/0") -> Example:
    return Example(messages=({"role": "user", "content": question},), target=target, answer="5", id=id)


def test_prompt_ends_where_the_assistant_begins(tokenizer):
    assert render_prompt(tokenizer, example().messages) == "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{% for m in messages %}", "its line 1"),
        ("{{ messages[9]['role'] }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10 ** 9) %}a{% endfor %}", "OverflowError"),
        ("{% if false %}a{% endif %}", "writes nothing"),
    ],
)
def test_a_template_that_raises_is_named_with_the_row(template, said, tokenizer):
    tokenizer.chat_template = template
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"})
    bad = Example(messages=turns, target="5", answer="5", id="rows.jsonl:7")
    with pytest.raises(OptionError, match=r"chat_template.*rows\.jsonl:7.*system, user.*data\.system_prompt") as error:
        encode_all(tokenizer, [bad], 512)
    assert said in str(error.value)
    assert tokenizer.name_or_path in error.value.got


def test_without_a_template_the_prompt_is_plain_and_the_target_follows_a_blank(tokenizer):
    tokenizer.chat_template = None
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + {1}?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 3?"},
    ]
    assert render_prompt(tokenizer, turns) == (
        "Be brief.\n\nQuestion: 1 + {1}?\nAnswer: 2\n\nQuestion: 2 + 3?\nAnswer:"
    )
    assert tokenizer.decode(encode(tokenizer, example(), 512)["input_ids"]) == (
        "Question: 2 + 3?\nAnswer: 5\n#### 5<|im_end|>"
    )


def test_a_begin_token_that_the_tokenizer_sets_by_itself_is_written_once(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    ids = encode(tokenizer, example(), 512)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_loss_is_on_target_and_end_alone_although_pad_is_eos(tokenizer):
    row = encode(tokenizer, example(), 512)
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(trained) == "5\n#### 5<|im_end|>"
    assert row["labels"][-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    prompt = tokenizer(render_prompt(tokenizer, example().messages), add_special_tokens=False)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)


def test_an_example_is_whole_or_dropped(tokenizer):
    length = len(encode(tokenizer, example(), 512)["input_ids"])
    assert not encode(tokenizer, example(), length)["truncated"]
    assert encode(tokenizer, example(), length - 1)["truncated"]
    rows, dropped = encode_all(tokenizer, [example(id="a"), example("2 + 33?", id="b")], length)
    assert (len(rows), dropped) == (1, ["b"])
    assert rows[0]["input_ids"][-1] == tokenizer.eos_token_id
    with pytest.raises(OptionError, match=f"at least {length}"):
        encode_all(tokenizer, [example("2 + 33?"), example()], length - 1)


def test_batches_are_padded_on_the_right_by_position(tokenizer):
    rows, _ = encode_all(tokenizer, [example(), example("2 + 3 + 4 + 5?")], 512)
    batch = make_collator(tokenizer)(rows)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == row["input_ids"]
        assert batch["labels"][i, :length].tolist() == row["labels"]
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert (batch["labels"][i, length:] == IGNORED).all()
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 2


def test_padding_changes_no_loss(tokenizer, tiny_llama):
    rows, _ = encode_all(tokenizer, [example(), example("2 + 3 + 4 + 5?")], 512)
    tight = make_collator(tokenizer)(rows[:1])
    wide = make_collator(tokenizer, pad_to_multiple_of=64)(rows[:1])
    assert wide["input_ids"].shape[1] == 64
    torch.testing.assert_close(tiny_llama(**tight).loss, tiny_llama(**wide).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("lengths", [(1,), (5, 5), (2, 7, 3), (8, 1)])
@pytest.mark.parametrize("saved", [{}, {"padding_side": "left", "model_input_names": ["input_ids", "token_type_ids"]}])
def test_batches_are_right_padded_tensors_whatever_the_tokenizer_does_by_itself(multiple, lengths, saved, tokenizer):
    for key, value in saved.items():
        setattr(tokenizer, key, value)
    before = (tokenizer.padding_side, list(tokenizer.model_input_names))
    rows = [{"input_ids": list(range(4, 4 + n)), "labels": [IGNORED, *range(5, 4 + n)]} for n in lengths]
    batch = make_collator(tokenizer, pad_to_multiple_of=multiple)(rows)
    width = next(n for n in range(max(lengths), 99) if n % multiple == 0)
    filled = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
    assert list(batch) == list(filled)
    for key, value in filled.items():
        expected = [[*row.get(key, [1] * n), *[value] * (width - n)] for row, n in zip(rows, lengths, strict=True)]
        assert torch.equal(batch[key], torch.tensor(expected, dtype=torch.int64))
        assert batch[key].is_contiguous()
    prompts = pad_prompts(tokenizer, [row["input_ids"] for row in rows])
    most = max(lengths)
    assert {key: value.tolist() for key, value in prompts.items()} == {
        "input_ids": [[tokenizer.pad_token_id] * (most - n) + list(range(4, 4 + n)) for n in lengths],
        "attention_mask": [[0] * (most - n) + [1] * n for n in lengths],
    }
    assert (tokenizer.padding_side, tokenizer.model_input_names) == before
