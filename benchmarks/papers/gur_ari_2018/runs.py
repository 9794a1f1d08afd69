"""What is measured for `gur_ari_2018` along trainings of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.losses import cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.gur_ari_2018.measures import (
    Loss,
    accuracy_of,
    build,
    column,
    decrease,
    first_classes,
    half_square,
    hessian_of,
    images,
    mean_overlap,
    overlap_of,
    top_of,
)
from benchmarks.papers.networks import fully_connected, made
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Row, train
from subspace_optim.diagnostics import (
    eigenvector_fractions,
    exact_spectrum,
    gradient_fraction,
    overlap_matrix,
    subspace_overlap,
)

_DRAWS: Final = 8  # random vectors for a mean overlap
_SMALL_STEP: Final = 0.1  # of the learning rate, where the loss is nearly linear
_COARSE: Final = 1e-2  # enough for f_top and the largest eigenvalue


# --- Figures 1-3 and 6-11 ----------------------------------------------------------------------


def evolution(
    job: Job,
    *,
    data: str,
    model: str,
    width: int,
    classes: int,
    examples: int,
    test: int,
    factor: int,
    dimensions: Sequence[int],
    bases_at: Sequence[int],
    steps: int,
    every: int,
    tol: float,
    anatomy_at: Sequence[int] = (),
    lr: float = 0.1,
    batch_size: int = 64,
) -> Raw:
    """Trains by SGD, and follows gradient, top eigenvalue and top subspaces.

    Args:
        job: the seed.
        data: name of a data set.
        model: as of ``build``.
        width: as of ``build``.
        classes: the first so many of the data set; k.
        examples: for training, of all classes; the Hessian is that of all that are kept.
        test: for testing.
        factor: of pooling.
        dimensions: of the top subspaces whose evolution is followed, up to 2k.
        bases_at: steps at which 2k eigenpairs are solved for.
        steps: of training.
        every: so many steps the cheap figures are taken.
        tol: of the eigenpairs.
        anatomy_at: steps of ``bases_at`` at which the first eigenvector is kept.
        lr: η.
        batch_size: of SGD.

    Returns:
        The series, figures of each basis, and overlaps of all bases with all others.
    """
    part = first_classes(images(job, data, examples, test, factor), classes)
    network = build(job, model, part, width)
    hessian = hessian_of(network, cross_entropy, part.x_train, part.y_train)
    tested = None
    if part.x_test is not None and part.y_test is not None:
        tested = hessian_of(network, cross_entropy, part.x_test, part.y_test)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    k = part.num_classes

    def record(step: int) -> Row:
        row: Row = {}
        if step % every == 0:
            row["at"] = step
            row["loss"] = hessian.loss()
            row["accuracy"] = accuracy_of(network, part.x_train, part.y_train)
            row["overlap"] = overlap_of(hessian)
            row["overlap_test"] = math.nan if tested is None else overlap_of(tested)
            row["largest"] = top_of(hessian, 1, _COARSE).largest
        if step in bases_at:
            basis = top_of(hessian, 2 * k, tol)
            row |= {"saved": step, "vectors": basis.vectors.cpu()}
            row |= _of_basis(hessian, basis, k, lr, torch.Generator().manual_seed(step))
        return row

    rows = train(
        job,
        "sgd",
        network,
        cross_entropy,
        (part.x_train, part.y_train),
        optimizer,
        steps=steps,
        batch_size=batch_size,
        record=record,
        every=lambda step: step % every == 0 or step in bases_at,
    )
    series = ("at", "loss", "accuracy", "overlap", "overlap_test", "largest")
    of_bases = ("saved", "eigenvalues", "fractions", "f_top", "decrease")
    of_random = ("random_in_top", "random", "overlap_there")
    saved = dict(zip(column(rows, "saved"), column(rows, "vectors"), strict=True))
    raw: Raw = {"k": k, "parameters": hessian.size}
    raw |= {name: column(rows, name) for name in (*series, *of_bases, *of_random)}
    raw["preserved"] = {str(d): _overlaps(list(saved.values()), 0, d) for d in dimensions}
    raw["next"] = _overlaps(list(saved.values()), k, 2 * k)
    raw["repeat"] = _repeat(hessian, k, tol)
    if anatomy_at:
        raw["anatomy"] = anatomy(hessian.parameters, [(t, saved[t][0]) for t in anatomy_at])
    return raw


def _of_basis(
    hessian: so.HessianOperator, basis: so.EigenBasis, k: int, lr: float, random: torch.Generator
) -> Row:
    """What a basis of 2k pairs says about the gradient, and about random vectors."""
    gradient, top = hessian.gradient(), basis.first(k)
    inside = torch.randn(_DRAWS, k, generator=random).to(basis.device) @ top.vectors
    anywhere = torch.randn(_DRAWS, hessian.size, generator=random).to(basis.device)
    return {
        "eigenvalues": basis.eigenvalues.tolist(),
        "fractions": eigenvector_fractions(gradient, basis).tolist(),
        "f_top": float(gradient_fraction(gradient, top)),
        "decrease": decrease(hessian, top, _SMALL_STEP * lr),
        "overlap_there": overlap_of(hessian),
        "random_in_top": mean_overlap(hessian, inside),
        "random": mean_overlap(hessian, anywhere),
    }


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


# --- Table 1 and Figure 12 ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row of Table 1.

    Attributes:
        dataset: as the table has it.
        network: as the table has it.
        comment: as the table has it.
        paper: its mean overlap.
        model: as of ``build``.
        random_labels: whether the labels of the training data are permuted.
        lr: η.
        batch_size: of the minibatches.
        adam: in the place of SGD.
    """

    dataset: str
    network: str
    comment: str
    paper: float
    model: str = "fc"
    random_labels: bool = False
    lr: float = 0.1
    batch_size: int = 64
    adam: bool = False


CASES: Final = {
    "softmax": Case("MNIST", "Softmax", "", 0.96, model="softmax"),
    "fc-softplus": Case("MNIST", "FC", "Softplus activation", 0.96, model="fc-softplus"),
    "fc-slow": Case("MNIST", "FC", "η = 0.01", 0.96, lr=0.01),
    "fc-batch-256": Case("MNIST", "FC", "Batch size 256", 0.97, batch_size=256),
    "fc-random": Case("MNIST", "FC", "Random labels", 0.86, random_labels=True),
    "convnet-random": Case(
        "CIFAR10", "ConvNet", "Random labels", 0.86, model="convnet", random_labels=True
    ),
    "convnet-dropout": Case(
        "CIFAR10",
        "ConvNet",
        "Dropout, batch-norm, extra dense layer",
        0.93,
        model="convnet-dropout",
    ),
    "convnet-adam": Case(
        "CIFAR10", "ConvNet", "Optimized using Adam", 0.89, model="convnet", adam=True, lr=1e-3
    ),
    "regression": Case("Regression", "FC", "Batch size 100", 0.99, batch_size=100),
}
"""The rows of Table 1, by the names of their runs."""


def table_row(
    job: Job,
    *,
    case: str,
    data: str,
    width: int,
    examples: int,
    test: int,
    factor: int,
    steps: int,
    last: int,
    every: int,
    f_top_at: Sequence[int] = (),
) -> Raw:
    """Measures a row of Table 1, and f_top along the way (Figure 12).

    Args:
        job: the seed.
        case: a key of ``CASES``.
        data: name of a data set; ``sine`` for the regression.
        width: as of ``build``.
        examples: for training.
        test: for testing.
        factor: of pooling.
        steps: of training.
        last: the mean is over so many last steps.
        every: so many steps the overlap is measured.
        f_top_at: steps at which f_top is.

    Returns:
        The overlaps on both sets, their means, and f_top.
    """
    row_of = CASES[case]
    if data == "sine":
        x, y = problems.sine(examples, noise=0.1, job=job)
        unseen = problems.sine(test, noise=0.1, job=replace(job, seed=job.seed + 1_000_000))
        network: nn.Module = made(job, lambda: fully_connected((1, width, width, 1)))
        loss_fn: Loss = half_square
        tested = hessian_of(network, loss_fn, *unseen)
    else:
        part = images(job, data, examples, test, factor)
        if row_of.random_labels:
            part = problems.randomly_labelled(part, job)
        x, y = part.x_train, part.y_train
        network = build(job, row_of.model, part, width)
        loss_fn, tested = cross_entropy, None
        if part.x_test is not None and part.y_test is not None:
            tested = hessian_of(network, loss_fn, part.x_test, part.y_test)
    hessian = hessian_of(network, loss_fn, x, y)
    kind = torch.optim.Adam if row_of.adam else torch.optim.SGD

    def record(step: int) -> Row:
        row: Row = {}
        if step % every == 0:
            row["at"] = step
            row["loss"] = hessian.loss()
            row["overlap"] = overlap_of(hessian)
            row["overlap_test"] = math.nan if tested is None else overlap_of(tested)
        if step in f_top_at:
            top = top_of(hessian, part.num_classes, _COARSE)
            row["saved"] = step
            row["f_top"] = float(gradient_fraction(hessian.gradient(), top))
        return row

    rows = train(
        job,
        case,
        network,
        loss_fn,
        (x, y),
        kind(network.parameters(), lr=row_of.lr),
        steps=steps,
        batch_size=row_of.batch_size,
        record=record,
        every=lambda step: step % every == 0 or step in f_top_at,
    )
    names = ("at", "loss", "overlap", "overlap_test", "saved", "f_top")
    raw: Raw = {"case": case} | {name: column(rows, name) for name in names}
    late = [i for i, step in enumerate(raw["at"]) if step >= steps - last]
    for name in ("overlap", "overlap_test"):
        raw[f"mean_{name}"] = float(np.mean([raw[name][i] for i in late]))
    raw["accuracy"] = math.nan if data == "sine" else accuracy_of(network, x, y)
    return raw


# --- Figures 4 and 5 ---------------------------------------------------------------------------

_KEPT: Final = 60  # eigenvalues of a spectrum


def spectrum(
    job: Job,
    *,
    labels: str,
    data: str,
    factor: int,
    width: int,
    examples: int,
    epochs: int,
    lr: float = 0.1,
    batch_size: int = 64,
) -> Raw:
    """Trains a small network and decomposes its whole Hessian.

    Args:
        job: the seed.
        labels: ``digits``, ``parity`` (even or odd), ``random`` (permuted), or ``five`` (the
            digits 0 to 4 alone).
        data: name of a data set.
        factor: of pooling.
        width: of both hidden layers.
        examples: for training.
        epochs: of training.
        lr: η.
        batch_size: of SGD.

    Returns:
        The largest eigenvalues, the smallest, and how many there are in each bin of a histogram.
    """
    part = images(job, data, examples, 0, factor)
    if labels == "parity":
        part = problems.relabelled(part, torch.arange(part.num_classes) % 2)
    elif labels == "random":
        part = problems.randomly_labelled(part, job)
    elif labels == "five":
        part = first_classes(part, 5)
    x, y = part.x_train, part.y_train
    network = build(job, "fc", part, width)
    steps = epochs * (len(x) // batch_size)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    train(
        job, labels, network, cross_entropy, (x, y), optimizer, steps=steps, batch_size=batch_size
    )
    hessian = hessian_of(network, cross_entropy, x, y)
    eigenvalues = exact_spectrum(hessian)
    counts, edges = np.histogram(eigenvalues.numpy(), bins=100)
    return {
        "labels": labels,
        "k": part.num_classes,
        "parameters": hessian.size,
        "steps": steps,
        "loss": hessian.loss(),
        "accuracy": accuracy_of(network, x, y),
        "eigenvalues": eigenvalues[:_KEPT].tolist(),
        "smallest": float(eigenvalues[-1]),
        "counts": counts.tolist(),
        "edges": [float(edges[0]), float(edges[-1])],
    }


def right_edge(
    job: Job,
    *,
    classes: int,
    dimension: int,
    covariance: float,
    examples: int,
    width: int,
    steps: int,
    pairs: int,
    realisations: int,
    tol: float = 1e-4,
    lr: float = 0.1,
    batch_size: int = 64,
) -> Raw:
    """Takes the largest eigenvalues of many trainings, each with data and start of its own.

    Args:
        job: the seed.
        classes: of a Gaussian mixture.
        dimension: of the inputs.
        covariance: scale of the covariance of a class, where the centres have 1.
        examples: of each training.
        width: of both hidden layers.
        steps: of each training.
        pairs: eigenvalues.
        realisations: trainings.
        tol: of the eigenpairs.
        lr: η.
        batch_size: of SGD.

    Returns:
        The eigenvalues of each training, descending.
    """
    spectra, losses = [], []
    for number in range(realisations):
        own = replace(job, seed=job.seed * realisations + number)
        x, y = problems.blobs(classes, examples, dimension, covariance=covariance, job=own)
        network = made(own, lambda: fully_connected((dimension, width, width, classes)))
        optimizer = torch.optim.SGD(network.parameters(), lr=lr)
        name = f"realisation-{number}"
        train(
            own, name, network, cross_entropy, (x, y), optimizer, steps=steps, batch_size=batch_size
        )
        hessian = so.HessianOperator(network, cross_entropy, (x, y))
        values = top_of(hessian, pairs, tol).eigenvalues
        spectra.append([float(f"{value:.4g}") for value in values.tolist()])
        losses.append(hessian.loss())
    return {"k": classes, "eigenvalues": spectra, "losses": losses}


# --- section 4: Newton's method in the top subspace --------------------------------------------


def newton(
    job: Job,
    *,
    data: str,
    factor: int,
    width: int,
    examples: int,
    warmup: int,
    steps: int,
    tol: float = 1e-3,
    lr: float = 0.1,
    batch_size: int = 64,
) -> Raw:
    """Goes on from one state of SGD: by eq. 11, by gradient descent, and by SGD.

    Args:
        job: the seed.
        data: name of a data set.
        factor: of pooling.
        width: of both hidden layers.
        examples: for training.
        warmup: steps of SGD before.
        steps: of each.
        tol: of the eigenpairs.
        lr: η of gradient descent and SGD; Newton's is 1.
        batch_size: of SGD.

    Returns:
        The loss over all examples before each step and after the last, and λ_k for Newton.
    """
    part = images(job, data, examples, 0, factor)
    whole = (part.x_train, part.y_train)
    network = build(job, "fc", part, width)
    hessian = hessian_of(network, cross_entropy, *whole)
    sgd = torch.optim.SGD(network.parameters(), lr=lr)
    train(job, "warmup", network, cross_entropy, whole, sgd, steps=warmup, batch_size=batch_size)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    raw: Raw = {"k": part.num_classes, "loss": {}}
    for name in ("newton", "gd", "sgd"):
        network.load_state_dict(start)
        subspace = so.DominantSubspace(hessian, part.num_classes, refresh=1, tol=tol)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=lr)
        if name == "newton":
            optimizer = so.LowRankNewton(network.parameters(), subspace=subspace)
        rows = train(
            job,
            name,
            network,
            cross_entropy,
            whole,
            optimizer,
            steps=steps,
            batch_size=batch_size if name == "sgd" else None,
            record=lambda _: {"loss": hessian.loss()},
            first=warmup,
        )
        raw["loss"][name] = column(rows, "loss")
    return raw
