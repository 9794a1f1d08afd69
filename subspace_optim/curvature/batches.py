"""The data of an operator: the same batches in every pass, on the device of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from subspace_optim._validation import ArgumentError, DataChangedError
from subspace_optim.curvature.contexts import random_state_kept
from subspace_optim.curvature.current_batch import CurrentBatch
from subspace_optim.curvature.digests import dense_parts, digest
from subspace_optim.curvature.loaders import check_loader, own_loader
from subspace_optim.curvature.parameters import LOW_PRECISION
from subspace_optim.curvature.structure import contents, moved, moves_itself, tensors

# The most batches of data without a length, since a stream without an end would be read for ever.
# An epoch is shorter as a rule, and so many cheap batches are counted in seconds.
UNSIZED_LIMIT = 4096
# The first pass stops to count the batches at this one, and those of a loader at the first, since
# a loader without a length is likely to have no end. Shorter data are not read twice for that.
_FEW = 64


class Batches:
    """Passes over ``data``, each checked to be the same as the first.

    A ``DataLoader`` is read through a copy with an iterator and samplers of its own, so that a
    training loop can read it meanwhile; a ``DistributedSampler`` stays at its present epoch.

    Data that are held in tensors (``(x, y)``, a list of batches) are compared again only when a
    version counter says that they may have been written in place. Writes that the counters do not
    count are not seen: through ``tensor.data``, or through an array that shares the memory.

    A tuple of two pairs is read as two batches; one batch of a pair of inputs and a pair of targets
    is given as a list of one, ``[((a, b), (c, d))]``.

    Of a ``CurrentBatch`` it is the passes over what that holds at present which are the same; of
    its tensors nothing is held here.

    Args:
        data: ``(x, y)``, or any re-iterable of batches: a list, a ``DataLoader`` that does not
            shuffle, a ``CurrentBatch``. A mapping is one batch, and so is an object that is no
            iterable.
        pairs: the batches are pairs, so that a list of two tensors is no list of batches.

    Attributes:
        current: the data, if they are a ``CurrentBatch``.

    Raises:
        ArgumentError: it is a list of two tensors (ambiguous), a generator (it can be read only
            once), empty, or, where batches are pairs, calls of a model.
    """

    def __init__(self, data: Any, *, pairs: bool) -> None:
        self.data: Iterable[Any] = [data] if _is_batch(data, pairs=pairs) else data
        self.current = data if isinstance(data, CurrentBatch) else None
        self._number = 0  # of the current batch that the reference is of
        # Lists and tuples hold the same batches in every pass; other iterables may make them anew.
        self._stored = isinstance(self.data, list | tuple | CurrentBatch)
        self._reference: list[int] | None = None  # digests of the first pass ...
        self._written = 0  # ... and the version of stored data that they are known to hold for
        self._stores: list[Any] = []
        self._watched: list[Tensor] = []
        tensors_only = isinstance(data, list) and all(isinstance(t, Tensor) for t in data)
        if pairs and tensors_only and len(data) == 2:
            raise ArgumentError(
                "data",
                "a list of two tensors",
                "the tuple `(x, y)` or a list of such tuples",
                "A list is read as a list of batches.",
            )
        if isinstance(data, Iterator) or not isinstance(self.data, Iterable):
            raise ArgumentError(
                "data",
                type(data).__name__,
                "`(x, y)` or an iterable that can be read again and again",
                "A generator is used up by its first pass: make it a list or a DataLoader.",
            )
        if pairs and self.current is not None and self.current.of_calls:
            raise ArgumentError(
                "data",
                "what a model was called with",
                "batches (x, y) for a loss of output and target",
                "Use HessianOperator.from_loss(model, batch_loss, data), where "
                "batch_loss(model, call) returns the mean loss of call(model), and its weight.",
            )
        if isinstance(self.data, DataLoader):
            check_loader(self.data)
            self.data = own_loader(self.data)
        length = None
        with suppress(TypeError, NotImplementedError):  # loaders of streams have no length
            length = len(self.data)  # type: ignore[arg-type]
        if length == 0:
            raise ArgumentError("data", "empty", "at least one batch")
        self._ends = length is not None or self.current is not None

    def read(
        self, device: torch.device, *, upcast: bool = False, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, Any, int]]:
        """Yields the index of each batch, the batch on ``device``, and its bytes.

        The bytes are those of memory that this pass has allocated: none for what the user's own
        list holds on the device.

        A pass that differs from the first raises ``DataChangedError``: at its start if the data are
        stored, and at its end if they are not.

        Args:
            device: where the parameters live.
            upcast: bf16 and fp16 inputs become float32, as the parameters do.
            dtype: that all floating-point inputs take (default: they keep theirs).

        Raises:
            ArgumentError: there is no batch.
        """

        def cast(own: torch.dtype) -> torch.dtype:
            if dtype is not None and own.is_floating_point:
                return dtype
            if dtype is not None and own.is_complex:
                return dtype.to_complex()
            return torch.float32 if upcast and own in LOW_PRECISION else own

        def new_bytes(batch: Any, elsewhere: Any) -> int:
            if self._stored and elsewhere is batch:
                return 0
            found = {t.data_ptr() for t in (_parts(batch) if self._stored else [])}
            return sum(t.nbytes for t in _parts(elsewhere) if t.data_ptr() not in found)

        self._watch()
        written = self.fingerprint()
        if self.current is not None and self.current.number != self._number:
            self._reference, self._number = None, self.current.number
        if self._stored and self._reference is not None and written != self._written:
            self._compare([int(digest(contents(batch))) for batch in self.data])
            self._written = written
        unknown = not self._stored or self._reference is None
        digests: list[Tensor] = []
        index = -1
        with random_state_kept(device, self.data):
            for index, batch in enumerate(self.data):
                if not self._ends and index == (0 if isinstance(self.data, DataLoader) else _FEW):
                    self._check_end(device)
                if unknown:
                    digests.append(digest(contents(batch)))
                elsewhere = moved(batch, device, cast)
                yield index, elsewhere, new_bytes(batch, elsewhere)
        if index < 0:
            raise ArgumentError("data", "empty", "at least one batch")
        if unknown:
            self._compare([int(d) for d in digests])
            self._written = written

    def fingerprint(self) -> int:
        """Returns a number that changes when data in tensors are written, without a pass.

        The tensors are those of a list of batches, or of the ``TensorDataset`` of a loader. It
        may change for nothing, as when a tensor is overwritten by what it held. That of other
        current batches is another.
        """
        if self.current is not None:
            return hash((self.current.number, *_fingerprint(_counting(self.current.held()))))
        stores = _stores(self.data)
        if [id(part) for part in stores] != [id(part) for part in self._stores]:
            self._watch()
        return hash(_fingerprint(self._watched))

    def _check_end(self, device: torch.device) -> None:
        """Checks that data without a length have an end, before more is computed on them.

        Raises:
            ArgumentError: they have more than ``UNSIZED_LIMIT`` batches.
        """
        with random_state_kept(device, self.data):
            some = islice(self._read_apart(), UNSIZED_LIMIT + 1)
            count = sum(1 for _ in some)
        if count > UNSIZED_LIMIT:
            raise ArgumentError(
                "data",
                "an iterable without a length",
                f"at an end after {UNSIZED_LIMIT} batches",
                "Cut a stream: `list(itertools.islice(loader, 100))`. Give data that do have an "
                "end a `__len__`.",
            )
        self._ends = True

    def _read_apart(self) -> Iterable[Any]:
        """The data for another reader, without the iterator of the present one."""
        return own_loader(self.data) if isinstance(self.data, DataLoader) else self.data

    def _watch(self) -> None:
        """Looks for the tensors that the data are held in."""
        self._stores = _stores(self.data)
        self._watched = _counting(self._stores)

    def forget(self) -> None:
        """Takes the next pass for the first one, as where the user has repaired the data."""
        self._reference = None

    def _compare(self, digests: list[int]) -> None:
        if self._reference is None:
            self._reference = digests
        elif digests != self._reference:
            differing = sum(a != b for a, b in zip(digests, self._reference, strict=False))
            remedy = "give it data without shuffling, augmentation or drop_last."
            if self.current is not None:
                remedy = (
                    "they were written in place. Set the batch again where it has changed, or "
                    "give it copies: batch.set(x.clone(), y.clone())."
                )
            elif self._stored:
                remedy = "they were written in place, so make a new operator of them."
            message = (
                f"This pass over the data differs from the first: {len(digests)} batches instead "
                f"of {len(self._reference)}, {differing} of them changed. The curvature must be "
                f"one fixed matrix: {remedy}"
            )
            raise DataChangedError(message)

    def __getstate__(self) -> dict[str, Any]:
        # Iterators with workers cannot be copied, and the tensors of a copy are others.
        return self.__dict__ | {"data": self._read_apart(), "_stores": [], "_watched": []}


def _is_batch(data: Any, *, pairs: bool) -> bool:
    """Whether ``data`` is one batch, and not an iterable of batches."""
    if isinstance(data, Mapping | Tensor):
        return True
    if isinstance(data, tuple) and len(data) > 0:
        if isinstance(data[0], Tensor):
            return True
        return pairs and len(data) == 2 and not all(_is_pair(item) for item in data)
    if isinstance(data, Iterable) or hasattr(data, "__getitem__"):
        return False
    return moves_itself(data) or any(True for _ in tensors(data))


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and not moves_itself(item)


def _parts(batch: Any) -> Iterator[Tensor]:
    """Yields the strided tensors that a batch is made of."""
    return (part for tensor in tensors(batch) for part in dense_parts(tensor.detach()))


def _counting(stores: list[Any]) -> list[Tensor]:
    """Returns the tensors in them that count how often they are written to."""
    return [t for t in tensors(stores) if not t.is_inference()]


def _fingerprint(watched: list[Tensor]) -> tuple[int, ...]:
    versions = [t._version for t in watched]  # noqa: SLF001 (it has no public name)
    places = [t.data_ptr() for t in watched if t.layout == torch.strided]
    return (*map(id, watched), *versions, *places)


def _stores(data: Any) -> list[Any]:
    """What holds the data, if that is known: the batches of a list, the tensors of a data set."""
    if isinstance(data, list | tuple):
        return list(data)
    if isinstance(data, DataLoader | Subset):
        return _stores(data.dataset)
    if isinstance(data, ConcatDataset):
        return [store for dataset in data.datasets for store in _stores(dataset)]
    return list(data.tensors) if isinstance(data, TensorDataset) else []
