"""Reports: every figure is the one of the runs, nothing is left out silently, the page needs no other file."""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.metrics.answers import wilson_interval
from galore_trainer.run.report.runs import gather, score_interval
from galore_trainer.run.report.write import report, without_places
from made_runs import GAP, RANKS, SEEDS, STEPS, change_runs, make_result, tables, write_run, write_study
from page import Page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Any]]:
    """The report of a study: its files, and the figures that were drawn for it."""
    from matplotlib.figure import Figure

    folder, drawn, real = tmp_path_factory.mktemp("report"), list[Any](), Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *a, **more: (drawn.append(figure), real(figure, *a, **more)))
        paths = report([write_study(folder / "study")], folder / "out", command="galore-ft report study")
    return paths, drawn


def read_report(paths: list[Path]) -> tuple[str, str]:
    """The page and the Markdown."""
    return paths[0].read_text(), paths[1].read_text()


def test_every_figure_is_the_mean_and_deviation_of_the_runs(whole: Any) -> None:
    _, markdown = read_report(whole[0])
    found = tables(markdown)
    for rank in RANKS:
        name, results = f"rank {rank}", [make_result(rank, seed) for seed in SEEDS]

        def expected(values: list[float], digits: int) -> str:
            return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

        quality, seconds, memory = found["Scores and losses"][name], found["Time"][name], found["Memory"][name]
        scores = [100 * result["score_after"]["score"] for result in results]
        assert (quality["n"], quality["seeds"], quality["examples"]) == ("3", "0, 1, 2", "200")
        assert quality["exact match (flexible), %"] == expected(scores, 1)
        low, high = wilson_interval(round(2 * statistics.fmean(scores)), 200)
        assert quality["95 % interval, %"] == f"{100 * low:.1f} to {100 * high:.1f}"
        losses = [result["score_after"]["eval_loss"] for result in results]
        assert quality["eval loss, nats per token"] == expected(losses, 4)
        times = [result["seconds"]["training"] for result in results]
        assert seconds["fine-tuning, s"] == expected(times, 2)
        assert seconds["s per step"] == expected([time / STEPS for time in times], 4 if times[1] >= 10 else 5)
        assert seconds["update, ms per step"] == "10.00 ± 0.00"
        refreshes = STEPS / GAP
        each = 1e3 * results[0]["seconds"]["refresh"] / refreshes
        assert seconds["refresh, ms each"] == f"{each:.1f} ± 0.0"
        assert memory["optimizer state, MiB"] == f"{3 * rank + 1:.2f} ± 0.00"
        assert memory["moments, MiB"] == f"{2 * rank:.2f} ± 0.00"
        assert memory["peak memory, MiB"] == f"{101 + rank:.1f} ± 1.0"
        projection = found["Projection"][name]
        assert projection["excess over exact SVD, %"] == "1.00 ± 0.00"
        assert projection["sharing excess, ratio"] == "2.500 ± 0.000"
        assert found["Result"][name]["fine-tuning, s"] == seconds["fine-tuning, s"]


def test_the_page_needs_no_other_file_and_shows_what_the_markdown_shows(whole: Any) -> None:
    paths, out = whole[0], whole[0][0].parent
    assert sorted(path.name for path in paths) == sorted(path.name for path in out.iterdir())
    text, markdown = read_report(paths)
    page = Page(text)
    assert not any(tag in ("img", "script", "link", "iframe") for tag, _ in page.tags)
    links = [value for _, found in page.tags for key, value in found.items() if key in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    ids = {found["id"] for _, found in page.tags if "id" in found}
    assert {link[1:] for link in links} <= ids
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= ids
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    pictures = re.findall(r"!\[.+\]\((.+)\)", markdown)
    assert pictures == ["score.png", "loss.png", "time.png", "projection.png"]
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "How many <directions>?" in page.text
    assert "# Rank & file" in markdown
    for cells in tables(markdown).values():
        for row in cells.values():
            assert all(cell.replace("\\|", "|") in page.text for cell in row.values())
    for fact in ("torch 2.13.0", "abc123", "H100", "galore-ft report study", "--output-dir runs/rank"):
        assert fact in page.text
        assert fact in markdown


def test_no_folder_of_the_machine_is_told(whole: Any) -> None:
    for page in read_report(whole[0]):
        assert "somebody" not in page
        assert str(whole[0][0].parents[1]) not in page
        assert "data.source=path/to/train.json" in page
    kept = "runs/x openai/gsm8k https://hub/x 1/2 a / b ./c"
    assert without_places(kept) == kept
    assert without_places("~/a/b.csv x=/tmp/c '/d e'") == "path/to/b.csv x=path/to/c 'path/to/d e'"


def test_times_of_runs_that_shared_a_device_come_from_the_exclusive_pass(undrawn: None, tmp_path: Path) -> None:
    paths = report([write_study(tmp_path / "study", jobs=2)], tmp_path / "out")
    _, markdown = read_report(paths)
    rows = [json.loads(line) for line in paths[-1].read_text().splitlines()]
    names = [row["run"] for row in rows if row["cell"] == "rank 32"]
    assert names == ["seed-0", "seed-1", "seed-2", "timing"]
    assert rows[names.index("seed-1")]["score_after"] == make_result(RANKS[0], 1)["score_after"]
    row = tables(markdown)["Time"]["rank 32"]
    assert (row["n"], row["seeds"]) == ("1", "0")
    assert row["s per step (exclusive pass)"] == "0.320"
    assert row["fine-tuning, s (exclusive pass)"] == "32.0"
    assert row["refresh, ms each (exclusive pass)"] == "640"
    assert "exclusive pass, s per step" in markdown
    assert tables(markdown)["Result"]["rank 32"]["n"] == "3"


def test_a_missing_timing_pass_is_said(undrawn: None, tmp_path: Path) -> None:
    _, markdown = read_report(report([write_study(tmp_path / "study", jobs=2, timing=False)], tmp_path / "out"))
    assert tables(markdown)["Time"]["rank 32"]["s per step (exclusive pass)"] == "-"
    assert "for any cell: no exclusive timing pass has finished" in markdown
    assert "no timing pass of the cells was made" in markdown
    assert "projects nothing" not in markdown


def test_failed_runs_stay_as_rows_with_their_reason(undrawn: None, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")

    def fail(cell: dict[str, Any], run: dict[str, Any]) -> None:
        if cell["slug"] == "rank-64" or run["folder"] == "rank-32/seed-1":
            (study / run["folder"] / "result.json").unlink()
            run.update(status="failed", reason="out of memory: tried to allocate 9 GiB")

    change_runs(study, fail)
    text, markdown = read_report(report([study], tmp_path / "out"))
    result = tables(markdown)["Result"]
    first = "exact match (flexible), %"
    assert (result["rank 32"]["n"], result["rank 32"]["seeds"]) == ("2", "0, 2")
    assert result["rank 32 (2)"]["seeds"] == "1"
    assert result["rank 32 (2)"][first] == result["rank 64"][first] == "failed: out of memory: tried to allocate 9 GiB"
    assert tables(markdown)["Memory"]["rank 64"]["peak memory, MiB"] == "failed"
    assert "5 finished runs in 3 cells, 4 failed" in markdown
    assert 'colspan="3">failed: out of memory' in text


def test_what_was_not_measured_is_a_dash_with_its_reason(undrawn: None, tmp_path: Path) -> None:
    plain = make_result(settings={"method": "adamw"})
    plain.update(optimizer_state_bytes={"plain": 2**20}, projection_error=None)
    unscored = make_result(32, score_after=None)
    unscored["projection_error"] |= {"excess": None, "sharing_excess": None}
    unscored["peak_memory"] = {"peak_bytes": None, "meaning": "resident"}
    folders = [write_run(tmp_path / name, result) for name, result in (("a", plain), ("b", unscored))]
    _, markdown = read_report(report(folders, tmp_path / "out", title="Mine"))
    found = tables(markdown)
    assert markdown.startswith("# Mine\n")
    assert found["Scores and losses"]["galore_plus"]["exact match (flexible), %"] == "-"
    assert found["Projection"]["adamw"]["projection error"] == "-"
    assert found["Memory"]["adamw"]["basis, MiB"] == "-"
    assert "for galore_plus: the task has no answers to compare, or nothing was held out" in markdown
    assert "no refresh, ms each for adamw: the method projects nothing" in markdown
    assert "no basis, MiB / moments, MiB for adamw: the method keeps none" in markdown
    assert re.search(r"no excess .* for any cell: measured at the first refreshes", markdown)
    assert "no peak memory, MiB for galore_plus: the system does not tell it" in markdown
    assert "not shown, without a projection or without its time: adamw" in markdown


def test_text_metrics_have_columns_of_their_own(undrawn: None, tmp_path: Path) -> None:
    score = {
        "task": "nlg",
        "n": 9,
        "metric": "bleu",
        "extract": None,
        "score": 0.5,
        "interval": None,
        "bleu": 0.5,
        "nist": 4.25,
        "meteor": None,
        "rouge_l": 0.625,
        "cider": 2.5,
        "eval_loss": 1.0,
    }
    folder = write_run(tmp_path / "run", make_result(task="nlg", score_after=score))
    _, markdown = read_report(report([folder], tmp_path / "out"))
    row = tables(markdown)["Scores and losses"]["galore_plus"]
    assert [row[name] for name in ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")] == [
        "0.5000",
        "4.2500",
        "-",
        "0.6250",
        "2.5000",
    ]
    assert row["95 % interval, %"] == "-"
    assert "no METEOR for any cell: the run's evaluation skipped METEOR" in markdown


def test_runs_are_grouped_by_all_but_the_seed_and_named_by_what_differs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{r}-{s}", make_result(r, s)) for s in SEEDS for r in reversed(RANKS)]
    folders.append(write_run(tmp_path / "float", make_result(16, 7, settings={"weight_decay": 0.0})))
    other = make_result(16, 8, settings={"save_steps": 3, "weight_decay": 0})
    found = gather([*folders, write_run(tmp_path / "int", other)])
    assert [(group.name, len(group.runs)) for group in found.groups] == [("rank 16", 5), ("rank 32", 3), ("rank 64", 3)]
    found = gather(folders[:9])
    assert [(group.name, len(group.runs)) for group in found.groups] == [("rank 16", 3), ("rank 32", 3), ("rank 64", 3)]
    methods = [make_result(settings={"method": name}) for name in ("adamw", "lora", "galore_plus")]
    for i, result in enumerate(methods):
        write_run(tmp_path / f"method{i}", result)
    found = gather([tmp_path / f"method{i}" for i in range(3)])
    assert [group.name for group in found.groups] == ["adamw", "lora", "galore_plus"]


def test_times_of_a_resumed_run_are_those_of_the_steps_since(undrawn: None, tmp_path: Path) -> None:
    result = make_result(resumed_from_step=60)
    folder = write_run(tmp_path / "run", result)
    _, markdown = read_report(report([folder], tmp_path / "out"))
    row, seconds = tables(markdown)["Time"]["galore_plus"], result["seconds"]
    assert float(row["s per step"]) == pytest.approx(seconds["training"] / 40, rel=5e-3)
    assert float(row["fine-tuning, s"]) == pytest.approx(seconds["training"] / 40 * 100, rel=5e-3)
    assert float(row["refresh, ms each"]) == pytest.approx(1e3 * seconds["refresh"] / 2, rel=5e-3)
    assert "resumed, so that times are of the steps since" in markdown


def test_a_resumed_run_s_repeated_steps_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", make_result())
    rows = [{"step": 3, "loss": 9.0}, {"step": 4, "eval_loss": 1.0}, {"step": 3, "loss": 5.0}, {"step": 4, "loss": 4.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = gather([folder]).runs
    assert [row.get("loss") for row in run.log if row["step"] == 3] == [5.0]
    assert sorted(row.get("loss", row.get("eval_loss")) for row in run.log if row["step"] == 4) == [1.0, 4.0]


def test_plots_show_the_runs(whole: Any) -> None:
    score, loss, time, projection = whole[1][::2]
    panel = score.axes[0]
    assert panel.get_xscale() == "linear"  # 16 to 64 is less than a factor of eight
    assert list(panel.get_lines()[0].get_xdata()) == list(RANKS)
    means = [100 * statistics.fmean(make_result(r, s)["score_after"]["score"] for s in SEEDS) for r in RANKS]
    assert list(panel.get_lines()[0].get_ydata()) == pytest.approx(means)
    assert len(loss.axes[0].get_lines()) == len(RANKS)
    ends = [bar.get_x() + bar.get_width() for bar in time.axes[0].patches[-len(RANKS) :]]
    totals = [statistics.fmean(make_result(r, s)["seconds"]["training"] / STEPS for s in SEEDS) for r in RANKS]
    assert ends == pytest.approx(totals)
    points = [line.get_xydata()[0] for line in projection.axes[0].get_lines() if line.get_marker() == "o"]
    for point, result in zip(points, map(make_result, RANKS), strict=True):
        each = 1e3 * result["seconds"]["refresh"] / (STEPS / GAP)
        assert tuple(point) == pytest.approx((each, result["projection_error"]["mean"]))


def test_a_report_of_odd_runs_is_still_written(tmp_path: Path) -> None:
    """One run without log and score; more cells than colours; a loss that is not finite."""
    alone = write_run(tmp_path / "alone", make_result(score_after=None))
    (alone / "log.jsonl").unlink()
    assert len(report([alone], tmp_path / "one")) >= 2
    many = []
    for i in range(12):
        result = copy.deepcopy(make_result(settings={"galore": {"rank": 2 + i, "update_proj_gap": GAP}}))
        many.append(write_run(tmp_path / f"many{i}", result))
        rows = "NaN", "1.0", "0.5"
        (many[-1] / "log.jsonl").write_text("".join(f'{{"step": {j}, "loss": {x}}}\n' for j, x in enumerate(rows, 1)))
    assert len(report(many, tmp_path / "twelve")) == 7
    assert math.isclose(sum(score_interval(gather([many[0]]).groups[0])), 0.79)


def test_what_cannot_be_reported_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    study, out = write_study(tmp_path / "study"), tmp_path / "out"
    run = study / "rank-16" / "seed-0"
    other = write_run(tmp_path / "other", make_result(task="gsm8k"))
    with pytest.raises(OptionError, match=r"RUNS.*arithmetic.*gsm8k.*runs of one task"):
        report([run, other], out)
    with pytest.raises(OptionError, match="folder of one study"):
        report([study, other], out)
    with pytest.raises(OptionError, match="folders of runs"):
        report([], out)
    with pytest.raises(OptionError, match=r"rank-16/seed-0.*Name the runs|Name the runs.*seed-0"):
        report([study / "rank-16"], out)
    with pytest.raises(OptionError, match=r"result\.json"):
        report([tmp_path / "nowhere"], out)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.resolved.yaml").write_text("max_steps: 3\n")
    with pytest.raises(OptionError, match=r"half.*finished runs alone.*--resume auto"):
        report([run, tmp_path / "half"], out)
    (run / "result.json").unlink()
    change_runs(
        study, lambda cell, entry: entry.update(status="running") if entry["folder"].endswith("16/seed-0") else None
    )
    with pytest.raises(OptionError, match=r"\['rank-16/seed-0'\].*finished runs alone.*galore-ft ablate rank"):
        report([study], out)
    for folder in study.glob("*/seed-*"):
        (folder / "result.json").unlink(missing_ok=True)
    change_runs(study, lambda cell, entry: entry.update(status="failed", reason="no peace"))
    with pytest.raises(OptionError, match=r"at least one finished run\. no peace"):
        report([study], out)
    (study / "study.json").write_text("{")
    with pytest.raises(OptionError, match=r"study\.json"):
        report([study], out)
    assert not out.exists()
