"""``Rows``: what measures tell of a step, put together into a row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.diagnostics.measures.base import Measure, Row, Training
from subspace_optim.diagnostics.measures.step import Step

Measures = Measure | Iterable["Measures"]
COSTS = {
    "gradients": "full_gradients",
    "products": "full_products",
    "forwards": "full_forwards",
}
"""The columns of a row's cost, and what of ``OperatorStats`` they count."""


def attached(measures: Measures, training: Training) -> list[Measure]:
    """Returns copies of the measures, attached to a training; one that is there twice counts once.

    Raises:
        ArgumentError: there is none, one is no measure, or two of them have a column of one name.
    """
    chosen = {measure.key: measure for measure in reversed(flat_measures(measures))}
    if not chosen:
        raise ArgumentError("measures", "empty", "at least one measure")
    owner: dict[str, Measure] = {"step": Measure()} | dict.fromkeys(COSTS, Measure())
    copies = []
    for measure in reversed(chosen.values()):
        own = copy.copy(measure)
        own.attach(training)
        for column in own.columns:
            if column in owner:
                names = f"{type(owner[column]).__name__} and {type(own).__name__}"
                found = f"{names}, both with a column '{column}'"
                raise ArgumentError("measures", found, "measures of different columns")
            owner[column] = own
        copies.append(own)
    return copies


def flat_measures(measures: Any) -> list[Measure]:
    """Returns all measures of a measure, or of lists within lists of them.

    Raises:
        ArgumentError: one is no measure.
    """
    if isinstance(measures, Measure):
        return [measures]
    if isinstance(measures, Iterable) and not isinstance(measures, str | Mapping):
        return [measure for each in measures for measure in flat_measures(each)]
    remedy = "Call the function: measures.stability()." if callable(measures) else ""
    allowed = "a measure of subspace_optim.measures, or a list of them"
    raise ArgumentError("measures", getattr(measures, "__name__", measures), allowed, remedy)


class Rows:
    """Asks measures for what they know, before and after a step, and counts what it takes.

    A measure that raises is NaN in that row, and the others are not.

    Args:
        measures: attached ones.
        operator: whose work is counted, if there is one.

    Attributes:
        failed: of the present row, the columns of measures that have raised, and what.
    """

    def __init__(self, measures: Sequence[Measure], operator: CurvatureOperator | None) -> None:
        self._measures, self._operator = measures, operator
        self.failed: dict[str, str] = {}

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        own = [column for measure in self._measures for column in measure.columns]
        return ["step", *own, *COSTS]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the rows depend on."""
        return tuple(measure.key for measure in self._measures)

    @property
    def lists(self) -> dict[str, int]:
        """Of the columns with lists, how long these are."""
        return {column: n for measure in self._measures for column, n in measure.lists.items()}

    def before(self, step: Step) -> dict[str, Any]:
        """Returns what is known before the step."""
        self.failed = {}
        return self._asked(lambda measure: measure.before(step))

    def after(self, step: Step, known: Row) -> dict[str, Any]:
        """Returns the row, with what is known of it from before the step."""
        found = self._asked(lambda measure: measure.after(step))
        costs = {c: known[c] + found[c] for c in COSTS if c in found}
        lists = self.lists
        unknown = {c: [math.nan] * lists[c] if c in lists else math.nan for c in self.failed}
        return {**known, **found, **costs, **unknown}

    @torch.no_grad()
    def _asked(self, ask: Callable[[Measure], Row]) -> dict[str, Any]:
        operator = self._operator
        spent = None if operator is None else replace(operator.stats)
        row: dict[str, Any] = {}
        refined: dict[str, Any] = {}  # last, in whichever order the measures are
        for measure in self._measures:
            if self.failed.keys() & set(measure.columns):
                continue
            try:
                found = _checked(measure, ask(measure))
            except Exception as error:  # noqa: BLE001 (the others may be known all the same)
                reason = f"{error} ({type(error).__name__})"
                self.failed |= dict.fromkeys(measure.columns, reason)
                if operator is not None:
                    with suppress(Exception):
                        operator.release()
                continue
            row |= {c: value for c, value in found.items() if c in measure.columns}
            refined |= {c: value for c, value in found.items() if c not in measure.columns}
        row = _numbers({c: value for c, value in (row | refined).items() if c in self.columns})
        if operator is not None and spent is not None:
            for column, count in COSTS.items():
                row[column] = getattr(operator.stats, count) - getattr(spent, count)
        return row

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the columns and the state of each measure."""
        return [
            {"columns": list(measure.columns), "state": measure.state_dict()}
            for measure in self._measures
        ]

    def loaded(self, states: Sequence[dict[str, Any]]) -> Rows:
        """Returns rows of the same measures with other states; these here stay as they are.

        Raises:
            ArgumentError: the states are of other measures.
        """
        own = [list(measure.columns) for measure in self._measures]
        if [each["columns"] for each in states] != own:
            found = f"of measures with columns {[each['columns'] for each in states]}"
            remedy = "Give the monitor the measures of the run that is taken up."
            raise ArgumentError("the loaded state", found, f"of {own}", remedy)
        measures = [copy.copy(measure) for measure in self._measures]
        for measure, each in zip(measures, states, strict=True):
            measure.load_state_dict(each["state"])
        return Rows(measures, self._operator)


def _checked(measure: Measure, found: Row) -> Row:
    """Returns what a measure has found.

    Raises:
        ArgumentError: it has columns that are not its own.
    """
    unknown = found.keys() - {*measure.columns, *measure.refines}
    if unknown:
        named = ", ".join(sorted(unknown))
        allowed = f"its columns: {', '.join(measure.columns)}"
        raise ArgumentError(f"what {type(measure).__name__} returns", named, allowed)
    return found


def _numbers(row: Row) -> dict[str, Any]:
    """Returns a row with numbers in the place of scalar tensors, by one synchronisation."""
    found = {c: value.flatten().double() for c, value in row.items() if isinstance(value, Tensor)}
    if not found:
        return dict(row)
    values = torch.cat(list(found.values())).tolist()
    numbers: dict[str, Any] = {}
    for column, value in found.items():
        own, values = values[: len(value)], values[len(value) :]
        numbers[column] = own if row[column].dim() else own[0]
    return {**row, **numbers}
