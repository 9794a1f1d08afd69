"""What is measured for appendix C of `song_2024`: Phenomenon 2 with momentum, and with Adam."""

from __future__ import annotations

import copy
import math
from typing import Any, Final, Literal

import torch
from torch.optim import Optimizer

import subspace_optim as so
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.song_2024.runs import dataset, problem_of, watched
from benchmarks.papers.training import Problem

BRANCHES: Final = ("plain", "SGD", "Dom", "Bulk")
"""SGD, without momentum, is the control of the plain optimizer: of the same point."""
_COLUMNS: Final = ("step", "loss", "chi_gradient", "chi_update", "eigenvalues")
_PARTS: Final[dict[str, Literal["dominant", "bulk"]]] = {"Dom": "dominant", "Bulk": "bulk"}


def with_momentum(
    job: Job,
    *,
    optimizer: str,
    lr: float,
    width: int,
    examples: int,
    switch: int,
    every: int,
    after: int,
    measure: int,
    control_lr: float,
    refresh: int | Literal["auto"] = "auto",
    projected: Literal["update", "gradient", "both"] = "update",
) -> Raw:
    """SGD with momentum, or Adam; from the switch on it, its projections, and SGD without momentum.

    The momentum goes on through the switch. Projected is the step that comes of it, while it sees
    the whole gradients; or, as other readings, each gradient that it sees, or both.

    Returns:
        Columns of each phase, those of ``Monitor``, and the losses over all data at each step of a
        branch, and at its end.
    """
    data = dataset(job, "mlp", examples, 1)
    problem = problem_of(job, "mlp", data, width)
    hessian = problem.hessian()
    raw: Raw = {"switch_step": switch, "losses": {}, "relaxations": math.nan}
    kept: dict[str, Any] = {}
    for name in ("before", *BRANCHES):
        warm = name == "before"
        control = name == "SGD"
        stepper = problem.sgd(control_lr) if control else _optimizer(optimizer, problem, lr)
        if not warm:
            problem.model.load_state_dict(kept["model"])
        if not warm and not control:
            stepper.load_state_dict(copy.deepcopy(kept["optimizer"]))
        subspace = so.DominantSubspace(hessian, data.num_classes, refresh=refresh, seed=job.seed)
        if name in _PARTS and projected in ("update", "both"):
            so.project_updates(stepper, subspace, _PARTS[name])
        if name in _PARTS and projected in ("gradient", "both"):
            _project_gradients(stepper, subspace, _PARTS[name])
        raw[name], rows = watched(
            job,
            name,
            problem,
            stepper,
            subspace,
            _COLUMNS,
            every=every if warm else measure,
            first=0 if warm else switch,
            steps=switch if warm else after,
            batch_size=50,
            replacement=True,
            record=None if warm else lambda _: {"loss": problem.loss()},
        )
        if warm:
            kept = copy.deepcopy(
                {"model": problem.model.state_dict(), "optimizer": stepper.state_dict()}
            )
        else:
            raw["losses"][name] = [row.get("loss", float("nan")) for row in rows]
    return raw


def _project_gradients(
    optimizer: Optimizer, subspace: so.DominantSubspace, onto: Literal["dominant", "bulk"]
) -> None:
    """Lets an optimizer that is stepped with a closure see one part of its gradient alone."""
    space = subspace.parameters

    def step_on_part(
        _: Optimizer, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        stepped, closure = args

        def of_part() -> Any:
            loss = closure()
            gradients = [p.grad for p in space.tensors]
            whole = space.flatten(gradients)
            basis = subspace.update()
            part = basis.project(whole) if onto == "dominant" else basis.project_out(whole)
            for gradient, value in zip(gradients, space.unflatten(part), strict=True):
                if gradient is not None:
                    gradient.copy_(value)
            return loss

        return (stepped, of_part), options

    optimizer.register_step_pre_hook(step_on_part)


def _optimizer(name: str, problem: Problem, lr: float) -> Optimizer:
    """Returns SGD with the paper's momentum, or Adam."""
    if name == "Adam":
        return torch.optim.Adam(problem.model.parameters(), lr=lr)
    return problem.sgd(lr, momentum=0.9)
