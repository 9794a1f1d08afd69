"""What the rows of a monitor can hold, one measure a file.

``Monitor(optimizer, source, measures=[...])`` takes these, lists of them, and measures of your own,
which are subclasses of ``Measure``.
"""

from subspace_optim.diagnostics.measures.base import Measure, Row, Training
from subspace_optim.diagnostics.measures.batch_sharpness import batch_sharpness
from subspace_optim.diagnostics.measures.block_sharpness import block_sharpness
from subspace_optim.diagnostics.measures.critical_sharpness import critical_sharpness
from subspace_optim.diagnostics.measures.directional_sharpness import directional_sharpness
from subspace_optim.diagnostics.measures.dominant import dominant
from subspace_optim.diagnostics.measures.eigenvectors import eigenvectors
from subspace_optim.diagnostics.measures.gradient_noise import gradient_noise
from subspace_optim.diagnostics.measures.loss_and_gradient import loss_and_gradient
from subspace_optim.diagnostics.measures.next_eigenvalues import next_eigenvalues
from subspace_optim.diagnostics.measures.norm_sharpness import norm_sharpness
from subspace_optim.diagnostics.measures.preconditioned_sharpness import preconditioned_sharpness
from subspace_optim.diagnostics.measures.stability import stability
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.diagnostics.measures.thresholds import thresholds
from subspace_optim.diagnostics.measures.update import update
from subspace_optim.diagnostics.measures.valley import valley

__all__ = [
    "Measure",
    "Row",
    "Step",
    "Training",
    "batch_sharpness",
    "block_sharpness",
    "critical_sharpness",
    "directional_sharpness",
    "dominant",
    "eigenvectors",
    "gradient_noise",
    "loss_and_gradient",
    "next_eigenvalues",
    "norm_sharpness",
    "preconditioned_sharpness",
    "stability",
    "thresholds",
    "update",
    "valley",
]
