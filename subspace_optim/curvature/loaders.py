"""A user's ``DataLoader``, read without disturbing the training loop that reads it too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from subspace_optim._validation import ArgumentError

# Attributes in which loaders keep their samplers, and wrappers the loader inside.
_LINKS = ("sampler", "batch_sampler", "base_dataloader")

_DRAWING: dict[type[Sampler[Any]], tuple[str, str]] = {
    RandomSampler: (
        "a DataLoader that shuffles",
        "Make a second DataLoader of the same data set with shuffle=False.",
    ),
    WeightedRandomSampler: (
        "a DataLoader with a WeightedRandomSampler, which draws other examples in each pass",
        "Make a second DataLoader without it, or a list of what this one draws: `list(loader)`.",
    ),
    SubsetRandomSampler: (
        "a DataLoader with a SubsetRandomSampler, which shuffles",
        "Make a second DataLoader of `torch.utils.data.Subset(dataset, indices)`.",
    ),
}


def loader_parts(loader: object) -> Iterator[Any]:
    """Yields a loader, its samplers, and those inside of these, each once."""
    found: dict[int, Any] = {}
    waiting = [loader]
    while waiting:
        part = waiting.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            waiting += [getattr(part, name, None) for name in _LINKS]
            yield part


def check_loader(loader: object) -> None:
    """Checks that the samplers of a loader do not draw at random.

    Samplers that are not torch's own are found out when a pass differs from the first.

    Raises:
        ArgumentError: one of torch's own samplers does.
    """
    for part in loader_parts(loader):
        for kind, (value, remedy) in _DRAWING.items():
            if isinstance(part, kind):
                allowed = "one that yields the same batches in every pass"
                raise ArgumentError("data", value, allowed, remedy)


def own_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader of the same batches that shares no state with ``loader``.

    A loader with persistent workers has one iterator, which a second reader would set back to the
    start; and training sets the epoch of a ``DistributedSampler``. So the two readers have a
    loader and samplers each, over one data set.
    """
    copies: dict[int, Any] = {}

    def own(part: Any) -> Any:
        if not isinstance(part, DataLoader) and not hasattr(part, "__dict__"):
            return part
        if id(part) not in copies:
            copies[id(part)] = copied = copy.copy(part)
            fields = vars(copied)  # a loader refuses that its samplers are set
            fields.update({name: own(fields[name]) for name in _LINKS if name in fields})
            if "_iterator" in fields:
                fields["_iterator"] = None
        return copies[id(part)]

    return own(loader)  # type: ignore[no-any-return]
