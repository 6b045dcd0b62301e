"""Each kernel against its function in ``core/``, in float64 where that tells more.

Bounds are relative to sums of magnitudes: a sum of K products in float32 errs by at most K 2^-24 of the sum of their
magnitudes, in practice by far less; 4e-6 leaves room for three-part TF32, whose products err by about 2^-21.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galore_trainer.core import galore
from galore_trainer.core.sparse import Support, add_at_, read_at
from galore_trainer.kernels.adam import adam_, adamw_, count_, usable
from galore_trainer.kernels.project import join, project
from galore_trainer.kernels.residual import loss_at
from galore_trainer.kernels.tables import Layout, alignment_of, upload
from galore_trainer.kernels.update import add_at_ as kernel_add_at_
from galore_trainer.kernels.update import apply_update_
from galore_trainer.optim.guards import count_skips
from scattered import (
    BOUND,
    JOBS,
    MATRICES,
    basis,
    blocks_of,
    both_dtypes,
    every_matrix,
    flags,
    keys_of,
    layout,
    lifted,
    moment,
    places,
    random,
    rates,
    spread,
    stored,
)


@every_matrix
@both_dtypes
def test_project(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Wherever the gradients lie; one that is not finite is told from the others."""
    matrix, P = MATRICES[name], basis(name, device, dtype)
    tensors = stored(name, device, dtype)
    matrix.rows_of(tensors[1])[0, -1, -1] = float("nan")
    R, ok = project(places(tensors, matrix), layout(name, tensors), P, matrix.side, matrix.blocks)
    G = blocks_of(name, tensors).double()
    exact = G @ P.double() if matrix.side == "right" else P.double().mT @ G
    size = G.abs() @ P.double().abs() if matrix.side == "right" else P.double().abs().mT @ G.abs()
    assert R.shape == exact.shape
    assert ok.tolist() == [1.0, 0.0, 1.0]
    for i in (0, 2):
        here = slice(i * matrix.blocks, (i + 1) * matrix.blocks)
        assert ((R[here] - exact[here]).abs() <= BOUND * size[here]).all()


@every_matrix
def test_bfloat16_factors_of_float32_weights(name: str, device: torch.device) -> None:
    """Gradients are rounded to nearest before they are multiplied; products are added in float32, and to float32."""
    matrix, P, low = MATRICES[name], basis(name, device, torch.bfloat16), torch.bfloat16
    tensors = stored(name, device, torch.float32)
    R, ok = project(places(tensors, matrix), layout(name, tensors), P, matrix.side, matrix.blocks)
    G = blocks_of(name, tensors).to(low).double()
    exact = G @ P.double() if matrix.side == "right" else P.double().mT @ G
    size = G.abs() @ P.double().abs() if matrix.side == "right" else P.double().abs().mT @ G.abs()
    assert ok.tolist() == [1.0] * JOBS
    assert ((R - exact).abs() <= BOUND * size).all()
    before, N = [x.clone() for x in tensors], moment(name, device, low)
    apply_update_(
        places(tensors, matrix),
        layout(name, tensors),
        N,
        P,
        matrix.side,
        ok,
        matrix.blocks,
        rates=rates(device, 0.1, 0.03),
        keys=None,
    )
    moved = blocks_of(name, before).double() * (1 - 0.03) - 0.1 * lifted(name, N, P)
    torch.testing.assert_close(blocks_of(name, tensors), moved.float(), rtol=1e-6, atol=1e-6)


def test_infinite_gradients_are_not_finite(device: torch.device) -> None:
    tensors = stored("PLAIN", device, torch.bfloat16)
    tensors[0][3, 3], tensors[2][69, 36] = float("inf"), -float("inf")
    _, ok = project(places(tensors), layout("PLAIN", tensors), basis("PLAIN", device, torch.bfloat16), "right", 1)
    assert ok.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_join_rounds_to_nearest(source: torch.dtype, device: torch.device) -> None:
    tensors = [random(device, 2, 33, 5, seed=i).to(source) for i in range(JOBS)]
    for dtype in (torch.bfloat16, torch.float32):
        joined = join(places(tensors), (2, 33, 5), dtype)
        torch.testing.assert_close(joined, torch.cat(tensors).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.9, 0.0)])
@both_dtypes
def test_adam(betas: tuple[float, float], dtype: torch.dtype, device: torch.device) -> None:
    """Ages 1, 3 and 1000: bias corrections cancel at small ages. A job whose ``ok`` is 0 keeps its moments."""
    shape = (2, 37, 29)  # of each job
    M, V = ([random(device, *shape, seed=s + i).square() for i in range(JOBS)] for s in (0, 10))
    R, age, ok = random(device, JOBS * 2, 37, 29, seed=20), flags(device, 0.0, 2.0, 999.0), flags(device, 1.0, 0.0, 1.0)
    before = [x.clone() for x in M + V]
    N = adam_(places(M), places(V), places(list(age.unbind())), R, ok, betas=betas, eps=1e-8, dtype=dtype)
    exact = galore.adam(
        *(torch.cat(x) for x in (before[:JOBS], before[JOBS:])), spread(age, 2), R, spread(ok, 2), betas=betas, eps=1e-8
    )
    for i in (0, 2):
        here = slice(2 * i, 2 * i + 2)
        torch.testing.assert_close(M[i], exact[0][here], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(V[i], exact[1][here], rtol=1e-6, atol=1e-7)
        rtol = 2e-6 if dtype == torch.float32 else 2**-8  # half a unit of bfloat16, whose neighbours lie 2^-7 apart
        torch.testing.assert_close(N[here].float(), exact[3][here], rtol=rtol, atol=1e-7)
    assert torch.equal(M[1], before[1])
    assert torch.equal(V[1], before[JOBS + 1])


def test_count_is_that_of_the_other_weights(device: torch.device) -> None:
    """Ages grow where a gradient was finite; the same skips as by ``count_skips``."""
    ages = [random(device, JOBS, seed=s).round() for s in (0, 1)]
    counters = torch.tensor([[0, 3, 2], [1, 3, 2], [2, 3, 2]], dtype=torch.int32, device=device)
    expected = [{"skipped": x.clone()} for x in counters]
    for ok in (flags(device, 1.0, 0.0, 0.0), flags(device, 0.0, 0.0, 1.0)):
        before = [age.clone() for age in ages]
        count_([places(list(age.unbind())) for age in ages], places(list(counters.unbind())), ok)
        count_skips(expected, ok)
        assert all(torch.equal(age, old + ok) for age, old in zip(ages, before, strict=True))
        assert torch.equal(counters, torch.stack([state["skipped"] for state in expected]))
    count_([], places(list(counters.unbind())), flags(device, 0.0, 0.0, 0.0))
    assert counters[0].tolist() == [2, 5, 2]


@every_matrix
@both_dtypes
def test_update(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """float32 within rounding, bfloat16 to the nearest or its neighbour; what is not of the matrix stays."""
    matrix, tensors = MATRICES[name], stored(name, device, dtype)
    before = [x.clone() for x in tensors]
    N, P, ok = moment(name, device, dtype), basis(name, device, dtype), flags(device, 1.0, 0.0, 1.0)
    apply_update_(
        places(tensors, matrix),
        layout(name, tensors),
        N,
        P,
        matrix.side,
        ok,
        matrix.blocks,
        rates=rates(device, 0.1, 0.03),
        keys=None,
    )
    exact = blocks_of(name, before).double() * (1 - 0.03) - 0.1 * lifted(name, N, P)
    for i in (0, 2):
        wanted = before[i].clone()
        blocks = exact[i * matrix.blocks : (i + 1) * matrix.blocks]
        matrix.rows_of(wanted).copy_(blocks.reshape(matrix.rows_of(wanted).shape))
        rtol, atol = (1e-6, 1e-6) if dtype == torch.float32 else (2**-7, 1e-6)
        torch.testing.assert_close(tensors[i], wanted, rtol=rtol, atol=atol)
        if dtype == torch.bfloat16:
            assert (tensors[i] == wanted).float().mean() > 0.995  # else the sum lay next to a midpoint
    assert torch.equal(tensors[1], before[1])


def test_stochastic_rounding_is_unbiased_and_repeats(device: torch.device) -> None:
    """A quarter of a unit is taken a quarter of the time, by each entry over keys and by each key over entries."""
    rows, columns, seeds = 64, 48, 30
    N = torch.full((JOBS, rows, 1), 2**-9, device=device, dtype=torch.bfloat16)  # a quarter of the unit above one
    P = torch.ones(JOBS, columns, 1, device=device, dtype=torch.bfloat16)
    counts = torch.zeros(JOBS, rows, columns, device=device)
    for seed in range(seeds):
        results = []
        for _ in range(2 if seed == 0 else 1):
            W = [torch.ones(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(JOBS)]
            apply_update_(
                places(W),
                Layout.of(W[0][None]),
                N,
                P,
                "right",
                flags(device),
                1,
                rates=rates(device, -1.0),
                keys=keys_of(device, seed),
            )
            results.append(torch.stack(W))
        assert all(torch.equal(results[0], other) for other in results)
        up = results[0].float() - 1.0
        assert set(up.unique().tolist()) <= {0.0, 2**-7}
        up = (up > 0).float()
        assert not torch.equal(up[0], up[1])
        if seed < 5:  # neighbours below and to the right know nothing of each other: +-4 deviations
            for a, b in ((up[:, 1:], up[:, :-1]), (up[..., 1:], up[..., :-1]), (up[0], up[1])):
                assert abs(((a - 0.25) * (b - 0.25)).mean()) < 4 * 0.1875 / a.numel() ** 0.5
        counts += up
    share, spread_of_share = counts.mean() / seeds, (counts / seeds).std()
    assert abs(share - 0.25) < 4 * (0.1875 / (seeds * counts.numel())) ** 0.5
    assert abs(spread_of_share / (0.1875 / seeds) ** 0.5 - 1.0) < 0.05  # entries differ as much as chance makes them


def test_infinite_weights_stay_and_ties_go_to_even(device: torch.device) -> None:
    W = [torch.ones(2, 4, device=device, dtype=torch.bfloat16) for _ in range(JOBS)]
    for x in W:
        x[0, 0], x[0, 1], x[1, 0] = float("inf"), float("nan"), -float("inf")
        x[1, 1] = 1.0 + 2**-7
    N = torch.full((JOBS, 2, 1), -(2**-8), device=device, dtype=torch.bfloat16)  # half a unit above one
    P = torch.ones(JOBS, 4, 1, device=device, dtype=torch.bfloat16)
    for keys in (None, keys_of(device, 0)):
        here = [x.clone() for x in W]
        apply_update_(
            places(here), Layout.of(here[0][None]), N, P, "right", flags(device), 1, rates=rates(device, 1.0), keys=keys
        )
        assert here[0][0, 0] == float("inf")
        assert here[0][1, 0] == -float("inf")
        assert here[0][0, 1].isnan()
        if keys is None:
            assert here[0][0, 2] == 1.0
            assert here[0][1, 1] == 1.0 + 2**-6


def support(name: str, device: torch.device, entries: int) -> list[Tensor]:
    matrix = MATRICES[name]
    scores = random(device, JOBS, matrix.blocks, matrix.block_rows, matrix.columns, seed=70)
    return [x.int().contiguous() for x in scores.topk(entries, dim=-1).indices.sort(dim=-1).values.unbind()]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("name", "count"), [*((name, 3) for name in MATRICES if name != "TALL"), ("PLAIN", 35)])
def test_loss_at_the_support(name: str, count: int, sampled: bool, device: torch.device) -> None:
    """Against the dense difference in float64, from gradients or from their samples."""
    matrix, tensors = MATRICES[name], stored(name, device, torch.bfloat16)
    positions = support(name, device, count)
    R, P = moment(name, device), basis(name, device, torch.bfloat16)
    G = blocks_of(name, tensors)
    whole = Support(torch.cat(positions), matrix.columns)
    if sampled:
        found = read_at(G, whole).float()
        values = [x.clone() for x in found.split(matrix.blocks)]
        D = loss_at(places(values), None, places(positions), R, P, matrix.side, matrix.blocks, count)
    else:
        G_places, G_layout = places(tensors, matrix), layout(name, tensors)
        D = loss_at(G_places, G_layout, places(positions), R, P, matrix.side, matrix.blocks, count)
    exact = read_at(G.double() - lifted(name, R, P), whole)
    size = read_at(G.double().abs() + lifted(name, R.abs(), P.abs()), whole)
    assert ((D - exact).abs() <= BOUND * size).all()


@pytest.mark.parametrize("name", ["PLAIN", "HEADS", "CONV1D", "INTERLEAVED"])
@both_dtypes
def test_add_at_the_support(name: str, dtype: torch.dtype, device: torch.device) -> None:
    matrix, tensors = MATRICES[name], stored(name, device, dtype)
    before = [x.clone() for x in tensors]
    positions = support(name, device, 4)
    values = random(device, JOBS * matrix.blocks, matrix.block_rows, 4, seed=80)
    ok = flags(device, 1.0, 0.0, 1.0)
    kernel_add_at_(
        places(tensors, matrix),
        layout(name, tensors),
        places(positions),
        values,
        ok,
        rates=rates(device, 0.5),
        keys=None,
    )
    exact = blocks_of(name, before).float().clone()
    add_at_(exact, Support(torch.cat(positions), matrix.columns), values * spread(ok, matrix.blocks), alpha=-0.5)
    for i, part in enumerate(exact.split(matrix.blocks)):
        rtol = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(matrix.take(tensors[i]), part.to(dtype), rtol=rtol, atol=1e-7)
    assert torch.equal(tensors[1], before[1])


def test_alignment_is_what_addresses_share() -> None:
    assert alignment_of([32, 48]) == 16
    assert alignment_of([32, 6]) == 2
    assert alignment_of([]) == 16


@both_dtypes
def test_one_bad_entry_makes_a_gradient_unusable(dtype: torch.dtype, device: torch.device) -> None:
    """Its last entry, too, which lies in a block of its own."""
    G = [random(device, 2049, seed=i).to(dtype) for i in range(6)]
    for i, bad in enumerate((float("nan"), float("inf"), -float("inf"), 2e9, -2e9)):
        G[i][-1 if i % 2 else 5] = bad
    assert usable(places(G), 2049, 1e9).tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert usable(places(G), 2048, 1e9).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]


@both_dtypes
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_plain_adamw_is_torchs(dtype: torch.dtype, weight_decay: float, device: torch.device) -> None:
    """Three steps of three tensors, one of which has to skip the second; float32 arithmetic, rounded to nearest."""
    W = [random(device, 3000, seed=i).to(dtype) for i in range(JOBS)]
    wide = [torch.nn.Parameter(x.float()) for x in W]
    theirs = [torch.optim.AdamW([x], lr=0.01, weight_decay=weight_decay) for x in wide]
    M, V = ([torch.zeros(3000, device=device) for _ in range(JOBS)] for _ in "mv")
    t = flags(device, 0.0, 0.0, 0.0)
    for step in range(3):
        G = [random(device, 3000, seed=30 + 3 * step + i).to(dtype) for i in range(JOBS)]
        ok = flags(device, 1.0, float(step != 1), 1.0)
        before = [x.clone() for x in W]
        adamw_(
            places(W),
            places(G),
            places(M),
            places(V),
            places(list(t.unbind())),
            ok,
            3000,
            rates=rates(device, 0.01, 0.01 * weight_decay, len(ok)),
            betas=(0.9, 0.999),
            eps=1e-8,
            keys=None,
        )
        t = t + ok
        for i in range(JOBS):
            if ok[i] == 0.0:
                assert torch.equal(W[i], before[i])
                continue
            wide[i].data, wide[i].grad = before[i].float(), G[i].float()
            theirs[i].step()
            rtol, atol = (1e-6, 1e-7) if dtype == torch.float32 else (2**-7, 1e-7)
            torch.testing.assert_close(W[i].float(), wide[i].data, rtol=rtol, atol=atol)
            torch.testing.assert_close(V[i], theirs[i].state[wide[i]]["exp_avg_sq"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", range(1, 6))
def test_every_column_of_a_table_begins_where_wide_loads_may(count: int) -> None:
    """Else an odd number of matrices would have every kernel compiled a second time, in the midst of training."""
    columns = [[7 * i + j for j in range(count)] for i in range(3)]
    table = upload(columns, torch.device("cpu"))
    assert table.tolist() == columns
    assert all(row.data_ptr() % 16 == table.data_ptr() % 16 for row in table.unbind())
