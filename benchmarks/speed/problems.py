"""What is measured: a model, its loss and its data, at states along one run of SGD.

=========== ============================================== ==========
problem     what it is                                     parameters
=========== ============================================== ==========
mlp         the paper's MLP on 5,000 MNIST images            199,210
cnn         the paper's CNN on 1,000 CIFAR-10 images          30,634
cnn-5k      the same on 5,000 images                          30,634
transformer the paper's transformer on 1,000 sentences       293,570
resnet18    torchvision's ResNet-18 on 5,000 CIFAR images     11.2 M
gpt2        a transformer of GPT-2's size on 100 sentences     124 M
=========== ============================================== ==========

The last two are meant for a GPU. Models are in eval mode, so that batch norm is a fixed function
for every library; the loss is the papers' squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import subspace_optim as so
from benchmarks.data import Dataset, load
from benchmarks.experiment import minibatch
from benchmarks.losses import mse
from benchmarks.models import Transformer, build, default_lr, drawn
from benchmarks.progress import doing

BATCH_SIZE: Final = 50


@dataclass
class Problem:
    """A model on its data; all vectors are in the order of ``model.parameters()``.

    Attributes:
        name: a key of ``PROBLEMS``.
        model: in eval mode, on the device.
        x: all inputs.
        y: all class numbers.
        k: dimension of the subspace.
        lr: learning rate of SGD.
        seed: of the order of its minibatches.
        states: parameters after so many steps of SGD, as far as they were asked for.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    k: int
    lr: float
    seed: int = 0
    states: dict[int, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.model.parameters())

    def hessian(self, memory_budget: int | None = None) -> so.HessianOperator:
        """Returns a new operator: nothing is known of any state yet."""
        data = (self.x, self.y)
        return so.HessianOperator(self.model, mse, data, memory_budget=memory_budget)

    def gradient(self) -> None:
        """One gradient over all the data: the unit of every cost."""
        self.model.zero_grad()
        mse(self.model(self.x), self.y).backward()

    def theta(self) -> Tensor:
        """Returns a copy of the parameters as one vector."""
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()

    @torch.no_grad()
    def set_theta(self, theta: Tensor) -> None:
        """Writes the parameters, and forgets their gradients."""
        self.model.zero_grad()
        pieces = theta.split([p.numel() for p in self.model.parameters()])
        for p, piece in zip(self.model.parameters(), pieces, strict=True):
            p.copy_(piece.view(p.shape))

    def step(self, optimizer: torch.optim.Optimizer, step: int, *, full: bool = False) -> None:
        """One step of training: on the minibatch of that number, or on all the data."""
        batch: Tensor | slice = slice(None)
        if not full:
            batch = minibatch(len(self.x), BATCH_SIZE, step, seed=self.seed).to(self.x.device)
        optimizer.zero_grad()
        mse(self.model(self.x[batch]), self.y[batch]).backward()
        optimizer.step()

    def move_to(self, step: int) -> None:
        """Sets the parameters to those after ``step`` steps of SGD, trained to once."""
        if step not in self.states:
            first = max(known for known in self.states if known < step)
            self.set_theta(self.states[first])
            sgd = torch.optim.SGD(self.model.parameters(), lr=self.lr)
            with doing("training with SGD", step) as task:
                for number in range(first, step):
                    self.step(sgd, number)
                    task.at(number + 1)
            self.states[step] = self.theta()
        self.set_theta(self.states[step])


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention without the fused kernels, which have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _named(model: str) -> Callable[[Dataset, int], nn.Module]:
    return lambda data, seed: build(model, data, num_outputs=data.num_classes, seed=seed)


def _resnet18(data: Dataset, _: int) -> nn.Module:
    from torchvision.models import resnet18  # noqa: PLC0415 (comes with the peers)

    model: nn.Module = resnet18(num_classes=data.num_classes)
    return model


def _gpt2(data: Dataset, _: int) -> nn.Module:
    """GPT-2's vocabulary, width, heads and layers; the sentences use a part of the vocabulary."""
    length = data.x_train.shape[1]
    return Transformer(50_257, length, data.num_classes, width=768, heads=12, layers=12)


PROBLEMS: Final[dict[str, tuple[str, int, Callable[[Dataset, int], nn.Module]]]] = {
    "mlp": ("mnist-5k", 5000, _named("mlp")),
    "cnn": ("cifar10-5k", 1000, _named("cnn")),
    "cnn-5k": ("cifar10-5k", 5000, _named("cnn")),
    "transformer": ("sst2-1k", 1000, _named("transformer")),
    "resnet18": ("cifar10-5k", 5000, _resnet18),
    "gpt2": ("sst2-1k", 100, _gpt2),
}
"""Data set, examples, model."""


def problem(
    name: str,
    *,
    root: str | None = None,
    device: str = "cpu",
    examples: int | None = None,
    seed: int = 0,
) -> Problem:
    """Returns the problem of that name at its initial parameters.

    The subspace has as many dimensions as there are classes, as in the paper.

    Args:
        name: a key of ``PROBLEMS``.
        root: folder of the data sets, as ``benchmarks.data.load`` has it.
        device: where to compute.
        examples: drawn evenly from the data (default: as the table says).
        seed: of the initial parameters and the minibatches.

    Returns:
        The problem.
    """
    dataset, count, make = PROBLEMS[name]
    data = load(dataset, root=root)
    count = min(examples or count, count)
    chosen = torch.arange(min(count, len(data.x_train)))
    if dataset == "mnist-5k":  # sorted by class: the first ones would be zeros
        chosen = chosen * len(data.x_train) // len(chosen)
    made = Problem(
        name,
        drawn(seed, lambda: make(data, seed)).eval().to(device),
        data.x_train[chosen].to(device),
        data.y_train[chosen].to(device),
        data.num_classes,
        default_lr(dataset, "mse"),
        seed,
    )
    made.states[0] = made.theta()
    return made
