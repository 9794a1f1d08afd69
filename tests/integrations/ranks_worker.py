"""What each of two ranks does in the loops of others: trains with and without a monitor."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import subspace_optim as so

STEPS, SIZE = 4, 4
"""Of a training, and of a rank's batch."""


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = 2 * STEPS * SIZE
    x = torch.randn(count, 5, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


class WithLoss(nn.Module):
    """Returns its own loss, as models of ``transformers`` do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Course:
    """Parameters before each step and at the end, and the batches of this rank."""

    def __init__(self) -> None:
        self.parameters: list[list[torch.Tensor]] = []
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(self, model: nn.Module) -> None:
        self.parameters.append([p.detach().clone() for p in model.parameters()])


def transformers(path: Course, folder: Path, *, watched: bool) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from subspace_optim.integrations.transformers import MonitorCallback

    model, (x, y) = WithLoss(), data()

    class Noting(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            path.note(model)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            path.note(model)

    class Remembering(Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            path.batches.append((inputs["x"], inputs["labels"]))
            return super().training_step(model, inputs, *rest, **named)

    arguments = TrainingArguments(
        output_dir=str(folder / f"out-{watched}"),
        max_steps=STEPS,
        per_device_train_batch_size=SIZE,
        learning_rate=0.02,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        remove_unused_columns=False,
    )
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    trainer = Remembering(model, arguments, train_dataset=rows, callbacks=[Noting()])
    callback = MonitorCallback(trainer, every=1) if watched else None
    trainer.train()
    return callback and callback.monitor


def accelerate(path: Course, folder: Path, *, watched: bool) -> Any:
    from accelerate import Accelerator

    from subspace_optim.integrations.accelerate import attach

    accelerator, model = Accelerator(cpu=True), WithLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=SIZE)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    monitor = attach(accelerator, prepared, optimizer, every=1) if watched else None
    for x, y in loader:
        path.note(model)
        path.batches.append((x, y))
        accelerator.backward(prepared(x, labels=y)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    path.note(model)
    return monitor


def lightning(path: Course, folder: Path, *, watched: bool) -> Any:
    import lightning as pl

    from subspace_optim.integrations.lightning import MonitorCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = WithLoss()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.02)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(batch[0], labels=batch[1])["loss"]

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            path.note(self.model)
            path.batches.append(tuple(batch))

        def on_train_end(self) -> None:
            path.note(self.model)

    callback = MonitorCallback(every=1) if watched else None
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[callback] if callback else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=SIZE)
    trainer.fit(Module(), loader)
    return callback and callback.monitor


def fabric(path: Course, folder: Path, *, watched: bool) -> Any:
    from lightning import Fabric

    fabric, net = Fabric(accelerator="cpu", devices=2, strategy="ddp"), WithLoss()
    fabric.launch()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.02))
    batch, monitor = so.CurrentBatch(), None
    if watched:
        hessian = so.HessianOperator(
            net.net,
            nn.CrossEntropyLoss(),
            batch,
            process_group=torch.distributed.group.WORLD,
        )
        monitor = so.Monitor(optimizer, hessian)
    x, y = data()
    for step in range(STEPS):
        start = (2 * step + fabric.global_rank) * SIZE
        path.note(net)
        path.batches.append((x[start : start + SIZE], y[start : start + SIZE]))
        batch.set(*path.batches[-1])
        fabric.backward(model(path.batches[-1][0], labels=path.batches[-1][1])["loss"])
        optimizer.step()
        optimizer.zero_grad()
    path.note(net)
    return monitor


LOOPS = {
    "transformers": transformers,
    "accelerate": accelerate,
    "lightning": lightning,
    "fabric": fabric,
}


def run(rank: int, ranks: int, port: int, folder: str, loop: str) -> None:
    """Trains in a loop on one of the ranks, and writes what came of it."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",  # so Lightning takes the processes that there are
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    torch.set_num_threads(1)
    found = {}
    for watched in (False, True):
        path = Course()
        monitor = LOOPS[loop](path, Path(folder), watched=watched)
        found[watched] = {
            "parameters": path.parameters,
            "batches": path.batches,
            "history": monitor.history if watched else None,
        }
    torch.save(found, Path(folder) / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def counted(rank: int, ranks: int, port: int, folder: str) -> None:
    """Trains a ``Trainer`` that counts labels over all ranks, and measures on a data set."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    from tests.integrations.test_transformers import sentences
    from tests.integrations.test_transformers_losses import watched

    found = {}
    for name, options in {"data": {"data": sentences(16, seed=3)}, "steps": {"each": 2}}.items():
        history, seen = watched(Path(folder) / name, steps=2, ddp_backend="gloo", **options)
        batches = [{key: batch[key] for key in batch} for batch in seen.batches]
        found[name] = {"loss": history["loss"], "path": seen.path, "batches": batches}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
