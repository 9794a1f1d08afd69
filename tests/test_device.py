"""The same numbers wherever the parameters live: a device beside the CPU, in float64.

What runs on the CPU has oracles of its own elsewhere. Here it is the truth, since a device has
nothing else to be compared with; on ``--device cpu`` two runs of one program are.
"""

import copy
import itertools
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import subspace_optim as so
from tests.dense import MODELS, make_problem, projector

pytestmark = pytest.mark.gpu

K = 2
EXACT = 1e-10
OPERATORS = {
    "hessian": so.HessianOperator,
    "gauss_newton": so.GaussNewtonOperator,
    "residual": lambda *args: so.ResidualOperator(
        so.HessianOperator(*args), so.GaussNewtonOperator(*args)
    ),
    "finite_differences": so.FiniteDifferenceHessian,
}


def operator_of(problem, kind="hessian"):
    """The batches stay on the host: an operator moves them."""
    return OPERATORS[kind](problem.model, problem.loss_fn, problem.batches)


def twins(device, model="mlp", **options):
    """One problem on the CPU, and the same on the device."""
    here, there = make_problem(model, **options), make_problem(model, **options)
    there.model.to(device)
    return here, there


def close(there, here, rtol=1e-8, atol=1e-9):
    torch.testing.assert_close(there.cpu(), here.cpu(), rtol=rtol, atol=atol)


@contextmanager
def without_waiting(device):
    """Raises where the host waits for the device inside: by CUDA itself, else by what would."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with _NoReading():
        yield


class _NoReading(TorchDispatchMode):
    """``.item()``, ``bool()`` and ``float()`` of a tensor are what would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number was read: on a device the host would wait for it")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "model"),
    # The kinks of a ReLU: rounding decides at which side of one a difference is taken.
    [
        pair
        for pair in itertools.product(OPERATORS, MODELS)
        if pair != ("finite_differences", "cnn")
    ],
)
def test_operators(device, kind, model):
    here, there = (operator_of(p, kind) for p in twins(device, model))
    v = torch.randn(here.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = there.matvec(v.to(device))
    assert product.device.type == device.type
    tolerance = 1e-5 if kind == "finite_differences" else 1e-9
    close(product, here.matvec(v), rtol=tolerance, atol=tolerance)
    close(there.gradient(), here.gradient())
    assert there.loss() == pytest.approx(here.loss(), rel=1e-12)
    close(there.matmat(torch.stack([v, -v]).to(device))[1], -product, atol=1e-6)


def test_solves_and_what_is_kept_of_them(device):
    here, there = twins(device)
    bases = [so.DominantSubspace(operator_of(p), K, tol=EXACT) for p in (here, there)]
    expected, found = (s.refresh() for s in bases)
    assert found.vectors.device.type == device.type
    close(found.eigenvalues, expected.eigenvalues)
    close(projector(found.vectors), projector(expected.vectors), rtol=0, atol=1e-6)
    gradient = bases[1].operator.gradient()
    close(found.project(gradient), expected.project(gradient.cpu()), atol=1e-6)
    for problem in (here, there):
        with torch.no_grad():
            for p in problem.model.parameters():
                p.mul_(1.001)
    for s in bases:  # a probe or a refinement, at new parameters
        s.update()
        s.refresh()
    close(bases[1].basis.eigenvalues, bases[0].basis.eigenvalues, atol=1e-5)
    distance = projector(bases[1].basis.vectors).cpu() - projector(bases[0].basis.vectors)
    assert torch.linalg.matrix_norm(distance, 2) <= 0.05


def test_a_basis_of_a_sample(device):
    sizes = [1] * 40
    here, there = twins(device, sizes=sizes)
    for problem in (here, there):
        subspace = so.DominantSubspace(operator_of(problem), K, sample="auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # forty examples are few
            basis = subspace.update()
        exact = so.DominantSubspace(operator_of(here), K, tol=EXACT).refresh()
        distance = projector(basis.vectors).cpu() - projector(exact.vectors)
        assert torch.linalg.matrix_norm(distance, 2) <= subspace.stats.estimate


OPTIMIZERS = {
    "DomSGD": lambda p, s: so.DomSGD(p, lr=0.05, momentum=0.9, subspace=s),
    "BulkSGD": lambda p, s: so.BulkSGD(p, lr=0.05, weight_decay=0.01, subspace=s),
    "LowRankNewton": lambda p, s: so.LowRankNewton(p, lr=0.05, subspace=s),
    "SAM": lambda p, s: so.SAM(p, lr=0.05, rho=0.05),
    "DomSAM": lambda p, s: so.DomSAM(p, lr=0.05, rho=0.05, subspace=s),
    "BulkSAM": lambda p, s: so.BulkSAM(p, lr=0.05, rho=0.05, subspace=s),
}


def trained(problem, make, device, steps=4):
    """Parameters and the columns of a monitor after a few steps with a new basis at each."""
    subspace = so.DominantSubspace(operator_of(problem), K, refresh=1, tol=EXACT)
    optimizer = make(problem.model.parameters(), subspace)
    monitor = so.Monitor(optimizer, subspace)
    batches = [(x.to(device), y.to(device)) for x, y in problem.batches]

    def closure():
        optimizer.zero_grad()
        loss = sum(problem.loss_fn(problem.model(x), y) * len(y) for x, y in batches)
        loss = loss / sum(len(y) for _, y in batches)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    monitor.detach()
    theta = nn.utils.parameters_to_vector(problem.model.parameters()).detach()
    return theta, {n: monitor.history[n] for n in ("chi_update", "dom_lr", "bulk_lr")}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_the_monitor(device, name):
    here, there = twins(device)
    expected, rows = trained(here, OPTIMIZERS[name], torch.device("cpu"))
    found, rows_there = trained(there, OPTIMIZERS[name], device)
    close(found, expected, atol=1e-6)
    for column, values in rows.items():
        assert rows_there[column] == pytest.approx(values, rel=1e-5, abs=1e-5), column


def test_projected_adam(device):
    results = []
    for problem, where in zip(twins(device), (torch.device("cpu"), device), strict=True):

        def make(parameters, subspace):
            optimizer = torch.optim.Adam(parameters, lr=0.01)
            so.project_updates(optimizer, subspace, onto="bulk")
            return optimizer

        results.append(trained(problem, make, where)[0])
    close(results[1], results[0], atol=1e-6)


def test_a_state_goes_from_the_host_to_the_device(device):
    here, there = twins(device)
    saved = so.DominantSubspace(operator_of(here), K)
    basis = saved.refresh()
    loaded = so.DominantSubspace(operator_of(there), K)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert loaded.basis.vectors.device.type == device.type
    assert torch.equal(loaded.basis.vectors.cpu(), basis.vectors)


@pytest.mark.parametrize("model", MODELS)
def test_a_product_does_not_wait(device, model):
    _, problem = twins(device, model, dtype=torch.float32)
    batches = [(x.to(device), y.to(device)) for x, y in problem.batches]
    hessian = so.HessianOperator(problem.model, problem.loss_fn, batches)
    rows = torch.ones(2, hessian.size, device=device)
    with hessian.frozen():
        hessian.matmat(rows)  # the graph is built, and the operator proved
        with without_waiting(device):
            products = hessian.matmat(rows)
    assert products.isfinite().all()
    with pytest.raises(RuntimeError, match=r"synchroniz|number was read"), without_waiting(device):
        products.sum().item()  # the watch sees what it is there for


def test_projecting_does_not_wait(device):
    _, problem = twins(device)
    basis = so.DominantSubspace(operator_of(problem), K).refresh()
    v = torch.ones(basis.size, dtype=basis.dtype, device=device)
    with without_waiting(device):
        inside, outside = basis.project(v), basis.project_out(v)
    close(inside + outside, v)
