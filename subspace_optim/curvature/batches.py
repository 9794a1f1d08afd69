"""The data of an operator: the same batches in every pass, on the device of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, RandomSampler

from subspace_optim._validation import ArgumentError, DataChangedError
from subspace_optim.curvature.isolation import random_state_kept
from subspace_optim.curvature.parameters import digest

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class Batches:
    """Passes over ``data``, each checked to be the same as the first.

    Args:
        data: ``(x, y)``, or any re-iterable of batches: a list, a ``DataLoader`` that does not
            shuffle. A mapping is one batch.
        pairs: the batches are pairs, so that a list of two tensors is no list of batches.

    Raises:
        ArgumentError: it is a list of two tensors (ambiguous), a generator (it can be read only
            once), a loader that shuffles, or empty.
    """

    def __init__(self, data: Any, *, pairs: bool) -> None:
        self.data: Iterable[Any] = [data] if _is_batch(data) else data
        # Python's own containers hold the same batches in every pass; other iterables are asked.
        self._checked = not isinstance(self.data, list | tuple)
        self._reference: list[int] | None = None
        tensors = isinstance(data, list) and all(isinstance(t, Tensor) for t in data)
        if pairs and tensors and len(data) == 2:
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
        if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
            raise ArgumentError(
                "data",
                "a DataLoader that shuffles",
                "one that yields the same batches in every pass",
                "Make a second DataLoader of the same data set with shuffle=False.",
            )
        length = None
        with suppress(TypeError):  # loaders of streams have no length
            length = len(self.data)  # type: ignore[arg-type]
        if length == 0:
            raise ArgumentError("data", "empty", "at least one batch")

    def read(self, device: torch.device, *, upcast: bool) -> Iterator[tuple[int, Any, int]]:
        """Yields the index of each batch, the batch on ``device``, and its bytes.

        Of the bytes count those that the pass has brought: none for what the user's own list
        holds on the device.

        A pass that differed from the first raises ``DataChangedError`` at its end.

        Args:
            device: where the parameters live.
            upcast: bf16 and fp16 inputs become float32, as the parameters do.

        Raises:
            ArgumentError: there is no batch.
        """
        digests: list[Tensor] = []

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):  # a tokenizer's batch moves itself
                return leaf.to(device) if hasattr(leaf, "to") else leaf
            low = upcast and leaf.dtype in _LOW_PRECISION
            return leaf.to(device, torch.float32 if low else leaf.dtype)

        def new_bytes(batch: Any, moved: Any) -> int:
            found = {t.data_ptr() for t in ([] if self._checked else _tensors(batch))}
            return sum(t.nbytes for t in _tensors(moved) if t.data_ptr() not in found)

        index = -1
        with random_state_kept(device, self.data):
            for index, batch in enumerate(self.data):
                if self._checked:
                    digests.append(digest(_tensors(batch)))
                moved = tree_map(move, batch)
                yield index, moved, new_bytes(batch, moved)
        if index < 0:
            raise ArgumentError("data", "empty", "at least one batch")
        if self._checked:
            self._compare([int(d) for d in digests])

    def _compare(self, digests: list[int]) -> None:
        if self._reference is None:
            self._reference = digests
        elif digests != self._reference:
            differing = sum(a != b for a, b in zip(digests, self._reference, strict=False))
            message = (
                f"This pass over the data differs from the first: {len(digests)} batches instead "
                f"of {len(self._reference)}, {differing} of them changed. The curvature must be "
                "one fixed matrix: give it data without shuffling, augmentation or drop_last."
            )
            raise DataChangedError(message)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yields the tensors of a batch, those in a tokenizer's mapping too."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(list(leaf.values()))


def _is_batch(data: object) -> bool:
    """Whether ``data`` is one batch: a mapping, or a tuple whose first element is a tensor."""
    if isinstance(data, Mapping):
        return True
    return isinstance(data, tuple) and len(data) > 0 and isinstance(data[0], Tensor)


@dataclass
class Supervised:
    """``batch_loss(model, (x, y)) = loss_fn(model(x), y)``, weighted by its examples."""

    loss_fn: Callable[[Any, Any], Tensor]

    def __call__(self, model: Callable[[Any], Any], batch: Any) -> tuple[Tensor, int]:
        """Returns the mean loss of a batch and its number of examples.

        Raises:
            ArgumentError: the batch is no pair, or holds no tensor.
        """
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentError(
                "a batch of data",
                type(batch).__name__,
                "a pair (x, y)",
                "For batches of another form use HessianOperator.from_loss.",
            )
        x, y = batch
        counted = next((t for t in tree_leaves([y, x]) if isinstance(t, Tensor) and t.dim()), None)
        if counted is None:
            raise ArgumentError("a batch of data", "of no tensor", "of at least one example")
        return self.loss_fn(model(x), y), len(counted)


def concatenated(a: Any, b: Any) -> Any:
    """TEMPORARY"""
    try:
        return tree_map(lambda x, y: torch.cat([x, y]), a, b)
    except Exception:
        return None
