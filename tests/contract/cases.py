"""The optimizers under contract, and beside each a reference that is no code of ours.

The reference is the plain optimizer of torch, stepped from the same parameters on a twin of the
model; its displacement is then mapped by dense float64 matrices of the exact Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import subspace_optim as so
from subspace_optim.curvature import CurvatureOperator
from tests.optim.naive import (
    DenseOperator,
    ExactSubspace,
    Quartic,
    flat,
    landscape,
    projector,
)

K = 2
LR = 0.0625  # a power of two: the same number in float32 tensors


# Problems.


@dataclass(frozen=True)
class Problem:
    """A model, its loss, and the exact Hessian as a function of the flat float64 parameters."""

    model: nn.Module
    loss: Callable[[], Tensor]
    hessian: Callable[[Tensor], Tensor]
    operator: CurvatureOperator
    batch: tuple[Tensor, Tensor] | None = None

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def theta(self) -> Tensor:
        return flat(self.trained)


def quartic(dtype: torch.dtype = torch.float64) -> Problem:
    """Closed forms; one of its three parameters is 0-d."""
    model = Quartic(dtype=dtype)
    return Problem(model, model, model.hessian, DenseOperator(model))


_LAST: dict[str, tuple[Tensor, Tensor]] = {}


def remembered(name: str, hessian: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same matrix at the same point: twins ask for it one after the other."""

    def of(theta: Tensor) -> Tensor:
        if name not in _LAST or not torch.equal(_LAST[name][0], theta):
            _LAST[name] = theta.clone(), hessian(theta)
        return _LAST[name][1]

    return of


class Odd(nn.Module):
    """Tied, non-contiguous and 0-d parameters, of which nothing is in the usual layout."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        draw = torch.randn(3, 2, generator=random, dtype=torch.float64)
        self.encoder = nn.Parameter(draw.t())  # (2, 3) with strides (1, 2)
        self.decoder = self.encoder
        self.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64)[::2])
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(x @ self.encoder.T) @ self.decoder + self.bias


def odd() -> Problem:
    model = Odd()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hessian = remembered("odd", landscape(model, F.mse_loss, x, x).hessian)
    operator = so.HessianOperator(model, F.mse_loss, (x, x), verify=False)
    return Problem(model, lambda: F.mse_loss(model(x), x), hessian, operator)


def data(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=random))
    x, y = torch.randn(8, 3, generator=random), torch.randn(8, 2, generator=random)
    return model, x.to(dtype), y.to(dtype)


def network(dtype: torch.dtype = torch.float64) -> Problem:
    model, x, y = data(dtype)
    hessian = remembered(f"network {dtype}", landscape(model, F.mse_loss, x, y).hessian)
    operator = so.HessianOperator(model, F.mse_loss, (x, y), verify=False)
    return Problem(model, lambda: F.mse_loss(model(x), y), hessian, operator)


def frozen() -> Problem:
    """The network whose first layer is frozen: its Hessian is that of the last, written out."""
    model, x, y = data()
    model[0].requires_grad_(False)
    with torch.no_grad():
        hidden = model[1](model[0](x))
    hessian = remembered("frozen", landscape(model[2], F.mse_loss, hidden, y).hessian)
    operator = so.HessianOperator(model, F.mse_loss, (x, y), verify=False)
    return Problem(model, lambda: F.mse_loss(model(x), y), hessian, operator)


def classified(dtype: torch.dtype = torch.float64) -> Problem:
    """A network of two classes, and the minibatch that a class-gradient subspace observes."""
    model, x, _ = data(dtype)
    y = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])
    hessian = remembered(f"classified {dtype}", landscape(model, F.cross_entropy, x, y).hessian)
    operator = so.HessianOperator(model, F.cross_entropy, (x, y), verify=False)
    return Problem(model, lambda: F.cross_entropy(model(x), y), hessian, operator, (x, y))


def class_terms(problem: Problem) -> tuple[Tensor, Tensor]:
    """λ_k^B and c_k^B of `class_gradient_2020` (eqs. 8, 12): one example after the other."""
    assert problem.batch is not None
    x, y = problem.batch
    squares, vectors = [], []
    for k in range(2):
        slopes, spread = [], 0.0
        for one_x in x[y == k]:
            logits = problem.model(one_x[None])[0]
            slopes.append(flat(torch.autograd.grad(logits[k], problem.trained, retain_graph=True)))
            probability = float(logits.detach().double().softmax(0)[k])
            spread += probability * (1 - probability)
        vectors.append(torch.stack(slopes).mean(0))
        squares.append(spread / len(x) * vectors[-1].square().sum())
    return torch.stack(squares), torch.stack(vectors)


class UserSubspace:
    """A user's own subspace: one basis object for ever."""

    def __init__(self, problem: Problem, basis: so.EigenBasis) -> None:
        self.parameters = problem.operator.parameters
        self.basis = basis

    def update(self) -> so.EigenBasis:
        return self.basis


# Optimizers as others write them.


class Homemade(Optimizer):
    """A third party's: its own momentum of signs, written from nothing, with no call of `super`."""

    def __init__(self, params: Any, lr: Any = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                old = state.get("average", torch.zeros_like(p))
                state["average"] = group["momentum"] * old + p.grad
                p.add_(torch.atan(state["average"]), alpha=-float(group["lr"]))
        return loss


class Derived(torch.optim.Adam):
    """A subclass that calls `super().step()`: torch fires the step hooks for both, one in other."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class DecaysAfter(torch.optim.Adam):
    """It goes on moving after the inner step, whose hooks have been fired by then."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self._decay()
        return loss

    @torch.no_grad()
    def _decay(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.25 * float(group["lr"]))


class DecaysBefore(DecaysAfter):
    """It moves before the inner step, between the first hooks and the second."""

    def step(self, closure: Any = None) -> Any:
        self._decay()
        return torch.optim.Adam.step(self, closure)


# The cases.

Groups = list[dict[str, Any]]


def cloned(group: dict[str, Any]) -> dict[str, Any]:
    """With tensors of its own: a scheduler fills a tensor rate in place."""
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in group.items()}


def one(cls: Any) -> Callable[[Groups], list[Optimizer]]:
    def make(groups: Groups) -> list[Optimizer]:
        # Told to the constructor too, as torch's scaler asks what that has heard.
        fused = {"fused": True} if groups[0].get("fused") else {}
        return [cls(groups, **fused)]

    return make


def muon_and_adamw(groups: Groups) -> list[Optimizer]:
    """Muon for matrices, AdamW for the rest: as many groups each as there are."""
    optimizers: list[Optimizer] = []
    for cls, of_cls in ((torch.optim.Muon, True), (torch.optim.AdamW, False)):
        parts = [
            cloned(g) | {"params": [p for p in g["params"] if (p.dim() == 2) is of_cls]}
            for g in groups
        ]
        optimizers.append(cls([part for part in parts if part["params"]]))
    return optimizers


@dataclass(frozen=True)
class Case:
    """An optimizer of ours, or the projection of others.

    Attributes:
        name: of the case.
        plain: from groups, torch's own optimizers without any subspace: those to project, or the
            reference of ours.
        options: of all groups.
        second: what differs in the second group, where a test has two.
        part: what is taken of the plain displacement: ``"dominant"``, ``"bulk"``, ``"all"``, or
            ``"newton"``, which scales it.
        ours: the class, where it is no projection.
        needs_closure: it evaluates the loss itself.
        factory: makes the problem that it runs on, in a dtype.
        joint: there are several optimizers, which are projected together.
    """

    name: str
    plain: Callable[[Groups], list[Optimizer]]
    options: dict[str, Any]
    second: dict[str, Any] = field(default_factory=dict)
    part: str = "all"
    ours: Any = None
    needs_closure: bool = False
    factory: Callable[..., Problem] = quartic
    joint: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def sam(self) -> bool:
        return self.ours is not None and "rho" in self.options

    @property
    def has_subspace(self) -> bool:
        return self.ours is not so.SAM

    @property
    def takes_groups(self) -> bool:
        return bool(self.second)

    @property
    def observes(self) -> bool:
        """Its subspace is one of class gradients, which it is fed."""
        return self.factory is classified

    @property
    def lbfgs(self) -> bool:
        return self.needs_closure and not self.sam

    @property
    def momentum(self) -> str | None:
        """The option that torch's cyclic schedulers would cycle."""
        for name in ("momentum", "betas"):
            if self.options.get(name) and not self.joint:
                return name
        return None


MOMENTUM = {"lr": LR, "momentum": 0.9}
SECOND = {"lr": LR / 4, "momentum": 0.5, "weight_decay": 0.1}
NEWTON = {"lr": 0.25, "damping": 0.5, "bulk_ratio": 0.125, "momentum": 0.5}
QUASI = {"lr": LR, "newton_lr": 0.25, "damping": 0.5, "momentum": 0.5}
SHARP = MOMENTUM | {"rho": 0.1}
sgd = one(torch.optim.SGD)

_OURS = [
    Case("DomSGD", sgd, MOMENTUM, SECOND, "dominant", so.DomSGD),
    Case("BulkSGD", sgd, MOMENTUM, SECOND, "bulk", so.BulkSGD),
    Case("SAM", sgd, SHARP, SECOND | {"rho": 0.3}, "all", so.SAM, True),
    Case("DomSAM", sgd, SHARP, SECOND | {"rho": 0.3}, "dominant", so.DomSAM, True),
    Case("BulkSAM", sgd, SHARP, SECOND | {"adaptive": True}, "bulk", so.BulkSAM, True),
    Case(
        "LowRankNewton",
        sgd,
        NEWTON,
        {"lr": 0.125, "damping": 1.0, "bulk_ratio": 0.5, "momentum": 0.0},
        "newton",
        so.LowRankNewton,
    ),
    Case(
        "ClassGradientQuasiNewton",
        sgd,
        QUASI,
        {"lr": LR / 2, "newton_lr": 0.5, "damping": 1.0, "momentum": 0.9},
        "newton",
        so.ClassGradientQuasiNewton,
    ),
]

# On the subspace that it is made for, which has no Hessian, no refreshes and no projector.
OBSERVING = Case(
    "ClassGradientQuasiNewton, observing",
    sgd,
    QUASI,
    {"lr": LR / 2, "newton_lr": 0.5, "damping": 1.0, "momentum": 0.9},
    "newton",
    so.ClassGradientQuasiNewton,
    factory=classified,
)

_SLOW = {"lr": LR / 4, "weight_decay": 0.1}
_BETAS = {"betas": (0.9, 0.99)}
_ADAM = {"lr": LR} | _BETAS
_OTHERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": LR}, _SLOW),
    "SGD momentum": (torch.optim.SGD, MOMENTUM, SECOND),
    "SGD nesterov": (torch.optim.SGD, MOMENTUM | {"nesterov": True}, SECOND),
    "SGD foreach": (torch.optim.SGD, MOMENTUM | {"foreach": True}, SECOND),
    "SGD fused": (torch.optim.SGD, MOMENTUM | {"fused": True}, SECOND),
    "Adam": (torch.optim.Adam, _ADAM, _SLOW),
    "AdamW": (torch.optim.AdamW, _ADAM, _SLOW),
    "AdamW foreach": (torch.optim.AdamW, _ADAM | {"foreach": True}, _SLOW),
    "AdamW fused": (torch.optim.AdamW, _ADAM | {"fused": True}, _SLOW),
    "AdamW amsgrad": (torch.optim.AdamW, _ADAM | {"amsgrad": True}, _SLOW),
    "RMSprop": (torch.optim.RMSprop, MOMENTUM, SECOND),
    "Adagrad": (torch.optim.Adagrad, {"lr": LR}, _SLOW),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}, _SLOW),
    "Adamax": (torch.optim.Adamax, _ADAM, _SLOW),
    "NAdam": (torch.optim.NAdam, _ADAM, _SLOW),
    "RAdam": (torch.optim.RAdam, _ADAM, _SLOW),
    "ASGD": (torch.optim.ASGD, {"lr": LR}, _SLOW),
    "Rprop": (torch.optim.Rprop, {"lr": LR}, {"lr": LR / 4}),
    "Adafactor": (torch.optim.Adafactor, {"lr": LR}, _SLOW),
    "third party": (Homemade, MOMENTUM, {"lr": LR / 4, "momentum": 0.5}),
    "subclass of Adam": (Derived, _ADAM, _SLOW),
}

_PROJECTED = [
    case
    for part in ("dominant", "bulk")
    for case in (
        *(
            Case(f"{name}, {part}", one(cls), options, second, part)
            for name, (cls, options, second) in _OTHERS.items()
        ),
        Case(f"Muon + AdamW, {part}", muon_and_adamw, {"lr": LR}, {}, part, joint=True),
        Case(f"LBFGS, {part}", one(torch.optim.LBFGS), {"lr": 0.5}, {}, part, needs_closure=True),
    )
]

CASES = {case.name: case for case in (*_OURS, *_PROJECTED)}
OURS = [case for case in CASES.values() if case.ours]
IN_SUBSPACE = [case for case in OURS if case.has_subspace]
PROJECTED = [case for case in CASES.values() if not case.ours]
ALL = list(CASES.values())
# Where a test is about something that does not depend on the part, one of the two is enough.
EACH = [*OURS, *(case for case in PROJECTED if case.part == "dominant")]
# Where it is about how a step is taken and not about which: one tensor after the other, all at
# once, by a kernel, by others' code, with hooks inside of hooks, in turn, and many moves in one.
_WAYS = "SGD momentum, SGD foreach, AdamW fused, third party, subclass of Adam, Muon + AdamW, LBFGS"
SOME = [*OURS, *(CASES[f"{name}, dominant"] for name in _WAYS.split(", "))]


# A run.


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
        problem: Problem | None = None,
        *,
        two_groups: bool = False,
        refresh: Any = None,
        subspace: Any = None,
        params: Iterable[Tensor] | None = None,
        everything: bool = False,
        **options: Any,
    ) -> None:
        self.case = case
        self.problem = case.factory() if problem is None else problem
        self.model = self.problem.model
        double = self.problem.operator.dtype == torch.float64
        if subspace is None and case.observes:
            subspace = so.ClassGradientSubspace(self.model, 2)
        if subspace is None and refresh is None:
            space = self.problem.operator.parameters
            subspace = ExactSubspace(space, self.problem.hessian, K)
        self.subspace = subspace or so.DominantSubspace(
            self.problem.operator, K, refresh=refresh, tol=1e-12 if double else 1e-5
        )
        held = self.model.parameters() if everything else self.problem.trained
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
        loss = self.problem.loss()
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
            self.subspace.observe(*self.problem.batch)
        if self.case.needs_closure:
            self.optimizer.step(closure)
        else:
            closure()
            self.apply()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def theta(self) -> Tensor:
        return self.problem.theta()


class Reference:
    """The plain optimizers of torch on a twin, and what the case makes of their displacement."""

    def __init__(self, run: Run, problem: Problem, *, two_groups: bool = False, **options: Any):
        self.case, self.run, self.problem = run.case, run, problem
        groups = groups_of(self.case, problem.trained, two_groups, options)
        self.optimizers = self.case.plain(groups)
        self.first = [group["lr"] for group in self.groups]
        self.observed: list[tuple[Tensor, Tensor]] = []
        pieces = torch.arange(problem.operator.size).split([p.numel() for p in problem.trained])
        where = dict(zip(problem.trained, pieces, strict=True))
        self.indices = [torch.cat([where[p] for p in group["params"]]) for group in self.groups]

    @property
    def groups(self) -> Groups:
        return [group for each in self.optimizers for group in each.param_groups]

    def _gradients(self) -> Tensor:
        for p in self.problem.trained:
            p.grad = None
        loss = self.problem.loss()
        loss.backward()
        for p, twin in zip(self.problem.trained, self.run.problem.trained, strict=True):
            if twin in self.missing:
                p.grad = None
        return loss

    def step(self, missing: Iterable[Tensor] = ()) -> Tensor:
        """Returns the parameters one step from where the run is; parts have no gradient."""
        self.missing = set(missing)
        for p, twin in zip(self.problem.trained, self.run.problem.trained, strict=True):
            p.data.copy_(twin.data)
        theta = self.problem.theta()
        if self.case.observes:
            self.observed.append(class_terms(self.problem))
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
        update = self.problem.theta() - theta
        if self.case.part == "newton":
            return theta + self._newton(theta, -update)
        dominant = projector(self.problem.hessian(theta), K) @ update
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
            self.problem.trained,
            theta.split([p.numel() for p in self.problem.trained]),
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
            values, vectors = torch.linalg.eigh(self.problem.hessian(theta))
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
    factory: Callable[[], Problem] | None = None,
    *,
    two_groups: bool = False,
    **options: Any,
) -> tuple[Run, Reference]:
    """A run and its reference, from equal problems; with a fresh basis at every step."""
    factory = factory or case.factory
    run = Run(case, factory(), two_groups=two_groups, **options)
    return run, Reference(run, factory(), two_groups=two_groups, **options)


def same(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Equal bit for bit, and as many."""
    a, b = list(left), list(right)
    return len(a) == len(b) and all(map(torch.equal, a, b))
