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


def loss_at(path: list[torch.Tensor], batches: list[Any]) -> float:
    other = Module(random=False)
    with torch.no_grad():
        for p, value in zip(other.parameters(), path, strict=True):
            p.copy_(value)
        return sum(float(ce(other.net(x).double(), y)) for x, y in batches) / len(batches)


MEASURES = [so.measures.stability(), so.measures.loss_and_gradient()]


class WithoutIndex(Module):
    def training_step(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
        return ce(self.net(batch[0]), batch[1])


class ByIndex(Module):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (1 + batch_idx) * ce(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [WithoutIndex, ByIndex])
def test_a_training_step_is_given_what_it_was_given_in_training(kind: type[Module]) -> None:
    module, callback = kind(random=False), MonitorCallback(every=1, measures=MEASURES)
    fitted(module, callback)
    assert callback.monitor is not None
    for t, found in enumerate(callback.monitor.history["loss"]):
        scale = 1 + t % 6 if kind is ByIndex else 1
        expected = scale * loss_at(module.path[t], module.batches[t : t + 1])
        assert found == pytest.approx(expected, rel=2e-6)


def test_a_batch_that_is_skipped_is_in_no_row() -> None:
    """The fourth of an epoch ends it. Then the next begins with a step of its own, as Lightning
    has it: the gradients of the third micro-batch are dropped."""

    class Ending(Module):
        def on_train_batch_start(self, batch: Any, index: int) -> Any:
            super().on_train_batch_start(batch, index)
            return -1 if index == 3 else None

    module, callback = Ending(random=False), MonitorCallback(every=1, measures=MEASURES)
    fitted(module, callback, accumulate_grad_batches=2)
    assert callback.monitor is not None
    expected = [loss_at(module.path[first], module.batches[first : first + 2]) for first in (0, 4)]
    assert callback.monitor.history["loss"] == pytest.approx(expected, rel=2e-6)
    alone = MonitorCallback(every=1, measures=MEASURES)
    module = Ending(random=False)
    fitted(module, alone)
    assert alone.monitor is not None
    trained_on = [0, 1, 2, 4, 5, 6]
    expected = [loss_at(module.path[i], module.batches[i : i + 1]) for i in trained_on]
    assert alone.monitor.history["loss"] == pytest.approx(expected, rel=2e-6)


def test_metrics_of_the_training_step_count_each_batch_once() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measured(Module):
        def __init__(self) -> None:
            super().__init__(random=False)
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
            self.mean = torchmetrics.MeanMetric()
            self.seen: list[float] = []

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            logits = self.net(batch[0])
            loss = ce(logits, batch[1])
            self.accuracy(logits, batch[1])
            self.mean(loss)
            self.seen.append(loss.item())
            return loss

    plain, seen = Measured(), Measured()
    fitted(plain, epochs=1)
    fitted(seen, MonitorCallback(every=1), epochs=1)
    assert seen.seen == plain.seen
    for name in ("accuracy", "mean"):
        assert torch.equal(getattr(seen, name).compute(), getattr(plain, name).compute())


def test_a_test_of_a_checkpoint_leaves_the_monitor_of_the_training(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Tested(Module):
        def test_step(self, batch: Any, index: int) -> None:
            self.log("test", ce(self.net(batch[0]), batch[1]))

    saver, callback = ModelCheckpoint(tmp_path, filename="{epoch}"), MonitorCallback(every=1)
    module = Tested(random=False)
    trainer = fitted(module, callback, saver, enable_checkpointing=True)
    monitor = callback.monitor
    assert monitor is not None
    assert len(monitor.history["step"]) == 12
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    trainer.test(module, loader, ckpt_path=saver.best_model_path, verbose=False)
    assert callback.monitor is monitor
    fitted(Tested(random=False), callback)  # and the next training begins anew
    assert callback.monitor is not monitor
    assert len(callback.monitor.history["step"]) == 12


def test_two_callbacks_have_states_of_their_own(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def callbacks() -> list[MonitorCallback]:
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=24)
        return [MonitorCallback(every=1), MonitorCallback(k=2, data=loader, every=3)]

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    whole, resumed = callbacks(), callbacks()
    fitted(Module(random=False), *whole, saver, enable_checkpointing=True)
    fitted(Module(random=False), *resumed, resume=tmp_path / "epoch=0.ckpt")
    for one, other, count in zip(whole, resumed, (12, 4), strict=True):
        assert one.monitor is not None
        assert other.monitor is not None
        same = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(one.monitor.history, other.monitor.history, **same)
        assert len(one.monitor.history["step"]) == count


def test_a_training_that_breaks_off_loses_no_row(tmp_path: Path) -> None:
    """Not even the one that its loggers would have got a moment later; then it is begun anew."""
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import CSVLogger

    class Breaking(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            if args[-1] == 2:
                raise ValueError("broken off")

    log = tmp_path / "run.csv"
    callback, logger = MonitorCallback(every=1, log=log), CSVLogger(tmp_path)
    with pytest.raises(ValueError, match="broken off"):
        fitted(Module(random=False), Breaking(), callback, logger=logger)
    assert callback.monitor is not None
    assert callback.monitor.history["step"] == [0, 1, 2]
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        assert sum(bool(row["subspace/actual_change"]) for row in csv.DictReader(file)) == 3
    fitted(Module(random=False), callback)
    steps = [row.partition(",")[0] for row in log.read_text().splitlines()]
    assert steps == ["step", *map(str, range(3)), *map(str, range(12))]


def test_an_optimizer_that_is_exchanged_is_told_of() -> None:
    class Exchanging(Module):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and self.current_epoch == 0:
                self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.1)]

    callback = MonitorCallback(every=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitted(Exchanging(random=False), callback)
    (only,) = (each for each in told if issubclass(each.category, so.UnseenStepsWarning))
    assert str(only.message).startswith("The trainer has exchanged its optimizer")
    assert callback.monitor is not None
    assert callback.monitor.history["step"] == [0, 1]
