"""How steps are followed: optimizers, wrapped or in turn, as one step, and its number."""

from subspace_optim.step_hooks.count import StepCount, StepTeller
from subspace_optim.step_hooks.joint_steps import JointSteps, owners_of
from subspace_optim.step_hooks.optimizers import (
    Followed,
    in_two_calls,
    innermost,
    moves,
    optimizers_of,
    outside_autocast,
    parameters_of,
)

__all__ = [
    "Followed",
    "JointSteps",
    "StepCount",
    "StepTeller",
    "in_two_calls",
    "innermost",
    "moves",
    "optimizers_of",
    "outside_autocast",
    "owners_of",
    "parameters_of",
]
