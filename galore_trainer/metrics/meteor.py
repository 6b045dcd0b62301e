"""METEOR 1.5 (Denkowski and Lavie, WMT 2014) by its authors' program, which pycocoevalcap brings and Java runs.

The program is driven here and not through that package's class, which waits for ever once Java has failed.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

JAVA = "Java, which is not installed (Debian and Ubuntu: apt-get install default-jre-headless)"
PACKAGE = "the package pycocoevalcap, which is not installed (pip install 'galore-trainer[meteor]')"


def meteor_missing() -> str | None:
    """What METEOR lacks here and the way to get it, as a sentence; None where nothing is missing."""
    missing = [what for what, there in ((PACKAGE, _jar()), (JAVA, shutil.which("java"))) if not there]
    return f"METEOR is skipped: it needs {' and '.join(missing)}." if missing else None


def meteor(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """METEOR of tokenized texts, each against all its references, from 0 to 1; starting takes about seven seconds.

    Args:
        predictions: tokens of one text an example, as ``tokens.treebank`` gives them.
        references: for each example, the tokens of its references.

    Raises:
        RuntimeError: the program failed; its last words are in the message.
    """
    assert meteor_missing() is None, "ask meteor_missing() first"
    command = ["java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(_jar()), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as log:
        try:
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
            ) as process:
                try:
                    return _converse(process, predictions, references)
                finally:
                    process.kill()
        except (OSError, ValueError) as error:  # the pipe broke, or what came through it is no number
            log.seek(0)
            words = " ".join(log.read().decode(errors="replace").split())
            raise RuntimeError(f"METEOR is skipped: its program failed ({words[-300:] or error}).") from error


def _converse(
    process: subprocess.Popen[str],
    predictions: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
) -> float:
    """Ask for the statistics of each example, then for the score of all: it comes last, after those of the examples."""
    assert process.stdin is not None
    assert process.stdout is not None
    statistics = []
    for prediction, group in zip(predictions, references, strict=True):
        texts = [" ".join(tokens) for tokens in (*group, prediction)]
        print("SCORE", *texts, sep=" ||| ", file=process.stdin, flush=True)
        statistics.append(process.stdout.readline().strip())
    print("EVAL", *statistics, sep=" ||| ", file=process.stdin, flush=True)
    return [float(process.stdout.readline()) for _ in range(len(statistics) + 1)][-1]


def _jar() -> Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = spec.submodule_search_locations or () if spec else ()
    return next((jar for folder in folders if (jar := Path(folder, "meteor", "meteor-1.5.jar")).is_file()), None)
