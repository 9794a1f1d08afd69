"""The central flow against gradient descent: ``python -m benchmarks.central_flow``.

A tanh MLP (192-50-50-10) learns 1,000 images of CIFAR-10, averaged to 8x8 pixels, with half the
squared error, by gradient descent on all of them. Where its sharpness has come to 95 % of 2/η both
begin: gradient descent, and the flow that is to predict it. The loss is compared in running means
over 50 steps, since the flow predicts means, and so is the sharpness. The error of either is the
mean of |real − predicted| / real over all windows; the largest one is told beside it.

It writes ``results/central-flow.json`` and the picture, light and dark.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import subspace_optim as so
from benchmarks import command
from benchmarks.data import DataUnavailableError, load
from benchmarks.files import alone, write_json
from benchmarks.gallery import save
from benchmarks.losses import mse
from benchmarks.models import drawn, mlp
from benchmarks.progress import doing, shown
from subspace_optim.diagnostics import CentralFlow, central_flow
from subspace_optim.diagnostics.plots import style

WINDOW: Final = 50
"""Steps of a running mean."""
BEGIN: Final = 0.95
"""Of 2/η, the sharpness at which the comparison begins."""
_LOOK: Final = 20
"""Steps between looks at the sharpness before."""
_THEMES: Final[tuple[tuple[style.ThemeName, str], ...]] = (("light", ""), ("dark", "-dark"))
_LATEST: Final = 5000
Array = NDArray[np.float64]


def smoothed(values: Any) -> Array:
    """Returns the means over windows of steps; of all of them, where there are fewer."""
    values = np.asarray(values, dtype=np.float64)
    window = min(WINDOW, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def errors(real: Any, predicted: Any) -> dict[str, float]:
    """Returns the mean and the largest relative error of running means."""
    truth = smoothed(real)
    relative = np.abs(smoothed(predicted) - truth) / np.abs(truth)
    return {"mean": float(relative.mean()), "largest": float(relative.max())}


def images(count: int, root: str | None) -> tuple[Tensor, Tensor]:
    """Returns the first images of CIFAR-10 as 192 standardised numbers each, and their classes."""
    data = load("cifar10-5k", root=root)
    pixels = functional.avg_pool2d(data.x_train[:count], 4).flatten(1)
    return (pixels - pixels.mean(dim=0)) / pixels.std(dim=0), data.y_train[:count]


def measure(
    model: nn.Module, data: tuple[Tensor, Tensor], lr: float, *, steps: int, substeps: int
) -> dict[str, Any]:
    """Trains to the edge, and compares what follows with the flow.

    Args:
        model: is trained.
        data: all that there are.
        lr: η.
        steps: that are compared.
        substeps: of the flow, for each of them.

    Returns:
        The two courses, their errors, and what the flow has cost.

    Raises:
        ValueError: the sharpness did not come to the edge.
    """
    hessian = so.HessianOperator(model, mse, data)
    subspace = so.DominantSubspace(hessian, 2, refresh=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def step() -> float:
        optimizer.zero_grad()
        loss = mse(model(data[0]), data[1])
        loss.backward()
        optimizer.step()
        return loss.item()

    def sharpness() -> float:
        return float(subspace.update().eigenvalues[0])

    with doing("gradient descent to its edge") as task:
        for begun in range(_LATEST):
            if begun % _LOOK == 0:
                found = sharpness()
                task.at(begun, f"sharpness {found * lr / 2:.3f} of 2/lr")
                if found >= BEGIN * 2 / lr:
                    break
            step()
        else:
            raise ValueError(f"The sharpness is {found:.4g} after {_LATEST} steps: raise --lr.")
    products, gradients, cpu = hessian.stats.products, hessian.stats.gradients, time.process_time()
    with doing("the central flow"):
        flow = central_flow(hessian, lr, steps=steps, substeps=substeps)
    cost = {
        "products": hessian.stats.products - products,
        "gradients": hessian.stats.gradients - gradients,
        "cpu_seconds": time.process_time() - cpu,
    }
    losses, sharpnesses = [], []
    with doing("gradient descent at its edge", steps) as task:
        for number in range(steps):
            sharpnesses.append(sharpness())
            losses.append(step())
            task.at(number + 1, f"loss {losses[-1]:.4g}")
    return _compared(flow, losses, sharpnesses) | {"begun": begun, "cost": cost}


def _compared(flow: CentralFlow, losses: list[float], sharpnesses: list[float]) -> dict[str, Any]:
    steps, lr = len(losses), flow.lr
    predicted, bare = flow.predicted_loss[:steps].tolist(), flow.loss[:steps].tolist()
    edge = (flow.variances[:steps].sum(dim=1) > 0).tolist()
    return {
        "lr": lr,
        "window": WINDOW,
        "errors": {
            "loss": errors(losses, predicted),
            "loss without the oscillation": errors(losses, bare),
            "sharpness": errors(sharpnesses, flow.sharpness[:steps].tolist()),
        },
        "steps at the edge": sum(edge),
        "most eigenvalues at the edge": int((flow.variances > 0).sum(dim=1).max()),
        "real": {"loss": losses, "sharpness": sharpnesses},
        "flow": {
            "predicted_loss": predicted,
            "loss": bare,
            "sharpness": flow.sharpness[:steps].tolist(),
            "variances": flow.variances[:steps].tolist(),
        },
    }


def draw(result: dict[str, Any], theme: style.ThemeName = "light") -> Figure:
    """Draws loss, sharpness and the variance of the oscillation, real and predicted."""
    colours = style.theme_of(theme)
    panels = style.panels_of(None, colours, (9.6, 3.0), 1, 3)
    real, flow, lr = result["real"], result["flow"], result["lr"]
    for panel, name in zip(panels, ("loss", "sharpness", "variance"), strict=True):
        style.paint(panel, colours, "step", name if name != "sharpness" else "sharpness · η")
    for panel, name, scale in ((panels[0], "loss", 1.0), (panels[1], "sharpness", lr)):
        values = scale * np.array(real[name])
        means = smoothed(values)
        middle = (len(values) - len(means)) / 2 + np.arange(len(means))
        style.stroke(panel, range(len(values)), values, colours.grid, 0.8)
        style.stroke(panel, middle, means, colours.ink, 1.3, label="gradient descent")
    steps = range(len(real["loss"]))
    dashes = style.LINES["dashed"][0]
    predicted = flow["predicted_loss"]
    style.stroke(panels[0], steps, predicted, colours.dominant, 1.6, label="flow, predicted")
    style.stroke(panels[0], steps, flow["loss"], colours.bulk, 1.2, dashes=dashes, label="L(w)")
    sharpness = lr * np.array(flow["sharpness"])
    style.stroke(panels[1], steps, sharpness, colours.dominant, 1.6, label="flow")
    for column, variances in enumerate(np.array(flow["variances"]).T):
        if variances.any():
            line, _ = list(style.LINES.values())[column % len(style.LINES)]
            label = f"axis {column + 1}"
            style.stroke(
                panels[2], steps, variances, colours.dominant, 1.3, dashes=line, label=label
            )
    for panel in panels:
        style.key(panel, colours)
    style.say(panels[2], colours, "no eigenvalue is at the edge")
    figure: Figure = panels[0].figure.figure
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Measures and draws.

    Args:
        arguments: as on the command line.

    Returns:
        0; 2 for what cannot be run; 130 where it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.central_flow",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lr", type=float, default=0.1)
    add("--width", type=int, default=50)
    add("--steps", type=int, default=500)
    add("--substeps", type=int, default=2, help="of the flow, for each step")
    add("--images", type=int, default=1000)
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="100 images, and 20 steps at a larger rate")
    add("--data-root", help="folder of data sets (default: $SUBSPACE_OPTIM_DATA)")
    add("--results", type=Path, default=Path("results"), help="folder for the figures")
    add("--output", type=Path, default=Path("docs/pictures"), help="folder for the picture")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.steps, options.lr, options.width = 100, 20, 0.3, 20

    def work() -> int:
        x, y = images(options.images, options.data_root)
        model = drawn(options.seed, lambda: mlp(x.shape[1], 10, width=options.width))
        settings = {"steps": options.steps, "substeps": options.substeps}
        with alone(options.results / "central-flow.lock"), shown("central flow", console):
            result = measure(model, (x, y), options.lr, **settings)
            result["settings"] = {
                name: getattr(options, name) for name in ("width", "substeps", "images", "seed")
            }
            write_json(options.results / "central-flow.json", result)
            for theme, suffix in _THEMES:
                save(draw(result, theme), options.output / f"central-flow{suffix}.png")
        for name, error in result["errors"].items():
            console.print(f"{name}: {error['mean']:.2%} on average, {error['largest']:.2%} at most")
        console.print(
            f"{result['steps at the edge']} of {options.steps} steps at the edge, from step "
            f"{result['begun']}; {result['cost']['cpu_seconds']:.0f} s of the processor"
        )
        return 0

    console = command.console(width=100)
    return command.status("central_flow", work, DataUnavailableError, ValueError)


if __name__ == "__main__":
    sys.exit(main())
