"""The callbacks of a ``transformers.Trainer``, against the same training without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import subspace_optim as so

transformers = pytest.importorskip("transformers")

from subspace_optim.integrations.transformers import MonitorCallback, SAMCallback  # noqa: E402

pytestmark = pytest.mark.clients
VOCABULARY, LENGTH = 24, 10


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def sentences(count: int = 64, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Tokens whose labels do not all count, and not equally many of each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    labels = tokens.clone()
    for row, ignored in enumerate(torch.randint(LENGTH // 2, (count,), generator=generator)):
        labels[row, : int(ignored)] = -100
    return [{"input_ids": t, "labels": w} for t, w in zip(tokens, labels, strict=True)]


class Recorder(transformers.TrainerCallback):
    """Parameters before and after each step, and what was trained on."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.batches: list[Any] = []
        self.path: list[list[torch.Tensor]] = []

    def collate(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
        self.batches.append(batch)
        return batch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.path.append([p.detach().clone() for p in self.model.parameters()])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.path.append([p.detach().clone() for p in self.model.parameters()])


def trained(
    folder: Path,
    *,
    attach: Callable[[Any], Any] | None = None,
    model: Any = None,
    optimizer: Any = None,
    resume: str | bool | None = None,
    steps: int = 6,
    **options: Any,
) -> tuple[Any, Recorder, Any]:
    """A trainer after its training, what it did, and what was attached."""
    model = model or llama()
    recorder = Recorder(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=2,
        report_to=options.pop("report_to", "none"),
        save_strategy=options.pop("save_strategy", "no"),
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=sentences(),
        data_collator=recorder.collate,
        callbacks=[recorder],
        optimizers=(optimizer(model) if optimizer else None, None),
    )
    attached = attach(trainer) if attach else None
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder, attached


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipped": {"max_grad_norm": 0.05},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_training_is_the_same_and_the_rows_are_of_what_was_trained_on(
    way: str, tmp_path: Path
) -> None:
    _, plain, _ = trained(tmp_path / "plain", **WAYS[way])
    trainer, seen, callback = trained(
        tmp_path / "seen", attach=lambda t: MonitorCallback(t, every=1), **WAYS[way]
    )
    for before, after in zip(plain.path, seen.path, strict=True):
        assert all(map(torch.equal, before, after))
    history = callback.monitor.history
    assert history["step"] == list(range(6))
    model, each = llama(), WAYS[way].get("gradient_accumulation_steps", 1)

    def loss(t: int, at: int) -> float:
        """The sum over labels of all micro-batches, over their number; as Trainer has it."""
        with torch.no_grad():
            for p, value in zip(model.parameters(), seen.path[at], strict=True):
                p.copy_(value)
            total = count = 0.0
            for batch in seen.batches[t * each : (t + 1) * each]:
                logits = model(batch["input_ids"]).logits[:, :-1].double()
                labels = batch["labels"][:, 1:]
                total += float(
                    torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1), labels.flatten(), reduction="sum"
                    )
                )
                count += float(labels.ne(-100).sum())
        return total / count

    for t in range(6):
        expected = loss(t, t + 1) - loss(t, t)
        assert history["actual_change"][t] == pytest.approx(expected, rel=1e-3, abs=2e-6)
    logged = [entry for entry in trainer.state.log_history if "subspace/actual_change" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, 7))
    assert [entry["subspace/actual_change"] for entry in logged] == history["actual_change"]
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [2, 4, 6]  # none is lost to ours


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Basis and rows too: the subspace is renewed by what it knows, not by the calendar."""

    def attach(trainer: Any) -> MonitorCallback:
        return MonitorCallback(trainer, k=2, data=sentences(8, seed=3), every=2)

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "steps": 8}
    _, whole, callback = trained(tmp_path / "whole", attach=attach, **options)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "subspace_optim.pt").is_file()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    checkpoint.rename(moved / "checkpoint-3")  # no folder of this training's
    _, resumed, other = trained(
        tmp_path / "new",
        attach=attach,
        resume=str(moved / "checkpoint-3"),
        model=llama(5),
        **options,
    )
    assert len(resumed.path) == 6  # 5 steps, and the end
    for before, after in zip(whole.path[3:], resumed.path, strict=True):
        assert all(map(torch.equal, before, after))
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(other.monitor.history, callback.monitor.history, **same)
    assert callback.monitor.history["step"] == [0, 2, 4, 6]
    bases = [each.monitor.source.basis for each in (other, callback)]
    assert torch.equal(bases[0].vectors, bases[1].vectors)
    assert other.monitor.source.clock == callback.monitor.source.clock == 8


def test_a_checkpoint_without_a_state_is_told_of(tmp_path: Path) -> None:
    trained(tmp_path, save_strategy="steps", save_steps=3)
    with pytest.warns(so.LogWarning, match=r"^There is no subspace_optim\.pt in .*checkpoint-3"):
        _, _, callback = trained(
            tmp_path,
            attach=lambda t: MonitorCallback(t, every=1),
            resume=str(tmp_path / "checkpoint-3"),
        )
    assert callback.monitor.history["step"] == [0, 1, 2]


def test_tensorboard_gets_rows_at_the_trainer_s_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))

    trained(tmp_path, attach=lambda t: MonitorCallback(t, every=2), report_to="tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    (tag,) = [t for t in read.Tags()["scalars"] if t.endswith("subspace/actual_change")]
    assert [scalar.step for scalar in read.Scalars(tag)] == [1, 3, 5]


def of_all(model: Any) -> so.DominantSubspace:
    """The dominant subspace of eight sentences, by a loss written out."""
    rows = sentences(8, seed=3)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def loss(model: Any, batch: Any) -> Any:
        return model(**batch).loss, len(batch["input_ids"])

    return so.DominantSubspace(so.HessianOperator.from_loss(model, loss, batch), k=2)


def test_a_projected_optimizer_trains_and_its_updates_are_in_the_bulk(tmp_path: Path) -> None:
    model = llama()
    subspace = of_all(model)

    def optimizer(model: Any) -> torch.optim.Optimizer:
        return so.BulkSGD(model.parameters(), lr=0.1, subspace=subspace)

    _, _, callback = trained(
        tmp_path,
        model=model,
        optimizer=optimizer,
        attach=lambda t: MonitorCallback(t, subspace, every=1, measures=so.measures.dominant()),
    )
    assert callback.monitor.source is subspace
    assert max(callback.monitor.history["chi_update"]) < 1e-6
    assert min(callback.monitor.history["update_norm"]) > 0


@pytest.mark.parametrize("each", [1, 3])
def test_sam_steps_by_the_gradient_at_the_perturbed_point(each: int, tmp_path: Path) -> None:
    """Against Foret's formula, written out over all micro-batches of a step."""
    model, rho, lr = llama(), 0.05, 0.1

    def optimizer(model: Any) -> torch.optim.Optimizer:
        return so.SAM(model.parameters(), lr=lr, rho=rho)

    _, seen, _ = trained(
        tmp_path,
        model=model,
        optimizer=optimizer,
        attach=SAMCallback,
        steps=3,
        gradient_accumulation_steps=each,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    other = llama()

    def gradient(at: list[torch.Tensor], batches: list[Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            for p, value in zip(other.parameters(), at, strict=True):
                p.copy_(value)
        other.zero_grad()
        count = sum(int(b["labels"][:, 1:].ne(-100).sum()) for b in batches)
        for b in batches:
            logits, labels = other(b["input_ids"]).logits[:, :-1], b["labels"][:, 1:]
            summed = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum"
            )
            (summed / count).backward()
        return [p.grad.clone() for p in other.parameters()]

    for t in range(3):
        batches, theta = seen.batches[t * each : (t + 1) * each], seen.path[t]
        g = gradient(theta, batches)
        norm = torch.stack([piece.norm() for piece in g]).norm()
        up = gradient([p + rho * piece / norm for p, piece in zip(theta, g, strict=True)], batches)
        for p, piece, after in zip(theta, up, seen.path[t + 1], strict=True):
            torch.testing.assert_close(p - lr * piece, after, rtol=1e-4, atol=1e-6)


def test_sam_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        so.ArgumentError, match="the trainer's optimizer is 'AdamW', but must be SAM"
    ):
        trained(tmp_path, attach=SAMCallback)


def test_what_is_no_trainer_and_losses_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(so.ArgumentError, match=r"write MonitorCallback\(trainer, every=50\)"):
        MonitorCallback(llama())
    for kind in (MonitorCallback, SAMCallback):
        with pytest.raises(so.ArgumentError, match=r"^trainer is 'left out', but must be a trans"):
            kind()
    with pytest.raises(so.ArgumentError, match="one with label smoothing"):
        trained(tmp_path, attach=MonitorCallback, label_smoothing_factor=0.1)
    with pytest.raises(so.ArgumentError, match=r"^data is 'given beside a source'"):
        trained(tmp_path, attach=lambda t: MonitorCallback(t, of_all, data=sentences()))


def test_the_state_is_written_whole_and_no_other_file_is_left(tmp_path: Path) -> None:
    trained(
        tmp_path,
        attach=lambda t: MonitorCallback(t, every=1),
        save_strategy="steps",
        save_steps=2,
    )
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        state = torch.load(folder / "subspace_optim.pt")
        assert len(state["monitor"]["history"]["step"]) == step
        assert not list(folder.glob("*.part"))
        json.loads((folder / "trainer_state.json").read_text())
