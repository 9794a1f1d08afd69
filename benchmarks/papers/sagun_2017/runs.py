"""What is measured for `sagun_2017`, by the sizes of `runs.toml`.

Spectra of up to 6,000 eigenvalues are exact, as in the paper. All losses are cross-entropies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.losses import cross_entropy
from benchmarks.papers.networks import fully_connected, lenet, made
from benchmarks.papers.problems import blobs, images
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, performance, top_of, train

SHOWN: Final = 30
"""Eigenvalues at each edge, beyond those that are looked for, that a raw figure keeps."""
NEAR_ZERO: Final = 0.01
"""An eigenvalue below this share of the largest is near zero in a plot of the whole spectrum."""
RATIOS: Final = 101
"""Points of a left edge, from the smallest eigenvalue to the median."""

_ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


# --- what several runs share ---------------------------------------------------------------------


def train_until(
    job: Job, name: str, problem: Problem, *, lr: float, target: float, most: int, chunk: int = 100
) -> int:
    """Trains by gradient descent until the loss is ``target``, looked at after each ``chunk``.

    Returns:
        The number of steps, ``most`` or a few more at the most.
    """
    step = 0
    while step < most and problem.loss() > target:
        train(job, f"{name}-{step}", problem, problem.sgd(lr), steps=chunk, first=step)
        step += chunk
    return step


def near_zero(spectrum: Tensor, share: float = NEAR_ZERO) -> int:
    """Returns how many eigenvalues are within that share of the largest from zero."""
    return int((spectrum.abs() <= share * spectrum.abs().max()).sum())


def left_edge(spectrum: Tensor) -> list[float]:
    """Returns the spectrum from its smallest eigenvalue to its median, at equal ratios.

    The point at ratio q is the eigenvalue that the share q of all eigenvalues is below.
    """
    ratios = torch.linspace(0, 0.5, RATIOS, dtype=spectrum.dtype)
    return list(map(float, torch.quantile(spectrum, ratios)))


def edges(largest: Tensor, smallest: Tensor) -> dict[str, Any]:
    """Returns both edges of a spectrum, from the outside, and how many eigenvalues are large."""
    return {
        "right": largest.tolist(),
        "left": smallest.flip(0).tolist(),
        "outliers": so.diagnostics.count_outliers(largest, "elbow").count,
    }


# --- appendix A: clusters ------------------------------------------------------------------------


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
    steps: int,
    lr: float,
) -> Raw:
    """Trains on Gaussian clusters, and counts the outliers of the Hessian (Figures 2, 3, Table 1).

    Returns:
        A row for each covariance and number of clusters.
    """
    rows = []
    for covariance, count in itertools.product(covariances, clusters):
        x, y = blobs(count, examples, inputs, covariance=covariance, job=job)
        sizes = (inputs, hidden, hidden, count)
        model = made(job, partial(fully_connected, sizes, _ACTIVATIONS[activation]))
        problem = Problem(model, cross_entropy, x, y)
        name = f"{covariance:g}-{count}"
        train(job, name, problem, problem.sgd(lr), steps=steps, batch_size=batch_size)
        row = {"covariance": covariance, "clusters": count, "loss": problem.loss()}
        row |= counted(so.diagnostics.exact_spectrum(problem.hessian()), count)
        rows.append(row | {"principal": principal(x, count)})
    algorithm = "GD" if batch_size is None else "SGD"
    return {"algorithm": algorithm, "activation": activation, "rows": rows}


def counted(spectrum: Tensor, clusters: int) -> dict[str, Any]:
    """Returns a row of Table 1, and the top of the scree plot."""
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
        "outlying": float(spectrum[:clusters].mean()),
        "bulk": float(spectrum[2 * clusters :].square().mean().sqrt()),
        "top": top.tolist(),
    }


def principal(x: Tensor, clusters: int) -> list[float]:
    """Returns the largest eigenvalues of the covariance of the inputs, descending."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T.double())).flip(0)
    return list(map(float, eigenvalues[: clusters + SHOWN]))


# --- section 3.2: growth -------------------------------------------------------------------------


def growth(
    job: Job,
    *,
    widths: Sequence[int],
    exact: int,
    lr: float,
    target: float,
    most: int,
    **part_of: Any,
) -> Raw:
    """Trains wider and wider networks on the same data (Figures 1, 4, 5, 6).

    The right edge and the smallest eigenvalue of every network, and the whole spectrum of those
    that are small enough, also at the start.

    Returns:
        A row for each network, its left edge by ratio empty if it is not exact; the spectra of the
        largest that is exact, at both ends.
    """
    part = images(job, **part_of)
    inputs = part.x_train[0].numel()
    networks: list[Row] = []
    whole: Raw = {}
    for width in widths:
        model = made(job, partial(fully_connected, (inputs, width, width, part.num_classes)))
        problem = Problem(model, cross_entropy, part.x_train, part.y_train)
        hessian = problem.hessian()
        row: Row = {"width": width, "size": hessian.size}
        start = so.diagnostics.exact_spectrum(hessian) if hessian.size <= exact else None
        row["steps"] = train_until(job, f"{width}", problem, lr=lr, target=target, most=most)
        row["loss"] = problem.loss()
        if start is not None:
            end = so.diagnostics.exact_spectrum(hessian)
            row |= edges(end[:SHOWN], end[-SHOWN:]) | {"ratios": left_edge(end)}
            whole = {"size": hessian.size, "start": thinned(start), "end": thinned(end)}
        else:
            largest, smallest = so.diagnostics.spectrum_edges(hessian, SHOWN, seed=job.seed)
            # Of the crowded lower edge, this tolerance tells the smallest eigenvalue alone.
            row |= edges(largest.eigenvalues, smallest.eigenvalues[-1:]) | {"ratios": []}
        networks.append(row)
    return {"networks": networks, "whole": whole}


def thinned(spectrum: Tensor) -> dict[str, Any]:
    """Returns a spectrum for a plot: both edges, and each twentieth eigenvalue between them."""
    last = len(spectrum) - 1
    chosen = sorted(
        {*range(min(50, last)), *range(0, last, 20), *range(max(0, last - 50), last + 1)}
    )
    return {
        "index": chosen,
        "eigenvalues": spectrum[chosen].tolist(),
        "near_zero": near_zero(spectrum) / len(spectrum),
    }


# --- section 3.3: batches ------------------------------------------------------------------------


def batches(
    job: Job,
    *,
    widths: Sequence[int],
    large: int,
    small: int,
    steps: int,
    lr: float,
    **part_of: Any,
) -> Raw:
    """Trains a convnet on large and on small batches from one start (Figures 7, 8).

    Returns:
        A row for each batch size, the large first.
    """
    part = images(job, **part_of)
    channels, side = part.x_train.shape[1], part.x_train.shape[-1]
    networks: list[Row] = []
    for size in (large, small):
        model = made(job, partial(lenet, side, channels, widths, (10,), padding=2))
        problem = Problem(model, cross_entropy, part.x_train, part.y_train)
        train(job, f"{size}", problem, problem.sgd(lr), steps=steps, batch_size=size)
        hessian = problem.hessian()
        row = {"batch_size": size, "size": hessian.size, "loss": problem.loss()}
        spectrum = so.diagnostics.exact_spectrum(hessian)
        networks.append(row | edges(spectrum[:SHOWN], spectrum[-SHOWN:]))
    return {"networks": networks}


# --- section 4.1: one basin ----------------------------------------------------------------------


def phases(
    job: Job,
    *,
    widths: Sequence[int],
    dense: Sequence[int],
    large: int,
    small: int,
    steps: int,
    every: int,
    lr: float,
    **part_of: Any,
) -> Raw:
    """Trains on large and then on small batches, and looks along the line (Figures 9, 10).

    Returns:
        ``training``: losses and accuracies by step; ``switch``: the step where the batches change;
        ``line``: the same by α, with 0 the end of the first part and 1 that of the second.
    """
    part = images(job, **part_of)
    channels, side = part.x_train.shape[1], part.x_train.shape[-1]
    model = made(job, partial(lenet, side, channels, widths, (*dense, 10), padding=2))
    problem = Problem(model, cross_entropy, part.x_train, part.y_train)
    optimizer = problem.sgd(lr)
    rows: list[Row] = []
    ends: list[Tensor] = []
    for number, size in enumerate((large, small)):
        rows += train(
            job,
            f"part-{number + 1}",
            problem,
            optimizer,
            steps=steps,
            batch_size=size,
            record=lambda _: on_both(model, part),
            every=every,
            first=number * steps,
        )
        ends.append(problem.theta())
    line = []
    for alpha in torch.linspace(-0.5, 1.5, 41).tolist():
        vector_to_parameters(torch.lerp(ends[0], ends[1], alpha), model.parameters())
        line.append({"alpha": round(alpha, 3)} | on_both(model, part))
    return {"training": rows, "switch": steps, "line": line}


def on_both(model: nn.Module, data: Dataset) -> Row:
    """Returns loss and accuracy on training and test data."""
    row: Row = {}
    for name, part in (("train", (data.x_train, data.y_train)), ("test", data.test)):
        if part is not None:
            row |= {f"{name}_{what}": value for what, value in performance(model, *part).items()}
    return row


# --- section 2: the two parts of the Hessian -----------------------------------------------------


def parts(
    job: Job,
    *,
    data: str | None,
    examples: int,
    hidden: int,
    at: Sequence[int],
    lr: float,
    tol: float = 1e-2,
    pool: int = 1,
) -> Raw:
    """Splits the Hessian along gradient descent: its Gauss-Newton matrix, and the rest.

    Returns:
        A row for each step.
    """
    if data is None:
        x, y = blobs(10, examples, 100, covariance=1.0, job=job)
    else:
        part = images(job, data, examples, pool=pool)
        x, y = part.x_train, part.y_train
    model = made(job, partial(fully_connected, (x[0].numel(), hidden, hidden, 10)))
    problem = Problem(model, cross_entropy, x, y)
    hessian = problem.hessian()
    gauss_newton = so.GaussNewtonOperator(model, cross_entropy, (x, y))
    residual = so.ResidualOperator(hessian, gauss_newton)

    def record(_: int) -> Row:
        largest, smallest = so.diagnostics.spectrum_edges(residual, 1, tol=tol, seed=job.seed)
        return {
            "loss": hessian.loss(),
            "hessian": top_of(hessian, 15, tol, job.seed).eigenvalues.tolist(),
            "gauss_newton": top_of(gauss_newton, 15, tol, job.seed).eigenvalues.tolist(),
            "residual": [largest.largest, float(smallest.eigenvalues[-1])],
        }

    sgd, due = problem.sgd(lr), set(at).__contains__
    rows = train(job, "parts", problem, sgd, steps=max(at), record=record, every=due)
    return {"size": hessian.size, "rows": rows}


# --- section 2.1: trivial eigenvalues ------------------------------------------------------------


def trivial(
    job: Job, *, examples: Sequence[int], hidden: int, steps: int, lr: float, **part_of: Any
) -> Raw:
    """Counts the zeros of both matrices where there are more parameters than outputs.

    All of it in float64, where a zero is told from a small number.

    Returns:
        A row for each number of examples, before and after training.
    """
    rows = []
    for count in examples:
        part = images(job, examples=count, **part_of)
        x, y = part.x_train.double(), part.y_train
        sizes = (x[0].numel(), hidden, hidden, part.num_classes)
        model = made(job, partial(fully_connected, sizes)).double()
        problem = Problem(model, cross_entropy, x, y)
        for trained in (False, True):
            if trained:
                train(job, f"{count}", problem, problem.sgd(lr), steps=steps)
            hessian = problem.hessian()
            gauss_newton = so.GaussNewtonOperator(model, cross_entropy, (x, y))
            rows.append(
                {
                    "examples": count,
                    "trained": trained,
                    "size": hessian.size,
                    "bound": so.diagnostics.trivial_eigenvalues(hessian.size, count, sizes[-1]),
                    "loss": hessian.loss(),
                    "zeros": near_zero(so.diagnostics.exact_spectrum(gauss_newton), 1e-12),
                    "hessian": near_zero(so.diagnostics.exact_spectrum(hessian), 1e-3),
                }
            )
    return {"rows": rows}
