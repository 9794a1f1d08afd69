"""The architectures of the papers that ``benchmarks.models`` does not have.

All take images ``(N, channels, height, width)``; ``fully_connected`` takes flat inputs too. Widths
scale every layer, so that a network of another width is the same in shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.models import drawn
from benchmarks.papers.reproduction import Job


def made(job: Job, make: Callable[[], nn.Module]) -> nn.Module:
    """Returns a model whose parameters are drawn from the seed, on the job's device."""
    return drawn(job.seed, make).to(job.device)


def fully_connected(sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Returns linear layers of these sizes, inputs and outputs included, activations between."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def lenet(
    side: int, channels: int, widths: Sequence[int], dense: Sequence[int], *, padding: int
) -> nn.Sequential:
    """Returns convolutions of 5x5, each with ReLU and 2x2 pooling, and linear layers.

    Args:
        side: height and width of an image.
        channels: of an image.
        widths: of the convolutions.
        dense: of the linear layers, the last of which gives the scores.
        padding: of the convolutions; 2 keeps the size.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
        channels, side = width, (side + 2 * padding - 4) // 2
    return nn.Sequential(*layers, *fully_connected((channels * side * side, *dense)))


def simple_convnet(
    side: int,
    outputs: int,
    *,
    channels: int = 3,
    width: int = 32,
    dense: int = 512,
    more: bool = False,
) -> nn.Sequential:
    """Returns the CIFAR-10 example of Keras that `gur_ari_2018` trains.

    Two convolutions of ``width`` and pooling, two of ``2 width`` and pooling, a dense layer, and
    the head; ReLU, 3x3, the second convolution of each pair without padding.

    Args:
        side: height and width of an image, at least 10.
        outputs: scores.
        channels: of an image.
        width: of the first two convolutions.
        dense: units of the dense layer.
        more: with dropout (0.25, 0.25, 0.5), batch norm after each convolution, and a second dense
            layer.
    """

    def drop(rate: float) -> list[nn.Module]:
        return [nn.Dropout(rate)] if more else []

    layers: list[nn.Module] = []
    for wide in (width, 2 * width):
        for padding in (1, 0):
            norm = [nn.BatchNorm2d(wide)] if more else []
            layers += [nn.Conv2d(channels, wide, 3, padding=padding), *norm, nn.ReLU()]
            channels = wide
        layers += [nn.MaxPool2d(2), *drop(0.25)]
        side = (side - 2) // 2
    layers += [nn.Flatten(), nn.Linear(channels * side * side, dense), nn.ReLU(), *drop(0.5)]
    if more:
        layers += [nn.Linear(dense, dense), nn.ReLU(), *drop(0.5)]
    return nn.Sequential(*layers, nn.Linear(dense, outputs))


def vgg11(outputs: int, *, channels: int = 3, width: int = 64) -> nn.Sequential:
    """Returns VGG11 for images of 32x32: eight convolutions, five poolings, one linear layer.

    Widths 1, 2, 4, 4, 8, 8, 8, 8 times ``width``, ReLU, no batch norm (Simonyan & Zisserman 2014,
    configuration A; the linear layers of its head are one, as is usual for CIFAR-10). Weights are
    drawn as He et al. 2015 do: with torch's default the signal dies out in so deep a plain network.
    """
    layers: list[nn.Module] = []
    inputs = channels
    for multiple in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0):  # 0: pooling
        if multiple:
            layers += [nn.Conv2d(inputs, multiple * width, 3, padding=1), nn.ReLU()]
            inputs = multiple * width
        else:
            layers.append(nn.MaxPool2d(2))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # None only with bias=False
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, outputs))


def _normed(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """A convolution with batch norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class _Block(nn.Module):
    """``relu(shortcut(x) + conv(relu(conv(x))))``, each convolution with batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normed(inputs, outputs, stride), *_normed(outputs, outputs)[:-1]
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


def resnet(outputs: int, stages: Sequence[int], blocks: int, *, channels: int = 3) -> nn.Sequential:
    """Returns a residual network for small images (He et al. 2016, section 4.2).

    A convolution, then ``blocks`` blocks of two convolutions for each width in ``stages``, all but
    the first stage halving the image, the mean over it, and a linear layer. ResNet8 is
    ``resnet(10, (16, 32, 64), 1)``, ResNet-18 ``resnet(10, (64, 128, 256, 512), 2)``.
    """
    width = stages[0]
    layers = _normed(channels, width)
    for number, wide in enumerate(stages):
        for block in range(blocks):
            layers.append(_Block(width, wide, 2 if number and not block else 1))
            width = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


class _Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = x + self.body(x)
        return grown


class _Scaled(nn.Module):
    """``factor · x``."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def resnet9(outputs: int, *, channels: int = 3, width: int = 64) -> nn.Sequential:
    """Returns the ResNet9 of the DAWNBench entries (6.6M parameters at width 64).

    Convolutions of 1, 2, 4, 8 times ``width``, the last three with pooling, and a residual pair
    after the second and the fourth; the maximum over what is left of the image, a linear layer, and
    an eighth of its outputs.
    """

    def residual(wide: int) -> nn.Module:
        return _Residual(*_normed(wide, wide), *_normed(wide, wide))

    return nn.Sequential(
        *_normed(channels, width),
        *_normed(width, 2 * width),
        nn.MaxPool2d(2),
        residual(2 * width),
        *_normed(2 * width, 4 * width),
        nn.MaxPool2d(2),
        *_normed(4 * width, 8 * width),
        nn.MaxPool2d(2),
        residual(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, outputs),
        _Scaled(0.125),
    )


def without_norm(model: nn.Module) -> nn.Module:
    """Takes the batch norm out of a model's convolutions, in place, and returns it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


class ByLength(nn.Module):
    """A model of sentences that sees them by length, a few together, with no more padding than so.

    Its outputs are the model's own, up to rounding; half of the sentences of SST-2 have seven words
    or less, and the longest of a thousand has fifty.

    Args:
        model: of tokens ``(N, T)``, 0 where a sentence is over.
        together: sentences that are padded to the longest of them.
    """

    def __init__(self, model: nn.Module, together: int = 25) -> None:
        super().__init__()
        self.model, self.together = model, together

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of token ids, in the order in which they come."""
        lengths = (tokens != 0).sum(dim=1)
        order = lengths.argsort()
        outputs = [
            self.model(tokens[part, : max(1, int(lengths[part[-1]]))])
            for part in order.split(self.together)
        ]
        return torch.cat(outputs)[order.argsort()]
