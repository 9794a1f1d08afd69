"""The checks and the one form of their messages: name, value, what is allowed, the way out."""

from __future__ import annotations

import copy
import math
import pickle
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from subspace_optim._validation import (
    ArgumentError,
    ConvergenceWarning,
    DataChangedError,
    NonFiniteError,
    StaleBasisWarning,
    check_flag,
    check_integer,
    check_number,
)


def test_a_message_has_name_value_what_is_allowed_and_the_way_out() -> None:
    error = ArgumentError("k", 0, "an integer from 1 to 9", "The operator has 9 parameters.")
    assert str(error) == (
        "k is 0, but must be an integer from 1 to 9. The operator has 9 parameters."
    )
    assert str(ArgumentError("mode", "x", "'train'")) == "mode is 'x', but must be 'train'."
    assert error.args == ("k", 0, "an integer from 1 to 9", "The operator has 9 parameters.")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_argument_error_survives_pickle_and_copy(protocol: int) -> None:
    """As it does on its way back from a worker process."""
    error = ArgumentError("k", 0, "above 0", "Choose another.")
    for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.deepcopy(error)):
        assert type(twin) is ArgumentError
        assert (str(twin), twin.args) == (str(error), error.args)


@pytest.mark.parametrize(
    ("kind", "parent"),
    [
        (ArgumentError, ValueError),
        (DataChangedError, ValueError),
        (NonFiniteError, RuntimeError),
        (ConvergenceWarning, UserWarning),
        (StaleBasisWarning, UserWarning),
    ],
)
def test_errors_and_warnings_are_caught_as_their_builtin_kinds(
    kind: type[Exception], parent: type[Exception]
) -> None:
    """A refresh retries after a `RuntimeError` and never after a `ValueError`."""
    assert kind.__bases__ == (parent,)


@pytest.mark.parametrize("value", [1, 5, np.int64(3), np.uint8(2), torch.tensor(4)])
def test_integers_within_their_limits_are_returned_as_int(value: Any) -> None:
    number = check_integer("k", value, minimum=1, maximum=5)
    assert type(number) is int
    assert number == value


@pytest.mark.parametrize(
    "value",
    [0, 6, -1, True, False, 1.0, 2.5, "3", None, math.nan, [2], torch.tensor(1.0), np.int64(0)],
)
def test_what_is_no_integer_within_the_limits_is_refused(value: Any) -> None:
    message = re.escape("but must be an integer from 1 to 5. Way out.")
    with pytest.raises(ArgumentError, match=f"^k is .*{message}$") as caught:
        check_integer("k", value, minimum=1, maximum=5, remedy="Way out.")
    assert caught.value.__cause__ is None
    assert caught.value.args[0] == "k"


def test_without_a_maximum_an_integer_may_be_large() -> None:
    assert check_integer("refresh", 10**12, minimum=1) == 10**12
    with pytest.raises(
        ArgumentError, match=r"^refresh is 0, but must be an integer of at least 1\.$"
    ):
        check_integer("refresh", 0, minimum=1)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1e-300, 1e300, np.float64(0.5)])
def test_finite_numbers_from_the_minimum_are_returned_as_float(value: Any) -> None:
    number = check_number("lr", value)
    assert type(number) is float
    assert number == value


BAD = [-1, -1e-300, math.nan, math.inf, -math.inf, True, False, "1", None, [1.0], 1j]
BAD += [Decimal(1), Fraction(1, 2), torch.tensor(1.0), 10**400, np.complex64(1)]


@pytest.mark.parametrize("value", BAD)
def test_what_is_no_finite_number_from_the_minimum_is_refused(value: Any) -> None:
    message = f"lr is {value!r}, but must be a finite number of at least 0. Way out."
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        check_number("lr", value, remedy="Way out.")


def test_an_exclusive_minimum_is_not_allowed_itself() -> None:
    check_number("tol", 1e-300, exclusive=True)
    with pytest.raises(ArgumentError, match=r"^tol is 0, but must be a finite number above 0\.$"):
        check_number("tol", 0, exclusive=True)
    check_number("rate", 2.5, minimum=2.5)
    with pytest.raises(ArgumentError, match=r"finite number of at least 2\.5\.$"):
        check_number("rate", 2.4, minimum=2.5)


def test_a_maximum_is_the_largest_that_is_allowed() -> None:
    assert check_number("cosine", 1, maximum=1) == 1.0
    for value in (1 + 1e-15, math.inf, math.nan):
        with pytest.raises(ArgumentError, match=r"a finite number of at least 0 and at most 1\.$"):
            check_number("cosine", value, maximum=1)


def test_infinities_pass_where_they_may_and_nan_never() -> None:
    for value in (-math.inf, 0, math.inf):
        assert check_number("start", value, minimum=None, infinite=True) == value
    with pytest.raises(ArgumentError, match=r"^start is nan, but must be a number\.$"):
        check_number("start", math.nan, minimum=None, infinite=True)
    with pytest.raises(ArgumentError, match=r"^start is -inf, but must be a number of at least 0"):
        check_number("start", -math.inf, infinite=True)


def test_flags_are_true_or_false_and_nothing_that_counts_as_one() -> None:
    for value in (True, False):
        check_flag("nesterov", value)
        check_flag("foreach", value, optional=True)
    check_flag("foreach", None, optional=True)
    for value in (None, 0, 1, "True", np.True_):
        with pytest.raises(ArgumentError, match=r"must be True or False\.$"):
            check_flag("nesterov", value)
    with pytest.raises(ArgumentError, match=r"^foreach is 1, but must be True, False or None\.$"):
        check_flag("foreach", 1, optional=True)


def test_without_a_minimum_any_finite_number_passes() -> None:
    check_number("dampening", -1e300, minimum=None)
    for value in (math.nan, -math.inf, "x"):
        with pytest.raises(ArgumentError, match=r"but must be a finite number\.$"):
            check_number("dampening", value, minimum=None)


@pytest.mark.parametrize("value", [torch.tensor(0.1), torch.tensor([[2]]), torch.tensor([0.0])])
def test_tensors_of_one_element_pass_where_they_may(value: torch.Tensor) -> None:
    check_number("lr", value, tensor=True)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.1, 0.2]),
        torch.tensor([]),
        torch.tensor(-0.1),
        torch.tensor(math.nan),
        torch.tensor(math.inf),
        torch.tensor(1j),
    ],
)
def test_other_tensors_do_not(value: torch.Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"^lr is tensor"):
        check_number("lr", value, tensor=True)
