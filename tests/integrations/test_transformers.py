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
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
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


class Interrupting(transformers.Trainer):
    """Raises at one of its micro-batches; those of SAM's second passes count."""

    at = 0
    seen = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("at", [3, 5])
def test_a_sam_step_that_is_interrupted_leaves_nothing_behind(at: int, tmp_path: Path) -> None:
    """Of two micro-batches a step: in the second pass, and before it; then it trains on."""

    def prepared(folder: Path, at: int) -> tuple[Any, Recorder]:
        model = llama()
        recorder = Recorder(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        optimizer = so.SAM(model.parameters(), lr=0.1, rho=0.5)
        trainer = Interrupting(
            model,
            arguments,
            train_dataset=sentences(),
            callbacks=[recorder],
            optimizers=(optimizer, None),
        )
        SAMCallback(trainer)
        trainer.at = at
        return trainer, recorder

    trainer, recorder = prepared(tmp_path / "interrupted", at)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = recorder.path[-1] if at == 3 else [p.detach() for p in llama().parameters()]
    if at == 3:  # nothing has moved
        assert all(map(torch.equal, trainer.model.parameters(), before))
    other, _ = prepared(tmp_path / "whole", 0)
    trainer.model.load_state_dict(other.model.state_dict())
    trainer.model.zero_grad()
    trainer.train()
    other.train()
    assert all(map(torch.equal, trainer.model.parameters(), other.model.parameters()))


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_sam_under_a_scaler_steps_as_without_one_and_skips_what_overflows(
    clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is a power of two: in float32 nothing is lost. The first one is too large.

    The scaler is there and is asked to unscale as under fp16, which a CPU does not train in.
    """

    class Scaling(transformers.TrainerCallback):
        trainer: Any = None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            accelerator = self.trainer.accelerator
            monkeypatch.setattr(accelerator, "native_amp", True)
            monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")

    def run(scale: float | None) -> tuple[list[torch.Tensor], Recorder, Any]:
        def attach(trainer: Any) -> SAMCallback:
            if scale is not None:
                trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
                scaling = Scaling()
                scaling.trainer = trainer
                trainer.add_callback(scaling)
            return SAMCallback(trainer)

        model = llama()
        trainer, recorder, _ = trained(
            tmp_path / f"{scale}",
            model=model,
            attach=attach,
            optimizer=lambda m: so.SAM(m.parameters(), lr=0.1, rho=0.05),
            steps=3,
            max_grad_norm=clip,
            lr_scheduler_type="constant",
        )
        monkeypatch.undo()
        return [p.detach() for p in model.parameters()], recorder, trainer

    plain, _, _ = run(None)
    scaled, _, trainer = run(2.0**10)
    for p, q in zip(plain, scaled, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert trainer.accelerator.scaler.get_scale() == 2.0**10

    _, recorder, trainer = run(2.0**127)  # the gradients of the first pass are infinite, and so on
    first, second = recorder.path[:2]
    assert all(map(torch.equal, first, second))
    assert trainer.accelerator.scaler.get_scale() < 2.0**127


def test_what_is_no_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(so.ArgumentError, match=r"write MonitorCallback\(trainer, every=50\)"):
        MonitorCallback(llama())
    for kind in (MonitorCallback, SAMCallback):
        with pytest.raises(so.ArgumentError, match=r"^trainer is 'left out', but must be a trans"):
            kind()
    with pytest.raises(so.ArgumentError, match=r"^data is 'given beside a source'"):
        trained(tmp_path, attach=lambda t: MonitorCallback(t, of_all, data=sentences()))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"k": 0}, r"^k is 0, but must be an integer of at least 1"),
    "a fraction": ({"k": 2.5}, r"^k is 2\.5, but must be an integer"),
    "folder": ({"log": "missing/run.csv"}, r"^log is 'missing/run\.csv \(no such folder\)'"),
    "params": ({"params": 3}, r"^params is 3, but must be a pattern of names"),
    "one of params": ({"params": ["*.mlp.*", 3]}, r"^params\[1\] is 3, but must be a tensor or"),
    "every": ({"every": 0}, r"^every is 0, but must be an integer of at least 1"),
    "measures": ({"measures": so.measures.stability}, r"Call the function: measures\.stability"),
    "loss": ({"loss": "models"}, r"^loss is 'models', but must be a function of the model and"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_be_checked_is_before_the_training_begins(what: str, tmp_path: Path) -> None:
    options, message = REFUSED[what]
    with pytest.raises(so.ArgumentError, match=message):
        trained(tmp_path, attach=lambda t: MonitorCallback(t, **options), steps=0)


def test_sharded_models_are_refused(tmp_path: Path) -> None:
    trainer, _, callback = trained(tmp_path, attach=MonitorCallback, steps=1)
    for way in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        setattr(trainer, way, True)
        with pytest.raises(so.ArgumentError, match="sharded by FSDP or DeepSpeed"):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        setattr(trainer, way, False)


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


def test_rows_are_not_printed_and_go_to_all_other_callbacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got: list[dict[str, float]] = []

    class Logger(transformers.TrainerCallback):
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            got.append(dict(logs))

    def attach(trainer: Any) -> MonitorCallback:
        trainer.add_callback(Logger())
        return MonitorCallback(trainer, every=2)

    trained(tmp_path, attach=attach)
    printed = capsys.readouterr().out
    assert "'loss'" in printed
    assert "subspace/" not in printed
    rows = [logs for logs in got if "subspace/actual_change" in logs]
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 16, 3 / 16, 5 / 16])


def test_a_second_training_adds_to_the_log_of_the_first(tmp_path: Path) -> None:
    log = tmp_path / "run.csv"
    trainer, _, callback = trained(
        tmp_path, attach=lambda t: MonitorCallback(t, every=1, log=log), steps=3
    )
    trainer.train()
    rows = log.read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", "0", "1", "2", "0", "1", "2"]
    assert callback.monitor.history["step"] == [0, 1, 2]
    with pytest.raises(so.ArgumentError, match="append=True to add the rows"):
        trained(tmp_path, attach=lambda t: MonitorCallback(t, every=1, log=log), steps=1)
    trained(tmp_path, attach=lambda t: MonitorCallback(t, every=1, log=log, append=True), steps=1)
    assert len(log.read_text().splitlines()) == 8


def test_two_callbacks_have_states_of_their_own(tmp_path: Path) -> None:
    def attach(trainer: Any) -> tuple[MonitorCallback, MonitorCallback]:
        fixed = MonitorCallback(trainer, every=2, k=2, data=sentences(8, seed=3))
        return MonitorCallback(trainer, every=1), fixed

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    _, _, whole = trained(tmp_path / "whole", attach=attach, **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    _, _, resumed = trained(tmp_path / "new", attach=attach, resume=checkpoint, **options)
    for one, other in zip(whole, resumed, strict=True):
        same = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(one.monitor.history, other.monitor.history, **same)
    assert [len(each.monitor.history["step"]) for each in resumed] == [6, 3]


def test_the_callback_of_another_trainer_is_refused(tmp_path: Path) -> None:
    _, _, callback = trained(tmp_path, attach=lambda t: MonitorCallback(t, every=1), steps=1)
    with pytest.raises(so.ArgumentError, match=r"the callback is 'of another trainer'"):
        trained(tmp_path, attach=lambda t: t.add_callback(callback))


def test_an_optimizer_that_is_exchanged_is_told_of(tmp_path: Path) -> None:
    class Exchanging(transformers.TrainerCallback):
        trainer: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                other = torch.optim.SGD(self.trainer.model.parameters(), lr=0.1)
                self.trainer.optimizer = self.trainer.accelerator.prepare(other)

    def attach(trainer: Any) -> MonitorCallback:
        exchanging = Exchanging()
        exchanging.trainer = trainer
        trainer.add_callback(exchanging)
        return MonitorCallback(trainer, every=1)

    with pytest.warns(so.UnseenStepsWarning, match="^The trainer has exchanged its optimizer"):
        _, _, callback = trained(tmp_path, attach=attach)
    assert callback.monitor.history["step"] == [0, 1]


def test_a_training_that_breaks_off_loses_no_row_and_leaves_none_to_the_next(
    tmp_path: Path,
) -> None:
    class Breaking(transformers.TrainerCallback):
        broken = False

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3 and not self.broken:
                self.broken = True
                raise KeyboardInterrupt

    log, made = tmp_path / "run.csv", list[Any]()

    def attach(trainer: Any) -> None:
        trainer.add_callback(Breaking())
        made.extend([trainer, MonitorCallback(trainer, every=1, log=log)])

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, attach=attach)
    trainer, callback = made
    first = callback.monitor
    assert first.history["step"] == [0, 1, 2]
    assert len(log.read_text().splitlines()) == 4
    trainer.train()
    logged = [e["step"] for e in trainer.state.log_history if "subspace/actual_change" in e]
    assert logged == list(range(1, 7))
    assert first.history["step"] == [0, 1, 2]
    assert callback.monitor.history["step"] == list(range(6))
