"""Real data are read once, and tiny runs are made once."""

import functools

import pytest

from benchmarks.papers import problems
from tests.benchmarks.papers import tiny as sizes


@pytest.fixture(scope="session", autouse=True)
def _data_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "load", functools.cache(problems.load))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function of paper and run that returns the raw figures of one seed at a tiny size."""
    return sizes.measurer(tmp_path_factory.mktemp("raw"))
