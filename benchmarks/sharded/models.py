"""The models whose costs are asked for: GPT-2's decoder at three sizes, sharded by its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.architectures import LanguageModel


@dataclass(frozen=True)
class Shape:
    """A decoder, and the data of a rank: one batch.

    Attributes:
        width: of the model, d.
        layers: blocks, L.
        heads: of attention in each.
        vocabulary: tokens, V.
        length: of a sequence, T.
        sequences: in the batch of a rank.
    """

    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    sequences: int = 1

    @property
    def groups(self) -> int:
        """What ``fully_shard`` gathers apart: the blocks, and the rest with the model."""
        return self.layers + 1

    @property
    def block_shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters of a block."""
        d = self.width
        linear = [(3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
        return [*linear, (d,), (d,), (d,), (d,)]

    @property
    def root_shapes(self) -> list[tuple[int, ...]]:
        """Of the other parameters; the output layer is the embedding of the tokens."""
        return [(self.vocabulary, self.width), (self.length, self.width), *[(self.width,)] * 2]

    @property
    def parameters(self) -> int:
        """P."""
        block = sum(map(_elements, self.block_shapes))
        return self.layers * block + sum(map(_elements, self.root_shapes))


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


SHAPES: Final = {
    "1B": Shape(width=2048, layers=18, heads=16, vocabulary=50_257, length=1024),
    "10B": Shape(width=4096, layers=48, heads=32, vocabulary=50_257, length=1024),
    # Small enough for real ranks on a CPU; 601 rows are not divided evenly by 2 or 4.
    "1M": Shape(width=128, layers=4, heads=4, vocabulary=601, length=32, sequences=4),
}


def made(shape: Shape, device: str = "cpu") -> nn.Module:
    """Returns the model, whole: the same on all ranks, where it has memory."""
    torch.manual_seed(0)
    with torch.device(device):
        return LanguageModel(
            shape.vocabulary,
            shape.length,
            width=shape.width,
            heads=shape.heads,
            layers=shape.layers,
        )


def sharded(model: Any, ranks: int) -> Any:
    """Divides the blocks, and the rest with the model, over ``ranks``."""
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(shape: Shape, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns drawn sequences, and what follows each of their tokens."""
    size = (shape.sequences, shape.length + 1)
    if device == "meta":
        drawn = torch.empty(size, dtype=torch.int64, device=device)
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(shape.vocabulary, size, generator=generator)
    return drawn[:, :-1], drawn[:, 1:]
