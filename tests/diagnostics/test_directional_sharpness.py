"""The curvature along a direction, against dense float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import subspace_optim as so
from tests.dense import DTYPES, make_problem, probes, problems

directional_sharpness = so.diagnostics.directional_sharpness


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_it_is_the_rayleigh_quotient_of_the_dense_hessian(dtype: str, data: st.DataObject) -> None:
    problem = data.draw(problems(DTYPES[dtype]))
    dense = problem.dense()
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches, verify=False)
    atol = (1e-5 if dtype == "float32" else 1e-11) * float(dense.hessian.norm())
    for d in (dense.gradient, *probes(operator.size, count=2)):
        found = directional_sharpness(operator, d.to(DTYPES[dtype]))
        assert found.dtype == torch.float64
        assert found.dim() == 0
        assert float(found) == pytest.approx(float(d @ dense.hessian @ d / (d @ d)), abs=atol)
        # Its length does not count, also where a square of it is no number of float32.
        for length in (1e-3, -1e3, 1e-25):
            scaled = directional_sharpness(operator, (length * d).to(DTYPES[dtype]))
            assert float(scaled) == pytest.approx(float(found), abs=atol)


def test_along_an_eigenvector_it_is_the_eigenvalue_and_of_no_direction_nan() -> None:
    problem = make_problem()
    operator = so.HessianOperator(problem.model, problem.loss_fn, problem.batches, verify=False)
    values, vectors = torch.linalg.eigh(problem.dense().hessian)
    for i in (0, -1):
        found = directional_sharpness(operator, vectors[:, i].contiguous())
        assert float(found) == pytest.approx(float(values[i]), abs=1e-10)
    assert directional_sharpness(operator, torch.zeros_like(vectors[0])).isnan()
    with pytest.raises(so.ArgumentError, match=r"^the shape of direction is \(3,\), but must be "):
        directional_sharpness(operator, torch.zeros(3))
