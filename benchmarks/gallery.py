"""The pictures of the docs: ``python -m benchmarks.gallery`` measures and draws them all.

Everything is measured anew: an MLP (784-200-200-10, tanh) on 5,000 MNIST images, half the squared
error. What several pictures show is measured once. A picture that fails is reported, and the
others are drawn.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from torch import Tensor

import subspace_optim as so
from benchmarks import command
from benchmarks.data import Dataset, DataUnavailableError, load
from benchmarks.experiment import minibatch
from benchmarks.files import alone, replacing
from benchmarks.losses import mse
from benchmarks.models import build
from benchmarks.optimizers import recipes, step_together
from benchmarks.progress import doing, shown
from subspace_optim.diagnostics import plots
from subspace_optim.diagnostics.rows import Measures

History = dict[str, list[Any]]
Drawing = Callable[..., Figure]

_NO_DATE: Final[dict[str, dict[str, None]]] = {
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""Metadata by ending: the same figures give the same file on another day."""


@dataclass
class Run:
    """A training run that was watched.

    Attributes:
        history: of its monitor.
        bases: of each row.
        hessian: at the last parameters.
    """

    history: History
    bases: list[so.EigenBasis]
    hessian: so.HessianOperator


class Measurements:
    """What the pictures show; each run is made when the first picture asks for it.

    Args:
        data: images and their classes.
        rows: recorded of each run, at equal distances.
        seed: of parameters, minibatches and random vectors.
    """

    def __init__(self, data: Dataset, *, rows: int = 20, seed: int = 0) -> None:
        self.data, self.rows, self.seed = data, rows, seed
        self.k = data.num_classes

    @cached_property
    def sgd(self) -> Run:
        """SGD on minibatches of 50, a new basis for each row, and the next k/2 eigenvalues."""
        following = so.measures.next_eigenvalues(self.k // 2)
        return self.train(0.05, following, every=25, batch_size=50, refresh=1)

    @cached_property
    def gd(self) -> Run:
        """Gradient descent at a rate at which the sharpness reaches 2/η."""
        return self.train(0.06, so.measures.next_eigenvalues(self.k // 2), every=20)

    @cached_property
    def edge(self) -> Run:
        """The same, looked at twice as often, with what tells of stability.

        At an odd distance: at its edge gradient descent goes to and fro.
        """
        return self.train(0.06, so.measures.stability(), every=9, rows=2 * self.rows)

    @cached_property
    def rates(self) -> dict[str, History]:
        """Several optimizers on the full gradient, from one start."""
        optimizers = {
            "GD": ("sgd",),
            "GD, momentum 0.9": ("sgd", "sgd.momentum=0.9"),
            "SAM": ("sam",),
            "Adam": ("adam",),
            "Adam, no momentum": ("adam", "adam.betas=(0.0, 0.999)"),
            "Muon + AdamW": ("muon+adamw",),
        }
        rows = (self.rows + 1) // 2
        return {
            name: self.train(0.02, spelling=spelled, every=6, rows=rows).history
            for name, spelled in optimizers.items()
        }

    @cached_property
    def spectrum(self) -> tuple[so.diagnostics.SpectralDensity, Tensor]:
        """The density after the run of SGD, and the eigenvalues that stand out."""
        hessian = self.sgd.hessian
        basis = so.DominantSubspace(hessian, 2 * self.k, refresh=1, seed=self.seed).update()
        count = so.diagnostics.count_outliers(basis.eigenvalues, "ratio").count
        density = so.diagnostics.spectral_density(hessian, probes=8, steps=60, seed=self.seed)
        return density, basis.eigenvalues[:count]

    @cached_property
    def classes(self) -> so.diagnostics.ClassGradientCosines:
        """Class gradients over all examples after the run of SGD, beside the top eigenvectors."""
        hessian, data = self.sgd.hessian, self.data
        gradients = so.ClassGradientSubspace(hessian.model, data.num_classes)
        gradients.observe(data.x_train, data.y_train)
        basis = so.DominantSubspace(hessian, self.k, refresh=1, seed=self.seed).update()
        return so.diagnostics.class_gradient_cosines(gradients.update(), basis)

    def train(
        self,
        lr: float,
        *measures: Measures,
        spelling: Sequence[str] = ("sgd",),
        every: int,
        rows: int | None = None,
        batch_size: int | None = None,
        refresh: Any = "auto",
    ) -> Run:
        """Trains from the start and watches every so many steps.

        Args:
            lr: of SGD and SAM; others have their own.
            measures: what is recorded beside ``measures.dominant()``.
            spelling: the optimizer, or the pair, as ``benchmarks.optimizers.recipes`` takes it, and
                then its options.
            every: as of ``Monitor``.
            rows: recorded (default: as many as of the other runs).
            batch_size: examples a step; ``None``: all.
            refresh: as of ``DominantSubspace``.

        Returns:
            The run.
        """
        x, y = self.data.x_train, self.data.y_train
        model = build("mlp", self.data, num_outputs=self.data.num_classes, seed=self.seed)
        hessian = so.HessianOperator(model, mse, (x, y))
        subspace = so.DominantSubspace(hessian, self.k, refresh=refresh, seed=self.seed)
        recorded = [so.measures.dominant(), *measures]
        (recipe,) = recipes(spelling[:1], spelling[1:]).values()
        optimizers = recipe.build(model.parameters(), lr, subspace, self.k)

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return mse(model(x), y)

        bases = []
        steps = ((rows or self.rows) - 1) * every + 1
        name = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
        with (
            so.Monitor(optimizers, subspace, measures=recorded, every=every) as monitor,
            doing(f"training with {name}", steps) as task,
        ):
            for step in range(steps):
                batch = minibatch(len(x), batch_size or len(x), step, self.seed)
                loss, *_ = step_together(optimizers, partial(loss_of, x[batch], y[batch]))
                task.at(step + 1, f"loss {loss:.4g}")
                if step % every == 0 and subspace.basis is not None:
                    bases.append(subspace.basis)  # of the parameters before the step
        return Run(monitor.history, bases, hessian)


# --- the pictures ------------------------------------------------------------------------------


def _overlap(made: Measurements) -> Drawing:
    matrix = so.diagnostics.overlap_matrix(made.sgd.bases)
    return partial(plots.overlap_heatmap, matrix, made.sgd.history["step"])


def _cosines(made: Measurements) -> Drawing:
    return partial(plots.cosine_matrix, made.classes.cosines, made.classes.assignment)


PICTURES: Final[dict[str, Callable[[Measurements], Drawing]]] = {
    "dashboard": lambda made: partial(plots.dashboard, made.sgd.history),
    "eigenvalue-history": lambda made: partial(plots.eigenvalue_history, made.gd.history),
    "stability": lambda made: partial(plots.stability, made.edge.history),
    "subspace-overlap": _overlap,
    "spectral-density": lambda made: partial(plots.density, *made.spectrum),
    "effective-rates": lambda made: partial(plots.effective_rates, made.rates),
    "class-gradients": _cosines,
}
"""What is measured for a picture, and then drawn in a theme; by the name of its file."""


def draw(
    made: Measurements, names: Sequence[str], folder: Path, formats: Sequence[str]
) -> Iterator[tuple[str, list[Path] | Exception]]:
    """Draws pictures, light and dark, as they are measured.

    Args:
        made: what they show.
        names: keys of ``PICTURES``.
        folder: where ``<name>.<format>`` and ``<name>-dark.<format>`` are written.
        formats: endings that matplotlib knows.

    Yields:
        The name, and its files or what went wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, 1):
        try:
            with doing(name, len(names), unit="picture") as task:
                task.at(number)
                files = _drawn(made, name, folder, formats)
        except Exception as error:  # noqa: BLE001 (whatever it is, the others are drawn)
            yield name, error
        else:
            yield name, files


def _drawn(made: Measurements, name: str, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Measures and draws one picture, and returns its files."""
    drawing = PICTURES[name](made)
    files = []
    for theme, suffix in (("light", ""), ("dark", "-dark")):
        figure = drawing(theme=theme)
        for ending in formats:
            files.append(folder / f"{name}{suffix}.{ending}")
            save(figure, files[-1])
    return files


def save(figure: Figure, path: Path) -> None:
    """Saves a picture, a png with 256 colours: a third of the size, and nothing that is seen."""
    with replacing(path) as partly:
        kind = path.suffix.removeprefix(".")
        figure.savefig(partly, format=kind, metadata=_NO_DATE.get(path.suffix))
        if path.suffix == ".png":
            with Image.open(partly) as image:
                few = image.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
            few.save(partly, format="png", optimize=True)


def main(arguments: list[str] | None = None) -> int:
    """Measures and draws.

    Args:
        arguments: as on the command line.

    Returns:
        0; 1 where a picture is missing; 2 for what cannot be done; 130 where it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gallery",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURE", help=f"of {', '.join(PICTURES)} (default: all)")
    add("--output", type=Path, default=Path("docs/pictures"), help="folder for the files")
    add("--format", nargs="+", choices=("png", "svg", "pdf"), default=["png"])
    add("--data", choices=("mnist-5k", "digits"), default="mnist-5k")
    add("--data-root", help="folder of data sets (default: $SUBSPACE_OPTIM_DATA)")
    add("--rows", type=int, default=20, help="recorded of each run")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    unknown = set(options.pictures) - PICTURES.keys()
    if unknown:
        parser.error(f"no picture {', '.join(sorted(unknown))}: there are {', '.join(PICTURES)}")
    if options.rows < 1:
        parser.error(f"--rows {options.rows}: at least 1")
    try:
        data = load(options.data, root=options.data_root)
    except DataUnavailableError as error:
        parser.error(str(error))

    console = command.console(width=100)
    made = Measurements(data, rows=options.rows, seed=options.seed)
    names = options.pictures or list(PICTURES)

    def work() -> int:
        with alone(options.output / "lock"), shown("gallery", console):
            return _draw_all(made, names, options, console)

    return command.status("gallery", work, kept=f"{options.output} has the pictures before")


def _draw_all(
    made: Measurements, names: Sequence[str], options: argparse.Namespace, console: Console
) -> int:
    """Draws the pictures and says so; returns the exit status."""
    start, failed = time.perf_counter(), 0
    for name, result in draw(made, names, options.output, options.format):
        seconds = f"[{time.perf_counter() - start:.0f} s]"
        if isinstance(result, Exception):
            failed += 1
            console.print(f"{seconds} {name} failed:", style="red", markup=False)
            traceback.print_exception(result)
        else:
            sizes = (f"{path} ({path.stat().st_size / 1000:.0f} kB)" for path in result)
            console.print(f"{seconds} {', '.join(sizes)}", markup=False, highlight=False)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
