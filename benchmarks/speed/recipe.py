"""The edge-of-stability recipe: how `song_2024` finds eigenvectors, written anew.

SciPy's ``eigsh`` at its defaults (full precision, largest *magnitude*), one double backward pass
from scratch for each product over batches of 1,000, and every vector through the host. SciPy works
in the precision that the operator names: double takes 39 products on the MLP, and is the yardstick
here. The published code names none, and SciPy finds single from its products: about 30.

Reference: Cohen et al. 2021, *Gradient descent on neural networks typically occurs at the edge of
stability*, whose published experiments do it so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from benchmarks.speed.problems import Problem

_BATCH: Final = 1000


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Returns one tensor a parameter, of whatever strides, as one vector ``(P,)``."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def recipe(problem: Problem, k: int, *, single: bool = False) -> tuple[Tensor, Tensor, int]:
    """Returns k eigenpairs of largest magnitude of the Hessian of the mean loss.

    Args:
        problem: at its present parameters.
        k: how many pairs.
        single: SciPy works in single precision, as it does where no dtype is named.

    Returns:
        Eigenvalues ``(k,)`` descending, eigenvectors ``(k, P)`` as rows, products.
    """
    model, x, y, size = problem.model, problem.x, problem.y, problem.size
    parameters = list(model.parameters())
    products = 0

    def product(vector: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal products
        products += 1
        v = torch.tensor(vector.ravel(), dtype=torch.float32, device=x.device)
        total = torch.zeros_like(v)
        for inputs, labels in zip(x.split(_BATCH), y.split(_BATCH), strict=True):
            loss = problem.loss(model(inputs), labels) * (len(inputs) / len(x))
            slopes = torch.autograd.grad(loss, parameters, create_graph=True)
            slope = flat(slopes) @ v
            rows = torch.autograd.grad(slope, parameters, materialize_grads=True)
            total += flat(rows)
        result: NDArray[np.float32] = total.cpu().numpy()
        return result

    dtype = np.float32 if single else np.float64
    values, vectors = eigsh(LinearOperator((size, size), matvec=product, dtype=dtype), k)
    return (
        torch.from_numpy(values[::-1].copy()),
        torch.from_numpy(vectors.T[::-1].copy()),
        products,
    )
