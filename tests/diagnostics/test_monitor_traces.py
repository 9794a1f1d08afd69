"""No trace of a monitor in the training, and no pass over the data that its columns do not tell."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

import subspace_optim as so
from tests.observe import Seen


class Noisy(nn.Module):
    """All that draws numbers, keeps statistics or iterates in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(2, 4)),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Linear(4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def both(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, Adam for the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.Adam(others, lr=0.01)]


def one(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Any:
    return lambda model: [kind(model.parameters(), **options)]


TRAINED: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "SGD momentum": one(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": one(torch.optim.Adam, lr=0.01, foreach=False),
    "AdamW foreach": one(torch.optim.AdamW, lr=0.01, foreach=True),
    "AdamW fused": one(torch.optim.AdamW, lr=0.01, fused=True),
    "Muon and Adam": both,
    "LBFGS": one(torch.optim.LBFGS, lr=0.1, max_iter=3),
    "SAM": one(so.SAM, lr=0.05, rho=0.05),
}
WAYS = ("closure", "plain", "scaler", "accumulation")
CASES = [
    (name, way)
    for name in TRAINED
    for way in WAYS
    if (way == "closure") == (name in ("LBFGS", "SAM")) or (name == "Adam" and way == "closure")
]
CASES += [("SGD momentum", "clipping"), ("AdamW foreach", "clipping")]


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], way: str, loader: Any) -> Any:
    """Trains in one of the ways that people do; yields after each step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for number, batch in enumerate(loader):

        def closure(batch: list[Tensor] = batch) -> Tensor:
            for each in optimizers:
                each.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        if way == "closure":
            yield optimizers[0].step(closure).detach()
        elif way in ("plain", "clipping"):
            loss = closure()
            if way == "clipping":
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            for each in optimizers:
                each.step()
            yield loss.detach()
        elif way == "scaler":
            for each in optimizers:
                each.zero_grad()
            loss = loss_of(model, batch)
            scaler.scale(loss * (torch.inf if number == 1 else 1)).backward()  # one is skipped
            for each in optimizers:
                scaler.step(each)
            scaler.update()
            yield torch.tensor(scaler.get_scale())
        else:
            (loss_of(model, batch) / 2).backward()
            if number % 2:
                for each in optimizers:
                    each.step()
                    each.zero_grad()
            yield torch.zeros(())


def run(
    name: str, way: str, monitor: Callable[..., so.Monitor] | None, *, verify: bool = False
) -> tuple[list[Tensor], list[Any], so.Monitor | None]:
    torch.manual_seed(0)
    model = Noisy()
    x, y = torch.randn(24, 2), torch.randn(24, 1)
    loader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)
    optimizers = TRAINED[name](model)
    watching = None
    if monitor is not None:
        # The monitor's data come from a loader of their own, whose passes draw numbers too.
        batches = DataLoader(TensorDataset(x, y), batch_size=24)
        hessian = so.HessianOperator(model, nn.functional.mse_loss, batches, verify=verify)
        watching = monitor(optimizers, so.DominantSubspace(hessian, 1, tol=0.1))
    path: list[Tensor] = []
    for loss in steps(model, optimizers, way, loader):
        path += [loss, torch.get_rng_state()]
        path += [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
        path += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return path, [each.state_dict() for each in optimizers], watching


@pytest.mark.parametrize(("name", "way"), CASES)
def test_training_does_not_change_by_a_bit(name: str, way: str) -> None:
    plain, states, _ = run(name, way, None)
    # The operator's proof of itself leaves no trace either: one case has it, as every user does.
    observed, others, monitor = run(name, way, so.Monitor, verify=name == "Adam")
    torch.testing.assert_close(plain, observed, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(states, others, rtol=0, atol=0)
    rows = {"closure": 4, "plain": 4, "clipping": 4, "scaler": 3, "accumulation": 2}[way]
    assert len(monitor.history["step"]) == rows
    assert all(norm > 0 for norm in monitor.history["update_norm"])


MORE: list[dict[str, Any]] = [
    {"measures": [so.measures.dominant(), so.measures.next_eigenvalues(2)]},
    {"measures": [so.measures.dominant(), so.measures.preconditioned_sharpness()]},
]


@pytest.mark.parametrize("options", [{"every": 2}, *MORE])
def test_no_option_of_the_monitor_leaves_a_trace(options: dict[str, Any]) -> None:
    plain, _, _ = run("Adam", "plain", None)
    observed, _, _ = run("Adam", "plain", lambda o, s: so.Monitor(o, s, **options))
    assert all(map(torch.equal, plain, observed))


def small() -> tuple[nn.Module, so.HessianOperator, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    data = torch.randn(20, 3).double(), torch.randint(2, (20,))
    hessian = so.HessianOperator(model, nn.CrossEntropyLoss(), data, verify=False)
    return model, hessian, data


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("refresh", [4, "auto"])
@pytest.mark.parametrize("kind", ["BulkSGD", "DomSAM"])
def test_beside_an_optimizer_on_the_same_subspace(kind: str, refresh: Any, more: int) -> None:
    """The shared basis is refreshed at the same steps, whatever the monitor asks beside it."""
    measures = [so.measures.dominant(), *([so.measures.next_eigenvalues(more)] if more else [])]
    ends = []
    for watched in (False, True):
        model, hessian, data = small()
        subspace = so.DominantSubspace(hessian, 1, refresh=refresh)
        optimizer = getattr(so, kind)(model.parameters(), lr=0.3, subspace=subspace)
        if watched:
            so.Monitor(optimizer, subspace, measures=measures, every=1 if more else 3)
        path = []
        for t in range(10):
            x, y = (part[t % 5 :: 5] for part in data)

            def closure(
                x: Tensor = x, y: Tensor = y, model: Any = model, o: Any = optimizer
            ) -> Tensor:
                o.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            path += [p.detach().clone() for p in model.parameters()]
            path += [subspace.basis.vectors, subspace.basis.eigenvalues]
        stats = copy.copy(subspace.stats)
        stats.seconds = 0.0
        stats.gradients = 0  # a gradient that the monitor asked for is not computed again
        ends.append((path, stats, subspace.clock))
    assert all(map(torch.equal, ends[0][0], ends[1][0]))
    assert ends[0][1:] == ends[1][1:]


@pytest.mark.parametrize(
    "options", [{}, MORE[0], MORE[1] | {"every": 3}, {"measures": so.measures.stability()}]
)
@pytest.mark.parametrize("refresh", [1, 4, "auto"])
def test_the_cost_columns_are_the_passes_that_are_counted_outside(
    refresh: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient is a forward and a backward pass, a product is a backward pass."""
    model, _, (x, y) = small()
    # Without a proof, and by an engine whose backward passes are all calls of one function.
    loss = nn.CrossEntropyLoss()
    hessian = so.HessianOperator(model, loss, (x, y), engine="double_backward", verify=False)
    subspace = so.DominantSubspace(hessian, 1, refresh=refresh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, subspace, **options)
    seen = Seen()
    grad = torch.autograd.grad

    def counted(*arguments: Any, **options: Any) -> Any:
        if not torch.overrides._get_current_function_mode_stack():  # one that calls it again
            seen.append("backward")
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    model.register_forward_pre_hook(lambda *_: seen.append("forward"))
    every = options.get("every", 1)
    for t in range(9):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[t::9]), y[t::9]).backward()
        seen.clear()
        optimizer.step()
        if t % every:
            assert not seen
            continue
        passes = Counter(seen)
        costs = (monitor.history[column][-1] for column in ("gradients", "products", "forwards"))
        gradients, products, forwards = costs
        assert passes == {"forward": gradients + forwards, "backward": gradients + products}
        assert gradients + forwards >= 1
        assert products > 0 or refresh != 1 or forwards
