"""Build the distributions in dist/, check them, and try the wheel in an empty environment: ``make release-check``.

The wheel is tried outside the repository, by what a new user does first: help, doctor, schema, a run of a tiny model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from conftest import make_tiny_llama, make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
TRAIN = """train sft data.source=chats.jsonl data.eval_samples=2 model_name_or_path=model output_dir=run galore.rank=4
    max_steps=2 gradient_accumulation_steps=1 per_device_train_batch_size=2 max_length=64 use_cpu=true bf16=false
    eval.max_new_tokens=2 report_to=none"""


def main() -> None:
    """Build, check, install, run; a command that fails ends it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        wheel = build(home / "source")
        run(sys.executable, "-m", "twine", "check", "--strict", *map(str, DIST.iterdir()), cwd=ROOT)
        venv.create(home / "venv", with_pip=True)
        python, galore_ft = (str(home / "venv" / "bin" / name) for name in ("python", "galore-ft"))
        run(python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel), cwd=home)
        make_inputs(home)
        where = run(python, "-c", "import galore_trainer as g; print(g.__file__, g.__version__)", cwd=home)
        assert where.startswith(str(home / "venv")), where
        for words in ("--help", "--version", "doctor", "config list", "config schema", "config show quickstart", TRAIN):
            run(galore_ft, *words.split(), cwd=home)
        result = json.loads((home / "run" / "result.json").read_text(encoding="utf-8"))
        assert result["steps"] == 2
        print(f"{wheel.name} installs and trains; dist/ holds what is to be uploaded")


def build(source: Path) -> Path:
    """Build both distributions from the files that git tracks into dist/, which is emptied; returns the wheel."""
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", str(DIST), cwd=source)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def make_inputs(home: Path) -> None:
    """A tiny model and eight chats."""
    make_tiny_llama().save_pretrained(home / "model")
    make_tiny_tokenizer().save_pretrained(home / "model")
    turns = [
        [{"role": "user", "content": f"Name {i}."}, {"role": "assistant", "content": f"It is {i}."}] for i in range(8)
    ]
    (home / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))


def run(*command: str, cwd: Path) -> str:
    """Run a command with the repository on no path, and return what it printed; raises with it on a failure."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    print(f"{' '.join(command)[:110]}", flush=True)
    return done.stdout


if __name__ == "__main__":
    main()
