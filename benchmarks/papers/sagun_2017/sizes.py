"""The sizes of all runs: on two CPU cores, and the paper's own."""

from __future__ import annotations

from typing import Final

from benchmarks.papers.reproduction import Run
from benchmarks.papers.sagun_2017.random_matrices import spiked, white
from benchmarks.papers.sagun_2017.runs import batches, clusters, growth, parts, phases, trivial

_TABLE: Final = {"examples": 1000, "inputs": 100, "hidden": 30, "steps": 10_000, "lr": 0.1}
_CLUSTERS: Final = (2, 5, 10, 20, 50)
_GD_TANH: Final = _TABLE | {
    "activation": "tanh",
    "batch_size": None,
    "covariances": (1.0,),
    "clusters": _CLUSTERS[:-1],
}
_GD_RELU: Final = _GD_TANH | {"activation": "relu", "clusters": _CLUSTERS}
_SGD_RELU: Final = _GD_RELU | {"batch_size": 10, "covariances": (1.0, 10.0)}
_MNIST: Final = {"data": "mnist-5k", "pool": 2, "examples": 1000, "lr": 0.1}
_GROWTH: Final = _MNIST | {
    "widths": (8, 12, 16, 24, 48, 96),
    "exact": 6000,
    "target": 0.01,
    "most": 10_000,
}
_BATCHES: Final = _MNIST | {"widths": (4, 8), "large": 500, "small": 20, "steps": 2000}
_PHASES: Final = {
    "data": "cifar10-5k",
    "pool": 2,
    "examples": 4000,
    "test": 2000,
    "widths": (8, 16, 16),
    "dense": (64,),
    "large": 500,
    "small": 32,
    "steps": 3000,
    "every": 75,
    "lr": 0.05,
}
_PARTS: Final = _MNIST | {"hidden": 24, "at": (0, 30, 100, 300, 1000, 3000, 10_000)}
_CLUSTER_PARTS: Final = _PARTS | {"data": None, "hidden": 30}
_TRIVIAL: Final = {
    "data": "mnist-5k",
    "pool": 4,
    "examples": (20, 50, 100),
    "hidden": 16,
    "steps": 3000,
    "lr": 0.1,
}
_WHITE: Final = {"parameters": 500, "ratios": (0.25, 0.5, 2.0)}
_SPIKED: Final = _WHITE | {"parameters": 1000, "spikes": (0.5, 1.5, 3.0), "draws": 5}

RUNS: Final = (
    Run("gd-tanh", "clusters: gradient descent, tanh", clusters, _GD_TANH, _GD_TANH),
    Run("gd-relu", "clusters: gradient descent, ReLU", clusters, _GD_RELU, _GD_RELU),
    Run("sgd-relu", "clusters: SGD, ReLU, two covariances", clusters, _SGD_RELU, _SGD_RELU),
    Run(
        "growth",
        "MNIST: wider and wider networks",
        growth,
        _GROWTH,
        _GROWTH | {"pool": 1, "widths": (10, 30, 100, 300)},
        version=2,
    ),
    Run(
        "batches",
        "MNIST: a convnet on large and on small batches",
        batches,
        _BATCHES,
        _BATCHES | {"pool": 1, "examples": 5000, "widths": (6, 12)},
    ),
    Run(
        "phases",
        "CIFAR-10: large batches, then small ones",
        phases,
        _PHASES,
        _PHASES
        | {
            "data": "cifar10",
            "pool": 1,
            "examples": 50_000,
            "test": 10_000,
            "widths": (64, 192, 256),
            "dense": (4096, 4096),
            "large": 1000,
            "steps": 25_000,
            "every": 100,
            "lr": 0.01,
        },
        seeds=4,
    ),
    Run("parts-mnist", "the parts of the Hessian on MNIST", parts, _PARTS, _PARTS),
    Run(
        "parts-clusters",
        "the parts of the Hessian on ten clusters",
        parts,
        _CLUSTER_PARTS,
        _CLUSTER_PARTS,
    ),
    Run("trivial", "zeros where there are few examples", trivial, _TRIVIAL, _TRIVIAL),
    Run("white", "a linear model on white data", white, _WHITE, _WHITE),
    Run("spiked", "a linear model, one large variance", spiked, _SPIKED, _SPIKED),
)
