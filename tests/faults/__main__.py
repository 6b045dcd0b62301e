"""The long form of these tests: ``make faults`` kills, damages and fills disks for some minutes.

It writes ``docs/faults.md``, and ends with 1 where anything was lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from damages import MANIFESTS, WAYS, falls_back, files_of, write_manifest
from faults import FINAL, IN_SAVE, LAST, VARIANTS, Campaign, Kill, Outcome, Worker, equal, settings, state
from galore_trainer.run.launching.checkpoints import MANIFEST, checkpoints, damage, newest_whole
from galore_trainer.run.results.artifacts import environment
from galore_trainer.run.settings.run_config import RunConfig

AT_ONCE = 2  # campaigns
MANIFESTED = (
    "before the manifest",
    "half of the manifest",
    "before the rotation",
    "half of the rotation",
    "after the rotation",
)
THREE_IN_A_ROW: tuple[tuple[Kill, ...], ...] = (
    (("half of the optimizer", 2), ("half of the rotation", 4), ("half of the model", LAST)),
    (("before the manifest", 4), ("checkpoints were moved aside", 0), ("the checkpoint was loaded", 0)),
    (("before the rotation", 2), ("half of the weights", 4), ("half of the manifest", LAST)),
)


def sequences(variant: str) -> list[tuple[Kill, ...]]:
    """The kills of each run of a variant: all points, in one of two saves; of two processes fewer."""
    if variant == "two processes":
        points = ("half of the optimizer", *MANIFESTED)
        return [*(((point, step),) for point, step in zip(points, (4, LAST) * 3, strict=True)), THREE_IN_A_ROW[0]]
    steps = itertools.cycle((4, LAST))
    in_save = itertools.product(IN_SAVE, (4, LAST)) if variant == "galore_plus" else zip(IN_SAVE, steps, strict=False)
    single: list[Kill] = [("forward", 3), ("update", 3), *in_save, *FINAL]
    return [*((kill,) for kill in single), *THREE_IN_A_ROW]


@dataclasses.dataclass
class Row:
    """What became of all runs of a variant."""

    variant: str
    runs: int = 0
    kills: int = 0
    final: int = 0
    manifested: int = 0
    in_a_row: int = 0
    equal: int = 0
    lost: int = 0

    def add(self, kills: Iterable[Kill], outcome: Outcome) -> None:
        kills = list(kills)
        self.runs += 1
        self.kills += outcome.kills
        self.final += sum(step == LAST for _, step in kills)
        self.manifested += sum(point in MANIFESTED for point, _ in kills)
        self.in_a_row += outcome.kills == 3
        self.equal += outcome.equal
        self.lost += outcome.lost


def killed(variant: str, model: Path, folder: Path, say: Callable[[str], None]) -> Row:
    """Kill runs of a variant at every point, and three times at random."""
    row, campaign = Row(variant), Campaign(variant, model, folder)
    for i, kills in enumerate(sequences(variant)):
        outcome = campaign.kill(f"run-{i}", kills)
        row.add(kills, outcome)
        say(f"{variant}: {', '.join(f'{point} {step}' for point, step in kills)}: {outcome}")
    if variant != "two processes":
        started = time.monotonic()
        assert campaign.kill_at_random("long", []).equal
        usual = time.monotonic() - started
        delays = [random.Random(variant).uniform(0.1, 1.0) * usual for _ in range(3)]
        outcome = campaign.kill_at_random("random", delays)
        row.add((), outcome)
        say(f"{variant}: at random: {outcome}")
    return row


def damaged(run: Path) -> dict[str, int]:
    """Damage every file of a checkpoint in every way: how many there were, and how many were told of."""
    tried = [(name, do) for name in files_of(checkpoints(run)[0]) for do in WAYS.values()]
    tried += [(MANIFEST, write_manifest(text)) for text in MANIFESTS.values()]
    return {"damages": len(tried), "told of": sum(falls_back(run, name, do) for name, do in tried)}


@dataclasses.dataclass
class DiskRow:
    """Runs whose disk became full."""

    limit: str
    runs: int = 0
    told: int = 0
    clean: int = 0
    equal: int = 0

    def add(self, campaign: Campaign, run: Path, room: Callable[[], object], **case: object) -> None:
        """Let a run fail, give it room, and let it go on."""
        more = {"config": settings(campaign.variant, campaign.model, run), "resume": "auto"}
        folder, name = campaign.folder, run.name
        worker = Worker(folder / f"{name}-logs", {**more, **case})
        code = worker.wait()
        self.runs += 1
        self.told += code == 1 and "RuntimeError: the disk is full or limited" in worker.said()
        self.clean += not any(damage(path) for path in checkpoints(run))
        room()
        worker = Worker(folder / f"{name}-logs", more)
        self.equal += worker.wait() == 0 and equal(campaign.state, state(run))


def disks(model: Path, folder: Path, say: Callable[[str], None]) -> list[DiskRow]:
    """Files that may not grow beyond each size on which one of a checkpoint fails, and a disk with little left."""
    rows = []
    for variant in ("galore_plus", "AdamW"):
        campaign = Campaign(variant, model, folder / variant)
        sizes = sorted({path.stat().st_size for path in (campaign.whole / f"checkpoint-{LAST}").iterdir()})
        row = DiskRow(f"{variant}, EFBIG: no file above a size")
        for size in sizes[-4:]:
            row.add(campaign, campaign.folder / f"limit-{size}", lambda: None, file_bytes=size - 100)
        rows.append(row)
        say(str(row))
        with contextlib.suppress(subprocess.CalledProcessError), mounted(folder / f"{variant}-disk") as disk:
            row = DiskRow(f"{variant}, ENOSPC: a disk with little left")
            each = sum(path.stat().st_size for path in (campaign.whole / f"checkpoint-{LAST}").iterdir())
            for share in (0.02, 0.2, 0.4, 0.6, 0.8, 0.95):
                ballast = disk / "ballast"
                room = functools.partial(ballast.unlink, missing_ok=True)
                row.add(campaign, disk / f"share-{share}", room, fill=[str(ballast), 4, int(share * each)])
            rows.append(row)
            say(str(row))
    return rows


def signals(model: Path, folder: Path, say: Callable[[str], None]) -> list[tuple[str, str, str]]:
    """What becomes of a run, of one process and of two, whose first process gets signals."""
    rows = []
    for words, who in (((), "the only process"), (("--num-processes", "2"), "the launcher of two processes")):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            name = f"{len(words)}-{len(rows)}"
            config = RunConfig.from_dict(settings("galore_plus", model, folder / name, max_steps=100_000))
            path, log = folder / f"{name}.yaml", folder / f"{name}.log"
            folder.mkdir(exist_ok=True)
            path.write_text(config.to_yaml())
            with log.open("w") as file:
                command = [sys.executable, "-m", "galore_trainer.cli", "train", str(path), *words]
                process = subprocess.Popen(command, stdout=file, stderr=file)
            while "step 7/" not in log.read_text() and process.poll() is None:
                time.sleep(0.05)
            workers = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(number)
            code = process.wait(60)
            _, alive = psutil.wait_procs(workers, timeout=10)
            newest = checkpoints(folder / name)[0]
            left = f"{newest.name} {damage(newest) or 'whole'}"
            if number == signal.SIGKILL and damage(newest) and (older := newest_whole(folder / name)):
                left = f"{newest.name} unfinished, {older.name} whole"  # it was killed while it wrote
            rows.append((f"{number.name} to {who}", f"exit code {code}, {len(alive)} processes left", left))
            say(str(rows[-1]))
    return rows


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A disk of 64 MiB, where this process may mount one."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [[*head], *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


KILLED = (
    "variant",
    "runs",
    "kills",
    "of the last step",
    "around manifest and rotation",
    "runs killed three times",
    "runs that ended equal",
    "checkpoints lost",
)


def report(
    rows: list[Row], damages: dict[str, int], full: list[DiskRow], signalled: list[tuple[str, str, str]], seconds: float
) -> str:
    """All tables, with what they were made by."""
    versions = environment()["versions"]
    names = ("python", "torch", "transformers", "accelerate", "peft", "trl")
    made = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    total = [sum(column) for column in zip(*(dataclasses.astuple(row)[1:] for row in rows), strict=True)]
    points = dict.fromkeys(point for variant in VARIANTS for kills in sequences(variant) for point, _ in kills)
    return "\n".join(
        [
            "# Kills, damaged checkpoints, full disks",
            f"Written by `make faults` ({seconds / 60:.0f} minutes on a CPU; {made}). The tests have a part of it.",
            "",
            "## Kills",
            f"A tiny Llama takes {LAST} steps and saves after 2, 4 and {LAST}, with `save_total_limit: 1`. A run is "
            "killed (SIGKILL) at a chosen point, or at a random time, and goes on with `--resume auto`. What it "
            "comes to is compared with a run that nothing happened to: model and optimizer, bit for bit. A checkpoint "
            "is lost where the newest whole one after a kill is older than it should be.",
            "",
            table(KILLED, [*map(dataclasses.astuple, rows), ("all", *total)]),
            "",
            f"The points: {', '.join(points)}.",
            "",
            "## Damaged checkpoints",
            f"Each file of a checkpoint ({', '.join(WAYS)}) and the content of its manifest ({', '.join(MANIFESTS)}): "
            "`--resume auto` tells of the damage and takes the checkpoint before.",
            "",
            table(damages, [damages.values()]),
            "",
            "## Full disks",
            "A run fails with one sentence and leaves no broken checkpoint; once there is room it ends equal.",
            "",
            table(("disk", "runs", "one sentence", "nothing broken", "ended equal"), map(dataclasses.astuple, full)),
            "",
            "## Signals",
            "A signal to a run that is in its steps: the first SIGTERM or Ctrl-C saves a checkpoint.",
            "",
            table(("signal", "end", "newest checkpoint"), signalled),
            "",
        ]
    )


def main(path: Path) -> int:
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [
            "transformers.trainer",
            "transformers.models.llama.modeling_llama",
            "galore_trainer.run.training.train",
            "peft",
            "trl",
            "galore_trainer.run.training.callbacks",
            "galore_trainer.hf.build",
        ]
    )
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        model = folder / "tiny-llama"
        tiny = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))
        for make in ("make_tiny_llama", "make_tiny_tokenizer"):
            tiny[make]().save_pretrained(model)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            full = pool.submit(disks, model, folder / "disks", say)
            rows = list(pool.map(lambda variant: killed(variant, model, folder / variant, say), VARIANTS))
            disk_rows = full.result()
        run = folder / "damaged"
        worker = Worker(folder, {"config": settings("galore_plus", model, run, save_total_limit=2)})
        assert worker.wait() == 0, worker.said()
        damages = damaged(run)
        signalled = signals(model, folder / "signals", say)
    path.write_text(report(rows, damages, disk_rows, signalled, time.monotonic() - started))
    good = all(row.equal == row.runs and not row.lost for row in rows) and len({*damages.values()}) == 1
    good &= all(row.told == row.clean == row.equal == row.runs for row in disk_rows)
    good &= all("130, 0" in end or "-9, 0" in end for _, end, _ in signalled)
    return 0 if good and all(left.endswith("whole") for _, _, left in signalled) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
