"""The architectures of `song_2024` (appendix E.1), and which data sets they fit.

=========== =================================================== =================================
model       what it is                                          fits
=========== =================================================== =================================
mlp         in - 200 - 200 - out, tanh                          images
cnn         two 3x3 convolutions of 32 channels, linear head    images
transformer two encoder layers, d = 64, eight heads             sst2-1k
=========== =================================================== =================================

All of them have a second derivative and work under `torch.func`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.data import DATASETS, PADDING, Dataset

__all__ = ["CNN", "DEFAULT_MODEL", "FITS", "MODELS", "Transformer", "build", "default_lr", "mlp"]

MODELS: Final = ("mlp", "cnn", "transformer")

DEFAULT_MODEL: Final = {
    "mnist-5k": "mlp",
    "mnist": "mlp",
    "digits": "mlp",
    "cifar10-5k": "cnn",
    "cifar10": "cnn",
    "sst2-1k": "transformer",
}

_TEXT: Final = ("sst2-1k",)
_IMAGES: Final = tuple(name for name in DATASETS if name not in _TEXT)
FITS: Final = {"mlp": _IMAGES, "cnn": _IMAGES, "transformer": _TEXT}

_LEARNING_RATES: Final = {
    "mse": {"mlp": 0.01, "cnn": 0.001, "transformer": 0.001},
    "ce": {"mlp": 0.1, "cnn": 0.001, "transformer": 0.001},
}


def build(name: str, dataset: Dataset, *, num_outputs: int, seed: int) -> nn.Module:
    """A freshly initialised float32 model on the CPU that takes the inputs of a data set.

    Parameters are torch's defaults, drawn from the seed alone: the same arguments give the same
    model, and no random state outside is touched.

    Args:
        name: One of `MODELS`.
        dataset: The data whose inputs the model takes. The CNN sees flat images as squares of one
            channel: 1x28x28 for ``mnist-5k``, 1x8x8 for ``digits``.
        num_outputs: Scores an example, usually `Dataset.num_classes`.
        seed: The seed of the initialisation.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: There is no model of that name, or it does not take such inputs.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: allowed are {', '.join(MODELS)}")
    text = dataset.vocabulary is not None
    if text is not (name == "transformer"):
        fitting = [model for model in MODELS if (model == "transformer") is text]
        raise ValueError(
            f"model {name!r} does not take {dataset.name!r} ({'token ids' if text else 'images'}): "
            f"it fits {', '.join(FITS[name])}; {dataset.name!r} fits {', '.join(fitting)}"
        )
    shape = tuple(dataset.x_train.shape[1:])

    def make() -> nn.Module:
        if dataset.vocabulary is not None:
            return Transformer(dataset.vocabulary, shape[0], num_outputs)
        if name == "mlp":
            return mlp(math.prod(shape), num_outputs)
        side = math.isqrt(shape[0])
        channels, height, columns = shape if len(shape) == 3 else (1, side, side)
        return CNN((channels, height, columns), num_outputs)

    return drawn(seed, make)


def drawn(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose parameters are drawn from the seed alone, on the CPU."""
    # Only the CPU generator is seeded: torch.manual_seed would move those of the accelerators
    # too, and a fork of these warns where there are several. The numbers are the same.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return make()


def default_lr(data: str, loss: str) -> float:
    """The constant learning rate of SGD in `song_2024` (appendix E.3), with minibatches of 50.

    The paper has no experiment on ``digits``, which gets the rates of MNIST, and none on more than
    5,000 images.

    Args:
        data: One of `benchmarks.data.DATASETS`.
        loss: A key of `benchmarks.losses.LOSSES`: ``"mse"`` or ``"ce"``.

    Returns:
        The learning rate for the data set's model of `DEFAULT_MODEL`.
    """
    return _LEARNING_RATES[loss][DEFAULT_MODEL[data]]


# --- the models --------------------------------------------------------------------------------


def mlp(inputs: int, outputs: int, *, width: int = 200) -> nn.Sequential:
    """The paper's "3-layer MLP of width 200": two hidden tanh layers, inputs flattened first.

    Args:
        inputs: Numbers an example.
        outputs: Scores an example.
        width: Units of each hidden layer.

    Returns:
        A model of inputs (N, ...) with ``inputs`` numbers a row; its output is (N, outputs).
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, outputs),
    )


class CNN(nn.Module):
    """The paper's "3-layer CNN of width 32": two convolutions and a linear layer.

    Each convolution is 3x3 with padding 1, then ReLU, then 2x2 max pooling.

    Args:
        shape: Channels, height and width of an image; height and width are at least 4.
        outputs: Scores an example.
        width: Channels of each convolution.
    """

    def __init__(self, shape: tuple[int, int, int], outputs: int, *, width: int = 32) -> None:
        """Creates the layers."""
        super().__init__()
        channels, height, columns = shape
        self.shape = shape
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width * (height // 4) * (columns // 4), outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, outputs) of images (N, channels, height, width), which may come flat."""
        hidden = images.reshape(images.shape[0], *self.shape)
        hidden = functional.max_pool2d(functional.relu(self.conv1(hidden)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        scores: Tensor = self.head(hidden.flatten(1))
        return scores


class Transformer(nn.Module):
    """A text classifier: two encoder layers, masked mean pooling, a linear head.

    Token and position embeddings are learned and added. The paper gives two layers, d = 64 and
    eight heads; the rest is our choice: feed-forward width 256 (4 d); *pre-norm*, which trains
    more steadily at a constant rate than post-norm, so with one more layer norm at the end; the
    exact GELU, which is twice differentiable everywhere, as ReLU is not; no dropout; torch's
    default initialisation. Padding (id 0) is hidden from attention and left out of the mean.

    The fused attention kernels have no second derivative: for Hessian products, call the model
    under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        vocabulary: Number of token ids.
        length: The longest sentence that the model takes, in tokens.
        outputs: Scores an example.
        width: The model's dimension d.
        heads: Attention heads a layer; they divide `width`.
        layers: Encoder layers.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        outputs: int,
        *,
        width: int = 64,
        heads: int = 8,
        layers: int = 2,
    ) -> None:
        """Creates the embeddings, the layers and the head."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (N, outputs) of token ids (N, T), T at most the model's length.

        Args:
            tokens: Token ids, int64, filled up with 0. A sentence of padding alone has an empty
                mean, which is taken as 0: its scores are the head's bias.

        Returns:
            The scores, shape (N, outputs).
        """
        length = tokens.shape[-1]
        real = tokens != PADDING
        # A softmax over no key is 0 / 0, and what comes of it differs between kernels: a sentence
        # of padding alone attends to its padding instead, and the mean below leaves it out.
        keys = real | ~real.any(dim=-1, keepdim=True)
        hidden = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for layer in self.layers:
            hidden = layer(hidden, keys)
        weights = real.unsqueeze(-1).to(hidden.dtype)
        mean = (weights * self.norm(hidden)).sum(dim=-2) / weights.sum(dim=-2).clamp(min=1)
        scores: Tensor = self.head(mean)
        return scores


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward layer, each on normalised inputs and added to them.

    ``h = x + attention(norm(x))``; ``h + feed_forward(norm(h))``, feed-forward width ``4 width``.

    Args:
        width: The model's dimension.
        heads: Attention heads; they divide `width`.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Creates the two sublayers."""
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, hidden: Tensor, keys: Tensor | None = None, *, causal: bool = False
    ) -> Tensor:
        """The layer's output, shaped like its input.

        Args:
            hidden: One vector a token, shape (N, T, width).
            keys: True where a token may be attended to, shape (N, T); else to all of them.
            causal: A token attends to itself and to those before it; not beside `keys`.

        Returns:
            One vector a token, shape (N, T, width).
        """
        hidden = hidden + self._attention(self.attention_norm(hidden), keys, causal=causal)
        output: Tensor = hidden + self.feed_forward(self.feed_forward_norm(hidden))
        return output

    def _attention(self, hidden: Tensor, keys: Tensor | None, *, causal: bool) -> Tensor:
        # (N, T, 3 width) -> three of (N, heads, T, width / heads)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for part in self.project_in(hidden).chunk(3, dim=-1)
        )
        # The same for every head and every query.
        mask = None if keys is None else keys[..., None, None, :]
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal
        )
        output: Tensor = self.project_out(mixed.transpose(-3, -2).flatten(-2))
        return output
