"""What is measured for sections 2 and 5 of `class_gradient_2020`: class gradients, eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.experiment import minibatch
from benchmarks.losses import cross_entropy
from benchmarks.papers.class_gradient_2020.readings import DECAY, MOMENTUM
from benchmarks.papers.class_gradient_2020.runs import images, small_cnn
from benchmarks.papers.networks import made
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, column, performance, top_of, train

SINES: Final = (0.1, 0.5, 0.9)
"""Of angles above which a direction adds to the rank, beside the rule of linear algebra."""
OUTLIERS: Final[tuple[Literal["gap", "ratio", "elbow"], ...]] = ("gap", "ratio", "elbow")
"""Ways to count the eigenvalues that stand out."""


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
        Whether the training ``diverged``; then all that follows is NaN. Along the training, of the
        class gradients of one minibatch: their ``step``; ``ranks`` with the last C eigenvectors, a
        row for each of ``tolerances``; ``printed_ranks`` with the last C + 1, by the first of them;
        ``assigned`` cosines with them; ``kept``, the overlap of their span with that of the next
        minibatch which is kept; and ``ratios`` v_kᵀHv_k / λ_k of each class at some steps. At the
        end: of the ``last`` minibatch the ``cosines`` and their ``assignment``; ``eigenvalues``,
        their ``outliers`` by each method; the ``assigned`` cosine of the ``average`` of eq. 16; of
        all examples the ``assigned``
        cosine, the ``overlap`` with the eigenvectors and with the C ``following`` ones, the cosines
        of the principal ``angles``, and the cosines ``between`` classes; ``chance`` and its
        deviation; ``second_term``, its Frobenius norm relative to the Hessian's; and how far it was
        trained: ``loss`` and ``accuracy`` on the examples, ``valid_accuracy``.
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
        return _of_none(hessian.size, found.num_classes, eigenvalues)
    solved = top_of(hessian, eigenvalues, tol, job.seed)
    classes = found.num_classes
    basis, printed = solved.first(classes), solved.first(classes + 1)
    following = solved.vectors[classes : 2 * classes]
    vectors = column(rows, "vectors")
    of_minibatches = [so.diagnostics.class_gradient_cosines(v, basis) for v in vectors]
    of_all = class_gradients(model, found.num_classes, found.x_train, found.y_train).vectors
    averaged = so.diagnostics.class_gradient_cosines(average.update().vectors, basis)
    spans = [span(v) for v in vectors]
    # The rule of numpy and torch for the rank of a P×2C matrix, for numbers of single precision.
    tolerances = [basis.size * torch.finfo(torch.float32).eps, *SINES]
    return {
        "diverged": False,
        "size": basis.size,
        "classes": classes,
        "step": [row["step"] for row in rows],
        "tolerances": tolerances,
        "ranks": [
            [so.diagnostics.intersection_rank(v, basis, rtol=rtol) for v in vectors]
            for rtol in tolerances
        ],
        "printed_ranks": [
            so.diagnostics.intersection_rank(v, printed, rtol=tolerances[0]) for v in vectors
        ],
        "assigned": [matched.mean for matched in of_minibatches],
        "kept": [float(so.diagnostics.subspace_overlap(a, b)) for a, b in pairwise(spans)],
        "ratios": {str(row["step"]): row["ratios"] for row in rows if "ratios" in row},
        "eigenvalues": solved.eigenvalues.tolist(),
        "outliers": {
            method: so.diagnostics.count_outliers(solved.eigenvalues, method).count
            for method in OUTLIERS
        },
        "last": {
            "cosines": of_minibatches[-1].cosines.tolist(),
            "assignment": of_minibatches[-1].assignment.tolist(),
        },
        "average": {"assigned": averaged.mean},
        "of_all": {
            "assigned": so.diagnostics.class_gradient_cosines(of_all, basis).mean,
            "overlap": float(so.diagnostics.subspace_overlap(span(of_all), basis)),
            "following": float(so.diagnostics.subspace_overlap(span(of_all), following)),
            "angles": so.diagnostics.principal_angles(span(of_all), basis).cos().tolist(),
            "between": (of_all @ of_all.T).tolist(),
        },
        "chance": list(so.diagnostics.chance_cosine(classes, basis.k, basis.size)),
        "second_term": second_term(job, hessian, (found.x_train, found.y_train), probes),
        "loss": hessian.loss(),
        "accuracy": performance(model, found.x_train, found.y_train)["accuracy"],
        "valid_accuracy": performance(model, *valid)["accuracy"],
    }


def between_classes(job: Job, *, batch_size: int, lr: float, epochs: int, **part: Any) -> Raw:
    """Trains a small CNN by SGD, and takes the cosines between its class gradients.

    Returns:
        ``of_all``: the cosines ``between`` classes, of all examples; the ``accuracy`` on them, and
        the ``valid_accuracy``.
    """
    found = images(job, **part)
    valid = cast("tuple[Tensor, Tensor]", found.test)
    model = made(job, partial(small_cnn, found))
    problem = Problem(model, cross_entropy, found.x_train, found.y_train)
    steps = epochs * (len(found.x_train) // batch_size)
    train(job, "", problem, problem.sgd(lr, MOMENTUM), steps=steps, batch_size=batch_size)
    vectors = class_gradients(model, found.num_classes, found.x_train, found.y_train).vectors
    return {
        "of_all": {"between": (vectors @ vectors.T).tolist()},
        "accuracy": performance(model, found.x_train, found.y_train)["accuracy"],
        "valid_accuracy": performance(model, *valid)["accuracy"],
    }


def turned(job: Job, *, parameters: int, classes: int, angles: Sequence[float]) -> Raw:
    """Returns the rank of two spans together, the second being the first one turned by an angle.

    Args:
        job: the seed.
        parameters: P, the dimension of the space.
        classes: C, that of each span.
        angles: in degrees; each direction is turned by it, out of the first span.

    Returns:
        The ``rank`` at each of the ``angles``, by the rule of linear algebra for single precision.
    """
    drawn = torch.randn(parameters, 2 * classes, generator=job.generator(), dtype=torch.float64)
    first, out = torch.linalg.qr(drawn).Q.T.to(job.device).split(classes)
    ones = torch.ones(classes, dtype=torch.float64, device=job.device)
    basis = so.EigenBasis(ones, first, residuals=0 * ones)
    rule = parameters * torch.finfo(torch.float32).eps
    ranks = []
    for angle in angles:
        turn = math.radians(angle)
        second = math.cos(turn) * first + math.sin(turn) * out
        ranks.append(so.diagnostics.intersection_rank(second, basis, rtol=rule))
    return {"angles": list(angles), "ranks": ranks}


def _of_none(size: int, classes: int, eigenvalues: int) -> Raw:
    """Returns what there is to tell where SGD diverged: nothing, in the form of the rest."""
    none, row = math.nan, [math.nan] * classes
    matrix = [row] * classes
    return {
        "diverged": True,
        "size": size,
        "classes": classes,
        "step": [0],
        "tolerances": [none] * (1 + len(SINES)),
        "ranks": [[none]] * (1 + len(SINES)),
        "printed_ranks": [none],
        "assigned": [none],
        "kept": [none],
        "ratios": {"0": row},
        "eigenvalues": [none] * eigenvalues,
        "outliers": dict.fromkeys(OUTLIERS, none),
        "last": {"cosines": matrix, "assignment": [-1] * classes},
        "average": {"assigned": none},
        "of_all": dict.fromkeys(("assigned", "overlap", "following"), none)
        | {"angles": row, "between": matrix},
        "chance": [none, none],
        **dict.fromkeys(("second_term", "loss", "accuracy", "valid_accuracy"), none),
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
