"""The data of the reproductions: parts of real data, other labels, and drawn data."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.data import Dataset, DataUnavailableError, load
from benchmarks.papers.reproduction import Job


def subset(data: Dataset, examples: int, test: int | None = None) -> Dataset:
    """Returns the first examples of each class, as equally many as can be, in the data's order.

    Args:
        data: the whole.
        examples: for training; all where there are fewer.
        test: for testing (default: all).
    """
    chosen = _first_of_each(data.y_train, data.num_classes, examples)
    part = replace(data, x_train=data.x_train[chosen], y_train=data.y_train[chosen])
    if test is None or data.x_test is None or data.y_test is None:
        return part
    chosen = _first_of_each(data.y_test, data.num_classes, test)
    return replace(part, x_test=data.x_test[chosen], y_test=data.y_test[chosen])


def _first_of_each(labels: Tensor, classes: int, examples: int) -> Tensor:
    """Indices, in order; the first ``examples % classes`` classes have one more."""
    if examples >= len(labels):
        return torch.arange(len(labels))
    share, more = divmod(examples, classes)
    members = (torch.nonzero(labels == c).flatten() for c in range(classes))
    parts = [indices[: share + (c < more)] for c, indices in enumerate(members)]
    return torch.cat(parts).sort().values


def real(name: str, job: Job, examples: int, test: int | None = None) -> Dataset:
    """Returns a part of a real data set of ``benchmarks.data``, on the job's device.

    SST-2 is cut to its first sentences, as the paper has it, and to the longest of these.

    Raises:
        DataUnavailableError: there are fewer examples than asked for.
    """
    data = load(name, root=job.root)
    if examples > len(data.x_train):
        raise DataUnavailableError(
            f"{examples} examples of {name!r} were asked for, and there are {len(data.x_train)}. "
            "A folder with the whole data set would have them: --data-root."
        )
    if data.vocabulary is None:
        return to(subset(data, examples, test), job.device)
    x, y = data.x_train[:examples], data.y_train[:examples]
    length = int((x != 0).sum(dim=1).max())
    x_test = None if data.x_test is None else data.x_test[:test, :length]
    y_test = None if data.y_test is None else data.y_test[:test]
    part = replace(data, x_train=x[:, :length], y_train=y, x_test=x_test, y_test=y_test)
    return to(part, job.device)


def to(data: Dataset, device: torch.device) -> Dataset:
    """Returns the data on that device."""
    return replace(
        data,
        x_train=data.x_train.to(device),
        y_train=data.y_train.to(device),
        x_test=None if data.x_test is None else data.x_test.to(device),
        y_test=None if data.y_test is None else data.y_test.to(device),
    )


def pooled(data: Dataset, factor: int) -> Dataset:
    """Returns images of a ``factor``-th of the height and width, averaged; flat ones stay flat."""

    def smaller(x: Tensor | None) -> Tensor | None:
        if x is None or factor == 1:
            return x
        side = math.isqrt(x.shape[1]) if x.dim() == 2 else 0
        images = x.unflatten(1, (1, side, side)) if side else x
        less = functional.avg_pool2d(images, factor)
        return less.flatten(1) if side else less

    x_train = smaller(data.x_train)
    assert x_train is not None  # noqa: S101 (for the type checker)
    return replace(data, x_train=x_train, x_test=smaller(data.x_test))


def as_images(data: Dataset) -> Dataset:
    """Returns flat images of one channel as ``(N, 1, side, side)``; others stay as they are."""
    if data.x_train.dim() != 2:
        return data
    side = math.isqrt(data.x_train.shape[1])
    x_test = None if data.x_test is None else data.x_test.unflatten(1, (1, side, side))
    return replace(data, x_train=data.x_train.unflatten(1, (1, side, side)), x_test=x_test)


def relabelled(data: Dataset, classes: Tensor) -> Dataset:
    """Returns the data with class ``c`` called ``classes[c]``, such as even and odd for digits."""
    classes = classes.to(data.y_train.device)
    y_test = None if data.y_test is None else classes[data.y_test]
    count = int(classes.max()) + 1
    return replace(data, y_train=classes[data.y_train], y_test=y_test, num_classes=count)


def randomly_labelled(data: Dataset, job: Job) -> Dataset:
    """Returns the training data with their labels permuted at random; the test data as they are."""
    order = torch.randperm(len(data.y_train), generator=job.generator()).to(data.y_train.device)
    return replace(data, y_train=data.y_train[order])


def blobs(
    clusters: int, examples: int, dimension: int, *, covariance: float, job: Job
) -> tuple[Tensor, Tensor]:
    """Returns Gaussian clusters, their centres standard normal, normalised globally.

    ``x = m_y + √covariance · ξ``, with ``m_c`` and ξ standard normal; then the mean over all
    entries is subtracted and their standard deviation divided by.

    Args:
        clusters: and classes.
        examples: as equally many of each as can be.
        dimension: of the inputs.
        covariance: scale of the covariance of the clusters.
        job: the seed.

    Returns:
        Inputs ``(examples, dimension)``, and classes.
    """
    generator = job.generator()
    y = torch.arange(examples) % clusters
    centres = torch.randn(clusters, dimension, generator=generator)
    noise = torch.randn(examples, dimension, generator=generator)
    x = centres[y] + math.sqrt(covariance) * noise
    x = (x - x.mean()) / x.std()
    return x.to(job.device), y.to(job.device)


def sine(examples: int, *, noise: float, job: Job) -> tuple[Tensor, Tensor]:
    """Returns one period of a sine with Gaussian noise, ``y = sin x + noise · ξ``, x in [-π, π].

    Returns:
        Inputs and targets, both ``(examples, 1)``.
    """
    generator = job.generator()
    x = math.pi * (2 * torch.rand(examples, 1, generator=generator) - 1)
    y = torch.sin(x) + noise * torch.randn(examples, 1, generator=generator)
    return x.to(job.device), y.to(job.device)
