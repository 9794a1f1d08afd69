"""``block_sharpness(blocks)``: which part of the model is sharp."""

from __future__ import annotations

from dataclasses import dataclass

from subspace_optim.diagnostics.block_sharpness import (
    Blocks,
    block_diagonal_share,
    blocks_of,
)
from subspace_optim.diagnostics.block_sharpness import (
    block_sharpness as sharpness_of_blocks,
)
from subspace_optim.diagnostics.measures.base import Measure, Row, Training, operator_for
from subspace_optim.diagnostics.measures.step import Step


def block_sharpness(blocks: Blocks) -> Measure:
    r"""Records the largest eigenvalue of the diagonal block of the Hessian of each part.

    ======================== ================================================================
    ``sharpness[<block>]``   :math:`\lambda_1(H_{bb})` at ``θ_t``, a column for each block
    ``block_diagonal_share`` the largest of them over λ_1; NaN where the source has no basis
    ======================== ================================================================

    It costs a solve for one eigenvalue for each block, of products over all data.

    Args:
        blocks: a pattern such as ``"transformer.h.*"``, or a mapping of names to patterns,
            predicates or tensors, as of ``diagnostics.block_sharpness``.

    Returns:
        The measure.

    A pattern without parameters raises ``ArgumentError`` where it is attached.
    """
    return BlockSharpness(blocks)


@dataclass
class BlockSharpness(Measure):
    """See ``block_sharpness``."""

    blocks: Blocks

    def attach(self, training: Training) -> None:
        """Finds the blocks."""
        operator_for("block_sharpness", training)
        names = blocks_of(training.parameters, self.blocks)
        self.columns = (*(f"sharpness[{name}]" for name in names), "block_diagonal_share")

    def before(self, step: Step) -> Row:
        """Solves for each block."""
        training = step.training
        found = sharpness_of_blocks(step.operator, self.blocks, **training.solver_options())
        row = {f"sharpness[{name}]": value for name, value in found.items()}
        if training.k:
            largest = float(step.basis.eigenvalues[0])
            row["block_diagonal_share"] = block_diagonal_share(found, largest)
        return row
