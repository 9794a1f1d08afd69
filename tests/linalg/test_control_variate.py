"""``ControlVariate`` against its formula on dense matrices."""

from __future__ import annotations

import pytest
import torch

from subspace_optim.linalg.control_variate import ControlVariate
from tests.linalg.test_sampling_error import orthonormal, symmetric


@pytest.mark.parametrize("j", [1, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_on_the_rows_and_leaves_the_complement_to_the_cheap_matrix(j, seed):
    cheap, dear, rows = symmetric(12, seed), symmetric(12, seed + 50), orthonormal(j, 12, seed)
    corrected = ControlVariate(lambda v: v @ cheap, rows, rows @ (cheap - dear))
    matrix = corrected(torch.eye(12, dtype=torch.float64))
    inside = rows.T @ rows
    outside = torch.eye(12, dtype=torch.float64) - inside

    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(rows @ matrix, rows @ dear)
    torch.testing.assert_close(outside @ matrix @ outside, outside @ cheap @ outside)


def test_an_invariant_subspace_of_the_dear_matrix_is_one_of_the_corrected():
    dear = symmetric(12, 0)
    top = torch.linalg.eigh(dear).eigenvectors.T[-3:].contiguous()
    cheap = symmetric(12, 1)
    corrected = ControlVariate(lambda v: v @ cheap, top, top @ (cheap - dear))
    products = corrected(top)
    torch.testing.assert_close(products - products @ top.T @ top, torch.zeros_like(products))


def test_products_are_new_tensors_and_the_rows_stay():
    cheap, rows = symmetric(6, 0), orthonormal(2, 6, 0)
    offset = rows @ cheap
    before = rows.clone(), offset.clone()
    v = torch.ones(1, 6, dtype=torch.float64)
    ControlVariate(lambda v: v @ cheap, rows, offset)(v)
    assert torch.equal(rows, before[0])
    assert torch.equal(offset, before[1])
    assert torch.equal(v, torch.ones_like(v))
