"""Rows on their way out: files that outlive a kill, loggers that fail, schedules, NaN."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import subspace_optim as so
from subspace_optim.diagnostics import adam_stability_threshold, sam_edge
from tests.diagnostics.test_monitor import EIGENVALUES, NAMES, assert_table, make, train


def watched(steps: int = 0, **options: Any) -> tuple[so.Monitor, Any]:
    """A monitor of SGD, and what takes a step."""
    model, _, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(
        optimizer,
        subspace,
        measures=[so.measures.dominant(), so.measures.next_eigenvalues(1)],
        **options,
    )

    def step() -> None:
        train(model, optimizer)

    for _ in range(steps):
        step()
    return monitor, step


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# Files.


@pytest.mark.parametrize("kind", [Path, str])
def test_a_row_is_in_its_files_before_the_next_step(tmp_path: Path, kind: Any) -> None:
    paths = [tmp_path / "run.csv", tmp_path / "run.jsonl"]
    monitor, step = watched(log=[kind(path) for path in paths])
    assert paths[0].read_text().strip() == ",".join([*NAMES, *EIGENVALUES])
    for _ in range(3):
        step()
        assert_table(iter(table(paths[0])), monitor.history)
        assert_table(iter(lines(paths[1])), monitor.history)
    monitor.detach()
    step()
    assert len(table(paths[0])) == len(lines(paths[1])) == 3


def test_what_was_written_is_what_to_csv_writes(tmp_path: Path) -> None:
    monitor, _ = watched(4, log=tmp_path / "run.csv")
    monitor.to_csv(tmp_path / "later.csv")
    assert table(tmp_path / "run.csv") == table(tmp_path / "later.csv")


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    """What the monitor has given to its logs; that it does so at each step is seen above."""
    script = """
import os, signal, sys
from subspace_optim.diagnostics.logs import logs
targets = logs(sys.argv[1:], ["step", "loss"], append=False)
for step in range(5):
    for log in targets:
        log({"step": step, "loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = [tmp_path / "run.csv", tmp_path / "run.jsonl"]
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, *map(str, paths)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    ended = subprocess.run(command, cwd=root, env=environment, check=False, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    assert [row["step"] for row in table(paths[0])] == ["0", "1", "2", "3", "4"]
    assert [row["step"] for row in lines(paths[1])] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
def test_a_file_that_is_there_is_not_touched_unless_it_is_to_be_continued(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    first, _ = watched(2, log=path)
    first.detach()
    before = path.read_text()
    with pytest.raises(so.ArgumentError, match=r"a file that is not there yet.* append=True"):
        watched(log=path)
    assert path.read_text() == before
    path.write_text(before + "0,1,")  # a kill in the middle of a row
    monitor, step = watched(log=path, append=True)
    monitor.load_state_dict(first.state_dict())
    step()
    kept = path.read_text().splitlines(keepends=True)
    assert "".join(kept[:-1]) == before  # half a row is none
    rows = table(path) if path.suffix == ".csv" else lines(path)
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    (tmp_path / f"empty{path.suffix}").touch()
    watched(1, log=tmp_path / f"empty{path.suffix}")


def test_a_table_of_other_columns_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("step,loss\n0,1\n")
    with pytest.raises(
        so.ArgumentError, match=r"^log is .*run.csv', but must be a table of the sa"
    ):
        watched(log=path, append=True)
    assert path.read_text() == "step,loss\n0,1\n"


# Loggers.


class Writer:
    """As TensorBoard's: ``add_scalar(tag, scalar_value, global_step)``."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        assert isinstance(global_step, int)
        self.scalars.append((tag, scalar_value, global_step))


def test_a_summary_writer_gets_every_finite_number() -> None:
    writer = Writer()
    monitor, _ = watched(2, log=writer)
    expected = [
        (f"subspace/{name}", value, row["step"])
        for row in monitor.rows()
        for name, value in row.items()
        if name != "step" and math.isfinite(value)
    ]
    assert writer.scalars == expected
    assert ("subspace/loss", monitor.history["loss"][1], 1) in expected


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        monitor, _ = watched(3, log=writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("subspace/loss")]
    assert found == [(t, pytest.approx(loss)) for t, loss in enumerate(monitor.history["loss"])]


def test_a_callable_gets_each_row_as_a_dict() -> None:
    rows: list[dict[str, Any]] = []
    monitor, _ = watched(3, log=rows.append)
    assert str(rows) == str(monitor.rows())
    assert list(rows[0]) == [*NAMES, *EIGENVALUES]


def test_a_log_that_fails_gets_its_rows_later_and_training_goes_on() -> None:
    taken: list[int] = []
    broken = [False]

    def log(row: dict[str, Any]) -> None:
        if broken[0]:
            raise ConnectionError("no route to host")
        taken.append(row["step"])

    other: list[dict[str, Any]] = []
    monitor, step = watched(1, log=[log, other.append])
    broken[0] = True
    with pytest.warns(so.LogWarning, match=r"log.* \(ConnectionError: no route to host\)"):
        step()
    step()  # one warning, until it takes a row again: another would be an error here
    assert taken == [0]
    broken[0] = False
    step()
    assert taken == [0, 1, 2, 3]
    assert [row["step"] for row in other] == monitor.history["step"] == [0, 1, 2, 3]
    broken[0] = True
    with pytest.warns(so.LogWarning):
        step()
    broken[0] = False
    monitor.detach()
    assert taken == [0, 1, 2, 3, 4]


def test_a_row_that_a_log_refuses_does_not_hold_up_the_others() -> None:
    taken: list[int] = []

    def log(row: dict[str, Any]) -> None:
        if row["step"] in (1, 2):
            raise ValueError("Out of range float values are not JSON compliant")
        taken.append(row["step"])

    monitor, step = watched(1, log=log)
    with pytest.warns(so.LogWarning, match=r"ValueError: Out of range.* that it refuses are left"):
        step()
    for _ in range(3):
        step()
    assert taken == [0, 3, 4]
    assert monitor.history["step"] == [0, 1, 2, 3, 4]


def test_files_stay_where_they_are_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    monitor, step = watched(1, log="run.csv")
    monkeypatch.chdir(tmp_path / "other")
    step()
    assert_table(iter(table(tmp_path / "run.csv")), monitor.history)
    (tmp_path / "run.csv").unlink()
    step()  # with its header again
    assert [row["step"] for row in table(tmp_path / "run.csv")] == ["2"]


def test_no_file_is_made_where_another_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(so.ArgumentError, match="no such folder"):
        watched(log=[tmp_path / "a.csv", tmp_path / "no" / "b.csv"])
    assert not (tmp_path / "a.csv").exists()


def test_half_a_row_on_a_full_disk_is_taken_off_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.csv"
    monitor, step = watched(1, log=path)
    whole = path.read_bytes()
    opened = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            self.file.write(text[:5])
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full(opened(self, *a, **k)))
    with pytest.warns(so.LogWarning, match="No space left on device"):
        step()
    monkeypatch.setattr(Path, "open", opened)
    assert path.read_bytes() == whole
    step()
    assert_table(iter(table(path)), monitor.history)


def test_a_folder_that_goes_away_costs_no_row(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    monitor, step = watched(1, log=folder / "run.jsonl")
    folder.rename(tmp_path / "moved")
    with pytest.warns(so.LogWarning, match=r"run.jsonl did not take a row .*FileNotFoundError"):
        step()
    (tmp_path / "moved").rename(folder)
    step()
    assert_table(iter(lines(folder / "run.jsonl")), monitor.history)


def test_an_interrupt_in_a_log_is_no_failure_of_it() -> None:
    def log(_: Any) -> None:
        raise KeyboardInterrupt

    _, step = watched(log=log)
    with pytest.raises(KeyboardInterrupt):
        step()


# Schedules.


def test_recorded_steps_are_those_of_the_schedule() -> None:
    asked: list[int] = []

    def squares(step: int) -> bool:
        asked.append(step)
        return math.isqrt(step) ** 2 == step

    monitor, _ = watched(12, every=squares)
    assert monitor.history["step"] == [0, 1, 4, 9]
    assert asked == list(range(12))


def test_steps_between_rows_count_for_the_refresh() -> None:
    """``refresh=3`` with rows at steps 0, 2 and 3: the basis of step 0 serves until step 2."""
    model, _, subspace = make(refresh=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    monitor = so.Monitor(optimizer, subspace, every=lambda step: step in (0, 2, 3))
    for _ in range(5):
        train(model, optimizer)
    assert [count > 0 for count in monitor.history["products"]] == [True, False, True]


# What does not apply, and what cannot be measured.


def test_what_does_not_apply_is_nan() -> None:
    monitor, _ = watched(1)
    model, _, subspace = make(k=9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    everything = so.Monitor(optimizer, subspace)
    train(model, optimizer)
    assert math.isnan(everything.history["gap"][0])
    for column in ("sam_edge", "adam_threshold", "angle_estimate"):
        assert math.isnan(monitor.history[column][0]), column


def test_the_gap_without_further_eigenvalues_is_that_of_the_last_refresh() -> None:
    """λ_{k+1} is approached from below: the gap is no smaller than the true one."""
    model, _, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = so.Monitor(optimizer, subspace)
    matrix = model.hessian(torch.cat([p.detach().flatten() for p in model.parameters()]))
    train(model, optimizer)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    true = float(values[1] - values[2])
    assert monitor.history["gap"][0] == pytest.approx(true, rel=1e-6)
    assert subspace.gap == monitor.history["gap"][0]


def test_thresholds_and_estimates_are_in_the_rows() -> None:
    model, _, subspace = make()
    optimizer = so.SAM(model.parameters(), lr=0.05, rho=0.1, momentum=0.5)
    auto = so.DominantSubspace(subspace.operator, 2)
    monitor = so.Monitor(optimizer, auto)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    optimizer.step(closure)
    history = monitor.history
    assert history["threshold"] == [pytest.approx(3 / 0.05)]
    edge = sam_edge(history["gradient_norm"][0], 0.05, 0.1, momentum=0.5)
    assert history["sam_edge"] == [pytest.approx(float(edge))]
    assert history["angle_estimate"] == [auto.stats.estimate]


def test_the_threshold_follows_the_schedule_of_the_rate() -> None:
    model, _, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(3):
        train(model, optimizer)
        scheduler.step()
    assert monitor.history["threshold"] == pytest.approx([20, 40, 80])


def test_adam_s_sharpness_is_recorded_from_its_first_state_on() -> None:
    """Against the dense preconditioned Hessian, with the moments that are there before the step."""
    model, _, subspace = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    monitor = so.Monitor(
        optimizer,
        subspace,
        measures=[so.measures.dominant(), so.measures.preconditioned_sharpness()],
    )
    train(model, optimizer)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    states = [optimizer.state[p] for p in model.parameters()]
    scale = torch.cat(
        [(0.1 * ((state["exp_avg_sq"] / 0.001).sqrt() + 1e-8)).flatten() for state in states]
    )
    train(model, optimizer)
    first, second = monitor.history["preconditioned_sharpness"]
    assert math.isnan(first)
    H = model.hessian(theta) / (scale.sqrt()[:, None] * scale.sqrt())
    assert second == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-6)
    assert monitor.history["adam_threshold"] == pytest.approx([adam_stability_threshold(0.02)] * 2)


def test_a_training_that_diverges_is_let_to() -> None:
    """A loss that is not finite makes a row of NaN and a warning, and the step is taken."""
    torch.manual_seed(0)
    data = torch.randn(8, 2), torch.randn(8, 1)
    plain = torch.nn.Linear(2, 1)
    model = copy.deepcopy(plain)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()

    alone = torch.optim.SGD(plain.parameters(), lr=1e12)
    for _ in range(6):
        step(plain, alone)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e12)
    hessian = so.HessianOperator(model, torch.nn.functional.mse_loss, data)
    rows: list[dict[str, Any]] = []
    monitor = so.Monitor(optimizer, so.DominantSubspace(hessian, 1), log=rows.append)
    step(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            step(model, optimizer)
    said = [str(w.message) for w in caught if w.category is so.LogWarning]
    assert said
    assert all("is NaN: The mean loss over the data is" in message for message in said)
    assert monitor.history["step"] == [row["step"] for row in rows] == list(range(6))
    assert math.isfinite(monitor.history["loss"][0])
    assert math.isnan(monitor.history["loss"][-1])
    assert monitor.history["eigenvalues"][-1] == [pytest.approx(math.nan, nan_ok=True)]
    assert not bool(torch.isfinite(plain.weight).any())
    torch.testing.assert_close(model.weight, plain.weight, rtol=0, atol=0, equal_nan=True)


# Checkpoints.


def test_a_state_goes_through_a_file_and_on(tmp_path: Path) -> None:
    monitor, step = watched(3)
    torch.save(monitor.state_dict(), tmp_path / "monitor.pt")
    step()
    other, _ = watched(2)
    other.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    assert str(other.history) == str({c: values[:3] for c, values in monitor.history.items()})


def test_a_state_of_another_k_is_named() -> None:
    monitor, _ = watched(1)
    model, _, subspace = make(k=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    other = so.Monitor(
        optimizer, subspace, measures=[so.measures.dominant(), so.measures.next_eigenvalues(1)]
    )
    train(model, optimizer)
    with pytest.raises(so.ArgumentError, match="of other eigenvalues', but must be 2 in each row"):
        monitor.load_state_dict(other.state_dict())
    assert len(monitor.history["eigenvalues"][0]) == 2


@pytest.mark.parametrize("missing", ["history", "start", "gap"])
def test_a_state_that_is_no_monitor_s_is_named(missing: str) -> None:
    monitor, _ = watched(1)
    before = str(monitor.history)
    state = monitor.state_dict()
    state.pop(missing, None)
    state.get("history", {}).pop(missing, None)
    with pytest.raises(so.ArgumentError, match=f"the loaded state is 'without .*{missing}"):
        monitor.load_state_dict(state)
    assert str(monitor.history) == before


def test_what_a_user_hands_over_is_called_with_gradients_on() -> None:
    """A log may evaluate, and a schedule too."""
    enabled = []

    def note(_: Any) -> bool:
        enabled.append(torch.is_grad_enabled())
        return True

    watched(2, every=note, log=note)
    assert enabled == [True] * 4
