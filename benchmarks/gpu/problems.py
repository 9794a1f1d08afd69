"""Three problems of a GPU's size, and in miniature; drawn images where no real ones are at hand."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn

from benchmarks.architectures import LanguageModel, ResNet18, next_token_loss
from benchmarks.data import DataUnavailableError, load
from benchmarks.models import drawn, mlp
from benchmarks.speed.problems import Problem
from benchmarks.text import windows

Size = Literal["full", "tiny"]
NAMES: Final = ("mlp", "resnet18", "gpt2")
_CLASSES: Final = 10
_K: Final = {"full": 10, "tiny": 3}
_EXAMPLES: Final = {
    "full": {"mlp": 5000, "resnet18": 1000, "gpt2": 64},
    "tiny": {"mlp": 60, "resnet18": 12, "gpt2": 6},
}
_STEPS: Final = {"full": 50, "tiny": 3}
"""Of SGD, before anything is measured: an initial state is like no other."""


def made(name: str, size: Size, root: str | None, device: str) -> Problem:
    """Returns a problem, a few steps of SGD from its initial parameters.

    Args:
        name: of ``NAMES``.
        size: ``"full"`` for a GPU.
        root: folder of the data sets.
        device: where it is.

    Returns:
        The problem.
    """
    examples = _EXAMPLES[size][name]
    make = {"mlp": _mlp, "resnet18": _resnet18, "gpt2": _gpt2}[name]
    problem = make(size, examples, root)
    problem.model.eval().to(device)
    problem.x, problem.y = problem.x.to(device), problem.y.to(device)
    problem.states[0] = problem.theta()
    problem.move_to(_STEPS[size])
    return problem


def _mlp(size: Size, examples: int, root: str | None) -> Problem:
    x, y = _images("mnist-5k", examples, root)
    model = drawn(0, lambda: mlp(x[0].numel(), _CLASSES, width=200 if size == "full" else 8))
    return Problem("mlp", model, x, y, _K[size], 0.01)


def _resnet18(size: Size, examples: int, root: str | None) -> Problem:
    x, y = _images("cifar10-5k", examples, root)
    if size == "tiny":
        x = x[..., ::2, ::2]
    model = drawn(0, lambda: ResNet18(_CLASSES, width=64 if size == "full" else 2))
    return Problem("resnet18", model, x, y, _K[size], 0.001)


def _gpt2(size: Size, examples: int, root: str | None) -> Problem:
    """GPT-2's vocabulary, width, heads and layers; the text uses a part of the vocabulary."""

    def model() -> nn.Module:
        if size == "full":
            return LanguageModel(50_257, 32, width=768, heads=12, layers=12)
        return LanguageModel(100, 8, width=16, heads=2, layers=2)

    length, words = (32, 4000) if size == "full" else (8, 100)
    text = windows(root, count=examples, length=length, vocabulary=words)
    return Problem(
        "gpt2", drawn(0, model), text.tokens, text.following, _K[size], 0.1, loss=next_token_loss
    )


def _images(dataset: str, examples: int, root: str | None) -> tuple[Tensor, Tensor]:
    """Images and their classes, evenly from the data; drawn ones around the mean of a class."""
    shape = (784,) if dataset == "mnist-5k" else (3, 32, 32)
    try:
        data = load(dataset, root=root)
    except DataUnavailableError:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(examples) % _CLASSES
        means = torch.randn(_CLASSES, *shape, generator=generator)
        return means[labels] + torch.randn(examples, *shape, generator=generator), labels
    chosen = torch.arange(examples) * len(data.x_train) // examples
    return data.x_train[chosen], data.y_train[chosen]
