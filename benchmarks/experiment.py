"""The critical experiment of `song_2024` (sections 3.2 and 3.3), as a function.

SGD trains until its gradient lies in the dominant subspace; from that one state every optimizer
goes on by itself, over the same minibatches. All of it can be interrupted between two steps and
taken up again, to the same end.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import subspace_optim as so
from benchmarks.files import first_line
from benchmarks.losses import accuracy
from benchmarks.optimizers import BUILT_IN, PAPERS, Recipe, recipes, step_together
from subspace_optim._validation import check_integer, check_number
from subspace_optim.curvature.contexts import in_mode, seeded
from subspace_optim.linalg import EigenBasis, top_eigenpairs
from subspace_optim.subspaces import DominantSubspace, EveryNSteps
from subspace_optim.subspaces.eigenpairs import TopPairs

WARMUP = "warmup"
OptimizerFactory = Callable[
    [Iterable[Tensor], float, DominantSubspace], Optimizer | Sequence[Optimizer]
]
OPTIMIZERS: dict[str, Recipe] = dict(BUILT_IN)
_OF_RANDOM = 10
"""Steps that random directions serve for where the basis has to tell how stale it is."""


@dataclass(frozen=True)
class Settings:
    """What the experiment does, apart from model, loss, data and optimizers.

    Attributes:
        k: dimension of the subspace.
        lr: the constant learning rate of SGD before the switch, and of all optimizers after it
            that have no default of their own.
        batch_size: examples a minibatch.
        replacement: minibatches are drawn with replacement, not of shuffled epochs.
        steps: steps of each branch.
        switch_at: the step to branch at; ``None``: where the average of χ_k reaches
            ``switch_chi``, and at ``last_switch`` at the latest.
        switch_chi: as the paper has it.
        last_switch: as above.
        average: the factor of the exponential moving average over the measured values. It starts at
            0: a gradient that is dominant at random parameters is no reason to switch.
        warmup_measure: measure every so many steps before the switch.
        warmup_refresh: renew the basis after so many steps before the switch.
        measure: measure every so many steps of a branch.
        refresh: renew the basis after so many steps of a branch; ``"auto"`` keeps it for as long
            as it serves (random directions for 10 steps).
        spectrum: compute the top 2k eigenvalues of SGD every so many steps (0: never).
        tol: relative residual of the eigenpairs.
        chunk: examples at a time, in passes over all data; ``None``: all at once. A convolutional
            network on a CPU is faster in chunks of 50 to 100, and takes less memory.
        seed: of minibatches and random subspaces.
        control: ``"random"`` puts a random subspace in the place of the dominant one.
    """

    k: int
    lr: float = 0.01
    batch_size: int = 50
    replacement: bool = False
    steps: int = 400
    switch_at: int | None = None
    switch_chi: float = 0.95
    last_switch: int = 2000
    average: float = 0.9
    warmup_measure: int = 50
    warmup_refresh: int = 1
    measure: int = 20
    refresh: int | Literal["auto"] = 20
    spectrum: int = 200
    tol: float = 1e-3
    chunk: int | None = None
    seed: int = 0
    control: str | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "tol"):
            check_number(name, getattr(self, name), exclusive=True)
        for name in ("switch_chi", "average"):
            check_number(name, getattr(self, name))
        if self.control not in (None, "random"):
            raise so.ArgumentError("control", self.control, "'random' or None")
        for name in ("k", "batch_size", "steps", "warmup_measure", "warmup_refresh", "measure"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("last_switch", "spectrum", "seed"):
            check_integer(name, getattr(self, name), minimum=0)
        if self.refresh != "auto":
            check_integer("refresh", self.refresh, minimum=1, remedy="Or 'auto'.")
        if self.switch_at is not None:
            check_integer("switch_at", self.switch_at, minimum=0)
        if self.chunk is not None:
            check_integer("chunk", self.chunk, minimum=1)


@dataclass
class Branch:
    """What one optimizer did after the switch.

    Losses (in the model's mode) and accuracies (in eval mode) are over all the data; targets that
    are no classes have no accuracy. The distance is from the switch. ``options`` are those of each
    of its optimizers, as its first group has them; ``stopped`` says why it did not take all steps.
    """

    steps: int = 0
    seconds: float = 0.0
    products: int = 0
    distance: float = float("nan")
    train_loss: float = float("nan")
    train_accuracy: float | None = None
    test_accuracy: float | None = None
    options: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""


@dataclass
class Comparison:
    """The result, and while it is being made, the progress.

    Attributes:
        settings: as given.
        rows: what was measured, in order: the columns of ``Monitor``, and ``phase``, ``step``
            (from the start of training), ``chi_average`` and ``next_eigenvalues``.
        switch_step: where the branches begin; ``None`` before.
        switch_reason: why there, in words.
        switch_loss: the training loss there.
        branches: by the name of the optimizer.
        finished: nothing is left to do.
    """

    settings: Settings
    rows: list[dict[str, Any]] = field(default_factory=list)
    switch_step: int | None = None
    switch_reason: str = ""
    switch_loss: float = float("nan")
    branches: dict[str, Branch] = field(default_factory=dict)
    finished: bool = False

    def of(self, phase: str) -> list[dict[str, Any]]:
        """Returns the rows of one phase: ``"warmup"`` or an optimizer's name."""
        return [row for row in self.rows if row["phase"] == phase]


class RandomDirections(EveryNSteps):
    """The control: random directions in the place of eigenvectors, redrawn at every refresh."""

    def solve(self) -> None:
        """Draws new directions, with the Rayleigh-Ritz values of the operator in their span."""
        operator = self.operator
        generator = torch.Generator().manual_seed(self.seed + 1000 * self.stats.refreshes)
        directions = torch.randn(operator.size, self.k, generator=generator)
        frame = torch.linalg.qr(directions.to(operator.device, operator.dtype)).Q.T.contiguous()
        products = operator.matmat(frame)
        values, rotation = torch.linalg.eigh(frame @ products.T)
        order = rotation.flip(1).T
        vectors, images = order @ frame, order @ products
        residuals = torch.linalg.vector_norm(images - values.flip(0)[:, None] * vectors, dim=1)
        none = EigenBasis(*(tensor[:0] for tensor in (values, vectors, residuals)))
        self.settle(TopPairs(EigenBasis(values.flip(0), vectors, residuals), none, 0.0, 0.0))


def minibatch(examples: int, size: int, step: int, seed: int, replacement: bool = False) -> Tensor:
    """Returns the indices of the minibatch of ``step``, a function of the seed and the step.

    They are of shuffled epochs; or drawn with replacement, each example by itself.
    """
    size = min(size, examples)
    generator = torch.Generator()
    if replacement:
        generator.manual_seed(seed * 1_000_003 + step)
        return torch.randint(examples, (size,), generator=generator)
    per_epoch = examples // size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(examples, generator=generator.manual_seed(seed * 1_000_003 + epoch))
    return order[position * size : (position + 1) * size]


def _accuracy(output: Tensor, target: Tensor) -> float | None:
    classes = target.dim() == 1 and not target.is_floating_point()
    return accuracy(output, target) if classes else None


def _options(optimizer: Optimizer) -> dict[str, Any]:
    """The options of the first group that a summary can hold."""
    plain = (bool, int, float, str, tuple, type(None))
    group = optimizer.param_groups[0]
    return {name: value for name, value in group.items() if isinstance(value, plain)}


class _Experiment:
    """The state between two steps; ``state_dict`` is all that a resumed run needs."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        data: tuple[Tensor, Tensor],
        optimizers: Mapping[str, OptimizerFactory | Recipe],
        settings: Settings,
        test_data: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.model, self.loss_fn, self.settings = model, loss_fn, settings
        device = next(model.parameters()).device
        self.x, self.y = (t.to(device) for t in data)
        self.test = None if test_data is None else tuple(t.to(device) for t in test_data)
        self.optimizers = optimizers
        size = settings.chunk or len(self.x)
        chunks = list(zip(self.x.split(size), self.y.split(size), strict=True))
        self.operator = so.HessianOperator(model, loss_fn, chunks)
        self.result = Comparison(settings)
        self.switch_model: dict[str, Tensor] = {}
        self.classes = self._number_of_classes()
        self.begin(WARMUP)
        for recipe in optimizers.values():  # what cannot be made is told before anything runs
            if isinstance(recipe, Recipe):
                self._made(recipe)

    def begin(self, phase: str) -> None:
        """Sets up a phase at the present parameters."""
        settings = self.settings
        warm = phase == WARMUP
        control = settings.control == "random"
        refresh: Any = settings.warmup_refresh if warm else settings.refresh
        if control:
            refresh = RandomDirections(_OF_RANDOM if refresh == "auto" else refresh)
        self.phase = phase
        self.step = 0 if warm else self.result.switch_step or 0
        self.subspace = DominantSubspace(
            self.operator, settings.k, refresh=refresh, tol=settings.tol, seed=settings.seed
        )
        self.trained = self._made(BUILT_IN["SGD"] if warm else self.optimizers[phase])
        self.options = [_options(each) for each in self.trained]  # loading a state adds to them
        inner = [getattr(each, "subspace", None) for each in self.trained]
        self.observers = [each for each in inner if isinstance(each, so.ClassGradientSubspace)]
        every = settings.warmup_measure if warm else settings.measure
        self.monitor = so.Monitor(self.trained, self.subspace, every=every)
        before = self.result.of(WARMUP)  # a branch goes on with the average at the switch
        self.average: float = before[-1]["chi_average"] if before else 0.0
        self.seconds = 0.0
        self.stopped = ""

    def _made(self, make: OptimizerFactory | Recipe) -> list[Optimizer]:
        """Returns new optimizers at the present parameters; they step one after the other."""
        params, lr = self.model.parameters(), self.settings.lr
        if isinstance(make, Recipe):
            return make.build(params, lr, self.subspace, self.classes)
        made = make(params, lr, self.subspace)
        return [made] if isinstance(made, Optimizer) else list(made)

    def _number_of_classes(self) -> int | None:
        """C of outputs ``(N, C)`` and targets that are classes; ``None`` of others."""
        if self.y.dim() != 1 or self.y.is_floating_point():
            return None
        with torch.no_grad(), in_mode(self.model, "eval"):
            output = self.model(self.x[: self.settings.batch_size])
        return output.shape[1] if output.dim() == 2 else None

    def advance(self) -> bool:
        """Takes one training step; returns whether it was measured.

        Raises:
            NonFiniteError: SGD diverged before the switch. Later, it ends the branch.
        """
        start = time.perf_counter()
        settings = self.settings
        batch = minibatch(
            len(self.x), settings.batch_size, self.step, settings.seed, settings.replacement
        ).to(self.x.device)
        next_eigenvalues = self._next_eigenvalues()
        recorded = len(self.monitor.history["step"])
        try:
            self._train(batch)
        except so.NonFiniteError as error:
            if self.phase == WARMUP:
                raise
            self.stopped = f"step {self.step}: {error}"
        measured = len(self.monitor.history["step"]) > recorded
        if measured:
            self._add_row(next_eigenvalues)
        self.step += 1
        self.seconds += time.perf_counter() - start
        return measured

    def _train(self, batch: Tensor) -> None:
        """Lets the optimizers take a step on a minibatch.

        Raises:
            NonFiniteError: its loss is not finite.
        """
        x, y, seed = self.x[batch], self.y[batch], self.settings.seed + self.step

        def loss() -> Tensor:
            # Dropout draws the same in every branch, in each evaluation of a step, and in a run
            # that was taken up again.
            with seeded(self.x.device, seed):
                return self.loss_fn(self.model(x), y)

        with seeded(self.x.device, seed):
            for observer in self.observers:
                observer.observe(x, y)
            losses = step_together(self.trained, loss)
        if not all(math.isfinite(float(loss)) for loss in losses):
            raise so.NonFiniteError(
                "The loss of the minibatch is not finite. Lower the learning rate."
            )

    def _next_eigenvalues(self) -> list[float]:
        """Eigenvalues k + 1 to 2k along SGD, in the steps that ask for them."""
        settings, k = self.settings, self.settings.k
        # Counted as the measured steps are, from the beginning of the phase.
        done = self.step - (0 if self.phase == WARMUP else self.result.switch_step or 0)
        asked = settings.spectrum > 0 and done % settings.spectrum == 0
        if settings.control or not asked or self.phase not in (WARMUP, "SGD"):
            return []
        with self.operator.frozen():
            solution = top_eigenpairs(
                self.operator.matmat,
                self.operator.size,
                min(2 * k, self.operator.size),
                # Eigenvalues are accurate to the square of the residual.
                tol=max(1e-2, settings.tol),
                seed=settings.seed,
                dtype=self.operator.dtype,
                device=self.operator.device,
            )
        values: list[float] = solution.basis.eigenvalues[k:].tolist()
        return values

    def _add_row(self, next_eigenvalues: list[float]) -> None:
        row = {column: values[-1] for column, values in self.monitor.history.items()}
        chi, factor = row["chi_gradient"], self.settings.average
        self.average = factor * self.average + (1 - factor) * chi
        self.result.rows.append(
            row
            | {
                "phase": self.phase,
                "step": self.step,
                "chi_average": self.average,
                "next_eigenvalues": next_eigenvalues,
            }
        )

    def switch_reason(self) -> str:
        """Returns why the warm-up ends here; empty where it goes on."""
        settings = self.settings
        if settings.switch_at is not None:
            return f"step {settings.switch_at} as asked" if self.step >= settings.switch_at else ""
        if self.average >= settings.switch_chi:
            return (
                f"the average of chi_{settings.k} reached {self.average:.3f} "
                f"(at least {settings.switch_chi:g})"
            )
        if self.step >= settings.last_switch:
            return (
                f"last step of the warm-up; the average of chi_{settings.k} is {self.average:.3f}, "
                f"not yet {settings.switch_chi:g}"
            )
        return ""

    def finish_phase(self) -> None:
        """Keeps the outcome of the phase, and begins the next, if there is one."""
        self.monitor.detach()
        result = self.result
        if self.phase == WARMUP:
            result.switch_step, result.switch_reason = self.step, self.switch_reason()
            result.switch_loss = self.operator.loss()  # SGD diverged: an error, no branches
            self.switch_model = copy.deepcopy(self.model.state_dict())
        else:
            self.keep_branch()
        waiting = [name for name in self.optimizers if name not in result.branches]
        self.model.load_state_dict(self.switch_model)
        if waiting:
            self.begin(waiting[0])
        else:
            result.finished = True

    def loss(self) -> float:
        """Returns the loss over all data; infinite where the optimizer diverged."""
        try:
            return self.operator.loss()
        except so.NonFiniteError:
            return math.inf

    @torch.no_grad()
    def keep_branch(self) -> None:
        """Evaluates the branch as it stands."""
        with in_mode(self.model, "eval"):
            output = self.model(self.x)
            tested = None if self.test is None else self.model(self.test[0])
        moved = [
            (p - self.switch_model[name]).square().sum()
            for name, p in self.model.named_parameters()
        ]
        self.result.branches[self.phase] = Branch(
            steps=self.step - (self.result.switch_step or 0),
            seconds=self.seconds,
            products=self.subspace.stats.products,
            distance=float(torch.stack(moved).sum().sqrt()),
            train_loss=self.loss(),
            train_accuracy=_accuracy(output, self.y),
            test_accuracy=(
                None if self.test is None or tested is None else _accuracy(tested, self.test[1])
            ),
            options=self.options,
            stopped=self.stopped,
        )

    @property
    def planned_steps(self) -> int:
        """Steps of the present phase, at most."""
        settings = self.settings
        if self.phase != WARMUP:
            return settings.steps
        return settings.last_switch if settings.switch_at is None else settings.switch_at

    @property
    def phase_is_over(self) -> bool:
        """The next step belongs to another phase."""
        if self.phase == WARMUP:
            return bool(self.switch_reason())
        return (
            bool(self.stopped) or self.step - (self.result.switch_step or 0) >= self.settings.steps
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns all that the next steps depend on, of built-in types and tensors."""
        result = self.result
        return {
            "settings": vars(self.settings),
            "phase": self.phase,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [each.state_dict() for each in self.trained],
            "observers": [each.state_dict() for each in self.observers],
            "stopped": self.stopped,
            "subspace": self.subspace.state_dict(),
            "monitor": self.monitor.state_dict(),
            "average": self.average,
            "seconds": self.seconds,
            "switch_model": self.switch_model,
            "result": vars(result)
            | {
                "settings": None,
                "branches": {name: vars(branch) for name, branch in result.branches.items()},
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken."""
        kept = dict(state["result"], settings=self.settings)
        kept["branches"] = {name: Branch(**values) for name, values in kept["branches"].items()}
        self.result = Comparison(**kept)
        self.switch_model = state["switch_model"]
        self.monitor.detach()
        self.model.load_state_dict(state["model"])
        self.begin(state["phase"])
        self.step, self.average = state["step"], state["average"]
        self.seconds, self.stopped = state["seconds"], state["stopped"]
        for each, inner in zip(self.trained, state["optimizers"], strict=True):
            each.load_state_dict(inner)
        for observer, inner in zip(self.observers, state["observers"], strict=True):
            observer.load_state_dict(inner)
        self.subspace.load_state_dict(state["subspace"])
        self.monitor.load_state_dict(state["monitor"])


def compare(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    optimizers: Iterable[str] | Mapping[str, OptimizerFactory | Recipe] = PAPERS,
    *,
    settings: Settings | None = None,
    test_data: tuple[Tensor, Tensor] | None = None,
    resume_from: dict[str, Any] | None = None,
    on_progress: Callable[[_Experiment, bool], None] | None = None,
    **options: Any,
) -> Comparison:
    """Runs the experiment and returns what was measured.

    ``KeyboardInterrupt`` ends it early: the rows so far are returned, ``finished`` is False.

    Args:
        model: trained from its present parameters, which it has again at the end; its gradients
            are cleared.
        loss_fn: ``loss_fn(output, target)``, a mean over examples.
        data: ``(x, y)``, all training examples as two tensors.
        optimizers: names, spelled as for ``--optimizers``, or a mapping from a name to a recipe
            (of ``benchmarks.optimizers.recipes``, or a value of ``OPTIMIZERS``) or to
            ``make(params, lr, subspace)``, which returns one optimizer, or several that step one
            after the other. Those beside SGD are compared with it. A ``ClassGradientSubspace``
            of an optimizer observes each minibatch before the step.
        settings: what to do; or give its fields as ``options``, of which ``k`` is needed.
        test_data: for the test accuracy.
        resume_from: what ``on_progress`` took from ``state_dict()`` in an earlier run.
        on_progress: called after every step with the experiment and whether it was measured.
        **options: fields of ``Settings``.

    Returns:
        The comparison.

    Raises:
        ValueError: an optimizer is unknown, or cannot be made, or a state is not one of this
            experiment; before anything runs.
    """
    settings = Settings(**options) if settings is None else replace(settings, **options)
    chosen = dict(optimizers) if isinstance(optimizers, Mapping) else recipes(list(optimizers))
    experiment = _Experiment(model, loss_fn, data, chosen, settings, test_data)
    before = copy.deepcopy(model.state_dict())
    try:
        if resume_from is not None:
            try:
                experiment.load_state_dict(resume_from)
            except Exception as error:
                raise ValueError(
                    "What was kept is no state of this comparison, so it begins anew only: "
                    + first_line(error)
                ) from error
        while not experiment.result.finished:
            if experiment.phase_is_over:
                experiment.finish_phase()
                measured = True  # a checkpoint between the phases
            else:
                measured = experiment.advance()
            if on_progress is not None:
                on_progress(experiment, measured)
    except KeyboardInterrupt:
        experiment.monitor.detach()
        if experiment.phase != WARMUP and experiment.phase not in experiment.result.branches:
            experiment.keep_branch()
    finally:
        experiment.monitor.detach()
        model.load_state_dict(before)
        model.zero_grad()
    return experiment.result
