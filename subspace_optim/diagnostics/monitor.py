"""``Monitor``: reads where the updates of any optimizer go, through torch's step hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import torch.distributed as dist
from torch.optim import Optimizer

from subspace_optim._display import Shown, html_facts, html_rows, number
from subspace_optim._validation import ArgumentError, AttachedTwiceWarning, LogWarning
from subspace_optim.curvature.by_name import by_name, from_names
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.process_group import Ranks
from subspace_optim.diagnostics.given_gradient import GivenGradient
from subspace_optim.diagnostics.logs import check_folder, logs
from subspace_optim.diagnostics.measures import Step, Training, dominant, stability
from subspace_optim.diagnostics.rows import COSTS, Measures, Rows, attached
from subspace_optim.diagnostics.schedules import EveryShare, checked_schedule
from subspace_optim.diagnostics.table import Table
from subspace_optim.step_hooks import (
    JointSteps,
    StepCount,
    StepTeller,
    optimizers_of,
    owners_of,
)
from subspace_optim.subspaces import Subspace, check_subspace, operator_of

if TYPE_CHECKING:
    import pandas as pd

    from subspace_optim.diagnostics.plots.style import ThemeName

_LATEST: Final = 5
"""Rows that a notebook shows, the latest ones; to_frame() has all."""


class Monitor(Shown):
    r"""Records what ``measures`` tell of the steps of any optimizer, one row a recorded step.

    A row of step t tells of the update :math:`\theta_{t+1} - \theta_t` and of loss, gradient and
    Hessian at :math:`\theta_t`, over the data of the operator: all of them, a sample, or the
    ``CurrentBatch``. Its columns are those of the measures (``subspace_optim.measures``), between

    ============= ==================================================================================
    ``step``      t, counted from the attachment
    ``gradients`` what the row took: gradients over all data, one of them a forward and a backward
                  pass ...
    ``products``  ... curvature products, each a backward pass through the gradient's graph ...
    ``forwards``  ... and losses alone, each a forward pass; those over a sample count as its share
    ============= ==================================================================================

    What does not apply is NaN. The cost is of the row alone, with the refresh of a shared basis
    if the monitor was the first to ask for it.

    Training does not change by a bit: nothing is written to parameters, gradients, buffers or
    random states. A step that is not recorded costs a counter; steps with all rates zero, such as
    those with which checkpoints are prepared, are no steps. What cannot be measured, for a loss
    that is not finite or for want of memory, is NaN in the columns of its measure, with one
    warning: training goes on. Of a ``CurrentBatch`` there is one too, an ``OtherGradientWarning``,
    where the optimizer gets another gradient than that of the loss that is measured.

    Wrappers such as Accelerate's, Lightning's and Fabric's are followed to the optimizer inside; of
    an optimizer that steps another one, such as Lookahead, a row is of the whole displacement.

    Args:
        optimizer: any optimizer, wrapped or not, or a sequence of optimizers that step in turn:
            one row for one step of each. A monitor of the same rows that is attached already, as
            where a cell of a notebook is run again, is detached with a warning.
        source: a subspace to measure in, whose basis is refreshed as it is due, at most once for
            each parameter state, whether an optimizer or a monitor asks first; or an operator.
        measures: what is recorded: a measure, or a sequence of measures and of lists of them
            (default: ``measures.dominant()`` of a subspace, ``measures.stability()`` of an
            operator). The same one twice counts once.
        every: record one step in so many, or those at which ``every(step)`` is true; or
            ``every_share(0.05)``, as many as take that share of the time.
        log: where rows go as they come: a path that ends in .csv or .jsonl; TensorBoard's
            ``SummaryWriter``, ``wandb`` or a run of it, ``mlflow``, a logger of Lightning or of
            ``logging``, which get what is finite, as ``subspace/<column>`` at the row's step; or a
            callable that takes a row as a dict; or a sequence of these. A row is in its file
            before the next step, and outlives a kill. What a log does not take is a
            ``LogWarning``, never an end of the training. With a ``process_group`` files are
            written by rank 0.
        append: adds to files that are there already, of a run that is taken up again. A step that
            was recorded after the checkpoint is then in the file twice.

    Raises:
        ArgumentError: an argument is of the wrong type or out of range, an optimizer is of
            another model, or a file cannot be written or is there already.
    """

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer],
        source: Subspace | CurvatureOperator,
        *,
        measures: Measures | None = None,
        every: int | Callable[[int], bool] = 1,
        log: Any = None,
        append: bool = False,
    ) -> None:
        subspace: Subspace | None = None
        operator: CurvatureOperator | None
        if isinstance(source, CurvatureOperator):
            operator = source
        else:
            check_subspace(source, projects=True, name="source")
            subspace, operator = source, operator_of(source)
        space = source.parameters
        optimizers = optimizers_of(optimizer, space)
        self.every = every = checked_schedule(every)
        self.source = source
        self._training = Training(
            space,
            optimizers,
            subspace,
            operator,
            start=space.flatten(space.tensors),
        )
        if measures is None:
            measures = stability() if subspace is None else dominant()
        self._rows = Rows(attached(measures, self._training), self._training.operator)
        self._table = Table(self._rows.columns, self._rows.lists)
        self._steps = 0
        count = getattr(source, "steps", None)
        self._teller = StepTeller(
            count if isinstance(count, StepCount) else None,
            [each.optimizer for each in optimizers],
        )
        self._step: Step | None = None  # that is being taken, if it is recorded
        self._row: dict[str, Any] = {}  # what is known of it
        self._unmeasured: dict[str, Any] | None = None  # the row, if that is not to be had
        self._failing = False
        self._holds = False  # the operator's batch, until the step has ended
        self._given = GivenGradient(self._training)
        self._logs = logs(log, self._table.names, append=append, files=self._writes_files())
        twins = [each for each in owners_of(optimizers, Monitor) if each.kind == self.kind]
        for twin in twins:
            twin.detach()
        # Last: a projection that was attached later must have been applied.
        self._spending: Callable[[], AbstractContextManager[object]] = nullcontext
        if isinstance(every, EveryShare):
            ranks = Ranks(None) if operator is None else operator.ranks
            every.attach(ranks, space.device)
            self._spending = every.spending
        self._joint = JointSteps(
            optimizers,
            space,
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
        """What the rows depend on."""
        optimizers = frozenset(map(id, self._training.optimizers))
        return optimizers, id(self.source), self.every, *self._rows.kind

    def detach(self) -> None:
        """Removes the monitor from its optimizers. The history stays."""
        self._joint.check()
        self._joint.finish()
        self._joint.remove()
        self._forget()
        for log in self._logs:
            log.flush()

    def _facts(self) -> dict[str, str]:
        optimizers = ", ".join(type(each).__name__ for each in self._training.optimizers)
        steps = self._table.history["step"]
        seen = f", steps {steps[0]:,} to {steps[-1]:,}" if steps else ""
        every = self.every if isinstance(self.every, int) else _name_of(self.every)
        facts = {
            "rows": f"{len(steps):,}{seen}",
            "every": str(every),
            "optimizer": optimizers,
            "source": repr(self.source),
        }
        if steps:
            latest = self._table.latest(1)[0]
            values = (f"{column} {number(value)}" for column, value in latest.items())
            return facts | {"latest": "; ".join(values)}
        return facts | {"columns": ", ".join(self._table.names)}

    def _repr_html_(self) -> str:
        facts = {name: text for name, text in self._facts().items() if name != "latest"}
        html = html_facts(type(self).__name__, facts)
        if self._table.history["step"]:
            html += html_rows(self._table.names, self._table.latest(_LATEST))
        return html

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _writes_files(self) -> bool:
        """Whether this process does: of the ranks, which have the same rows, one."""
        operator = self._training.operator
        if operator is not None:
            return operator.ranks.rank == 0
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def _begin(self) -> None:
        self._forget()
        if self._training.operator is not None:
            self._training.operator.step_begins()
            self._holds = True
        every, step = self.every, self._steps
        recorded = bool(every(step)) if callable(every) else step % every == 0
        self._joint.watchful = recorded
        try:
            self._teller.begin(looks=recorded)
            if not recorded:
                return
            with self._spending():
                self._row = self._table.unknown(self._steps)
                begun = Step(self._training, self._steps)
                self._given.note(closure=self._joint.closure)
                self._row |= self._rows.before(begun)
                self._step = begun
        except Exception as error:  # noqa: BLE001 (training is worth more than its record)
            row = self._failed(error)
            self._unmeasured = row if recorded else None

    def _end(self) -> None:
        row, step, known = self._unmeasured, self._step, self._row
        moved = None
        try:
            if step is not None:
                with self._spending():
                    step.end()
                    moved = step.moved
                    row = self._rows.after(step, known)
                    self._given.compare(step)
                self._tell_failures()
        except Exception as error:  # noqa: BLE001 (training is worth more than its record)
            row = self._failed(error)
        finally:  # the step has been taken, also where its row is interrupted
            self._teller.end(moved)
            self._steps += 1
            self._forget(taken=True)
        if row is not None:
            self._table.append(row)
            for log in self._logs:
                log(self._table.flat(row))

    def _forget(self, *, taken: bool = False) -> None:
        """Ends a step. Of one that raised there is no row, and its batch is still needed."""
        self._step = self._unmeasured = None
        self._row = {}
        self._given.forget()
        if self._holds and self._training.operator is not None:
            self._training.operator.step_ended(taken=taken)
        self._holds = False

    def _failed(self, error: Exception) -> dict[str, Any]:
        """Returns the row of what could not be measured."""
        if self._training.operator is not None:
            with suppress(Exception):
                self._training.operator.release()
        self._warn("The row", f"{error} ({type(error).__name__})")
        return self._table.unknown(self._steps)

    def _tell_failures(self) -> None:
        """Tells which measures of a row have raised."""
        failed = self._rows.failed
        if not failed:
            self._failing = False
            return
        reason, whole = next(iter(failed.values())), {"step", *failed, *COSTS}
        if whole == set(self._rows.columns):
            self._warn("The row", reason)
        else:
            self._warn("A part of the row", f"{reason} The part is: {', '.join(failed)}.")

    def _warn(self, what: str, reason: str) -> None:
        """Warns, once until all of a row is known again."""
        if not self._failing:
            self._failing = True
            message = f"{what} of step {self._steps} is NaN: {reason} Training goes on."
            warnings.warn(message, LogWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Returns history and counters, for ``torch.save``: a resumed run goes on with them."""
        return {
            "history": {column: list(values) for column, values in self.history.items()},
            "start": self._saved_start(),
            "steps": self._steps,
            "measures": self._rows.state_dict(),
        }

    def _saved_start(self) -> Any:
        """Returns where the run began: of a sharded model, one tensor a parameter."""
        space, start = self._training.parameters, self._training.start
        return start if space.layout is None else by_name(space, start)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the history and the counters of ``state_dict``.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ArgumentError: it is of another model, of other measures, or no monitor's. Nothing has
                changed then.
        """
        missing = {"history", "start", "steps", "measures"} - state_dict.keys()
        missing |= self._table.history.keys() - state_dict.get("history", {}).keys()
        if missing:
            found = f"without {', '.join(sorted(missing))}"
            remedy = "Give the monitor the measures of the run that is taken up."
            allowed = "that of a monitor of the same measures"
            raise ArgumentError("the loaded state", found, allowed, remedy)
        start, own = state_dict["start"], self._training.start
        space = self._training.parameters
        if space.layout is not None:
            start = from_names(space, start, (), "the loaded start")
        if start.shape != own.shape:
            raise ArgumentError(
                "the loaded state", f"of {start.numel()} parameters", f"of {len(own)}"
            )
        rows = self._rows.loaded(state_dict["measures"])
        self._table.load(state_dict["history"])
        self._rows = rows
        self._joint.forget()
        self._training.start = start.to(own, copy=True)
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
        """Writes the history as a table, one row a recorded step.

        Args:
            path: of the file, which is overwritten where there is one.

        Raises:
            ArgumentError: it cannot be written.
        """
        self._joint.check()
        file = check_folder("path", path)
        try:
            self._table.to_csv(file)
        except OSError as error:
            found, allowed = f"{file} ({error.strerror})", "a file that can be written"
            raise ArgumentError("path", found, allowed, "Choose another.") from error

    def plot(self, path: str | Path | None = None, *, theme: ThemeName = "light") -> Any:
        """Draws the dashboard: a panel for each part of what was recorded.

        Args:
            path: where to write the picture; its ending chooses the format.
            theme: the colours, ``"light"`` or ``"dark"``.

        Returns:
            The matplotlib figure. A notebook shows it as the last line of a cell, or by
            ``display(monitor.plot())``. It is none of pyplot's, so ``plt.show()`` does not show it:
            in a script give a ``path``.

        ``ArgumentError`` where the folder of ``path`` is not there.
        """
        from subspace_optim.diagnostics.plots import dashboard  # noqa: PLC0415 (needs an extra)

        if path is not None:
            check_folder("path", path)
        figure = dashboard(self.history, theme=theme)
        if path is not None:
            figure.savefig(path)
        return figure


def _name_of(schedule: Any) -> str:
    """Returns what a schedule is called: functions have a name, others show themselves."""
    return getattr(schedule, "__name__", None) or repr(schedule)
