"""Real data are read once: the runs of a paper cut their examples from the same few sets."""

import functools

import pytest

from benchmarks.papers import problems


@pytest.fixture(scope="session", autouse=True)
def _data_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "load", functools.cache(problems.load))
        yield
