"""Optimizers on ``torch.optim``'s interface, each a formula in its own file."""

from subspace_optim.optim.sgd import BulkSGD, DomSGD

__all__ = ["BulkSGD", "DomSGD"]
