"""The networks and data of `gur_ari_2018`, and what is measured at one point of a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import subspace_optim as so
from benchmarks.data import Dataset, DataUnavailableError
from benchmarks.experiment import minibatch
from benchmarks.losses import cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.networks import fully_connected, made, resnet, simple_convnet
from benchmarks.papers.reproduction import Job
from benchmarks.papers.training import Problem, Row, top_of
from subspace_optim.curvature.contexts import in_mode, seeded
from subspace_optim.diagnostics import gradient_fraction, hessian_gradient_overlap

Loss = Callable[[Tensor, Tensor], Tensor]
Mode = Literal["train", "eval"]
LR: Final = 0.1  # and ...
BATCH: Final = 64  # ... of the paper's trainings, but for some of Table 1
DRAWS: Final = 8  # random vectors for a mean overlap
COARSE: Final = 1e-2  # a residual that is small enough for f_top and the largest eigenvalue
_EXCHANGED: Final = 5000  # of the training images of MNIST, from which those for testing are taken
_SETTLED: Final = 50  # minibatches, after which 0.5 % of the first statistics are left
_CHUNK: Final = 1000  # images of a batch of the Hessian, so that its graphs stay small


# --- models and data ---------------------------------------------------------------------------


def build(job: Job, model: str, data: Dataset, width: int, start: str = "torch") -> nn.Module:
    """Returns one of the paper's models for these images.

    Args:
        job: seed and device.
        model: ``softmax``, ``fc``, ``fc-softplus``, ``convnet``, ``convnet-dropout`` (and batch
            norm, and a second dense layer), or ``resnet``.
        data: the images.
        width: of a hidden layer, of the first convolution, or of the first stage.
        start: ``torch`` or ``glorot``: how initial parameters are drawn.
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
    maker = makers["convnet" if more else model]
    return made(job, maker if start == "torch" else lambda: glorot(maker()))


def glorot(model: nn.Module) -> nn.Module:
    """Returns a model with weights drawn anew as Keras does: Glorot's uniform, biases 0."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def images(
    job: Job, data: str, examples: int, test: int = 0, factor: int = 1, centred: bool = False
) -> Dataset:
    """Returns a part of a data set, without a test set unless it is asked for.

    ``mnist-exchanged`` trains on the 10,000 images of MNIST's test set, which are more than
    ``mnist-5k`` has, and tests on images of its training set. Pixels are standardised, or from -1/2
    to 1/2 if ``centred``.
    """
    if data == "mnist-exchanged":
        whole = exchanged(problems.real("mnist", job, _EXCHANGED))
        part = problems.subset(whole, examples, test)
    else:
        part = problems.real(data, job, examples, test)
    return problems.as_images(problems.pooled(problems.centred(part) if centred else part, factor))


def exchanged(data: Dataset) -> Dataset:
    """Returns a data set with its test set for training, and the other way round.

    Raises:
        DataUnavailableError: it has no test set.
    """
    if data.test is None:
        raise DataUnavailableError(f"{data.name} has no test set to train on")
    x, y = data.test
    return replace(data, x_train=x, y_train=y, x_test=data.x_train, y_test=data.y_train)


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """Returns half the squared error, a mean over examples: the loss of the regression."""
    return 0.5 * (output - target).square().sum(dim=-1).mean()


def of_all_labels(output: Tensor, _: Tensor) -> Tensor:
    """Returns the cross-entropy of each example with every label, a mean over labels: of none."""
    return -output.log_softmax(dim=-1).mean()


@torch.no_grad()
def settle(problem: Problem, seed: int) -> None:
    """Gives running statistics their values at the start, as minibatches of training do.

    They begin at 0 and 1: until training has moved them, a network in eval mode is another one
    than that which is trained.
    """
    with in_mode(problem.model, "train"), seeded(problem.x.device, seed):
        for step in range(_SETTLED):
            batch = minibatch(len(problem.x), BATCH, step, seed).to(problem.x.device)
            problem.model(problem.x[batch])


def whole_hessian(problem: Problem, mode: Mode | None = None) -> so.HessianOperator:
    """Returns the Hessian over all examples; coloured images in chunks, for the memory.

    Args:
        problem: of the loss.
        mode: of the model; ``None``: that of training.
    """
    coloured = problem.x.dim() == 4 and problem.x.shape[1] > 1
    return problem.hessian(_CHUNK if coloured else len(problem.x), mode)


def of_test(
    model: nn.Module, data: Dataset, mode: Mode | None = None, loss_fn: Loss = cross_entropy
) -> so.HessianOperator | None:
    """Returns the Hessian of a loss over the test set, if there is one."""
    return data.test and whole_hessian(Problem(model, loss_fn, *data.test), mode)


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


def overlap_within(operator: so.CurvatureOperator, top: so.EigenBasis, weights: Tensor) -> float:
    """Returns the mean overlap of vectors of a subspace with their products.

    Args:
        operator: the Hessian.
        top: a basis of the subspace; its products are all that is needed.
        weights: a row of coefficients for each vector.
    """
    with operator.frozen():
        products = operator.matmat(top.vectors)
    operator.release()
    weights = weights.to(top.vectors)
    pairs = zip(weights @ top.vectors, weights @ products, strict=True)
    return sum(float(hessian_gradient_overlap(w, p)) for w, p in pairs) / len(weights)


def f_top(hessian: so.HessianOperator, k: int, tol: float = COARSE) -> float:
    """Returns the part of the squared gradient in the top k eigenvectors, solved for to ``tol``."""
    return float(gradient_fraction(hessian.gradient(), top_of(hessian, k, tol)))


def cheap(hessian: so.HessianOperator, tested: so.HessianOperator | None) -> Row:
    """Returns what a gradient and a product on each set tell."""
    row: Row = {"loss": hessian.loss(), "overlap": overlap_of(hessian)}
    return row | {"overlap_test": math.nan if tested is None else overlap_of(tested)}


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
