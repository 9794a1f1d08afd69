"""Which optimizer steps: the one that moves the parameters, and those inside of it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, Optimizer, Rprop

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.parameters import ParameterSpace

_OWN_RATES = (ASGD, Rprop)  # the rate of the step before, and one for each coordinate


@dataclass(eq=False)
class Followed:
    """An optimizer whose ``step`` is a whole step, and those inside of it.

    The step of one inside is a part of the outer one's. Where it is called alone it is a whole
    step: a SAM of another library steps the one inside so, after it has put the parameters back.

    Attributes:
        optimizer: the outermost.
        members: all of them, the outermost first.
        wrapped: whether it was given inside of a wrapper that is taken to pass its steps on.
        calls: how many calls of their ``step`` are under way.
        hooks: how many steps the hooks have seen begin and not yet end. A subclass that calls
            ``super().step()`` fires them twice.
    """

    optimizer: Optimizer
    members: list[Optimizer]
    wrapped: bool = False
    calls: int = 0
    hooks: int = 0


def optimizers_of(argument: Any, space: ParameterSpace) -> list[Followed]:
    """Returns one optimizer, or a sequence of them, wrapped or not, as those that really step.

    Raises:
        ArgumentError: there is none, one cannot be followed or is there twice, or none of its
            parameters is in ``space``.
    """
    several = isinstance(argument, Iterable) and not hasattr(argument, "step")
    given = list(argument) if several else [argument]
    chains = [_chain(each) for each in given]
    if not chains:
        raise ArgumentError("optimizer", "an empty sequence", "at least one optimizer")
    members = [id(each) for chain in chains for each in chain]
    if len(set(members)) < len(members):
        raise ArgumentError("optimizer", f"a sequence of {len(chains)}", "without repetition")
    known = {id(p) for p in space.tensors}
    for chain in chains:
        if not any(id(p) in known for p in parameters_of(chain[0])):
            remedy = "Build operator and subspace from the model that the optimizer trains."
            raise ArgumentError("optimizer", "of another model", "one of the subspace's", remedy)
    return [
        Followed(chain[0], chain, wrapped=chain[0] is not each and not in_two_calls(chain[0]))
        for each, chain in zip(given, chains, strict=True)
    ]


def in_two_calls(optimizer: Any) -> bool:
    """Whether it moves the parameters before its step, and puts them back."""
    return hasattr(optimizer, "first_step")


def innermost(optimizer: Any) -> Any:
    """Returns the optimizer that a wrapper passes steps on to; itself, if it is no wrapper."""
    return _chain(optimizer)[0]


def parameters_of(*optimizers: Optimizer) -> list[Tensor]:
    """Returns the parameters of all groups of all optimizers."""
    return [p for each in optimizers for group in each.param_groups for p in group["params"]]


_INSIDE = ("optimizer", "base_optimizer", "inner_optimizer", "optim", "base")


def _chain(given: Any) -> list[Optimizer]:
    """Returns the optimizers that move parameters when ``given`` steps, the outermost first.

    Accelerate's, Lightning's and Fabric's wrappers have the class of an optimizer, and pass steps
    on, or skip them: what they have in the place of ``state`` is that of the one they wrap. One
    with a state of its own, such as Lookahead or SAM, moves the parameters itself.

    Raises:
        ArgumentError: there is none, or several that a wrapper passes steps on to.
    """
    own = getattr(given, "__dict__", {})
    inside = {
        id(value): value
        for name, value in own.items()
        if isinstance(value, Optimizer)
        or (name.lstrip("_") in _INSIDE and callable(getattr(value, "step", None)))
    }
    below = [each for value in inside.values() for each in _chain(value)]
    kind, state = type(given).__name__, own.get("state")
    passes = bool(below) and (state is None or state is below[0].state)
    if isinstance(given, Optimizer) and not passes:
        held = {id(p) for p in parameters_of(given)}
        return [given, *(b for b in below if held & {id(p) for p in parameters_of(b)})]
    if not below:
        allowed = "a torch.optim.Optimizer, a wrapper that holds one, or several in a sequence"
        raise ArgumentError("optimizer", kind, allowed)
    if len(inside) > 1:
        remedy = "Pass those that it steps, in a sequence."
        raise ArgumentError("optimizer", f"{kind}, with several inside", "one", remedy)
    if not isinstance(given, Optimizer) and state is not None and "param_groups" in own:
        remedy = "Or pass the one inside, to follow the moves of that alone."
        allowed = "a torch.optim.Optimizer, where it has a state of its own"
        raise ArgumentError("optimizer", kind, allowed, remedy)
    return below


def moves(optimizer: Optimizer) -> bool:
    """Whether a step can change anything."""
    found: Any = getattr(optimizer, "found_inf", None)  # set by the scaler, for fused optimizers
    if isinstance(found, Tensor) and bool(found):
        return False
    if isinstance(optimizer, _OWN_RATES) and optimizer.state:
        return True
    rates = [group.get("lr") for group in optimizer.param_groups]
    return any(rate is None or float(rate) != 0 for rate in rates)


def outside_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Computes in the dtypes that are there."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
