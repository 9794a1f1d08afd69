"""Parameters that jump to and fro keep two bases, and each serves where it was made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.linalg.rows import largest_sine
from subspace_optim.subspaces.put_aside import are_back
from tests.checkpoints import through_a_file
from tests.dense import dense_curvature, supervised

K, SIZE = 3, 0.12


class AnyDtype(nn.Module):
    """A model that takes its input in the dtype of its parameters."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.to(next(self.inner.parameters()).dtype))
        return out


class Jumping:
    """A small network whose parameters go to and fro along one direction, and drift on slowly."""

    def __init__(self, seed: int, *, drift: float = 2e-4, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, K)).double()
        self.y = torch.arange(60) % K
        self.x = 2 * torch.randn(K, 6).double()[self.y] + torch.randn(60, 6).double()
        self.start = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        to_and_fro, slow = torch.randn(2, len(self.start)).double()
        self.to_and_fro = SIZE * to_and_fro / to_and_fro.norm()
        self.slow = drift * slow / slow.norm()
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(K).double())
        hessian = so.HessianOperator(self.model, self.loss, (self.x, self.y))
        self.subspace = so.DominantSubspace(hessian, 2, **options)

    def at(self, step: int) -> None:
        theta = self.start + (-1) ** step * self.to_and_fro + step * self.slow
        nn.utils.vector_to_parameters(theta, self.model.parameters())

    def true_sine(self) -> float:
        dense = dense_curvature(self.model, supervised(self.loss), [(self.x, self.y)]).hessian
        top = torch.linalg.eigh(dense).eigenvectors.T.flip(0)[:2].contiguous()
        assert self.subspace.basis is not None
        return largest_sine(self.subspace.basis.vectors, top)

    def follow(self, steps: range) -> list[int]:
        """Returns the products that each step took; what is told of it is true."""
        taken = []
        for step in steps:
            before = self.subspace.stats.products
            self.at(step)
            self.subspace.update()
            taken.append(self.subspace.stats.products - before)
            assert self.true_sine() <= self.subspace.stats.estimate <= 0.05
        return taken


@pytest.mark.parametrize("seed", range(4))
def test_two_bases_serve_in_turn(seed: int) -> None:
    problem = Jumping(seed)
    taken = problem.follow(range(30))
    assert problem.subspace.rule.holds_two
    assert min(taken[:3]) > 0, "each step turns the basis by much"
    assert sum(taken[3:]) <= 15, "a probe of each now and then"


def test_parameters_that_go_on_keep_one_basis() -> None:
    problem = Jumping(0, drift=SIZE / 2)
    problem.to_and_fro = torch.zeros_like(problem.start)
    problem.follow(range(10))
    assert not problem.subspace.rule.holds_two


def test_a_resumed_run_holds_both() -> None:
    whole, other = Jumping(1), Jumping(1)
    whole.follow(range(9))
    other.subspace.load_state_dict(through_a_file(whole.subspace.state_dict()))
    assert other.subspace.rule.holds_two
    assert whole.follow(range(9, 25)) == other.follow(range(9, 25))
    mine, theirs = (each.subspace.basis for each in (whole, other))
    assert mine is not None
    assert theirs is not None
    assert torch.equal(mine.vectors, theirs.vectors)


def test_another_matrix_has_neither() -> None:
    problem = Jumping(2)
    problem.follow(range(9))
    problem.loss.weight[0] = 1.5  # another loss: none of the bases is of its matrix
    problem.at(9)
    problem.subspace.update()
    assert not problem.subspace.rule.holds_two
    assert problem.true_sine() <= problem.subspace.stats.estimate


def test_a_basis_of_another_dtype_does_not_come_back() -> None:
    for steps in range(5, 9):
        problem = Jumping(3)
        model = AnyDtype(problem.model).float()
        data = problem.x, problem.y
        hessian = so.HessianOperator(model, nn.CrossEntropyLoss(), data)
        problem.subspace = so.DominantSubspace(hessian, 2)
        for step in range(steps):
            problem.at(step)
            problem.subspace.update()
        assert problem.subspace.rule.holds_two
        problem.model.double()
        for step in range(steps, steps + 3):
            problem.at(step)
            assert problem.subspace.update().vectors.dtype == torch.float64


def test_a_refresh_by_hand_goes_on_as_it_does_after_a_checkpoint() -> None:
    whole, other = Jumping(1), Jumping(1)
    for step in range(12):
        whole.at(step)
        whole.subspace.update()
        other.at(step)
        other.subspace.load_state_dict(through_a_file(whole.subspace.state_dict()))
        whole.subspace.refresh()
        other.subspace.refresh()
        assert whole.subspace.stats.products == other.subspace.stats.products
        assert whole.subspace.rule.holds_two == other.subspace.rule.holds_two


@pytest.mark.parametrize(
    ("theta", "before", "earlier", "back"),
    [
        ([0.0, 1.0], [1.0, 1.0], [0.0, 0.9], True),
        ([0.0, 1.0], [1.0, 1.0], [0.0, 0.4], False),
        ([0.0, 1.0], [1.0, 1.0], None, False),
        ([0.0, 1.0], None, [0.0, 1.0], False),
        ([0.0, 1.0], [0.0, 1.0], [0.0, 1.0], False),
    ],
)
def test_when_parameters_are_back(
    theta: list[float], before: list[float] | None, earlier: list[float] | None, back: bool
) -> None:
    as_tensor = [None if each is None else Tensor(each) for each in (before, earlier)]
    assert are_back(Tensor(theta), *as_tensor) is back
