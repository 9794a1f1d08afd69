"""What is measured for `class_gradient_2020` along trainings, by the sizes of `runs.toml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.experiment import minibatch
from benchmarks.losses import accuracy, cross_entropy
from benchmarks.papers.networks import made, resnet9
from benchmarks.papers.problems import as_images, pooled, real
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, train
from subspace_optim.curvature.contexts import in_mode

Method = Literal["sgd", "printed", "orthogonal", "slowed", "added", "damped"]
"""SGD, and the quasi-Newton method: eq. 15 as printed, with orthogonal vectors, or calmed.

Slowed, the gradients that momentum sums up make one Newton step together; added is the λ_k that the
paper begins with, 1, to all; damped is both. They are ours; damped is one of three settings that
were tried on one seed, and no cure: at the sizes for a CPU it diverges on MNIST, but for one seed
with batches of 64, and on CIFAR-10 at η = 0.1.
"""

MOMENTUM: Final = 0.9
DECAY: Final = 0.9
"""Both of appendix D."""
SINES: Final = (0.1, 0.5, 0.9)
"""Of angles above which a direction adds to the rank, beside the rule of linear algebra."""
OUTLIERS: Final[tuple[Literal["gap", "ratio", "elbow"], ...]] = ("gap", "ratio", "elbow")
"""Ways to count the eigenvalues that stand out."""


def images(job: Job, data: str, examples: int, validation: int, pool: int = 1) -> Dataset:
    """Returns training images, drawn by the seed, and others of the same source for validation.

    Args:
        job: the seed.
        data: name of a data set.
        examples: for training.
        validation: images that are not trained on, in the place of the test set.
        pool: factor by which height and width are divided.
    """
    whole = as_images(pooled(real(data, job, examples + validation), pool))
    order = torch.randperm(len(whole.x_train), generator=job.generator()).to(job.device)
    valid, rest = order[:validation], order[validation:]
    x, y = whole.x_train, whole.y_train
    return replace(whole, x_train=x[rest], y_train=y[rest], x_test=x[valid], y_test=y[valid])


def validation_of(data: Dataset) -> tuple[Tensor, Tensor]:
    """Returns the images for validation, and their classes."""
    return cast("tuple[Tensor, Tensor]", (data.x_test, data.y_test))


def small_cnn(data: Dataset) -> nn.Sequential:
    """Returns the small CNN: 62,006 parameters for CIFAR-10, of which the paper counts 60k.

    Two 5x5 convolutions of 6 and 16, each with ReLU and 2x2 pooling, and linear layers of 120 and
    84 (LeCun et al. 1998, with ReLU and max pooling).
    """
    _, channels, side, _ = data.x_train.shape
    after = ((side - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * after * after, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, data.num_classes),
    )


def optimizer_of(
    method: Method, model: nn.Module, classes: int, lr: float, momentum: float = MOMENTUM
) -> tuple[Optimizer, so.ClassGradientSubspace | None]:
    """Returns an optimizer, and the subspace that is to observe its minibatches, if it has one."""
    if method == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum), None
    subspace = so.ClassGradientSubspace(
        model, classes, decay=DECAY, orthogonal=method == "orthogonal"
    )
    optimizer = so.ClassGradientQuasiNewton(
        model.parameters(),
        lr=lr,
        momentum=momentum,
        newton_lr=1 - momentum if method in ("slowed", "damped") else 1.0,
        damping=1.0 if method in ("added", "damped") else 0.0,
        subspace=subspace,
    )
    return optimizer, subspace


def curves(
    job: Job,
    make: Callable[[], nn.Module],
    data: Dataset,
    methods: Sequence[Method],
    trainings: Mapping[str, Mapping[str, Any]],
) -> dict[Method, dict[str, Raw]]:
    """Trains a network by each method in each way, and watches it on the validation images.

    Args:
        job: the seed.
        make: the network, as it is before it is drawn anew.
        data: see there.
        methods: see there.
        trainings: by name, ``lr``, ``batch_size``, ``steps``, and ``every`` how many to watch.

    Returns:
        ``step``, validation ``loss`` and ``accuracy`` at each of these steps, and whether the
        training ``diverged``, so that the series end where a loss is no number.
    """
    return {
        method: {
            name: _curve(job, f"{method}-{name}", make, data, method, **training)
            for name, training in trainings.items()
        }
        for method in methods
    }


def _curve(
    job: Job,
    name: str,
    make: Callable[[], nn.Module],
    data: Dataset,
    method: Method,
    *,
    lr: float,
    **training: Any,
) -> Raw:
    model = made(job, make)
    optimizer, subspace = optimizer_of(method, model, data.num_classes, lr)

    def record(_step: int) -> Row:
        x, y = validation_of(data)
        with torch.no_grad(), in_mode(model, "eval"):
            output = model(x)
        return {"loss": cross_entropy(output, y).item(), "accuracy": accuracy(output, y)}

    rows = train(
        job,
        name,
        Problem(model, cross_entropy, data.x_train, data.y_train),
        optimizer,
        record=record,
        before=None if subspace is None else subspace.observe,
        also=() if subspace is None else (subspace,),
        **training,
    )
    diverged = bool(rows[-1].get("diverged", False))
    rows = rows[:-1] if diverged else rows
    series = {key: [row[key] for row in rows] for key in ("step", "loss", "accuracy")}
    return series | {"diverged": diverged}


def at_rates(
    job: Job,
    *,
    width: int,
    batch_size: int,
    rates: Sequence[float],
    epochs: int,
    methods: Sequence[Method],
    **part: Any,
) -> Raw:
    """Trains a ResNet9 by each method at each rate, from one start and over the same minibatches.

    Returns:
        Steps an epoch, and a curve for each method and rate, with a row for each epoch.
    """
    found = images(job, **part)
    make = partial(resnet9, found.num_classes, channels=found.x_train.shape[1], width=width)
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
    methods: Sequence[Method],
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


class Snapshots:
    """Class gradients of single minibatches along a training: a part of its state."""

    def __init__(self) -> None:
        self.vectors: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Returns them."""
        return {"vectors": self.vectors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes those of ``state_dict()``."""
        self.vectors = list(state_dict["vectors"])


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

    Returns:
        Along the training, of the class gradients of one minibatch: their ``step``; ``ranks`` with
        the last C eigenvectors, a row for each of ``tolerances``; ``assigned`` cosines with them;
        and ``ratios`` v_kᵀHv_k / λ_k of each class at some steps. At the end: ``eigenvalues``,
        their ``outliers`` by each method, ``cosines`` and ``assignment`` of the last minibatch;
        of all examples the ``assigned`` cosine, the ``overlap`` with the eigenvectors, the cosines
        of the principal ``angles``, and the cosines ``between`` classes; ``chance`` and its
        deviation; ``second_term``, its Frobenius norm relative to the Hessian's; and how far it was
        trained: ``loss`` and ``accuracy`` on the examples, ``valid_accuracy``.
    """
    found = images(job, **part)
    model = made(job, partial(small_cnn, found))
    problem = Problem(model, cross_entropy, found.x_train, found.y_train)
    hessian = problem.hessian()
    steps = epochs * (len(found.x_train) // batch_size)
    every = max(1, steps // snapshots)
    kept = Snapshots()

    def record(step: int) -> Row:
        batch = minibatch(len(found.x_train), batch_size, step, job.seed).to(job.device)
        x, y = found.x_train[batch], found.y_train[batch]
        curvature = class_gradients(model, found.num_classes, x, y)
        kept.vectors.append(curvature.vectors)
        if (len(kept.vectors) - 1) % curvatures:
            return {}
        products = hessian.matmat(curvature.vectors)
        hessian.release()
        quotients = (products * curvature.vectors).sum(dim=1)
        return {"ratios": (quotients / curvature.eigenvalues).tolist()}

    rows = train(
        job,
        "sgd",
        problem,
        problem.sgd(lr, MOMENTUM),
        steps=steps,
        batch_size=batch_size,
        record=record,
        every=every,
        also=(kept,),
    )
    if rows[-1].get("diverged", False):
        return {"diverged": True}
    solved = so.DominantSubspace(hessian, eigenvalues, refresh=1, tol=tol, seed=job.seed).update()
    basis = solved.first(found.num_classes)
    of_minibatches = [so.diagnostics.class_gradient_cosines(v, basis) for v in kept.vectors]
    of_all = class_gradients(model, found.num_classes, found.x_train, found.y_train).vectors
    last = of_minibatches[-1]
    # The rule of numpy and torch for the rank of a P×2C matrix, for numbers of single precision.
    tolerances = [basis.size * torch.finfo(torch.float32).eps, *SINES]
    return {
        "diverged": False,
        "size": basis.size,
        "classes": found.num_classes,
        "step": [row["step"] for row in rows],
        "tolerances": tolerances,
        "ranks": [
            [so.diagnostics.intersection_rank(v, basis, rtol=rtol) for v in kept.vectors]
            for rtol in tolerances
        ],
        "assigned": [matched.mean for matched in of_minibatches],
        "ratios": {str(row["step"]): row["ratios"] for row in rows if "ratios" in row},
        "eigenvalues": solved.eigenvalues.tolist(),
        "outliers": {
            method: so.diagnostics.count_outliers(solved.eigenvalues, method).count
            for method in OUTLIERS
        },
        "cosines": last.cosines.tolist(),
        "assignment": last.assignment.tolist(),
        "of_all": {
            "assigned": so.diagnostics.class_gradient_cosines(of_all, basis).mean,
            "overlap": float(so.diagnostics.subspace_overlap(span(of_all), basis)),
            "angles": so.diagnostics.principal_angles(span(of_all), basis).cos().tolist(),
            "between": (of_all @ of_all.T).tolist(),
        },
        "chance": list(so.diagnostics.chance_cosine(found.num_classes, basis.k, basis.size)),
        "second_term": second_term(job, hessian, (found.x_train, found.y_train), probes),
        "loss": hessian.loss(),
        "accuracy": _accuracy(model, found.x_train, found.y_train),
        "valid_accuracy": _accuracy(model, *validation_of(found)),
    }


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with in_mode(model, "eval"):
        return accuracy(model(x), y)


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
