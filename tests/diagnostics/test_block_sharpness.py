"""The sharpness of blocks against the dense blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim._validation import ArgumentError
from subspace_optim.diagnostics import block_diagonal_share, block_sharpness
from subspace_optim.diagnostics.block_sharpness import blocks_of
from tests.dense import Problem, make_problem, problems


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


def rows_of(space: so.HessianOperator, names: list[str]) -> Tensor:
    """The coordinates of parameters, counted one by one."""
    owners = [
        name
        for name, shape in zip(space.parameters.names, space.parameters.shapes, strict=True)
        for _ in range(shape.numel())
    ]
    return torch.tensor([owner in names for owner in owners])


@given(problems(), st.integers(0, 5))
def test_blocks_of_models_against_dense_ones(problem: Problem, seed: int) -> None:
    """``*`` gives one block for each layer, ``*.*`` one for each parameter; none is above λ_1."""
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    dense = problem.dense().hessian
    scale = float(dense.abs().max())
    layers = {name.split(".")[0] for name in operator.parameters.names}
    found = block_sharpness(operator, "*", tol=1e-6, seed=seed)
    assert set(found) == layers
    for layer, value in found.items():
        inside = rows_of(operator, [n for n in operator.parameters.names if n.startswith(layer)])
        exact = largest(dense[inside][:, inside])
        assert value == pytest.approx(exact, rel=1e-4, abs=1e-8 * scale)
        assert value <= largest(dense) + 1e-4 * scale
    each = block_sharpness(operator, "*.*", tol=1e-6, seed=seed)
    assert list(each) == operator.parameters.names
    for name, value in each.items():
        inside = rows_of(operator, [name])
        exact = largest(dense[inside][:, inside])
        assert value == pytest.approx(exact, rel=1e-4, abs=1e-8 * scale)


@given(problems())
@pytest.mark.slow
def test_the_share_is_that_of_the_block_diagonal_matrix(problem: Problem) -> None:
    operator = so.GaussNewtonOperator(problem.model, problem.loss_fn, problem.batches)
    dense = operator.matmat(torch.eye(operator.size, dtype=torch.float64))
    found = block_sharpness(operator, "*", tol=1e-6)
    blocked = torch.zeros_like(dense)
    for name in found:
        inside = rows_of(operator, [n for n in operator.parameters.names if n.startswith(name)])
        both = inside[:, None] & inside
        blocked[both] = dense[both]
    share = block_diagonal_share(found, largest(dense))
    assert share == pytest.approx(largest(blocked) / largest(dense), rel=1e-4)
    assert 1 / len(found) - 1e-4 <= share <= 1 + 1e-4


def test_a_mapping_names_its_blocks_which_may_overlap_and_be_scattered() -> None:
    problem = make_problem("mlp", seed=3)
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    dense = problem.dense().hessian
    blocks = {"biases": "*.bias", "ends": ["0", "4.*"], "first": ("0",), "all": "*"}
    found = block_sharpness(operator, blocks, tol=1e-6)
    assert list(found) == list(blocks)
    names = operator.parameters.names
    members = {
        "biases": [n for n in names if n.endswith("bias")],
        "ends": [n for n in names if n[0] in "04"],
        "first": [n for n in names if n[0] == "0"],
        "all": names,
    }
    for name, value in found.items():
        inside = rows_of(operator, members[name])
        assert value == pytest.approx(largest(dense[inside][:, inside]), rel=1e-5)


def test_which_parameters_a_pattern_has() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.Linear(1, 1), nn.Linear(1, 2)

    model = nn.ModuleDict({"h": nn.ModuleList(Layer() for _ in range(11)), "head": Layer()})
    space = so.HessianOperator(model, nn.MSELoss(), (torch.ones(1, 1), torch.ones(1, 1))).parameters
    layers = blocks_of(space, "h.*")
    assert list(layers) == [f"h.{i}" for i in range(11)]  # h.1 has nothing of h.10
    assert layers["h.1"] == [slice(6, 7), slice(7, 8), slice(8, 10), slice(10, 12)]
    assert list(blocks_of(space, "h.1*.mlp")) == ["h.1.mlp", "h.10.mlp"]
    assert blocks_of(space, "h") == {"h": [part for parts in layers.values() for part in parts]}
    assert blocks_of(space, {"one": "h.1"})["one"] == layers["h.1"]
    assert len(blocks_of(space, {"attention": "*.attn.*"})["attention"]) == 24
    several = {
        "predicate": lambda name, p: p.dim() == 1 and name.startswith("h.1."),
        "tensors": list(model["head"].mlp.parameters()),
        "both": ["h.1.mlp.bias", "h.1.attn.bias"],
    }
    found = blocks_of(space, several)
    assert found["predicate"] == found["both"] == [slice(7, 8), slice(10, 12)]
    assert found["tensors"] == [slice(68, 70), slice(70, 72)]


def test_float32_and_the_cost() -> None:
    problem = make_problem("mlp", sizes=[20], dtype=torch.float32, seed=3)
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    dense = problem.dense().hessian
    found = block_sharpness(operator, "0")
    assert found["0"] == pytest.approx(largest(dense[:16, :16]), rel=1e-3)
    assert operator.stats.gradients == 1
    assert operator.stats.products <= 16 + 2  # of a block of 16 no more are needed


def test_the_share_at_its_ends() -> None:
    assert block_diagonal_share({"a": 1.0, "b": 3.0}, 4.0) == 0.75
    assert math.isnan(block_diagonal_share({"a": -1.0}, 0.0))
    with pytest.raises(ArgumentError, match="at least one block"):
        block_diagonal_share({}, 1.0)


def test_refusals() -> None:
    problem = make_problem()
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    for blocks, name in (("h.*", "blocks is 'h"), ({"a": "0", "b": ["h"]}, r"blocks\['b'\]")):
        with pytest.raises(ArgumentError, match=rf"{name}.*names such as '0.weight'"):
            block_sharpness(operator, blocks)
    with pytest.raises(ArgumentError, match=r"blocks\['a'\] is '0.wieght', .* mean '0.weight'\?"):
        block_sharpness(operator, {"a": "0.wieght"})
    strange = {"a": [*problem.model.parameters(), torch.nn.Parameter(torch.ones(1))]}
    with pytest.raises(ArgumentError, match=r"blocks\['a'\] .* of which the operator has"):
        block_sharpness(operator, strange)
    with pytest.raises(ArgumentError, match=r"blocks\['a'\] is .of 0 .* names such as '0.weight'"):
        block_sharpness(operator, {"a": lambda *_: False})
    with pytest.raises(ArgumentError, match="blocks"):
        block_sharpness(operator, {})
    with pytest.raises(ArgumentError, match="tol"):
        block_sharpness(operator, "*", tol=-1.0)
