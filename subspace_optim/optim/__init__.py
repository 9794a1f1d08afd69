"""Optimizers on ``torch.optim``'s interface, each a formula in its own file."""

from subspace_optim.optim.newton import ClassGradientQuasiNewton, LowRankNewton
from subspace_optim.optim.projection import project_updates
from subspace_optim.optim.sam import SAM, BulkSAM, DomSAM
from subspace_optim.optim.sgd import BulkSGD, DomSGD

__all__ = [
    "SAM",
    "BulkSAM",
    "BulkSGD",
    "ClassGradientQuasiNewton",
    "DomSAM",
    "DomSGD",
    "LowRankNewton",
    "project_updates",
]
