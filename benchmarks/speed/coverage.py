"""Is the sampling error that is told the true one? Samples, drawn again and again.

For each the sine that is expected of its basis is compared with the true one, to the subspace of
all data.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.data import load
from benchmarks.experiment import minibatch
from benchmarks.losses import LOSSES
from benchmarks.models import build, default_lr
from benchmarks.optimizers import step_together
from benchmarks.progress import counted
from benchmarks.speed.problems import BATCH_SIZE
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.linalg.rows import largest_sine
from subspace_optim.linalg.sampling_error import Scatter
from subspace_optim.subspaces import eigenpairs

SHARES: Final = (1 / 20, 1 / 10, 1 / 5, 1 / 3, 1 / 2)
STAGES: Final = {"early": 20, "late": 500}
"""Steps of SGD."""
MISSING: Final = {"mse": 0, "ce": 1}
"""How many fewer outliers there are than classes: a softmax does not see a shift of all logits."""
BARS: Final = {"covered": 0.95, "median_ratio": 3.0}
_TOL, _EXACT = 1e-3, 1e-5


@dataclass(frozen=True)
class Case:
    """Which samples are drawn.

    Attributes:
        model: as ``benchmarks.models.build`` has it.
        dataset: as ``benchmarks.data.load`` has it.
        examples: N.
        seeds: models, each on examples of its own.
        draws: samples of each share, stage, loss and seed.
        batch: examples of the batches that the data are given in; ``None``: in one.
        length: of the longest sentence that is taken, in words.
    """

    model: str
    dataset: str
    examples: int
    seeds: int
    draws: int
    batch: int | None = None
    length: int | None = None

    def data(self, seed: int, root: str | None) -> tuple[nn.Module, Tensor, Tensor, int]:
        """Returns a new model, and the examples of a seed."""
        data = load(self.dataset, root=root)
        model = build(self.model, data, num_outputs=data.num_classes, seed=seed).eval()
        x, y = data.x_train, data.y_train
        if self.length is not None:
            short = (x != 0).sum(1) <= self.length
            x, y = x[short, : self.length], y[short]
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(x), generator=generator)[: self.examples]
        return model, x[rows], y[rows], data.num_classes


CASES: Final = {
    "mlp-digits": Case("mlp", "digits", 400, seeds=3, draws=10),
    "mlp-digits-batches": Case("mlp", "digits", 400, seeds=1, draws=5, batch=10),
    "mlp": Case("mlp", "mnist-5k", 400, seeds=1, draws=4),
    "cnn": Case("cnn", "digits", 200, seeds=1, draws=6),
    "transformer": Case("transformer", "sst2-1k", 200, seeds=1, draws=6, length=5),
}
"""Small ones, of which a thousand samples are drawn in minutes."""


def tell(whole: CurvatureOperator, examples: int, k: int, seed: int) -> dict[str, Any]:
    """Solves on a sample, and tells its basis and how far it is expected to be off.

    Args:
        whole: the operator of all data.
        examples: of the sample, at least.
        k: dimension of the subspace.
        seed: of the draw.

    Returns:
        The examples drawn, the basis, the expected sine, and what it was multiplied by and why.

    Raises:
        ValueError: the data cannot be divided.
    """
    sample = whole.sample(examples, seed=seed)
    if sample is None or sample.examples is None:
        raise ValueError("the data are one batch whose loss is no mean over examples")
    drawn, total = sample.examples
    with sample.frozen():
        pairs = eigenpairs.solve(sample, k, tol=_TOL, seed=seed)
        scatter = Scatter(pairs.basis, pairs.guard, seed)
        products = sample.batch_matmat(pairs.rows, scatter.see)
        scatter.gather(whole.ranks.sum_)
        known = pairs.basis.eigenvalues, pairs.below
        sine = scatter.sine(products, sample.matmat, *known, drawn / total)
    sample.release()
    return {
        "examples": drawn,
        "vectors": pairs.basis.vectors,
        "estimate": sine,
        "dimensions": scatter.dimensions,
        "margin": scatter.margin,
    }


def coverage(case: Case, loss: str, seed: int, root: str | None) -> list[dict[str, Any]]:
    """Draws the samples of a case, early and late in one training.

    Args:
        case: which.
        loss: a key of ``LOSSES``.
        seed: of the model and its examples.
        root: folder of the data sets.

    Returns:
        For each sample the expected sine, the true one, and what they may depend on.
    """
    model, x, y, classes = case.data(seed, root)
    k = classes - MISSING[loss]
    data = (x, y) if case.batch is None else in_batches(x, y, case.batch)
    sgd = torch.optim.SGD(model.parameters(), lr=default_lr(case.dataset, loss))
    rows, done = [], 0
    for stage, steps in STAGES.items():
        train(model, LOSSES[loss], x, y, sgd, range(done, steps), seed)
        done = steps
        hessian = so.HessianOperator(model, LOSSES[loss], data)
        exact = eigenpairs.solve(hessian, k, tol=_EXACT, seed=seed)
        about = {
            "model": case.model,
            "dataset": case.dataset,
            "batch": case.batch,
            "loss": loss,
            "k": k,
            "stage": stage,
            "seed": seed,
            "gap": 1 - exact.below / float(exact.basis.eigenvalues[-1]),
        }
        tries = [(share, draw) for share in SHARES for draw in range(case.draws)]
        for share, draw in counted(f"{case.model}, {loss}, {stage}", tries, unit="sample"):
            found = tell(hessian, round(share * len(x)), k, 1000 * seed + draw)
            sine = largest_sine(found.pop("vectors"), exact.basis.vectors)
            rows.append(about | {"share": round(share, 4)} | found | {"true_sine": sine})
    return rows


def in_batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Returns the examples in batches of this size."""
    return list(zip(x.split(size), y.split(size), strict=True))


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    sgd: torch.optim.Optimizer,
    steps: Iterable[int],
    seed: int,
) -> None:
    """Takes steps of SGD on minibatches of their numbers, which are a function of the seed."""
    for step in steps:
        rows = minibatch(len(x), BATCH_SIZE, step, seed=seed)
        step_together([sgd], lambda rows=rows: loss(model(x[rows]), y[rows]))  # type: ignore[misc]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what samples say of the estimate.

    An estimate of 1 says that nothing is certain; it is never wrong, and tells nothing. So two
    shares are told: of all samples, and of those whose estimate is below 1.

    Args:
        rows: of ``coverage``, at least one.
    """
    told = [row for row in rows if row["estimate"] < 1]
    ratios = [row["estimate"] / row["true_sine"] for row in told]
    # Where the truth lies when the margin is left out: its 95th percentile is the margin needed.
    bare = [row["true_sine"] / row["estimate"] * row["margin"] for row in told]
    return {
        "samples": len(rows),
        "covered": statistics.fmean(row["true_sine"] <= row["estimate"] for row in rows),
        "told": len(told),
        "covered_told": statistics.fmean(ratio >= 1 for ratio in ratios) if told else None,
        "median_ratio": statistics.median(ratios) if told else None,
        "margin": statistics.median(row["margin"] for row in told) if told else None,
        "margin_needed": float(np.quantile(bare, 0.95)) if told else None,
    }


def _bins(edges: Sequence[float], value: float) -> str:
    """Names the interval between two edges that a value is in."""
    below = [edge for edge in edges if edge <= value]
    above = [edge for edge in edges if edge > value]
    if not below or not above:
        return f"from {below[-1]:g}" if below else f"below {above[0]:g}"
    return f"{below[-1]:g} to {above[0]:g}"


GROUPS: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "model": lambda row: f"{row['model']}, {row['dataset']}",
    "loss": lambda row: f"{row['loss']}, k = {row['k']}",
    "stage": lambda row: row["stage"],
    "share": lambda row: f"{row['share']:g}",
    "given as": lambda row: f"batches of {row['batch']}" if row["batch"] else "one batch",
    "dimensions": lambda row: _bins((5, 10, 20, 40), row["dimensions"]),
    "gap": lambda row: _bins((0.1, 0.2, 0.4), row["gap"]),
    "estimate": lambda row: _bins((0.05, 0.1, 0.2, 0.5), row["estimate"]),
}
"""What samples are told apart by."""


def covered(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the samples, and their summaries: of all, and of each group."""
    groups: dict[str, dict[str, Any]] = {}
    for name, of in GROUPS.items():
        keys = sorted({of(row) for row in rows})
        groups[name] = {key: summary([row for row in rows if of(row) == key]) for key in keys}
    total = summary(rows)
    ratio = total["median_ratio"]
    met = total["covered"] >= BARS["covered"] and (ratio or 0) <= BARS["median_ratio"]
    return {"samples": list(rows), "all": total, "groups": groups, "met": met}
