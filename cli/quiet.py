"""Messages of libraries about parts that a run does not use: those listed here are hidden, all others are shown."""

from __future__ import annotations

import logging
import re
import warnings

# Logger -> beginnings of its messages. Every run imports bitsandbytes (transformers' Trainer imports peft, which
# imports it) and DeepSpeed (accelerate imports it).
LEFT_OUT = {
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "DeepSpeed": (
        "Setting accelerator to CPU",
        "Setting ds_accelerator to cpu",
        "**** You are using ZeRO with an untested optimizer",
    ),
    "transformers.utils.generic": ("`use_cache=True` is incompatible with gradient checkpointing",),
    "transformers.trainer_utils": ("mtime may not be reliable on this filesystem",),
    "transformers.modeling_layers": ("Caching is incompatible with gradient checkpointing",),
}
# Beginnings of warnings: names that transformers deprecates and that older versions need; setuptools while DeepSpeed
# builds its extensions.
WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",
    "`gradient_checkpointing_enable` is deprecated",
    "Distutils was imported before Setuptools",
    "Setuptools is replacing distutils",
)


def hush() -> None:
    """Hide these messages in this process; calling it again changes nothing."""
    for name, starts in LEFT_OUT.items():
        logger = logging.getLogger(name)
        if not any(isinstance(existing, _Filter) for existing in logger.filters):
            logger.addFilter(_Filter(starts))
    for start in WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(start))


class _Filter(logging.Filter):
    def __init__(self, starts: tuple[str, ...]) -> None:
        super().__init__()
        self.starts = starts

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.starts)
