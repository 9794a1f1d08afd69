"""The meter counts what an operation has made and somebody still holds."""

import torch

from subspace_optim.curvature.memory import AllocationMeter, free_memory


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
