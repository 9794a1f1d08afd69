"""What is measured for Figures 4 and 5 of `gur_ari_2018`, by the sizes of `runs.toml`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import subspace_optim as so
from benchmarks.losses import cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.gur_ari_2018.measures import BATCH, LR, build, images, whole_hessian
from benchmarks.papers.networks import fully_connected, made
from benchmarks.papers.problems import first_classes
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, performance, top_of, train
from subspace_optim.diagnostics import exact_spectrum

_KEPT: Final = 60  # eigenvalues of a whole spectrum


# --- Figure 4: outliers and labels -------------------------------------------------------------


def spectrum(job: Job, *, labels: str, width: int, epochs: int, **part_of: Any) -> Raw:
    """Trains a small network and decomposes its whole Hessian.

    Returns:
        The largest eigenvalues, the smallest, and how many there are in each bin of a histogram.
    """
    raw, hessian = _trained(job, labels, width, epochs, part_of)
    eigenvalues = exact_spectrum(hessian)
    counts, edges = np.histogram(eigenvalues.numpy(), bins=100)
    return raw | {
        "eigenvalues": eigenvalues[:_KEPT].tolist(),
        "smallest": float(eigenvalues[-1]),
        "counts": counts.tolist(),
        "edges": [float(edges[0]), float(edges[-1])],
    }


def leading(
    job: Job, *, labels: str, width: int, epochs: int, pairs: int, tol: float, **part_of: Any
) -> Raw:
    """Trains a small network and takes the largest eigenvalues of its Hessian.

    Returns:
        The eigenvalues, descending.
    """
    raw, hessian = _trained(job, labels, width, epochs, part_of)
    return raw | {"eigenvalues": top_of(hessian, pairs, tol).eigenvalues.tolist()}


def _trained(
    job: Job, labels: str, width: int, epochs: int, part_of: dict[str, Any]
) -> tuple[Raw, so.HessianOperator]:
    """What the training says, and the Hessian at its end."""
    part = images(job, **part_of)
    if labels == "parity":
        part = problems.relabelled(part, torch.arange(part.num_classes) % 2)
    elif labels == "random":
        part = problems.randomly_labelled(part, job)
    elif labels == "five":
        part = first_classes(part, 5)
    x, y = part.x_train, part.y_train
    network = build(job, "fc", part, width)
    steps = epochs * (len(x) // BATCH)
    problem = Problem(network, cross_entropy, x, y)
    train(job, labels, problem, problem.sgd(LR), steps=steps, batch_size=BATCH)
    hessian = whole_hessian(problem)
    raw: Raw = {"labels": labels, "k": part.num_classes, "parameters": hessian.size}
    raw |= {"steps": steps, "loss": hessian.loss()}
    return raw | {"accuracy": performance(network, x, y)["accuracy"]}, hessian


# --- Figure 5: the right edge over realisations ------------------------------------------------


def right_edge(
    job: Job,
    *,
    classes: int,
    dimension: int,
    realisations: int,
    examples: int,
    covariance: float,
    **training: Any,
) -> Raw:
    """Takes the largest eigenvalues of many trainings, each with clusters and start of its own.

    Returns:
        The eigenvalues of each training, descending; and losses and accuracies.
    """
    kind = {"clusters": classes, "dimension": dimension, "examples": examples}
    jobs = _of_each(job, realisations)
    drawn = (problems.blobs(**kind, covariance=covariance, job=own) for own in jobs)
    return _edges([(own, *data) for own, data in zip(jobs, drawn, strict=True)], classes, training)


def right_edge_of_images(
    job: Job, *, realisations: int, data: str, examples: int, factor: int, **training: Any
) -> Raw:
    """Takes the largest eigenvalues of many trainings on the same images.

    Each has a start and minibatches of its own.

    Returns:
        As of clusters.
    """
    part = images(job, data, examples, factor=factor)
    jobs, x, y = _of_each(job, realisations), part.x_train.flatten(1), part.y_train
    return _edges([(own, x, y) for own in jobs], part.num_classes, training)


def _of_each(job: Job, realisations: int) -> list[Job]:
    return [replace(job, seed=job.seed * realisations + i) for i in range(realisations)]


def _edges(
    realisations: list[tuple[Job, Tensor, Tensor]], classes: int, training: dict[str, Any]
) -> Raw:
    raw: Raw = {"k": classes, "eigenvalues": [], "losses": [], "accuracies": []}
    for number, (own, x, y) in enumerate(realisations):
        values, loss, accuracy = _edge(own, f"realisation-{number}", x, y, classes, **training)
        raw["eigenvalues"].append([float(f"{value:.4g}") for value in values])
        raw["losses"].append(loss)
        raw["accuracies"].append(accuracy)
    return raw


def _edge(
    own: Job,
    name: str,
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    width: int,
    steps: int,
    pairs: int,
    tol: float,
) -> tuple[list[float], float, float]:
    """The largest eigenvalues, the loss and the accuracy after a training."""
    network = made(own, lambda: fully_connected((x.shape[1], width, width, classes)))
    problem = Problem(network, cross_entropy, x, y)
    train(own, name, problem, problem.sgd(LR), steps=steps, batch_size=BATCH)
    hessian = problem.hessian()
    values = top_of(hessian, pairs, tol).eigenvalues.tolist()
    return values, hessian.loss(), float(performance(network, x, y)["accuracy"])
