"""The only flatten and unflatten: a model's parameters as one vector ``θ`` of P coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.layouts import dense_parts

_PIECE = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


class ParameterSpace:
    """Parameters of a model, in order, as the coordinates of ``θ``.

    Args:
        model: the model that owns them.
        params: which of its parameters (default: all that require a gradient). Tied parameters
            count once.

    Attributes:
        model: as given.
        tensors: the parameters, each once.
        names: their names in the model.

    Raises:
        ArgumentError: there are none, one is not the model's, frozen, complex, sparse, listed
            twice, or they are on several devices.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor] | None = None) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        if params is None:
            chosen: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
            remedy = "The model has no parameter that requires a gradient."
        else:
            chosen = [params] if isinstance(params, Tensor) else list(params)
            remedy = "Leave `params` out for all that require a gradient."
        if not chosen:
            raise ArgumentError("params", chosen, "at least one parameter", remedy)
        for index, p in enumerate(chosen):
            label = f"params[{index}]"
            if id(p) not in names:
                shape = tuple(p.shape) if isinstance(p, Tensor) else p
                raise ArgumentError(label, shape, "a parameter of the model", remedy)
            label = f"parameter '{names[id(p)]}'"
            if not p.requires_grad:
                raise ArgumentError(label, "frozen", "trainable", "Unfreeze it or leave it out.")
            if not p.is_floating_point():
                raise ArgumentError(
                    label, p.dtype, "real", "View it as real numbers, or leave it out."
                )
            if p.layout != torch.strided:
                raise ArgumentError(label, p.layout, "dense", "Use a dense layer, or leave it out.")
        if len({id(p) for p in chosen}) < len(chosen):
            raise ArgumentError("params", f"a list of {len(chosen)}", "without repetition")
        devices = {p.device for p in chosen}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ArgumentError("the devices of params", found, "one device", "Move the model.")
        self.model = model
        self.tensors = chosen
        self.names = [names[id(p)] for p in chosen]

    @property
    def size(self) -> int:
        """P, the number of coordinates."""
        return sum(p.numel() for p in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """float64 if a parameter is, else float32: bf16 parameters have float32 vectors."""
        double = any(p.dtype == torch.float64 for p in self.tensors)
        return torch.float64 if double else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.tensors[0].device

    @torch.no_grad()
    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Returns one tensor a parameter as a new vector ``(P,)``; zeros stand for ``None``."""
        flat = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for view, tensor in zip(self.unflatten(flat), tensors, strict=True):
            if tensor is None:
                view.zero_()
            else:
                view.copy_(tensor)
        return flat

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Returns ``flat: (P,)`` as views, one of the shape of each parameter."""
        pieces = flat.split([p.numel() for p in self.tensors])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.tensors, strict=True)]

    def name_in_model(self, tensor: Tensor) -> str | None:
        """Returns the name of a parameter of the model, in this space or not; else ``None``."""
        return next((name for name, p in self.model.named_parameters() if p is tensor), None)

    def digest(self) -> int:
        """Returns a number that differs when any bit of any parameter does (but by 1 in 2³²).

        Of any of the model's, since the matrix depends on those that it is not differentiated by
        too. Version counters do not tell: fused optimizers and writes through ``p.data`` leave
        them.
        """
        return int(digest(self.model.parameters()))


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    bounds = -(2**62), 2**62
    odd = torch.randint(*bounds, (_PIECE,), generator=generator, device="cpu") * 2 + 1
    return odd.to(device)


@torch.no_grad()
def digest(tensors: Iterable[Tensor]) -> Tensor:
    """Returns the weighted sum, modulo 2⁶⁴, of the bits of all elements: one pass, one scalar.

    The weights are fixed, random and odd: one element that changes always changes the sum, and
    elements that change places do but by chance. 8 bytes are read as two integers: as one, an even
    number of changed signs, 2⁶³ each, would add up to 0. Of sparse tensors the indices count, and
    the values.
    """
    total: Tensor | None = None
    for tensor in (part for whole in tensors for part in dense_parts(whole.detach())):
        elements = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
        if elements.dtype == torch.bool:
            elements = elements.to(torch.uint8)
        if elements.is_complex():
            elements = torch.view_as_real(elements).view(-1)
        bits = elements.view(_INTEGERS[elements.element_size()])
        weights = _weights(tensor.device)
        total = torch.zeros((), dtype=torch.int64, device=tensor.device) if total is None else total
        total = total.to(tensor.device) * 3 + 1
        for piece in bits.split(_PIECE):
            total = total * 5 + (piece.long() * weights[: len(piece)]).sum()
    return torch.zeros((), dtype=torch.int64) if total is None else total
