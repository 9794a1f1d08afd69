"""Pictures of what a monitor recorded. They need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

try:
    from matplotlib.figure import Figure
except ImportError as error:
    _MESSAGE = "pictures need matplotlib: pip install 'subspace_optim[plots]'"
    raise ImportError(_MESSAGE) from error

DOMINANT, BULK = "#0072B2", "#D55E00"
"""Blue and vermillion of Okabe and Ito's palette, which colour-blind readers tell apart."""


def dashboard(history: Mapping[str, Sequence[Any]]) -> Figure:
    """Draws loss, alignment, eigenvalues and effective learning rates over the steps.

    Args:
        history: of a ``Monitor``.

    Returns:
        The figure, 2 by 2 panels.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    ((loss, chi), (eigenvalues, rates)) = figure.subplots(2, 2, sharex=True)
    steps = history["step"]
    loss.plot(steps, history["loss"], color="black")
    loss.set(yscale="log", ylabel="training loss")
    chi.plot(steps, history["chi_gradient"], color=DOMINANT, label="gradient")
    chi.plot(steps, history["chi_update"], color=BULK, linestyle="--", label="update")
    chi.set(ylim=(-0.02, 1.02), ylabel=r"$\chi_k$, fraction in the dominant subspace")
    chi.legend()
    eigenvalues.plot(steps, history["eigenvalues"], color=DOMINANT, linewidth=0.8)
    eigenvalues.set(xlabel="step", ylabel=r"$\lambda_1 \dots \lambda_k$")
    rates.plot(steps, history["dom_lr"], color=DOMINANT, label="Dom-LR")
    rates.plot(steps, history["bulk_lr"], color=BULK, linestyle="--", label="Bulk-LR")
    rates.set(xlabel="step", ylabel="effective learning rate")
    rates.legend()
    for axes in (loss, chi, eigenvalues, rates):
        axes.grid(alpha=0.3)
    return figure
