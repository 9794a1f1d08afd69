"""What the papers measure: pure functions of vectors and bases, and a monitor on top."""

from subspace_optim.diagnostics import measures
from subspace_optim.diagnostics.alignment import (
    alignment,
    eigenvector_fractions,
    expected_overlap,
    gradient_fraction,
    hessian_gradient_overlap,
)
from subspace_optim.diagnostics.batch_sharpness import (
    BatchThresholds,
    batch_sharpness,
    batch_sharpness_thresholds,
    gradient_sharpness,
)
from subspace_optim.diagnostics.block_sharpness import block_diagonal_share, block_sharpness
from subspace_optim.diagnostics.central_flow import CentralFlow, central_flow
from subspace_optim.diagnostics.critical_sharpness import critical_sharpness
from subspace_optim.diagnostics.directional_sharpness import directional_sharpness
from subspace_optim.diagnostics.effective_lr import bulk_lr, distance, dom_lr
from subspace_optim.diagnostics.eigenvectors import (
    chance_displacement,
    chance_localization,
    displacement,
    localization,
    lowest_eigenvalue,
)
from subspace_optim.diagnostics.gradient_noise import GradientNoise, gradient_noise
from subspace_optim.diagnostics.monitor import Monitor
from subspace_optim.diagnostics.norm_sharpness import dual_norm, norm_sharpness
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
from subspace_optim.diagnostics.valley import Valley, hill_share, valley
from subspace_optim.linalg.spectral_density import SpectralDensity
from subspace_optim.linalg.trace import Estimate

__all__ = [
    "BatchThresholds",
    "CentralFlow",
    "ClassGradientCosines",
    "Estimate",
    "GradientNoise",
    "Monitor",
    "OutlierCount",
    "SpectralDensity",
    "Valley",
    "adam_stability_threshold",
    "alignment",
    "batch_sharpness",
    "batch_sharpness_thresholds",
    "block_diagonal_share",
    "block_sharpness",
    "bulk_lr",
    "central_flow",
    "chance_cosine",
    "chance_displacement",
    "chance_localization",
    "class_gradient_cosines",
    "count_outliers",
    "critical_sharpness",
    "directional_sharpness",
    "displacement",
    "distance",
    "dom_lr",
    "dual_norm",
    "eigenvector_fractions",
    "exact_spectrum",
    "expected_overlap",
    "gradient_fraction",
    "gradient_noise",
    "gradient_sharpness",
    "hessian_gradient_overlap",
    "hill_share",
    "intersection_rank",
    "localization",
    "lowest_eigenvalue",
    "marchenko_pastur_atom",
    "marchenko_pastur_density",
    "marchenko_pastur_edges",
    "measures",
    "norm_sharpness",
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
    "valley",
]
