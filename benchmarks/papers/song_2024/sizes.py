"""The sizes of all runs: on two CPU cores, and the paper's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from benchmarks.papers.reproduction import Raw, Run
from benchmarks.papers.song_2024.runs import (
    at_the_edge,
    critical_experiment,
    effective_rates,
    small_rate,
    switching,
    toy_quadratic,
)

_AS_THE_PAPER: Final = {
    "last_switch": 20_000,
    "steps": 10_000,
    "look": 10,
    "measure": 10,
    "spectrum": 100,
}

_STANDARD_AS_THE_PAPER: Final = {
    "examples": 5000,
    "chunk": 1000,
    "last_switch": 20_000,
    "steps": 5000,
    "look": 20,
    "measure": 20,
    "spectrum": 100,
    "tol": 1e-3,
}

_CRITICAL: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "mlp-mse": (
        "the MLP on MNIST, squared error: SGD, then SGD, Dom-SGD, Bulk-SGD",
        {
            "model": "mlp",
            "loss": "mse",
            "lr": 0.01,
            "width": 200,
            "examples": 5000,
            "last_switch": 10000,
            "steps": 2000,
            "look": 200,
            "measure": 100,
            "spectrum": 1000,
        },
        _AS_THE_PAPER,
    ),
    "cnn-mse": (
        "the CNN on CIFAR-10, squared error: the same",
        {
            "model": "cnn",
            "loss": "mse",
            "lr": 0.001,
            "width": 32,
            "examples": 1000,
            "chunk": 50,
            "last_switch": 12000,
            "steps": 200,
            "look": 2000,
            "measure": 20,
            "spectrum": 4000,
        },
        {
            "examples": 5000,
            "chunk": 1000,
            **_AS_THE_PAPER,
        },
    ),
    "transformer-mse": (
        "the transformer on SST-2, squared error: the same",
        {
            "model": "transformer",
            "loss": "mse",
            "lr": 0.001,
            "width": 64,
            "examples": 500,
            "chunk": 50,
            "last_switch": 3000,
            "steps": 200,
            "look": 500,
            "measure": 20,
            "spectrum": 1500,
        },
        {
            "examples": 1000,
            "chunk": None,
            **_AS_THE_PAPER,
        },
    ),
    "mlp-ce": (
        "the MLP on MNIST, cross-entropy: SGD, then SGD and Dom-SGD",
        {
            "model": "mlp",
            "loss": "ce",
            "lr": 0.1,
            "width": 200,
            "examples": 5000,
            "last_switch": 2000,
            "steps": 150,
            "look": 50,
            "measure": 15,
            "spectrum": 100,
        },
        {
            "examples": 5000,
            **_AS_THE_PAPER,
        },
    ),
    "cnn-ce": (
        "the CNN on CIFAR-10, cross-entropy: the same",
        {
            "model": "cnn",
            "loss": "ce",
            "lr": 0.001,
            "width": 32,
            "examples": 1000,
            "pool": 2,
            "chunk": 50,
            "last_switch": 20000,
            "steps": 100,
            "look": 2000,
            "measure": 10,
            "spectrum": 5000,
        },
        {
            "examples": 5000,
            "pool": 1,
            "chunk": 1000,
            **_AS_THE_PAPER,
        },
    ),
    "transformer-ce": (
        "the transformer on SST-2, cross-entropy: the same",
        {
            "model": "transformer",
            "loss": "ce",
            "lr": 0.001,
            "width": 64,
            "examples": 500,
            "chunk": 50,
            "last_switch": 3000,
            "steps": 150,
            "look": 500,
            "measure": 15,
            "spectrum": 1500,
        },
        {
            "examples": 1000,
            "chunk": None,
            **_AS_THE_PAPER,
        },
    ),
    "vgg11": (
        "VGG11 on CIFAR-10, squared error: the same",
        {
            "model": "vgg11",
            "loss": "mse",
            "lr": 0.01,
            "width": 8,
            "examples": 500,
            "chunk": 50,
            "last_switch": 4000,
            "steps": 50,
            "look": 400,
            "measure": 5,
            "spectrum": 2000,
            "tol": 1e-2,
        },
        {
            "width": 64,
            **_STANDARD_AS_THE_PAPER,
        },
    ),
    "resnet8": (
        "ResNet8 on CIFAR-10, squared error: the same",
        {
            "model": "resnet8",
            "loss": "mse",
            "lr": 0.01,
            "width": 8,
            "examples": 500,
            "pool": 2,
            "chunk": 50,
            "last_switch": 3000,
            "steps": 50,
            "look": 300,
            "measure": 5,
            "spectrum": 1500,
            "tol": 1e-2,
        },
        {
            "width": 16,
            "pool": 1,
            **_STANDARD_AS_THE_PAPER,
        },
    ),
}
"""What it is, its small size, and what is other at the paper's."""

_DOM_ALONE: Final = ("mlp-ce", "cnn-ce", "transformer-ce", "vgg11", "resnet8")
"""Where the paper does not show Bulk-SGD."""

_SMALL_RATE: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "mlp": (
        {"lr": 0.01, "width": 200, "examples": 2000, "steps": 3000, "every": 250},
        {"examples": 5000, "steps": 20_000, "every": 100},
    ),
    "cnn": (
        {"lr": 0.001, "width": 32, "examples": 500, "pool": 2, "steps": 2000, "every": 250},
        {"examples": 5000, "pool": 1, "steps": 20_000, "every": 100},
    ),
    "transformer": (
        {"lr": 0.001, "width": 64, "examples": 100, "steps": 1000, "every": 125},
        {"examples": 1000, "steps": 20_000, "every": 100},
    ),
}

_RATES: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "transformer": (
        {"lr": 0.01, "adam_lr": 1e-3, "width": 64, "examples": 100, "steps": 1000, "every": 50},
        {"examples": 1000, "every": 1},
    ),
    "mlp": (
        {"lr": 0.01, "adam_lr": 1e-3, "width": 200, "examples": 1000, "steps": 1000, "every": 50},
        {"examples": 5000, "every": 1},
    ),
    "cnn": (
        {
            "lr": 1e-3,
            "adam_lr": 1e-4,
            "width": 32,
            "examples": 250,
            "pool": 2,
            "chunk": 50,
            "steps": 1000,
            "every": 50,
        },
        {"examples": 5000, "pool": 1, "chunk": 1000, "every": 1},
    ),
}


def _critical(name: str) -> Run:
    what, small, paper = _CRITICAL[name]
    branches = ("SGD", "DomSGD") if name in _DOM_ALONE else ("SGD", "DomSGD", "BulkSGD")
    small = small | {"optimizers": branches, "average": 0.5}
    paper = small | {"tol": 1e-3, "refresh": 1, "average": 0.9} | paper
    return Run(f"sgd-{name}", what, critical_experiment, small, paper, version=2)


def _of_model(
    prefix: str,
    what: str,
    measure: Callable[..., Raw],
    sizes: Mapping[str, tuple[dict[str, Any], dict[str, Any]]],
    version: int = 1,
) -> list[Run]:
    return [
        Run(
            f"{prefix}-{model}",
            f"the {model}: {what}",
            measure,
            small | {"model": model},
            small | paper | {"model": model},
            version,
        )
        for model, (small, paper) in sizes.items()
    ]


_EDGE: Final = {"width": 200, "every": 100, "measure": 20}
_EDGE_PAPER: Final = _EDGE | {"examples": 5000, "refresh": 1}

RUNS: Final = (
    *(_critical(name) for name in _CRITICAL),
    Run(
        "switching",
        "the MLP: SGD and then GD, GD and then SGD",
        switching,
        {
            "lr": 0.01,
            "width": 200,
            "examples": 2000,
            "sgd_first": 5000,
            "gd_first": 2000,
            "after": 1000,
        },
        {
            "lr": 0.01,
            "width": 200,
            "examples": 5000,
            "sgd_first": 20_000,
            "gd_first": 20_000,
            "after": 10_000,
        },
    ),
    *_of_model("gd", "GD and SGD at a small rate", small_rate, _SMALL_RATE),
    Run(
        "toy",
        "the toy quadratic",
        toy_quadratic,
        {"lr": 1e-4, "steps": 20_000, "keep": 100},
        {"lr": 1e-4, "steps": 20_000, "keep": 100},
        version=2,
    ),
    Run(
        "edge",
        "the MLP: GD at the edge of stability, then GD, Dom-GD, Bulk-GD",
        at_the_edge,
        _EDGE | {"rho": 0.0, "lr": 0.1, "examples": 1000, "switch": 2500, "after": 600},
        _EDGE_PAPER | {"rho": 0.0, "lr": 0.1, "switch": 2500, "after": 2500},
        version=2,
    ),
    Run(
        "sam",
        "the MLP: SAM at its edge of stability, then SAM, Dom-SAM, Bulk-SAM",
        at_the_edge,
        _EDGE
        | {"rho": 0.1, "lr": 0.01, "examples": 1000, "switch": 5000, "every": 200, "after": 600},
        _EDGE_PAPER | {"rho": 0.1, "lr": 0.01, "switch": 5000, "after": 5000},
        version=2,
    ),
    *_of_model("rates", "effective rates of GD and Adam", effective_rates, _RATES, version=2),
)
