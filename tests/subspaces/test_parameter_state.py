"""What a basis is valid at: all that the loss depends on, not only what it is differentiated by."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import DataChangedError

GENERATOR = torch.Generator().manual_seed(0)
X = 2 * torch.randn(50, 4, generator=GENERATOR, dtype=torch.float64) + 0.5
Y = torch.randint(3, (50,), generator=GENERATOR)


class Margin(nn.Module):
    """A loss with a parameter, and a buffer that it only reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(3, dtype=torch.float64))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * out + self.shift, y)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
    ).double()


def _train_others(net: nn.Module, loss: Margin) -> None:
    for p in net[0].parameters():
        p.grad = None
    loss(net(X), Y).backward()
    torch.optim.SGD(net[0].parameters(), lr=1.0).step()


def _recalibrate(net: nn.Module, loss: Margin) -> None:
    training = net.training
    torch.optim.swa_utils.update_bn([(X[:20] * 3,), (X[20:] * 3,)], net)
    net.train(training)


def _train_the_loss(net: nn.Module, loss: Margin) -> None:
    loss.scale.data.mul_(2.5)


def _shift(net: nn.Module, loss: Margin) -> None:
    loss.shift.add_(torch.tensor([1.0, -1.0, 0.5]))


def _replace(net: nn.Module, loss: Margin) -> None:
    state = {name: t.clone() * 1.5 for name, t in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def _switch_mode(net: nn.Module, loss: Margin) -> None:
    net.train(not net.training)


CHANGES: list[Callable[[nn.Module, Margin], None]] = [
    _train_others, _recalibrate, _train_the_loss, _shift, _replace, _switch_mode,
]  # fmt: skip


def anew(net: nn.Module, loss: Margin, names: str) -> Tensor:
    """The eigenvalues of an operator and a subspace that know nothing of before, solved tightly."""
    hessian = so.HessianOperator(net, loss, (X, Y), params=names)
    return so.DominantSubspace(hessian, k=2, refresh=1, tol=1e-8).update().eigenvalues


@pytest.mark.parametrize("refresh", ["auto", 1])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_loss_depends_on_makes_the_old_basis_stale(change, refresh):
    net, loss = network().eval(), Margin()
    hessian = so.HessianOperator(net, loss, (X, Y), params="4.*")
    subspace = so.DominantSubspace(hessian, k=2, refresh=refresh)
    subspace.update()
    for _ in range(2):
        change(net, loss)
        expected = anew(net, loss, "4.*")
        torch.testing.assert_close(subspace.update().eigenvalues, expected, rtol=0.02, atol=1e-6)
        assert hessian.loss() == pytest.approx(_loss(net, loss), rel=1e-9)


def _loss(net: nn.Module, loss: Margin) -> float:
    """By hand, from a copy; dropout's masks are those of the operator's seed."""
    net, loss = copy.deepcopy((net, loss))
    torch.manual_seed(0)
    return loss(net(X), Y).item()


def test_nothing_that_changed_costs_nothing():
    net, loss = network(), Margin()
    subspace = so.DominantSubspace(so.HessianOperator(net, loss, (X, Y)), k=2)
    subspace.update()
    before = copy.copy(subspace.stats)
    for _ in range(3):
        net(X)  # in train mode batch norm writes its statistics, and does not read them
        subspace.update()
    assert subspace.stats == before


def test_small_changes_elsewhere_are_probed_and_not_solved_for():
    net, loss = network().eval(), Margin()
    subspace = so.DominantSubspace(so.HessianOperator(net, loss, (X, Y)), k=2)
    subspace.update()
    for _ in range(5):
        loss.scale.data.mul_(1.0001)
        subspace.update()
    assert subspace.stats.cold == 1
    assert subspace.stats.probes == 5
    assert subspace.stats.estimate <= 0.05


def test_a_resumed_run_knows_what_else_the_basis_was_valid_at():
    net, loss = network().eval(), Margin()
    subspace = so.DominantSubspace(so.HessianOperator(net, loss, (X, Y)), k=2)
    subspace.update()
    state, models = copy.deepcopy((subspace.state_dict(), (net, loss)))
    fresh = so.DominantSubspace(so.HessianOperator(*models, (X, Y)), k=2)
    fresh.load_state_dict(state)
    fresh.update()
    assert fresh.stats == subspace.stats
    models[1].shift.add_(1)
    fresh.update()
    assert fresh.stats.probes > subspace.stats.probes


def test_a_step_of_the_loss_counts_as_a_parameter_state():
    """`refresh=1` is a new basis whenever the matrix is another."""
    net, loss = network().eval(), Margin()
    subspace = so.DominantSubspace(so.HessianOperator(net, loss, (X, Y)), k=2, refresh=1)
    subspace.update()
    loss.scale.data.mul_(2)
    subspace.update()
    subspace.update()
    assert subspace.stats.refreshes == 2


@pytest.mark.parametrize("refresh", ["auto", 1])
def test_data_that_were_written_in_place_are_no_longer_those_of_the_operator(refresh):
    x, y = X.clone(), Y.clone()
    hessian = so.HessianOperator(network(), Margin(), [(x[:20], y[:20]), (x[20:], y[20:])])
    subspace = so.DominantSubspace(hessian, k=2, refresh=refresh)
    subspace.update()
    x.mul_(2)
    with pytest.raises(DataChangedError, match="written in place"):
        subspace.update()


def test_what_cannot_be_seen_is_told_by_another_pass():
    """The loss changes with a number that no walk reaches, between two passes of one state."""

    class Far:
        __slots__ = ("factor",)

    far = Far()
    far.factor = 1.0

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return far.factor * F.mse_loss(out.sum(1), y.double())

    hessian = so.HessianOperator(network(), loss, (X, Y))
    v = torch.ones(hessian.size).double()
    hessian.matvec(v)
    far.factor = 3.0
    hessian.release()
    with pytest.raises(DataChangedError, match="cannot see"):
        hessian.matvec(v)
    hessian.matvec(v)  # what was known of the old loss is forgotten


class Custom(so.CurvatureOperator):
    """An operator of one's own knows its parameters, and need not tell of anything else."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = so.ParameterSpace(model)
        self.stats: Any = so.curvature.OperatorStats()

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[None])[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        return vectors * torch.arange(1, self.size + 1, dtype=self.dtype)

    def gradient(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype)

    def loss(self) -> float:
        return 0.0


def test_an_operator_of_ones_own_is_told_apart_by_its_parameters():
    model = nn.Linear(3, 2).double()
    subspace = so.DominantSubspace(Custom(model), k=2)
    values = subspace.update().eigenvalues
    torch.testing.assert_close(values, torch.tensor([8.0, 7.0]).double(), rtol=1e-3, atol=0)
    cold = subspace.stats.cold
    subspace.update()
    assert subspace.stats.cold == cold
