"""What ``fully_shard`` (FSDP2) does to a model: which parameters it gathers when, and its hooks.

Torch has no public names for that: this is the one file that looks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspace_optim._validation import ArgumentError


def _is_a(module: nn.Module, name: str) -> bool:
    """Whether a module is of a class of ``torch.distributed.fsdp``, if that was imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, getattr(fsdp, name))


@dataclass(frozen=True, eq=False)
class FSDPParameter:
    """A parameter that ``fully_shard`` has divided.

    Attributes:
        sharded: the parameter that optimizers know.
        places: the registers of the modules that have it, and its name in each.
        shape: of all of it, or of its tensor-parallel part.
        dim: the dimension that is divided.
        spec: of the tensor-parallel ``DTensor`` that the model computes with; else ``None``.
    """

    sharded: Tensor
    places: list[tuple[dict[str, Any], str]]
    shape: torch.Size
    dim: int
    spec: Any


@dataclass(frozen=True, eq=False)
class FSDPGroup:
    """Parameters that are gathered at once, for as long as one of their modules runs.

    Attributes:
        modules: the one that ``fully_shard`` was called with, or several, and those inside.
        parameters: of them.
        shards: the process group that they are divided over.
        replicas: the process group that has copies of each shard, or ``None``.
        mesh: the ranks with data of their own.
    """

    modules: list[nn.Module]
    parameters: list[FSDPParameter]
    shards: Any
    replicas: Any
    mesh: tuple[int, ...]


def fsdp_groups(model: nn.Module) -> list[FSDPGroup]:
    """Returns the groups of parameters that ``fully_shard`` gathers together.

    Raises:
        ArgumentError: they are sharded in a way that cannot be followed.
    """
    found, states = [], {}
    for module in divided(model):
        state = module._get_fsdp_state()  # noqa: SLF001
        states[id(state)] = state
    for state in states.values():
        modules = _inside(state._modules)  # noqa: SLF001
        for group in state._fsdp_param_groups:  # noqa: SLF001
            info = group.mesh_info
            if getattr(info, "is_spmd_mesh", False) or not hasattr(info, "shard_process_group"):
                remedy = "Shard over the data-parallel mesh: fully_shard(module, mesh=mesh['dp'])."
                raise ArgumentError(
                    "the mesh of fully_shard", info.mesh, "one to shard over", remedy
                )
            parameters = [_parameter(p) for p in group.fsdp_params]
            ranks = tuple(info.mesh.mesh.flatten().tolist())
            replicas = getattr(info, "replicate_process_group", None)
            found.append(FSDPGroup(modules, parameters, info.shard_process_group, replicas, ranks))
    return found


def divided(model: nn.Module) -> list[Any]:
    """Returns the modules that ``fully_shard`` was called with."""
    return [module for module in model.modules() if _is_a(module, "FSDPModule")]


def _parameter(p: Any) -> FSDPParameter:
    own = p._module_info  # noqa: SLF001
    modules = [own.module, *own.shared_modules]
    names = [own.param_name, *own.shared_param_names]
    places = [(m._parameters, name) for m, name in zip(modules, names, strict=True)]  # noqa: SLF001
    present = places[0][0][places[0][1]]  # load_state_dict(assign=True) puts others there
    spec = getattr(p, "_unsharded_dtensor_spec", None) or getattr(p, "_tp_spec", None)
    return FSDPParameter(present, places, p._orig_size, p.fsdp_placement.dim, spec)  # noqa: SLF001


def _inside(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns modules and what is inside of them, but for those that were sharded by themselves."""
    found: dict[int, nn.Module] = {}
    pending = list(roots)
    while pending:
        module = pending.pop()
        found[id(module)] = module
        inside = [m for m in module.children() if not _is_a(m, "FSDPModule")]
        pending += [m for m in inside if id(m) not in found]
    return list(found.values())


def refuse_flattened(model: nn.Module) -> None:
    """Checks that the parameters are not flattened and divided by the first FSDP.

    Raises:
        ArgumentError: they are.
    """
    if any(_is_a(module, "FullyShardedDataParallel") for module in model.modules()):
        remedy = "Shard it by torch.distributed.fsdp.fully_shard (FSDP2), which keeps parameters."
        allowed = "one with parameters of its own"
        raise ArgumentError("model", "in FullyShardedDataParallel (FSDP1)", allowed, remedy)


def reshard(model: nn.Module) -> None:
    """Lets all modules hold shards.

    ``fully_shard`` leaves whole parameters behind a forward pass without a backward pass.
    """
    reshard_all(divided(model))


def reshard_all(modules: Iterable[Any]) -> None:
    """Lets modules that ``fully_shard`` was called with hold shards."""
    for module in modules:
        module.reshard()


@contextmanager
def without_fsdp_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Takes the hooks of ``fully_shard`` off: torch cannot differentiate twice through them."""
    held = [
        (module, name, hooks)
        for module in modules
        if _is_a(module, "FSDPModule")
        for name in ("_forward_pre_hooks", "_forward_hooks")
        if (hooks := vars(module)[name])
    ]
    try:
        for module, name, hooks in held:
            others = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_fsdp(hook))
            vars(module)[name] = others
        yield
    finally:
        for module, name, hooks in held:
            vars(module)[name] = hooks


def _is_fsdp(hook: Any) -> bool:
    while hook is not None:
        if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp"):
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False
