"""Bad inputs to every sub-command: exit code and message stand in ``docs/bad-inputs.md``, no traceback, no exit 0.

UPDATE_BAD_INPUTS=1 in the environment of pytest writes the table anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from galore_trainer.cli.main import main
from odd_files import write_odd_files

TABLE = Path(__file__).parents[2] / "docs" / "bad-inputs.md"
HEAD = """\
# Bad inputs

What the commands say to inputs that they cannot honour, and what they exit with: 1 a run that failed, 2 a command line
or configuration that is refused. `tests/cli/test_bad_inputs.py` makes this table and compares it; the files in it are
those of `tests/helpers/odd_files.py`. Words of other libraries are left out (`...`).

| Command | Exit | Message |
| --- | --- | --- |
"""
# What a library says differs by its version.
FOREIGN = (
    r"(?<=It says: ).*",
    r"(?<=transformers can read\. )(?!It says|Its ).*",
    r"(?<=wanted one of linear, ).*",
    r"(?<=^Usage: ).*?(?= Error: )",
    r"(?<=Invalid value for ')(.*': ).*",
    r"(?<= \(Possible options: ).*",
    r"(?<=No such command 'trian'\. ).*",
)

COMMANDS = """
trian
--nosuch
config nosuch
config show
config show nosuch
config show quikstart
config validate
config validate nosuch
config validate vacant
config validate empty.yaml
config validate null.yaml
config validate list.yaml
config validate twice.yaml
config validate broken.yaml
config validate unknown.yaml
config validate python.yaml
config validate set.yaml
config validate digits.yaml
config validate deep.yaml
config validate bomb.yaml
config validate number.yaml
config validate latin.yaml
config validate foo.yaml
config validate foo_null.yaml
config validate foo_zero.yaml
config validate other_seed.yaml
config validate minus_seed.yaml
config validate typos.yaml
config validate factory.yaml
config list nosuch
config convert
config convert nosuch
config convert vacant
config convert empty.yaml
config convert broken.yaml
config convert tiny.yaml
config convert quickstart
config convert compose.yaml
config convert nearly.yaml
config convert compose.yaml --from trl
config convert factory.yaml --from unsloth
config schema nosuch
doctor nosuch
doctor --jsn
data preview
data preview nosuch
data preview tiny.yaml -n -1
data preview tiny.yaml -n 1 -n 2
data preview tiny.yaml data.source=nosuch.jsonl
data preview tiny.yaml data.source=
data preview tiny.yaml data.source=none.jsonl
data preview tiny.yaml data.source=half.jsonl
data preview tiny.yaml data.source=binary.jsonl
data preview tiny.yaml data.source=deep.jsonl
data preview tiny.yaml data.source=digits.jsonl
data preview tiny.yaml data.source=half_letter.jsonl
data preview tiny.yaml data.task=poem
data preview tiny.yaml model_name_or_path=vacant
state export nowhere out
state export tiny out
state export '' out
state import nowhere tiny.yaml
state import tiny tiny.yaml
score
score --task poem --predictions one.jsonl --references one.jsonl
score --task gsm8k --predictions '' --references one.jsonl
score --task gsm8k --predictions nosuch.jsonl --references one.jsonl
score --task gsm8k --predictions one.jsonl --references two.jsonl
score --task gsm8k --predictions numbers.jsonl --references one.jsonl
score --task gsm8k --predictions one.jsonl --references numbers.jsonl
score --task gsm8k --predictions half.jsonl --references one.jsonl
score --task gsm8k --predictions none.jsonl --references none.jsonl
score --task gsm8k --predictions binary.jsonl --references one.jsonl
score --task gsm8k --predictions vacant --references one.jsonl
score --task e2e --predictions texts.txt --references one.jsonl
score --task e2e --predictions texts.txt --references none.jsonl
score --task mawps --task e2e --predictions one.jsonl --references one.jsonl
report
report ''
report nowhere
report vacant
report braces
report nothing
report brackets
report binary
report null_config
report text_config
report null_seconds
report nan
report text_steps
report minus_steps
report no_gap
report one_limit
report half_letter
report binary_log
report list_log
report no_step
report unfinished
report good gsm8k
report good s_unfinished
report s_braces
report s_null
report s_cells
report s_runs
report s_unfinished
report good -o tiny.yaml
report good -o one -o two
report good --title ''
bench poem
bench step --device tpu
bench step --device cpu --profile
bench step --device cpu --shape huge
bench step --device cpu --rank 0
bench step --device cpu --rank many
bench step --device cpu --json vacant
bench step --device cpu --json tiny.yaml/rows.json
bench step --device cpu --details vacant
ablate
ablate nosuch
ablate nothing.yaml
ablate no_axis.yaml
ablate no_values.yaml
ablate one_value.yaml
ablate bad_value.yaml
ablate bad_metric.yaml
ablate bad_key.yaml
ablate bad_keys.yaml
ablate bad_seeds.yaml
ablate own_seed.yaml
ablate alike.yaml
ablate no_base.yaml
ablate huge.yaml
ablate empty.yaml
ablate small.yaml --seeds x --dry-run
ablate small.yaml --seeds -1 --dry-run
ablate small.yaml --seeds 0,0 --dry-run
ablate small.yaml --seeds '' --dry-run
ablate small.yaml --jobs 0 --dry-run
ablate small.yaml --max-cells 0 --dry-run
ablate small.yaml --only nothing --dry-run
ablate small.yaml galore.rank=4 --dry-run
ablate small.yaml lora.rank=4 --dry-run
ablate small.yaml base=nosuch --dry-run
ablate small.yaml --output-dir tiny.yaml --dry-run
ablate small.yaml --output-dir tiny --dry-run
ablate small.yaml --output-dir s_braces --dry-run
ablate small.yaml --output-dir s_cells --dry-run
ablate small.yaml --output-dir s_other --dry-run
inspect
inspect nowhere/at/all
inspect vacant
inspect m_empty
inspect m_nulls
inspect m_heads
inspect m_keys
inspect m_no_keys
inspect m_minus
inspect m_layers
inspect m_wide
inspect m_letters
inspect tiny galore.rank=4000
inspect tiny galore.target_modules=nosuch
inspect tiny galore.target_modules=attn
inspect tiny 'galore.target_modules=[attn, nosuch]'
inspect tiny 'galore.target_modules=[q_proj, nosuch]'
inspect tiny 'galore.target_modules=["*attn*"]'
inspect tiny galore.target_modules=all_linear
inspect tiny seed=-1
estimate
estimate nosuch
estimate tiny.yaml --methods sgd
estimate tiny.yaml --methods ''
estimate tiny.yaml --methods adamw,
estimate tiny.yaml --ranks 0 --methods galore_plus
estimate tiny.yaml --ranks x
estimate tiny.yaml --ranks 4 --ranks 8
estimate tiny.yaml --ranks 4000 --methods galore_plus
estimate tiny.yaml --num-processes 0
estimate tiny.yaml --launch-config megatron
estimate tiny.yaml --launch-config fsdp2 --methods lora
estimate tiny.yaml --model m_empty
estimate tiny.yaml --model m_heads
estimate tiny.yaml --model m_keys
estimate tiny.yaml --model m_wide
estimate tiny.yaml per_device_train_batch_size=0
estimate tiny.yaml gradient_accumulation_steps=0
eval
eval tiny
eval nowhere/at/all tiny.yaml
eval vacant tiny.yaml
eval tiny tiny.yaml --limit 0
eval tiny tiny.yaml --limit x
eval tiny tiny.yaml --limit ''
eval tiny tiny.yaml eval.batch_size=0
eval tiny tiny.yaml --predictions ''
eval tiny tiny.yaml --predictions vacant
eval tiny tiny.yaml --predictions tiny.yaml/p.jsonl
eval tiny tiny.yaml data.eval_samples=0
train
train ''
train nosuch
train tiny
train tiny.yaml twice
train tiny.yaml =3
train tiny.yaml --rank 4 --rank 5
train tiny.yaml --rank 4 galore.rank=5
train tiny.yaml galore.rank=4 galore.rank=4
train tiny.yaml --rank 0
train tiny.yaml --rank -1
train tiny.yaml --rank 1.5
train tiny.yaml --rank many
train tiny.yaml --rank ''
train tiny.yaml --rank 99999999999999999999
train tiny.yaml --rnak 4
train tiny.yaml --method sgd
train tiny.yaml --method adamw --rank 4
train tiny.yaml --method galore --svd randomized
train tiny.yaml --method lora --lora-rank 0
train tiny.yaml --method lora --lora-dropout 1
train tiny.yaml --trainer sft
train tiny.yaml packing=true
train tiny.yaml --resume ''
train tiny.yaml --resume ' '
train tiny.yaml --resume nowhere
train tiny.yaml --resume nowhere --dry-run
train tiny.yaml --resume auto --overwrite
train tiny.yaml --output-dir ''
train tiny.yaml output_dir=
train tiny.yaml --output-dir tiny.yaml
train tiny.yaml --output-dir tiny
train tiny.yaml --output-dir tiny --overwrite
train tiny.yaml --model ''
train tiny.yaml --model nowhere/at/all
train tiny.yaml --model embedded:gpt5
train tiny.yaml --num-processes 0
train tiny.yaml --num-processes two
train tiny.yaml --launch-config nosuch
train tiny.yaml --launch-config tiny.yaml
train tiny.yaml --launch-config fsdp2
train tiny.yaml --max-steps 0
train tiny.yaml max_steps=-2
train tiny.yaml max_steps=1.5
train tiny.yaml num_train_epochs=.inf
train tiny.yaml num_train_epochs=.nan
train tiny.yaml num_train_epochs=0
train tiny.yaml num_train_epochs=1e400
train tiny.yaml per_device_train_batch_size=0
train tiny.yaml per_device_train_batch_size=-1
train tiny.yaml per_device_eval_batch_size=0
train tiny.yaml gradient_accumulation_steps=0
train tiny.yaml gradient_accumulation_steps=-1
train tiny.yaml --seed -1
train tiny.yaml seed=4294967296
train tiny.yaml data_seed=-1
train tiny.yaml learning_rate=.nan
train tiny.yaml --learning-rate .inf
train tiny.yaml --learning-rate 1e400
train tiny.yaml learning_rate=-1
train tiny.yaml learning_rate=fast
train tiny.yaml weight_decay=-1
train tiny.yaml adam_beta1=1
train tiny.yaml adam_epsilon=-1
train tiny.yaml max_grad_norm=.nan
train tiny.yaml warmup_steps=-1
train tiny.yaml logging_steps=0
train tiny.yaml save_steps=0
train tiny.yaml save_total_limit=0
train tiny.yaml metric_for_best_model=accuracy
train tiny.yaml lr_scheduler_type=cosin
train tiny.yaml 'lr_scheduler_kwargs={speed: 2}'
train tiny.yaml eval_strategy=steps load_best_model_at_end=true save_strategy=no
train tiny.yaml bf16=true fp16=true
train tiny.yaml optim=adamw_torch
train tiny.yaml deepspeed=nosuch.json
train tiny.yaml methods.foo={}
train tiny.yaml galore=4
train tiny.yaml galore.scale=.inf
train tiny.yaml galore.residual_percent=101
train tiny.yaml galore.target_modules=[]
train tiny.yaml galore.target_modules=
train tiny.yaml galore.target_modules=all
train tiny.yaml --target-modules mlp,self_attn
train tiny.yaml 'galore.target_modules=[all-linear]'
train tiny.yaml 'galore.target_modules=[""]'
train tiny.yaml --method lora --lora-target-modules q_proj,v_proj
train tiny.yaml galore_target=all galore_rank=8 lerning_rate=1
train tiny.yaml optim_target_modules=all_linear
train tiny.yaml --model owner/nosuch stage=sft cutoff_len=99
train factory.yaml
train tiny.yaml 'galore.rank_pattern={o_proj: 0}'
train tiny.yaml galore.state_bits=4
train tiny.yaml max_length=1
train tiny.yaml data.train_samples=0
train tiny.yaml data.difficulty=9
train tiny.yaml data.split_seed=-1
train tiny.yaml data.source=nosuch.csv
train tiny.yaml data.source=numbers.jsonl
train tiny.yaml eval.extract=loose
train foo.yaml
train empty.yaml
"""
CASES = [line for line in COMMANDS.splitlines() if line]


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd")
    write_odd_files(path, tiny_model_dir)
    return path


@pytest.fixture(scope="module")
def said() -> Iterator[dict[str, str]]:
    """The table's rows as they come; written at the end where that is asked for."""
    rows: dict[str, str] = {}
    yield rows
    if os.environ.get("UPDATE_BAD_INPUTS"):
        TABLE.write_text(HEAD + "".join(rows[case] for case in CASES), encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_words(case: str, folder: Path, said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = files_of(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(case))
    assert code in (1, 2), out.getvalue()
    assert "Traceback" not in err.getvalue() + out.getvalue()
    assert files_of(folder) == before, "it changed files"
    said[case] = row(case, code, err.getvalue(), folder)
    if not os.environ.get("UPDATE_BAD_INPUTS"):
        assert said[case] in TABLE.read_text(encoding="utf-8"), "UPDATE_BAD_INPUTS=1 writes docs/bad-inputs.md anew"


def files_of(folder: Path) -> dict[Path, int]:
    """Everything in a folder, and when each file was written."""
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")}


def row(case: str, code: int, text: str, folder: Path) -> str:
    """A line of the table: one message without the place of the folder and without the words of libraries."""
    message = " ".join(text.replace(f"{folder}/", "").replace(str(folder), ".").split())
    for words in FOREIGN:
        message = re.sub(words, lambda match: f"{match[1] if match.re.groups else ''}...", message)
    assert message, "nothing was said"
    assert "shortest example" not in message, "it went as far as the data"
    return f"| `{cell(case)}` | {code} | {cell(message)} |\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


@pytest.mark.skipif("UPDATE_BAD_INPUTS" in os.environ, reason="the table is being written")
def test_the_table_is_long_enough_and_holds_nothing_else() -> None:
    lines = TABLE.read_text(encoding="utf-8").removeprefix(HEAD).splitlines()
    assert len(lines) == len(CASES) == len(set(CASES)) >= 120
    commands = {case.split()[0] for case in CASES}
    assert commands >= {
        "train",
        "eval",
        "estimate",
        "inspect",
        "score",
        "ablate",
        "bench",
        "report",
        "config",
        "data",
        "state",
        "doctor",
    }
