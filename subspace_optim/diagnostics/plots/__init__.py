"""Pictures of what the diagnostics measure. They need matplotlib.

Every function returns the figure. Given ``axes``, it draws into these panels and leaves the rest of
their figure as it is. ``theme`` is ``"light"`` or ``"dark"``. Blue is the dominant subspace and
vermillion the bulk; the lines of a panel differ by their dashes too. Of the settings of matplotlib
only those of fonts are read, none is changed, and no figure is known to ``pyplot``. In svg and pdf
files text is text. Values that are not finite are left out.

Columns of different lengths, a wrong number of panels, matrices of another shape and an unknown
theme raise ``ArgumentError`` before anything is drawn.
"""

try:
    import matplotlib.figure  # noqa: F401 (to say what is missing)
except ImportError as error:
    _MESSAGE = "pictures need matplotlib: pip install 'subspace_optim[plots]'"
    raise ImportError(_MESSAGE) from error

from subspace_optim.diagnostics.plots.dashboard import dashboard
from subspace_optim.diagnostics.plots.eigenvalues import eigenvalue_history
from subspace_optim.diagnostics.plots.matrices import cosine_matrix, density, overlap_heatmap
from subspace_optim.diagnostics.plots.rates import effective_rates
from subspace_optim.diagnostics.plots.sharpness import stability
from subspace_optim.diagnostics.plots.style import BULK, DOMINANT
from subspace_optim.diagnostics.plots.valley import valley

__all__ = [
    "BULK",
    "DOMINANT",
    "cosine_matrix",
    "dashboard",
    "density",
    "effective_rates",
    "eigenvalue_history",
    "overlap_heatmap",
    "stability",
    "valley",
]
