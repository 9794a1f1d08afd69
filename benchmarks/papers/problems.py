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
    train = _first_of_each(data.y_train, data.num_classes, examples)
    if test is None or data.y_test is None:
        return data.rows(train)
    return data.rows(train, _first_of_each(data.y_test, data.num_classes, test))


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
        part = subset(data, examples, test)
    else:
        part = data.rows(slice(examples), slice(test))
        length = int((part.x_train != 0).sum(dim=1).max())
        part = part.mapped(lambda x: x[:, :length])
    return part.mapped(lambda x: x.to(job.device), lambda y: y.to(job.device))


def images(job: Job, data: str, examples: int, test: int | None = None, pool: int = 1) -> Dataset:
    """Returns a part of a data set, each image ``(channels, side, side)``, pooled by a factor."""
    return as_images(pooled(real(data, job, examples, test), pool))


def pooled(data: Dataset, factor: int) -> Dataset:
    """Returns images of a ``factor``-th of the height and width, averaged; flat ones stay flat."""
    if factor == 1:
        return data
    flat = data.x_train.dim() == 2
    less = as_images(data).mapped(lambda x: functional.avg_pool2d(x, factor))
    return less.mapped(lambda x: x.flatten(1)) if flat else less


def as_images(data: Dataset) -> Dataset:
    """Returns flat images of one channel as ``(N, 1, side, side)``; others stay as they are."""
    if data.x_train.dim() != 2:
        return data
    side = math.isqrt(data.x_train.shape[1])
    return data.mapped(lambda x: x.unflatten(1, (1, side, side)))


def centred(data: Dataset) -> Dataset:
    """Returns standardised images with pixels from -1/2 to 1/2 in each channel.

    The ends are those of the images for training.
    """
    whole = as_images(data)
    low, high = (end(whole.x_train, (0, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
    return whole.mapped(lambda x: (x - low) / (high - low) - 0.5)


def relabelled(data: Dataset, classes: Tensor) -> Dataset:
    """Returns the data with class ``c`` called ``classes[c]``, such as even and odd for digits."""
    classes = classes.to(data.y_train.device)
    return replace(data.mapped(labels=lambda y: classes[y]), num_classes=int(classes.max()) + 1)


def first_classes(data: Dataset, count: int) -> Dataset:
    """Returns the examples of the classes below ``count``."""
    test = slice(None) if data.y_test is None else data.y_test < count
    return replace(data.rows(data.y_train < count, test), num_classes=count)


def randomly_labelled(data: Dataset, job: Job) -> Dataset:
    """Returns the training data with their labels permuted at random; the test data as they are."""
    order = torch.randperm(len(data.y_train), generator=job.generator()).to(data.y_train.device)
    return replace(data, y_train=data.y_train[order])


def blobs(
    clusters: int,
    examples: int,
    dimension: int,
    *,
    covariance: float,
    job: Job,
    between: float | None = None,
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
        between: scale of the covariance in the span of the centres, where it is another one: what
            is noise across that span makes the clusters no less separable.

    Returns:
        Inputs ``(examples, dimension)``, and classes.
    """
    generator = job.generator()
    y = torch.arange(examples) % clusters
    centres = torch.randn(clusters, dimension, generator=generator)
    noise = torch.randn(examples, dimension, generator=generator)
    x = centres[y] + math.sqrt(covariance) * noise
    if between is not None:
        span = torch.linalg.qr(centres.T).Q
        x += (math.sqrt(between) - math.sqrt(covariance)) * (noise @ span @ span.T)
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
