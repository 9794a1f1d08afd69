"""The sizes of all runs: on two CPU cores, and the paper's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from benchmarks.papers.gur_ari_2018.runs import (
    CASES,
    evolution,
    newton,
    right_edge,
    spectrum,
    table_row,
)
from benchmarks.papers.gur_ari_2018.solvable import mixture, two_samples
from benchmarks.papers.reproduction import Run

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
    "examples": 1500,
    "test": 200,
    "dimensions": _DIMENSIONS,
    "bases_at": (0, 50, 100, 150, 200, 300),
    "steps": 500,
    "every": 50,
}
_WHOLE: Final = {"data": "mnist", "examples": 60_000, "test": 10_000}
_WHOLE_CIFAR: Final = {"data": "cifar10", "examples": 50_000, "test": 10_000, "factor": 1}


def _row(case: str) -> Run:
    """A row of Table 1."""
    of = CASES[case]
    small: dict[str, Any] = {"case": case, "steps": 3000, "last": 1000, "every": 50}
    paper: dict[str, Any] = small | {"every": 10}
    if of.dataset == "Regression":
        same = {"data": "sine", "width": 100, "examples": 1000, "test": 1000, "factor": 1}
        small, paper = small | same, paper | same
    elif of.dataset == "MNIST":
        same = {"data": "mnist-5k", "width": 100, "factor": 1}
        at: tuple[int, ...] = (0, 25, 50, 100, 200, 400, 700, 1000, 1500, 2000, 2500, 3000)
        small |= same | {"examples": 5000, "test": 2000, "f_top_at": at}
        paper |= same | _WHOLE | {"f_top_at": at}
    else:
        at = (0, 100, 300, 700, 1500, 3000) if of.adam else ()
        small |= {"data": "cifar10-5k", "width": 16, "factor": 2, "f_top_at": at}
        small |= {"examples": 3000, "test": 1000}
        paper |= {"width": 32, "f_top_at": at} | _WHOLE_CIFAR
    words = " ".join(part for part in (of.dataset, of.network, of.comment) if part)
    return Run(case, f"{words}: the overlap of g and Hg", table_row, small, paper)


def _spectrum(name: str, labels: str, what: str, *, examples: int = 5000, epochs: int = 40) -> Run:
    small = {"labels": labels, "data": "mnist-5k", "factor": 4, "width": 32}
    small |= {"examples": examples, "epochs": epochs}
    paper = small | {"data": "mnist", "factor": 1, "examples": 60_000, "epochs": 40}
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
    # So few images, and for so long, that the network fits their labels.
    _spectrum("spectrum-random", "random", "random labels", examples=1000, epochs=1000),
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
        data="mnist",
        factor=1,
        examples=60_000,
    ),
)
