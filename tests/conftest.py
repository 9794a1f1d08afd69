"""What all tests share: a derandomised hypothesis profile, their order, no GPU test without one."""

import itertools
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "drawn",  # --hypothesis-profile drawn --hypothesis-seed N: other examples than those of always
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "subspace_optim",
    settings.get_profile("drawn"),
    max_examples=8,
    derandomize=True,  # the same examples in every run: a red test is red for everyone
)
settings.load_profile("subspace_optim")


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "where tests marked gpu run; on cpu none of them is skipped (default: cuda, if any)"
    parser.addoption("--device", choices=("cuda", "cpu"), help=help)
    help = "shuffle the files, and the tests in each: no test may need another before it"
    parser.addoption("--order-seed", type=int, metavar="N", help=help)


def shuffled(items: list[pytest.Item], seed: int) -> list[pytest.Item]:
    """Files in another order, and their tests; those of a file stay together, as its fixtures do.

    A function of the seed alone, so that all processes of a run have one order.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = random.Random(seed)
    groups = list(files.values())
    order.shuffle(groups)
    for group in groups:
        order.shuffle(group)
    return list(itertools.chain.from_iterable(groups))


@pytest.hookimpl(trylast=True)  # pytest itself sorts by the fixtures' parameters
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--order-seed")
    if seed is not None:
        items[:] = shuffled(items, seed)
    if torch.cuda.is_available() or config.getoption("--device") is not None:
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test that is marked gpu runs: a GPU, or what ``--device`` says."""
    return torch.device(request.config.getoption("--device") or "cuda")


# The problems of the tests are small. Where cores are shared, threads wait far longer for each
# other than they work: on two busy cores an eigensolve of 320 products took 18 s, on one 0.05 s.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
