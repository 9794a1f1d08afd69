"""Architectures of today that the papers have not met, small enough to be read in one look.

============== ====================================================== ======================
model          what it is                                             parameters
============== ====================================================== ======================
ResNet18       torchvision's, batch norm included                     11.2 M
vit_tiny       a vision transformer of width 192, for small images    5.4 M
LanguageModel  GPT-2's decoder, at any width, depth and vocabulary    3.6 M as it is by default
============== ====================================================== ======================

All of them have a second derivative, but for the fused attention kernels: products take attention
in its mathematical form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import EncoderLayer

__all__ = ["LanguageModel", "ResNet18", "VisionTransformer", "next_token_loss", "vit_tiny"]


# --- transformers ------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """GPT-2's decoder (Radford et al. 2019): what follows each token, from those before it.

    Learned positions, pre-norm blocks with causal attention, one more norm at the end, and the
    token embedding once more as the output layer. Weights are drawn as GPT-2's: with a deviation
    of 0.02, those that add to the residual stream by ``1/√(2 layers)`` less; biases are 0.

    Args:
        vocabulary: tokens.
        length: the longest sequence.
        width: the model's dimension d.
        heads: of attention, in each block; they divide the width.
        layers: blocks.
    """

    def __init__(
        self, vocabulary: int, length: int, *, width: int = 192, heads: int = 6, layers: int = 6
    ) -> None:
        """Creates the embeddings and the blocks."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_stream = name.endswith(("project_out.weight", "feed_forward.2.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * layers) ** 0.5 if into_stream else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits ``(N, T, vocabulary)`` of token ids ``(N, T)``, T at most the length."""
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            hidden = block(hidden, causal=True)
        return functional.linear(self.norm(hidden), self.tokens.weight)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, mean over all tokens of all sequences: of equal lengths, over sequences too.

    Args:
        logits: ``(N, T, vocabulary)``.
        targets: the tokens that came next, ``(N, T)``.

    Returns:
        The loss, a scalar.
    """
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


class VisionTransformer(nn.Module):
    """Patches as tokens, with a class token whose last vector gives the scores.

    Pre-norm blocks and learned positions (Dosovitskiy et al. 2021).

    Args:
        side: height and width of an image, of three channels.
        outputs: scores.
        patch: height and width of a patch; it divides the side.
        width: the model's dimension.
        heads: of attention; they divide the width.
        layers: blocks.
    """

    def __init__(
        self, side: int, outputs: int, *, patch: int, width: int, heads: int, layers: int
    ) -> None:
        """Creates the embedding, the blocks and the head."""
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores ``(N, outputs)`` of images ``(N, 3, side, side)``."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        scores: Tensor = self.head(self.norm(self.blocks(hidden + self.positions))[:, 0])
        return scores


def vit_tiny(outputs: int, *, side: int = 32) -> VisionTransformer:
    """Returns ViT-Ti for small images: width 192, three heads, twelve layers, patches of 4x4."""
    return VisionTransformer(side, outputs, patch=4, width=192, heads=3, layers=12)


# --- convolutions ------------------------------------------------------------------------------


class ResNet18(nn.Module):
    """ResNet-18 as torchvision has it (He et al. 2016): its first layers quarter the image.

    ReLU is taken out of place, in four stages of two blocks.

    Args:
        outputs: scores.
        width: channels of the first stage; each of the others has twice as many as that before.
    """

    def __init__(self, outputs: int, *, width: int = 64) -> None:
        """Creates the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores ``(N, outputs)`` of images ``(N, 3, height, width)``."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = functional.max_pool2d(hidden, 3, stride=2, padding=1)
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        scores: Tensor = self.fc(hidden.mean(dim=(-2, -1)))
        return scores


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Residual(inputs, outputs, stride), _Residual(outputs, outputs, 1))


class _Residual(nn.Module):
    """``relu(shortcut(x) + conv(relu(conv(x))))``, each convolution with batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.downsample(x) + self.bn2(self.conv2(hidden)))
