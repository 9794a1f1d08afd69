"""Products with the Hessian of a sharded model that never hold all parameters on one rank.

A product goes through the graph of the gradient: first up the layers, through what their backward
passes have computed, and then down again. On the way up a layer already has a part of its product
for the whole of its parameters. Autograd would keep it until it comes by on the way down, and so
hold as many numbers as there are parameters. Here it is summed over the ranks and scattered at
once, as soon as the next layer has one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from subspace_optim.curvature.fully_sharded import FSDPGroup
from subspace_optim.curvature.gathering import Gather, scattered

_GATHER: Any = Gather._backward_cls  # noqa: SLF001
Product = Callable[[list[Tensor]], Sequence[Tensor | None]]


def scattered_early(
    loss: Tensor, gradient: Sequence[Tensor | None], leaves: Sequence[Tensor], product: Product
) -> Product:
    """Returns the same product, of which each layer's parts are scattered when they are found.

    Args:
        loss: of shards that were gathered.
        gradient: of the loss, with a graph.
        leaves: the shards.
        product: ``v -> H v``, a backward pass through the graph of the gradient.
    """
    ends = [get_gradient_edge(g).node for g in gradient if g is not None and g.requires_grad]
    if loss.grad_fn is None or not ends:
        return product
    of_loss = _below([loss.grad_fn])
    nodes = _below(ends)
    leads_to = _gathers_of(nodes)
    gathers = list(dict.fromkeys(leads_to.values()))
    parts = _Parts(gathers, leaves)
    for node in nodes:
        if node in leads_to or node in of_loss:  # what these find comes when all else has
            continue
        those = [
            (i, other, output)
            for i, (other, output) in enumerate(node.next_functions)
            if other in leads_to
        ]
        if those:
            node.register_hook(functools.partial(_taken_aside, parts, those))
    for number, gather in enumerate(gathers):
        gather.register_hook(functools.partial(_joined, parts, number))

    def in_parts(v: list[Tensor]) -> Sequence[Tensor | None]:
        parts.forget()
        found = list(product(v))
        parts.scatter()
        for i, early in parts.left():
            late = found[i]
            found[i] = early if late is None else late.add_(early)
        parts.forget()
        return found

    return in_parts


def _below(roots: Iterable[Any]) -> dict[Any, None]:
    """Returns the nodes of a graph, each after those that it leads to."""
    found: dict[Any, None] = {}
    pending = [(root, False) for root in roots]
    while pending:
        node, entered = pending.pop()
        if node in found:
            continue
        if entered:
            found[node] = None
            continue
        pending.append((node, True))
        pending += [(other, False) for other, _ in node.next_functions if other is not None]
    return found


def _gathers_of(nodes: Iterable[Any]) -> dict[Any, Any]:
    """Returns the nodes that lead to one gathered parameter only, each with where it is gathered.

    Such as transposes and other views. One that has several ways down would run once for each.

    Args:
        nodes: each after those that it leads to.
    """
    found: dict[Any, Any] = {}
    for node in nodes:
        if isinstance(node, _GATHER):
            found[node] = node
        elif not isinstance(node, torch.autograd.function.BackwardCFunction):
            below = [found.get(other) for other, _ in node.next_functions]
            if len(below) == 1 and below[0] is not None:
                found[node] = below[0]
    return found


def _taken_aside(
    parts: _Parts, those: list[tuple[int, Any, int]], slopes: tuple[Any, ...], _: Any
) -> Any:
    """Takes what a node has found for gathered parameters out of the hands of autograd."""
    if torch.is_grad_enabled():  # a derivative of the product is asked for
        return None
    left = list(slopes)
    for i, node, output in those:
        if left[i] is not None:
            parts.add(node, output, left[i])
            left[i] = None
    return tuple(left)


def _joined(parts: _Parts, number: int, slopes: tuple[Any, ...], _: Any) -> Any:
    """Adds what was scattered early to what autograd has found, where it scatters that itself."""
    if not torch.is_grad_enabled():
        parts.join(number, slopes)


class _Parts:
    """Parts of a product: of the whole parameters of one group, and of shards.

    It holds no node of a graph, since nodes hold it.

    Args:
        gathers: the nodes where parameters are gathered.
        leaves: the shards.
    """

    def __init__(self, gathers: Sequence[Any], leaves: Sequence[Tensor]) -> None:
        indices = {id(leaf): i for i, leaf in enumerate(leaves)}
        self._numbers = {id(gather): n for n, gather in enumerate(gathers)}
        self._groups: list[FSDPGroup] = [gather.group for gather in gathers]
        self._leaves = [  # None for a shard that is not differentiated by
            [None if leaf is None else indices.get(id(leaf.variable)) for leaf, _ in of]
            for of in (gather.next_functions for gather in gathers)
        ]
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self._shards: dict[int, list[Tensor | None]] = {}  # what has been scattered
        self._latest: int | None = None
        self._wholes: dict[int, Tensor] = {}

    def add(self, node: Any, output: int, slope: Tensor) -> None:
        """Adds what was found for an output of a node that leads to gathered parameters."""
        slope = _fitting(slope, node, output)
        while not isinstance(node, _GATHER):
            slopes: list[Any] = [None] * len(node._input_metadata)  # noqa: SLF001
            slopes[output] = slope
            below = node(*slopes)
            slope = below[0] if isinstance(below, tuple) else below
            if slope is None:
                return
            ((node, output),) = node.next_functions
            slope = _fitting(slope, node, output)
        number = self._numbers[id(node)]
        if number != self._latest:
            self.scatter()
            self._latest = number
        known = self._wholes.get(output)
        self._wholes[output] = slope if known is None else known + slope

    def scatter(self) -> None:
        """Sums the parts of whole parameters over the ranks, and keeps the shards of this one."""
        if self._latest is None:
            return
        group = self._groups[self._latest]
        some = next(iter(self._wholes.values()))
        wholes = [
            self._wholes.pop(i) if i in self._wholes else some.new_zeros(p.shape)
            for i, p in enumerate(group.parameters)
        ]
        shards = list[Tensor | None](scattered(group, wholes))
        _add(shards, self._shards.get(self._latest, []))
        self._shards[self._latest] = shards
        self._latest = None

    def join(self, number: int, slopes: Sequence[Tensor | None]) -> None:
        """Adds the shards of a group to others, in place, and lets go of them."""
        if number == self._latest:
            self.scatter()
        _add(slopes, self._shards.get(number, []))

    def left(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the shards that have not been joined to others, with the index of their leaf."""
        for number, shards in self._shards.items():
            for i, shard in zip(self._leaves[number], shards, strict=True):
                if i is not None and shard is not None:
                    yield i, shard


def _fitting(slope: Tensor, node: Any, output: int) -> Tensor:
    """Returns a slope in the shape of the output that it is of, as autograd does."""
    return slope.sum_to_size(node._input_metadata[output].shape)  # noqa: SLF001


def _add(tensors: Sequence[Tensor | None], others: list[Tensor | None]) -> None:
    """Adds others to tensors in place, as far as there are both, and lets go of these."""
    for j, (tensor, other) in enumerate(zip(tensors, others, strict=False)):
        if tensor is not None and other is not None:
            tensor.add_(other)
            others[j] = None
