"""Generation equals the one-by-one loop, leaves the model as it was, and scores what it wrote."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import warnings

import pytest
import torch
from transformers import GenerationConfig

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import DataConfig, Example
from galore_trainer.run.device import uses_bf16
from galore_trainer.run.models.model import load_model
from galore_trainer.run.models.prompts import encode, encode_all, make_collator, render_prompt
from galore_trainer.run.scoring.evaluate import eval_loss, evaluate, evaluate_examples, generate
from galore_trainer.run.settings.run_config import EvalConfig, RunConfig


def example(length: int) -> Example:
    turn = {"role": "user", "content": "1" * length + "?"}
    return Example(messages=(turn,), target=f"so\n#### {length}", answer=str(length), id=f"eval/{length}")


EXAMPLES = [example(length) for length in (3, 17, 1, 9, 2)]
UNSEEN = ["23+4?", "Why", "<|im_start|>user\n11111?<|im_end|>\n<|im_start|>assistant\n", "1" * 30]


@pytest.fixture(scope="module")
def taught(tiny_model_dir):
    """The tiny model, trained with our collator until it writes the five targets and stops."""
    model, tokenizer = load_model(str(tiny_model_dir))
    batch = make_collator(tokenizer)(encode_all(tokenizer, EXAMPLES, 512).rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(**batch).loss
        if loss.item() < 0.03:
            return model.eval(), tokenizer
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"not learnt: loss {loss.item()}")


@pytest.fixture
def loaded(taught):
    return copy.deepcopy(taught)


def prompts_of(tokenizer, examples=EXAMPLES) -> list[str]:
    return [render_prompt(tokenizer, item.messages) for item in examples]


def one_by_one(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """Greedy decoding without cache, padding, batch or ``generate``."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < max_new_tokens:
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_model_trained_on_targets_writes_them_and_stops(loaded):
    texts = generate(*loaded, prompts_of(loaded[1]), max_new_tokens=50, batch_size=5)
    assert texts == [item.target for item in EXAMPLES]


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_batches_write_what_one_prompt_alone_would_get(loaded, batch_size):
    prompts = [*prompts_of(loaded[1]), *UNSEEN]
    expected = [one_by_one(*loaded, prompt, 12) for prompt in prompts]
    assert len(set(expected)) > len(EXAMPLES)
    assert generate(*loaded, prompts, max_new_tokens=12, batch_size=batch_size) == expected


def test_an_end_token_of_the_model_alone_stops_too(loaded):
    model, tokenizer = loaded
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("#")]
    assert generate(model, tokenizer, prompts_of(tokenizer), max_new_tokens=50, batch_size=5) == ["so"] * 5


def test_model_and_tokenizer_are_left_as_they_were_and_nothing_is_warned_of(loaded, caplog, monkeypatch):
    model, tokenizer = loaded
    expected = generate(model, tokenizer, UNSEEN, max_new_tokens=8, batch_size=5)
    own = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=3.0, num_return_sequences=2)
    model.generation_config, model.config.use_cache = own, False
    before = own.to_dict()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, UNSEEN, max_new_tokens=8, batch_size=2) == expected
    assert caplog.records == []
    assert model.generation_config is own
    assert own.to_dict() == before
    assert model.config.use_cache is False
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.padding_side == "right"
    assert torch.is_grad_enabled()


def test_an_interruption_restores_the_model_too(loaded):
    model, tokenizer = loaded
    own = model.generation_config
    model.train()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, UNSEEN, max_new_tokens=2, batch_size=1, progress=interrupt)
    assert model.training
    assert model.generation_config is own


def test_progress_counts_prompts(loaded):
    seen: list[tuple[int, int]] = []
    generate(*loaded, ["a"] * 5, max_new_tokens=1, batch_size=2, progress=lambda *count: seen.append(count))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert generate(*loaded, [], max_new_tokens=1, batch_size=2) == []


def test_loss_is_the_mean_over_target_tokens_whatever_the_batches(tiny_llama, taught):
    tokenizer = taught[1]
    losses = []
    for item in EXAMPLES:
        row = encode(tokenizer, item, 512)
        logits = tiny_llama(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        losses.append(torch.nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="none"))
    expected = torch.cat(losses).mean().item()
    for batch_size in (1, 2, 5):
        assert eval_loss(tiny_llama, tokenizer, EXAMPLES, batch_size) == pytest.approx(expected, rel=1e-5)


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tiny_llama, taught):
    full = eval_loss(tiny_llama, taught[1], EXAMPLES, 5)
    low = eval_loss(tiny_llama, taught[1], EXAMPLES, 5, bf16=True)
    assert low != full
    assert low == pytest.approx(full, rel=0.02)  # bfloat16 has 8 bits of significand
    assert tiny_llama.dtype == torch.float32


def test_bf16_is_as_set_and_auto_asks_the_hardware(monkeypatch):
    assert uses_bf16(True, "cpu")
    assert not uses_bf16(False, "cpu")
    assert not uses_bf16(None, "cpu")
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert uses_bf16("auto", "cpu") is native


def config(**changes) -> RunConfig:
    run = RunConfig(eval=EvalConfig(max_new_tokens=20, batch_size=3), training={"use_cpu": True})
    return dataclasses.replace(run, **changes)


def test_score_interval_and_predictions_agree(loaded, tmp_path):
    wrong = dataclasses.replace(EXAMPLES[0], answer="4", id="eval/wrong")
    path = tmp_path / "deep" / "predictions.jsonl"
    result = evaluate_examples(*loaded, "arithmetic", [*EXAMPLES, wrong], config(), predictions_path=path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["correct"] for row in rows] == [True] * 5 + [False]
    assert rows[1] == {
        "id": "eval/17",
        "prompt": prompts_of(loaded[1])[1],
        "prediction": "so\n#### 17",
        "answer": "17",
        "extracted": "17",
        "correct": True,
    }
    assert result["score"] == 5 / 6
    assert (result["metric"], result["extract"]) == ("exact_match_flexible", "flexible")
    assert result["n"] == 6
    assert result["interval"][0] < result["score"] < result["interval"][1]
    assert result["eval_loss"] == pytest.approx(eval_loss(*loaded, [*EXAMPLES, wrong], 2), rel=1e-5)
    assert result["eval_loss_dropped"] == 0
    assert result["seconds"] > 0


def test_limit_and_examples_too_long_for_the_loss_are_counted(loaded):
    shorter = len(encode(loaded[1], EXAMPLES[0], 512)["input_ids"])
    run = config(eval=EvalConfig(limit=2, max_new_tokens=2), max_length=shorter)
    result = evaluate_examples(*loaded, "arithmetic", EXAMPLES, run)
    assert (result["n"], result["eval_loss_dropped"]) == (2, 1)


def test_a_task_without_answers_has_a_loss_and_no_score(loaded):
    free = [dataclasses.replace(item, answer=None) for item in EXAMPLES]
    result = evaluate_examples(*loaded, "sft", free, config())
    assert (result["score"], result["interval"], result["n"]) == (None, None, 5)
    assert (result["metric"], result["extract"]) == (None, None)
    assert result["eval_loss"] < 0.05


def test_texts_are_scored_against_their_references_and_bleu_stands_for_them(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("galore_trainer.metrics.nlg.meteor_missing", lambda: "METEOR is skipped: here.")
    texts = [
        dataclasses.replace(item, answer=None, references=(f"so #### {item.answer}", "it is so")) for item in EXAMPLES
    ]
    path = tmp_path / "predictions.jsonl"
    result = evaluate_examples(*loaded, "nlg", texts, config(), predictions_path=path)
    assert (result["metric"], result["interval"], result["extract"]) == ("bleu", None, None)
    assert result["score"] == result["bleu"] == pytest.approx(1.0)
    assert result["rouge_l"] == 1.0
    assert result["meteor"] is None
    assert result["notes"][0] == "METEOR is skipped: here."
    assert "per_example" not in result
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
    assert (row["id"], row["references"], row["rouge_l"]) == ("eval/17", ["so #### 17", "it is so"], 1.0)


def test_nothing_to_evaluate_on_is_refused(loaded):
    with pytest.raises(OptionError, match="at least one example"):
        evaluate_examples(*loaded, "arithmetic", [], config())


def test_evaluate_loads_model_and_data_by_name(tiny_model_dir):
    result = evaluate(str(tiny_model_dir), config(data=DataConfig(eval_samples=3, train_samples=1)))
    assert (result["task"], result["n"], result["extract"]) == ("arithmetic", 3, "flexible")
