"""The steps of a plan in words."""

from __future__ import annotations

from types import SimpleNamespace

from galore_trainer.run.launching.plan import steps_in_words


def planned(examples: int, batch: int, accumulation: int = 1, world: int = 1, **more: object) -> str:
    arguments = SimpleNamespace(
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=False,
        max_steps=-1,
        num_train_epochs=3,
        get_warmup_steps=lambda total: 0,
        lr_scheduler_type="linear",
    )
    return steps_in_words(arguments, examples, world, **more).partition("),")[0] + ")"  # type: ignore[arg-type]


def test_a_plan_tells_steps_and_examples_apart() -> None:
    assert planned(40, 2, 4) == "15 steps of 8 examples each (3 epochs of 5 steps)"
    assert planned(4, 2, world=2) == "3 steps of 4 examples each (3 epochs of 1 step)"
    assert (
        planned(2, 2, accumulation=8)
        == "3 steps of all 2 examples each, less than the batch of 16 (3 epochs of 1 step)"
    )
    assert planned(1, 6) == "3 steps of all 1 example each, less than the batch of 6 (3 epochs of 1 step)"
    assert planned(2, 6, packing=True) == "3 steps of 6 rows each (3 epochs of 1 step, fewer once they are packed)"
