"""The optimizers under contract: ours, and the projection of torch's own and of others'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import subspace_optim as so
from tests.contract.others import Derived, Homemade
from tests.contract.settings import Setting, classified, quartic

LR = 0.0625  # a power of two: the same number in float32 tensors

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


sgd = one(torch.optim.SGD)


@dataclass(frozen=True)
class Case:
    """An optimizer of ours, or the projection of others.

    Attributes:
        name: of the case.
        options: of all groups.
        second: what differs in the second group, where a test has two.
        part: what is taken of the plain displacement: ``"dominant"``, ``"bulk"``, ``"all"``, or
            ``"newton"``, which scales it.
        ours: the class, where it is no projection.
        plain: from groups, torch's own optimizers without any subspace: those to project, or the
            reference of ours.
        setting: makes what it runs on, in a dtype.
    """

    name: str
    options: dict[str, Any]
    second: dict[str, Any] = field(default_factory=dict)
    part: str = "all"
    ours: Any = None
    plain: Callable[[Groups], list[Optimizer]] = sgd
    setting: Callable[..., Setting] = quartic

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
        return self.setting is classified

    @property
    def lbfgs(self) -> bool:
        return self.name.startswith("LBFGS")

    @property
    def needs_closure(self) -> bool:
        """It evaluates the loss itself."""
        return self.sam or self.lbfgs

    @property
    def joint(self) -> bool:
        """There are two optimizers, which are projected together."""
        return self.name.startswith("Muon")

    @property
    def momentum(self) -> str | None:
        """The option that torch's cyclic schedulers would cycle."""
        for name in ("momentum", "betas"):
            if self.options.get(name) and not self.joint:
                return name
        return None


MOMENTUM = {"lr": LR, "momentum": 0.9}
SECOND = {"lr": LR / 4, "momentum": 0.5, "weight_decay": 0.1}
SHARP = MOMENTUM | {"rho": 0.1}
NEWTON = {"lr": 0.25, "damping": 0.5, "bulk_ratio": 0.125, "momentum": 0.5}
NEWTON_SECOND = {"lr": 0.125, "damping": 1.0, "bulk_ratio": 0.5, "momentum": 0.0}
QUASI = {"lr": LR, "newton_lr": 0.25, "damping": 0.5, "momentum": 0.5}
QUASI_SECOND = {"lr": LR / 2, "newton_lr": 0.5, "damping": 1.0, "momentum": 0.9}
QUASI_NEWTON = so.ClassGradientQuasiNewton

OURS = [
    Case("DomSGD", MOMENTUM, SECOND, "dominant", so.DomSGD),
    Case("BulkSGD", MOMENTUM, SECOND, "bulk", so.BulkSGD),
    Case("SAM", SHARP, SECOND | {"rho": 0.3}, "all", so.SAM),
    Case("DomSAM", SHARP, SECOND | {"rho": 0.3}, "dominant", so.DomSAM),
    Case("BulkSAM", SHARP, SECOND | {"adaptive": True}, "bulk", so.BulkSAM),
    Case("LowRankNewton", NEWTON, NEWTON_SECOND, "newton", so.LowRankNewton),
    Case("ClassGradientQuasiNewton", QUASI, QUASI_SECOND, "newton", QUASI_NEWTON),
]

# On the subspace that it is made for, which has no Hessian, no refreshes and no projector.
OBSERVING = Case(
    "ClassGradientQuasiNewton, observing",
    QUASI,
    QUASI_SECOND,
    "newton",
    QUASI_NEWTON,
    setting=classified,
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

PROJECTED = [
    case
    for part in ("dominant", "bulk")
    for case in (
        *(
            Case(f"{name}, {part}", options, second, part, plain=one(cls))
            for name, (cls, options, second) in _OTHERS.items()
        ),
        Case(f"Muon + AdamW, {part}", {"lr": LR}, {}, part, plain=muon_and_adamw),
        Case(f"LBFGS, {part}", {"lr": 0.5}, {}, part, plain=one(torch.optim.LBFGS)),
    )
]

ALL = [*OURS, *PROJECTED]
CASES = {case.name: case for case in ALL}
IN_SUBSPACE = [case for case in OURS if case.has_subspace]
# Where a test is about something that does not depend on the part, one of the two is enough.
EACH_ALGORITHM = [*OURS, *(case for case in PROJECTED if case.part == "dominant")]
# Where it is about how a step is taken and not about which: one tensor after the other, all at
# once, by a kernel, by others' code, with hooks inside of hooks, in turn, and many moves in one.
_WAYS = "SGD momentum, SGD foreach, AdamW fused, third party, subclass of Adam, Muon + AdamW, LBFGS"
EACH_WAY = [*OURS, *(CASES[f"{name}, dominant"] for name in _WAYS.split(", "))]

SAMS = [case for case in OURS if case.sam]


def parametrized(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


# Names of these lists, as decorators. `..._observing` adds the quasi-Newton method on the subspace
# that it is made for.
everything = parametrized([*ALL, OBSERVING])
each_algorithm = parametrized([*EACH_ALGORITHM, OBSERVING])
each_way = parametrized(EACH_WAY)
each_way_observing = parametrized([*EACH_WAY, OBSERVING])
ours = parametrized(OURS)
ours_observing = parametrized([*OURS, OBSERVING])
in_subspace = parametrized(IN_SUBSPACE)
in_subspace_observing = parametrized([*IN_SUBSPACE, OBSERVING])
sams = parametrized(SAMS)
