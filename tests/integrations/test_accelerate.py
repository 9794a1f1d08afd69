"""``attach`` to what ``accelerator.prepare`` returned, against the same loop without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from subspace_optim.integrations.accelerate import attach  # noqa: E402
from tests.integrations.ranks_worker import WithLoss  # noqa: E402

pytestmark = pytest.mark.clients
torch.manual_seed(0)
X, Y = torch.randn(48, 5), torch.randint(3, (48,))


@pytest.fixture(autouse=True)
def _one_accelerator() -> Iterator[None]:
    """Its state is shared by all of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Tracker(accelerate.tracking.GeneralTracker):
    name, requires_logging_directory, main_process_only = "list", False, True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def tracker(self) -> Any:
        return self.rows

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))


class Loop:
    """A loop as its guide has it: one line more where there is a monitor."""

    def __init__(self, options: dict[str, Any], *, watched: bool, optimizer: Any = None) -> None:
        self.tracker = Tracker()
        self.clip = options.get("clip")
        self.each = options.get("each", 1)
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            mixed_precision=options.get("precision", "no"),
            gradient_accumulation_steps=self.each,
            log_with=self.tracker,
        )
        self.accelerator.init_trackers("run")
        model = WithLoss()
        make = optimizer or (lambda m: torch.optim.AdamW(m.parameters(), lr=0.02))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, make(model), loader
        )
        self.monitor: Any = None
        if watched:
            self.monitor = attach(self.accelerator, self.model, self.optimizer, every=1)
        self.path: list[list[torch.Tensor]] = [self.parameters()]

    def parameters(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def epoch(self) -> None:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(x, labels=y)["loss"]
                self.accelerator.backward(loss)
                if self.clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.path.append(self.parameters())


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"each": 3},
    "clipped": {"clip": 0.05},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_training_is_the_same_and_the_rows_are_of_what_was_trained_on(way: str) -> None:
    plain = Loop(WAYS[way], watched=False)
    plain.epoch()
    seen = Loop(WAYS[way], watched=True)
    seen.epoch()
    for before, after in zip(plain.path, seen.path, strict=True):
        assert all(map(torch.equal, before, after))
    each, history, model = seen.each, seen.monitor.history, WithLoss()
    count = 6 // each
    assert history["step"] == list(range(count))

    def loss(t: int, at: int) -> float:
        with torch.no_grad():
            for p, value in zip(model.parameters(), seen.path[at], strict=True):
                p.copy_(value)
            parts = [slice(8 * b, 8 * b + 8) for b in range(t * each, (t + 1) * each)]
            logits = [(model.net(X[part]).double(), Y[part]) for part in parts]
            return sum(float(nn.functional.cross_entropy(*pair)) for pair in logits) / each

    for t in range(count):
        expected = loss(t, (t + 1) * each) - loss(t, t * each)
        assert history["actual_change"][t] == pytest.approx(expected, rel=1e-4, abs=2e-6)
    ours = [(step, row["subspace/actual_change"]) for step, row in seen.tracker.rows]
    assert ours == list(zip(range(count), history["actual_change"], strict=True))


def test_a_saved_state_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = Loop({}, watched=True)
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch()
    resumed = Loop({}, watched=True)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.epoch()
    for before, after in zip(whole.path[7:], resumed.path[1:], strict=True):
        assert all(map(torch.equal, before, after))
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(resumed.monitor.history, whole.monitor.history, **same)


def test_bulk_sgd_and_sam_step_through_the_wrapper() -> None:
    def loss(model: Any, batch: Any) -> Any:
        return model(*batch)["loss"], len(batch[0])

    made: list[Any] = []

    def optimizer(model: Any) -> Any:
        made.append(so.DominantSubspace(so.HessianOperator.from_loss(model, loss, (X, Y)), k=2))
        return so.BulkSGD(model.parameters(), lr=0.1, subspace=made[0])

    loop = Loop({}, watched=False, optimizer=optimizer)
    monitor = attach(
        loop.accelerator, loop.model, loop.optimizer, made[0], measures=so.measures.dominant()
    )
    loop.epoch()
    assert monitor.history["step"] == [0]
    assert monitor.history["chi_update"][0] < 1e-6

    sam = Loop({}, watched=False, optimizer=lambda m: so.SAM(m.parameters(), lr=0.1, rho=0.05))
    x, y = X[:8], Y[:8]
    by_hand = WithLoss()
    own = so.SAM(by_hand.parameters(), lr=0.1, rho=0.05)

    def closure() -> float:
        own.zero_grad()
        value = by_hand(x, labels=y)["loss"]
        value.backward()
        return value.item()

    own.step(closure)

    def prepared() -> float:
        sam.optimizer.zero_grad()
        value = sam.model(x, labels=y)["loss"]
        sam.accelerator.backward(value)
        return value.item()

    sam.optimizer.step(prepared)
    for p, q in zip(sam.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0, atol=0)


def test_what_is_no_accelerator_is_refused() -> None:
    model = WithLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(so.ArgumentError, match=r"^accelerator is 'WithLoss', but must be an"):
        attach(model, model, optimizer)


def test_a_loss_that_the_loop_computes_is_given_with_its_batches() -> None:
    """Labels are in no call of such a model: the loop adds its batches."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = WithLoss().net
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    batches = so.CurrentBatch()

    def loss(model: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]), len(batch[0])

    measures = [so.measures.stability(), so.measures.loss_and_gradient()]
    options: dict[str, Any] = {"data": batches, "loss": loss, "measures": measures}
    monitor = attach(accelerator, model, optimizer, every=1, **options)
    expected: list[float] = []
    for index, (x, y) in enumerate(loader):
        batches.add(x, y)
        if index % 2 == 0:
            both = slice(8 * index, 8 * index + 16)
            with torch.no_grad():
                found = nn.functional.cross_entropy(net(X[both]).double(), Y[both])
            expected.append(found.item())
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.history["loss"] == pytest.approx(expected, rel=2e-6)
