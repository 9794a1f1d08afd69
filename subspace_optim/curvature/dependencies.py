"""What a curvature matrix depends on at present, as numbers that tell one state from another."""

from __future__ import annotations

from torch import Tensor

from subspace_optim.curvature.batches import Batches
from subspace_optim.curvature.digests import digest
from subspace_optim.curvature.objective import BatchLossFunction, Supervised
from subspace_optim.curvature.operator import State
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.curvature.proof import Proof
from subspace_optim.curvature.surroundings import Surroundings


class Dependencies:
    """The data, and all that the loss can reach but for what an evaluation itself changes.

    Args:
        space: the parameters that are differentiated by.
        batch_loss: the loss of a batch.
        batches: the data.
        proof: has learned what an evaluation changes.
    """

    def __init__(
        self, space: ParameterSpace, batch_loss: BatchLossFunction, batches: Batches, proof: Proof
    ) -> None:
        self._space, self._batch_loss = space, batch_loss
        self._batches, self._proof = batches, proof
        self._fingerprint, self._data_writes = batches.fingerprint(), 0

    def look(self) -> Surroundings:
        """Returns what model and loss reach now."""
        loss = self._batch_loss
        user = loss.loss_fn if isinstance(loss, Supervised) else loss
        return Surroundings(self._space.model, user, self._space.device)

    def state(self, surroundings: Surroundings) -> State:
        """Returns the numbers of ``CurvatureOperator.state``."""
        own, others = self._tensors(surroundings)
        numbers = surroundings.numbers(self._proof.moved_names)
        elsewhere = hash((int(digest(others)), numbers))
        modes = self._modes(surroundings)
        return State(*self._space.same_on_all(int(digest(own)), elsewhere, modes))

    def key(self, surroundings: Surroundings) -> object:
        """Returns a key that stays the same as long as known derivatives stay valid.

        One digest of all tensors synchronises the host once, and not twice as ``state`` does. The
        identity of the parameters counts too: equal ones in their places have graphs of their own.
        """
        own, others = self._tensors(surroundings)
        held = int(digest([*own, *others])), tuple(map(id, own))
        numbers = surroundings.numbers(self._proof.moved_names)
        return held, numbers, self._modes(surroundings), self._space.device

    def _tensors(self, surroundings: Surroundings) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the parameters, and the other tensors that the loss depends on."""
        own = self._space.tensors
        known = {id(t) for t in [*own, *self._proof.written]}
        found = [*surroundings.tensors(), *surroundings.plain_tensors()]
        return own, [t for t in found if id(t) not in known]

    def _modes(self, surroundings: Surroundings) -> int:
        """Returns a hash of the modules' modes, and of how often data may have been written."""
        fingerprint = self._batches.fingerprint()
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self._data_writes += 1
        return hash((surroundings.modes(), self._data_writes))
