"""What the papers measure: pure functions of vectors and bases, and a monitor on top."""

from subspace_optim.diagnostics.alignment import (
    alignment,
    eigenvector_fractions,
    expected_overlap,
    gradient_fraction,
    hessian_gradient_overlap,
)
from subspace_optim.diagnostics.central_flow import CentralFlow, central_flow
from subspace_optim.diagnostics.effective_lr import bulk_lr, distance, dom_lr
from subspace_optim.diagnostics.monitor import Monitor
from subspace_optim.diagnostics.outliers import (
    OutlierCount,
    count_outliers,
    trivial_eigenvalues,
)
from subspace_optim.diagnostics.overlap import (
    ClassGradientCosines,
    chance_cosine,
    class_gradient_cosines,
    intersection_rank,
    overlap_matrix,
    principal_angles,
    subspace_overlap,
)
from subspace_optim.diagnostics.random_matrices import (
    marchenko_pastur_atom,
    marchenko_pastur_density,
    marchenko_pastur_edges,
    outlier_threshold,
    spiked_eigenvalue,
)
from subspace_optim.diagnostics.spectrum import (
    exact_spectrum,
    spectral_density,
    spectrum_edges,
    trace,
)
from subspace_optim.diagnostics.stability import (
    adam_stability_threshold,
    preconditioned_sharpness,
    sam_edge,
    stability_threshold,
)
from subspace_optim.linalg.spectral_density import SpectralDensity
from subspace_optim.linalg.trace import Estimate

__all__ = [
    "CentralFlow",
    "ClassGradientCosines",
    "Estimate",
    "Monitor",
    "OutlierCount",
    "SpectralDensity",
    "adam_stability_threshold",
    "alignment",
    "bulk_lr",
    "central_flow",
    "chance_cosine",
    "class_gradient_cosines",
    "count_outliers",
    "distance",
    "dom_lr",
    "eigenvector_fractions",
    "exact_spectrum",
    "expected_overlap",
    "gradient_fraction",
    "hessian_gradient_overlap",
    "intersection_rank",
    "marchenko_pastur_atom",
    "marchenko_pastur_density",
    "marchenko_pastur_edges",
    "outlier_threshold",
    "overlap_matrix",
    "preconditioned_sharpness",
    "principal_angles",
    "sam_edge",
    "spectral_density",
    "spectrum_edges",
    "spiked_eigenvalue",
    "stability_threshold",
    "subspace_overlap",
    "trace",
    "trivial_eigenvalues",
]
