"""What is measured for `class_gradient_2020` along trainings, by the sizes of `runs.toml`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.losses import cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.class_gradient_2020.readings import optimizer_of
from benchmarks.papers.networks import lenet, made, resnet9, without_norm
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, column, performance, train

HOPELESS: Final = 1e4
"""A training whose validation loss is above this is over: thousands of times that at the start."""


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
    normed: bool = True,
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
        normed: whether it has batch norm.
        part: of the data, as ``images`` has it.

    Returns:
        Steps an epoch, and a curve for each method and rate, with a row for each epoch.
    """
    found = images(job, **part)

    def make() -> nn.Module:
        whole = resnet9(found.num_classes, channels=found.x_train.shape[1], width=width)
        if not normed:
            without_norm(whole)
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
