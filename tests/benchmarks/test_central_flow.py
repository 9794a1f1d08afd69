"""The comparison of the central flow with gradient descent, on a problem of seconds."""

import numpy as np
import pytest
import torch

import subspace_optim as so
from benchmarks import central_flow
from benchmarks.losses import mse
from benchmarks.models import drawn, mlp


def test_errors_are_of_running_means():
    steps = np.arange(120)
    swinging = 2.0 + (-1.0) ** steps
    assert central_flow.smoothed(swinging) == pytest.approx(np.full(71, 2.0))
    assert central_flow.smoothed([1.0, 2.0]) == pytest.approx([1.5])
    found = central_flow.errors(swinging, np.full(120, 2.2))
    assert found == pytest.approx({"mean": 0.1, "largest": 0.1})
    rising = central_flow.errors(np.ones(120), 1.0 + steps)
    assert rising == pytest.approx({"mean": 59.5, "largest": 94.5})


@pytest.fixture(scope="module")
def result():
    """A rate at which the network is at the edge where it begins."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 6, generator=generator), torch.arange(20) % 3
    model = drawn(0, lambda: mlp(6, 3, width=5))
    hessian = so.HessianOperator(model, mse, (x, y))
    sharpness = float(so.DominantSubspace(hessian, 1, refresh=1).update().eigenvalues[0])
    return central_flow.measure(model, (x, y), 1.95 / sharpness, steps=4, substeps=2)


def test_what_is_compared(result):
    assert result["begun"] == 0
    assert len(result["real"]["loss"]) == len(result["flow"]["loss"]) == 4
    # Both begin at the same place.
    for name in ("loss", "sharpness"):
        assert result["real"][name][0] == pytest.approx(result["flow"][name][0], rel=1e-3)
    real, predicted = np.mean(result["real"]["loss"]), np.mean(result["flow"]["predicted_loss"])
    assert result["errors"]["loss"]["mean"] == pytest.approx(abs(predicted / real - 1))
    assert result["cost"]["products"] > 8


def test_the_picture_in_both_themes(result, tmp_path):
    files = []
    for theme in ("light", "dark"):
        files.append(tmp_path / f"{theme}.png")
        central_flow.save(central_flow.draw(result, theme), files[-1])
    light, dark = (file.read_bytes() for file in files)
    assert light.startswith(b"\x89PNG")
    assert light != dark


def test_without_an_edge_there_is_no_comparison(monkeypatch):
    monkeypatch.setattr(central_flow, "_LATEST", 1)
    x, y = torch.ones(3, 6), torch.arange(3)
    with pytest.raises(ValueError, match="after 1 steps: raise --lr"):
        central_flow.measure(mlp(6, 3, width=5), (x, y), 1e-6, steps=1, substeps=2)
