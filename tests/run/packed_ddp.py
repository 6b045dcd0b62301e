"""Trains by a configuration under torchrun: ``packed_ddp.py CONFIG CALLS``; a tokenization leaves a file in CALLS."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any

from galore_trainer.run.models import encoded
from galore_trainer.run.settings.run_config import load_run_config
from galore_trainer.run.training.train import train

config, calls = sys.argv[1:]
encode_all = encoded.encode_all


def counted(tokenizer: Any, examples: Any, max_length: int) -> Any:
    (Path(calls) / f"{len(examples)}-{uuid.uuid4().hex}").touch()
    return encode_all(tokenizer, examples, max_length)


encoded.encode_all = counted
train(load_run_config(config))
