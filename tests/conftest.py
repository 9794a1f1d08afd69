"""What all tests share: one derandomised hypothesis profile, and no GPU test without a GPU."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "subspace_optim",
    derandomize=True,  # the same examples in every run: a red test is red for everyone
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("subspace_optim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


# The problems of the tests are small. Where cores are shared, threads wait far longer for each
# other than they work: on two busy cores an eigensolve of 320 products took 18 s, on one 0.05 s.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
