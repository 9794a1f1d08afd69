"""Measures that refine others, that remember, that fail now and then; their logs and copies."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so
from subspace_optim import measures
from subspace_optim.linalg import EigenBasis
from tests.diagnostics.test_monitor_logs import Writer
from tests.diagnostics.trainings import Setting, by_products, expected_row


def trained(several: Any, steps: int = 3, **options: Any) -> tuple[Setting, Any, so.Monitor]:
    s = Setting()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.05)
    monitor = so.Monitor(optimizer, s.operator, measures=several, **options)
    for _ in range(steps):
        s.step([optimizer])
    return s, optimizer, monitor


# A measure of one's own.


class Exact(measures.Measure):
    """Tells the curvature along the update, where another has an estimate of it, by a product."""

    columns = ("exactly",)
    refines = ("update_sharpness",)

    def after(self, step: measures.Step) -> dict[str, Any]:
        with step.at_start() as operator:
            u = step.update
            found = torch.dot(u, operator.matvec(u)) / torch.dot(u, u)
        return {"exactly": found, "update_sharpness": found}


@pytest.mark.parametrize("first", [True, False])
def test_the_more_exact_value_is_in_the_row_in_whichever_order_they_are(first: bool) -> None:
    several = [Exact(), measures.stability()] if first else [measures.stability(), Exact()]
    monitor = trained(several)[2]
    estimates = trained(measures.stability())[2].history["update_sharpness"]
    assert monitor.history["update_sharpness"] == monitor.history["exactly"]
    assert monitor.history["update_sharpness"] != estimates
    assert monitor.history["update_sharpness"] == pytest.approx(estimates, rel=0.1)


def test_what_is_refined_is_left_out_where_no_other_measure_has_it() -> None:
    monitor = trained(Exact())[2]
    assert set(monitor.history) == {"step", "exactly", "gradients", "products", "forwards"}
    assert all(map(math.isfinite, monitor.history["exactly"]))


class Travelled(measures.Measure):
    """The length of the path so far."""

    columns = ("travelled",)

    def attach(self, training: measures.Training) -> None:
        self.length = 0.0

    def after(self, step: measures.Step) -> dict[str, Any]:
        self.length += float(step.update.norm())
        return {"travelled": self.length}

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.length = state["length"]


def test_what_a_measure_remembers_is_in_the_state_and_each_monitor_has_its_own() -> None:
    shared = Travelled()
    s, optimizer, monitor = trained([shared, measures.update()])
    lengths = torch.tensor(monitor.history["update_norm"]).cumsum(0).tolist()
    assert monitor.history["travelled"] == pytest.approx(lengths)
    state = copy.deepcopy(monitor.state_dict())
    other = so.Monitor(optimizer, s.operator, measures=shared)  # from its own beginning
    s.step([optimizer])
    own = monitor.history["update_norm"][-1]
    assert other.history["travelled"] == [pytest.approx(own)]
    t, second, resumed = trained([Travelled(), measures.update()], steps=0)
    resumed.load_state_dict(state)
    t.step([second])
    assert resumed.history["travelled"][-1] == pytest.approx(
        lengths[-1] + resumed.history["update_norm"][-1]
    )


class Fails(measures.Measure):
    """Fails after steps 1, 2 and 4."""

    columns = ("number",)

    def after(self, step: measures.Step) -> dict[str, Any]:
        if step.number in (1, 2, 4):
            raise ZeroDivisionError(f"at {step.number}")
        return {"number": step.number}


def test_each_failure_costs_its_row_and_each_series_of_them_a_warning() -> None:
    s, optimizer, monitor = trained([measures.stability(), Fails()], steps=1)
    for t in range(1, 6):
        if t in (1, 4):  # at 2 another warning would be an error here
            with pytest.warns(
                so.LogWarning, match=rf"^A part of the row of step {t} is NaN: at {t} "
            ):
                s.step([optimizer])
        else:
            s.step([optimizer])
    plain = Setting()
    other = torch.optim.SGD(plain.model.parameters(), lr=0.05)
    for _ in range(6):
        plain.step([other])
    assert torch.equal(plain.theta, s.theta)
    for column in ("number", "update_sharpness", "gradients"):
        missing = [math.isnan(value) for value in monitor.history[column]]
        lost = [False, True, True, False, True, False]  # of the measure that failed, and no other
        assert missing == (lost if column == "number" else [False] * 6), column
    assert monitor.history["step"] == list(range(6))


# Logs.


class Unknown(measures.Measure):
    """A list, half of it known, and a number that is not."""

    columns = ("some", "none")
    lists = {"some": 2}  # noqa: RUF012 (as a user would)

    def after(self, step: measures.Step) -> dict[str, Any]:
        return {"some": [step.number, math.nan]}


def test_lists_and_what_is_unknown_go_to_every_kind_of_log(tmp_path: Path) -> None:
    writer, taken = Writer(), list[dict[str, Any]]()
    path = tmp_path / "run.jsonl"
    blocks = measures.block_sharpness({"first": "0.*", "last": "2.*"})
    several = [measures.stability(), blocks, Unknown()]
    monitor = trained(several, steps=2, log=[writer, taken.append, path])[2]
    assert str(taken) == str(monitor.rows())
    written = [json.loads(line) for line in path.read_text().splitlines()]
    for t, (row, line) in enumerate(zip(taken, written, strict=True)):
        assert line == {c: value if math.isfinite(value) else None for c, value in row.items()}, (
            "a row of JSON has null for what is no number"
        )
        assert (row["some_1"], math.isnan(row["some_2"])) == (t, True)
        assert math.isnan(row["none"])
        scalars = {tag: value for tag, value, step in writer.scalars if step == t}
        assert scalars == {
            f"subspace/{c}": value
            for c, value in row.items()
            if c != "step" and math.isfinite(value)
        }
        assert {"subspace/gradient_sharpness", "subspace/some_1"} < set(scalars)


# Subspaces that are given.


def test_a_fixed_subspace_with_an_operator_has_the_columns_of_stability() -> None:
    s = Setting()
    basis = torch.linalg.qr(torch.randn(len(s.theta), 2).double()).Q.T.contiguous()
    subspace = so.FixedSubspace(s.model, basis)
    optimizer = torch.optim.SGD(s.model.parameters(), lr=0.05)
    assert isinstance(subspace.update(), EigenBasis)
    with pytest.raises(so.ArgumentError, match=r"directional_sharpness\(\) of a subspace without"):
        so.Monitor(optimizer, subspace, measures=measures.stability())
    subspace.operator = s.operator  # type: ignore[attr-defined]
    monitor = so.Monitor(optimizer, subspace, measures=[measures.dominant(), *by_products()])
    dense = s.dense(s.x, s.y)
    for t in range(3):
        theta = s.theta
        s.step([optimizer])
        for column, value in expected_row(dense, theta, s.theta).items():
            assert monitor.history[column][t] == pytest.approx(value, rel=1e-8), column
        u = s.theta - theta
        chi = float((basis @ u).norm() / u.norm())
        assert monitor.history["chi_update"][t] == pytest.approx(chi)
        assert monitor.history["critical_multiple"][t] > 0


# Copies.


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


ALL = [
    measures.batch_sharpness(batch_size=3),
    measures.block_sharpness({"first": "0.*"}),
    measures.critical_sharpness(),
    measures.directional_sharpness(by="losses"),
    measures.directional_sharpness(),
    measures.norm_sharpness(),
    measures.thresholds(),
    measures.update(),
]


@pytest.mark.parametrize("measure", ALL, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_the_copy_of_a_measure_is_the_same_measure(measure: measures.Measure, copied: Any) -> None:
    twin = copied(measure)
    assert twin.key == measure.key
    monitor = trained([measure, twin], steps=0)[2]  # the same one twice counts once
    assert [c for c in monitor.history if c in measure.columns] == list(measure.columns)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_the_copy_of_a_monitor_is_its_history_and_is_attached_to_nothing(copied: Any) -> None:
    """Torch copies and pickles no hooks. What goes on, is attached, and takes the state."""
    several = [measures.stability(), Travelled()]
    s, optimizer, monitor = trained(several)
    model, other, twin = copied((s.model, optimizer, monitor))
    assert str(twin.history) == str(monitor.history)
    for one, its in ((s.model, optimizer), (model, other)):
        its.zero_grad()
        nn.functional.mse_loss(one(s.x), s.y).backward()
        its.step()
    assert (len(monitor.history["step"]), len(twin.history["step"])) == (4, 3)
    t, third, resumed = trained(several, steps=0)
    t.model.load_state_dict(model.state_dict())
    resumed.load_state_dict(twin.state_dict())
    t.step([third])
    assert resumed.history["step"] == [0, 1, 2, 3]
    assert resumed.history["travelled"][-1] > twin.history["travelled"][-1]
