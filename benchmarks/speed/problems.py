"""What is measured: a model, its loss and its data, at states along one run of SGD.

=========== ============================================== ==========
problem     what it is                                     parameters
=========== ============================================== ==========
mlp         the paper's MLP on 5,000 MNIST images            199,210
cnn         the paper's CNN on 1,000 CIFAR-10 images          30,634
cnn-5k      the same on 5,000 images                          30,634
transformer the paper's transformer on 1,000 sentences       293,570
resnet18    torchvision's ResNet-18 on 5,000 CIFAR images     11.2 M
vit         ViT-Ti on 5,000 CIFAR images                       5.4 M
language    GPT-2's decoder, small, on 1,024 sequences         3.4 M
phrases     the same, smaller, on 256 sequences                1.3 M
gpt2        the same, of GPT-2's size, on 64 sequences         124 M
=========== ============================================== ==========

The last five, but for ``phrases``, are meant for a GPU. Models are in eval mode, so that batch norm
is a fixed function for every library. The loss is the papers' squared error; of the decoders,
cross-entropy of the next token.
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
from benchmarks.architectures import LanguageModel, ResNet18, next_token_loss, vit_tiny
from benchmarks.data import Dataset, load
from benchmarks.experiment import minibatch
from benchmarks.losses import mse
from benchmarks.models import build, default_lr, drawn
from benchmarks.progress import doing
from benchmarks.text import windows

BATCH_SIZE: Final = 50


@dataclass
class Problem:
    """A model on its data; all vectors are in the order of ``model.parameters()``.

    Attributes:
        name: a key of ``PROBLEMS`` or ``DECODERS``.
        model: in eval mode, on the device.
        x: all inputs.
        y: all class numbers, or the tokens that follow.
        k: dimension of the subspace.
        lr: learning rate of SGD.
        seed: of the order of its minibatches.
        loss: of outputs and ``y``, a mean over examples.
        states: parameters after so many steps of SGD, as far as they were asked for.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    k: int
    lr: float
    seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = mse
    states: dict[int, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.model.parameters())

    def hessian(self, memory_budget: int | None = None) -> so.HessianOperator:
        """Returns a new operator: nothing is known of any state yet."""
        data = (self.x, self.y)
        return so.HessianOperator(self.model, self.loss, data, memory_budget=memory_budget)

    def gradient(self) -> None:
        """One gradient over all the data: the unit of every cost."""
        self.model.zero_grad()
        self.loss(self.model(self.x), self.y).backward()

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
        self.loss(self.model(self.x[batch]), self.y[batch]).backward()
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


PROBLEMS: Final[dict[str, tuple[str, int, Callable[[Dataset, int], nn.Module]]]] = {
    "mlp": ("mnist-5k", 5000, _named("mlp")),
    "cnn": ("cifar10-5k", 1000, _named("cnn")),
    "cnn-5k": ("cifar10-5k", 5000, _named("cnn")),
    "transformer": ("sst2-1k", 1000, _named("transformer")),
    "resnet18": ("cifar10-5k", 5000, lambda data, _: ResNet18(data.num_classes)),
    "vit": ("cifar10-5k", 5000, lambda data, _: vit_tiny(data.num_classes)),
}
"""Data set, examples, model."""

_WORDS: Final = 4000
_LENGTH: Final = 32
DECODERS: Final[dict[str, tuple[int, Callable[[], LanguageModel]]]] = {
    "language": (1024, lambda: LanguageModel(_WORDS, _LENGTH)),
    "phrases": (256, lambda: LanguageModel(_WORDS, _LENGTH, width=128, heads=4, layers=4)),
    # The text uses a part of the vocabulary.
    "gpt2": (64, lambda: LanguageModel(50_257, _LENGTH, width=768, heads=12, layers=12)),
}
"""Sequences, model."""


def problem(
    name: str,
    *,
    root: str | None = None,
    device: str = "cpu",
    examples: int | None = None,
    seed: int = 0,
) -> Problem:
    """Returns the problem of that name at its initial parameters.

    The subspace has as many dimensions as there are classes, as in the paper; of a decoder, 10.

    Args:
        name: a key of ``PROBLEMS`` or ``DECODERS``.
        root: folder of the data sets, as ``benchmarks.data.load`` has it.
        device: where to compute.
        examples: drawn evenly from the data (default: as the table says).
        seed: of the initial parameters and the minibatches.

    Returns:
        The problem.
    """
    if name in DECODERS:
        return _decoder(name, root, device, examples, seed)
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


def _decoder(name: str, root: str | None, device: str, examples: int | None, seed: int) -> Problem:
    """A language model, on windows of text."""
    count, make = DECODERS[name]
    text = windows(root, count=min(examples or count, count), length=_LENGTH, vocabulary=_WORDS)
    model = drawn(seed, make).eval().to(device)
    x, y = text.tokens.to(device), text.following.to(device)
    made = Problem(name, model, x, y, 10, 0.1, seed, next_token_loss)
    made.states[0] = made.theta()
    return made
