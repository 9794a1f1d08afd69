"""The meter counts what an operation has made and somebody still holds."""

from unittest import mock

import torch
from torch import nn

from subspace_optim.curvature import memory
from subspace_optim.curvature.memory import (
    AllocationMeter,
    free_memory,
    may_be_kept,
    size_gathered,
)


def test_what_is_made_inside_and_held_is_counted_once():
    outside = torch.ones(100)
    with AllocationMeter() as meter:
        held = outside + 1
        view = held.view(10, 10).t()
        torch.ones(1000).sum()
    assert meter.alive() == 400
    del held
    assert meter.alive() == 400
    del view
    assert meter.alive() == 0


def test_what_comes_from_outside_is_not_counted_through_views_or_writes():
    outside = torch.ones(4, 100)
    with AllocationMeter() as meter:
        views = outside.t(), outside[1:], outside.add_(1), outside.detach()
    assert meter.alive() == 0
    assert all(view.numel() for view in views)


def test_sparse_tensors_are_passed_by():
    with AllocationMeter() as meter:
        dense = torch.sparse.mm(torch.eye(3).to_sparse(), torch.ones(3, 5))
    assert meter.alive() >= dense.nbytes


def test_some_memory_is_free_and_not_more_than_a_machine_has():
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50


def test_processes_of_one_machine_share_a_quarter_of_what_is_free():
    device = torch.device("cpu")
    with mock.patch.object(memory, "free_memory", return_value=800):
        assert [may_be_kept(device, processes) for processes in (1, 2, 4)] == [200, 100, 50]


def test_parameters_are_gathered_in_float32_at_least():
    model = nn.ModuleList([nn.Linear(3, 2).bfloat16(), nn.Linear(3, 2).double()])
    assert size_gathered(model) == 8 * 4 + 8 * 8
