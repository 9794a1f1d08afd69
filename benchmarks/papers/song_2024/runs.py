"""What is measured: training with SGD, GD, SAM and Adam, and what goes on in each subspace."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.experiment import WARMUP, Settings, compare
from benchmarks.losses import LOSSES, mse
from benchmarks.models import CNN, Transformer, mlp
from benchmarks.papers import networks, problems
from benchmarks.papers.checkpoint import Checkpoint
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Row, train
from benchmarks.progress import doing

Columns = dict[str, list[Any]]


def dataset(job: Job, model: str, examples: int, pool: int) -> Dataset:
    """Returns the data that the paper trains a model on; images smaller by a factor ``pool``."""
    name = {"mlp": "mnist-5k", "transformer": "sst2-1k"}.get(model, "cifar10-5k")
    data = problems.real(name, job, examples, test=0)
    return problems.pooled(data, pool)


def network(job: Job, model: str, data: Dataset, width: int) -> nn.Module:
    """Returns one of the paper's five architectures, freshly drawn."""
    outputs = data.num_classes
    shape = tuple(data.x_train.shape[1:])
    makers: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: mlp(math.prod(shape), outputs, width=width),
        "cnn": lambda: CNN((shape[0], shape[1], shape[2]), outputs, width=width),
        "transformer": lambda: Transformer(
            data.vocabulary or 0,  # of images, which it does not get
            shape[0],
            outputs,
            width=width,
            heads=max(1, width // 8),  # the paper's: 8 of 64
        ),
        "vgg11": lambda: networks.vgg11(outputs, width=width),
        "resnet8": lambda: networks.resnet(outputs, (width, 2 * width, 4 * width), 1),
    }
    return networks.made(job, makers[model])


def columns(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Columns:
    """Returns rows as columns; what a row lacks is NaN."""
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


# --- the critical experiment: Figures 1-3, 12-17 and 22 ---------------------------------------

_OF_A_PHASE: Final = (
    "step",
    "loss",
    "chi_gradient",
    "chi_average",
    "distance",
    "eigenvalues",
    "next_eigenvalues",
)


def critical_experiment(
    job: Job,
    *,
    model: str,
    loss: str,
    width: int,
    examples: int,
    pool: int = 1,
    optimizers: Sequence[str],
    look: int,
    refresh: int | Literal["auto"] = "auto",
    **settings: Any,
) -> Raw:
    """SGD until its gradient is dominant; from there SGD and its projections, each by itself.

    Single losses jump, by more than what some steps achieve: in a branch the loss over all data is
    taken at every step.

    Args:
        job: the seed.
        model: of ``network``.
        loss: of ``benchmarks.losses``.
        width: of the model.
        examples: of the data.
        pool: factor by which images are made smaller.
        optimizers: after the switch.
        look: measure every so many steps before the switch.
        refresh: of the projecting optimizers' basis; 1 is the paper's protocol.
        **settings: more of ``benchmarks.experiment.Settings``.

    Returns:
        The switch; columns of each phase; of each branch the losses, from the switch on, and its
        final distance.

    Raises:
        KeyboardInterrupt: it was interrupted, and can be taken up again.
    """
    data = dataset(job, model, examples, pool)
    net = network(job, model, data, width)
    checkpoint = Checkpoint(None if job.scratch is None else job.scratch / "compare.pt")
    losses: dict[str, list[float]] = {name: [] for name in optimizers}
    kept = checkpoint.read(job.device)
    if kept is not None:
        try:
            kept, losses = kept["experiment"], kept["losses"]
        except KeyError as error:
            raise checkpoint.foreign(error) from error

    def after_step(experiment: Any, measured: bool) -> None:
        if experiment.phase in losses and not experiment.result.finished:
            losses[experiment.phase].append(experiment.loss())
        latest = [f"loss {row['loss']:.4g}" for row in experiment.result.rows[-1:]]
        task.at(experiment.step, ", ".join([f"{experiment.phase} step {experiment.step}", *latest]))
        checkpoint.keep(
            lambda: {"experiment": experiment.state_dict(), "losses": losses}, measured=measured
        )

    with doing("comparing") as task, checkpoint:
        result = compare(
            net,
            LOSSES[loss],
            (data.x_train, data.y_train),
            list(optimizers),
            settings=Settings(
                k=data.num_classes, warmup_measure=look, refresh=refresh, seed=job.seed, **settings
            ),
            resume_from=kept,
            on_progress=after_step,
        )
    if not result.finished:  # an interrupt, which ``compare`` takes for the end
        raise KeyboardInterrupt
    phases = {name: columns(result.of(name), _OF_A_PHASE) for name in (WARMUP, *result.branches)}
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "switch_step": result.switch_step,
        "switch_reason": result.switch_reason,
        "phases": phases,
        "losses": losses,
        "final_distance": {name: branch.distance for name, branch in result.branches.items()},
    }


# --- noise: Figures 4-5 and 18-21 --------------------------------------------------------------


class _Probe:
    """Measures a training at θ_t: loss, χ_k, and the top 2k eigenvalues, by one solve."""

    def __init__(
        self, net: nn.Module, loss_fn: Any, data: Dataset, job: Job, *, tol: float = 1e-2
    ) -> None:
        self.k = data.num_classes
        self.hessian = so.HessianOperator(net, loss_fn, (data.x_train, data.y_train))
        # The k pairs beyond the dominant ones make those converge well below this tolerance.
        self.subspace = so.DominantSubspace(
            self.hessian, 2 * self.k, refresh=1, tol=tol, seed=job.seed
        )

    def __call__(self, _: int) -> Row:
        both = self.subspace.refresh()
        basis = both.first(self.k)
        gradient = self.hessian.gradient()
        return {
            "loss": self.hessian.loss(),
            "chi_gradient": float(so.diagnostics.alignment(gradient, basis)),
            "eigenvalues": basis.eigenvalues.tolist(),
            "next_eigenvalues": both.eigenvalues[self.k :].tolist(),
        }


_OF_A_PROBE: Final = ("step", "loss", "chi_gradient", "eigenvalues", "next_eigenvalues")


def switching(
    job: Job, *, lr: float, width: int, examples: int, sgd_first: int, gd_first: int, after: int
) -> Raw:
    """SGD and then GD; and GD and then SGD, at one rate, from one initialisation.

    Args:
        job: the seed.
        lr: of both.
        width: of the MLP.
        examples: of MNIST.
        sgd_first: steps of SGD before GD.
        gd_first: steps of GD before SGD.
        after: steps after either switch.
    """
    data = dataset(job, "mlp", examples, 1)
    raw: Raw = {}
    for name, sizes, first in (
        ("SGD to GD", (50, None), sgd_first),
        ("GD to SGD", (None, 50), gd_first),
    ):
        net = network(job, "mlp", data, width)
        probe = _Probe(net, mse, data, job)
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        rows: list[Row] = []
        for number, (size, start, steps, every) in enumerate(
            ((sizes[0], 0, first, first // 10), (sizes[1], first, after, max(1, after // 25)))
        ):
            rows += train(
                job,
                f"{name}-{number}",
                net,
                mse,
                (data.x_train, data.y_train),
                optimizer,
                steps=steps,
                batch_size=size,
                record=probe,
                every=every,
                first=start,
            )
        raw[name] = {"switch_step": first} | columns(rows, _OF_A_PROBE)
    return raw


def small_rate(
    job: Job,
    *,
    model: str,
    lr: float,
    width: int,
    examples: int,
    pool: int = 1,
    steps: int,
    every: int,
) -> Raw:
    """GD and SGD side by side from one initialisation: χ_k along GD, and how far they part.

    Args:
        job: the seed.
        model: of ``network``.
        lr: of both.
        width: of the model.
        examples: of the data.
        pool: factor by which images are made smaller.
        steps: of both.
        every: measure at one step in so many.
    """
    data = dataset(job, model, examples, pool)
    both = (data.x_train, data.y_train)
    net, noisy = (network(job, model, data, width) for _ in range(2))
    probe = _Probe(net, mse, data, job)
    start, other = _theta(net), _theta(noisy)
    sgd = torch.optim.SGD(noisy.parameters(), lr=lr)
    done = 0

    def record(step: int) -> Row:
        nonlocal done, other
        train(
            Job(job.seed, job.device),
            "",
            noisy,
            mse,
            both,
            sgd,
            steps=step - done,
            batch_size=50,
            first=done,
        )
        done, other = step, _theta(noisy)
        theta = _theta(net)
        distances = {"GD": theta - start, "SGD": other - start, "GD to SGD": theta - other}
        return probe(step) | {name: float(d.norm()) for name, d in distances.items()}

    # Without checkpoints: the second training lives inside the records of the first.
    rows = train(
        Job(job.seed, job.device),
        "",
        net,
        mse,
        both,
        torch.optim.SGD(net.parameters(), lr=lr),
        steps=steps,
        record=record,
        every=every,
    )
    return columns(rows, (*_OF_A_PROBE, "GD", "SGD", "GD to SGD"))


def _theta(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


# --- the toy quadratic: Figures 6-7 ------------------------------------------------------------


def toy_quadratic(job: Job, *, lr: float, steps: int, keep: int) -> Raw:
    """GD on L = ½(1000 x² + y²), SGD on L ± 100 x y; and SGD's updates in x or in y alone.

    (Appendix A.2.) χ_1 is the share of the gradient along the first axis, the top eigenvector.
    Dom and Bulk go on from SGD's point at half of the steps, with SGD's own noise. ``decrease`` is
    of the loss after that point, from the mean over the first quarter of the steps to the last.

    Args:
        job: the seed.
        lr: η.
        steps: of GD and SGD.
        keep: so many of the first points of each path are in the raw figures, and so many more.
    """
    curvature = np.array([1000.0, 1.0])
    signs = np.random.default_rng(job.seed).choice([-1.0, 1.0], size=steps)
    half = steps // 2

    def path(start: Any, first: int, noise: float, mask: Any) -> Any:
        points = [np.array(start)]
        for sign in signs[first:]:
            theta = points[-1]
            gradient = curvature * theta + noise * sign * 100.0 * theta[::-1]
            points.append(theta - lr * mask * gradient)
        return np.array(points)

    paths = {"GD": path([1.0, 1.0], 0, 0.0, 1.0), "SGD": path([1.0, 1.0], 0, 1.0, 1.0)}
    for name, mask in (("Dom-SGD", [1.0, 0.0]), ("Bulk-SGD", [0.0, 1.0])):
        paths[name] = path(paths["SGD"][half], half, 1.0, np.array(mask))
    raw: Raw = {"switch_step": half}
    for name, points in paths.items():
        first = steps + 1 - len(points)
        gradients = curvature * points
        chi = np.abs(gradients[:, 0]) / np.linalg.norm(gradients, axis=1)
        loss = 0.5 * (curvature * points**2).sum(axis=1)
        late = slice(len(points) // 2, None)
        # The noise lasts for 1/(1000 η) steps: a quarter of the branch averages over it.
        after, quarter = loss[half - first :], (steps - half) // 4
        # All of the first steps, in which x falls, and then a few.
        evenly = np.linspace(0, len(points) - 1, keep).astype(int)
        thin = np.union1d(np.arange(min(keep, len(points))), evenly)
        raw[name] = {
            "step": (thin + first).tolist(),
            "x": points[thin, 0].tolist(),
            "y": points[thin, 1].tolist(),
            "chi": chi[thin].tolist(),
            "loss": loss[thin].tolist(),
            "mean_chi_of_the_second_half": float(chi[late].mean()),
            "decrease": float(after[:quarter].mean() - after[-quarter:].mean()),
        }
    return raw


# --- edge of stability and SAM: Figures 9-10 ---------------------------------------------------


def at_the_edge(
    job: Job,
    *,
    rho: float,
    lr: float,
    width: int,
    examples: int,
    switch: int,
    every: int,
    after: int,
    measure: int,
    refresh: int | Literal["auto"] = "auto",
) -> Raw:
    """Full-batch GD, or SAM, to its edge of stability; from there it, and its projections.

    Args:
        job: the seed.
        rho: radius of SAM's perturbation; 0: GD.
        lr: the constant rate.
        width: of the MLP.
        examples: of MNIST.
        switch: step to switch at.
        every: measure at one step in so many before the switch.
        after: steps after the switch.
        measure: the same after the switch.
        refresh: of the projecting optimizers' basis; 1 is the paper's protocol.

    Returns:
        Columns of each phase, those of ``Monitor``, and the losses of all its steps: at the edge
        they go up and down, so that single ones say little.
    """
    data = dataset(job, "mlp", examples, 1)
    both = (data.x_train, data.y_train)
    k = data.num_classes
    net = network(job, "mlp", data, width)
    hessian = so.HessianOperator(net, mse, both)
    names = ("SAM", "Dom-SAM", "Bulk-SAM") if rho else ("GD", "Dom-GD", "Bulk-GD")

    def make(name: str, subspace: so.DominantSubspace) -> Optimizer:
        params = net.parameters()
        if name in ("before", names[0]):
            return so.SAM(params, lr, rho) if rho else torch.optim.SGD(params, lr=lr)
        if rho:
            sam = so.DomSAM if name == names[1] else so.BulkSAM
            return sam(params, lr, rho, subspace=subspace)
        sgd = so.DomSGD if name == names[1] else so.BulkSGD
        return sgd(params, lr, subspace=subspace)

    wanted = (
        "step",
        "loss",
        "chi_gradient",
        "chi_update",
        "gradient_norm",
        "eigenvalues",
        "next_eigenvalues",
        "threshold",
        "sam_edge",
    )
    raw: Raw = {"switch_step": switch, "losses": {}}
    at_switch: dict[str, Tensor] = {}
    for name in ("before", *names):
        warm = name == "before"
        if not warm:
            net.load_state_dict(at_switch)
        subspace = so.DominantSubspace(hessian, k, refresh=refresh, seed=job.seed)
        optimizer = make(name, subspace)
        next_k = k if warm or name == names[0] else 0
        monitor = so.Monitor(optimizer, subspace, every=every if warm else measure, next_k=next_k)
        losses: list[float] = []
        train(
            job,
            name,
            net,
            mse,
            both,
            optimizer,
            steps=switch if warm else after,
            first=0 if warm else switch,
            also=(subspace, monitor),
            losses=losses,
        )
        monitor.detach()
        raw[name] = {
            column: values for column, values in monitor.history.items() if column in wanted
        }
        raw[name]["step"] = [step + (0 if warm else switch) for step in monitor.history["step"]]
        raw["losses"][name] = losses
        if warm:
            at_switch = {key: value.clone() for key, value in net.state_dict().items()}
    return raw


# --- effective rates: Tables 1-3, Figures 11, 23 and 24 -----------------------------------------

OPTIMIZERS: Final = ("GD(-m)", "GD(+m)", "Adam(-m)", "Adam(+m)")
"""Without and with momentum 0.9, as the paper names them."""


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

    Args:
        job: the seed.
        model: of ``network``.
        lr: of GD.
        adam_lr: of Adam.
        width: of the model.
        examples: of the data.
        pool: factor by which images are made smaller.
        chunk: examples at a time in Hessian products; ``None``: all.
        steps: of each optimizer.
        every: measure at one step in so many.

    Returns:
        For each optimizer the rates, loss and χ_k at the measured steps, means and deviations.
    """
    data = dataset(job, model, examples, pool)
    x = data.x_train.double() if data.x_train.is_floating_point() else data.x_train
    both = (x, data.y_train)
    size = chunk or len(x)
    batches = list(zip(x.split(size), data.y_train.split(size), strict=True))
    raw: Raw = {"lr": lr}
    for name in OPTIMIZERS:
        net = network(job, model, data, width).double()
        beta = 0.9 if "+m" in name else 0.0
        params = net.parameters()
        optimizer: Optimizer = (
            torch.optim.SGD(params, lr=lr, momentum=beta)
            if name.startswith("GD")
            else torch.optim.Adam(params, lr=adam_lr, betas=(beta, 0.999))
        )
        hessian = so.HessianOperator(net, mse, batches)
        subspace = so.DominantSubspace(
            hessian, data.num_classes, refresh=1, tol=1e-7, seed=job.seed
        )
        monitor = so.Monitor(optimizer, subspace, every=every)
        losses: list[float] = []
        also = (subspace, monitor)
        train(job, name, net, mse, both, optimizer, steps=steps, also=also, losses=losses)
        monitor.detach()
        history = monitor.history
        raw[name] = {c: history[c] for c in ("step", "loss", "dom_lr", "bulk_lr", "chi_gradient")}
        # Adam's loss has spikes: a mean over the last tenth, of its logarithm.
        raw[name]["mean_log_loss"] = statistics.fmean(map(math.log, losses[-(steps // 10) :]))
        for rate in ("dom_lr", "bulk_lr"):
            raw[name][f"mean_{rate}"] = statistics.fmean(history[rate])
            raw[name][f"std_{rate}"] = statistics.pstdev(history[rate])
    return raw
