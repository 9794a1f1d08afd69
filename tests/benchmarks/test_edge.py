"""Phenomena of the edge of stability: what is measured of a run, and the command in miniature."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import edge
from benchmarks.data import Dataset
from benchmarks.edge import RUNS, measure, shares
from benchmarks.experiment import minibatch
from benchmarks.losses import mse
from benchmarks.models import drawn, mlp
from tests.dense import dense_curvature, supervised


def small():
    return drawn(0, lambda: mlp(4, 3, width=3))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 4, generator=generator), torch.arange(20) % 3


def test_shares_are_of_the_last_third():
    columns = {
        "sharpness": [9.0, 9.0, 9.0, 9.0, 1.0, 2.0],
        "batch_sharpness": [9.0, 9.0, 9.0, 9.0, 3.0, 5.0],
        "threshold": [1.0, 1.0, 1.0, 1.0, 2.0, 4.0],
    }
    assert shares(columns, "threshold") == {
        "sharpness": {"mean": 0.5, "lowest": 0.5, "highest": 0.5},
        "batch_sharpness": {"mean": 1.375, "lowest": 1.25, "highest": 1.5},
    }
    one = {"sharpness": [3.0], "threshold": [2.0]}
    assert shares(one, "threshold")["sharpness"]["mean"] == 1.5


def test_the_first_row_is_that_of_the_dense_hessian(data):
    found = measure(replace(RUNS["gd"], steps=1), small(), data)["columns"]
    dense = dense_curvature(small(), supervised(mse), [data])
    assert found["loss"] == pytest.approx([dense.loss], rel=1e-4)
    top = torch.linalg.eigvalsh(dense.hessian)[-1].item()
    assert found["sharpness"] == pytest.approx([top], rel=1e-3)
    g = dense.gradient
    curvature = (g @ dense.hessian @ g / (g @ g)).item()
    assert found["batch_sharpness"] == pytest.approx([curvature], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        ("gd", 2 / 0.02),
        ("sgd-16", 2 / 0.05),
        ("momentum-16", 2 * 0.1 / 0.005),
        ("momentum-500", 2 * 1.9 / 0.03),
        ("adam", 38 / 3e-4),
    ],
)
def test_each_run_is_held_against_its_threshold(name, threshold, data):
    run = replace(RUNS[name], steps=7)
    model, own = small(), small()
    found = measure(run, model, data, rows=3)
    assert found["threshold"] == pytest.approx(threshold)
    assert found["columns"]["step"] == [0, 3, 6]
    assert found["batch_size"] == min(run.batch_size or 20, 20)
    assert set(found["shares"]) == {"sharpness", edge_column(name)}
    last, sharpness = found["shares"][run.held]["mean"], found["columns"][run.held][-1]
    assert last == pytest.approx(sharpness / threshold)
    # A monitor changes nothing: these are the parameters of a loop of one's own.
    optimizer = run.optimizer(own.parameters())
    for step in range(7):
        rows = minibatch(20, run.batch_size or 20, step, 0)
        optimizer.zero_grad()
        mse(own(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def edge_column(name):
    return "preconditioned_sharpness" if name == "adam" else "batch_sharpness"


@pytest.mark.slow
def test_the_quick_run_writes_figures_and_pictures(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edge, "images", lambda count, root: data)
    output = tmp_path / "edge.json"
    arguments = ["--quick", "--output", str(output), "--pictures", str(tmp_path)]
    assert edge.main(arguments) == 0
    written = json.loads(output.read_text())
    assert list(written["runs"]) == list(RUNS)
    assert written["settings"] == {"images": 60, "width": 10, "seed": 0, "quick": True}
    light, dark = ((tmp_path / f"edge{suffix}.png").read_bytes() for suffix in ("", "-dark"))
    assert light.startswith(b"\x89PNG")
    assert light != dark
    printed = capsys.readouterr().out
    assert all(run.title in printed for run in RUNS.values())


def test_images_are_standardised(monkeypatch):
    x = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = Dataset("cifar10-5k", x, torch.arange(9), None, None, 10, "nine")
    monkeypatch.setattr(edge, "load", lambda name, root: found)
    pixels, labels = edge.images(5, None)
    assert pixels.shape == (5, 3072)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert pixels.mean(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(pixels.std(dim=0), torch.ones(3072), rtol=1e-4, atol=0)


def test_some_runs_alone_and_none_that_is_unknown(data, tmp_path, monkeypatch):
    monkeypatch.setattr(edge, "images", lambda count, root: data)
    monkeypatch.setattr(edge, "save", lambda figure, path: None)
    output = tmp_path / "edge.json"
    options = ["--quick", "--output", str(output), "--pictures", str(tmp_path)]
    assert edge.main([*options, "--runs", "adam"]) == 0
    assert list(json.loads(output.read_text())["runs"]) == ["adam"]
    with pytest.raises(SystemExit) as stopped:
        edge.main([*options, "--runs", "lion"])
    assert stopped.value.code == 2
