"""What `gur_ari_2018` claims, as inequalities; what was changed after a first trial says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.papers.gur_ari_2018.runs import CASES
from benchmarks.papers.reproduction import Claim, Raw, mean
from subspace_optim.diagnostics import count_outliers

Array = NDArray[np.float64]

_TRAINED: Final = 100  # steps of "some training": there the paper's matrices are preserved
_EARLY: Final = 50  # steps after which the paper finds the gradient in the top subspace
_BANDWIDTH: Final = 0.05  # of the density of eigenvalues, in decades
_NOTHING: Final = 1e-6  # an eigenvalue below this, relative to the largest, is zero
_FITTED: Final = 0.9  # training accuracy from which a network has fitted its labels

NETWORKS: Final = ("fc", "convnet", "resnet")
"""The runs of Figures 1 and 2."""
FOLLOWED: Final = (*NETWORKS, "fc-five")
VARIANTS: Final = (
    "softmax",
    "fc-softplus",
    "fc-slow",
    "fc-batch-256",
    "fc-random",
    "convnet-adam",
)
"""The runs of Figure 12."""
RANDOM_LABELS: Final = ("fc-random", "convnet-random")

# --- the top subspace along training -----------------------------------------------------------


def since(raw: Raw, name: str, step: int = _TRAINED) -> Array:
    """Returns what the bases from a step on say."""
    pairs = zip(raw["saved"], raw[name], strict=True)
    return np.array([value for at, value in pairs if at >= step], dtype=float)


def late_f_top(raw: Raw) -> float:
    """Returns the median f_top after some training."""
    return median(since(raw, "f_top"))


def last_half_f_top(raw: Raw) -> float:
    """Returns the mean f_top over the last half of the steps at which it was measured."""
    values = raw["f_top"]
    return float(np.mean(values[len(values) // 2 :])) if values else math.nan


def random_ratio(raw: Raw) -> float:
    """Returns the overlap of random vectors in the top subspace, over that of the gradient."""
    return median(since(raw, "random_in_top") / since(raw, "overlap_there"))


def kept(raw: Raw, matrix: list[list[float]]) -> float:
    """Returns the overlap of the subspace after some training with the last one."""
    first = first_trained(raw)
    return matrix[first][-1] if first < len(matrix) else math.nan


def first_trained(raw: Raw) -> int:
    """The number of the first basis after some training."""
    return next((i for i, step in enumerate(raw["saved"]) if step >= _TRAINED), len(raw["saved"]))


def by_dimension(raw: Raw, start: int | None = None) -> dict[int, float]:
    """Returns the mean overlap with later subspaces, by dimension (Figure 3).

    Args:
        raw: of a run that is followed.
        start: the basis to start from, by its number (default: all after some training).
    """
    first = first_trained(raw)
    starts = range(first, len(raw["saved"]) - 1) if start is None else (start,)
    return {
        int(d): mean(v for i in starts for v in matrix[i][i + 1 :])
        for d, matrix in raw["preserved"].items()
    }


def lost_beyond(raw: Raw) -> float:
    """Returns how much less the top 2k are preserved than the top k − 1."""
    means = by_dimension(raw)
    return float(means[raw["k"] - 1] - means[2 * raw["k"]])


def largest_rise(raw: Raw) -> float:
    """Returns the largest rise of preservation with the dimension, from k − 1 on."""
    means = [value for d, value in sorted(by_dimension(raw).items()) if d >= raw["k"] - 1]
    return float(np.max(np.diff(means)))


def spread_over_eigenvectors(raw: Raw) -> float:
    """Returns over how many of the top k eigenvectors the gradient is spread, at the least."""
    counts = []
    for fractions in since(raw, "fractions", _EARLY):
        top = fractions[: raw["k"]]
        counts.append(float(top.sum() ** 2 / np.square(top).sum()))
    return min(counts, default=math.nan)


def smallest_top(raw: Raw) -> float:
    """Returns λ_k over λ_1, at the least."""
    values = np.array(raw["eigenvalues"], dtype=float)
    return float(np.min(values[:, raw["k"] - 1] / values[:, 0]))


def growth(raw: Raw) -> float:
    """Returns the largest eigenvalue at its peak over that at the start."""
    values = np.array(raw["largest"], dtype=float)
    return float(np.nanmax(values) / values[0])


def decay(raw: Raw) -> float:
    """Returns the largest eigenvalue at the end over that at its peak."""
    values = np.array(raw["largest"], dtype=float)
    return float(values[-1] / np.nanmax(values))


def head_share(raw: Raw) -> float:
    """Returns the share of the last layer in the first eigenvector, at the most."""
    return float(np.max(np.array(raw["anatomy"]["share"])[:, -2:].sum(axis=1)))


def median(values: Array) -> float:
    """Returns the median; NaN of nothing."""
    return float(np.median(values)) if len(values) else math.nan


# --- spectra -----------------------------------------------------------------------------------


def outliers_beyond_classes(raw: Raw) -> float:
    """Returns how many more outliers there are than classes: the largest ratio in the top 3k."""
    values = torch.tensor(raw["eigenvalues"][: 3 * raw["k"]], dtype=torch.float64)
    return float(count_outliers(values, "ratio", floor=1e-2).count - raw["k"])


def outliers_of_a_fit(raw: Raw) -> float:
    """Returns the same; NaN of a network that has not fitted its labels."""
    return outliers_beyond_classes(raw) if raw["accuracy"] >= _FITTED else math.nan


def log_density(raw: Raw, grid: Array) -> Array:
    """Returns the density of log10 λ at a grid, all realisations together."""
    values = np.array(raw["eigenvalues"], dtype=float)
    points = np.log10(values[values > 0])
    kernels = np.exp(-0.5 * np.square((grid[:, None] - points) / _BANDWIDTH))
    density: Array = kernels.mean(axis=1) / (_BANDWIDTH * math.sqrt(2 * math.pi))
    return density


def dip(raw: Raw) -> float:
    """Returns the smallest density around the mean λ_k over the lower of the peaks beside it.

    Around it: between the mean log λ of the 1.2 k-th and of the 0.8 k-th.
    """
    values, k = np.log10(np.array(raw["eigenvalues"], dtype=float)), raw["k"]
    means = values.mean(axis=0)
    grid = np.linspace(values.min(), values.max(), 1000)
    density = log_density(raw, grid)
    inside = (grid >= means[round(1.2 * k) - 1]) & (grid <= means[round(0.8 * k) - 1])
    if not inside.any():
        return math.nan
    lowest = int(np.argmin(np.where(inside, density, np.inf)))
    return float(density[lowest] / min(density[:lowest].max(), density[lowest:].max()))


# --- the solvable model ------------------------------------------------------------------------


def off_the_trajectory(raw: Raw) -> float:
    """Returns the largest relative error at the end: of the leads, and of the weights."""
    leads = np.array(raw["lead"][-1], dtype=float) / np.array(raw["flow"][-1], dtype=float)
    return float(np.max([*np.abs(leads - 1), raw["trajectory"][-1]]))


def inverse_time(raw: Raw) -> float:
    """Returns by how much the two eigenvalues differ from 1/(ηt) at the end, relatively."""
    return float(max(abs(value * raw["time"][-1] - 1) for value in raw["eigenvalues"][-1][:2]))


def never_left(raw: Raw) -> float:
    """Returns the smallest f_top, and overlap of the top subspace with the fixed one."""
    return float(min(*raw["f_top"], *raw["span"]))


def at_the_end(
    kind: Callable[[Raw], bool], measure: Callable[[Raw], float]
) -> Callable[[Raw], float]:
    """Returns a function of the mixtures: the smallest figure of the cases of some kind."""
    return lambda raw: float(min(measure(case) for case in raw["cases"] if kind(case)))


def _gap(case: Raw) -> float:
    values = case["eigenvalues"][-1]
    return float(values[case["k"] - 1] / max(values[case["k"]], _NOTHING * values[0]))


dominated = at_the_end(lambda case: not case["noise"] and not case["bias"] and case["k"] > 2, _gap)
"""λ_k/λ_{k+1} at the end, without noise and biases, for more than two classes."""
noisy_f_top = at_the_end(
    lambda case: case["noise"] and not case["bias"], lambda case: float(case["f_top"][-1])
)
"""f_top at the end, with noise and without biases."""
aligned = at_the_end(lambda case: case["bias"], lambda case: float(case["fractions"][-1][-1]))
"""c_k² at the end, with biases."""


def descents(raw: Raw) -> float:
    """Returns the share of steps of Newton's method that lowered the loss."""
    return float(np.mean(np.diff(raw["loss"]["newton"]) < 0))


def climbs(raw: Raw) -> float:
    """Returns the number of steps of Newton's method that raised the loss."""
    return float(np.sum(np.diff(raw["loss"]["newton"]) > 0))


def rank_missed(raw: Raw) -> float:
    """Returns the largest difference of a rank from k(k − 1)."""
    return float(max(abs(rank - k * (k - 1)) for k, rank in raw["ranks"]))


# --- the claims --------------------------------------------------------------------------------


def _table_difference(raw: Raw) -> float:
    return float(abs(raw["mean_overlap"] - CASES[raw["case"]].paper))


def _rows_of(*datasets: str) -> tuple[str, ...]:
    return tuple(name for name, case in CASES.items() if case.dataset in datasets)


_RESNET: Final = (
    "ResNet-18 was trained on 300 images for 600 steps, with bases up to step 500; it had fitted "
    "them by step 150. Now there are 1,500 images, 500 steps, and bases up to step 300."
)
_LONGER: Final = (
    "There were 1,500 steps, and now there are 3,000: at η = 0.01 the overlap was still rising "
    "where the last 1,000 began."
)
_ADDED: Final = (
    "Added after a first trial, whose raw figures had it already: the paper says it, and no claim "
    "did."
)

CLAIMS: Final = (
    Claim(
        name="f-top-close-to-one",
        says="After a short training the gradient lies almost wholly in the top subspace.",
        source="section 2.1, Figure 1",
        quantity=f"median f_top from step {_TRAINED} on",
        runs=NETWORKS,
        measure=late_f_top,
        at_least=0.9,
        changed=_RESNET,
    ),
    Claim(
        name="f-top-starts-small",
        says="At the start little of the gradient is in the top subspace: training brings it in.",
        source="section 2.1, Figure 1",
        quantity="f_top at step 0",
        runs=NETWORKS,
        measure=lambda raw: float(raw["f_top"][0]),
        at_most=0.3,
        changed=_RESNET,
    ),
    Claim(
        name="f-top-in-all-variants",
        says=(
            "It also does so with another rate, batch size, activation or optimizer, without "
            "hidden layers, and with random labels."
        ),
        source="appendix D, Figure 12",
        quantity="mean f_top over the last half of the measurements",
        runs=VARIANTS,
        measure=last_half_f_top,
        at_least=0.9,
        changed=(
            f"{_LONGER} With the longer training the last half of the measurements begins at step "
            "700, where it began at 200 (Adam: 300)."
        ),
    ),
    Claim(
        name="table-1-mnist-and-regression",
        says="The mean overlaps of g and Hg on MNIST and the regression are those of Table 1.",
        source="Table 1",
        quantity="|mean overlap − the paper's|",
        runs=_rows_of("MNIST", "Regression"),
        measure=_table_difference,
        at_most=0.05,
        changed=_LONGER,
    ),
    Claim(
        name="table-1-cifar",
        says="The mean overlaps of g and Hg on CIFAR-10 are those of Table 1.",
        source="Table 1",
        quantity="|mean overlap − the paper's|",
        runs=_rows_of("CIFAR10"),
        measure=_table_difference,
        at_most=0.05,
        changed=_LONGER,
    ),
    Claim(
        name="overlap-on-test-data",
        says="Gradient and Hessian of a test set overlap as well.",
        source="section 2.2",
        quantity="mean overlap on the test set",
        runs=tuple(name for name in CASES if name not in RANDOM_LABELS),
        measure=lambda raw: float(raw["mean_overlap_test"]),
        at_least=0.7,
        changed=_LONGER,
    ),
    Claim(
        name="no-overlap-on-test-data-with-random-labels",
        says="They overlap less there, below 0.7, where the labels for training are random.",
        source="section 2.2",
        quantity="mean overlap on the test set",
        runs=RANDOM_LABELS,
        measure=lambda raw: float(raw["mean_overlap_test"]),
        at_most=0.7,
        changed=_LONGER,
    ),
    Claim(
        name="random-vectors-in-the-top-subspace",
        says="A random vector of the top subspace overlaps with its product about as g does.",
        source="section 2.2",
        quantity="its overlap over that of the gradient, median",
        runs=NETWORKS,
        measure=random_ratio,
        at_least=0.7,
        at_most=1.3,
        changed=_RESNET,
    ),
    Claim(
        name="random-vectors-of-the-whole-space",
        says="A random vector of the whole space hardly overlaps with its product.",
        source="section 2.2",
        quantity="|mean overlap of eight vectors|, largest along the training",
        runs=NETWORKS,
        measure=lambda raw: float(np.abs(raw["random"]).max()),
        at_most=0.1,
        changed=f"{_ADDED} {_RESNET}",
    ),
    Claim(
        name="g-top-alone-descends",
        says="A small step along g_top lowers the loss by about as much as one along g.",
        source="sections 1 and 4",
        quantity=f"ratio of the decreases at a tenth of the rate, median from step {_TRAINED} on",
        runs=FOLLOWED,
        measure=lambda raw: median(since(raw, "decrease")),
        at_least=0.8,
        changed=_RESNET,
    ),
    Claim(
        name="top-subspace-is-preserved",
        says="The top k subspace after some training is still mostly there much later.",
        source="section 2.3, Figure 2a, c, e",
        quantity=f"overlap of the top k at step {_TRAINED} and at the last basis",
        runs=FOLLOWED,
        measure=lambda raw: kept(raw, raw["preserved"][str(raw["k"])]),
        at_least=0.5,
        changed=_RESNET,
    ),
    Claim(
        name="next-subspace-is-not",
        says="The subspace of the next k eigenvectors does not last.",
        source="section 2.3, Figure 2b, d, f",
        quantity=f"overlap of the next k at step {_TRAINED} and at the last basis",
        runs=FOLLOWED,
        measure=lambda raw: kept(raw, raw["next"]),
        at_most=0.5,
        changed=_RESNET,
    ),
    Claim(
        name="larger-subspaces-are-less-preserved",
        says="Subspaces of many more dimensions than classes are clearly less preserved.",
        source="appendix C, Figures 3, 9 and 10",
        quantity="mean overlap with later subspaces, of dimension k − 1 less of 2k",
        runs=("fc", "resnet"),
        measure=lost_beyond,
        at_least=0.1,
        changed=_RESNET,
    ),
    Claim(
        name="preservation-falls-from-k",
        says="From about k dimensions on each further one makes a subspace less preserved.",
        source="section 2.3, Figure 3",
        quantity="largest rise of the mean overlap from a dimension to the next, from k − 1 on",
        runs=("fc", "resnet"),
        measure=largest_rise,
        at_most=0.0,
        changed=_RESNET,
    ),
    Claim(
        name="gradient-is-no-eigenvector",
        says="The gradient is spread over several of the top eigenvectors.",
        source="appendix C, Figure 11",
        quantity=f"(Σ c_i²)² / Σ c_i⁴ over the top k, smallest from step {_EARLY} on",
        runs=("fc", "fc-five"),
        measure=spread_over_eigenvectors,
        at_least=2.0,
    ),
    Claim(
        name="top-eigenvalues-are-positive",
        says="All top k eigenvalues are positive along the whole training.",
        source="section 4",
        quantity="λ_k/λ_1, smallest",
        runs=FOLLOWED,
        measure=smallest_top,
        at_least=1e-3,
        changed=_RESNET,
    ),
    Claim(
        name="first-eigenvector-is-in-all-layers",
        says="The first eigenvector is not that of the last layer's weights and biases.",
        source="appendix B, Figures 6 and 7",
        quantity="share of the last layer in its squared length, largest",
        runs=("fc",),
        measure=head_share,
        at_most=0.5,
    ),
    Claim(
        name="largest-eigenvalue-grows",
        says="The largest eigenvalue grows first.",
        source="appendix B, Figure 8",
        quantity="λ_1 at its peak over λ_1 at the start",
        runs=("fc", "resnet"),
        measure=growth,
        at_least=2.0,
        changed=_RESNET,
    ),
    Claim(
        name="largest-eigenvalue-decays",
        says="As training ends, the largest eigenvalue decays.",
        source="appendix B, Figure 8",
        quantity="λ_1 at the end over λ_1 at its peak",
        runs=("fc", "resnet"),
        measure=decay,
        at_most=0.5,
        changed=_RESNET,
    ),
    Claim(
        name="an-outlier-for-each-class",
        says=(
            "There is a large eigenvalue for each class of the task (or for each but one): 10 for "
            "digits and for random labels, 2 for even and odd, 5 for five digits."
        ),
        source="appendix B, Figure 4, and note 9",
        quantity=(
            f"outliers, by the largest ratio, less classes (training accuracy at least {_FITTED})"
        ),
        runs=("spectrum", "spectrum-random", "spectrum-parity", "spectrum-five"),
        measure=outliers_of_a_fit,
        at_least=-1.0,
        at_most=0.0,
        changed=(
            "Random labels were those of 5,000 images, trained on for 40 epochs; the network "
            "fitted 15 % of them, where the paper's reaches a very high accuracy. Now they are "
            "those of 1,000 images, trained on for 1,000 epochs, and a network that fits fewer "
            "than 90 % of its labels decides nothing."
        ),
    ),
    Claim(
        name="underdensity-at-the-k-th",
        says="The density of log eigenvalues has a clear dip around the k-th.",
        source="appendix B, Figure 5",
        quantity="density in the dip over the lower of the peaks beside it",
        runs=("right-edge",),
        measure=dip,
        at_most=0.75,
    ),
    Claim(
        name="toy-trajectory",
        says=(
            "In the solvable model the right logit leads by u with u + e^u = ηt + c, and the "
            "weights go as its late form says."
        ),
        source="eqs. 7, 15 and 16",
        quantity="largest relative error at the end, of u and of the weights",
        runs=("two-samples",),
        measure=off_the_trajectory,
        at_most=0.01,
        identity=True,
        changed=_ADDED,
        seen=(0, 1),
    ),
    Claim(
        name="toy-gradient-as-printed",
        says="In the solvable model the gradient tends to 2(μ_2 − μ_1)/(ηt).",
        source="eqs. 8 and 17, as printed",
        quantity="relative error at the end",
        runs=("two-samples",),
        measure=lambda raw: float(raw["gradient_printed"][-1]),
        at_most=0.1,
        identity=True,
    ),
    Claim(
        name="toy-gradient-corrected",
        says="In the solvable model the gradient tends to (μ_2 − μ_1)/(2ηt).",
        source="eq. 17, its middle",
        quantity="relative error at the end",
        runs=("two-samples",),
        measure=lambda raw: float(raw["gradient"][-1]),
        at_most=0.1,
        identity=True,
    ),
    Claim(
        name="toy-hessian",
        says="Its Hessian has the eigenvalue 1/(ηt) twice at late times.",
        source="eqs. 9, 18 and 19",
        quantity="largest relative error of both at the end",
        runs=("two-samples",),
        measure=inverse_time,
        at_most=0.1,
        identity=True,
    ),
    Claim(
        name="toy-top-subspace-is-fixed",
        says="The gradient is always in the top subspace, which never changes.",
        source="section 3, eq. 19",
        quantity="smallest f_top, and overlap of the top subspace with eq. 19's",
        runs=("two-samples",),
        measure=never_left,
        at_least=0.999,
        identity=True,
    ),
    Claim(
        name="toy-rank",
        says="For k orthogonal samples the Hessian has the rank k(k − 1).",
        source="note 14",
        quantity="largest |rank − k(k − 1)| for k = 2, 5 and 10",
        runs=("mixture",),
        measure=rank_missed,
        at_most=0,
        identity=True,
        changed=_ADDED,
        seen=(0, 1),
    ),
    Claim(
        name="toy-top-k-emerges",
        says="In the course of training k of these k(k − 1) directions come to dominate.",
        source="note 14",
        quantity="λ_k/λ_{k+1} at the end for k > 2, smallest",
        runs=("mixture",),
        measure=dominated,
        at_least=2.0,
    ),
    Claim(
        name="toy-with-noise",
        says="With a little noise the gradient still evolves into the top k subspace.",
        source="section 3",
        quantity="f_top at the end with σ = 0.02, smallest",
        runs=("mixture",),
        measure=noisy_f_top,
        at_least=0.9,
    ),
    Claim(
        name="toy-with-biases",
        says="With biases the gradient aligns with the smallest of the top k eigenvectors.",
        source="section 3",
        quantity="c_k² at the end, smallest",
        runs=("mixture",),
        measure=aligned,
        at_least=0.9,
    ),
    Claim(
        name="low-rank-newton-does-not-climb",
        says="Newton's method in the top subspace descends rather than climbs.",
        source="section 4, eq. 11",
        quantity="number of its steps that raise the loss",
        runs=("newton",),
        measure=climbs,
        at_most=0,
        changed=(
            "After a first trial it was the rule of the claim after this one for a time, and is a "
            "claim of its own now: the paper says both."
        ),
        seen=(0, 1),
    ),
    Claim(
        name="low-rank-newton-goes-on",
        says="Newton's method in the top subspace goes on descending.",
        source="section 4, eq. 11",
        quantity="share of its steps that lower the loss",
        runs=("newton",),
        measure=descents,
        at_least=0.9,
        changed=(
            "For a time it was about steps that do not raise the loss, which the paper says and "
            "which held; that is the claim before this one now, and this one has its first form "
            "again. Losses have six digits: lower by less is not lower."
        ),
        seen=(0, 1),
    ),
)
