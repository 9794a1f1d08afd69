"""What is measured for appendix B of `class_gradient_2020`: memory, and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.losses import cross_entropy
from benchmarks.papers.class_gradient_2020.readings import optimizer_of
from benchmarks.papers.class_gradient_2020.runs import small_cnn
from benchmarks.papers.networks import made, resnet9
from benchmarks.papers.reproduction import Job, Raw

METHODS: Final = ("sgd", "printed", "orthogonal")


def cost(
    job: Job, *, network: Literal["cnn", "resnet9"], width: int, batch_size: int, momentum: float
) -> Raw:
    """Counts what a step keeps and what an observation takes, on random images of 32x32.

    Returns:
        Parameters, classes, ``memory`` of each method in units of P after two steps, and the
        backward ``passes`` of an example in one observation.
    """
    classes, generator = 10, job.generator()
    x = torch.randn(batch_size, 3, 32, 32, generator=generator).to(job.device)
    y = (torch.arange(batch_size) % classes).to(job.device)
    random = Dataset("random", x, y, None, None, classes, "")
    makes = {"cnn": partial(small_cnn, random), "resnet9": partial(resnet9, classes, width=width)}
    memory, passes = {}, 0.0
    for method in METHODS:
        model = made(job, makes[network])
        optimizer, subspace = optimizer_of(method, model, classes, 0.01, momentum)
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if subspace is not None:
                passes = backward_passes(model, partial(subspace.observe, x, y)) / batch_size
            optimizer.step()
        memory[method] = held(model, optimizer, subspace)
    size = sum(p.numel() for p in model.parameters())
    return {"size": size, "classes": classes, "memory": memory, "passes": passes}


def held(
    model: nn.Module, optimizer: Optimizer, subspace: so.ClassGradientSubspace | None
) -> float:
    """Returns the memory of gradients, optimizer and subspace, in gradients of the model."""
    parameters = list(model.parameters())
    tensors = [p.grad for p in parameters]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    if subspace is not None:
        basis = subspace.update()
        tensors += [basis.vectors, basis.eigenvalues]
        averages = vars(subspace._averages)  # noqa: SLF001 (a state dict would hold copies)
        tensors += averages.values()
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values()) / sum(p.nbytes for p in parameters)


def backward_passes(model: nn.Module, action: Callable[[], None]) -> int:
    """Returns how many examples the model's output was differentiated for while ``action`` ran."""
    counted = _Count()  # out of reach of an evaluation, which puts back what it can reach

    def count(gradient: Tensor) -> None:
        counted.total += len(gradient)

    def watch(_model: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.register_hook(count)

    handle = model.register_forward_hook(watch)
    try:
        action()
    finally:
        handle.remove()
    return counted.total


class _Count:
    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0
