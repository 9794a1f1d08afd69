"""A model with the optimizer of a case, and beside it a reference that is no code of ours.

The reference is the plain optimizer of torch, stepped from the same parameters on a twin of the
model; its displacement is then mapped by dense float64 matrices of the exact Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import subspace_optim as so
from tests.contract.cases import Case, Groups, cloned
from tests.contract.settings import K, Setting, class_terms
from tests.optim.naive import ExactSubspace, assert_near, projector


def groups_of(
    case: Case, tensors: Sequence[Tensor], two: bool, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """One group of all, or the last tensor in a group of its own, with the second options."""
    members = [tensors[:-1], tensors[-1:]] if two else [tensors]
    own = [case.options | options, case.options | case.second | options][: len(members)]
    return [{"params": list(some)} | cloned(o) for some, o in zip(members, own, strict=True)]


class Run:
    """A model with the optimizer of a case, or with its optimizers and their projection."""

    def __init__(
        self,
        case: Case,
        setting: Setting | None = None,
        *,
        two_groups: bool = False,
        refresh: Any = None,
        subspace: Any = None,
        params: Iterable[Tensor] | None = None,
        everything: bool = False,
        **options: Any,
    ) -> None:
        self.case = case
        self.setting = case.setting() if setting is None else setting
        self.model = self.setting.model
        double = self.setting.operator.dtype == torch.float64
        if subspace is None and case.observes:
            subspace = so.ClassGradientSubspace(self.model, 2)
        if subspace is None and refresh is None:
            space = self.setting.operator.parameters
            subspace = ExactSubspace(space, self.setting.hessian, K)
        self.subspace = subspace or so.DominantSubspace(
            self.setting.operator, K, refresh=refresh, tol=1e-12 if double else 1e-5
        )
        held = self.model.parameters() if everything else self.setting.trained
        tensors = list(held if params is None else params)
        groups = groups_of(case, tensors, two_groups, options)
        self.handle = None
        if case.ours:
            extra = {"subspace": self.subspace} if case.has_subspace else {}
            self.optimizers = [case.ours(groups, **extra)]
        else:
            self.optimizers = case.plain(groups)
            self.project()

    def project(self) -> None:
        optimizers = self.optimizers if self.case.joint else self.optimizer
        self.handle = so.project_updates(optimizers, self.subspace, onto=self.case.part)

    @property
    def refreshes(self) -> int:
        """At how many parameter states a basis was made."""
        own = self.subspace
        return own.refreshes if isinstance(own, ExactSubspace) else own.stats.refreshes

    @property
    def optimizer(self) -> Any:
        return self.optimizers[0]

    @property
    def groups(self) -> Groups:
        return [group for each in self.optimizers for group in each.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.optimizers:
            each.zero_grad(set_to_none=set_to_none)

    def closure(self) -> Tensor:
        self.zero_grad()
        loss = self.setting.loss()
        loss.backward()
        return loss

    def apply(self) -> None:
        """Steps by the gradients that are there; SAM, as with a scaler, where it was prepared."""
        for each in self.optimizers:
            each.step()

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step as this optimizer takes it."""
        closure = closure or self.closure
        if self.case.observes:
            self.subspace.observe(*self.setting.batch)
        if self.case.needs_closure:
            self.optimizer.step(closure)
        else:
            closure()
            self.apply()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def theta(self) -> Tensor:
        return self.setting.theta()


class Reference:
    """The plain optimizers of torch on a twin, and what the case makes of their displacement."""

    def __init__(self, run: Run, setting: Setting, *, two_groups: bool = False, **options: Any):
        self.case, self.run, self.setting = run.case, run, setting
        groups = groups_of(self.case, setting.trained, two_groups, options)
        self.optimizers = self.case.plain(groups)
        self.first = [group["lr"] for group in self.groups]
        self.observed: list[tuple[Tensor, Tensor]] = []
        pieces = torch.arange(setting.operator.size).split([p.numel() for p in setting.trained])
        where = dict(zip(setting.trained, pieces, strict=True))
        self.indices = [torch.cat([where[p] for p in group["params"]]) for group in self.groups]

    @property
    def groups(self) -> Groups:
        return [group for each in self.optimizers for group in each.param_groups]

    def _gradients(self) -> Tensor:
        for p in self.setting.trained:
            p.grad = None
        loss = self.setting.loss()
        loss.backward()
        for p, twin in zip(self.setting.trained, self.run.setting.trained, strict=True):
            if twin in self.missing:
                p.grad = None
        return loss

    def step(self, missing: Iterable[Tensor] = ()) -> Tensor:
        """Returns the parameters one step from where the run is; parts have no gradient."""
        self.missing = set(missing)
        for p, twin in zip(self.setting.trained, self.run.setting.trained, strict=True):
            p.data.copy_(twin.data)
        theta = self.setting.theta()
        if self.case.observes:
            self.observed.append(class_terms(self.setting))
        if self.case.lbfgs:
            self.optimizers = [  # its memory was cleared
                type(each)(**each.param_groups[0]) for each in self.optimizers
            ]
            self.optimizers[0].step(self._gradients)
        else:
            self._gradients()
            if self.case.sam:
                self._perturbed(theta)
            rates = [group["lr"] for group in self.groups]
            if self.case.part == "newton":
                for group in self.groups:
                    group["lr"] = 1.0
            for each in self.optimizers:
                each.step()
            for group, rate in zip(self.groups, rates, strict=True):
                group["lr"] = rate
        update = self.setting.theta() - theta
        if self.case.part == "newton":
            return theta + self._newton(theta, -update)
        dominant = projector(self.setting.hessian(theta), K) @ update
        return (
            theta + {"dominant": dominant, "bulk": update - dominant, "all": update}[self.case.part]
        )

    def _perturbed(self, theta: Tensor) -> None:
        """Leaves the gradient at θ + ρg/‖g‖, or ρθ²g/‖|θ|g‖ of groups that are adaptive."""
        moves, squares = [], 0.0
        for group in self.groups:
            sign = -group["rho"] if group.get("maximize") else group["rho"]
            for p in group["params"]:
                if p.grad is not None:
                    scale = p.data.abs() if group.get("adaptive") else torch.ones_like(p)
                    squares += float((scale * p.grad).square().sum())
                    moves.append((p, sign * scale.square() * p.grad))
        for p, move in moves:
            if squares > 0:
                p.data.add_(move / math.sqrt(squares))
        self._gradients()
        for p, piece in zip(
            self.setting.trained,
            theta.split([p.numel() for p in self.setting.trained]),
            strict=True,
        ):
            p.data.copy_(piece.view(p.shape))

    def _newton(self, theta: Tensor, d: Tensor) -> Tensor:
        if self.case.observes:  # decay 0.9, with the correction of eqs. 16 and 17
            weights = 0.9 ** torch.arange(len(self.observed), dtype=torch.float64).flip(0)
            weights = weights / weights.sum()
            squares, means = (torch.stack(t) for t in zip(*self.observed, strict=True))
            top = (weights @ squares.square()).sqrt()
            V = F.normalize(torch.einsum("t,tkp->kp", weights, means), dim=1).T
        else:
            values, vectors = torch.linalg.eigh(self.setting.hessian(theta))
            top, V = values[-K:], vectors[:, -K:]
        update = torch.empty_like(d)
        for group, first, where in zip(self.groups, self.first, self.indices, strict=True):
            lr = float(group["lr"])
            inside, outside = lr, lr * group.get("bulk_ratio", 0.0)
            if "newton_lr" in group:
                inside, outside = group["newton_lr"] * lr / float(first), lr
            curvature = top + group["damping"]
            assert bool((curvature > 0.1).all())
            factors = inside / curvature - outside
            update[where] = -outside * d[where] - V[where] @ (factors * (V.T @ d))
        return update


def pair(
    case: Case,
    factory: Callable[[], Setting] | None = None,
    *,
    two_groups: bool = False,
    **options: Any,
) -> tuple[Run, Reference]:
    """A run and its reference, from equal problems; with a fresh basis at every step."""
    factory = factory or case.setting
    run = Run(case, factory(), two_groups=two_groups, **options)
    return run, Reference(run, factory(), two_groups=two_groups, **options)


def same(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Equal bit for bit, and as many."""
    a, b = list(left), list(right)
    return len(a) == len(b) and all(map(torch.equal, a, b))


def follow(run: Run, reference: Reference, steps: int = 3, relative: float = 1e-8) -> None:
    """Each displacement is the reference's, from where the run is."""
    for _ in range(steps):
        theta, expected = run.theta(), reference.step()
        run.step()
        assert_near(run.theta() - theta, expected - theta, relative)
        assert float((expected - theta).norm()) > 0


def watch(run: Run) -> list[str]:
    """Notes the step hooks, and the parameters that they see."""
    calls: list[str] = []
    for optimizer in run.optimizers:
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    return calls


def scaled_step(run: Run, scaler: Any, bad: float | None = None, at: int = 0) -> None:
    """A step with a scaler; one element of the first parameter's gradient may be bad.

    Args:
        run: whose step.
        scaler: as users have it.
        bad: the element, or none.
        at: in which backward pass of SAM.
    """
    passes = 2 if run.case.sam else 1
    run.zero_grad()
    for number in range(passes):
        scaler.scale(run.setting.loss()).backward()
        if bad is not None and number == at:
            for optimizer in run.optimizers:
                optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = bad
        if run.case.sam and number == 0:
            run.optimizer.first_step(zero_grad=True)
    if run.case.sam:
        scaler.unscale_(run.optimizer)
        run.optimizer.second_step()
    else:
        for optimizer in run.optimizers:
            scaler.step(optimizer)
    scaler.update()
