r"""What a sharded decoder costs, in closed form, and the seconds that counts stand for.

P parameters on R ranks in G groups, blocks and the rest; S bytes are all parameters in float32,
each padded to R equal shards, ``S_0`` those of the rest and ``S_1`` those of a block. F are the
floating-point operations of a forward pass of a rank's batch; b batches, j products in a block.

========================== =============================== ======================== =============
piece                      bytes gathered                  bytes scattered          operations
========================== =============================== ======================== =============
gradient, or graph, kept   ``b S``                         ``b S``                  ``3 b F``
the same, not kept         ``2 b S``                       ``b S``                  ``3 b F``
products, kept             ``j b S``                       ``j b S``                ``6 j b F``
products, streamed         ``b (2S + j (3S − S_0 − S_1))`` ``b (S + 2 j S)``        ``b (3 + 6j) F``
========================== =============================== ======================== =============

Each ``S`` is G collectives. A product gathers the vector, as the forward pass does the parameters,
and scatters the result. Where parameters do not stay gathered it gathers them again, on its way
through the backward pass and then back through the forward pass; where it turns, and at the end,
a group is still there. Then it also scatters what it has found of a group on both ways: twice.
Beside these there are sums of a few numbers: meetings, and the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Final, Literal

from benchmarks.sharded.meter import Counts
from benchmarks.sharded.models import Shape

Piece = Literal["gradient", "graph", "product", "two products"]
_FLOAT: Final = 4


def padded(shapes: list[tuple[int, ...]], ranks: int) -> int:
    """Returns the bytes of parameters, whose first dimension is padded to equal shards."""
    return sum(_FLOAT * ranks * ceil(s[0] / ranks) * prod(s[1:]) for s in shapes)


def forward_flops(shape: Shape) -> int:
    """Returns the operations of matrix products in a forward pass of a rank's batch."""
    d, tokens = shape.width, shape.sequences * shape.length
    linear = 2 * tokens * (12 * d * d * shape.layers + shape.vocabulary * d)
    attention = 4 * tokens * shape.length * d * shape.layers
    return linear + attention


@dataclass(frozen=True)
class Traffic:
    """What a rank sends and computes.

    Attributes:
        gathers: all-gathers of a group.
        gathered: bytes that they bring together.
        scatters: reduce-scatters of a group.
        scattered: bytes that they sum.
        sums: all-reduces, of a few numbers each.
        flops: floating-point operations of matrix products.
    """

    gathers: int
    gathered: int
    scatters: int
    scattered: int
    sums: int
    flops: int


def traffic(piece: Piece, shape: Shape, ranks: int, *, kept: bool, batches: int = 1) -> Traffic:
    """Returns what a piece costs, as the table of this module says.

    Args:
        piece: a gradient; the graphs of all gradients; or further blocks of one or two products.
        shape: of the model.
        ranks: that it is sharded over.
        kept: whether graphs and gathered parameters stay.
        batches: of each rank.
    """
    root, block = padded(shape.root_shapes, ranks), padded(shape.block_shapes, ranks)
    groups, size, F = shape.groups, root + shape.layers * block, forward_flops(shape)
    passes = 1 if kept else 2  # of gathering in a gradient
    gathers, gathered, scatters, scattered = passes * groups, passes * size, groups, size
    flops = 3 * F
    if piece in ("gradient", "graph"):
        sums = 7 + batches if piece == "gradient" else 4 + 2 * batches
    else:
        rows = 1 if piece == "product" else 2
        if kept:
            gathers = gathered = scatters = scattered = flops = 0
            again, early = (groups, size), (0, 0)
        else:
            again, early = (3 * groups - 2, 3 * size - root - block), (groups, size)
        gathers, gathered = gathers + rows * again[0], gathered + rows * again[1]
        scatters += rows * (groups + early[0])
        scattered += rows * (size + early[1])
        flops += 6 * rows * F
        sums = 1 if kept else 2 + batches
    evaluated = not kept or piece in ("gradient", "graph")
    sums += batches * (ranks > 1) * evaluated  # the mean of the losses, and its weight
    return Traffic(
        batches * gathers,
        batches * gathered,
        batches * scatters,
        batches * scattered,
        sums,
        batches * flops,
    )


def counted(counts: Counts) -> Traffic:
    """Returns the same of what was counted."""
    kinds = [(counts.number(kind), counts.payload(kind)) for kind in ("gather", "scatter")]
    return Traffic(*kinds[0], *kinds[1], counts.number("sum"), counts.flops)


def vectors_of_a_solve(k: int) -> int:
    """Returns how many vectors of a rank's coordinates live at the peak of a cold solve.

    ``2k + 6`` rows; a block of two products and its argument, if its rows do not lie side by side.
    """
    return 2 * k + 6 + 2


# --- seconds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """What a rank computes with: all of it are inputs of the model.

    Attributes:
        flops: floating-point operations in a second, of float32 matrix products.
        memory: bytes in a second that are read and written.
        link: bytes in a second that a rank receives from the one before it in a ring.
        latency: seconds that a collective takes, however small.
        call: seconds of the host for each operation, where the device waits for it.
    """

    flops: float
    memory: float
    link: float
    latency: float
    call: float = 0.0


H200: Final = Hardware(flops=67e12, memory=4.8e12, link=450e9, latency=30e-6)
"""NVIDIA's data sheet of the H200 SXM: 67 TFLOP/s in float32 (its IEEE form, without TF32),
4.8 TB/s, NVLink of 900 GB/s, half of it each way. The latency is an assumption."""


def seconds(counts: Counts, ranks: int, hardware: Hardware) -> dict[str, float]:
    """Returns the seconds of what was counted: ``compute``, ``link``, and their sum ``total``.

    Each operation takes as long as its arithmetic or its memory, whichever is longer; collectives
    are rings, and nothing overlaps, as the package waits for each of them.
    """
    compute = sum(
        times * (hardware.call + max(flops / hardware.flops, size / hardware.memory))
        for (flops, size), times in counts.work.items()
    )
    collectives = len(counts.collectives) if ranks > 1 else 0
    link = received(counts, ranks) / hardware.link + collectives * hardware.latency
    return {"compute": compute, "link": link, "total": compute + link}


def received(counts: Counts, ranks: int) -> float:
    """Returns the bytes that a rank receives from the one before it in rings.

    Of what is gathered or scattered all but its own share, and of a sum twice that.
    """
    moved = counts.payload("gather") + counts.payload("scatter") + 2 * counts.payload("sum")
    return (ranks - 1) / ranks * moved
