"""``Monitor``: reads where the updates of any optimizer go, through torch's step hooks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch.distributed as dist
from torch.optim import Optimizer

from subspace_optim._validation import (
    ArgumentError,
    AttachedTwiceWarning,
    LogWarning,
    check_integer,
)
from subspace_optim.diagnostics.logs import logs
from subspace_optim.diagnostics.measures.dominant import COLUMNS, Before, Dominant
from subspace_optim.diagnostics.table import Table
from subspace_optim.step_hooks import (
    JointSteps,
    StepCount,
    StepTeller,
    optimizers_of,
    owners_of,
)
from subspace_optim.subspaces import Subspace, check_subspace

if TYPE_CHECKING:
    import pandas as pd


class Monitor:
    r"""Records the diagnostics of any ``torch.optim.Optimizer``, one row a recorded step.

    A row of step t tells of the update :math:`\theta_{t+1} - \theta_t` and of loss, gradient and
    Hessian at :math:`\theta_t`, over the data of the subspace's operator, or a sample of them:

    ============================ ===================================================================
    ``step``                     t, counted from the attachment
    ``loss``                     ``L(θ_t)``
    ``gradient_norm``            ``‖∇L(θ_t)‖``
    ``update_norm``              ``‖θ_{t+1} − θ_t‖``
    ``chi_gradient``             χ_k of the gradient: the fraction in the dominant subspace
    ``chi_update``               χ_k of the update
    ``dom_lr``                   effective learning rate in the dominant subspace
                                 (`song_2024`, Def. 4)
    ``bulk_lr``                  the same in the bulk
    ``distance``                 ``‖θ_t − θ_0‖``, from the parameters at the attachment
    ``sharpness``                λ_1 of the last refresh; with ``next_k``, of θ_t
    ``eigenvalues``              λ_1 … λ_k, a list, of the same
    ``next_eigenvalues``         λ_{k+1} …, as many as ``next_k``
    ``gap``                      λ_k − λ_{k+1}; without ``next_k`` from the last refresh, which has
                                 λ_{k+1} from below
    ``threshold``                sharpness above which gradient descent with SGD's options diverges
                                 (``stability_threshold``): 2/η for plain steps
    ``sam_edge``                 the same of SAM, at this gradient
    ``adam_threshold``           the same of Adam, for ``preconditioned_sharpness``
    ``preconditioned_sharpness`` λ_1 of Adam's preconditioned Hessian, if it was asked for
    ``angle_estimate``           of the sine of the largest angle between the basis and the true
                                 subspace, with ``refresh="auto"``
    ``gradients``                what the row took: gradients over all data, one of them a forward
                                 and a backward pass ...
    ``products``                 ... and curvature products, each a backward pass through the
                                 gradient's graph; those over a sample count as its share
    ``examples``                 how many loss and gradient are of; NaN where nobody knows
    ``loss_error``               standard error of the loss; 0 where it is of all data
    ``gradient_norm_error``      the same of ``gradient_norm``
    ``chi_gradient_error``       the same of ``chi_gradient``
    ``dom_lr_error``             the same of ``dom_lr``
    ``bulk_lr_error``            the same of ``bulk_lr``
    ============================ ===================================================================

    What does not apply is NaN. The cost is of the row alone, with the refresh of a shared basis
    if the monitor was the first to ask for it.

    On a sample, squares are estimated without the noise that they hold (``diagnostics.sampled``):
    norm, χ_k and rates of a small gradient are not those of the noise. Where a square comes out as
    zero or less, what is made of it is NaN: the sample is too small to tell. The sample is of whole
    batches, 8 at least, or of rows where the data are one batch; it is drawn once, apart from that
    of the basis, and kept, with 16 gradients from the beginning of a recorded step to its end. A
    batch that cannot be divided, as where batch norm couples its examples, is measured whole. The
    eigenvalues are the basis's; ``next_k`` and ``preconditioned`` take all data.

    Any subspace with an orthonormal basis can be measured in. What is made of the update alone
    (``update_norm``, ``chi_update``, ``distance``), and the thresholds, are there for each. The
    other columns need more of the subspace than ``parameters`` and ``update()``, and without it
    they are NaN: an attribute ``operator`` for loss, gradient, effective rates and cost, with
    ``k`` beside it for the eigenvalues, ``gap``, and ``stats.estimate``. A ``FixedSubspace`` is
    given one by ``subspace.operator = hessian``.

    Training does not change by a bit: nothing is written to parameters, gradients, buffers or
    random states. A step that is not recorded costs a counter; steps with all rates zero, such as
    those with which checkpoints are prepared, are no steps. What cannot be measured, for a loss
    that is not finite or for want of memory, is a row of NaN and one warning: training goes on.

    Wrappers such as Accelerate's, Lightning's and Fabric's are followed to the optimizer inside; of
    an optimizer that steps another one, such as Lookahead, a row is of the whole displacement.

    Args:
        optimizer: any optimizer, wrapped or not, or a sequence of optimizers that step in turn:
            one row for one step of each. A monitor of the same rows that is attached already, as
            where a cell of a notebook is run again, is detached with a warning.
        subspace: the subspace to measure in; its basis is refreshed as it is due, at most once
            for each parameter state, whether an optimizer or a monitor asks first.
        every: record one step in so many, or those at which ``every(step)`` is true.
        next_k: further eigenvalues to record. They take a solve of their own at each row, for
            ``k + next_k`` pairs, which leaves the subspace's basis as it is.
        preconditioned: record ``preconditioned_sharpness``, a solve for one eigenvalue at each
            row, for Adam and AdamW.
        sample: of how many examples loss and gradient are: ``"auto"``, of as many as the basis is
            of, which are all without ``DominantSubspace(..., sample=...)``; n, of so many;
            ``None``, of all.
        log: where rows go as they come: a path that ends in .csv or .jsonl, an object with
            ``add_scalar`` such as TensorBoard's ``SummaryWriter``, or a callable that takes a row
            as a dict, such as ``wandb.log``; or a sequence of these. A row is in its file before
            the next step, and outlives a kill. What a log does not take is a ``LogWarning``,
            never an end of the training. With a ``process_group`` files are written by rank 0.
        append: adds to files that are there already, of a run that is taken up again. A step that
            was recorded after the checkpoint is then in the file twice.

    Raises:
        ArgumentError: an argument is of the wrong type or out of range, an optimizer is of
            another model, or a file cannot be written or is there already.
    """

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer],
        subspace: Subspace,
        *,
        every: int | Callable[[int], bool] = 1,
        next_k: int = 0,
        preconditioned: bool = False,
        sample: int | Literal["auto"] | None = "auto",
        log: Any = None,
        append: bool = False,
    ) -> None:
        check_subspace(subspace, projects=True)
        optimizers = optimizers_of(optimizer, subspace.parameters)
        if not callable(every):
            remedy = "Or a function of the step that tells whether it is recorded."
            every = check_integer("every", every, minimum=1, remedy=remedy)
        self.every = every
        self.subspace = subspace
        self._measure = Dominant(
            subspace, optimizers, next_k=next_k, preconditioned=preconditioned, sample=sample
        )
        self._options = next_k, preconditioned, sample
        self._table = Table(COLUMNS, self._measure.lists)
        self._steps = 0
        count = getattr(subspace, "steps", None)
        self._teller = StepTeller(
            count if isinstance(count, StepCount) else None,
            [each.optimizer for each in optimizers],
        )
        self._before: Before | None = None
        self._unmeasured: dict[str, Any] | None = None  # the row, if that is not to be had
        self._failing = False
        self._logs = logs(log, self._table.names, append=append, files=self._writes_files())
        twins = [each for each in owners_of(optimizers, Monitor) if each.kind == self.kind]
        for twin in twins:
            twin.detach()
        # Last: a projection that was attached later must have been applied.
        self._joint = JointSteps(
            optimizers,
            subspace.parameters,
            owner=self,
            begin=self._begin,
            end=self._end,
            undo=self._forget,
            last=True,
        )
        if twins:
            message = (
                "A monitor of the same rows was attached to the optimizer. It is detached, as by "
                "its detach(), and keeps its history; the new one takes its place."
            )
            warnings.warn(message, AttachedTwiceWarning, stacklevel=2)

    @property
    def history(self) -> dict[str, list[Any]]:
        """A list for each column, with an entry for each row."""
        self._joint.check()
        return self._table.history

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the rows depend on, beside the optimizer."""
        return id(self.subspace), self.every, *self._options

    def detach(self) -> None:
        """Removes the monitor from its optimizers. The history stays."""
        self._joint.check()
        self._joint.finish()
        self._joint.remove()
        self._before = None
        for log in self._logs:
            log.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _writes_files(self) -> bool:
        """Whether this process does: of the ranks, which have the same rows, one."""
        operator = self._measure.operator
        if operator is not None:
            return operator.ranks.rank == 0
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def _begin(self) -> None:
        self._forget()
        every, step = self.every, self._steps
        recorded = bool(every(step)) if callable(every) else step % every == 0
        self._joint.watchful = recorded
        try:
            self._teller.begin(looks=recorded)
            if recorded:
                self._before = self._measure.before()
        except Exception as error:  # noqa: BLE001 (training is worth more than its record)
            row = self._failed(error)
            self._unmeasured = row if recorded else None

    def _end(self) -> None:
        row, before = self._unmeasured, self._before
        self._forget()
        if before is not None:
            try:
                row = self._table.unknown(self._steps) | self._measure.after(before)
                self._failing = False
            except Exception as error:  # noqa: BLE001 (training is worth more than its record)
                row = self._failed(error)
        unknown = row is None or math.isnan(row["update_norm"])
        self._teller.end(None if row is None or unknown else row["update_norm"] != 0)
        self._steps += 1
        if row is not None:
            self._table.append(row)
            for log in self._logs:
                log(self._table.flat(row))

    def _forget(self) -> None:
        """Of a step that raised there is no row."""
        self._before = self._unmeasured = None

    def _failed(self, error: Exception) -> dict[str, Any]:
        """Returns the row of what could not be measured. One warning, until a row can be again."""
        if self._measure.operator is not None:
            with suppress(Exception):
                self._measure.operator.release()
        if not self._failing:
            self._failing = True
            kind = type(error).__name__
            message = f"The row of step {self._steps} is NaN: {error} ({kind}) Training goes on."
            warnings.warn(message, LogWarning, stacklevel=2)
        return self._table.unknown(self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Returns history and counters, for ``torch.save``: a resumed run goes on with them."""
        return {
            "history": {column: list(values) for column, values in self.history.items()},
            "start": self._measure.start,
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the history and the counters of ``state_dict``.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ArgumentError: it is of another model, or no monitor's.
        """
        missing = {"history", "start", "steps"} - state_dict.keys()
        missing |= self._table.history.keys() - state_dict.get("history", {}).keys()
        if missing:
            found = f"without {', '.join(sorted(missing))}"
            raise ArgumentError("the loaded state", found, "that of a monitor of this version")
        start, own = state_dict["start"], self._measure.start
        if start.shape != own.shape:
            raise ArgumentError(
                "the loaded state", f"of {start.numel()} parameters", f"of {len(own)}"
            )
        self._table.load(state_dict["history"])
        self._joint.forget()
        self._measure.start = start.to(own, copy=True)
        self._steps = state_dict["steps"]

    def rows(self) -> list[dict[str, Any]]:
        """Returns the history row by row, with a column for each eigenvalue."""
        self._joint.check()
        return self._table.rows()

    def to_frame(self) -> pd.DataFrame:
        """Returns the history as a ``pandas.DataFrame``, one row a recorded step.

        It needs pandas, of the extra ``plots``.
        """
        self._joint.check()
        return self._table.to_frame()

    def to_csv(self, path: str | Path) -> None:
        """Writes the history as a table, one row a recorded step."""
        self._joint.check()
        self._table.to_csv(path)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws the training dashboard: loss, sharpness, alignment, rates and distance.

        Args:
            path: where to write the picture; its ending chooses the format.

        Returns:
            The matplotlib figure.
        """
        from subspace_optim.diagnostics.plots import dashboard  # noqa: PLC0415 (needs an extra)

        figure = dashboard(self.history)
        if path is not None:
            figure.savefig(path)
        return figure
