"""``Monitor`` in a loop with Lightning's ``Fabric``, against the same loop without it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
torch.manual_seed(0)
X, Y = torch.randn(48, 5), torch.randint(3, (48,))
ce = nn.CrossEntropyLoss()


class Loop:
    """A loop as its guide has it: three lines more where there is a monitor."""

    def __init__(
        self,
        *,
        watched: bool,
        optimizer: Any = None,
        precision: Any = "32-true",
        each: int = 1,
        clip: float | None = None,
        log: Any = None,
    ) -> None:
        self.fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        self.each, self.clip = each, clip
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        make = optimizer or (lambda m: torch.optim.AdamW(m.parameters(), lr=0.02))
        self.model, self.optimizer = self.fabric.setup(self.net, make(self.net))
        self.batch = so.CurrentBatch()
        self.monitor: Any = None
        if watched:
            hessian = so.HessianOperator(self.net, ce, self.batch)
            self.monitor = so.Monitor(self.optimizer, hessian, log=log)
        self.path = [self.parameters()]

    def parameters(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]

    def epoch(self) -> None:
        for index in range(6):
            x, y = X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]
            self.batch.add(x, y)
            self.fabric.backward(ce(self.model(x), y) / self.each)
            if (index + 1) % self.each == 0:
                if self.clip:
                    self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.path.append(self.parameters())


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"each": 3},
    "clipped": {"clip": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_training_is_the_same_and_the_rows_are_of_what_was_trained_on(
    way: str, tmp_path: Path
) -> None:
    from lightning.fabric.loggers import CSVLogger

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1000)
    plain, seen = Loop(watched=False, **WAYS[way]), Loop(watched=True, log=logger, **WAYS[way])
    plain.epoch()
    seen.epoch()
    for before, after in zip(plain.path, seen.path, strict=True):
        assert all(map(torch.equal, before, after))
    history, net = seen.monitor.history, Loop(watched=False).net
    assert history["step"] == list(range(6 // seen.each))

    def loss(t: int, at: int) -> float:
        with torch.no_grad():
            for p, value in zip(net.parameters(), seen.path[at], strict=True):
                p.copy_(value)
            part = slice(8 * t * seen.each, 8 * (t + 1) * seen.each)
            return float(ce(net(X[part]).double(), Y[part]))

    for t in history["step"]:
        expected = loss(t, t + 1) - loss(t, t)
        assert history["actual_change"][t] == pytest.approx(expected, rel=1e-4, abs=2e-6)
    rows = [(row["step"], row["subspace/actual_change"]) for row in logger.experiment.metrics]
    assert rows == list(zip(history["step"], history["actual_change"], strict=True))


def test_a_saved_state_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, resumed = Loop(watched=True), Loop(watched=True)
    whole.epoch()
    state = {"model": whole.model, "optimizer": whole.optimizer, "monitor": whole.monitor}
    whole.fabric.save(tmp_path / "state.ckpt", state)
    whole.epoch()
    state = {"model": resumed.model, "optimizer": resumed.optimizer, "monitor": resumed.monitor}
    resumed.fabric.load(tmp_path / "state.ckpt", state)
    resumed.epoch()
    for before, after in zip(whole.path[7:], resumed.path[1:], strict=True):
        assert all(map(torch.equal, before, after))
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(resumed.monitor.history, whole.monitor.history, **same)


def test_sam_steps_through_the_wrapper() -> None:
    def make(net: nn.Module) -> so.SAM:
        return so.SAM(net.parameters(), lr=0.1, rho=0.05)

    loop, by_hand = Loop(watched=True, optimizer=make), Loop(watched=False).net
    own, x, y = make(by_hand), X[:8], Y[:8]
    loop.batch.set(x, y)

    def closure() -> float:
        own.zero_grad()
        value = ce(by_hand(x), y)
        value.backward()
        return value.item()

    own.step(closure)
    loop.fabric.backward(ce(loop.model(x), y))
    loop.optimizer.first_step(zero_grad=True)
    loop.fabric.backward(ce(loop.model(x), y))
    loop.optimizer.second_step(zero_grad=True)
    for p, q in zip(loop.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0, atol=0)
    assert loop.monitor.history["step"] == [0]
