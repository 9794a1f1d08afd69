"""The dashboard shows what the monitor recorded, under names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import subspace_optim as so
from tests.optim.naive import DenseOperator, Quartic


def recorded(steps: int = 4, k: int = 3) -> so.Monitor:
    model = Quartic()
    model.b.mul_(0.01)  # with c > 0 and a shift, the loss is positive along the path
    subspace = so.DominantSubspace(DenseOperator(model), k)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return monitor


def test_each_panel_shows_its_columns() -> None:
    monitor = recorded()
    history = monitor.history
    assert min(history["loss"]) > 0
    panels = monitor.plot().axes
    shown = [[line.get_ydata() for line in axes.get_lines()] for axes in panels]
    expected: list[list[Any]] = [
        [history["loss"]],
        [history["chi_gradient"], history["chi_update"]],
        [list(column) for column in zip(*history["eigenvalues"], strict=True)],
        [history["dom_lr"], history["bulk_lr"]],
    ]
    for lines, columns in zip(shown, expected, strict=True):
        assert len(lines) == len(columns)
        for line, column in zip(lines, columns, strict=True):
            np.testing.assert_array_equal(line, column)
    for axes in panels:
        assert axes.get_ylabel()
        for line in axes.get_lines():
            np.testing.assert_array_equal(line.get_xdata(), history["step"])
    assert [axes.get_xlabel() for axes in panels] == ["", "", "step", "step"]
    legends = [axes.get_legend() for axes in panels]
    names = [[text.get_text() for text in legend.get_texts()] for legend in legends if legend]
    assert names == [["gradient", "update"], ["Dom-LR", "Bulk-LR"]]


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG\r\n"), ("pdf", b"%PDF")])
def test_the_ending_chooses_the_format(tmp_path: Path, ending: str, magic: bytes) -> None:
    path = tmp_path / f"run.{ending}"
    recorded().plot(path)
    assert path.read_bytes().startswith(magic)
    recorded().plot(str(path))
    assert path.read_bytes().startswith(magic)


@pytest.mark.parametrize(("steps", "k"), [(0, 3), (1, 3), (3, 9), (3, 1)])
def test_short_histories_and_missing_rates_can_be_drawn(tmp_path: Path, steps: int, k: int) -> None:
    """No row; one row; k = P, where every Bulk-LR is NaN; a single eigenvalue."""
    path = tmp_path / "run.png"
    recorded(steps, k).plot(path)
    assert path.stat().st_size > 1000


def test_without_matplotlib_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor = recorded(1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "subspace_optim.diagnostics.plots", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'subspace_optim\[plots\]'"):
        monitor.plot()
