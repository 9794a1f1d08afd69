"""What is measured for Tables 1 to 3 of `song_2024`: effective rates of GD and Adam."""

from __future__ import annotations

import math
import statistics
from typing import Final

import torch

import subspace_optim as so
from benchmarks.losses import mse
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.song_2024.runs import dataset, network, watched
from benchmarks.papers.training import Problem

OPTIMIZERS: Final = ("GD(-m)", "GD(+m)", "Adam(-m)", "Adam(+m)")
"""Without and with momentum 0.9, as the paper names them."""
_COLUMNS: Final = ("step", "loss", "dom_lr", "bulk_lr", "chi_gradient")


def effective_rates(
    job: Job,
    *,
    model: str,
    lr: float,
    adam_lr: float,
    width: int,
    examples: int,
    pool: int = 1,
    chunk: int | None = None,
    steps: int,
    every: int,
) -> Raw:
    """Dom-LR and Bulk-LR of full-batch GD and Adam, with and without momentum.

    Dom-LR is told wrongly by a basis whose angle to the true subspace is not far below χ_k: what it
    lets in of the bulk's part of the gradient outweighs the dominant part. χ_k falls to 1e-5 along
    GD, so that each basis is new, in float64, and as exact as that needs.

    Returns:
        For each optimizer the rates, loss and χ_k at the measured steps; means and deviations of
        the rates after step 0.
    """
    data = dataset(job, model, examples, pool)
    x = data.x_train.double() if data.x_train.is_floating_point() else data.x_train
    raw: Raw = {"lr": lr}
    for name in OPTIMIZERS:
        net = network(job, model, data, width).double()
        problem = Problem(net, mse, x, data.y_train)
        beta = 0.9 if "+m" in name else 0.0
        optimizer = problem.sgd(lr, beta)
        if name.startswith("Adam"):
            optimizer = torch.optim.Adam(net.parameters(), lr=adam_lr, betas=(beta, 0.999))
        subspace = so.DominantSubspace(
            problem.hessian(chunk), data.num_classes, refresh=1, tol=1e-7, seed=job.seed
        )
        losses: list[float] = []
        history, _ = watched(
            job,
            name,
            problem,
            optimizer,
            subspace,
            _COLUMNS,
            every=every,
            steps=steps,
            losses=losses,
        )
        raw[name] = dict(history)
        # Adam's loss has spikes: a mean over the last tenth, of its logarithm.
        raw[name]["mean_log_loss"] = statistics.fmean(map(math.log, losses[-(steps // 10) :]))
        for rate in ("dom_lr", "bulk_lr"):
            begun = history[rate][1:]  # at step 0 there is no momentum yet
            raw[name][f"mean_{rate}"] = statistics.fmean(begun)
            raw[name][f"std_{rate}"] = statistics.pstdev(begun)
    return raw
