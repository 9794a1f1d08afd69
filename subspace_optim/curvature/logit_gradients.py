"""``LogitGradients``: the gradients of the classes' logits, summed over a minibatch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.evaluation import PerParameter, Point
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
        """The length of the sums."""
        return self.num_classes * (self.parameters.size + 2)

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
        y, found = self._checked(x, y)
        counts += torch.tensor(found, dtype=counts.dtype, device=counts.device)
        point = self._point()
        x = self._input(x)

        seen: list[tuple[Tensor, Tensor]] = []  # logits, and the classes

        def add(x: Any, y: Tensor, present: list[int]) -> None:
            logits = self._logits(x, len(y))
            if not seen:
                refuse_reentrant_checkpoints(logits)
            seen.append((logits.detach(), y))
            own = logits.gather(1, y[:, None])[:, 0]
            scores = own.new_zeros(len(spreads)).index_add(0, y, own)
            for k, slopes in _gradients(scores, present, point.leaves):
                gradients[k] = self.parameters.flatten(slopes)

        coupled = _are_coupled(self.model) if self.coupled is None else self.coupled
        seed = int(torch.randint(2**31, (), device="cpu"))  # masks follow the present random state
        present = [k for k, n in enumerate(found) if n]
        if coupled:
            with self._evaluating(point, seed):
                add(x, y, present)
        else:
            parts = y.argsort(stable=True).split(found)
            for k in present:  # the gradient of class k needs its examples only
                with self._evaluating(point, seed + k):
                    add(self._examples(x, parts[k]), y[parts[k]], [k])
        logits, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
        spreads.index_add_(0, y, _spread(logits, y).to(spreads.dtype))

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
        surroundings = Surroundings(self.model, None, self.parameters.device)
        return Point(self.parameters.tensors, surroundings, in_place=False, written=self._written)

    def _logits(self, x: Any, examples: int) -> Tensor:
        """Returns ``model(x)``.

        Raises:
            ArgumentError: it is of another form than ``(N, C)``.
        """
        logits = self.model(x)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            remedy = "Wrap the model in a module that returns its logits."
            raise ArgumentError("the model's output", found, "a tensor of real logits", remedy)
        shape = (examples, self.num_classes)
        if logits.shape != shape:
            allowed = f"{shape}, a logit of each of num_classes={self.num_classes} classes"
            raise ArgumentError("the shape of the logits", tuple(logits.shape), allowed)
        return logits


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


def _gradients(
    scores: Tensor, present: list[int], leaves: Sequence[Tensor]
) -> Iterator[tuple[int, PerParameter]]:
    """Yields each class that is present, and the gradient of its score."""
    if not scores.requires_grad:
        return
    options: Any = {"retain_graph": len(present) > 1, "allow_unused": True}
    rows = torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    batched = None
    if len(present) > 1 and scores.device.type not in _LOOPED:
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
