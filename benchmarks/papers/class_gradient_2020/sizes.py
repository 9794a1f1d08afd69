"""The sizes of all runs: on two CPU cores, and the paper's own."""

from __future__ import annotations

from typing import Any, Final

from benchmarks.papers.class_gradient_2020.runs import (
    Method,
    measure_batches,
    measure_class_gradients,
    measure_cost,
    measure_rates,
)
from benchmarks.papers.reproduction import Run

_CIFAR: Final = {"data": "cifar10-5k", "examples": 2000, "validation": 1000, "pool": 2}
_WHOLE: Final = {"data": "cifar10", "examples": 45_000, "validation": 5000}
_RESNET9: Final = _CIFAR | {"width": 8, "batch_size": 100, "rates": (0.1, 0.05, 0.01), "epochs": 24}
_RESNET9_PAPER: Final = (
    _RESNET9 | _WHOLE | {"pool": 1, "width": 64, "batch_size": 128, "epochs": 30}
)
_ABOVE: Final = {"rates": (0.2, 0.4), "methods": ("sgd", "printed")}
_MNIST: Final = {
    "data": "mnist-5k",
    "examples": 3000,
    "validation": 1000,
    "batch_sizes": (64, 512, 3000),
    "lr": 0.01,
    "steps": 500,
    "records": 50,
}
_MNIST_PAPER: Final = _MNIST | {
    "data": "mnist",
    "examples": 50_000,
    "validation": 10_000,
    "batch_sizes": (1024, 4096, 16_384, 65_535),
    "steps": 2000,
    "records": 200,
}
_CLASSES: Final = {
    "data": "cifar10-5k",
    "examples": 2000,
    "validation": 1000,
    "batch_size": 100,
    "lr": 0.1,
    "epochs": 30,
    "snapshots": 40,
    "curvatures": 20,
    "eigenvalues": 30,
    "tol": 1e-3,
    "probes": 10,
}


def _rates(name: str, what: str, methods: tuple[Method, ...], **other: Any) -> Run:
    """ResNet9 at several rates; ``other``: of the run."""
    size = {"methods": methods}
    return Run(name, what, measure_rates, _RESNET9 | size, _RESNET9_PAPER | size, **other)


def _batches(name: str, what: str, methods: tuple[Method, ...], **other: Any) -> Run:
    """A small CNN with several batch sizes; ``other``: of the run."""
    size = {"methods": methods}
    return Run(name, what, measure_batches, _MNIST | size, _MNIST_PAPER | size, version=2, **other)


RUNS: Final = (
    _rates(
        "resnet9",
        "ResNet9 on CIFAR-10 by SGD and by the quasi-Newton method as printed, at three rates",
        ("sgd", "printed"),
        version=3,
        seeds=4,
    ),
    _rates(
        "resnet9-orthogonal",
        "the same by the quasi-Newton method with orthogonal vectors in eq. 15",
        ("orthogonal",),
        version=3,
    ),
    _rates(
        "resnet9-damped",
        "the same by the damped quasi-Newton method",
        ("damped",),
        version=3,
    ),
    _rates(
        "resnet9-readings",
        "the same with one of the two that make the damped method, the other as printed",
        ("slowed", "added"),
    ),
    Run(
        "above-0.1",
        "ResNet9 on CIFAR-10 by SGD and by the method as printed, at rates above 0.1",
        measure_rates,
        _RESNET9 | _ABOVE,
        _RESNET9_PAPER | _ABOVE,
        version=3,
    ),
    _batches(
        "batch-sizes",
        "a small CNN on MNIST by SGD and by the quasi-Newton method as printed",
        ("sgd", "printed"),
        seeds=4,
    ),
    _batches(
        "batch-sizes-orthogonal",
        "the same by the quasi-Newton method with orthogonal vectors in eq. 15",
        ("orthogonal",),
    ),
    _batches(
        "batch-sizes-damped",
        "the same by the damped quasi-Newton method",
        ("damped",),
    ),
    Run(
        "class-gradients",
        "class gradients of a small CNN on CIFAR-10 beside its top eigenvectors",
        measure_class_gradients,
        _CLASSES,
        _CLASSES | _WHOLE | {"batch_size": 128, "epochs": 50},
        version=2,
    ),
    Run(
        "cost-cnn",
        "memory and passes of a small CNN",
        measure_cost,
        {"network": "cnn", "width": 8, "batch_size": 50, "momentum": 0.0},
        {"network": "cnn", "width": 64, "batch_size": 128, "momentum": 0.0},
    ),
    Run(
        "cost-resnet9",
        "memory and passes of a ResNet9",
        measure_cost,
        {"network": "resnet9", "width": 8, "batch_size": 50, "momentum": 0.0},
        {"network": "resnet9", "width": 64, "batch_size": 128, "momentum": 0.0},
        version=2,
    ),
)
