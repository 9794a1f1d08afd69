"""What is measured for `sagun_2017`, by the sizes of `runs.toml`.

Spectra of up to 6,000 eigenvalues are exact, as in the paper. All losses are cross-entropies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.losses import cross_entropy
from benchmarks.papers.networks import fully_connected, lenet, made
from benchmarks.papers.problems import blobs, first_classes, images
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, performance, top_of, train

SHOWN: Final = 30
"""Eigenvalues at each edge, beyond those that are looked for, that a raw figure keeps."""
NEAR_ZERO: Final = 0.01
"""An eigenvalue below this share of the largest is near zero in a plot of the whole spectrum."""
ROUNDING: Final = 1e-6
"""A negative eigenvalue within this share of the largest may be rounding."""
RATIOS: Final = 101
"""Points of a left edge, from the smallest eigenvalue to the median."""
_OTHER: Final = 1000
"""Added to the seed for other initial parameters on the same data."""


# --- what several runs share ---------------------------------------------------------------------


def train_until(
    job: Job,
    name: str,
    problem: Problem,
    reached: Callable[[], bool],
    *,
    lr: float,
    most: int,
    batch_size: int | None = None,
    chunk: int = 100,
    growth: float = 0.0,
) -> int:
    """Trains until something is reached, looked at after each chunk.

    Args:
        job: see ``train``.
        name: of the training.
        problem: its model is trained.
        reached: asked at θ_t whether that is the end.
        lr: learning rate.
        most: steps after which the training ends anyway, or a chunk later.
        batch_size: ``None``: all examples at each step.
        chunk: steps, at least.
        growth: a chunk is that share of the steps so far, where they are more.

    Returns:
        The number of steps.
    """
    step = 0
    while not reached() and step < most:
        taken = max(chunk, round(growth * step))
        sgd = problem.sgd(lr)
        train(job, f"{name}-{step}", problem, sgd, steps=taken, batch_size=batch_size, first=step)
        step += taken
    return step


def below(problem: Problem, loss: float) -> bool:
    """Returns whether the loss is at or below that."""
    return problem.loss() <= loss


def near_zero(spectrum: Tensor, share: float = NEAR_ZERO, of: float | None = None) -> int:
    """Returns how many eigenvalues are within a share of a number, or of the largest, from zero."""
    scale = spectrum.abs().max() if of is None else of
    return int((spectrum.abs() <= share * scale).sum())


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


# --- section 3.2: growth -------------------------------------------------------------------------


def growth(
    job: Job,
    *,
    widths: Sequence[int],
    exact: int,
    other: int,
    lr: float,
    target: float,
    most: int,
    **part_of: Any,
) -> Raw:
    """Trains wider and wider networks on the same data (Figures 1, 4, 5, 6), and one on other data.

    The right edge and the smallest eigenvalue of every network, and the whole spectrum of those
    that are small enough, of the last of these also at the start.

    Args:
        job: the seed.
        widths: of the networks, ascending.
        exact: the largest width of which the whole spectrum is taken.
        other: the widest network is trained once more, on the examples of so many classes alone.
        lr: learning rate.
        target: the loss at which a training ends.
        most: steps after which it ends anyway.
        part_of: the data.

    Returns:
        A row for each network, its left edge by ratio empty if it is not exact; the spectra of the
        largest that is exact, at both ends; and the right edge on the other data.
    """
    part = images(job, **part_of)

    def problem_of(width: int, data: Dataset) -> Problem:
        sizes = (data.x_train[0].numel(), width, width, part.num_classes)
        model = made(job, partial(fully_connected, sizes))
        return Problem(model, cross_entropy, data.x_train, data.y_train)

    def trained(name: str, problem: Problem) -> Row:
        reached = partial(below, problem, target)
        steps = train_until(job, name, problem, reached, lr=lr, most=most)
        return {"size": problem.hessian().size, "steps": steps, "loss": problem.loss()}

    networks: list[Row] = []
    whole: Raw = {}
    for width in widths:
        problem = problem_of(width, part)
        hessian = problem.hessian()
        if width == exact:
            whole["start"] = so.diagnostics.exact_spectrum(hessian)
        row: Row = {"width": width} | trained(f"{width}", problem)
        if width <= exact:
            end = so.diagnostics.exact_spectrum(hessian)
            row |= edges(end[:SHOWN], end[-SHOWN:]) | {"ratios": left_edge(end)}
            row |= {"negative": int((end < -ROUNDING * end[0]).sum()) / len(end)}
            if width == exact:
                scale = float(end[0])
                whole |= {"start": thinned(whole["start"], scale), "end": thinned(end, scale)}
                whole["size"] = hessian.size
        else:
            largest, smallest = so.diagnostics.spectrum_edges(hessian, SHOWN, seed=job.seed)
            # Of the crowded lower edge, this tolerance tells the smallest eigenvalue alone.
            row |= edges(largest.eigenvalues, smallest.eigenvalues[-1:]) | {"ratios": []}
        networks.append(row)
    problem = problem_of(widths[-1], first_classes(part, other))
    elsewhere = trained("other", problem)
    right = top_of(problem.hessian(), SHOWN, 1e-3, job.seed).eigenvalues.tolist()
    elsewhere |= {"classes": other, "right": right}
    return {"networks": networks, "whole": whole, "other": elsewhere}


def thinned(spectrum: Tensor, trained: float) -> dict[str, Any]:
    """Returns a spectrum for a plot: both edges, and each twentieth eigenvalue between them.

    Args:
        spectrum: all of it, descending.
        trained: the largest eigenvalue after training, a second measure of what is near zero.
    """
    last = len(spectrum) - 1
    chosen = sorted(
        {*range(min(50, last)), *range(0, last, 20), *range(max(0, last - 50), last + 1)}
    )
    return {
        "index": chosen,
        "eigenvalues": spectrum[chosen].tolist(),
        "near_zero": near_zero(spectrum, of=trained) / len(spectrum),
        "near_zero_of_own": near_zero(spectrum) / len(spectrum),
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
        ``line``: the same by α, with 0 the end of the first part and 1 that of the second;
        ``other``: the same on the way from the end of the first part to that of one which started
        at other parameters: a line that may well have a barrier.
    """
    part = images(job, **part_of)
    channels, side = part.x_train.shape[1], part.x_train.shape[-1]

    def problem_of(drawn_by: Job) -> Problem:
        model = made(drawn_by, partial(lenet, side, channels, widths, (*dense, 10), padding=2))
        return Problem(model, cross_entropy, part.x_train, part.y_train)

    problem, other = problem_of(job), problem_of(replace(job, seed=job.seed + _OTHER))
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
            record=lambda _: on_both(problem.model, part),
            every=every,
            first=number * steps,
        )
        ends.append(problem.theta())
    train(job, "other", other, other.sgd(lr), steps=steps, batch_size=large)
    lines = [
        ((ends[0], ends[1]), torch.linspace(-0.5, 1.5, 41)),
        ((ends[0], other.theta()), torch.linspace(0, 1, 11)),
    ]
    along, elsewhere = (
        [_at(problem.model, part, torch.lerp(*between, alpha), alpha) for alpha in alphas.tolist()]
        for between, alphas in lines
    )
    return {"training": rows, "switch": steps, "line": along, "other": elsewhere}


def _at(model: nn.Module, data: Dataset, theta: Tensor, alpha: float) -> Row:
    """A point of a line."""
    vector_to_parameters(theta, model.parameters())
    return {"alpha": round(alpha, 3)} | on_both(model, data)


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
