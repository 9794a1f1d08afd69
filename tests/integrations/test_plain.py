"""``Monitor`` in a loop of one's own under autocast, against the same loop without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so

torch.manual_seed(0)
X, Y = torch.randn(48, 5), torch.randint(3, (48,))
ce = nn.CrossEntropyLoss()


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def trained(
    *, watched: bool, each: int = 1, around: bool = False
) -> tuple[list[list[torch.Tensor]], Any]:
    """An epoch of AdamW in bf16, with clipping; the step too is under autocast, or is not."""
    model, batch = network(), so.CurrentBatch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    monitor = so.Monitor(optimizer, so.HessianOperator(model, ce, batch)) if watched else None

    def parameters() -> list[torch.Tensor]:
        return [p.detach().clone() for p in model.parameters()]

    path = [parameters()]
    for index in range(6):
        x, y = X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]
        batch.add(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            loss = ce(model(x), y) / each
        loss.backward()
        if (index + 1) % each == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                optimizer.step()
            optimizer.zero_grad()
            path.append(parameters())
    return path, monitor


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("each", [1, 3])
def test_the_training_is_the_same_and_the_rows_are_of_what_was_trained_on(
    each: int, around: bool
) -> None:
    plain, _ = trained(watched=False, each=each, around=around)
    seen, monitor = trained(watched=True, each=each, around=around)
    for before, after in zip(plain, seen, strict=True):
        assert all(map(torch.equal, before, after))
    model, history = network(), monitor.history
    assert history["step"] == list(range(6 // each))

    def loss(t: int, at: int) -> float:
        with torch.no_grad():
            for p, value in zip(model.parameters(), seen[at], strict=True):
                p.copy_(value)
            part = slice(8 * t * each, 8 * (t + 1) * each)
            return float(ce(model(X[part]).double(), Y[part]))

    for t in history["step"]:
        expected = loss(t, t + 1) - loss(t, t)  # in float32, whatever the training computes in
        assert history["actual_change"][t] == pytest.approx(expected, rel=1e-4, abs=2e-6)
