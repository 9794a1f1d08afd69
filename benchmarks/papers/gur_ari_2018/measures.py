"""The networks and data of `gur_ari_2018`, and what is measured at one point of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.losses import cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.networks import fully_connected, made, resnet, simple_convnet
from benchmarks.papers.reproduction import Job
from benchmarks.papers.training import Problem
from subspace_optim.diagnostics import hessian_gradient_overlap

Loss = Callable[[Tensor, Tensor], Tensor]
_CHUNK: Final = 1000  # images of a batch of the Hessian, so that its graphs stay small


# --- models and data ---------------------------------------------------------------------------


def build(job: Job, model: str, data: Dataset, width: int) -> nn.Module:
    """Returns one of the paper's models for these images.

    Args:
        job: seed and device.
        model: ``softmax``, ``fc``, ``fc-softplus``, ``convnet``, ``convnet-dropout`` (and batch
            norm, and a second dense layer), or ``resnet``.
        data: the images.
        width: of a hidden layer, of the first convolution, or of the first stage.
    """
    pixels, classes = data.x_train[0].numel(), data.num_classes
    channels, side = data.x_train.shape[1], data.x_train.shape[-1]
    more = model == "convnet-dropout"
    makers: dict[str, Callable[[], nn.Module]] = {
        "softmax": lambda: fully_connected((pixels, classes)),
        "fc": lambda: fully_connected((pixels, width, width, classes)),
        "fc-softplus": lambda: fully_connected((pixels, width, width, classes), nn.Softplus),
        "convnet": lambda: simple_convnet(
            side, classes, channels=channels, width=width, dense=16 * width, more=more
        ),
        "resnet": lambda: resnet(
            classes, (width, 2 * width, 4 * width, 8 * width), 2, channels=channels
        ),
    }
    return made(job, makers["convnet" if more else model])


def images(job: Job, data: str, examples: int, test: int = 0, factor: int = 1) -> Dataset:
    """Returns a part of a data set, without a test set unless it is asked for."""
    return problems.images(job, data, examples, test, factor)


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """Returns half the squared error, a mean over examples: the loss of the regression."""
    return 0.5 * (output - target).square().sum(dim=-1).mean()


def whole_hessian(problem: Problem) -> so.HessianOperator:
    """Returns the Hessian over all examples; coloured images in chunks, for the memory."""
    coloured = problem.x.dim() == 4 and problem.x.shape[1] > 1
    return problem.hessian(_CHUNK if coloured else None)


def of_test(model: nn.Module, data: Dataset) -> so.HessianOperator | None:
    """Returns the Hessian of the cross-entropy over the test set, if there is one."""
    return data.test and whole_hessian(Problem(model, cross_entropy, *data.test))


# --- what is measured at one point -------------------------------------------------------------


def overlap_of(operator: so.CurvatureOperator) -> float:
    """Returns the overlap of g and Hg (eq. 3)."""
    return mean_overlap(operator, operator.gradient()[None])


def mean_overlap(operator: so.CurvatureOperator, vectors: Tensor) -> float:
    """Returns the mean overlap of the rows of ``vectors`` with their products."""
    with operator.frozen():
        products = operator.matmat(vectors)
    operator.release()
    pairs = zip(vectors, products, strict=True)
    return sum(float(hessian_gradient_overlap(w, p)) for w, p in pairs) / len(vectors)


def decrease(operator: so.CurvatureOperator, top: so.EigenBasis, lr: float) -> float:
    """Returns by how much a step along g_top lowers the loss, over what one along g does.

    To first order in the rate it is f_top.
    """
    gradient, start = operator.gradient(), operator.loss()
    whole = start - _loss_after(operator, -lr * gradient)
    return (start - _loss_after(operator, -lr * top.project(gradient))) / whole


def _loss_after(operator: so.CurvatureOperator, move: Tensor) -> float:
    tensors = operator.parameters.tensors
    theta = parameters_to_vector(tensors).detach()
    vector_to_parameters(theta + move, tensors)
    loss = operator.loss()
    vector_to_parameters(theta, tensors)
    return loss
