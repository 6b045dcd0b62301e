"""A command says what is about the run and nothing else: no message of a library, no traceback, one word at Ctrl-C."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer

from galore_trainer.cli.main import main
from galore_trainer.cli.outcome import in_words, report_error
from galore_trainer.cli.quiet import LEFT_OUT, WARNINGS, hush


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except type(error) as caught:
        return caught


def error_of(module: str, name: str, text: str) -> BaseException:
    """An error as a library has it; which of them is installed differs."""
    return type(name, (Exception,), {"__module__": module})(text)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no\nmemory"), "no memory"),
        (FloatingPointError("q_proj: ten steps"), "q_proj: ten steps"),
        (pickle.UnpicklingError("bad"), "a file holds Python objects, which are not loaded: bad"),
        (error_of("httpx", "ConnectError", "no route"), "the network failed: no route"),
        (error_of("httpx2._exceptions", "ReadTimeout", "late"), "the network failed: late"),
        (error_of("jinja2.exceptions", "UndefinedError", "x"), "the chat template of the tokenizer cannot be used: x"),
        (KeyError("step"), "KeyError in test_words.py, line {line}: 'step'"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (RuntimeError("x" * 5000), "x" * 400 + " ..."),
    ],
)
def test_an_error_is_a_sentence(error: BaseException, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = raised(error)
    assert error.__traceback__ is not None
    said = said.format(line=error.__traceback__.tb_lineno)
    assert in_words(error).startswith(said)
    assert report_error(error, debug=False) == 1
    text = capsys.readouterr().err
    assert text.startswith(f"Failed: {said}")
    assert "Traceback" not in text
    assert "--debug" in text
    assert report_error(error, debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x.yaml", "x" * 5000])
@pytest.mark.parametrize("words", [["train"], ["report"], ["eval"], ["inspect"], ["config", "validate"]])
def test_what_cannot_be_a_path_is_a_mistake(path: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, path]) == 2
    assert capsys.readouterr().err.startswith(("Error: path: got ", "Error: model_name_or_path: got "))


def test_a_panic_of_rust_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class PanicException(BaseException):
        pass

    def panic(*args: object, **kwargs: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("galore_trainer.run.scoring.score.score_files", panic)
    assert main(["score", "--task", "e2e", "--predictions", "a", "--references", "b"]) == 1
    text = capsys.readouterr().err
    assert "PanicException in test_words.py" in text
    assert "Traceback" not in text


def test_messages_are_left_out_by_name_and_others_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    filters = {name: list(logging.getLogger(name).filters) for name in LEFT_OUT}
    try:
        hush()
        hush()
        for name, starts in LEFT_OUT.items():
            logger = logging.getLogger(name)
            assert len(logger.filters) <= len(filters[name]) + 1
            caplog.set_level(logging.WARNING, name)
            logger.addHandler(caplog.handler)
            for start in starts:
                logger.warning(start + ": %s", "more")
            logger.warning("Something else of %s", name)
            logger.removeHandler(caplog.handler)
    finally:
        for name, before in filters.items():
            logging.getLogger(name).filters[:] = before
    assert {record.getMessage() for record in caplog.records} == {f"Something else of {name}" for name in LEFT_OUT}
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hush()
        for start in WARNINGS:
            warnings.warn(start + " and more", FutureWarning, stacklevel=1)
        warnings.warn("kept", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["kept"]


def test_training_prints_nothing_on_standard_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = [
        "max_steps=2",
        "galore.rank=4",
        "data.train_samples=20",
        "data.eval_samples=2",
        "eval.max_new_tokens=2",
        "gradient_checkpointing=true",
        f"model_name_or_path={tiny_model_dir}",
        "logging_steps=1",
    ]
    words = ["-m", "galore_trainer.cli", "train", "quickstart", *settings, "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = done.stdout.lower()
    assert [word for word in ("warning", "gemm_4bit", "accelerator", "pin_memory", "deprecated") if word in told] == []
    assert "step 2/2  loss " in done.stdout
    assert " tokens/s  " in done.stdout


def commands(group: typer.core.TyperGroup, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    found: dict[tuple[str, ...], object] = {}
    for name, command in group.commands.items():
        nested = hasattr(command, "commands")
        found.update(commands(command, (*above, name)) if nested else {(*above, name): command})  # type: ignore[arg-type]
    return found


def test_every_command_takes_an_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    from galore_trainer.cli.app import app

    found = commands(typer.main.get_command(app))  # type: ignore[arg-type]
    assert len(found) == 18
    for names, command in found.items():
        for option in (p for p in command.params if p.param_type_name == "option"):  # type: ignore[attr-defined]
            name = option.opts[-1]
            if name == "--help":
                continue
            pair = [name, name] if option.is_flag else [name, "1", name, "2"]
            assert main([*names, *pair]) == 2, (names, name)
            assert f"{name}: got 'given 2 times'" in capsys.readouterr().err
            if not option.is_flag:
                assert main([*names, name, " "]) == 2
                assert f"{name}: got ' ', wanted a value" in capsys.readouterr().err
    assert main(["train", "--warm-start", "--no-warm-start"]) == 2


@pytest.mark.parametrize("where", ["typer", "galore_trainer.run.settings.run_config", "transformers"])
def test_control_c_while_libraries_are_imported_is_one_word(where: str) -> None:
    """The import of a library raises what Ctrl-C raises in it."""
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {where!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from galore_trainer.cli.main import main\n"
        "sys.exit(main(['train', 'quickstart', 'model_name_or_path=.']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_a_pipe_whose_reader_has_gone_is_no_error() -> None:
    code = (
        "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "from galore_trainer.cli.main import main\nsys.exit(main(['config', 'list']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr == ""
    assert done.returncode == 1
