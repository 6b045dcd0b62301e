"""Progress: one live line on a terminal, plain lines elsewhere, and a pace without evaluation and saving."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable

import pytest

from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training import progress
from galore_trainer.run.training.progress import Pace, counting
from galore_trainer.run.training.train import train

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Lets both streams end in one terminal of 80 columns, when it is called in a test."""

    def use() -> Terminal:
        stream = Terminal()
        for name, value in {"TERM": "xterm", "COLUMNS": "80", "LINES": "50"}.items():
            monkeypatch.setenv(name, value)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return use


def seen(stream: Terminal) -> list[str]:
    """What stood on the terminal's lines, one after the other."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", CONTROL.sub("", stream.getvalue())) if line.strip()]


def test_a_terminal_shows_one_live_line(short_run: Callable[..., RunConfig], terminal: Callable[[], Terminal]) -> None:
    stream = terminal()
    train(short_run("run", eval_strategy="steps", eval_steps=3, disable_tqdm=False))
    lines = seen(stream)
    bars = [line for line in lines if line.startswith(("training", "evaluating")) and "━" in line]
    last = r"training ━+ 6/6 loss \d\.\d+  lr [\d.e-]+  [\d,]+ tok/s 0:00:\d\d"
    assert re.fullmatch(last, bars[-1]), bars
    assert all(len(line) <= 80 for line in bars)
    assert sum("eval_loss" in line and line.startswith("step ") for line in lines) == 2
    assert not [line for line in lines if "{" in line or "it/s" in line or "%|" in line]
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") > 0  # the cursor is back


def test_the_terminal_is_as_before_after_an_error(
    short_run: Callable[..., RunConfig], terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr(progress.ProgressCallback, "on_log", fail)
    stream = terminal()
    with pytest.raises(RuntimeError, match="lost"):
        train(short_run("run", disable_tqdm=False))
    assert sys.stdout is sys.stderr is stream
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") > 0


def test_without_a_terminal_a_log_is_a_line_of_names_and_values(
    short_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    train(short_run("run", eval_strategy="steps", eval_steps=3))
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("step ")]
    number = r"[\d.]+(e-?\d+)?"
    shape = rf"step \d/6  loss {number}  grad_norm {number}  learning_rate {number}  projection_error {number}"
    assert sum(bool(re.fullmatch(rf"{shape}  \d+ tokens/s  \d+ s", line)) for line in lines) == 6, lines
    assert sum(bool(re.fullmatch(rf"step \d/6  eval_loss {number}  \d+ s", line)) for line in lines) == 2, lines
    assert captured.err == ""


def test_a_pace_leaves_out_what_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    pace = Pace()
    assert pace.steps_per_second() is None
    pace.start()
    for _ in range(4):
        now[0] += 0.5
        pace.step()
        now[0] += 60.0  # an evaluation
        pace.resume()
        now[0] += 30.0  # a checkpoint
        pace.resume()
    assert pace.steps_per_second() == pytest.approx(2.0)


def test_counting_without_a_terminal_ends_with_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("scored") as show:
        for done in range(1, 4):
            show(done, 3)
    with counting("scored", silent=True) as show:
        show(3, 3)
    assert capsys.readouterr().out == "scored 3 of 3\n"
