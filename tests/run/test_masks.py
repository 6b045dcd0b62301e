"""Labels are the tokens of every assistant turn that is trained on, with what ends it, under any chat template."""

from __future__ import annotations

import itertools

import pytest
import torch

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import Example
from galore_trainer.run.models.model import load_tokenizer
from galore_trainer.run.models.prompts import (
    IGNORED,
    encode,
    encode_all,
    render_prompt,
    stop_at_turns,
    stop_ids,
    token_ids,
)

CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue, assistant said."},
    {"role": "user", "content": "Blue?"},
    {"role": "assistant", "content": "Yes,\nblue."},
    {"role": "user", "content": "Another one."},
)
TARGET = "Green."
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# name -> template, what ends a turn, what ends the last one
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>", ""),
    "begin, stripped": (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n\n{% endif %}",
        "<|im_end|>",
        "",
    ),
    "no generation prompt": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'system' %}<<{{ m.content }}>>{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        "<|im_end|>",
        "",
    ),
    "ended by text": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} ###\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        " ###",
        "<|im_end|>",
    ),
    "not ended": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "",
        "<|im_end|>",
    ),
    "blank before the answer": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "",
        "<|im_end|>",
    ),
    "marks": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{%- generation -%}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        "",
    ),
}
DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*trained: int) -> Example:
    return Example(messages=CHAT, target=TARGET, answer=None, id="chats.jsonl:3", trained=trained)


def trained_texts(tokenizer, row) -> list[str]:
    """Each stretch of labels as text; they are the ids at their places."""
    assert len(row["input_ids"]) == len(row["labels"])
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    runs = itertools.groupby(row["labels"], key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for has_label, run in runs if has_label]


@pytest.fixture(params=["byte by byte", "SmolLM2"])
def tokenizer(request, tiny_model_dir):
    if request.param == "SmolLM2":
        return load_tokenizer(str(request.getfixturevalue("embedded_model_dir")))
    return load_tokenizer(str(tiny_model_dir))


def test_smollm2_s_own_template(embedded_model_dir):
    tokenizer = load_tokenizer(str(embedded_model_dir))
    row = encode(tokenizer, chat(2, 4), 512)
    assert trained_texts(tokenizer, row) == [
        "Blue, assistant said.<|im_end|>",
        "Yes,\nblue.<|im_end|>",
        "Green.<|im_end|>",
    ]
    whole = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": TARGET}], return_dict=True)
    assert row["input_ids"] == whole["input_ids"][: len(row["input_ids"])]
    assert tokenizer.decode(whole["input_ids"][len(row["input_ids"]) :]) == "\n"


@pytest.mark.parametrize("trained", [(), (4,), (2, 4)])
@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_decode_to_the_turns(name, trained, tokenizer):
    tokenizer.chat_template, end, last_end = TEMPLATES[name]
    row = encode(tokenizer, chat(*trained), 512)
    answers = [CHAT[turn]["content"] for turn in trained] + [TARGET]
    expected = [f"{answer}{end}" for answer in answers]
    expected[-1] += last_end
    assert [text.strip() for text in trained_texts(tokenizer, row)] == [text.strip() for text in expected]
    prompt = token_ids(tokenizer, render_prompt(tokenizer, CHAT))
    if name == "blank before the answer" and trained:
        return  # each answer begins after the blank, with which the tokens of a whole text join it
    assert row["input_ids"][: len(prompt)] == prompt  # what the model reads when it generates the last answer


def test_without_a_template_the_texts_of_all_answers_are_trained_on(tokenizer):
    tokenizer.chat_template = None
    row = encode(tokenizer, chat(2, 4), 512)
    assert trained_texts(tokenizer, row) == [" Blue, assistant said.", " Yes,\nblue.", " Green.<|im_end|>"]


def test_a_template_that_changes_earlier_turns_is_refused_by_name(tokenizer):
    tokenizer.chat_template = DROPS_THINKING
    with pytest.raises(OptionError, match=r"chat_template.*turn 3 of chats\.jsonl:3.*data\.train_on=last") as error:
        encode_all(tokenizer, [chat(2, 4)], 512)
    assert tokenizer.name_or_path in error.value.got
    assert trained_texts(tokenizer, encode(tokenizer, chat(), 512)) == ["<think></think>Green.<|im_end|>"]


def test_a_prompt_that_opens_a_thought_is_followed_by_the_answer(tokenizer):
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    row = encode(tokenizer, chat(), 512)
    assert tokenizer.decode(row["input_ids"]).endswith("<think>\nGreen.<|im_end|>")
    assert trained_texts(tokenizer, row) == ["Green.<|im_end|>"]


def test_marks_that_are_not_one_for_each_answer_are_refused(tokenizer):
    tokenizer.chat_template = TEMPLATES["marks"][0].replace("m.role == 'assistant'", "loop.last")
    with pytest.raises(OptionError, match=r"3 turns between.*chats\.jsonl:3.*It marks 1"):
        encode(tokenizer, chat(2, 4), 512)


def test_generation_stops_where_the_template_ends_a_turn(tokenizer, tiny_llama):
    """The end of a turn is another token than the tokenizer's end token, as with base models that get a template."""
    end, text_end = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|endoftext|>"
    assert encode(tokenizer, chat(), 512)["labels"][-1] == end
    tiny_llama.generation_config.eos_token_id = text_end
    assert stop_ids(tiny_llama, tokenizer) == [text_end, end]
    stop_at_turns(tiny_llama, tokenizer)
    assert tiny_llama.generation_config.eos_token_id == [text_end, end]


def test_a_raw_text_is_trained_on_as_a_whole_and_long_ones_in_pieces(tokenizer, tiny_llama):
    example = Example(messages=(), target="Once upon a time there was a colour.", answer=None, id="t.jsonl:1")
    row = encode(tokenizer, example, 512)
    assert row["labels"] == row["input_ids"] == [*token_ids(tokenizer, example.target), tokenizer.eos_token_id]
    pieces = encode_all(tokenizer, [example], 5).rows
    assert all(2 <= len(piece["input_ids"]) <= 5 for piece in pieces)
    targets = [label for piece in pieces for label in piece["labels"][1:]]
    assert targets == row["labels"][1:]  # every token but the first is predicted once


def test_the_loss_of_all_turns_is_the_mean_over_the_losses_of_each(tiny_model_dir, tiny_llama):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    row = encode(tokenizer, chat(2, 4), 512)
    ids = torch.tensor([row["input_ids"]])
    total, count = 0.0, 0
    for end in (2, 4, 6):
        answer = CHAT[end]["content"] if end < 6 else TARGET
        alone = encode(tokenizer, Example(messages=CHAT[:end], target=answer, answer=None, id="x"), 512)
        tokens = sum(label != IGNORED for label in alone["labels"])
        one = tiny_llama(input_ids=torch.tensor([alone["input_ids"]]), labels=torch.tensor([alone["labels"]]))
        total, count = total + one.loss.item() * tokens, count + tokens
    loss = tiny_llama(input_ids=ids, labels=torch.tensor([row["labels"]])).loss
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
