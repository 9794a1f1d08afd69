"""What is measured: trainings at several rates and batch sizes, class gradients, and cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import subspace_optim as so
from benchmarks.experiment import minibatch
from benchmarks.losses import accuracy, cross_entropy
from benchmarks.papers.networks import made, resnet9
from benchmarks.papers.problems import as_images, pooled, real
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Row, train
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
UNDAMPED: Final[tuple[Method, ...]] = ("sgd", "printed", "orthogonal")
SINES: Final = (0.1, 0.5, 0.9)
"""Of angles above which a direction adds to the rank, beside the rule of linear algebra."""
OUTLIERS: Final[tuple[Literal["gap", "ratio", "elbow"], ...]] = ("gap", "ratio", "elbow")
"""Ways to count the eigenvalues that stand out."""


@dataclass(frozen=True)
class Images:
    """Images for training and for validation, ``(N, channels, side, side)``, and their classes."""

    x: Tensor
    y: Tensor
    x_valid: Tensor
    y_valid: Tensor
    classes: int

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for coloured ones."""
        return self.x.shape[1]

    @property
    def side(self) -> int:
        """Height and width."""
        return self.x.shape[-1]


def images(job: Job, data: str, examples: int, validation: int, pool: int = 1) -> Images:
    """Returns training images, drawn by the seed, and others of the same source for validation.

    Args:
        job: the seed.
        data: name of a data set.
        examples: for training.
        validation: images that are not trained on.
        pool: factor by which height and width are divided.
    """
    whole = as_images(pooled(real(data, job, examples + validation), pool))
    x = whole.x_train
    order = torch.randperm(len(x), generator=job.generator()).to(x.device)
    valid, rest = order[:validation], order[validation:]
    y = whole.y_train
    return Images(x[rest], y[rest], x[valid], y[valid], whole.num_classes)


def small_cnn(side: int, outputs: int, *, channels: int = 3) -> nn.Sequential:
    """Returns the small CNN: 62,006 parameters for CIFAR-10, of which the paper counts 60k.

    Two 5x5 convolutions of 6 and 16, each with ReLU and 2x2 pooling, and linear layers of 120 and
    84 (LeCun et al. 1998, with ReLU and max pooling).
    """
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
        nn.Linear(84, outputs),
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


def curve(
    job: Job,
    name: str,
    make: Callable[[], nn.Module],
    data: Images,
    method: Method,
    *,
    lr: float,
    batch_size: int,
    steps: int,
    every: int,
) -> Raw:
    """Trains a network and watches it on the validation images.

    Returns:
        ``step``, validation ``loss`` and ``accuracy`` at each of these steps, and whether the
        training ``diverged``, so that the series end where a loss is no number.
    """
    model = made(job, make)
    optimizer, subspace = optimizer_of(method, model, data.classes, lr)

    def record(_step: int) -> Row:
        with torch.no_grad(), in_mode(model, "eval"):
            output = model(data.x_valid)
        loss = cross_entropy(output, data.y_valid).item()
        return {"loss": loss, "accuracy": accuracy(output, data.y_valid)}

    rows = train(
        job,
        name,
        model,
        cross_entropy,
        (data.x, data.y),
        optimizer,
        steps=steps,
        batch_size=batch_size,
        record=record,
        every=every,
        before=None if subspace is None else subspace.observe,
        also=() if subspace is None else (subspace,),
    )
    diverged = bool(rows[-1].get("diverged", False))
    rows = rows[:-1] if diverged else rows
    series = {key: [row[key] for row in rows] for key in ("step", "loss", "accuracy")}
    return series | {"diverged": diverged}


def measure_rates(
    job: Job,
    *,
    data: str,
    examples: int,
    validation: int,
    pool: int,
    width: int,
    batch_size: int,
    rates: Sequence[float],
    epochs: int,
    methods: Sequence[Method],
) -> Raw:
    """Trains a ResNet9 by each method at each rate, from one start and over the same minibatches.

    Args:
        job: the seed.
        data: name of a data set of images.
        examples: for training.
        validation: images.
        pool: factor by which height and width are divided.
        width: of the ResNet9.
        batch_size: examples a step.
        rates: learning rates η.
        epochs: of each training.
        methods: by which it is trained.

    Returns:
        Steps an epoch, and a curve for each method and rate, with a row for each epoch.
    """
    found = images(job, data, examples, validation, pool)
    make = partial(resnet9, found.classes, channels=found.channels, width=width)
    epoch = len(found.x) // batch_size
    curves = {
        method: {
            f"{lr:g}": curve(
                job,
                f"{method}-{lr:g}",
                make,
                found,
                method,
                lr=lr,
                batch_size=batch_size,
                steps=epochs * epoch,
                every=epoch,
            )
            for lr in rates
        }
        for method in methods
    }
    return {"epoch": epoch, "classes": found.classes, "curves": curves}


def measure_batches(
    job: Job,
    *,
    data: str,
    examples: int,
    validation: int,
    batch_sizes: Sequence[int],
    lr: float,
    steps: int,
    records: int,
    methods: Sequence[Method],
) -> Raw:
    """Trains a small CNN by each method with each batch size, for equally many steps.

    Args:
        job: the seed.
        data: name of a data set of images.
        examples: for training.
        validation: images.
        batch_sizes: one that is larger than ``examples`` is the full batch.
        lr: η.
        steps: of each training.
        records: rows of a curve, at equal distances.
        methods: by which it is trained.

    Returns:
        The number of examples, and a curve for each method and batch size.
    """
    found = images(job, data, examples, validation)
    make = partial(small_cnn, found.side, found.classes, channels=found.channels)
    sizes = [min(size, len(found.x)) for size in batch_sizes]
    curves = {
        method: {
            str(size): curve(
                job,
                f"{method}-{size}",
                make,
                found,
                method,
                lr=lr,
                batch_size=size,
                steps=steps,
                every=max(1, steps // records),
            )
            for size in sizes
        }
        for method in methods
    }
    return {"examples": len(found.x), "classes": found.classes, "curves": curves}


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


def measure_class_gradients(
    job: Job,
    *,
    data: str,
    examples: int,
    validation: int,
    batch_size: int,
    lr: float,
    epochs: int,
    snapshots: int,
    curvatures: int,
    eigenvalues: int,
    tol: float,
    probes: int,
) -> Raw:
    """Trains a small CNN by SGD, and holds its class gradients against its last eigenvectors.

    Args:
        job: the seed.
        data: name of a data set of images.
        examples: for training, and of the Hessian.
        validation: images.
        batch_size: examples a step, and of the class gradients.
        lr: η.
        epochs: of the training.
        snapshots: minibatches whose class gradients are kept, at equal distances.
        curvatures: at one snapshot in so many the λ_k are held against the Hessian.
        eigenvalues: how many of the largest are computed at the end.
        tol: of their solve.
        probes: random vectors for the norms of the Hessian's two terms.

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
    found = images(job, data, examples, validation)
    model = made(job, partial(small_cnn, found.side, found.classes, channels=found.channels))
    hessian = so.HessianOperator(model, cross_entropy, (found.x, found.y))
    steps = epochs * (len(found.x) // batch_size)
    every = max(1, steps // snapshots)
    kept = Snapshots()

    def record(step: int) -> Row:
        batch = minibatch(len(found.x), batch_size, step, job.seed).to(found.x.device)
        curvature = class_gradients(model, found.classes, found.x[batch], found.y[batch])
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
        model,
        cross_entropy,
        (found.x, found.y),
        torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM),
        steps=steps,
        batch_size=batch_size,
        record=record,
        every=every,
        also=(kept,),
    )
    diverged = bool(rows[-1].get("diverged", False))
    if diverged:
        return {"diverged": True}
    solved = so.DominantSubspace(hessian, eigenvalues, refresh=1, tol=tol, seed=job.seed).update()
    basis = solved.first(found.classes)
    of_minibatches = [so.diagnostics.class_gradient_cosines(v, basis) for v in kept.vectors]
    of_all = class_gradients(model, found.classes, found.x, found.y).vectors
    last = of_minibatches[-1]
    # The rule of numpy and torch for the rank of a P×2C matrix, for numbers of single precision.
    tolerances = [basis.size * torch.finfo(torch.float32).eps, *SINES]
    return {
        "diverged": False,
        "size": basis.size,
        "classes": found.classes,
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
        "chance": list(so.diagnostics.chance_cosine(found.classes, basis.k, basis.size)),
        "second_term": second_term(job, hessian, (found.x, found.y), probes),
        "loss": hessian.loss(),
        "accuracy": _accuracy(model, found.x, found.y),
        "valid_accuracy": _accuracy(model, found.x_valid, found.y_valid),
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


def measure_cost(
    job: Job, *, network: Literal["cnn", "resnet9"], width: int, batch_size: int, momentum: float
) -> Raw:
    """Counts what a step keeps and what an observation takes, on random images of 32x32.

    Args:
        job: the seed.
        network: the small CNN, or a ResNet9, which has batch norm.
        width: of the ResNet9.
        batch_size: examples.
        momentum: μ; 0 leaves gradients as all that is kept.

    Returns:
        Parameters, classes, ``memory`` of each method in units of P after two steps, and the
        backward ``passes`` of an example in one observation.
    """
    classes, generator = 10, job.generator()
    x = torch.randn(batch_size, 3, 32, 32, generator=generator).to(job.device)
    y = (torch.arange(batch_size) % classes).to(job.device)
    makes = {
        "cnn": partial(small_cnn, 32, classes),
        "resnet9": partial(resnet9, classes, width=width),
    }
    memory, passes = {}, 0.0
    for method in UNDAMPED:
        model = made(job, makes[network])
        optimizer, subspace = optimizer_of(method, model, classes, 0.01, momentum)
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if subspace is not None:
                passes = backward_passes(model, partial(subspace.observe, x, y)) / batch_size
            optimizer.step()
        memory[method] = held(model, optimizer, subspace)
    size = sum(p.numel() for p in model.parameters())
    return {"size": size, "classes": classes, "memory": memory, "passes": passes}


def held(
    model: nn.Module, optimizer: Optimizer, subspace: so.ClassGradientSubspace | None
) -> float:
    """Returns the memory of gradients, optimizer and subspace, in gradients of the model."""
    parameters = list(model.parameters())
    tensors = [p.grad for p in parameters]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    if subspace is not None:
        basis = subspace.update()
        tensors += [basis.vectors, basis.eigenvalues]
        averages = vars(subspace._averages)  # noqa: SLF001 (a state dict would hold copies)
        tensors += averages.values()
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values()) / sum(p.nbytes for p in parameters)


def backward_passes(model: nn.Module, action: Callable[[], None]) -> int:
    """Returns how many examples the model's output was differentiated for while ``action`` ran."""
    counted = _Count()  # out of reach of an evaluation, which puts back what it can reach

    def count(gradient: Tensor) -> None:
        counted.total += len(gradient)

    def watch(_model: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.register_hook(count)

    handle = model.register_forward_hook(watch)
    try:
        action()
    finally:
        handle.remove()
    return counted.total


class _Count:
    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0
