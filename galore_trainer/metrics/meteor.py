"""METEOR 1.5 (Denkowski and Lavie, WMT 2014) by its authors' Java program, which the package pycocoevalcap contains.

That package's own class is not used, because it waits for ever once Java has failed.
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
    """What METEOR needs and how to install it, as a sentence; None where nothing is missing."""
    missing = [name for name, path in ((PACKAGE, _jar()), (JAVA, shutil.which("java"))) if not path]
    return f"METEOR is skipped: it needs {' and '.join(missing)}." if missing else None


def meteor(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """METEOR of tokenized texts, each against all of its references, from 0 to 1. Java starts in about seven seconds.

    Args:
        predictions: for each example, the tokens of its prediction, as ``tokens.treebank`` gives them.
        references: for each example, the tokens of its references.

    Raises:
        RuntimeError: the program failed; the message ends with its last output.
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
        except (OSError, ValueError) as error:  # the pipe broke, or the output is not a number
            log.seek(0)
            words = " ".join(log.read().decode(errors="replace").split())
            raise RuntimeError(f"METEOR is skipped: its program failed ({words[-300:] or error}).") from error


def _converse(
    process: subprocess.Popen[str],
    predictions: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
) -> float:
    """Send the program every example, then the statistics that it returned; its last line is the score of all."""
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
