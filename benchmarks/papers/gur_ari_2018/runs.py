"""What is measured for `gur_ari_2018`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.losses import accuracy, cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.networks import fully_connected, made, resnet, simple_convnet
from benchmarks.papers.reproduction import Job, Raw, Run
from benchmarks.papers.training import Row, train
from subspace_optim.curvature.isolation import in_mode
from subspace_optim.diagnostics import (
    eigenvector_fractions,
    exact_spectrum,
    gradient_fraction,
    hessian_gradient_overlap,
    overlap_matrix,
    subspace_overlap,
)

Loss = Callable[[Tensor, Tensor], Tensor]
_CHUNK: Final = 1000  # images of a batch of the Hessian, so that its graphs stay small
_DRAWS: Final = 8  # random vectors for a mean overlap
_SMALL_STEP: Final = 0.1  # of the learning rate, where the loss is nearly linear
_FINE: Final = 1e-6  # of the solvable model, in float64
_COARSE: Final = 1e-2  # enough for f_top and the largest eigenvalue


# --- models and data ---------------------------------------------------------------------------


def build(job: Job, model: str, data: Dataset, width: int) -> nn.Module:
    """Returns one of the paper's models for these images.

    Args:
        job: seed and device.
        model: ``softmax``, ``fc``, ``fc-softplus``, ``convnet``, ``convnet-dropout`` (and batch
            norm, and a second dense layer), or ``resnet``.
        data: the images.
        width: of a hidden layer, of the first convolution, or of the first stage.
    """
    pixels, classes = data.x_train[0].numel(), data.num_classes
    channels, side = data.x_train.shape[1], data.x_train.shape[-1]
    more = model == "convnet-dropout"
    makers: dict[str, Callable[[], nn.Module]] = {
        "softmax": lambda: fully_connected((pixels, classes)),
        "fc": lambda: fully_connected((pixels, width, width, classes)),
        "fc-softplus": lambda: fully_connected((pixels, width, width, classes), nn.Softplus),
        "convnet": lambda: simple_convnet(
            side,
            classes,
            channels=channels,
            width=width,
            dense=16 * width,
            dropout=more,
            batch_norm=more,
            extra_dense=more,
        ),
        "resnet": lambda: resnet(
            classes, (width, 2 * width, 4 * width, 8 * width), 2, channels=channels
        ),
    }
    return made(job, makers["convnet" if more else model])


def images(job: Job, data: str, examples: int, test: int, factor: int = 1) -> Dataset:
    """Returns a part of a data set, each image ``(channels, side, side)``, pooled by a factor."""
    part = problems.real(data, job, examples, test)
    if part.x_train.dim() == 2:
        side = math.isqrt(part.x_train.shape[1])
        x_test = None if part.x_test is None else part.x_test.unflatten(1, (1, side, side))
        x_train = part.x_train.unflatten(1, (1, side, side))
        part = replace(part, x_train=x_train, x_test=x_test)
    return problems.pooled(part, factor)


def first_classes(data: Dataset, count: int) -> Dataset:
    """Returns the examples of the classes below ``count``."""
    kept = data.y_train < count
    part = replace(data, x_train=data.x_train[kept], y_train=data.y_train[kept], num_classes=count)
    if data.x_test is None or data.y_test is None:
        return part
    kept = data.y_test < count
    return replace(part, x_test=data.x_test[kept], y_test=data.y_test[kept])


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """Returns half the squared error, a mean over examples: the loss of the regression."""
    return 0.5 * (output - target).square().sum(dim=-1).mean()


def hessian_of(model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor) -> so.HessianOperator:
    """Returns the Hessian over all examples; those of images in chunks, for the memory."""
    if x.dim() < 4 or x.shape[1] == 1:
        return so.HessianOperator(model, loss_fn, (x, y))
    chunks = list(zip(x.split(_CHUNK), y.split(_CHUNK), strict=True))
    return so.HessianOperator(model, loss_fn, chunks)


@torch.no_grad()
def accuracy_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns the share of examples that the model in eval mode classifies rightly."""
    with in_mode(model, "eval"):
        right = [
            accuracy(model(a), b) * len(b)
            for a, b in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True)
        ]
    return sum(right) / len(x)


# --- what is measured at one point -------------------------------------------------------------


def overlap_of(operator: so.CurvatureOperator) -> float:
    """Returns the overlap of g and Hg (eq. 3)."""
    with operator.frozen():
        gradient = operator.gradient()
        product = operator.matvec(gradient)
    operator.release()
    return float(hessian_gradient_overlap(gradient, product))


def top_of(operator: so.CurvatureOperator, k: int, tol: float, seed: int = 0) -> so.EigenBasis:
    """Returns the top k eigenpairs, solved for anew."""
    return so.DominantSubspace(operator, k, refresh=1, tol=tol, seed=seed).update()


def part_of(basis: so.EigenBasis, start: int, stop: int) -> so.EigenBasis:
    """Returns the pairs from ``start`` to before ``stop``."""
    rows = slice(start, stop)
    return so.EigenBasis(basis.eigenvalues[rows], basis.vectors[rows], basis.residuals[rows])


def mean_overlap(operator: so.CurvatureOperator, vectors: Tensor) -> float:
    """Returns the mean overlap of the rows of ``vectors`` with their products."""
    with operator.frozen():
        products = operator.matmat(vectors)
    operator.release()
    pairs = zip(vectors, products, strict=True)
    return sum(float(hessian_gradient_overlap(w, p)) for w, p in pairs) / len(vectors)


def decrease(operator: so.CurvatureOperator, top: so.EigenBasis, lr: float) -> float:
    """Returns by how much a step along g_top lowers the loss, over what one along g does.

    To first order in the rate it is f_top.
    """
    gradient, start = operator.gradient(), operator.loss()
    whole = start - _loss_after(operator, -lr * gradient)
    return (start - _loss_after(operator, -lr * top.project(gradient))) / whole


@torch.no_grad()
def _loss_after(operator: so.CurvatureOperator, move: Tensor) -> float:
    space = operator.parameters
    kept = [p.clone() for p in space.tensors]
    for p, piece in zip(space.tensors, space.unflatten(move), strict=True):
        p.add_(piece)
    loss = operator.loss()
    for p, old in zip(space.tensors, kept, strict=True):
        p.copy_(old)
    return loss


def column(rows: Sequence[Row], name: str) -> list[Any]:
    """Returns what the rows that have it say."""
    return [row[name] for row in rows if name in row]


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
    gradient, top = hessian.gradient(), part_of(basis, 0, k)
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
    first, second = (top_of(hessian, 2 * k, tol, seed) for seed in (0, 1))
    spans = {"top": (0, k), "next": (k, 2 * k)}
    return {
        name: float(subspace_overlap(part_of(first, *span), part_of(second, *span)))
        for name, span in spans.items()
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


# --- section 3: the solvable model -------------------------------------------------------------


def two_samples(job: Job, *, dimension: int, lr: float, steps: int) -> Raw:
    """Holds gradient descent on two orthonormal samples against the closed forms.

    With u_c the lead of the right logit for sample c: the flow is u + e^u = ηt + c exactly, and
    u = log(ηt + c) at late times (eqs. 7 and 15-16); the gradient is (μ_2 − μ_1)/(2ηt), a quarter
    of what eqs. 8 and 17 print; the Hessian has the eigenvalue 1/(ηt) twice (eqs. 9, 18, 19).

    Args:
        job: the seed.
        dimension: d.
        lr: η.
        steps: of gradient descent.

    Returns:
        At steps of equal ratios: relative errors of all of these.
    """
    random = job.generator()
    means = torch.linalg.qr(torch.randn(dimension, 2, generator=random, dtype=torch.float64)).Q.T
    means = means.to(job.device)
    labels = torch.arange(2, device=job.device)
    model = made(job, lambda: nn.Linear(dimension, 2, bias=False).double())
    weight = next(model.parameters())
    hessian = so.HessianOperator(model, cross_entropy, (means, labels))
    spans = torch.stack([torch.cat([m, -m]) for m in means]) / math.sqrt(2)
    start = weight.detach().clone()
    constants = _leads(start, means) + _leads(start, means).exp()
    at = sorted({round(steps ** (i / 24)) for i in range(25)})

    def record(step: int) -> Row:
        time, now = lr * step, weight.detach()
        lead = _leads(now, means)
        flow = _flow(time + constants)
        late = (time + constants).log() - _leads(start, means)
        expected = start + 0.5 * torch.stack([late[0] * means[0] - late[1] * means[1]] * 2) * (
            torch.tensor([[1.0], [-1.0]], device=now.device)
        )
        gradient = hessian.gradient()
        corrected = math.sqrt(2) * (spans[1] - spans[0]) / (2 * time)
        basis = top_of(hessian, 4, 1e-10)
        return {
            "time": time,
            "lead": lead.tolist(),
            "flow": flow.tolist(),
            "trajectory": float((now - expected).norm() / (now - start).norm()),
            "gradient": float((gradient - corrected).norm() / gradient.norm()),
            "gradient_printed": float((gradient - 4 * corrected).norm() / gradient.norm()),
            "norm": float(gradient.norm()),
            "eigenvalues": basis.eigenvalues.tolist(),
            "f_top": float(gradient_fraction(gradient, part_of(basis, 0, 2))),
            "span": float(subspace_overlap(part_of(basis, 0, 2), spans)),
        }

    rows = train(
        job,
        "flow",
        model,
        cross_entropy,
        (means, labels),
        torch.optim.SGD(model.parameters(), lr=lr),
        steps=steps,
        record=record,
        every=lambda step: step in at,
    )
    return {name: column(rows, name) for name in rows[0]}


def _leads(weight: Tensor, means: Tensor) -> Tensor:
    """u_c, by which the right logit leads for sample c."""
    logits = weight @ means.T
    return torch.stack([logits[0, 0] - logits[1, 0], logits[1, 1] - logits[0, 1]])


def _flow(reached: Tensor) -> Tensor:
    """The u with u + e^u = ``reached``, by Newton's method from above, where it cannot miss."""
    root = torch.where(reached > 1, reached.clamp(min=1).log(), reached)
    for _ in range(20):
        root = root - (root + root.exp() - reached) / (1 + root.exp())
    return root


def mixture(
    job: Job,
    *,
    classes: Sequence[int],
    noises: Sequence[float],
    dimension: int,
    per_class: int,
    lr: float,
    steps: int,
    records: int,
) -> Raw:
    """Trains softmax regression on Gaussian mixtures by gradient descent.

    Args:
        job: the seed.
        classes: how many, in turn; their means are random unit vectors.
        noises: standard deviations of a class, in turn; without noise a class is one sample.
        dimension: of the inputs.
        per_class: samples of a class.
        lr: η.
        steps: of each training.
        records: of each training, at steps of equal ratios.

    Returns:
        For each of them, with biases and without: f_top, the fractions c_i² of the top k, and
        2k + 2 eigenvalues along training. For each number of classes the rank without noise.
    """
    size: dict[str, Any] = {"dimension": dimension, "lr": lr, "steps": steps, "records": records}
    return {
        "cases": [
            _mixture(job, k, noise, bias=bias, per_class=per_class if noise else 1, **size)
            for k in classes
            for noise in noises
            for bias in (False, True)
        ],
        "ranks": [[k, rank_without_noise(job, k)] for k in classes],
    }


def rank_without_noise(job: Job, k: int) -> int:
    """Returns the rank of the Hessian for k orthonormal samples at random parameters.

    It does not depend on the dimension, as long as that is at least k: here it is 2k.
    """
    random = job.generator()
    means = torch.linalg.qr(torch.randn(2 * k, k, generator=random, dtype=torch.float64)).Q.T
    model = made(
        replace(job, device=means.device), lambda: nn.Linear(2 * k, k, bias=False).double()
    )
    hessian = so.HessianOperator(model, cross_entropy, (means, torch.arange(k)))
    eigenvalues = exact_spectrum(hessian)
    return int((eigenvalues > 1e-9 * eigenvalues[0]).sum())


def _mixture(
    job: Job,
    k: int,
    noise: float,
    *,
    bias: bool,
    per_class: int,
    dimension: int,
    lr: float,
    steps: int,
    records: int,
) -> Raw:
    random = job.generator()
    means = functional.normalize(torch.randn(k, dimension, generator=random, dtype=torch.float64))
    y = torch.arange(k).repeat_interleave(per_class)
    x = means[y] + noise * torch.randn(len(y), dimension, generator=random, dtype=torch.float64)
    x, y = x.to(job.device), y.to(job.device)
    model = made(job, lambda: nn.Linear(dimension, k, bias=bias).double())
    hessian = so.HessianOperator(model, cross_entropy, (x, y))
    at = {0} | {round(steps ** (i / (records - 2))) for i in range(records - 1)}

    def record(_: int) -> Row:
        basis = top_of(hessian, 2 * k + 2, _FINE)
        fractions = eigenvector_fractions(hessian.gradient(), basis)
        return {
            "eigenvalues": basis.eigenvalues.tolist(),
            "fractions": fractions[:k].tolist(),
            "f_top": float(fractions[:k].sum()),
        }

    case: Raw = {"k": k, "noise": noise, "bias": bias}
    rows = train(
        job,
        f"k{k}-noise{noise:g}-bias{bias:d}",
        model,
        cross_entropy,
        (x, y),
        torch.optim.SGD(model.parameters(), lr=lr),
        steps=steps,
        record=record,
        every=lambda step: step in at,
    )
    return case | {name: column(rows, name) for name in rows[0]}


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


# --- sizes ---------------------------------------------------------------------------------------

_DIMENSIONS: Final = (2, 5, 9, 10, 11, 15, 20)
_FC: Final[dict[str, Any]] = {
    "data": "mnist-5k",
    "model": "fc",
    "width": 100,
    "classes": 10,
    "examples": 5000,
    "test": 2000,
    "factor": 1,
    "dimensions": _DIMENSIONS,
    "bases_at": (0, 10, 25, 50, 100, 150, 200, 300, 400, 600, 800, 1000),
    "steps": 2000,
    "every": 50,
    "tol": 1e-4,
}
_FIVE: Final[dict[str, Any]] = _FC | {
    "classes": 5,
    "dimensions": (1, 2, 4, 5, 6, 8, 10),
    "bases_at": (0, 25, 50, 100, 200, 400, 700, 1000),
    "steps": 1000,
}
_CONVNET: Final[dict[str, Any]] = {
    "data": "cifar10-5k",
    "model": "convnet",
    "width": 16,
    "classes": 10,
    "examples": 1000,
    "test": 500,
    "factor": 2,
    "dimensions": (10,),
    "bases_at": (0, 50, 100, 200, 400, 600, 800),
    "steps": 1000,
    "every": 100,
    "tol": 1e-3,
}
_RESNET: Final[dict[str, Any]] = _CONVNET | {
    "model": "resnet",
    "width": 4,
    "examples": 300,
    "test": 200,
    "dimensions": _DIMENSIONS,
    "bases_at": (0, 30, 100, 200, 300, 500),
    "steps": 600,
    "every": 50,
}
_WHOLE: Final = {"examples": 60_000, "test": 10_000}
_WHOLE_CIFAR: Final = {"examples": 50_000, "test": 10_000, "factor": 1}


def _row(case: str) -> Run:
    """A row of Table 1."""
    of = CASES[case]
    small: dict[str, Any] = {"case": case, "steps": 1500, "last": 1000, "every": 50}
    paper: dict[str, Any] = {"case": case, "steps": 3000, "last": 1000, "every": 10}
    if of.dataset == "Regression":
        same = {"data": "sine", "width": 100, "examples": 1000, "test": 1000, "factor": 1}
        small, paper = small | same, paper | same
    elif of.dataset == "MNIST":
        same = {"data": "mnist-5k", "width": 100, "factor": 1}
        at: tuple[int, ...] = (0, 25, 50, 100, 200, 400, 700, 1000, 1500)
        small |= same | {"examples": 5000, "test": 2000, "f_top_at": at}
        paper |= same | _WHOLE | {"f_top_at": at}
    else:
        at = (0, 100, 300, 700, 1500) if of.adam else ()
        small |= {"data": "cifar10-5k", "width": 16, "factor": 2, "f_top_at": at}
        small |= {"examples": 3000, "test": 1000}
        paper |= {"data": "cifar10-5k", "width": 32, "f_top_at": at} | _WHOLE_CIFAR
    words = " ".join(part for part in (of.dataset, of.network, of.comment) if part)
    return Run(case, f"{words}: the overlap of g and Hg", table_row, small, paper)


def _spectrum(name: str, labels: str, what: str) -> Run:
    small = {"labels": labels, "data": "mnist-5k", "factor": 4, "width": 32, "examples": 5000}
    small |= {"epochs": 40}
    paper = small | {"factor": 1, "examples": 60_000}
    return Run(name, f"the whole spectrum of a small network: {what}", spectrum, small, paper)


def _run(name: str, what: str, measure: Any, small: Mapping[str, Any], **paper: Any) -> Run:
    return Run(name, what, measure, small, {**small, **paper})


RUNS: Final = (
    _run(
        "fc",
        "MNIST, FC: gradient and top subspaces along training",
        evolution,
        _FC | {"anatomy_at": (0, 100, 200, 400)},
        **_WHOLE,
    ),
    _run("fc-five", "the same with the digits 0 to 4 alone", evolution, _FIVE, **_WHOLE),
    _run(
        "convnet",
        "CIFAR-10, ConvNet: gradient and top subspaces along training",
        evolution,
        _CONVNET,
        **_WHOLE_CIFAR,
        width=32,
        steps=5000,
    ),
    _run(
        "resnet",
        "CIFAR-10, ResNet-18: gradient and top subspaces along training",
        evolution,
        _RESNET,
        **_WHOLE_CIFAR,
        width=64,
        bases_at=(0, 100, 500, 1000, 2000, 4000, 8000, 12_000),
        steps=20_000,
        every=500,
    ),
    *(_row(case) for case in CASES),
    _spectrum("spectrum", "digits", "digits"),
    _spectrum("spectrum-random", "random", "random labels"),
    _spectrum("spectrum-parity", "parity", "even and odd digits"),
    _spectrum("spectrum-five", "five", "the digits 0 to 4"),
    _run(
        "right-edge",
        "the largest eigenvalues for a mixture of 20 Gaussians, over realisations",
        right_edge,
        {
            "classes": 20,
            "dimension": 32,
            "covariance": 1.0,
            "examples": 1000,
            "width": 32,
            "steps": 400,
            "pairs": 80,
            "realisations": 20,
        },
        classes=100,
        dimension=3072,
        examples=50_000,
        width=256,
        pairs=1000,
        realisations=200,
    ),
    _run(
        "two-samples",
        "the solvable model: two samples, two classes",
        two_samples,
        {"dimension": 1000, "lr": 0.1, "steps": 10_000},
    ),
    _run(
        "mixture",
        "the model with noise, biases and more classes",
        mixture,
        {
            "classes": (2, 5, 10),
            "noises": (0.0, 0.02),
            "dimension": 1000,
            "per_class": 50,
            "lr": 1.0,
            "steps": 3000,
            "records": 12,
        },
    ),
    _run(
        "newton",
        "Newton's method in the top subspace beside gradient descent",
        newton,
        {
            "data": "mnist-5k",
            "factor": 2,
            "width": 100,
            "examples": 1000,
            "warmup": 200,
            "steps": 20,
        },
        factor=1,
        examples=60_000,
    ),
)
