"""A monitor in every kind of subspace, beside formulas of its vectors: what each can tell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.curvature import ParameterSpace
from subspace_optim.linalg import EigenBasis
from tests.optim.naive import DenseOperator, Quartic, dense_eigenbasis, flat

ALWAYS = ("update_norm", "chi_update", "distance")
MEASURED = ("loss", "gradient_norm", "chi_gradient", "dom_lr", "bulk_lr")
BY_THE_OPERATOR = (*MEASURED, *(f"{name}_error" for name in MEASURED))
COSTS = ("gradients", "products", "forwards")
BY_EIGENPAIRS = ("sharpness", "gap", "angle_estimate")


class Own:
    """A subspace of one's own: two coordinates that change places with every step."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = ParameterSpace(model)
        self.asked = 0

    def update(self) -> EigenBasis:
        rows = torch.zeros(2, self.parameters.size, dtype=torch.float64)
        rows[0, self.asked % 3] = rows[1, 3 + self.asked % 3] = 1
        self.asked += 1
        return EigenBasis(torch.ones(2).double(), rows, torch.zeros(2).double())


def fixed(model: Quartic) -> so.FixedSubspace:
    return so.FixedSubspace(model, dense_eigenbasis(9, 2, 5, torch.float64).vectors)


def train(model: Quartic, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    """A step; θ before it, and the update."""
    before = flat(model.parameters())
    optimizer.zero_grad()
    model().backward()
    optimizer.step()
    return before, flat(model.parameters()) - before


def missing(monitor: so.Monitor) -> set[str]:
    """Columns of which no row knows anything."""
    return {
        name
        for name, values in monitor.history.items()
        if all(value == [] or (isinstance(value, float) and math.isnan(value)) for value in values)
    }


NEVER_HERE = {"sam_edge", "adam_threshold"}


@pytest.mark.parametrize("kind", ["fixed", "own"])
def test_of_vectors_alone_a_row_tells_what_the_update_tells(kind: str) -> None:
    model = Quartic()
    subspace: Any = fixed(model) if kind == "fixed" else Own(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    monitor = so.Monitor(optimizer, subspace)
    start = flat(model.parameters())
    for t in range(4):
        theta, update = train(model, optimizer)
        if kind == "fixed":
            V = subspace.basis.vectors
        else:
            V = torch.eye(9, dtype=torch.float64)[[t % 3, 3 + t % 3]]
        row = {column: values[t] for column, values in monitor.history.items()}
        assert row["update_norm"] == pytest.approx(float(update.norm()))
        assert row["chi_update"] == pytest.approx(float((V @ update).norm() / update.norm()))
        assert row["distance"] == pytest.approx(float((theta - start).norm()))
        assert row["threshold"] == pytest.approx(380)
        assert row["step"] == t
    unknown = {*BY_THE_OPERATOR, *COSTS, *BY_EIGENPAIRS, *NEVER_HERE, "eigenvalues", "examples"}
    assert missing(monitor) == unknown
    assert monitor.history["eigenvalues"] == [[]] * 4


def test_with_an_operator_it_tells_of_the_gradient() -> None:
    model = Quartic()
    subspace, optimizer = fixed(model), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    subspace.operator = DenseOperator(model)  # type: ignore[attr-defined]
    monitor = so.Monitor(optimizer, subspace)
    V = subspace.basis.vectors
    for t in range(3):
        theta, update = train(model, optimizer)
        g = model.gradient(theta)
        dominant, bulk = V.T @ (V @ g), g - V.T @ (V @ g)
        row = {column: values[t] for column, values in monitor.history.items()}
        assert row["loss"] == pytest.approx(float(model.loss(theta)))
        assert row["gradient_norm"] == pytest.approx(float(g.norm()))
        assert row["chi_gradient"] == pytest.approx(float(dominant.norm() / g.norm()))
        assert row["dom_lr"] == pytest.approx(float(-(update @ dominant) / (dominant @ dominant)))
        assert row["bulk_lr"] == pytest.approx(float(-(update @ bulk) / (bulk @ bulk)))
        assert (row["gradients"], row["products"]) == (1, 0)
        assert all(row[f"{name}_error"] == 0 for name in MEASURED)
    # A matrix that was written down is of no examples.
    assert missing(monitor) == {*BY_EIGENPAIRS, *NEVER_HERE, "eigenvalues", "examples"}


def test_an_operator_of_another_model_is_refused() -> None:
    model = Quartic()
    subspace, optimizer = fixed(model), torch.optim.SGD(model.parameters(), lr=0.01)
    subspace.operator = DenseOperator(Quartic())  # type: ignore[attr-defined]
    with pytest.raises(so.ArgumentError, match="the subspace's operator is 'of other parameters'"):
        so.Monitor(optimizer, subspace)


def test_with_k_beside_it_the_eigenvalues_of_its_basis() -> None:
    model = Quartic()
    subspace: Any = Own(model)
    subspace.operator, subspace.k = DenseOperator(model), 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(
        optimizer, subspace, measures=[so.measures.dominant(), so.measures.next_eigenvalues(1)]
    )
    theta, _ = train(model, optimizer)
    values = torch.linalg.eigvalsh(model.hessian(theta)).flip(0)
    # With those that follow they are solved for, and are those of the Hessian.
    assert monitor.history["eigenvalues"] == [pytest.approx(values[:2].tolist(), rel=1e-4)]
    assert monitor.history["next_eigenvalues"] == [[pytest.approx(float(values[2]), rel=1e-2)]]
    plain = so.Monitor(optimizer, subspace)
    train(model, optimizer)
    assert plain.history["eigenvalues"] == [[1.0, 1.0]]
    assert plain.history["sharpness"] == [1.0]


def test_of_class_gradients_that_are_orthogonal() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    subspace = so.ClassGradientSubspace(model, num_classes=3, orthogonal=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = so.Monitor(optimizer, subspace)
    for t in range(2):
        subspace.observe(x, y)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        before = flat(model.parameters())
        optimizer.step()
        update = flat(model.parameters()) - before
        basis = subspace.update()
        assert isinstance(basis, EigenBasis)
        expected = float((basis.vectors @ update).norm() / update.norm())
        assert monitor.history["chi_update"][t] == pytest.approx(expected)
    assert missing(monitor).isdisjoint(ALWAYS)
    oblique = so.ClassGradientSubspace(model, num_classes=3)
    with pytest.raises(so.ArgumentError, match=r"not orthogonal.* one to project onto"):
        so.Monitor(optimizer, oblique)


def test_what_is_no_projector_is_nan() -> None:
    """A basis in other coordinates is found when it is asked for; the training goes on."""
    model = Quartic()
    subspace = Own(model)
    short = EigenBasis(*(t.double() for t in (torch.ones(1), torch.eye(1, 5), torch.zeros(1))))
    subspace.update = lambda: short  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, subspace)
    with pytest.warns(so.LogWarning, match=r"step 0 is NaN: size, dtype and device of the subsp"):
        _, update = train(model, optimizer)
    assert float(update.norm()) > 0
    assert math.isnan(monitor.history["chi_update"][0])
    assert monitor.history["update_norm"][0] == pytest.approx(float(update.norm()))  # needs none


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (
            so.measures.next_eigenvalues(1),
            r"next_eigenvalues\(\) of a subspace without an operator",
        ),
        (
            so.measures.preconditioned_sharpness(),
            r"_sharpness\(\) of a subspace without an operator",
        ),
        (so.measures.stability(), r"directional_sharpness\(\) of a subspace without an operator"),
        (so.measures.dominant(20), "^sample is 20, .* 'auto' or None, but for a subspace with an"),
    ],
)
def test_what_takes_an_operator_is_refused_without_one(measures: Any, message: str) -> None:
    model = Quartic()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(so.ArgumentError, match=message):
        so.Monitor(optimizer, fixed(model), measures=measures)
    assert not optimizer._optimizer_step_pre_hooks


def test_sam_has_its_threshold_without_a_gradient_and_no_edge() -> None:
    model = Quartic()
    optimizer = so.SAM(model.parameters(), lr=0.01, rho=0.1)
    monitor = so.Monitor(optimizer, fixed(model))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert monitor.history["threshold"] == [pytest.approx(200)]
    assert "sam_edge" in missing(monitor)


def test_what_was_recorded_goes_out_of_the_house_and_on(tmp_path: Path) -> None:
    """Files without columns for eigenvalues, a picture, and a state for the next run."""
    model = Quartic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, fixed(model), log=tmp_path / "run.csv")
    train(model, optimizer)
    header, row = (tmp_path / "run.csv").read_text().splitlines()
    assert "eigenvalue" not in header
    assert len(row.split(",")) == len(header.split(",")) == len(monitor.history) - 1
    assert len(monitor.to_frame()) == 1
    assert monitor.plot().axes[3].get_lines()
    other = so.Monitor(torch.optim.SGD(model.parameters(), lr=0.01), fixed(model))
    other.load_state_dict(monitor.state_dict())
    assert str(other.history) == str(monitor.history)
