"""What is measured for `class_gradient_2020` along trainings, by the sizes of `runs.toml`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.experiment import minibatch
from benchmarks.losses import cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.class_gradient_2020.readings import DECAY, MOMENTUM, optimizer_of
from benchmarks.papers.networks import lenet, made, resnet9
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, column, performance, top_of, train

SINES: Final = (0.1, 0.5, 0.9)
"""Of angles above which a direction adds to the rank, beside the rule of linear algebra."""
OUTLIERS: Final[tuple[Literal["gap", "ratio", "elbow"], ...]] = ("gap", "ratio", "elbow")
"""Ways to count the eigenvalues that stand out."""
HOPELESS: Final = 1e6
"""A training whose validation loss is above this is over: it comes back no more."""


def images(job: Job, data: str, examples: int, validation: int, pool: int = 1) -> Dataset:
    """Returns training images, drawn by the seed, and others of the same source for validation.

    Args:
        job: the seed.
        data: name of a data set.
        examples: for training.
        validation: images that are not trained on, in the place of the test set.
        pool: factor by which height and width are divided.
    """
    whole = problems.images(job, data, examples + validation, pool=pool)
    order = torch.randperm(len(whole.x_train), generator=job.generator()).to(job.device)
    valid, rest = whole.rows(order[:validation]), whole.rows(order[validation:])
    return replace(rest, x_test=valid.x_train, y_test=valid.y_train)


def small_cnn(data: Dataset) -> nn.Sequential:
    """Returns the small CNN: 62,006 parameters for CIFAR-10, of which the paper counts 60k.

    Two 5x5 convolutions of 6 and 16, each with ReLU and 2x2 pooling, and linear layers of 120 and
    84 (LeCun et al. 1998, with ReLU and max pooling).
    """
    _, channels, side, _ = data.x_train.shape
    return lenet(side, channels, (6, 16), (120, 84, data.num_classes), padding=0)


def curves(
    job: Job,
    make: Callable[[], nn.Module],
    data: Dataset,
    methods: Sequence[str],
    trainings: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Raw]]:
    """Trains a network by each method in each way, and watches it on the validation images.

    Args:
        job: the seed.
        make: the network, as it is before it is drawn anew.
        data: see there.
        methods: names that ``optimizer_of`` knows.
        trainings: by name, ``lr``, ``batch_size``, ``steps``, and ``every`` how many to watch.

    Returns:
        The ``curve`` of each.
    """
    found: dict[str, dict[str, Raw]] = {method: {} for method in methods}
    for method, (name, training) in itertools.product(methods, trainings.items()):
        found[method][name] = curve(job, f"{method}-{name}", make, data, method, **training)
    return found


@dataclass
class _Watched:
    """The validation loss of the last row: a part of the training, which may be taken up again."""

    loss: float = 0.0

    def state_dict(self) -> dict[str, float]:
        """Returns the loss."""
        return {"loss": self.loss}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes a loss that ``state_dict()`` returned."""
        self.loss = state["loss"]


def curve(
    job: Job,
    name: str,
    make: Callable[[], nn.Module],
    data: Dataset,
    method: str,
    *,
    lr: float,
    **training: Any,
) -> Raw:
    """Trains a network by a method, and watches it on the validation images.

    Returns:
        ``step``, validation ``loss`` and ``accuracy`` along the way, and whether the training
        ``diverged``, so that the series end where a loss is no number, or hopeless.
    """
    model = made(job, make)
    optimizer, subspace = optimizer_of(method, model, data.num_classes, lr)
    valid = cast("tuple[Tensor, Tensor]", data.test)
    watched = _Watched()

    def record(_: int) -> Row:
        row = performance(model, *valid)
        watched.loss = row["loss"]
        return row

    def before(x: Tensor, y: Tensor) -> None:
        if watched.loss > HOPELESS:
            raise so.NonFiniteError("the training is lost")
        if subspace is not None:
            subspace.observe(x, y)

    problem = Problem(model, cross_entropy, data.x_train, data.y_train)
    also: tuple[Any, ...] = (watched,) if subspace is None else (watched, subspace)
    rows = train(job, name, problem, optimizer, record=record, before=before, also=also, **training)
    ended = [row for row in rows if "diverged" not in row]
    series = {key: column(ended, key) for key in ("step", "loss", "accuracy")}
    return series | {"diverged": len(ended) < len(rows)}


def at_rates(
    job: Job,
    *,
    width: int,
    batch_size: int,
    rates: Sequence[float],
    epochs: int,
    methods: Sequence[str],
    scaled: bool = True,
    **part: Any,
) -> Raw:
    """Trains a ResNet9 by each method at each rate, from one start and over the same minibatches.

    Args:
        job: the seed.
        width: of the network.
        batch_size: see there.
        rates: η.
        epochs: see there.
        methods: names that ``optimizer_of`` knows.
        scaled: whether the network puts out an eighth of its scores, or its scores.
        part: of the data, as ``images`` has it.

    Returns:
        Steps an epoch, and a curve for each method and rate, with a row for each epoch.
    """
    found = images(job, **part)

    def make() -> nn.Module:
        whole = resnet9(found.num_classes, channels=found.x_train.shape[1], width=width)
        return whole if scaled else whole[:-1]

    epoch = len(found.x_train) // batch_size
    usual = {"batch_size": batch_size, "steps": epochs * epoch, "every": epoch}
    trainings = {f"{lr:g}": usual | {"lr": lr} for lr in rates}
    found_curves = curves(job, make, found, methods, trainings)
    return {"epoch": epoch, "classes": found.num_classes, "curves": found_curves}


def at_batch_sizes(
    job: Job,
    *,
    batch_sizes: Sequence[int],
    lr: float,
    steps: int,
    records: int,
    methods: Sequence[str],
    **part: Any,
) -> Raw:
    """Trains a small CNN by each method with each batch size, for equally many steps.

    Returns:
        The number of examples, and a curve for each method and batch size.
    """
    found = images(job, **part)
    make = partial(small_cnn, found)
    sizes = [min(size, len(found.x_train)) for size in batch_sizes]
    usual = {"lr": lr, "steps": steps, "every": max(1, steps // records)}
    trainings = {str(size): usual | {"batch_size": size} for size in sizes}
    found_curves = curves(job, make, found, methods, trainings)
    return {"examples": len(found.x_train), "classes": found.num_classes, "curves": found_curves}


def class_gradients(model: nn.Module, classes: int, x: Tensor, y: Tensor) -> so.LowRankCurvature:
    """Returns eq. 11 of these examples alone: without a moving average."""
    subspace = so.ClassGradientSubspace(model, classes, decay=0.0)
    subspace.observe(x, y)
    return cast("so.LowRankCurvature", subspace.update())  # it is not orthogonal


def beside_eigenvectors(
    job: Job,
    *,
    batch_size: int,
    lr: float,
    epochs: int,
    snapshots: int,
    curvatures: int,
    eigenvalues: int,
    tol: float,
    probes: int,
    **part: Any,
) -> Raw:
    """Trains a small CNN by SGD, and holds its class gradients against its last eigenvectors.

    Raises:
        RuntimeError: SGD diverged.

    Returns:
        Along the training, of the class gradients of one minibatch: their ``step``; ``ranks`` with
        the last C eigenvectors, a row for each of ``tolerances``; ``assigned`` cosines with them;
        and ``ratios`` v_kᵀHv_k / λ_k of each class at some steps. At the end: ``eigenvalues``,
        their ``outliers`` by each method; of the ``average`` of eq. 16 the ``assigned`` cosine,
        its ``cosines`` and ``assignment``; of all examples the ``assigned`` cosine, the ``overlap``
        with the eigenvectors, the cosines of the principal ``angles``, and the cosines ``between``
        classes; ``chance`` and its deviation; ``second_term``, its Frobenius norm relative to the
        Hessian's; and how far it was trained: ``loss`` and ``accuracy`` on the examples,
        ``valid_accuracy``.
    """
    found = images(job, **part)
    valid = cast("tuple[Tensor, Tensor]", found.test)
    model = made(job, partial(small_cnn, found))
    problem = Problem(model, cross_entropy, found.x_train, found.y_train)
    hessian = problem.hessian()
    steps = epochs * (len(found.x_train) // batch_size)
    every = max(1, steps // snapshots)

    def record(step: int) -> Row:
        batch = minibatch(len(found.x_train), batch_size, step, job.seed).to(job.device)
        x, y = found.x_train[batch], found.y_train[batch]
        curvature = class_gradients(model, found.num_classes, x, y)
        row: Row = {"vectors": curvature.vectors}
        if step == steps or step // every % curvatures == 0:
            products = hessian.matmat(curvature.vectors)
            hessian.release()
            quotients = (products * curvature.vectors).sum(dim=1)
            row["ratios"] = (quotients / curvature.eigenvalues).tolist()
        return row

    average = so.ClassGradientSubspace(model, found.num_classes, decay=DECAY)
    # A minibatch counts γᵗ after t more: those of the last eighth are all that is left.
    late = every * max(1, snapshots // 8)
    training = partial(
        train,
        job,
        problem=problem,
        optimizer=problem.sgd(lr, MOMENTUM),
        batch_size=batch_size,
        record=record,
        every=every,
    )
    rows = training("early", steps=steps - late)
    if not rows[-1].get("diverged", False):
        observing: dict[str, Any] = {"before": average.observe, "also": (average,)}
        rows = rows[:-1] + training("late", first=steps - late, steps=late, **observing)
    if rows[-1].get("diverged", False):
        raise RuntimeError("SGD diverged: there are no eigenvectors of a trained network")
    solved = top_of(hessian, eigenvalues, tol, job.seed)
    basis = solved.first(found.num_classes)
    vectors = column(rows, "vectors")
    of_minibatches = [so.diagnostics.class_gradient_cosines(v, basis) for v in vectors]
    of_all = class_gradients(model, found.num_classes, found.x_train, found.y_train).vectors
    averaged = so.diagnostics.class_gradient_cosines(average.update().vectors, basis)
    # The rule of numpy and torch for the rank of a P×2C matrix, for numbers of single precision.
    tolerances = [basis.size * torch.finfo(torch.float32).eps, *SINES]
    return {
        "size": basis.size,
        "classes": found.num_classes,
        "step": [row["step"] for row in rows],
        "tolerances": tolerances,
        "ranks": [
            [so.diagnostics.intersection_rank(v, basis, rtol=rtol) for v in vectors]
            for rtol in tolerances
        ],
        "assigned": [matched.mean for matched in of_minibatches],
        "ratios": {str(row["step"]): row["ratios"] for row in rows if "ratios" in row},
        "eigenvalues": solved.eigenvalues.tolist(),
        "outliers": {
            method: so.diagnostics.count_outliers(solved.eigenvalues, method).count
            for method in OUTLIERS
        },
        "average": {
            "assigned": averaged.mean,
            "cosines": averaged.cosines.tolist(),
            "assignment": averaged.assignment.tolist(),
        },
        "of_all": {
            "assigned": so.diagnostics.class_gradient_cosines(of_all, basis).mean,
            "overlap": float(so.diagnostics.subspace_overlap(span(of_all), basis)),
            "angles": so.diagnostics.principal_angles(span(of_all), basis).cos().tolist(),
            "between": (of_all @ of_all.T).tolist(),
        },
        "chance": list(so.diagnostics.chance_cosine(found.num_classes, basis.k, basis.size)),
        "second_term": second_term(job, hessian, (found.x_train, found.y_train), probes),
        "loss": hessian.loss(),
        "accuracy": performance(model, found.x_train, found.y_train)["accuracy"],
        "valid_accuracy": performance(model, *valid)["accuracy"],
    }


def span(vectors: Tensor) -> so.EigenBasis:
    """Returns an orthonormal basis of the span of vectors, one a row."""
    return so.LowRankCurvature(torch.ones_like(vectors[:, 0]), vectors).orthogonalised()


def second_term(
    job: Job, hessian: so.HessianOperator, data: tuple[Tensor, Tensor], probes: int
) -> float:
    """Returns the Frobenius norm of the second term of eq. 6, relative to the Hessian's.

    Both are estimated from the same random vectors ξ: the mean of ‖Aξ‖² is ‖A‖².
    """
    gauss_newton = so.GaussNewtonOperator(hessian.model, cross_entropy, data)
    vectors = torch.randn(probes, hessian.size, generator=job.generator()).to(data[0].device)
    whole = hessian.matmat(vectors)
    rest = so.ResidualOperator(hessian, gauss_newton).matmat(vectors)
    hessian.release()
    return float(rest.norm() / whole.norm())
