"""A model's parameters as one vector ``θ`` of P coordinates: the only flatten and unflatten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.digests import PLAIN, digest, in_few_vectors, one_vector
from subspace_optim.curvature.names import fits, near_misses

LOW_PRECISION = (torch.float16, torch.bfloat16)
"""Parameters of these dtypes are differentiated through float32 copies."""
_SHAPE = attrgetter("shape")


Params = Iterable[Tensor | str] | str | Callable[[str, Tensor], bool] | None
"""Which parameters: tensors, patterns of names, a predicate of (name, tensor), or all."""


def times_written(tensors: Iterable[Tensor]) -> int:
    """Returns how often torch has written to them, but for writes to ``.data``: costs no pass."""
    return sum(t._version for t in tensors)  # noqa: SLF001 (no public way to look)


class ParameterSpace:
    """Parameters of a model, in order, as the coordinates of ``θ``.

    They are known by their names. So parameters that ``load_state_dict(assign=True)`` or a new
    layer of the same shape have put in their places are followed; a name that is gone, or has
    another shape, is an error.

    Args:
        model: the model that owns them.
        params: which of its parameters: tensors, a pattern of their names such as
            ``"blocks.*.attn.*"`` or beginning of names such as ``"blocks.0"``, several of these, or
            a predicate of (name, tensor) (default: all that require a gradient). Tied parameters
            count once.

    Attributes:
        model: as given.
        names: their names in the model.
        shapes: their shapes, one a name.
        inner: how sums over the coordinates are completed.

    Raises:
        ArgumentError: there are none, or none that a pattern means; one is not the model's, frozen,
            complex, sparse, sharded, listed twice, or they are on several devices; or the model has
            lazy layers that have not seen a batch.
    """

    def __init__(self, model: nn.Module, params: Params = None) -> None:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor):
                remedy = "Call the model on a batch first: lazy layers take their shapes from it."
                raise ArgumentError(f"'{name}'", "uninitialized", "of a known shape", remedy)
        names = {id(p): name for name, p in model.named_parameters()}
        those, remedy = chosen(params, list(model.named_parameters()))
        if not those:
            raise ArgumentError("params", those, "at least one parameter", remedy)
        for index, p in enumerate(those):
            label = f"params[{index}]"
            if id(p) not in names:
                shape = tuple(p.shape) if isinstance(p, Tensor) else p
                raise ArgumentError(label, shape, "a parameter of the model", remedy)
            _check(f"parameter '{names[id(p)]}'", p)
        if len({id(p) for p in those}) < len(those):
            raise ArgumentError("params", f"a list of {len(those)}", "without repetition")
        devices = {p.device for p in those}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ArgumentError("the devices of params", found, "one device", "Move the model.")
        self.model = model
        self.names = [names[id(p)] for p in those]
        self.shapes = [p.shape for p in those]
        self.inner: InnerProduct = WHOLE
        self._sizes = [p.numel() for p in those]
        self._owners, self._places = _places(self.names)
        self._found: list[Tensor] | None = None  # inside of looked_up_once()

    def __repr__(self) -> str:
        return f"ParameterSpace(P={self.size:,}, {self.summary})"

    @property
    def summary(self) -> str:
        """How many tensors they are, and the first and the last of their names."""
        ends = dict.fromkeys((self.names[0], self.names[-1]))
        return f"{len(self.names)} tensors, {' … '.join(map(repr, ends))}"

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters that stand under the names now, each once.

        ``ArgumentError`` where one is gone, or has another shape than when the space was made.
        """
        if self._found is not None:
            return list(self._found)
        modules: list[Any] = [self.model]
        try:
            for owner, name in self._owners:
                modules.append(modules[owner]._modules[name])  # noqa: SLF001
            found = [modules[owner]._parameters[name] for owner, name in self._places]  # noqa: SLF001
            if all(map(eq, map(_SHAPE, found), self.shapes)):
                return found
        except (AttributeError, KeyError):
            pass
        return self._one_by_one()

    def _one_by_one(self) -> list[Tensor]:
        """Does the same, and tells which is not there.

        Raises:
            ArgumentError: one is gone, or has another shape.
        """
        found = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            p = _under(self.model, name)
            if p is None or p.shape != shape:
                state = "gone" if p is None else f"of shape {tuple(p.shape)}"
                remedy = (
                    "The model has been changed since its operator was made. Make operator, "
                    "subspace and optimizer anew."
                )
                raise ArgumentError(f"parameter '{name}'", state, f"of {tuple(shape)}", remedy)
            found.append(p)
        return found

    @contextmanager
    def looked_up_once(self) -> Iterator[None]:
        """Looks the parameters up on entry only: a promise that no module changes inside."""
        before, self._found = self._found, self.tensors
        try:
            yield
        finally:
            self._found = before

    @property
    def size(self) -> int:
        """P, the number of coordinates."""
        return sum(self._sizes)

    @property
    def size_here(self) -> int:
        """How many of the coordinates lie on this rank: P, where the model is not sharded."""
        return sum(self._sizes)

    @property
    def dtype(self) -> torch.dtype:
        """float64 if a parameter is, else float32: bf16 parameters have float32 vectors."""
        double = torch.float64 in {p.dtype for p in self.tensors}
        return torch.float64 if double else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        first = _under(self.model, self.names[0])
        return self.tensors[0].device if first is None else first.device

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Returns whether every parameter is."""
        finite = [
            torch.linalg.vector_norm(elements, torch.inf).isfinite()
            for elements, _ in in_few_vectors(self.tensors)
            if elements.numel()
        ]
        return not finite or bool(torch.stack(finite).all())

    @torch.no_grad()
    def flatten(self, tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> Tensor:
        """Returns one tensor a parameter as a new vector ``(P,)``; zeros stand for ``None``."""
        dtype, device = dtype or self.dtype, self.device
        found = [t for t in tensors if t is not None]
        kinds = {(type(t) in PLAIN, t.layout, t.dtype, t.device) for t in found}
        whole = len(found) == len(tensors) and list(map(_SHAPE, found)) == self.shapes
        if whole and kinds == {(True, torch.strided, dtype, device)}:
            return one_vector(found)
        flat = torch.empty(self.size, dtype=dtype, device=device)
        for view, tensor in zip(self.unflatten(flat), tensors, strict=True):
            if tensor is None:
                view.zero_()
            else:
                view.copy_(tensor.to_dense())
        return flat

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Returns ``flat: (P,)`` as views, one of the shape of each parameter."""
        pieces = flat.split(self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    @contextmanager
    def holding(self, flat: Tensor) -> Iterator[None]:
        """Lets the parameters hold ``flat: (P,)`` inside, and then what they held before.

        Their own memory is not written to: other memory stands in its place.

        Raises:
            ArgumentError: the shape is another.
        """
        if flat.shape != (self.size,):
            raise ArgumentError("the shape of theta", tuple(flat.shape), f"({self.size},)")
        held = [(p, p.data) for p in self.tensors]
        values = self.unflatten(flat.detach().to(self.device))
        try:
            for (p, _), value in zip(held, values, strict=True):
                p.data = value.to(p.dtype)
            yield
        finally:
            for p, data in held:
                p.data = data

    def add_(self, flat: Tensor, tensors: Sequence[Tensor | None], weight: Tensor) -> None:
        """Adds ``weight`` times one tensor a parameter to ``flat: (P,)`` in place.

        Args:
            flat: is changed.
            tensors: one a parameter; ``None`` stands for zeros.
            weight: a scalar; where it is 0 nothing is added, whatever the tensors hold: the mean
                over no examples is NaN.

        Raises:
            ArgumentError: a tensor is sparse.
        """
        for total, tensor, name in zip(self.unflatten(flat), tensors, self.names, strict=True):
            if tensor is not None:
                if tensor.layout != torch.strided:
                    label = f"the gradient of '{name}'"
                    raise ArgumentError(label, tensor.layout, "dense", "Use sparse=False.")
                total.add_(weighted(tensor, weight))

    def name_in_model(self, tensor: Tensor) -> str | None:
        """Returns the name of a parameter of the model, in this space or not; else ``None``."""
        return next((name for name, p in self.model.named_parameters() if p is tensor), None)

    def digest(self) -> int:
        """Returns a number that differs when any bit of any parameter does (but by 1 in 2³²).

        All parameters of the model count, since the matrix depends on those too that it is not
        differentiated by. Version counters would not do: fused optimizers and writes through
        ``p.data`` do not change them.
        """
        return int(digest(self.model.parameters()))


def _places(names: Sequence[str]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Returns how to find parameters without a look at any part of their names twice.

    Returns:
        The modules but for the first, the model: each with the place of its owner among them, and
        its name there; and the same of the parameters.
    """
    places, owners = {"": 0}, list[tuple[int, str]]()

    def place(path: str) -> int:
        if path not in places:
            owner, _, last = path.rpartition(".")
            owners.append((place(owner), last))
            places[path] = len(owners)
        return places[path]

    split = [name.rpartition(".") for name in names]
    return owners, [(place(path), last) for path, _, last in split]


def chosen(
    params: Params, named: Sequence[tuple[str, Tensor]], label: str = "params"
) -> tuple[list[Any], str]:
    """Returns the parameters that are meant, and what to say where they cannot be used.

    Args:
        params: which ones.
        named: that there are, each with its name.
        label: of the argument, for messages.

    Raises:
        ArgumentError: a pattern means none of them, or it is a module.
    """
    names = [name for name, _ in named]
    if params is None:
        remedy = "The model has no parameter that requires a gradient."
        return [p for _, p in named if p.requires_grad], remedy
    if isinstance(params, nn.Module):
        allowed = "tensors, patterns of names, or a predicate of (name, tensor)"
        remedy = "Pass what its `parameters()` returns."
        raise ArgumentError(label, type(params).__name__, allowed, remedy)
    if callable(params):
        some = ", ".join(map(repr, names[:3]))
        remedy = f"It is called with the name and the tensor of each, with names such as {some}."
        return [p for name, p in named if params(name, p)], remedy
    found: dict[int, Any] = {}
    for index, item in enumerate([params] if isinstance(params, Tensor | str) else params):
        if not isinstance(item, str):
            found[-index - 1] = item  # not by identity: one that is listed twice is an error
            continue
        meant = {id(p): p for name, p in named if fits(name, item)}
        if not meant:
            allowed = "a pattern of at least one parameter's name"
            raise ArgumentError(label, item, allowed, near_misses(item, names))
        found |= meant
    return list(found.values()), "Leave `params` out for all that require a gradient."


def _check(label: str, p: Tensor) -> None:
    """Checks that one can differentiate by a parameter.

    Raises:
        ArgumentError: it is frozen, complex, sparse or sharded.
    """
    if not p.requires_grad:
        raise ArgumentError(label, "frozen", "trainable", "Unfreeze it or leave it out.")
    if not p.is_floating_point():
        raise ArgumentError(label, p.dtype, "real", "View it as real numbers, or leave it out.")
    if p.layout != torch.strided:
        raise ArgumentError(label, p.layout, "dense", "Use a dense layer, or leave it out.")
    if hasattr(p, "placements"):  # a DTensor: of FSDP2, or of tensor parallel layers
        remedy = "Measure before the model is sharded, or a copy that is not."
        raise ArgumentError(label, f"sharded ({type(p).__name__})", "whole on each rank", remedy)


def _under(model: nn.Module, name: str) -> Tensor | None:
    """Returns the parameter of this name, if the model has one."""
    module: Any = model
    *path, last = name.split(".")
    for part in path:
        module = module._modules.get(part)  # noqa: SLF001 (get_submodule() is slow, and raises)
        if module is None:
            return None
    parameter: Tensor | None = module._parameters.get(last)  # noqa: SLF001
    return parameter


def weighted(value: Tensor, weight: Tensor) -> Tensor:
    """Returns ``weight · value``, and zeros where the weight is 0 and the value may be NaN."""
    return torch.where(weight > 0, value * weight, 0.0)


def length(tensors: Sequence[Tensor]) -> Tensor:
    """Returns ℓ, the median of ``‖W‖ / n^{1/4}`` over the matrices; 1 where they are zero.

    A direction of high curvature moves a matrix by about a matrix of rank one. That is compared
    with the spectral norm, which for a square W of n random entries is about ``‖W‖ / n^{1/4}``.
    It is the lower median over matrices that are not zero, so that neither an embedding's large
    norm nor a layer that starts at zero decides.
    """
    matrices = [t.detach() for t in tensors if t.dim() > 1] or [t.detach() for t in tensors]
    lengths = torch.stack([t.double().norm() / t.numel() ** 0.25 for t in matrices])
    return torch.where(lengths > 0, lengths, torch.nan).nanmedian().nan_to_num(1.0)
