"""What is measured for `gur_ari_2018` along trainings of networks, by the sizes of `runs.toml`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import subspace_optim as so
from benchmarks.losses import cross_entropy
from benchmarks.papers.gur_ari_2018.measures import (
    BATCH,
    COARSE,
    DRAWS,
    LR,
    Mode,
    build,
    cheap,
    decrease,
    f_top,
    images,
    mean_overlap,
    of_test,
    overlap_of,
    overlap_within,
    settle,
    whole_hessian,
)
from benchmarks.papers.problems import first_classes
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, column, performance, top_of, train
from subspace_optim.diagnostics import (
    eigenvector_fractions,
    gradient_fraction,
    overlap_matrix,
    subspace_overlap,
)

_SMALL_STEP: Final = 0.01  # of the learning rate, where the loss is nearly linear
_INSIDE: Final = 32  # random vectors of the top subspace, which cost k products for any number
_APART: Final = 1_000_003  # more than the steps of a training


# --- Figures 1-3 and 6-11 ----------------------------------------------------------------------


def evolution(
    job: Job,
    *,
    model: str,
    width: int,
    classes: int,
    dimensions: Sequence[int],
    bases_at: Sequence[int],
    steps: int,
    every: int,
    tol: float,
    f_top_at: Sequence[int] = (),
    largest: bool = True,
    anatomy_at: Sequence[int] = (),
    solved_twice: bool = True,
    start: str = "torch",
    mode: Mode | None = None,
    **part_of: Any,
) -> Raw:
    """Trains by SGD, and follows gradient, top eigenvalue and top subspaces.

    Returns:
        The series, f_top along the way (``f`` at ``f_at``), figures of each basis, and overlaps of
        all bases with all others.
    """
    part = first_classes(images(job, **part_of), classes)
    network = build(job, model, part, width, start)
    problem = Problem(network, cross_entropy, part.x_train, part.y_train)
    hessian, k = whole_hessian(problem, mode), part.num_classes
    tested = of_test(network, part, mode)
    if mode == "eval":
        settle(problem, job.seed)

    def record(step: int) -> Row:
        row: Row = {}
        if step % every == 0:
            row |= {"at": step} | cheap(hessian, tested)
            row["accuracy"] = performance(network, part.x_train, part.y_train)["accuracy"]
            if largest:
                row["largest"] = top_of(hessian, 1, COARSE).largest
        if step in bases_at:
            basis = top_of(hessian, 2 * k, tol)
            row |= {"saved": step, "vectors": basis.vectors.cpu()}
            row |= _of_basis(hessian, basis, k, _random(job, step))
            row["accuracy_there"] = performance(network, part.x_train, part.y_train)["accuracy"]
            row |= {"f_at": step, "f": row["f_top"]}
        elif step in f_top_at:
            row |= {"f_at": step, "f": f_top(hessian, k)}
        return row

    due = {*range(0, steps + 1, every), *bases_at, *f_top_at}.__contains__
    sgd = problem.sgd(LR)
    rows = train(job, "sgd", problem, sgd, steps=steps, batch_size=BATCH, record=record, every=due)
    series = ("at", "loss", "accuracy", "overlap", "overlap_test", "largest", "f_at", "f")
    of_bases = ("saved", "eigenvalues", "fractions", "f_top", "decrease", "accuracy_there")
    of_random = ("random_in_top", "random", "overlap_there")
    saved = dict(zip(column(rows, "saved"), column(rows, "vectors"), strict=True))
    raw: Raw = {"k": k, "parameters": hessian.size}
    raw |= {name: column(rows, name) for name in (*series, *of_bases, *of_random)}
    raw["preserved"] = {str(d): _overlaps(list(saved.values()), 0, d) for d in dimensions}
    raw["next"] = _overlaps(list(saved.values()), k, 2 * k)
    if solved_twice:
        raw["repeat"] = _repeat(hessian, k, tol)
    if anatomy_at:
        raw["anatomy"] = anatomy(hessian.parameters, [(t, saved[t][0]) for t in anatomy_at])
    return raw


def on_each(
    job: Job,
    *,
    model: str,
    width: int,
    datasets: Sequence[str],
    examples: int,
    factor: int,
    steps: int,
    f_top_at: Sequence[int],
    start: str,
) -> Raw:
    """Trains a network by SGD on each of some data, and takes f_top along the way.

    Returns:
        f_top at these steps, and the loss there, for each of the data.
    """
    raw: Raw = {"datasets": list(datasets), "steps": list(f_top_at), "f": [], "loss": []}
    for data in datasets:
        part = images(job, data, examples, factor=factor)
        network = build(job, model, part, width, start)
        problem = Problem(network, cross_entropy, part.x_train, part.y_train)
        hessian, k = whole_hessian(problem), part.num_classes
        rows = train(
            job,
            data,
            problem,
            problem.sgd(LR),
            steps=steps,
            batch_size=BATCH,
            record=functools.partial(_loss_and_f_top, hessian, k),
            every=set(f_top_at).__contains__,
        )
        for name in ("f", "loss"):
            raw[name].append(column(rows, name))
    return raw


def _loss_and_f_top(hessian: so.HessianOperator, k: int, _: int) -> Row:
    return {"loss": hessian.loss(), "f": f_top(hessian, k)}


def _of_basis(
    hessian: so.HessianOperator, basis: so.EigenBasis, k: int, random: torch.Generator
) -> Row:
    """What a basis of 2k pairs says about the gradient, and about random vectors."""
    gradient, top = hessian.gradient(), basis.first(k)
    inside = torch.randn(_INSIDE, k, generator=random)
    anywhere = torch.randn(DRAWS, hessian.size, generator=random).to(basis.device)
    return {
        "eigenvalues": basis.eigenvalues.tolist(),
        "fractions": eigenvector_fractions(gradient, basis).tolist(),
        "f_top": float(gradient_fraction(gradient, top)),
        "decrease": decrease(hessian, top, _SMALL_STEP * LR),
        "overlap_there": overlap_of(hessian),
        "random_in_top": overlap_within(hessian, top, inside),
        "random": mean_overlap(hessian, anywhere),
    }


def _random(job: Job, step: int) -> torch.Generator:
    """Random vectors of their own for each seed and each step."""
    return torch.Generator().manual_seed(job.seed * _APART + step)


def _overlaps(vectors: Sequence[Tensor], start: int, stop: int) -> list[list[float]]:
    """The overlaps of the subspaces of these eigenvectors, each with each (eq. 5)."""
    rows = overlap_matrix([each[start:stop] for each in vectors])
    return [[float(f"{value:.4f}") for value in row] for row in rows.tolist()]


def _repeat(hessian: so.HessianOperator, k: int, tol: float) -> dict[str, float]:
    """The overlap of two solves at one point, from other random starts: 1, but for ``tol``."""
    first, second = (top_of(hessian, 2 * k, tol, seed).vectors for seed in (0, 1))
    return {
        "top": float(subspace_overlap(first[:k], second[:k])),
        "next": float(subspace_overlap(first[k:], second[k:])),
    }


_BINS: Final = (100, 40, 25, 10)


def anatomy(space: so.ParameterSpace, eigenvectors: Sequence[tuple[int, Tensor]]) -> Raw:
    """Tells where in the network the components of the first eigenvector are.

    Its parts are each hidden layer, the weights of the last layer, and its biases. The sign is the
    one with which the largest component is positive.

    Args:
        space: the coordinates; weights and biases of each layer in turn.
        eigenvectors: steps, and the eigenvector there.

    Returns:
        For each step, for each part, the smallest and the largest component of each of some
        bins, the root mean square, and the share of the squared length; for the first and the last
        step all components of the last layer; and cosines to the last step's eigenvector.
    """
    sizes = [p.numel() for p in space.tensors]
    parts = [sum(sizes[i : i + 2]) for i in range(0, len(sizes) - 2, 2)] + sizes[-2:]
    ends = (eigenvectors[0][0], eigenvectors[-1][0])
    raw: Raw = {"steps": [step for step, _ in eigenvectors], "sizes": parts, "head": {}}
    raw |= {"low": [], "high": [], "rms": [], "share": [], "cosine": []}
    for step, eigenvector in eigenvectors:
        vector = eigenvector * eigenvector[eigenvector.abs().argmax()].sign()
        pieces = vector.split(parts)
        bins = [
            np.array_split(np.asarray(piece), min(most, len(piece)))
            for piece, most in zip(pieces, _BINS[-len(pieces) :], strict=True)
        ]
        raw["low"].append([[_short(min(b)) for b in each] for each in bins])
        raw["high"].append([[_short(max(b)) for b in each] for each in bins])
        raw["rms"].append([float(piece.square().mean().sqrt()) for piece in pieces])
        raw["share"].append([float(piece.square().sum()) for piece in pieces])
        raw["cosine"].append(float((vector @ eigenvectors[-1][1]).abs()))
        if step in ends:
            raw["head"][str(step)] = [_short(v) for v in torch.cat(pieces[-2:]).tolist()]
    return raw


def _short(value: float) -> float:
    return float(f"{value:.3g}")


# --- section 4: Newton's method in the top subspace --------------------------------------------


def newton(
    job: Job, *, width: int, warmup: int, steps: int, tol: float = 1e-3, **part_of: Any
) -> Raw:
    """Goes on from one state of SGD: by eq. 11, by gradient descent, and by SGD.

    Returns:
        The loss over all examples before each step and after the last; and f_top there for Newton.
    """
    part = images(job, **part_of)
    network = build(job, "fc", part, width)
    problem = Problem(network, cross_entropy, part.x_train, part.y_train)
    hessian = whole_hessian(problem)
    train(job, "warmup", problem, problem.sgd(LR), steps=warmup, batch_size=BATCH)
    start = copy.deepcopy(problem.model.state_dict())
    raw: Raw = {"k": part.num_classes, "loss": {}}

    def record(newton: bool, _: int) -> Row:
        of_newton = {"f_top": f_top(hessian, part.num_classes, tol)} if newton else {}
        return {"loss": hessian.loss()} | of_newton

    for name in ("newton", "gd", "sgd"):
        network.load_state_dict(start)
        optimizer = problem.sgd(LR)
        if name == "newton":
            subspace = so.DominantSubspace(hessian, part.num_classes, refresh=1, tol=tol)
            optimizer = so.LowRankNewton(network.parameters(), subspace=subspace)
        rows = train(
            job,
            name,
            problem,
            optimizer,
            steps=steps,
            batch_size=BATCH if name == "sgd" else None,
            record=functools.partial(record, name == "newton"),
            first=warmup,
        )
        raw["loss"][name] = column(rows, "loss")
        if name == "newton":
            raw["f_top"] = column(rows, "f_top")
    return raw
