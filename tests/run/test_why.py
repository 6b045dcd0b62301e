"""Measures of gradients' subspaces equal their definitions; measuring leaves the training as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from galore_trainer.errors import OptionError
from galore_trainer.run.settings.run_config import load_run_config
from galore_trainer.run.training.train import prepare

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
measures, why = pytest.importorskip("why_measures"), pytest.importorskip("why")


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def orthonormal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(*shape)).Q


@pytest.mark.parametrize(("rows", "columns"), [(12, 30), (30, 12), (20, 20)])
def test_the_best_basis_is_that_of_the_svd(rows: int, columns: int) -> None:
    X = gaussian(3, rows, columns)
    _, values, V = torch.linalg.svd(X, full_matrices=False)
    P = measures.top(X, 4)
    torch.testing.assert_close(measures.similarity(P, V[:, :4].mT), torch.ones(3))
    torch.testing.assert_close(measures.kept(X, P), values[:, :4].square().sum(-1) / values.square().sum(-1))
    squares = values.square()
    expected = squares.sum(-1).square() / squares.square().sum(-1), squares.sum(-1) / squares[:, 0]
    torch.testing.assert_close(measures.effective_ranks(X, P), expected)


def test_random_subspaces_are_as_similar_as_chance() -> None:
    P, Q = orthonormal(400, 48, 12).split(200)
    # the standard error over 200 pairs is 0.002
    assert float(measures.similarity(P, Q).mean()) == pytest.approx(12 / 48, abs=0.01)


def test_heads_are_compared_in_pairs() -> None:
    heads = gaussian(2, 3, 5, 16)
    bases = measures.top(heads, 2)
    pairs, itself = measures.head_pairs(bases, bases)
    by_other, by_own = measures.kept_by_heads(heads, bases)
    different = [(i, j) for i in range(3) for j in range(3) if i != j]
    similar = torch.stack([measures.similarity(bases[:, i], bases[:, j]) for i, j in different]).mean(dim=0)
    kept = torch.stack([measures.kept(heads[:, i], bases[:, j]) for i, j in different]).mean(dim=0)
    own = torch.stack([measures.kept(heads[:, i], bases[:, i]) for i in range(3)]).mean(dim=0)
    torch.testing.assert_close((pairs, itself, by_other, by_own), (similar, torch.ones(2), kept, own))
    assert measures.lent_bases(heads, 8).shape == (3, 2, 16, 8)  # two heads of five rows span eight directions


def test_the_signal_is_told_from_the_noise() -> None:
    signal, P = torch.zeros(1, 40, 20), torch.eye(20)[None, :, :5]
    signal[..., :5], signal[..., 5:] = 2.0, 0.5
    noise = gaussian(64, 1, 40, 20)
    found = measures.persistent([signal + some for some in noise], P)
    inside, outside = 40 * 5 * 4.0, 40 * 15 * 0.25  # energies of the signal
    close = {"abs": 0.01}  # sums over 2016 pairs of batches
    assert found["signal_inside"] == pytest.approx(inside / (inside + outside), **close)
    assert found["cosine_inside"] == pytest.approx(4.0 / 5.0, **close)
    assert found["cosine_outside"] == pytest.approx(0.25 / 1.25, **close)
    assert found["signal"] == pytest.approx((inside + outside) / (inside + outside + 800), **close)
    others = 0.25 / (1.25 * (0.25 + 1.0 / 63)) ** 0.5  # the mean of 63 batches has a 63rd of the noise
    assert found["mean_outside"] == pytest.approx(others, **close)


def test_concentration_of_noise_is_the_formula() -> None:
    noise = gaussian(1, 1000, 500)
    assert float(measures.concentration(noise, 0.012)) == pytest.approx(
        measures.gaussian_concentration(0.012), abs=2e-3
    )
    where, other = noise.flip(1), noise.flip(2)
    assert float(measures.at_largest(where, noise, noise, 0.012)) == pytest.approx(0.012, abs=2e-3)
    torch.testing.assert_close(measures.at_largest(noise, noise, noise, 0.1), measures.concentration(noise, 0.1)[0])
    torch.testing.assert_close(measures.at_largest(where, noise, other, 1.0), torch.tensor(1.0))


@pytest.fixture
def base(tiny_base: Path) -> Path:
    tiny_base.write_text(tiny_base.read_text().replace("eval_samples: 4", "eval_samples: 6"))
    return tiny_base


def trained(base: Path, folder: Path, *callbacks: Any) -> dict[str, torch.Tensor]:
    trainer = prepare(load_run_config(base, [f"output_dir={folder}"])).trainer
    for make in callbacks:
        trainer.add_callback(make(trainer))
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_measured_run_ends_where_an_unmeasured_one_does(base: Path, tmp_path: Path) -> None:
    config = load_run_config(base, [])
    probes: list[Any] = []

    def probe(trainer: Any) -> Any:
        probes.append(why.Probe(trainer, config, (1, 4), (1,), layers=2, batches=3))
        return probes[0]

    plain, measured = trained(base, tmp_path / "plain"), trained(base, tmp_path / "measured", probe)
    torch.testing.assert_close(measured, plain, rtol=0, atol=0)
    tables = probes[0].tables
    assert tables.keys() == set(why.TABLES)
    assert all(tables.values())
    assert {row["step"] for row in tables["lost"]} == {1, 4}
    assert {(row["step"], row["lag"]) for row in tables["drift"]} == {(1, 0), (1, 1), (4, 0)}
    assert len(probes[0].limited) == 3
    # in the step that made the basis nothing limits the residual, and both ratios are of the same gradient
    assert all(row["done"] == pytest.approx(row["wanted"], abs=1e-3) for row in tables["update"] if row["step"] == 1)


def test_a_measurement_is_written_in_full(base: Path, tmp_path: Path) -> None:
    content = why.measure(load_run_config(base, [f"output_dir={tmp_path / 'run'}"]), (1, 2), (1,), layers=1, batches=3)
    assert content["settings"]["steps"] == 2  # it ends after the last measure
    assert content["settings"]["layers"] == [0]


@pytest.mark.parametrize(
    ("at", "batches", "message"),
    [(1, 4, r"data\.eval_samples: got 6, wanted at least 8"), (5, 3, "--at: got 5, wanted at most 4")],
)
def test_what_cannot_be_measured_is_refused(at: int, batches: int, message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        why.measure(load_run_config(base, [f"output_dir={tmp_path / 'run'}"]), (at,), (1,), layers=1, batches=batches)
