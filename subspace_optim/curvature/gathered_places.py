"""``GatheredPlaces``: a sharded model computes with whole parameters while it needs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from subspace_optim.curvature.dtensors import as_dtensor, is_sharded, local
from subspace_optim.curvature.fully_sharded import FSDPGroup, without_fsdp_hooks
from subspace_optim.curvature.gathering import Copy, Gather, gathered
from subspace_optim.curvature.sharding import Layout
from subspace_optim.curvature.surroundings import dtype_inside


class GatheredPlaces:
    """Where the parameters of a sharded model are registered, and what stands there inside.

    The parameters of an ``FSDPGroup`` are gathered when one of its modules begins to run, and given
    up when the outermost of them has ended, as ``fully_shard`` does. What is saved of them for
    backward passes is not kept, but gathered again.

    Args:
        layout: of the model.
        modules: each once.
        parameters: that are differentiated by, as they are registered.
        dtype: of what is computed with (default: float32 in the place of low precision).
        keep: whether gathered parameters stay for backward passes.
    """

    def __init__(
        self,
        layout: Layout,
        modules: Sequence[nn.Module],
        parameters: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        *,
        keep: bool,
    ) -> None:
        self._groups = layout.groups
        self._layout, self._modules, self._dtype, self._keep = layout, modules, dtype, keep
        self._index = {id(p): i for i, p in enumerate(parameters)}
        self._held: list[object] = []  # what the blocks hold that are entered, the innermost last
        gathered = {id(p.sharded) for group in self._groups for p in group.parameters}
        self._others = [
            (module._parameters, name, p)  # noqa: SLF001
            for module in modules
            for name, p in module._parameters.items()  # noqa: SLF001
            if p is not None and id(p) not in gathered
        ]

    @contextmanager
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Lets the model compute with ``values``, the local tensors of the parameters.

        Args:
            values: one a parameter; they may require a gradient.
        """
        with ExitStack() as stack:
            stack.enter_context(without_fsdp_hooks(self._modules))
            self._held.append(values)
            stack.callback(self._held.pop)
            known = _Known()
            if not self._keep:
                stack.enter_context(saved_tensors_hooks(known.pack, known.unpack))
                stack.callback(known.forget)
            for group in self._groups:
                shards = [self._value(p.sharded, values) for p in group.parameters]
                stack.enter_context(_Opened(group, shards, known, lambda: self._held[-1] is values))
            for register, name, p in self._others:
                stack.callback(register.__setitem__, name, register[name])
                register[name] = self._whole(p, values)
            yield

    def _value(self, parameter: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Returns what lies here of a parameter: a leaf, or a constant."""
        index = self._index.get(id(parameter))
        if index is not None:
            return values[index]
        return local(parameter).detach().to(dtype_inside(parameter, self._dtype))

    def _whole(self, parameter: Tensor, values: Sequence[Tensor]) -> Any:
        """Returns what the model computes with in the place of one that is never gathered."""
        value = self._value(parameter, values)
        if self._layout.data is not None and value.requires_grad and self._is_copied(parameter):
            value = Copy.apply(self._layout.data, value)  # type: ignore[no-untyped-call]
        return as_dtensor(value, parameter) if is_sharded(parameter) else value

    def _is_copied(self, parameter: Any) -> bool:
        """Whether the ranks with data of their own each have it, and nothing sums over them."""
        if not is_sharded(parameter):
            return True
        return not set(self._layout.data_ranks) <= set(
            parameter.device_mesh.mesh.flatten().tolist()
        )


class _Opened:
    """Gathers the parameters of a group while one of its modules runs; a context.

    Args:
        group: of parameters.
        shards: what lies here of each.
        known: is told of what is gathered.
        is_due: whether these shards count, and not those of a block inside of this one.
    """

    def __init__(
        self,
        group: FSDPGroup,
        shards: Sequence[Tensor],
        known: _Known,
        is_due: Callable[[], bool],
    ) -> None:
        self._group, self._shards, self._known = group, list(shards), known
        self._is_due = is_due
        # It does not refer to this object: a cycle would keep what was gathered for long.
        self._again = functools.partial(_again, group, self._shards)
        self._depth = 0
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for module in self._group.modules:
            before = module.register_forward_pre_hook(self._begin, prepend=True)
            after = module.register_forward_hook(self._end, always_call=True)
            self._handles += [before, after]

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._put([p.sharded for p in self._group.parameters])

    def _begin(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1 and self._is_due():
            self.open()

    def _end(self, *_: Any) -> None:
        self._depth -= 1
        if not self._depth and self._is_due():
            self._put([p.sharded for p in self._group.parameters])

    def open(self) -> None:
        """Puts gathered parameters in their places."""
        wholes = Gather.apply(self._group, *self._shards)  # type: ignore[no-untyped-call]
        self._known.add(wholes, self._again)
        parameters = self._group.parameters
        self._put(
            [
                whole if p.spec is None else as_dtensor(whole, p.spec)
                for whole, p in zip(wholes, parameters, strict=True)
            ]
        )

    def _put(self, values: Sequence[Any]) -> None:
        for p, value in zip(self._group.parameters, values, strict=True):
            for register, name in p.places:
                register[name] = value


def _again(group: FSDPGroup, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gathers parameters once more, for a backward pass."""
    with torch.no_grad():
        return gathered(group, [shard.detach() for shard in shards])


_Place = tuple[StorageWeakRef, Callable[[], tuple[Tensor, ...]], int, torch.dtype]
"""Memory, how to gather what lies there again, which of the tensors it is, and of what dtype."""


class _Known:
    """Gathered tensors: instead of one that is saved for a backward pass, how to gather it again.

    They are known by their memory, whose addresses are not used again as long as they are here.
    """

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}
        self._latest: tuple[Callable[[], tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None

    def add(self, tensors: Sequence[Tensor], again: Callable[[], tuple[Tensor, ...]]) -> None:
        """Notes tensors that have been gathered.

        Args:
            tensors: as ``again`` returns them.
            again: gathers them.
        """
        for place in [c for c, (ref, *_) in self._places.items() if ref.expired()]:
            del self._places[place]
        for i, tensor in enumerate(tensors):
            ref = StorageWeakRef(tensor.untyped_storage())
            self._places[ref.cdata] = ref, again, i, tensor.dtype

    def forget(self) -> None:
        """Lets go of what was gathered last."""
        self._latest = None

    def pack(self, tensor: Tensor) -> Any:
        """Returns what is saved in the place of a tensor.

        Never itself: one that an operation returns and saves would hold its own graph for ever,
        in a cycle that is not Python's. What is unpacked gets its place in the graph by torch.
        """
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return tensor.detach()
        found = self._places.get(tensor.untyped_storage()._cdata)  # noqa: SLF001
        if found is None or found[0].expired() or _is_read_otherwise(tensor, found[3]):
            return tensor.detach()
        _, again, i, _ = found
        return functools.partial(
            self._view, again, i, tensor.shape, tensor.stride(), tensor.storage_offset()
        )

    def unpack(self, packed: Any) -> Tensor:
        """Returns the tensor."""
        return packed if isinstance(packed, Tensor) else packed()

    def _view(
        self, again: Callable[[], tuple[Tensor, ...]], i: int, shape: Any, stride: Any, offset: Any
    ) -> Tensor:
        if self._latest is None or self._latest[0] != again:
            self._latest = None  # first: there are never two
            tensors = again()
            self._latest = again, tensors
            self.add(tensors, again)
        return self._latest[1][i].as_strided(shape, stride, offset)


def _is_read_otherwise(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a view has other numbers than its memory: complex ones, conjugates, bits."""
    return tensor.dtype != dtype or tensor.is_conj() or tensor.is_neg()
