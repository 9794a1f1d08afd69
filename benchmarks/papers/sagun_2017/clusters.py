"""What is measured on Gaussian clusters for `sagun_2017`: Figures 2 and 3, and Table 1."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.losses import cross_entropy
from benchmarks.papers.networks import fully_connected, made
from benchmarks.papers.problems import blobs
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.sagun_2017.runs import SHOWN, below, train_until
from benchmarks.papers.training import Problem, Row

_ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {"tanh": nn.Tanh, "relu": nn.ReLU}

Place = tuple[str, str, float, int]
"""Of a row of Table 1: algorithm, activation, covariance and clusters."""
TABLE: Final[dict[Place, Raw]] = {
    (row["algorithm"], row["activation"], row["covariance"], row["clusters"]): row
    for row in tomllib.loads(Path(__file__).with_name("table-1.toml").read_text("utf-8"))["rows"]
}
"""The table as it is printed."""


def clusters(
    job: Job,
    *,
    activation: str,
    batch_size: int | None,
    covariances: Sequence[float],
    clusters: Sequence[int],
    examples: int,
    inputs: int,
    hidden: int,
    most: int,
    lr: float,
    loss: float | None,
    classes: int | None = None,
    between: float | None = None,
    across: float | None = None,
) -> Raw:
    """Trains on Gaussian clusters, and counts the outliers of the Hessian (Figures 2, 3, Table 1).

    Args:
        job: the seed.
        activation: ``"relu"`` or ``"tanh"``.
        batch_size: ``None``: gradient descent.
        covariances: of the clusters, a row for each and ...
        clusters: ... each number of clusters.
        examples: of all clusters together.
        inputs: their dimension.
        hidden: units of both hidden layers.
        most: steps after which a training ends anyway, or a tenth more.
        lr: learning rate.
        loss: at which a training ends; ``None``: where the mean eigenvalue is the printed one.
        classes: cluster c is of class c modulo so many; ``None``: each is a class.
        between: in the span of the centres the covariance is always that.
        across: across that span it is always that.

    Returns:
        A row for each covariance and number of clusters.
    """
    algorithm = "GD" if batch_size is None else "SGD"
    rows = []
    for covariance, count in itertools.product(covariances, clusters):
        scales = (covariance, between) if across is None else (across, covariance)
        x, y = blobs(count, examples, inputs, covariance=scales[0], between=scales[1], job=job)
        outputs = classes or count
        sizes = (inputs, hidden, hidden, outputs)
        model = made(job, partial(fully_connected, sizes, _ACTIVATIONS[activation]))
        problem = Problem(model, cross_entropy, x, y % outputs)
        if loss is None:
            printed = TABLE[algorithm, activation, covariance, count]["mean"]
            reached = fallen_to(printed, partial(mean_eigenvalue, problem, job.seed))
        else:
            reached = partial(below, problem, loss)
        name = f"{covariance:g}-{count}"
        steps = train_until(
            job, name, problem, reached, lr=lr, most=most, batch_size=batch_size, growth=0.1
        )
        row = {"covariance": covariance, "clusters": count, "classes": outputs, "steps": steps}
        # With other clusters of the same classes the network is the same, and so is its bulk.
        past = 2 * (count if classes is None else max(clusters))
        spectrum = so.diagnostics.exact_spectrum(problem.hessian())
        row |= {"loss": problem.loss()} | counted(spectrum, count, outputs, past)
        rows.append(row | {"principal": principal(x, count)})
    return {"algorithm": algorithm, "activation": activation, "rows": rows}


def mean_eigenvalue(problem: Problem, seed: int) -> float:
    """Returns the mean eigenvalue of the Hessian, estimated."""
    hessian = problem.hessian()
    return so.diagnostics.trace(hessian, seed=seed).value / hessian.size


def fallen_to(level: float, measure: Callable[[], float]) -> Callable[[], bool]:
    """Returns a function that tells whether a number is at or below a level, and was above it."""
    above = False

    def fallen() -> bool:
        nonlocal above
        value = measure()
        was, above = above, above or value > level
        return was and value <= level

    return fallen


def counted(spectrum: Tensor, clusters: int, outliers: int, past: int) -> Row:
    """Returns a row of Table 1, and the top of the scree plot.

    Args:
        spectrum: all of it, descending.
        clusters: up to so many are looked for, and ``SHOWN`` more.
        outliers: as many as the classes.
        past: the bulk begins after so many.
    """
    top = spectrum[: clusters + SHOWN]
    elbow = so.diagnostics.count_outliers(top, "elbow")
    return {
        "size": len(spectrum),
        "mean": float(spectrum.mean()),
        "std": float(spectrum.std(correction=0)),
        "gap": so.diagnostics.count_outliers(top, "gap").count,
        "ratio": so.diagnostics.count_outliers(top, "ratio").count,
        "elbow": elbow.count,
        "cutoff": elbow.cutoff,
        "outlying": float(spectrum[:outliers].mean()),
        "bulk": float(spectrum[past:].square().mean().sqrt()),
        "top": top.tolist(),
    }


def principal(x: Tensor, clusters: int) -> list[float]:
    """Returns the largest eigenvalues of the covariance of the inputs, descending."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T.double())).flip(0)
    return list(map(float, eigenvalues[: clusters + SHOWN]))
