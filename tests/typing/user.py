"""What a user of strict type checkers writes. ``make types`` checks it, and a test runs it.

A line that must be refused has a ``type: ignore``, which is an error itself where it is not needed.
"""

from typing import assert_type

import torch
from torch import Tensor, nn

import subspace_optim as so

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
loss_fn = nn.CrossEntropyLoss()
x, y = torch.randn(20, 4), torch.randint(3, (20,))


def told(report: so.ProgressReport) -> None:
    """Is called with how far a solve is."""
    assert_type(report.residual, float | None)


hessian = so.HessianOperator(model, loss_fn, (x, y), params="*.weight", verify=True)
hessian = so.HessianOperator(model, loss_fn, (x, y), params=["0", "2.*"])
hessian = so.HessianOperator(model, loss_fn, (x, y), params=lambda name, p: p.dim() > 1 or not name)
hessian = so.HessianOperator(model, loss_fn, (x, y), params=model.parameters())
subspace = so.DominantSubspace(hessian, k=3, progress=told)
optimizers = [
    so.DomSGD(model.parameters(), lr=0.01, subspace=subspace),
    so.BulkSGD(model.named_parameters(), lr=0.01, subspace=subspace),
    so.LowRankNewton(model.parameters(), lr=0.1, subspace=subspace),
]
sam = so.SAM(model.parameters(), lr=0.01)
bulk_sam = so.BulkSAM([{"params": model.parameters(), "rho": 0.1}], lr=0.01, subspace=subspace)
monitor = so.Monitor(sam, subspace, every=so.every_share(0.05))


def closure() -> Tensor:
    """Returns a tensor, as the closures of all tutorials do."""
    sam.zero_grad()
    loss: Tensor = loss_fn(model(x), y)
    loss.backward()
    return loss


def number() -> float:
    """Returns a number, as torch's stubs want it."""
    return closure().item()


def either() -> Tensor | float:
    """Returns one or the other."""
    return closure()


def text() -> str:
    """Returns what is no loss."""
    return str(closure())


for optimizer in optimizers:
    assert_type(optimizer.step(closure), Tensor)
    assert_type(optimizer.step(number), float)
    assert_type(optimizer.step(either), Tensor | float)
    optimizer.step()
    optimizer.step(text)  # type: ignore[type-var]
assert_type(sam.step(closure), Tensor)
assert_type(bulk_sam.step(number), float)
sam.step(text)  # type: ignore[type-var]

adam = torch.optim.Adam(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 10)
handle = so.project_updates(adam, subspace, onto="bulk")
handle.remove()
density = so.diagnostics.spectral_density(hessian, probes=2, steps=4, progress=told)
assert_type(density, so.diagnostics.SpectralDensity)
assert_type(so.diagnostics.block_sharpness(hessian, {"first": "0.*"}), dict[str, float])


def refused() -> None:
    """Is checked, and never called."""
    so.DominantSubspace(hessian, k=3, progress="bar")  # type: ignore[arg-type]
    so.HessianOperator(model, loss_fn, (x, y), params=3)  # type: ignore[arg-type]
