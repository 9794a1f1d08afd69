"""What sees a model at work, out of its reach: an evaluation puts back all that it can reach."""

from collections.abc import Iterator
from typing import Any


class Seen:
    """A list that neither a model nor a closure leads to: it has no ``__dict__`` to look into."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: list[Any] = []

    def append(self, item: Any) -> None:
        self._items.append(item)

    def clear(self) -> None:
        self._items.clear()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other)  # type: ignore[call-overload]

    __hash__ = None  # type: ignore[assignment]
