"""One run on several processes: the command line of ``accelerate launch``, and settings that it could not honour."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.run.device import device_type
from galore_trainer.run.settings.arguments import check_samples
from galore_trainer.run.settings.methods import check_backend, require_package
from galore_trainer.run.settings.run_config import RunConfig, packaged_configs, read_packaged
from galore_trainer.run.settings.yaml_io import read_mapping

PROCESSES, CONFIG = "--num-processes", "--launch-config"
DEFAULT = "ddp"
_BACKENDS = {"DEEPSPEED": "deepspeed", "FSDP": "fsdp"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How a run is started.

    Attributes:
        name: of the launch configuration, as the user gave it.
        file: its path.
        backend: ``ddp``, ``fsdp`` or ``deepspeed``.
        processes: how many, over all machines.
        on_cpu: the run uses no GPU.
    """

    name: str
    file: Path
    backend: str
    processes: int
    on_cpu: bool

    def command(self, words: Sequence[str]) -> list[str]:
        """What follows ``accelerate launch``, for the command line ``galore-ft WORDS``."""
        options = ["--config_file", str(self.file), "--num_processes", str(self.processes)]
        return [*options, "--module", "galore_trainer.cli", *without_launch_options(words)]

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Variables that the processes get beyond ``inherited``, the environment of this process."""
        tools = str(Path(sys.executable).parent)  # ninja stands beside python, perhaps in an environment not activated
        added = {"PATH": os.pathsep.join([tools, inherited["PATH"]]) if inherited.get("PATH") else tools}
        if self.backend == "deepspeed" and "PYTHONWARNINGS" not in inherited:
            # torch would print two lines at every step about deprecated names
            added["PYTHONWARNINGS"] = "ignore::FutureWarning:torch.distributed.c10d_logger"
        if self.on_cpu:
            added["DS_ACCELERATOR"] = "cpu"
            if "OMP_NUM_THREADS" not in inherited:
                added["OMP_NUM_THREADS"] = str(threads_each(self.processes))
        return added


def plan_launch(config: RunConfig, *, num_processes: int | None, launch_config: str | None) -> Launch | None:
    """Resolve the two options; None where neither was given, and the run stays in this process.

    Args:
        config: of the run.
        num_processes: one for each GPU where None.
        launch_config: packaged name or the path of a configuration of accelerate; DDP where None.

    Raises:
        OptionError: a number, name or file that cannot be used here; a package or a GPU that is missing; this process
            was itself started by a launcher.
    """
    if num_processes is None and launch_config is None:
        return None
    option = PROCESSES if launch_config is None else CONFIG
    got = num_processes if launch_config is None else launch_config
    if "WORLD_SIZE" in os.environ:
        raise OptionError(
            option,
            got,
            "one launcher",
            f"A launcher started this process (WORLD_SIZE={os.environ['WORLD_SIZE']}): leave out {option}, or run "
            "galore-ft train without torchrun or accelerate launch.",
        )
    if num_processes is not None and num_processes < 1:
        raise OptionError(PROCESSES, num_processes, "at least 1", "Leave it out for one process here.")
    name = launch_config or DEFAULT
    file = _find(name)
    settings = _read(name, file)
    kind = settings.distributed_type.value
    backend = _BACKENDS.get(kind, "ddp")
    if backend == "deepspeed":
        require_package(CONFIG, name, "deepspeed", "deepspeed")
    check_backend(config.method, backend)
    stage = (settings.deepspeed_config or {}).get("zero_stage")
    check_samples(config, sharded=backend == "fsdp" or stage == 3)

    on_cpu = device_type(use_cpu=bool(config.training.get("use_cpu"))) == "cpu"
    if on_cpu and backend == "fsdp":
        raise OptionError(CONFIG, name, "GPUs: accelerate runs FSDP on them alone", f"Here, use {CONFIG} zero3 or ddp.")
    configured = settings.num_processes if settings.num_processes > 0 else None
    processes = num_processes or configured or _all_devices(name, on_cpu)
    machines = max(settings.num_machines, 1)
    if not on_cpu and processes > (limit := _device_count() * machines):
        raise OptionError(
            PROCESSES,
            processes,
            f"at most {limit}, one for each visible GPU",
            f"Use {PROCESSES} {limit}, or use_cpu=true to try it on the CPU.",
        )
    return Launch(name=name, file=file, backend=backend, processes=processes, on_cpu=on_cpu)


def run_launch(launch: Launch, words: Sequence[str]) -> int:
    """Run ``galore-ft WORDS`` on several processes to its end, and pass Ctrl-C and SIGTERM on to them.

    Returns:
        The exit code of the process that failed first, 0 where none did.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args(launch.command(words))
    handled = {"PET_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT"}  # the default of torchrun's --signals-to-handle
    with patch_environment(**launch.environment(os.environ), **handled), _signals():
        try:
            launch_command(arguments)
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            return code if code >= 0 else 128 - code
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def without_launch_options(words: Sequence[str]) -> list[str]:
    """A command line without the two options of this module."""
    kept, skip = list[str](), False
    for place, word in enumerate(words):
        if word == "--":
            return [*kept, *words[place:]]
        if not skip and word.partition("=")[0] not in (PROCESSES, CONFIG):
            kept.append(word)
        skip = not skip and word in (PROCESSES, CONFIG)
    return kept


def threads_each(processes: int) -> int:
    """Threads for each of several processes that share this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // processes, 1)


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if name in packaged_configs("launch"):
        return Path(str(importlib.resources.files("galore_trainer.configs") / "launch" / f"{name}.yaml"))
    if not path.is_file():
        read_packaged(name, "a packaged name or the path of a configuration of accelerate", "launch")
    return path


def _read(name: str, file: Path) -> Any:
    """A configuration as accelerate reads it."""
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    wanted = "a configuration of accelerate"
    try:
        read_mapping(file.read_text(encoding="utf-8"), name)  # with limits that accelerate's reader does not have
        settings = load_config_from_file(str(file))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        way_out = f"{' '.join(str(error).split()).rstrip('.')}. 'accelerate config' writes one."
        raise OptionError(CONFIG, name, wanted, way_out) from error
    kind = getattr(settings.distributed_type, "value", None)
    several = isinstance(settings, ClusterConfig) and kind in (*_BACKENDS, "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
    if not several:
        way_out = f"Use {CONFIG} {DEFAULT}, which serves CPUs too (use_cpu=true)."
        raise OptionError(f"{CONFIG} {name}: distributed_type", kind, "MULTI_GPU, FSDP or DEEPSPEED", way_out)
    return settings


def _all_devices(name: str, on_cpu: bool) -> int:
    if on_cpu:
        raise OptionError(CONFIG, name, "a number of processes beside it on a CPU", f"Add {PROCESSES} 2.")
    return _device_count()


def _device_count() -> int:
    import torch

    return torch.accelerator.device_count()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the processes of the run, which then save a checkpoint; restore all handlers.

    After SIGTERM torchrun itself would kill them within half a minute.
    """
    import psutil

    def pass_on(number: int, frame: Any) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    previous = {number: signal.getsignal(number) for number in names}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
