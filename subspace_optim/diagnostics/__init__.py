"""What the papers measure: pure functions of vectors and a basis, and a monitor on top."""

from subspace_optim.diagnostics.alignment import alignment
from subspace_optim.diagnostics.effective_lr import bulk_lr, dom_lr
from subspace_optim.diagnostics.monitor import Monitor

__all__ = ["Monitor", "alignment", "bulk_lr", "dom_lr"]
