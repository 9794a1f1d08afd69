"""A model's parameters as one vector ``θ`` of P coordinates: the only flatten and unflatten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.digests import PLAIN, digest, in_few_vectors, one_vector
from subspace_optim.curvature.dtensors import (
    check_placements,
    digest_of_sharded,
    holding_memory,
    is_sharded,
    local,
    placed_like,
)
from subspace_optim.curvature.fully_sharded import refuse_flattened, reshard
from subspace_optim.curvature.names import Params, chosen
from subspace_optim.curvature.process_group import Ranks
from subspace_optim.curvature.sharding import Layout, ShardedInnerProduct

LOW_PRECISION = (torch.float16, torch.bfloat16)
"""Parameters of these dtypes are differentiated through float32 copies."""
_SHAPE = attrgetter("shape")


def times_written(tensors: Iterable[Tensor]) -> int:
    """Returns how often torch has written to them, but for writes to ``.data``: costs no pass."""
    return sum(local(t)._version for t in tensors)  # noqa: SLF001 (no public way to look)


class ParameterSpace:
    """Parameters of a model, in order, as the coordinates of ``θ``.

    Where the model is sharded, a rank holds some of the coordinates: ``P_here`` of the P, which are
    those of its shards. ``flatten`` and ``unflatten`` are of these. What several ranks have the
    same of is divided among them, so that each coordinate lies on one rank.

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
        sizes: how many coordinates of each lie on this rank.
        shapes: of what lies on this rank, one a name: of the parameters, or of their shards.
        layout: which coordinates lie on which rank; ``None`` for a model that is not sharded.
        ranks: that hold coordinates; this process alone for a model that is not sharded.
        inner: how sums over the coordinates are completed.

    Raises:
        ArgumentError: there are none, or none that a pattern means; one is not the model's, frozen,
            complex, sparse, a partial sum, listed twice, or they are on several devices; or the
            model has lazy layers that have not seen a batch.
    """

    def __init__(self, model: nn.Module, params: Params = None) -> None:
        refuse_flattened(model)
        reshard(model)
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
        self._placements = [getattr(p, "placements", None) for p in those]
        self._registered, self._kinds = [p.shape for p in those], list(map(type, those))
        self.shapes = [local(p).shape for p in those]
        self.size: int = sum(p.numel() for p in those)
        """P, the number of coordinates."""
        self.layout = Layout(model, those) if any(map(is_sharded, model.parameters())) else None
        self.ranks = Ranks(None) if self.layout is None else self.layout.ranks
        self._owned = [
            None if self.layout is None else self.layout.owned(i, shape.numel())
            for i, shape in enumerate(self.shapes)
        ]
        self._pieces = [
            shape if owned is None else torch.Size([owned.stop - owned.start])
            for shape, owned in zip(self.shapes, self._owned, strict=True)
        ]
        self.sizes = [shape.numel() for shape in self._pieces]
        self.inner: InnerProduct = WHOLE
        if self.layout is not None:
            device = those[0].device
            self.inner = ShardedInnerProduct(self.layout, self.size, self.size_here, device)
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
        if self.layout is not None:
            self.layout.reshard()
        modules: list[Any] = [self.model]
        try:
            for owner, name in self._owners:
                modules.append(modules[owner]._modules[name])  # noqa: SLF001
            found = [modules[owner]._parameters[name] for owner, name in self._places]  # noqa: SLF001
            same = all(map(eq, map(_SHAPE, found), self._registered))
            if same and all(map(is_, map(type, found), self._kinds)):
                return found
        except (AttributeError, KeyError):
            pass
        return self._one_by_one()

    def _one_by_one(self) -> list[Tensor]:
        """Does the same, and tells which is not there.

        Raises:
            ArgumentError: one is gone, has another shape, or is sharded and was not.
        """
        found: list[Any] = []
        layouts = self._placements
        for name, shape, placements in zip(self.names, self._registered, layouts, strict=True):
            p, state, allowed = _under(self.model, name), None, f"of {tuple(shape)}"
            if p is None or p.shape != shape:
                state = "gone" if p is None else f"of shape {tuple(p.shape)}"
            elif is_sharded(p) != (placements is not None):
                state, allowed = type(p).__name__, "sharded" if placements else "not sharded"
            if state is not None:
                remedy = (
                    "The model has been changed since its operator was made. Make operator, "
                    "subspace and optimizer anew."
                )
                raise ArgumentError(f"parameter '{name}'", state, allowed, remedy)
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
    def size_here(self) -> int:
        """How many of the coordinates lie on this rank: P, where the model is not sharded."""
        return sum(self.sizes)

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
        """Returns whether every parameter is: the same on all ranks."""
        finite = [
            torch.linalg.vector_norm(elements, torch.inf).isfinite()
            for elements, _ in in_few_vectors(self.tensors)
            if elements.numel()
        ]
        return not self.ranks.any(lambda: bool(finite) and not torch.stack(finite).all())

    @torch.no_grad()
    def flatten(self, tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> Tensor:
        """Returns one tensor a parameter as a new vector ``(P,)``; zeros stand for ``None``.

        Args:
            tensors: of the shapes of the parameters, or of what lies on this rank.
            dtype: of the vector (default: the space's).
        """
        dtype, device = dtype or self.dtype, self.device
        tensors = self.pieces(tensors)
        found = [t for t in tensors if t is not None]
        kinds = {(type(t) in PLAIN, t.layout, t.dtype, t.device) for t in found}
        whole = len(found) == len(tensors) and list(map(_SHAPE, found)) == self._pieces
        if whole and kinds == {(True, torch.strided, dtype, device)}:
            return one_vector(found)
        flat = torch.empty(self.size_here, dtype=dtype, device=device)
        for view, tensor in zip(self.views(flat), tensors, strict=True):
            if tensor is None:
                view.zero_()
            else:
                view.copy_(tensor.to_dense())
        return flat

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Returns ``flat: (P,)`` in the shapes of the parameters, or of what lies on this rank.

        They are views, but for what other ranks have pieces of: that comes from them.
        """
        views = self.views(flat)
        return views if self.layout is None else self.layout.gather(views, self.shapes)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Returns ``flat: (P,)`` as views, one a parameter: of its shape, or flat, of its piece."""
        pieces = flat.split(self.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._pieces, strict=True)]

    def pieces(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Returns what belongs to this rank of one tensor a parameter, as ``views`` has it."""
        if self.layout is None:
            return tensors
        return [None if t is None else self.piece(i, t) for i, t in enumerate(tensors)]

    def piece(self, index: int, tensor: Tensor) -> Tensor:
        """Returns what belongs to this rank of the tensor of one parameter."""
        here = local(placed_like(tensor, self._placements[index]))
        owned = self._owned[index]
        return here if owned is None else here.reshape(-1)[owned]

    @contextmanager
    def holding(self, flat: Tensor) -> Iterator[None]:
        """Lets the parameters hold ``flat: (P,)`` inside, and then what they held before.

        Their own memory is not written to: other memory stands in its place.

        Raises:
            ArgumentError: the shape is another.
        """
        if flat.shape != (self.size_here,):
            raise ArgumentError("the shape of theta", tuple(flat.shape), f"({self.size_here},)")
        tensors = self.tensors
        values = self.unflatten(flat.detach().to(self.device))
        with holding_memory(tensors, [v.to(p.dtype) for p, v in zip(tensors, values, strict=True)]):
            yield

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
        tensors = self.pieces(tensors)
        for total, tensor, name in zip(self.views(flat), tensors, self.names, strict=True):
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
        return self.same_on_all(int(digest(self.model.parameters())))[0]

    def digest_of_whole(self) -> int:
        """Returns such a number that is the same however the model is sharded.

        It takes an all-reduce a parameter: for checkpoints, and not for each step.
        """
        found = 0
        for p in self.model.parameters():
            found = 3 * found + (digest_of_sharded(p) if is_sharded(p) else int(digest([p])))
        return (found + 2**63) % 2**64 - 2**63

    def same_on_all(self, *numbers: int) -> tuple[int, ...]:
        """Returns 64-bit numbers of what lies here, each as one of what lies on all ranks.

        One that all ranks have the same of stays as it is: it does not tell how many they are.
        """
        if self.layout is None:
            return numbers
        signed = torch.tensor([(n + 2**63) % 2**64 - 2**63 for n in numbers])
        sums = self.inner.sum(signed.to(self.device)).cpu()
        return tuple(torch.where(sums == signed * self.ranks.size, signed, sums).tolist())

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the length of a vector that comes as one tensor a parameter."""
        norms = [torch.linalg.vector_norm(t) for t in self.pieces(tensors) if t is not None]
        if self.layout is None:
            length: Tensor = torch.stack(norms).norm()
            return length
        return self.inner.sum(torch.stack(norms).square().sum()).sqrt()

    def length(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns ℓ, the median of ``‖W‖ / n^{1/4}`` over the matrices; 1 where they are zero.

        A direction of high curvature moves a matrix by about a matrix of rank one. That is compared
        with the spectral norm, which for a square W of n random entries is about ``‖W‖ / n^{1/4}``.
        It is the lower median over matrices that are not zero, so that neither an embedding's large
        norm nor a layer that starts at zero decides.

        Args:
            tensors: one a parameter.
        """
        pieces = [t for t in self.pieces(tensors) if t is not None]
        squares = self.inner.sum(torch.stack([t.detach().double().square().sum() for t in pieces]))
        kinds = [len(shape) > 1 for shape in self._registered]
        counts = [shape.numel() for shape in self._registered]
        chosen = [i for i, matrix in enumerate(kinds) if matrix or not any(kinds)]
        lengths = torch.stack([squares[i].sqrt() / counts[i] ** 0.25 for i in chosen])
        return torch.where(lengths > 0, lengths, torch.nan).nanmedian().nan_to_num(1.0)


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
    check_placements(label, p)


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
