"""Corners of being a drop-in: old checkpoints, rates of odd shapes, optimizers of odd rates."""

import copy

import torch
from torch import nn

import subspace_optim as so


def make():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    data = torch.randn(9, 3).double(), torch.randint(2, (9,))
    hessian = so.HessianOperator(model, nn.CrossEntropyLoss(), data)
    return model, so.DominantSubspace(hessian, hessian.size), data


def steps(model, optimizer, data, number=3):
    for _ in range(number):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()


def test_a_checkpoint_of_an_older_torch_goes_on():
    """Its groups lack the options that came later; with k = P the end is torch.optim.SGD's."""
    model, _, data = make()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps(model, plain, data)
    state = copy.deepcopy(plain.state_dict())
    for option in ("foreach", "fused", "differentiable", "maximize"):
        del state["param_groups"][0][option]
    twin, twin_subspace, _ = make()
    twin.load_state_dict(model.state_dict())
    optimizer = so.DomSGD(twin.parameters(), lr=0.5, subspace=twin_subspace)
    optimizer.load_state_dict(state)
    steps(model, plain, data)
    steps(twin, optimizer, data)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_rate_of_shape_one_is_the_number():
    ends = []
    for rate in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        torch.manual_seed(0)
        model = nn.Module()
        model.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        model.forward = lambda x, model=model: model.scale * x
        x = torch.ones(4, dtype=torch.float64)
        hessian = so.HessianOperator(model, nn.MSELoss(), (x, 0 * x))
        subspace = so.DominantSubspace(hessian, 1)
        optimizer = so.DomSGD(model.parameters(), lr=rate, subspace=subspace)
        (model(x) ** 2).mean().backward()
        optimizer.step()
        ends.append(model.scale.item())
    assert max(abs(end - 1.6) for end in ends) < 1e-7


def test_a_monitor_takes_optimizers_that_find_their_own_rate():
    model, subspace, data = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = so.Monitor(optimizer, subspace)
    optimizer.param_groups[0]["lr"] = None

    def step():
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)

    optimizer.zero_grad()
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    for hook in optimizer._optimizer_step_pre_hooks.values():
        hook(optimizer, (), {})
    step()
    for hook in optimizer._optimizer_step_post_hooks.values():
        hook(optimizer, (), {})
    assert abs(monitor.history["dom_lr"][0] - 0.1) < 1e-9
