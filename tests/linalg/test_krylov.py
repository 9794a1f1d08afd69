"""``Krylov`` against float64: its rows are orthonormal, and expand every product with a row."""

import numpy as np
import pytest
import torch

from subspace_optim.linalg import krylov
from subspace_optim.linalg.krylov import Krylov, KrylovRows
from tests.dense import DTYPES
from tests.linalg.test_lanczos import SPECTRA, TIGHT, Matrix, check, solve

K, SIZE = 4, 5000
"""Restarts after ``2k + 6`` = 14 rows."""


def made(matrix, dtype, *, seed=0):
    return Krylov(
        matrix,
        len(matrix),
        K,
        max_products=1000,
        seed=seed,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def exact_rows(solver):
    return torch.stack([solver.rows[j].double() for j in range(solver.count)])


def rounding(solver, matrix):
    """A few roundings of sums over P, in the dtype; beside the largest eigenvalue."""
    return 100 * solver.epsilon * max(float(matrix.entries.abs().max()), 1e-30)


@pytest.fixture(params=[False, True], ids=["host", "device"])
def as_on_a_device(request, monkeypatch):
    """Both ways through a breakdown: looked up, as on a CPU, and computed for all cases."""
    if request.param:
        monkeypatch.setattr(krylov, "_perhaps", lambda *_: True)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("name", SPECTRA)
def test_rows_stay_orthonormal_and_hold_all_of_every_product(name, steps, dtype):
    """Through restarts, invariant subspaces, and rows that are multiplied out of turn.

    ``H Q_M = Q T``, but for what a restart had no room for, which is told.
    """
    matrix = Matrix(SPECTRA[name](SIZE).to(dtype))
    solver = made(matrix, dtype)
    for turn in range(12):
        solver.extend(steps)
        if turn % 5 == 4:
            solver.make_room(3)
            solver.add_random_row()
            solver.multiply(solver.pending[-1:])
            solver.multiply(solver.pending[-1:])
            solver.rayleigh_ritz()
        Q = exact_rows(solver)
        gram = Q @ Q.T - torch.eye(len(Q), dtype=torch.float64)
        # A sum of P squares is off by up to P ε/16, in float64 too.
        assert gram.abs().max() <= SIZE / 16 * solver.epsilon
        T = solver.projected.double()[: solver.count, solver.multiplied]
        rest = matrix.rows_times(Q[solver.multiplied]) - T.T @ Q
        lost = np.abs(solver.lost).sum(axis=0)
        told = torch.from_numpy(lost) if lost.size else torch.zeros(len(rest))
        assert (rest.norm(dim=1) <= told + rounding(solver, matrix)).all()


def test_restarts_are_a_part_of_what_was_tested():
    solver = made(Matrix(SPECTRA["decaying"](SIZE)), torch.float64)
    for _ in range(12):
        solver.extend(2)
    assert len(solver.starts.restarts) >= 2
    assert solver.max_rows == 2 * K + 6 < solver.products


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["zero", "identity", "low_rank", "repeated_at_the_top", "tiny"])
def test_a_device_finds_the_same_where_the_host_never_looks(name, dtype, monkeypatch):
    monkeypatch.setattr(krylov, "_perhaps", lambda *_: True)
    for size in (40, 300, SIZE):
        matrix = Matrix(SPECTRA[name](size).to(dtype))
        check(solve(matrix, 5, TIGHT[dtype], dtype), matrix, 5, TIGHT[dtype])


@pytest.mark.parametrize(("first", "end"), [(0, 7), (0, 3), (3, 7), (5, 7), (2, 5), (1, 2), (3, 3)])
def test_a_part_in_some_rows_is_taken_out_whichever_block_holds_them(first, end):
    rows = KrylovRows(3, 7, 50, torch.float64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(first)
    Q = torch.linalg.qr(torch.randn(50, 7, generator=generator, dtype=torch.float64)).Q.T
    rows.head.copy_(Q[:3])
    rows.tail.copy_(Q[3:])
    v = torch.randn(50, generator=generator, dtype=torch.float64)
    rest = v.clone()
    parts = rows.project_out_(rest, first, end)
    torch.testing.assert_close(parts, Q[first:end] @ v)
    torch.testing.assert_close(rest, v - Q[first:end].T @ (Q[first:end] @ v))


@pytest.mark.parametrize(
    ("numbers", "copied"),
    [
        ([0, 1], False),
        ([4, 5], False),
        ([2], False),
        ([2, 3], True),
        ([1, 0], True),
        ([0, 2], True),
    ],
)
def test_rows_side_by_side_are_not_copied(numbers, copied):
    rows = KrylovRows(3, 7, 5, torch.float64, torch.device("cpu"))
    whole = torch.arange(35.0).double().view(7, 5)
    rows.head.copy_(whole[:3])
    rows.tail.copy_(whole[3:])
    several = rows.several(numbers)
    assert torch.equal(several, whole[numbers])
    assert rows.share_memory_with(several) is not copied


def test_the_first_pass_leaves_rounding_alone_in_the_rows(monkeypatch):
    """Also where rows are multiplied out of turn, and beside those that a restart has kept."""
    calls = []
    project_out_ = KrylovRows.project_out_

    def record(rows, v, first, end):
        length = v.norm()
        parts = project_out_(rows, v, first, end)
        calls.append((float(parts.norm() / length), float(length)))
        return parts

    matrix = Matrix(SPECTRA["hessian"](SIZE))
    solver = made(matrix, torch.float64)
    monkeypatch.setattr(KrylovRows, "project_out_", record)
    for turn in range(15):
        solver.extend(2)
        solver.make_room(2)
        for _ in range(turn % 3):
            solver.make_room(1)
            solver.multiply(solver.pending[-1:])
        solver.rayleigh_ritz()
    assert len(calls) == 2 * solver.products
    largest = float(matrix.entries.abs().max())
    assert max(part * length for part, length in calls[1::2]) <= 1e-12 * largest
