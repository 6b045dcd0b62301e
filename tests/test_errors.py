"""An error of another package is repeated in one line, with its type."""

from __future__ import annotations

import pickle

import pytest

from galore_trainer.errors import LONGEST, OptionError, one_line, typed_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("state"), "KeyError: 'state'"),
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (EOFError(), "EOFError"),
    ],
)
def test_an_error_in_one_line_begins_with_its_type(error: Exception, line: str) -> None:
    assert typed_line(error) == line


def test_a_long_message_is_cut() -> None:
    assert one_line(ValueError("x" * 2 * LONGEST)) == "x" * LONGEST + " ..."


def test_an_address_at_the_cut_stays_whole() -> None:
    address = "https://huggingface.co/docs/transformers/installation#offline-mode"
    for before in (LONGEST - 5, LONGEST - len(address)):
        begin = "x" * (before - 1) + " " + address
        assert one_line(ValueError(begin + " and more")) == begin + " ..."
        assert one_line(ValueError(begin)) == begin
    assert one_line(ValueError("x" * LONGEST + " " + address)) == "x" * LONGEST + " ..."


def test_an_option_error_crosses_processes_with_its_parts() -> None:
    error = pickle.loads(pickle.dumps(OptionError("galore.rank", 0, "at least 1", "Use 4.")))
    assert (error.option, error.got, error.wanted, error.way_out) == ("galore.rank", 0, "at least 1", "Use 4.")
