"""``LogitGradients``: the gradients of the classes' logits, summed over a minibatch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.digests import digest
from subspace_optim.curvature.dtensors import whole
from subspace_optim.curvature.evaluation import PerParameter, Point
from subspace_optim.curvature.memory import may_be_kept, size_gathered
from subspace_optim.curvature.parameters import LOW_PRECISION, ParameterSpace
from subspace_optim.curvature.second_derivatives import refuse_reentrant_checkpoints
from subspace_optim.curvature.surroundings import Surroundings

# Where C backward passes are faster than one that is batched. Measured on CPU, C = 10, batches of
# 500: 52 against 63 ms for an MLP, 2.1 against 4.5 s for a CNN, whose convolutions become grouped.
_LOOPED = ("cpu",)
_INPUTS = "a tensor, or what takes a tensor of indices: x[indices]"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class LogitGradients:
    r"""The sums over a minibatch that class gradients are made of, for each class k.

    .. math:: \sum_{\mu \in B_k} \nabla z_k^\mu, \qquad
              \sum_{\mu \in B_k} p_k^\mu (1 - p_k^\mu), \qquad |B_k|

    ``B_k`` are the examples of class k, ``z_k`` is the logit of the class and ``p_k`` its
    probability. The model is used in its present mode, with dropout masks drawn from the present
    random state.

    Of a sharded model the minibatch is that of all ranks with data of their own, and the gradients
    are those by the coordinates that lie here. All ranks take part in every pass, also those that
    have no example of its class: an example of theirs goes with it, and counts nothing.

    Args:
        model: called as ``model(x)``, which gives ``(N, C)`` logits.
        space: the parameters to differentiate by.
        num_classes: C.
        coupled: whether an example's logits depend on the other examples. ``None``: they do if a
            batch norm layer uses the statistics of the batch.
    """

    def __init__(
        self, model: nn.Module, space: ParameterSpace, num_classes: int, coupled: bool | None
    ) -> None:
        self.model, self.parameters = model, space
        self.num_classes, self.coupled = num_classes, coupled
        self._written: list[Tensor] = []  # what the forward pass writes to, beside buffers
        self._watched = False

    @property
    def size(self) -> int:
        """The length of the sums, as far as they lie on this rank."""
        return self.num_classes * (self.parameters.size_here + 2)

    def split(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views one vector as ``Σ ∇z_k: (C, P)``, ``Σ p_k (1 − p_k): (C,)`` and ``|B_k|: (C,)``."""
        C = self.num_classes
        spreads, counts = sums[-2 * C :].view(2, C)
        return sums[: -2 * C].view(C, -1), spreads, counts

    def add_to(self, sums: Tensor, x: Any, y: Tensor) -> None:
        """Adds a minibatch, at the present parameters, to sums that are zero.

        Args:
            sums: as ``split`` views them.
            x: N inputs: a tensor, or what gives some of them as ``x[indices]``.
            y: ``(N,)``, the classes.
        """
        gradients, spreads, counts = self.split(sums)
        ranks = self.parameters.ranks  # of a sharded model; else this process alone
        with ranks.all_or_none():
            y, own = self._checked(x, y)
            x = self._input(x)
        joint = self._joint(y, own)
        with ranks.all_or_none():
            parts = self._parts(x, y, own, joint)
        counts += joint.counts.to(counts)
        point = self._point()
        seen: list[tuple[Tensor, Tensor]] = []  # logits, and the classes
        for part in parts:
            seed = joint.seed + part.number * ranks.data_size + ranks.data_rank
            with self._evaluating(point, seed):
                logits = self._logits(part)
                if part is parts[0]:
                    refuse_reentrant_checkpoints(logits)
                of_own = logits.gather(1, part.y[:, None])[:, 0]
                scores = of_own.new_zeros(len(spreads)).index_add(0, part.y, of_own)
                for k, slopes in self._gradients(scores, part.classes, point.leaves):
                    gradients[k] = self.parameters.flatten(slopes)
            if not part.idle:
                seen.append((logits.detach(), part.y))
        logits, y = (torch.cat(each) for each in zip(*seen, strict=True))
        spread = spreads.new_zeros(len(spreads), dtype=torch.float64)
        spread.index_add_(0, y, _spread(logits, y))
        spreads += ranks.of_all_data(spread).to(spreads)

    def _joint(self, y: Tensor, own: list[int]) -> _Joint:
        """Returns what the ranks have to know of the minibatch before they go through it together.

        Args:
            y: the classes here.
            own: how many examples each has here.

        Ranks that share their data, as tensor-parallel ones do, and have others raise an
        ``ArgumentError``, all of them.
        """
        ranks = self.parameters.ranks
        coupled = _are_coupled(self.model) if self.coupled is None else bool(self.coupled)
        seed = int(torch.randint(2**31, (), device="cpu"))  # masks follow the present random state
        if ranks.group is None:
            return _Joint(torch.tensor(own), coupled, seed)
        told = (ranks.data_rank, int(digest([y])) % 2**48, coupled, seed)  # float64 holds them
        shared = torch.zeros(ranks.size * len(told) + len(own), dtype=torch.float64)
        shared[ranks.rank * len(told) :][: len(told)] = torch.tensor(told, dtype=torch.float64)
        shared[-len(own) :] = torch.tensor(own)
        shared = ranks.sum_(shared.to(y.device)).cpu()
        of_ranks = shared[: -len(own)].view(ranks.size, len(told))
        data_ranks, digests, are_coupled, seeds = of_ranks.T.tolist()
        if len(set(zip(data_ranks, digests, strict=True))) > ranks.data_size:
            found, allowed = "another on ranks that share their data", "the same on all of them"
            remedy = "Give tensor-parallel ranks one minibatch."
            raise ranks.told(ArgumentError("y", found, allowed, remedy))
        counts = shared[-len(own) :] * ranks.data_size / ranks.size
        return _Joint(counts, any(are_coupled), int(seeds[0]))

    def _parts(self, x: Any, y: Tensor, own: list[int], joint: _Joint) -> list[_Part]:
        """Returns what goes through the model at a time."""
        present = [k for k, n in enumerate(joint.counts.tolist()) if n]
        if joint.coupled:
            return [_Part(0, x, y, present, idle=False)]
        found = []
        by_class = y.argsort(stable=True).split(own)
        for k in present:  # the gradient of class k needs its examples only
            # One of another class has no part in that gradient, and makes the same graph.
            chosen = by_class[k] if own[k] else y.new_zeros(1)
            found.append(_Part(k, self._examples(x, chosen), y[chosen], [k], idle=not own[k]))
        return found

    def _checked(self, x: Any, y: Any) -> tuple[Tensor, list[int]]:
        """Returns the classes on the model's device, and how many examples each of them has.

        Raises:
            ArgumentError: x or y cannot be used.
        """
        if not isinstance(y, Tensor) or y.dtype not in _INTEGERS:
            kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
            remedy = "Of one-hot targets take `y.argmax(dim=1)`."
            raise ArgumentError("y", kind, "a tensor of integers, the classes", remedy)
        if y.dim() != 1 or not len(y):
            shape = tuple(y.shape)
            raise ArgumentError("the shape of y", shape, "(N,), a class for each of N examples")
        if isinstance(x, str | list | tuple | Mapping) or not hasattr(x, "__getitem__"):
            remedy = "Stack the inputs in a tensor, or wrap them in a class with __getitem__."
            raise ArgumentError("x", type(x).__name__, _INPUTS, remedy)
        length = len(x) if hasattr(x, "__len__") else len(y)
        if length != len(y):
            raise ArgumentError("the length of x", length, f"{len(y)}, as that of y")
        y = y.to(self.parameters.device, torch.int64)
        counts = (y[:, None] == torch.arange(self.num_classes, device=y.device)).sum(dim=0)
        low, high, *found = torch.cat([torch.stack(y.aminmax()), counts]).tolist()
        if low < 0 or high >= self.num_classes:
            wrong = low if low < 0 else high
            allowed = f"from 0 to {self.num_classes - 1}, as num_classes is {self.num_classes}"
            raise ArgumentError("a class in y", wrong, allowed)
        return y, found

    def _input(self, x: Any) -> Any:
        """Returns a tensor on the model's device, of the precision of its copies."""
        if not isinstance(x, Tensor):
            return x
        upcast = any(p.dtype in LOW_PRECISION for p in self.model.parameters())
        low = upcast and x.dtype in LOW_PRECISION
        return x.to(self.parameters.device, torch.float32 if low else x.dtype)

    def _examples(self, x: Any, indices: Tensor) -> Any:
        """Returns some of the inputs.

        Raises:
            ArgumentError: they cannot be taken by a tensor of indices.
        """
        try:
            return self._input(x[indices])
        except (TypeError, KeyError, IndexError) as error:
            raise ArgumentError("x", type(x).__name__, _INPUTS, f"It raised: {error}") from error

    @contextmanager
    def _evaluating(self, point: Point, seed: int) -> Iterator[None]:
        with point.at(seed), nullcontext() if self._watched else point.learning_writes():
            yield
        self._watched = True

    def _point(self) -> Point:
        """Returns the present parameters, low precision as float32 copies."""
        space = self.parameters
        own = space.tensors
        surroundings = Surroundings(self.model, None, space.device)
        return Point(
            own,
            surroundings,
            in_place=False,
            written=self._written,
            layout=space.layout,
            keep_gathered=self._keeps_gathered(),
        )

    def _keeps_gathered(self) -> bool:
        """Whether the parameters of a sharded model may stay gathered for backward passes."""
        if self.parameters.layout is None:
            return False
        ranks, needed = self.parameters.ranks, size_gathered(self.model)
        return not ranks.any(lambda: needed > may_be_kept(self.parameters.device, ranks.size))

    def _logits(self, part: _Part) -> Tensor:
        """Returns ``model(x)``.

        Raises:
            ArgumentError: it is of another form than ``(N, C)``.
        """
        logits = self.model(part.x)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            remedy = "Wrap the model in a module that returns its logits."
            raise ArgumentError("the model's output", found, "a tensor of real logits", remedy)
        shape = (len(part.y), self.num_classes)
        if logits.shape != shape:
            allowed = f"{shape}, a logit of each of num_classes={self.num_classes} classes"
            raise ArgumentError("the shape of the logits", tuple(logits.shape), allowed)
        return whole(logits)

    def _gradients(
        self, scores: Tensor, present: list[int], leaves: Sequence[Tensor]
    ) -> Iterator[tuple[int, PerParameter]]:
        """Yields each class that is present, and the gradient of its score."""
        if not scores.requires_grad:
            return
        options: Any = {"retain_graph": len(present) > 1, "allow_unused": True}
        rows = torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
        batched = None
        # What ranks do together has no batched form.
        looped = self.parameters.layout is not None or scores.device.type in _LOOPED
        if len(present) > 1 and not looped:
            with suppress(RuntimeError), warnings.catch_warnings():
                # Where an operation has no batched form, torch loops over the classes itself.
                warnings.filterwarnings("ignore", "There is a performance drop")
                batched = torch.autograd.grad(
                    scores, leaves, rows[present], is_grads_batched=True, **options
                )
        for j, k in enumerate(present):
            if batched is None:  # or vmap cannot transform the model
                yield k, torch.autograd.grad(scores, leaves, rows[k], **options)
            else:
                yield k, [None if slope is None else slope[j] for slope in batched]


class _Joint(NamedTuple):
    """What the ranks have to know of a minibatch.

    Attributes:
        counts: how many examples each class has on all of them.
        coupled: whether it goes through the model as a whole.
        seed: of its dropout masks.
    """

    counts: Tensor
    coupled: bool
    seed: int


class _Part(NamedTuple):
    """Some of a minibatch.

    Attributes:
        number: tells its dropout masks from those of others.
        x: the inputs.
        y: their classes.
        classes: whose gradients are taken of it.
        idle: whether it stands in for examples that this rank does not have, and counts nothing.
    """

    number: int
    x: Any
    y: Tensor
    classes: list[int]
    idle: bool


def _are_coupled(model: nn.Module) -> bool:
    """Whether a batch norm layer uses the statistics of the batch."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return any(m.training or m.running_mean is None for m in norms)


def _spread(logits: Tensor, y: Tensor) -> Tensor:
    """Returns ``p (1 − p)`` of each example's own class, ``(N,)``, float64; NaN for a bad logit.

    It is computed from how far the logit is above the others: where p is near 1 it is rounded to
    1, and ``1 − p`` would be 0.
    """
    logits = logits.double()
    own = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(dim=1)
    margin = own - others
    spread = margin.sigmoid() * (-margin).sigmoid()
    return torch.where(own.isfinite() & (others < torch.inf), spread, torch.nan)
