"""``ClassGradientSubspace``: a curvature of rank C from the gradients of the classes' logits."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from subspace_optim._validation import (
    ArgumentError,
    NonFiniteError,
    check_integer,
    check_number,
)
from subspace_optim.curvature.checkpoints import VERSION, SavedState, checksum
from subspace_optim.curvature.contexts import full_precision, random_state_kept
from subspace_optim.curvature.evaluation import PerParameter, Point
from subspace_optim.curvature.objective import unwrapped
from subspace_optim.curvature.parameters import LOW_PRECISION, ParameterSpace, Params, digest
from subspace_optim.curvature.process_group import Ranks
from subspace_optim.curvature.second_derivatives import refuse_reentrant_checkpoints
from subspace_optim.curvature.surroundings import ALONE, Surroundings
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.low_rank import LowRankCurvature

# Where C backward passes are faster than one that is batched. Measured on CPU, C = 10, batches of
# 500: 52 against 63 ms for an MLP, 2.1 against 4.5 s for a CNN, whose convolutions become grouped.
_LOOPED = ("cpu",)
_SAFE = 1e-12
"""Norms of which the squares are far from the ends of float32."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass
class ClassGradientStats:
    """What the class gradients have cost so far.

    Attributes:
        observations: minibatches that were observed.
        seconds: time that it took.
    """

    observations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Averages:
    """What is known of the classes; an observation makes another one, and changes none.

    Attributes:
        vectors: ``(C, P)``, ``v_k = c_k / |c_k|``, zero where ``c_k`` is.
        norms: ``(C,)``, ``|c_k|``, float64.
        squares: ``(C,)``, ``λ_k²``, float64: it has twice the exponents of ``λ_k``.
        updates: ``(C,)``, the observations that each class had a part in.
    """

    vectors: Tensor
    norms: Tensor
    squares: Tensor
    updates: Tensor

    def curvature(self) -> LowRankCurvature:
        """Returns eq. 11; λ = 1 for a class that was never seen."""
        values = torch.where(self.updates > 0, self.squares.sqrt(), 1.0)
        return LowRankCurvature(values.to(self.vectors.dtype), self.vectors)


class ClassGradientSubspace:
    r"""A curvature of rank C, made of gradients of logits instead of eigenvectors.

    .. math::
        H = \sum_{k=1}^C \lambda_k v_k v_k^\top, \quad v_k = c_k / |c_k|, \qquad
        c_k^B = \frac{1}{|B_k|} \sum_{\mu \in B_k} \nabla z_k^\mu, \quad
        \lambda_k^B = \frac{1}{|B|} \sum_{\mu \in B_k} p_k^\mu (1 - p_k^\mu) \, |c_k^B|^2

    (`class_gradient_2020`, eqs. 8, 11, 12.) ``B_k`` are the examples of class k in a minibatch
    ``B``, ``z_k`` is the logit of the class and ``p_k`` its probability. ``c_k`` is the moving
    average of ``c_k^B``, and ``λ_k`` the moving root mean square of ``λ_k^B`` (eqs. 16 and 17,
    γ = ``decay``), over the t minibatches in which class k occurred:

    .. math::
        c_k = \frac{1 - \gamma}{1 - \gamma^t} \sum_{i=1}^t \gamma^{t-i} c_k^{B_i}, \qquad
        \lambda_k^2 = \frac{1 - \gamma}{1 - \gamma^t} \sum_{i=1}^t \gamma^{t-i}
        (\lambda_k^{B_i})^2

    A class that is absent from a minibatch keeps its averages, and one that was never seen has
    v = 0 and λ = 1. ``observe(x, y)`` in the training loop, before ``optimizer.step()``, feeds it
    a minibatch at the present parameters; it knows no other data, and never refreshes by itself.

    The gradient of class k's logit needs class k's examples only: there is one forward and
    backward pass for each class, over its own examples, and all of them together cost about one
    pass over the minibatch. Where examples are coupled, as by batch norm that uses the statistics
    of the batch, the minibatch goes through the model as a whole, and then C times backward: one
    batched pass where that is faster, which it is not on CPU.

    The model is used in its present mode, outside of autocast, with dropout masks drawn from the
    present random state; random state, buffers and gradients are left as found. bf16 and fp16
    models are differentiated through float32 copies. Two times C vectors of P numbers are held
    while a minibatch is observed, C of them otherwise, and C more for ``orthogonal=True``.

    With ``process_group`` each rank observes its own part of the minibatch, at the same time, and
    the sums are over all parts, bit by bit the same on every rank. The parameters have to be
    equal. Statistics of batch norm are those of each rank.

    Args:
        model: called as ``model(x)``, which gives ``(N, C)`` logits. ``DistributedDataParallel``
            and ``torch.compile`` wrappers are taken off.
        num_classes: C.
        decay: γ of the averages, at least 0 and below 1.
        orthogonal: gives the eigenpairs of ``H`` instead of its terms: ``Σ_k v_k v_kᵀ`` as
            printed (eq. 14) is no projector, because class gradients are not orthogonal.
        params: the parameters to differentiate by (default: all that require a gradient).
        coupled: whether an example's logits depend on the other examples (default: whether there
            is a batch norm layer that uses batch statistics).
        process_group: sums over its ranks, each with its own minibatches (default: none).

    Attributes:
        model: without its wrappers.
        parameters: the coordinates of the vectors.
        num_classes: as given.
        decay: as given.
        orthogonal: as given.
        coupled: as given.
        stats: what it has cost.

    Raises:
        ArgumentError: an argument that cannot be used; the message names the way out.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        decay: float = 0.9,
        orthogonal: bool = False,
        params: Params = None,
        coupled: bool | None = None,
        process_group: Any = None,
    ) -> None:
        self._ranks = Ranks(process_group)
        with self._ranks.all_or_none():
            if not isinstance(model, nn.Module):
                raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
            check_number("decay", decay)
            if decay >= 1:
                remedy = "It is the share of an average that the next minibatch leaves."
                raise ArgumentError("decay", decay, "at least 0 and below 1", remedy)
            if not isinstance(orthogonal, bool):
                raise ArgumentError("orthogonal", orthogonal, "True or False")
            if coupled not in (None, True, False):
                raise ArgumentError("coupled", coupled, "True, False or None")
            self.num_classes = check_integer("num_classes", num_classes, minimum=2)
            self.model = unwrapped(model)
            self.parameters = ParameterSpace(self.model, params)
        self.decay = decay
        self.orthogonal = orthogonal
        self.coupled = coupled
        self.stats = ClassGradientStats()
        self._written: list[Tensor] = []  # what the forward pass writes to, beside buffers
        self._watched = False
        self._averages: _Averages | None = None
        self._given: LowRankCurvature | EigenBasis | None = None

    def update(self) -> LowRankCurvature | EigenBasis:
        """Returns ``Σ λ_k v_k v_kᵀ`` of the minibatches observed, or with ``orthogonal`` its pairs.

        It is computed once for each observation.

        Raises:
            ArgumentError: nothing has been observed.
        """
        if self._averages is None:
            remedy = "Call `subspace.observe(x, y)` in the loop before `optimizer.step()`."
            raise ArgumentError("the number of minibatches observed", 0, "at least 1", remedy)
        if self._given is None:
            curvature = self._averages.curvature()
            self._given = curvature.orthogonalised() if self.orthogonal else curvature
        return self._given

    def observe(self, x: Any, y: Tensor) -> None:
        """Adds a minibatch, at the present parameters, to the averages.

        Args:
            x: N inputs: a tensor, or what gives some of them as ``x[indices]``.
            y: ``(N,)``, the classes, integers from 0 to C - 1.

        ``ArgumentError`` for an argument, or an output of the model, that cannot be used, and
        ``NonFiniteError`` for a logit or gradient that is not finite: neither changes anything.
        """
        start = time.perf_counter()
        device, C, P = self.parameters.device, self.num_classes, self.parameters.size
        with ALONE, full_precision(device, fused=True), random_state_kept(device, None):
            self._agree()
            with self._ranks.all_or_none():
                shape = (C * (P + 2),)
                with self._ranks.summed(shape, self.parameters.dtype, device) as sums:
                    self._add_to(sums, x, y)
                averages = self._averaged(*self._split(sums))
        self._given, self._averages = None, averages
        self.stats.observations += 1
        self.stats.seconds += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages, for ``torch.save``: a run that loads them goes on bit by bit.

        The tensors are copies, and of the same shapes whether anything was observed or not, so
        that ``torch.distributed.checkpoint`` can read into the state of a new subspace.
        """
        device, averages = self.parameters.device, self._averages
        entries: dict[str, Any] = {"observed": averages is not None}
        for name, (shape, dtype) in self._kinds().items():
            entries[name] = (
                torch.zeros(shape, dtype=dtype, device=device)
                if averages is None
                else getattr(averages, name).clone()
            )
        entries["checksum"] = checksum(entries)
        return {"version": VERSION, **entries, "stats": asdict(self.stats)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the averages of ``state_dict``, on the model's device.

        All of them, or none: a state of another model, number of classes or version, an entry that
        is missing or cannot be, and one that was changed raise an ``ArgumentError`` that names it.

        Args:
            state_dict: what ``state_dict()`` returned.
        """
        kinds = self._kinds()
        names = {"version", "observed", *kinds, "checksum", "stats"}
        state = SavedState(state_dict, names, "Pass what `subspace.state_dict()` returned.")
        observed, remedy = state.flag("observed"), "The state is of another model or num_classes."
        loaded = _Averages(
            **{
                name: state.tensor(
                    name,
                    shape,
                    dtype,
                    self.parameters.device,
                    minimum=None if name == "vectors" else 0,
                    remedy=remedy,
                )
                for name, (shape, dtype) in kinds.items()
            }
        )
        costs = state.inside("stats", ["observations", "seconds"])
        stats = ClassGradientStats(costs.count("observations"), costs.number("seconds", minimum=0))
        if observed:
            _check_averages(loaded, stats.observations, state_dict["vectors"].dtype)
        state.check_sum(checksum({name: state_dict[name] for name in ("observed", *kinds)}))

        self._given = None
        self._averages = loaded if observed else None
        self.stats = stats

    def _kinds(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shapes and dtypes of the averages."""
        C = self.num_classes
        return {
            "vectors": ((C, self.parameters.size), self.parameters.dtype),
            "norms": ((C,), torch.float64),
            "squares": ((C,), torch.float64),
            "updates": ((C,), torch.int64),
        }

    def _agree(self) -> None:
        """Sees to it that all ranks have the same parameters and averages.

        Raises:
            ArgumentError: they differ.
        """
        if self._ranks.group is None:
            return
        known = self._averages
        history = 0 if known is None else int(digest([known.norms, known.squares, known.updates]))
        theta = int(digest(self.model.parameters()))
        device = self.parameters.device
        for same, name, remedy in zip(
            self._ranks.agree([theta, history], device),
            ("parameters", "averages"),
            ("Broadcast them from one rank.", "Load one state_dict, and observe, on all ranks."),
            strict=True,
        ):
            if not same:
                found, allowed = f"ranks whose {name} differ", f"ranks of equal {name}"
                raise ArgumentError("process_group", found, allowed, remedy)

    # --- the sums over a minibatch --------------------------------------------------------------

    def _split(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views one vector as ``Σ ∇z_k: (C, P)``, ``Σ p_k (1 − p_k): (C,)`` and ``|B_k|: (C,)``."""
        C = self.num_classes
        spreads, counts = sums[-2 * C :].view(2, C)
        return sums[: -2 * C].view(C, -1), spreads, counts

    def _add_to(self, sums: Tensor, x: Any, y: Tensor) -> None:
        """Adds this rank's part of a minibatch to zeros."""
        gradients, spreads, counts = self._split(sums)
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
                for view, slope in zip(
                    self.parameters.unflatten(gradients[k]), slopes, strict=True
                ):
                    if slope is not None:
                        view.copy_(slope)

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
            allowed = "a tensor, or what takes a tensor of indices: x[indices]"
            remedy = "Stack the inputs in a tensor, or wrap them in a class with __getitem__."
            raise ArgumentError("x", type(x).__name__, allowed, remedy)
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
            allowed = "a tensor, or what takes a tensor of indices: x[indices]"
            raise ArgumentError("x", type(x).__name__, allowed, f"It raised: {error}") from error

    @contextmanager
    def _evaluating(self, point: Point, seed: int) -> Iterator[None]:
        with point.at(seed):
            if self._watched:
                yield
                return
            with point.learning_writes():
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

    # --- averages -------------------------------------------------------------------------------

    def _averaged(self, gradients: Tensor, spreads: Tensor, counts: Tensor) -> _Averages:
        """Returns the averages with a minibatch more, in the memory of its gradients.

        The share of a class's t-th minibatch is ``(1 − γ) / (1 − γᵗ)``, and the old average
        keeps the rest: the sums of eqs. 16 and 17, normalised at every step.

        Args:
            gradients: ``(C, P)``, ``Σ ∇z_k`` over the examples of class k; overwritten.
            spreads: ``(C,)``, ``Σ p_k (1 − p_k)`` over them.
            counts: ``(C,)``, how many they are.

        Raises:
            NonFiniteError: something is not finite.
        """
        counts, spreads, old = counts.double(), spreads.double(), self._averages
        seen, scale = counts > 0, 1 / counts.clamp(min=1)
        values = spreads / counts.sum() * (_row_norms(gradients) * scale).square()
        if not bool(values.isfinite().all()):
            message = (
                "A logit or a gradient of a class is not finite; the minibatch was not added to "
                "the averages. Lower the learning rate, or look for NaN in parameters and data."
            )
            raise NonFiniteError(message)
        updates = seen.long() if old is None else old.updates.to(seen.device) + seen
        rate = torch.where(seen, (1 - self.decay) / (1 - self.decay ** updates.double()), 0.0)
        gradients.mul_((rate * scale).to(gradients.dtype)[:, None])
        squares = rate * values.square()
        known = torch.zeros_like(scale)
        if old is not None:
            known = old.norms.to(rate.device)
            # What is absent keeps its unit vector, with no rounding.
            share = torch.where(seen, (1 - rate) * known, 1.0).to(gradients.dtype)
            gradients.addcmul_(old.vectors.to(gradients), share[:, None])
            squares += (1 - rate) * old.squares.to(rate.device)
        norms = _row_norms(gradients)
        smallest = torch.finfo(gradients.dtype).tiny
        inverse = torch.where(norms > smallest, 1 / norms, 0.0)
        inverse = torch.where(seen, inverse, 1.0).to(gradients.dtype)
        gradients.mul_(inverse[:, None])
        return _Averages(gradients, torch.where(seen, norms, known), squares, updates)


def _check_averages(averages: _Averages, observations: int, saved: torch.dtype) -> None:
    """Checks what all averages have in common.

    Raises:
        ArgumentError: a vector is neither of norm 1 nor 0, or a class was seen more often than
            there were minibatches, or has averages and was never seen.
    """
    vectors, updates = averages.vectors, averages.updates
    most = int(updates.max())
    if most > observations:
        allowed = f"at most the minibatches observed, {observations}"
        raise ArgumentError("the largest of the loaded updates", most, allowed)
    norms = _row_norms(vectors)
    accuracy = max(torch.finfo(dtype).eps for dtype in (saved, vectors.dtype))
    off = ((norms - 1).abs() > min(0.01, 8 * vectors.shape[1] ** 0.5 * accuracy)) & (norms != 0)
    for k in off.nonzero().flatten().tolist():
        raise ArgumentError(f"the norm of the loaded vectors[{k}]", float(norms[k]), "1, or 0")
    strange = (updates == 0) & ((norms > 0) | (averages.norms > 0) | (averages.squares > 0))
    for k in strange.nonzero().flatten().tolist():
        allowed = "at least 1, as it has averages"
        raise ArgumentError(f"the loaded updates[{k}]", 0, allowed)


def _are_coupled(model: nn.Module) -> bool:
    """Whether a batch norm layer uses the statistics of the batch."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return any(m.training or m.running_mean is None for m in norms)


def _spread(logits: Tensor, y: Tensor) -> Tensor:
    """Returns ``p (1 − p)`` of each example's own class, ``(N,)``, float64; NaN for no logit.

    From the difference to the other logits: ``1 − p`` of a rounded p would be 0 where p is near 1.
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


def _row_norms(rows: Tensor) -> Tensor:
    """Returns the norms of the rows, float64: squares of small numbers do not vanish."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1).double()
    for i, norm in enumerate(norms.tolist()):
        if not _SAFE < norm < 1 / _SAFE:  # one row after another: torch makes a float64 copy of it
            norms[i] = torch.linalg.vector_norm(rows[i], dtype=torch.float64)
    return norms
