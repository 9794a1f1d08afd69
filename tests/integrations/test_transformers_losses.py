"""Which loss a ``Trainer``'s rows are of: held against what is written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import subspace_optim as so

transformers = pytest.importorskip("transformers")

from subspace_optim.integrations.transformers import MonitorCallback  # noqa: E402
from tests.integrations.test_transformers import Recorder, llama, sentences, trained  # noqa: E402

pytestmark = pytest.mark.clients
SMOOTHING = 0.3
MEASURES = [so.measures.stability(), so.measures.loss_and_gradient()]


def loss_of(path: list[torch.Tensor], batches: list[Any], smoothing: float = 0.0) -> float:
    """The mean over all labels that count, of the next tokens."""
    model, total, count = llama(), 0.0, 0
    with torch.no_grad():
        for p, value in zip(model.parameters(), path, strict=True):
            p.copy_(value)
        for batch in batches:
            logits, labels = model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
            logs = functional.log_softmax(logits.double(), -1)[labels != -100]
            of_label = -logs.gather(1, labels[labels != -100][:, None]).sum()
            of_all = -logs.mean(1).sum()
            total += float((1 - smoothing) * of_label + smoothing * of_all)
            count += len(logs)
    return total / count


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A ``compute_loss_func``: the labels come beside the outputs."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    flat = labels[:, 1:].flatten()
    found = functional.cross_entropy(logits, flat, reduction="sum")
    divisor: Any = flat.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return found / divisor


class OwnLoss(transformers.Trainer):
    """With a ``compute_loss`` of its own, as many who train have it; here that of its model."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def collated(examples: list[Any]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in examples]) for name in examples[0]}


def watched(
    folder: Path,
    kind: Any = transformers.Trainer,
    *,
    each: int = 1,
    steps: int = 4,
    callbacks: Any = (),
    loss: Any = None,
    data: Any = None,
    compute_loss_func: Any = None,
    **options: Any,
) -> tuple[dict[str, list[float]], Recorder]:
    """Steps of which some have fewer micro-batches: five batches of four make an epoch."""
    model = llama()
    recorder = Recorder(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=each,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = kind(
        model,
        arguments,
        train_dataset=sentences(20),
        eval_dataset=sentences(8, seed=5),
        data_collator=collated,
        callbacks=[recorder, *callbacks],
        compute_loss_func=compute_loss_func,
    )
    step = trainer.training_step

    def noting(model: Any, inputs: Any, *rest: Any) -> Any:
        recorder.batches.append(dict(inputs))
        return step(model, inputs, *rest)

    trainer.training_step = noting
    for callback in callbacks:
        callback.trainer = trainer
    callback = MonitorCallback(trainer, loss=loss, data=data, every=1, measures=MEASURES)
    trainer.train()
    assert callback.monitor is not None
    return callback.monitor.history, recorder


def windows(batches: list[Any], each: int) -> list[list[Any]]:
    """The micro-batches of each step: an epoch has five, whose last step has what is left."""
    epochs = [batches[i : i + 5] for i in range(0, len(batches), 5)]
    return [epoch[i : i + each] for epoch in epochs for i in range(0, 5, each)][:4]


WAYS: dict[str, tuple[float, dict[str, Any]]] = {
    "the model's": (0.0, {}),
    "label smoothing": (SMOOTHING, {"label_smoothing_factor": SMOOTHING}),
    "compute_loss_func": (0.0, {"compute_loss_func": summed}),
}


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_rows_are_of_the_loss_that_the_trainer_computes(
    way: str, each: int, tmp_path: Path
) -> None:
    smoothing, options = WAYS[way]
    history, seen = watched(tmp_path, each=each, **options)
    for t, batches in enumerate(windows(seen.batches, each)):
        expected = loss_of(seen.path[t], batches, smoothing)
        assert history["loss"][t] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_rows_on_a_data_set_are_of_the_mean_over_its_labels(way: str, tmp_path: Path) -> None:
    """As the trainer would have it, were all of the set one step: 12 sentences in batches of 8."""
    smoothing, options = WAYS[way]
    data = sentences(12, seed=3)
    history, seen = watched(tmp_path, data=data, **options)
    for t in range(4):
        expected = loss_of(seen.path[t], [collated(data)], smoothing)
        assert history["loss"][t] == pytest.approx(expected, rel=2e-6)


def test_a_loss_that_is_given_gets_the_collated_batch_with_its_labels(tmp_path: Path) -> None:
    def loss(model: Any, batch: Any) -> Any:
        labels = batch["labels"][:, 1:].flatten()
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, labels), labels.ne(-100).sum()

    history, seen = watched(tmp_path, OwnLoss, each=3, loss=loss)
    for t, batches in enumerate(windows(seen.batches, 3)):
        assert history["loss"][t] == pytest.approx(loss_of(seen.path[t], batches), rel=2e-6)


def test_a_compute_loss_of_one_s_own_is_refused_unless_it_is_said_to_be_the_model_s(
    tmp_path: Path,
) -> None:
    with pytest.raises(so.ArgumentError, match=r"compute_loss of its own.*loss='model'"):
        watched(tmp_path, OwnLoss)
    history, seen = watched(tmp_path, OwnLoss, each=3, loss="model")
    for t, batches in enumerate(windows(seen.batches, 3)):
        assert history["loss"][t] == pytest.approx(loss_of(seen.path[t], batches), rel=2e-6)


def test_an_evaluation_between_micro_batches_leaves_the_rows_as_they_are(tmp_path: Path) -> None:
    class Evaluating(transformers.TrainerCallback):
        trainer: Any = None

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            self.trainer.evaluate()
            self.trainer.model.train()

        on_step_end = on_substep_end

    history, seen = watched(tmp_path, each=3, callbacks=[Evaluating()])
    for t, batches in enumerate(windows(seen.batches, 3)):
        assert history["loss"][t] == pytest.approx(loss_of(seen.path[t], batches), rel=2e-6)


def test_a_sam_step_s_rows_are_of_its_first_pass(tmp_path: Path) -> None:
    """Whichever of the two callbacks comes first: at the perturbed point nothing is taken."""
    from subspace_optim.integrations.transformers import SAMCallback

    for first in (SAMCallback, MonitorCallback):
        made: list[Any] = []

        def attach(trainer: Any, first: Any = first, made: list[Any] = made) -> None:
            if first is SAMCallback:
                SAMCallback(trainer)
            made.append(MonitorCallback(trainer, every=1, measures=MEASURES))
            if first is MonitorCallback:
                SAMCallback(trainer)

        _, seen, _ = trained(
            tmp_path,
            attach=attach,
            steps=2,
            optimizer=lambda m: so.SAM(m.parameters(), lr=0.1, rho=0.5),
            gradient_accumulation_steps=2,
        )
        for t in range(2):
            expected = loss_of(seen.path[t], seen.batches[2 * t : 2 * t + 2])
            assert made[0].monitor.history["loss"][t] == pytest.approx(expected, rel=2e-6)
            assert made[0].monitor.history["examples"][t] == 8
