"""A model and its loss of one batch, as a function of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from subspace_optim._validation import ArgumentError

BatchLoss = Callable[[Any, Any], tuple[Tensor, Any]]


@dataclass
class OfBatch:
    """Marks a function of (model, batch), where else a loss of (output, target) stands."""

    function: BatchLoss


class Objective:
    """A model, and its loss of a batch.

    Args:
        model: the model.
        batch_loss: ``batch_loss(model, batch) -> (mean loss, weight)``.
    """

    def __init__(self, model: nn.Module, batch_loss: BatchLoss) -> None:
        self.model, self.batch_loss = model, batch_loss

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Returns the mean loss of a batch and its weight, both scalars.

        Raises:
            ArgumentError: the loss is not a real scalar, or there is no weight with it.
        """
        result = self.batch_loss(self.model, batch)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentError(
                "what batch_loss returns", type(result).__name__, "(mean loss, weight)"
            )
        loss, weight = result
        if not isinstance(loss, Tensor):
            raise ArgumentError("the loss", type(loss).__name__, "a scalar tensor")
        if loss.dim() != 0:
            remedy = "Take the mean over examples, e.g. with reduction='mean'."
            raise ArgumentError("the shape of the loss", tuple(loss.shape), "()", remedy)
        if not loss.is_floating_point():
            raise ArgumentError("the dtype of the loss", loss.dtype, "real floating point")
        weight = torch.as_tensor(weight, dtype=torch.float64, device=loss.device)
        return loss, weight.detach()


class Places:
    """Where some parameters stand in the modules: by which name each module knows which of them.

    Found by the identity of module and parameter, so that a layer that is registered twice, or a
    parameter that several modules share, is filled once and put back to what it was.

    Args:
        modules: each once.
        parameters: what stands there now.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
        index = {id(p): i for i, p in enumerate(parameters)}
        self._places = [
            (module._parameters, name, index[id(p)])  # noqa: SLF001 (setattr() would check, and register)
            for module in modules
            for name, p in module._parameters.items()  # noqa: SLF001
            if p is not None and id(p) in index
        ]

    @contextmanager
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Puts other tensors there, and the same objects back as were there before."""
        before = [owner[name] for owner, name, _ in self._places]
        try:
            for owner, name, i in self._places:
                owner[name] = values[i]  # type: ignore[assignment]
            yield
        finally:
            for (owner, name, _), parameter in zip(self._places, before, strict=True):
                owner[name] = parameter


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model itself, without the wrappers that add nothing to the function.

    Those of ``torch.compile`` would take the second derivative away.
    """
    for attribute in ("module", "_orig_mod"):
        wrapper = nn.parallel.DistributedDataParallel if attribute == "module" else nn.Module
        inner = getattr(model, attribute, None)
        if isinstance(model, wrapper) and isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model


# --- functions whose second derivative torch lacks, or has wrong ---------------------------------


class WrittenOut(TorchFunctionMode):
    """Puts parts in the place of some functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PARTS.get(func, func)(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    gate = (input + 3).clamp(0, 6) / 6
    return input.copy_(gate) if inplace else gate


def _hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    gate = _hardsigmoid(input)
    return input.mul_(gate) if inplace else input * gate


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / ‖v‖``, the norm over all dimensions but one: torch's own is wrong in the second."""
    others = [d for d in range(v.dim()) if d != dim]
    if dim != -1 and v.dim() == 1:
        return v * (g / v.abs())
    norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1)
    return v * (g / norm)


@contextmanager
def written_out() -> Iterator[None]:
    """Computes some functions of torch by parts that have a second derivative.

    Wherever they are called from: by the names of torch, also when a checkpointed part runs again
    in a backward pass, in which modes are off, and by names that were imported from there.
    """
    places = [(F, "hardsigmoid"), (F, "hardswish"), (torch, "_weight_norm")]
    before = [getattr(module, name) for module, name in places]
    try:
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, _PARTS.get(function, function))
        with WrittenOut():
            yield
    finally:
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, function)


_PARTS: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,  # noqa: SLF001 (what others than F call)
    F.hardswish: _hardswish,
    torch._C._nn.hardswish: _hardswish,  # noqa: SLF001
    torch._weight_norm: _weight_norm,  # noqa: SLF001
}
