"""The callback of a Lightning ``Trainer``, against the same training without it."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so

lightning = pytest.importorskip("lightning")

from subspace_optim.integrations.lightning import MonitorCallback  # noqa: E402

pytestmark = pytest.mark.clients
ce = nn.CrossEntropyLoss()
torch.manual_seed(0)
X, Y = torch.randn(48, 5), torch.randint(3, (48,))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning's advice about workers and loggers."""
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


class Module(lightning.LightningModule):
    """A small network with dropout and batch norm, which logs, and remembers its path."""

    def __init__(self, optimizer: Any = None, *, manual: bool = False, random: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        middle = [nn.BatchNorm1d(6), nn.Dropout(0.2)] if random else []
        self.net = nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Linear(6, 3))
        self.optimizer = optimizer or (lambda m: torch.optim.AdamW(m.parameters(), lr=0.02))
        self.automatic_optimization = not manual
        self.path: list[list[torch.Tensor]] = []
        self.batches: list[Any] = []
        self.logged = 0

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss: torch.Tensor = ce(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.batches.append(batch)
        self.path.append([p.detach().clone() for p in self.parameters()])

    def on_train_end(self) -> None:
        self.path.append([p.detach().clone() for p in self.parameters()])


def fitted(
    module: Module,
    *callbacks: Any,
    epochs: int = 2,
    resume: Path | None = None,
    precision: Any = "32-true",
    **options: Any,
) -> Any:
    torch.manual_seed(7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    options = {"logger": False, "enable_checkpointing": False} | options
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        precision=precision,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipped": {"gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_training_is_the_same_and_the_rows_are_of_what_was_trained_on(
    way: str, random: bool
) -> None:
    plain, seen, callback = Module(random=random), Module(random=random), MonitorCallback(every=1)
    fitted(plain, **WAYS[way])
    fitted(seen, callback, **WAYS[way])
    for before, after in zip(plain.path, seen.path, strict=True):
        assert all(map(torch.equal, before, after))
    torch.testing.assert_close(plain.state_dict(), seen.state_dict(), rtol=0, atol=0)
    each = WAYS[way].get("accumulate_grad_batches", 1)
    assert callback.monitor is not None
    history = callback.monitor.history
    assert history["step"] == list(range(12 // each))
    if random:
        return
    model = Module(random=False)

    def loss(t: int, at: int) -> float:
        with torch.no_grad():
            for p, value in zip(model.parameters(), seen.path[at], strict=True):
                p.copy_(value)
            batches = seen.batches[t * each : (t + 1) * each]
            return sum(float(ce(model.net(x).double(), y)) for x, y in batches) / each

    for t in range(12 // each):
        expected = loss(t, (t + 1) * each) - loss(t, t * each)
        assert history["actual_change"][t] == pytest.approx(expected, rel=1e-4, abs=2e-6)


def test_rows_come_at_the_step_of_the_other_metrics_and_nothing_is_logged_twice(
    tmp_path: Path,
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    tables = []
    for callbacks in ([], [MonitorCallback(every=3)]):
        logger = CSVLogger(tmp_path, name=f"with-{len(callbacks)}", flush_logs_every_n_steps=1)
        fitted(Module(), *callbacks, logger=logger)
        with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    losses = [[(row["step"], row["loss"]) for row in t if row["loss"]] for t in tables]
    assert losses[0] == losses[1]
    assert [int(step) for step, _ in losses[0]] == list(range(12))
    ours = [row for row in tables[1] if row["subspace/actual_change"]]
    assert [int(row["step"]) for row in ours] == [0, 3, 6, 9]


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """The state comes before the optimizers are made, and waits. (No generator is in it.)"""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def callback() -> MonitorCallback:
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=24)
        return MonitorCallback(k=2, data=loader, every=2)

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    first, second = callback(), callback()
    whole, resumed = Module(random=False), Module(random=False)
    fitted(whole, first, saver, epochs=3, enable_checkpointing=True)
    fitted(resumed, second, epochs=3, resume=tmp_path / "epoch=0.ckpt")
    assert first.monitor is not None
    assert second.monitor is not None
    for before, after in zip(whole.path[6:], resumed.path, strict=True):
        assert all(map(torch.equal, before, after))
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(second.monitor.history, first.monitor.history, **same)
    assert first.monitor.history["step"] == list(range(0, 18, 2))


def of_all(module: Module) -> so.DominantSubspace:
    return so.DominantSubspace(so.HessianOperator(module.net, ce, (X, Y)), k=2)


@pytest.mark.parametrize("manual", [False, True])
def test_bulk_sgd_trains_and_its_updates_are_in_the_bulk(manual: bool) -> None:
    made: list[Any] = []

    def optimizer(module: Module) -> torch.optim.Optimizer:
        made.append(of_all(module))
        return so.BulkSGD(module.net.parameters(), lr=0.1, subspace=made[0])

    measures = so.measures.dominant()
    callback = MonitorCallback(lambda module: made[0], every=1, measures=measures)
    fitted(Module(optimizer, manual=manual, random=False), callback)
    assert callback.monitor is not None
    history = callback.monitor.history
    assert callback.monitor.source is made[0]
    assert len(history["step"]) == 12
    assert max(history["chi_update"]) < 1e-6
    assert min(history["update_norm"]) > 0


def test_sam_steps_by_the_closure() -> None:
    """By Foret's formula, on the batch of each step."""
    module = Module(lambda m: so.SAM(m.parameters(), lr=0.1, rho=0.05), random=False)
    fitted(module, MonitorCallback(every=1))
    other = Module(random=False)

    def gradient(at: list[torch.Tensor], batch: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            for p, value in zip(other.parameters(), at, strict=True):
                p.copy_(value)
        return list(
            torch.autograd.grad(ce(other.net(batch[0]), batch[1]), list(other.parameters()))
        )

    for t, batch in enumerate(module.batches):
        theta = module.path[t]
        g = gradient(theta, batch)
        norm = torch.stack([piece.norm() for piece in g]).norm()
        up = gradient([p + 0.05 * piece / norm for p, piece in zip(theta, g, strict=True)], batch)
        for p, piece, after in zip(theta, up, module.path[t + 1], strict=True):
            torch.testing.assert_close(p - 0.1 * piece, after, rtol=1e-4, atol=1e-6)


def test_sam_under_accumulation_is_refused_with_the_way_out() -> None:
    module = Module(lambda m: so.SAM(m.parameters(), lr=0.1), random=False)
    with pytest.raises(so.ArgumentError, match="in Lightning by manual optimization"):
        fitted(module, accumulate_grad_batches=2)


def test_a_module_that_steps_itself_needs_a_loss() -> None:
    with pytest.raises(so.ArgumentError, match=r"^training_step is 'a module that steps"):
        fitted(Module(manual=True), MonitorCallback())

    def loss(module: Any, batch: Any) -> Any:
        return ce(module.net(batch[0]), batch[1]), len(batch[0])

    callback = MonitorCallback(loss=loss, every=1)
    fitted(Module(manual=True, random=False), callback)
    assert callback.monitor is not None
    assert len(callback.monitor.history["step"]) == 12


def test_what_is_no_source_is_refused_at_once() -> None:
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False)
    for given in (so.measures.stability(), trainer):
        with pytest.raises(so.ArgumentError, match=r"^source is .*Measures are named"):
            MonitorCallback(given)
