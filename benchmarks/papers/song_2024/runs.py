"""What is measured for `song_2024` along trainings, by the sizes of `runs.toml`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import subspace_optim as so
from benchmarks.data import Dataset
from benchmarks.experiment import WARMUP, Settings, compare
from benchmarks.losses import LOSSES
from benchmarks.models import CNN, Transformer, mlp
from benchmarks.papers import networks, problems
from benchmarks.papers.checkpoint import Checkpoint
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, train
from benchmarks.progress import doing
from subspace_optim.curvature.contexts import Mode
from subspace_optim.diagnostics.rows import Measures

Columns = dict[str, list[Any]]


def dataset(job: Job, model: str, examples: int, pool: int) -> Dataset:
    """Returns the data that the paper trains a model on; images smaller by a factor ``pool``."""
    name = {"mlp": "mnist-5k", "transformer": "sst2-1k"}.get(model, "cifar10-5k")
    data = problems.real(name, job, examples, test=0)
    return problems.pooled(data, pool)


def network(job: Job, model: str, data: Dataset, width: int) -> nn.Module:
    """Returns one of the paper's five architectures, freshly drawn, or ResNet8 without its norm."""
    outputs = data.num_classes
    shape = tuple(data.x_train.shape[1:])

    def resnet8() -> nn.Module:
        return networks.resnet(outputs, (width, 2 * width, 4 * width), 1)

    makers: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: mlp(math.prod(shape), outputs, width=width),
        "cnn": lambda: CNN((shape[0], shape[1], shape[2]), outputs, width=width),
        "transformer": lambda: networks.ByLength(
            Transformer(
                data.vocabulary or 0,  # of images, which it does not get
                shape[0],
                outputs,
                width=width,
                heads=max(1, width // 8),  # the paper's: 8 of 64
            )
        ),
        "vgg11": lambda: networks.vgg11(outputs, width=width),
        "resnet8": resnet8,
        "resnet8-without-norm": lambda: networks.without_norm(resnet8()),
    }
    return networks.made(job, makers[model])


def problem_of(job: Job, model: str, data: Dataset, width: int, loss: str = "mse") -> Problem:
    """Returns one of them to be trained by a loss, the squared error if no other is told."""
    return Problem(network(job, model, data, width), LOSSES[loss], data.x_train, data.y_train)


def columns(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Columns:
    """Returns rows as columns; what a row lacks is NaN."""
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


def watched(
    job: Job,
    name: str,
    problem: Problem,
    optimizer: Optimizer,
    subspace: so.DominantSubspace,
    names: Sequence[str],
    *,
    every: int,
    measures: Measures | None = None,
    first: int = 0,
    **how: Any,
) -> tuple[Columns, list[Row]]:
    """Trains, as ``train`` does, under the eyes of a ``Monitor``.

    Returns:
        Columns of the monitor by name, of those that it has, and the rows of ``train``. Steps are
        counted from the first one of all, where the monitor counts from that of this training.
    """
    monitor = so.Monitor(optimizer, subspace, measures=measures, every=every)
    also = (subspace, monitor)
    rows = train(job, name, problem, optimizer, first=first, also=also, **how)
    monitor.detach()
    history = monitor.history
    seen = {column: history[column] for column in names if column in history}
    return seen | {"step": [first + step for step in history["step"]]}, rows


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
    replacement: bool = True,
    shuffled: int = 0,
    loss_every: int = 1,
    **settings: Any,
) -> Raw:
    """SGD until its gradient is dominant; from there SGD and its projections, each by itself.

    Single losses jump, by more than what some steps achieve: in a branch the loss over all data is
    taken at every step, or at one in so many where it is smooth.

    Returns:
        The switch; columns of each phase; of each branch the losses, from the switch on, and its
        final distance; ``relaxations``, η times its steps times λ_k at the switch: of what is left
        along the k-th eigenvector, e to the power of minus that many are left at the end; and if
        ``shuffled`` is not 0, columns of ``in_shuffled_epochs``.

    Raises:
        KeyboardInterrupt: it was interrupted, and can be taken up again.
    """
    data = dataset(job, model, examples, pool)
    net = network(job, model, data, width)
    checkpoint = Checkpoint(None if job.scratch is None else job.scratch / "compare.pt")
    losses: dict[str, list[float]] = {name: [] for name in optimizers}
    at_switch: dict[str, Tensor] = {}
    kept = None

    def load(state: Raw) -> None:
        nonlocal kept, losses, at_switch
        kept, losses = state["experiment"], state["losses"]
        at_switch = kept["switch_model"]  # also where no step of the comparison is left

    checkpoint.take_up(job.device, load)

    def after_step(experiment: Any, measured: bool) -> None:
        nonlocal at_switch
        at_switch = experiment.switch_model
        done = experiment.step - (experiment.result.switch_step or 0)
        over = experiment.result.finished
        if experiment.phase in losses and not over and done % loss_every == 0:
            losses[experiment.phase].append(experiment.loss())
        latest = [f"loss {row['loss']:.4g}" for row in experiment.result.rows[-1:]]
        task.at(experiment.step, ", ".join([f"{experiment.phase} step {experiment.step}", *latest]))
        checkpoint.keep(
            lambda: {"experiment": experiment.state_dict(), "losses": losses}, measured=measured
        )

    with doing("comparing") as task, checkpoint.held():
        result = compare(
            net,
            LOSSES[loss],
            (data.x_train, data.y_train),
            list(optimizers),
            settings=Settings(
                k=data.num_classes,
                warmup_measure=look,
                refresh=refresh,
                replacement=replacement,
                seed=job.seed,
                **settings,
            ),
            resume_from=kept,
            on_progress=after_step,
        )
    if not result.finished:  # an interrupt, which ``compare`` takes for the end
        raise KeyboardInterrupt
    for name, branch in result.branches.items():
        if branch.stopped:  # perhaps between two steps at which the loss was taken
            losses[name].append(math.inf)
    phases = {name: columns(result.of(name), _OF_A_PHASE) for name in (WARMUP, *result.branches)}
    more: Raw = {}
    if shuffled:
        net.load_state_dict(at_switch)
        problem = Problem(net, LOSSES[loss], data.x_train, data.y_train)
        more["shuffled"] = in_shuffled_epochs(
            job, problem, data.num_classes, result.settings, result.switch_step or 0, shuffled
        )
    return more | {
        "parameters": sum(p.numel() for p in net.parameters()),
        "switch_step": result.switch_step,
        "switch_reason": result.switch_reason,
        "phases": phases,
        "losses": losses,
        "loss_every": loss_every,
        "relaxations": settings["lr"] * settings["steps"] * phases["SGD"]["eigenvalues"][0][-1],
        "final_distance": {name: branch.distance for name, branch in result.branches.items()},
    }


def in_shuffled_epochs(
    job: Job, problem: Problem, k: int, settings: Settings, first: int, steps: int
) -> Columns:
    """SGD goes on with minibatches of shuffled epochs: χ_k at their ends, and half-way between.

    The minibatches of an epoch together are all the data: over whole ones the noise adds up to
    nothing but for what changes meanwhile, which minibatches with replacement do not do.

    Returns:
        Columns of the last three epochs; ``place`` is 0 at the end of one, and 1 half-way.
    """
    hessian = problem.hessian(settings.chunk)
    subspace = so.DominantSubspace(hessian, k, refresh=1, tol=settings.tol, seed=job.seed)
    epoch = max(2, len(problem.x) // settings.batch_size)
    half, last = epoch // 2, first + steps

    def record(step: int) -> Row | None:
        place = step % epoch
        if place not in (0, half):  # the last step is recorded whatever it is
            return None
        return {"place": int(place == half), "chi_gradient": _alignment(hessian, subspace)}

    rows = train(
        job,
        "shuffled",
        problem,
        problem.sgd(settings.lr),
        steps=steps,
        batch_size=settings.batch_size,
        record=record,
        every=lambda step: step > last - 3 * epoch and step % epoch in (0, half),
        first=first,
    )
    return columns(rows, ("step", "place", "chi_gradient"))


def _alignment(hessian: so.HessianOperator, subspace: so.DominantSubspace) -> float:
    """χ_k of the gradient over all data."""
    return float(so.diagnostics.alignment(hessian.gradient(), subspace.refresh()))


def by_examples(
    job: Job,
    *,
    model: str,
    loss: str = "mse",
    lr: float,
    width: int,
    pool: int,
    counts: Sequence[int],
    steps: int,
    every: int,
) -> Raw:
    """SGD on so many examples, and on more: χ_k along each, from the same initial parameters.

    Returns:
        For each count, loss and χ_k of the rows after step 0, where parameters are random.
    """

    def sgd_on(count: int) -> Columns:
        data = dataset(job, model, count, pool)
        problem = problem_of(job, model, data, width, loss)
        hessian, k = problem.hessian(), data.num_classes
        subspace = so.DominantSubspace(hessian, k, refresh=1, tol=1e-2, seed=job.seed)

        def record(step: int) -> Row | None:
            if step == 0:
                return None
            return {"loss": hessian.loss(), "chi_gradient": _alignment(hessian, subspace)}

        rows = train(
            job,
            f"sgd-{count}",
            problem,
            problem.sgd(lr),
            steps=steps,
            batch_size=50,
            replacement=True,
            record=record,
            every=every,
        )
        return columns(rows, ("step", "loss", "chi_gradient"))

    return {"counts": list(counts)} | {str(count): sgd_on(count) for count in counts}


_MODES: Final[tuple[Mode, Mode]] = ("train", "eval")


def by_mode(
    job: Job, *, model: str, lr: float, width: int, examples: int, pool: int, steps: int, every: int
) -> Raw:
    """SGD, and the spectrum at its parameters with batch norm in train mode and in eval mode.

    Returns:
        Of each mode columns after step 0, where the running statistics are none of the data's.
    """
    data = dataset(job, model, examples, pool)
    problem = problem_of(job, model, data, width)
    probes = {mode: _probe(problem, data.num_classes, job.seed, mode) for mode in _MODES}

    def record(step: int) -> Row | None:
        return {mode: probe(step) for mode, probe in probes.items()} if step else None

    rows = train(
        job,
        "sgd",
        problem,
        problem.sgd(lr),
        steps=steps,
        batch_size=50,
        replacement=True,
        record=record,
        every=every,
    )
    return {
        mode: columns([{"step": row["step"]} | row.get(mode, {}) for row in rows], _OF_A_PROBE)
        for mode in probes
    }


# --- noise: Figures 4-5 and 18-21 --------------------------------------------------------------


def _probe(problem: Problem, k: int, seed: int, mode: Mode | None = None) -> Callable[[int], Row]:
    """Measures a training at θ_t: loss, χ_k, and the top 2k eigenvalues, by one solve."""
    hessian = problem.hessian(mode=mode)
    # The k pairs beyond the dominant ones make those converge well below this tolerance.
    subspace = so.DominantSubspace(hessian, 2 * k, refresh=1, tol=1e-2, seed=seed)

    def measured(_: int) -> Row:
        both = subspace.refresh()
        basis = both.first(k)
        return {
            "loss": hessian.loss(),
            "chi_gradient": float(so.diagnostics.alignment(hessian.gradient(), basis)),
            "eigenvalues": basis.eigenvalues.tolist(),
            "next_eigenvalues": both.eigenvalues[k:].tolist(),
        }

    return measured


_OF_A_PROBE: Final = ("step", "loss", "chi_gradient", "eigenvalues", "next_eigenvalues")


def by_batch_size(
    job: Job,
    *,
    model: str,
    loss: str,
    lr: float,
    width: int,
    examples: int,
    pool: int = 1,
    switch: int,
    steps: int,
    every: int,
    batch_sizes: Sequence[int],
) -> Raw:
    """SGD with minibatches of one size; from the switch on with those of others too.

    Returns:
        The switch, the sizes, the first one being that before the switch, and of each columns
        from the switch on.
    """
    data = dataset(job, model, examples, pool)
    problem = problem_of(job, model, data, width, loss)
    probe, sgd = _probe(problem, data.num_classes, job.seed), problem.sgd(lr)
    train(job, "before", problem, sgd, steps=switch, batch_size=batch_sizes[0], replacement=True)
    at_switch = copy.deepcopy(problem.model.state_dict())
    raw: Raw = {"switch_step": switch, "batch_sizes": list(batch_sizes)}
    for size in batch_sizes:
        problem.model.load_state_dict(at_switch)
        rows = train(
            job,
            f"of-{size}",
            problem,
            sgd,
            steps=steps,
            batch_size=size,
            replacement=True,
            record=probe,
            every=every,
            first=switch,
        )
        raw[str(size)] = columns(rows, _OF_A_PROBE)
    return raw


def switching(
    job: Job, *, lr: float, width: int, examples: int, sgd_first: int, gd_first: int, after: int
) -> Raw:
    """SGD and then GD; and GD and then SGD, at one rate, from one initialisation."""
    data = dataset(job, "mlp", examples, 1)
    raw: Raw = {}
    for name, sizes, first in (
        ("SGD to GD", (50, None), sgd_first),
        ("GD to SGD", (None, 50), gd_first),
    ):
        problem = problem_of(job, "mlp", data, width)
        probe, optimizer = _probe(problem, data.num_classes, job.seed), problem.sgd(lr)
        rows: list[Row] = []
        parts = ((0, first, first // 10), (first, after, max(1, after // 50)))
        for number, (start, steps, every) in enumerate(parts):
            rows += train(
                job,
                f"{name}-{number}",
                problem,
                optimizer,
                steps=steps,
                batch_size=sizes[number],
                replacement=True,
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
    """GD and SGD side by side from one initialisation: χ_k along both, and how far they part."""
    data = dataset(job, model, examples, pool)
    plain, noisy = (problem_of(job, model, data, width) for _ in range(2))
    probe, probe_noisy = (_probe(each, data.num_classes, job.seed) for each in (plain, noisy))
    sgd = noisy.sgd(lr)
    start, other = plain.theta(), noisy.theta()
    # Without checkpoints: the second training lives inside the records of the first.
    job = Job(job.seed, job.device)
    done = 0

    def record(step: int) -> Row:
        nonlocal done, other
        steps = step - done
        train(job, "", noisy, sgd, steps=steps, batch_size=50, replacement=True, first=done)
        done, other = step, noisy.theta()
        theta = plain.theta()
        distances = {"GD": theta - start, "SGD": other - start, "GD to SGD": theta - other}
        chi = probe_noisy(step)["chi_gradient"]
        lengths = {name: float(d.norm()) for name, d in distances.items()}
        return probe(step) | {"chi_of_sgd": chi} | lengths

    rows = train(job, "", plain, plain.sgd(lr), steps=steps, record=record, every=every)
    return columns(rows, (*_OF_A_PROBE, "chi_of_sgd", "GD", "SGD", "GD to SGD"))


# --- edge of stability and SAM: Figures 9-10 ---------------------------------------------------


_OF_A_MONITOR: Final = (
    *("step", "loss", "chi_gradient", "chi_update", "gradient_norm"),
    *("eigenvalues", "next_eigenvalues", "threshold", "sam_edge"),
)


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

    Returns:
        Columns of each phase, those of ``Monitor``, and the losses of all its steps: at the edge
        they go up and down, so that single ones say little. ``relaxations`` are
        those of ``critical_experiment``.
    """
    data = dataset(job, "mlp", examples, 1)
    k = data.num_classes
    problem = problem_of(job, "mlp", data, width)
    net, hessian = problem.model, problem.hessian()
    unprojected, options = ("SAM", {"lr": lr, "rho": rho}) if rho else ("GD", {"lr": lr})
    sgd, sam = (torch.optim.SGD, so.DomSGD, so.BulkSGD), (so.SAM, so.DomSAM, so.BulkSAM)
    plain, dom, bulk = cast("tuple[type[Any], ...]", sam if rho else sgd)
    kinds = {"before": plain, unprojected: plain}
    kinds |= {f"Dom-{unprojected}": dom, f"Bulk-{unprojected}": bulk}
    raw: Raw = {"switch_step": switch, "rho": rho, "losses": {}}
    at_switch: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        warm = name == "before"
        if not warm:
            net.load_state_dict(at_switch)
        subspace = so.DominantSubspace(hessian, k, refresh=refresh, seed=job.seed)
        more = {} if kind is plain else {"subspace": subspace}
        optimizer = kind(net.parameters(), **options, **more)
        measures = so.measures.dominant()
        if kind is not dom:
            measures.append(so.measures.next_eigenvalues(k))
        losses: list[float] = []
        raw["losses"][name] = losses
        raw[name], _ = watched(
            job,
            name,
            problem,
            optimizer,
            subspace,
            _OF_A_MONITOR,
            every=every if warm else measure,
            measures=measures,
            first=0 if warm else switch,
            steps=switch if warm else after,
            losses=losses,
        )
        if warm:
            at_switch = copy.deepcopy(problem.model.state_dict())
    return raw | {"relaxations": lr * after * raw[unprojected]["eigenvalues"][0][-1]}
