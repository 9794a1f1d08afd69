"""The rows of Table 1 of `gur_ari_2018`: what is trained, and what the paper found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Case:
    """A row of Table 1.

    Attributes:
        dataset: as the table has it.
        network: as the table has it.
        comment: as the table has it.
        paper: its mean overlap.
        model: as of ``build``.
        random_labels: whether the labels of the training data are permuted.
        lr: η.
        batch_size: of the minibatches.
        adam: in the place of SGD.
    """

    dataset: str
    network: str
    comment: str
    paper: float
    model: str = "fc"
    random_labels: bool = False
    lr: float = 0.1
    batch_size: int = 64
    adam: bool = False


CASES: Final = {
    "softmax": Case("MNIST", "Softmax", "", 0.96, model="softmax"),
    "fc-softplus": Case("MNIST", "FC", "Softplus activation", 0.96, model="fc-softplus"),
    "fc-slow": Case("MNIST", "FC", "η = 0.01", 0.96, lr=0.01),
    "fc-batch-256": Case("MNIST", "FC", "Batch size 256", 0.97, batch_size=256),
    "fc-random": Case("MNIST", "FC", "Random labels", 0.86, random_labels=True),
    "convnet-random": Case(
        "CIFAR10", "ConvNet", "Random labels", 0.86, model="convnet", random_labels=True
    ),
    "convnet-dropout": Case(
        "CIFAR10",
        "ConvNet",
        "Dropout, batch-norm, extra dense layer",
        0.93,
        model="convnet-dropout",
    ),
    "convnet-adam": Case(
        "CIFAR10", "ConvNet", "Optimized using Adam", 0.89, model="convnet", adam=True, lr=1e-3
    ),
    "regression": Case("Regression", "FC", "Batch size 100", 0.99, batch_size=100),
}
"""By the names of their runs."""
