"""``ClassGradientSubspace``: a curvature of rank C from the gradients of the classes' logits."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from subspace_optim._display import Shown, number, numbers
from subspace_optim._validation import ArgumentError, check_integer, check_number
from subspace_optim.curvature.contexts import full_precision, random_state_kept
from subspace_optim.curvature.digests import digest
from subspace_optim.curvature.dtensors import is_sharded
from subspace_optim.curvature.fully_sharded import reshard
from subspace_optim.curvature.logit_gradients import LogitGradients
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import unwrapped
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.curvature.process_group import Ranks, taking_part
from subspace_optim.curvature.surroundings import ALONE
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.subspaces.checkpoints import VERSION, SavedState, checksum
from subspace_optim.subspaces.class_averages import (
    ENTRIES,
    ClassAverages,
    averaged,
    check_averages,
    loaded,
    saved,
)


@dataclass
class ClassGradientStats:
    """What the class gradients have cost so far.

    Attributes:
        observations: minibatches that were observed.
        seconds: time that it took.
    """

    observations: int = 0
    seconds: float = 0.0


class ClassGradientSubspace(Shown):
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

    A model that is sharded, by ``fully_shard`` or tensor parallel, needs no argument: each rank
    passes its own part of the minibatch, and vectors hold the coordinates that lie on it. All ranks
    go through the passes together, one for each class that any of them has.

    Args:
        model: called as ``model(x)``, which gives ``(N, C)`` logits. ``DistributedDataParallel``
            and ``torch.compile`` wrappers are taken off.
        num_classes: C.
        decay: γ of the averages, at least 0 and below 1.
        orthogonal: gives the eigenpairs of ``H`` instead of its terms: ``Σ_k v_k v_kᵀ`` as
            printed (eq. 14) is no projector, because class gradients are not orthogonal.
        params: the parameters to differentiate by: tensors, a pattern of names, or a predicate of
            (name, tensor) (default: all that require a gradient).
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
            self._ranks = taking_part(self._ranks, self.parameters.ranks)
        options = {"decay": decay, "orthogonal": orthogonal, "coupled": coupled}
        self._ranks.check_alike("Pass the same on each.", num_classes=num_classes, **options)
        self.decay = decay
        self.orthogonal = orthogonal
        self.coupled = coupled
        self.stats = ClassGradientStats()
        self._sums = LogitGradients(self.model, self.parameters, self.num_classes, coupled)
        self._averages: ClassAverages | None = None
        self._given: LowRankCurvature | EigenBasis | None = None

    def _facts(self) -> dict[str, str]:
        given, stats = self._given, self.stats
        facts = {"num_classes": str(self.num_classes), "decay": number(self.decay)}
        facts |= {"orthogonal": str(self.orthogonal), "observations": number(stats.observations)}
        if given is not None:
            facts["eigenvalues"] = numbers(given.eigenvalues)
        return facts | {"parameters": repr(self.parameters)}

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
        device = self.parameters.device
        with ALONE, full_precision(device, fused=True), random_state_kept(device, None):
            self._agree()
            with self._ranks.all_or_none():
                shape = (self._sums.size,)
                with self._ranks.found(shape, self.parameters.dtype, device) as sums:
                    self._sums.add_to(sums, x, y)
                parts = self._sums.split(sums)
                averages = averaged(
                    self._averages, *parts, decay=self.decay, inner=self.parameters.inner
                )
        self._given, self._averages = None, averages
        self.stats.observations += 1
        self.stats.seconds += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages, for ``torch.save``: a run that loads them goes on bit by bit.

        The tensors are copies, and of the same shapes whether anything was observed or not, so
        that ``torch.distributed.checkpoint`` can read into the state of a new subspace. Of a
        sharded model the vectors come as one tensor a parameter, sharded as that is.
        """
        entries = saved(self._averages, self.num_classes, self.parameters)
        return {"version": VERSION, **entries, "stats": asdict(self.stats)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the averages of ``state_dict``, on the model's device.

        All of them, or none: a state of another model, number of classes or version, an entry that
        is missing or cannot be, and one that was changed raise an ``ArgumentError`` that names it.

        Args:
            state_dict: what ``state_dict()`` returned.
        """
        with self.parameters.ranks.all_or_none():
            names = {"version", "observed", *ENTRIES, "checksum", "stats"}
            state = SavedState(state_dict, names, "Pass what `subspace.state_dict()` returned.")
            observed = state.flag("observed")
            averages = loaded(state, self.num_classes, self.parameters)
            costs = state.inside("stats", ["observations", "seconds"])
            seconds = costs.number("seconds", minimum=0)
            stats = ClassGradientStats(costs.count("observations"), seconds)
            if observed:
                check_averages(averages, stats.observations, state.dtype("vectors"))
            state.check_sum(checksum({name: state_dict[name] for name in ("observed", *ENTRIES)}))

        self._given = None
        self._averages = averages if observed else None
        self.stats = stats

    def _agree(self) -> None:
        """Sees to it that all ranks have the same parameters and averages.

        Those that are sharded differ, and torch keeps the copies of their shards equal: these do
        not count.

        Raises:
            ArgumentError: they differ.
        """
        if self._ranks.group is None:
            return
        if self.parameters.layout is not None:
            reshard(self.model)  # after a forward pass some are whole
        known = self._averages
        history = 0 if known is None else int(digest([known.norms, known.squares, known.updates]))
        theta = int(digest(p for p in self.model.parameters() if not is_sharded(p)))
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
