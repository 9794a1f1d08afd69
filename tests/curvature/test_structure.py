"""Batches of any form: all their tensors are found, and moved without a change to the batch."""

import threading
from collections import UserDict, deque, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.structure import contents, moved, tensors

META, CPU = torch.device("meta"), torch.device("cpu")
Pair = namedtuple("Pair", ["x", "y"])


def same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def doubled(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    name: str = "a"


@dataclass(slots=True)
class Slotted:
    x: Any
    y: Any = None


class Store(Mapping[str, Any]):
    """The fields of a graph, in a mapping that is no dict and knows its graph."""

    def __init__(self, parent: Any, **fields: Any) -> None:
        self.parent, self.fields = parent, fields

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


class Graph:
    """A batch of graphs: ``to`` writes into it, and returns it."""

    def __init__(self, **fields: Any) -> None:
        self._store = Store(self, **fields)

    def to(self, device: torch.device) -> "Graph":
        for key, value in self._store.fields.items():
            self._store.fields[key] = value.to(device)
        return self


class Silent(Graph):
    """Its ``to`` returns nothing, and it holds what cannot be copied deeply."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.lock = x, threading.Lock()

    def to(self, device: torch.device) -> None:
        self.x = self.x.to(device)


class Node:
    """A part that knows the whole."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.children = x, []

    def add(self, x: Tensor) -> "Node":
        child = Node(x)
        child.parent = self
        self.children.append(child)
        return self


def rows(n: int = 3) -> Tensor:
    return torch.arange(2.0 * n).view(n, 2)


FORMS: dict[str, Any] = {
    "tensor": rows,
    "tuple": lambda: (rows(), [rows(1), {"a": rows(2)}]),
    "namedtuple": lambda: Pair(rows(), torch.arange(3)),
    "tokenizer": lambda: UserDict(ids=torch.arange(3), mask=rows()),
    "deque": lambda: deque([rows(), rows(1)]),
    "frozen_dataclass": lambda: Frozen(rows()),
    "slots": lambda: Slotted(rows(), Slotted(rows(1))),
    "graph": lambda: Graph(x=rows(), edges=torch.arange(4)),
    "silent": lambda: Silent(rows()),
    "packed": lambda: pack_sequence([rows(3), rows(1), rows(2)], enforce_sorted=False),
    "sparse_coo": lambda: rows().to_sparse(),
    "in_a_pair": lambda: (Graph(x=rows()), torch.arange(3)),
    "knows_the_whole": lambda: Node(rows()).add(rows(1)).add(rows(2)),
}


def arrays(batch: Any) -> list[Any]:
    """Dtype, device and values of each tensor."""
    return [
        (t.dtype, t.device, t.to_dense().tolist() if t.device == CPU else None)
        for t in tensors(batch)
    ]


NUMBERS = {"tensor": 1, "frozen_dataclass": 1, "silent": 1, "sparse_coo": 1, "tuple": 3}
NUMBERS |= {"packed": 4, "knows_the_whole": 3}


@pytest.mark.parametrize("form", FORMS)
def test_the_tensors_of_all_forms_are_found(form):
    assert len(list(tensors(FORMS[form]()))) == NUMBERS.get(form, 2)


@pytest.mark.parametrize("form", FORMS)
def test_moving_a_batch_moves_its_tensors_and_leaves_the_batch(form):
    batch = FORMS[form]()
    before, ids = arrays(batch), [id(t) for t in tensors(batch)]
    result = moved(batch, META, same)
    devices = {t.device.type for t in tensors(result)}
    assert devices == ({"meta", "cpu"} if form == "packed" else {"meta"})
    assert type(result) is type(batch)
    assert arrays(batch) == before
    assert [id(t) for t in tensors(batch)] == ids


@pytest.mark.parametrize("form", FORMS)
def test_casting_changes_dtypes_and_no_values(form):
    batch = FORMS[form]()
    before = arrays(batch)
    result = moved(batch, CPU, doubled)
    assert arrays(batch) == before
    expected = [(doubled(dtype), device, values) for dtype, device, values in before]
    assert arrays(result) == expected


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("graph", "in_a_pair")])
def test_a_batch_that_need_not_change_is_not_copied(form):
    batch = FORMS[form]()
    result = moved(batch, CPU, same)
    assert all(a is b for a, b in zip(tensors(batch), tensors(result), strict=True))
    assert result is batch or hasattr(batch, "to")


def test_a_packed_sequence_has_its_batch_sizes_on_the_cpu():
    batch = (pack_sequence([rows(3), rows(1)]), torch.arange(2))
    packed, target = moved(batch, META, doubled)
    assert isinstance(packed, PackedSequence)
    assert (packed.data.device, packed.data.dtype) == (META, torch.float64)
    assert (packed.batch_sizes.device, packed.batch_sizes.dtype) == (CPU, torch.int64)
    assert target.device == META


def test_a_cast_packed_sequence_runs_through_a_recurrent_layer():
    torch.manual_seed(0)
    layer = nn.GRU(2, 3).double()
    packed = pack_sequence([rows(3), rows(1), rows(2)], enforce_sorted=False)
    expected = layer(packed.double())[1]
    assert torch.equal(layer(moved(packed, CPU, doubled))[1], expected)


def test_parts_that_know_the_whole_know_the_one_that_was_moved():
    result = moved(Node(rows()).add(rows(1)), META, same)
    (child,) = result.children
    assert child.parent is result


def test_what_holds_no_tensor_is_shared():
    """It may be an open file, which cannot be copied, or large."""
    lock, table = threading.Lock(), np.ones(3)
    result = moved((rows(), {"lock": lock, "table": table}), META, same)
    assert result[1]["lock"] is lock
    assert result[1]["table"] is table
    assert result[0].device == META


def test_a_tensor_that_occurs_twice_is_moved_once():
    x = rows()
    first, (second,) = moved((x, [x]), META, same)
    assert first is second


def test_parts_that_cannot_be_copied_are_refused():
    batch = Slotted(rows(), threading.Lock())
    assert moved(batch, CPU, same) is batch

    class Locked:
        def __init__(self) -> None:
            self.x = rows()

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is only one")

    with pytest.raises(ArgumentError, match=r"'Locked', but must be .*`to\(device\)`.* only one"):
        moved(Locked(), META, same)


# --- what tells one batch from another ----------------------------------------------------------


def total(batch: Any) -> tuple[Any, ...]:
    return tuple(t.tolist() for t in contents(batch))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Frozen(rows()), Frozen(rows() + 1)),
        (Slotted(rows(), 1), Slotted(rows(), 2)),
        (Graph(x=rows()), Graph(x=-rows())),
        ((rows(), np.array([1.0, 2.0])), (rows(), np.array([1.0, 2.5]))),
        ((rows(), [1, 0, 2]), (rows(), [1, 2, 0])),
        ((rows(), ["a", "b"]), (rows(), ["b", "a"])),
        ((rows(), np.array(["2020-01-01"], "M8[D]")), (rows(), np.array(["2020-01-02"], "M8[D]"))),
    ],
    ids=["dataclass", "number", "graph", "array", "numbers", "texts", "dates"],
)
def test_contents_that_differ_are_told_apart(first, second):
    assert total(first) == total(first)
    assert total(first) != total(second)
