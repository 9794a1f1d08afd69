"""When it is due to look outside of a basis, and that a hidden direction is found then."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import subspace_optim as so
from subspace_optim.linalg.rows import largest_sine
from subspace_optim.subspaces.staleness import Drift
from subspace_optim.subspaces.unseen import Unseen

SHORT, LONG = Drift(0.0, 0.1), Drift(0.3, 0.4)


class Quartic(nn.Module):
    """``Σ θ_i⁴ / 12``, whose Hessian is ``diag(θ²)``."""

    def __init__(self, theta: torch.Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.double())

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.theta


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [40, 400])
def test_a_direction_that_rises_out_of_the_bulk_is_found(size: int, seed: int) -> None:
    """Basis and guard stay exact eigenvectors: neither sees anything."""
    start = torch.cat([torch.tensor([3.0, 2.6, 1.8]), torch.linspace(0.1, 0.9, size - 3)])
    model = Quartic(start)
    data = torch.zeros(1, 1), torch.zeros(1)
    hessian = so.HessianOperator(model, lambda out, _: (out**4).sum() / 12, data)
    subspace = so.DominantSubspace(hessian, 2, seed=seed)
    for _ in range(6):
        subspace.update()
        with torch.no_grad():
            model.theta += 1e-4
    with torch.no_grad():
        model.theta[size // 2] = 2.8
    basis = subspace.update()
    truth = torch.zeros(2, size, dtype=torch.float64)
    truth[0, 0] = truth[1, size // 2] = 1.0
    assert largest_sine(basis.vectors, truth) <= subspace.stats.estimate <= 0.05


def test_it_is_due_once_the_basis_has_turned_by_much() -> None:
    known = Unseen()
    for turns in range(1, 10):
        known = known.turned_by(SHORT, 0.2, 11, drifted=True)
        assert known.is_due == (turns >= 6)
    assert not known.looked(0.0).is_due


def test_what_a_probe_finds_counts_once() -> None:
    known = Unseen()
    for _ in range(10):
        known = known.probed(SHORT, 0.3, 2, fallen=False)
    assert not known.is_due
    known = known.turned_by(SHORT, 0.3, 11, drifted=True)
    assert math.isclose(known.turned, 0.3)
    assert known.probed(SHORT, 0.8, 2, fallen=False).is_due


def test_it_is_due_after_many_products_and_after_a_move_that_is_far_longer() -> None:
    known = Unseen()
    for _ in range(74):
        known = known.probed(SHORT, 0.0, 2, fallen=False)
    assert not known.is_due
    assert known.probed(SHORT, 0.0, 2, fallen=False).is_due
    assert known.looked(0.0).probed(LONG, 0.0, 2, fallen=False).is_due
    assert known.looked(0.0).probed(SHORT, 0.0, 2, fallen=True).is_due
    assert not Unseen().probed(LONG, 0.0, 2, fallen=False).is_due, "there was none before"


def test_a_matrix_that_is_known_better_is_no_other_matrix() -> None:
    assert Unseen().turned_by(SHORT, 0.2, 11, drifted=True).refined
    assert not Unseen().turned_by(SHORT, 0.2, 11, drifted=False).refined


def test_a_look_keeps_what_it_has_found_there() -> None:
    known = Unseen().looked(2.5)
    assert known.level == 2.5
    assert known.probed(SHORT, 0.1, 2, fallen=False).level == 2.5
    assert known.turned_by(SHORT, 0.1, 2, drifted=True).level == 2.5
