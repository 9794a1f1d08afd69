"""Is a kept basis what it is said to be? Random small trainings, with dense Hessians at every step.

Networks of 50 to 200 parameters, any optimizer, and events that no estimate can foresee: a step at
a hundred times the rate, a layer made anew, units exchanged, an older state loaded, a pause. The
truth is ``torch.linalg.eigh`` of the float64 Hessian.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

import subspace_optim as so
from benchmarks.progress import counted
from subspace_optim.curvature.operator import OperatorStats
from subspace_optim.linalg.rows import largest_sine

MAX_ANGLE: Final = 0.05
STEPS: Final = 50
RUNS: Final = 300
FIRST: Final = 30_000
"""The seed of the first: thresholds of the rules were chosen on others."""
BARS: Final = {"above_estimate": 0.01, "kept_beyond": 0.001, "worst_excess": 0.2}
_TOL: Final = 1e-3
_EXAMPLES: Final = 24
_FLAT: Final = 1e-10
"""The largest eigenvalue below which a network is dead, or fits beyond rounding."""


class _Attention(nn.Module):
    """One head over tokens of five numbers, mean pooled."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(5, 3 * width), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        out: Tensor = self.head((weights @ v).mean(1))
        return out


def _network(kind: str, activation: type[nn.Module], width: int, out: int) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(nn.Linear(6, width), activation(), nn.Linear(width, out))
    if kind == "deep":
        hidden = nn.Linear(width, width)
        layers = (nn.Linear(6, width), activation(), hidden, activation(), nn.Linear(width, out))
        return nn.Sequential(*layers)
    if kind == "cnn":
        convolution, pool = nn.Conv2d(1, width, 3), nn.AvgPool2d(2)
        head = nn.Linear(4 * width, out)
        return nn.Sequential(convolution, activation(), pool, nn.Flatten(), head)
    return _Attention(width, out)


_SHAPES: Final = {"mlp": (6,), "deep": (6,), "cnn": (1, 6, 6), "attention": (4, 5)}
_OPTIMIZERS: Final = (
    "sgd",
    "momentum",
    "nesterov",
    "full batch",
    "adam",
    "adamw",
    "rmsprop",
    "lbfgs",
    "sam",
    "bulk",
)
EVENTS: Final = ("rate times 100", "rate times 10", "layer", "exchange", "load", "noise", "pause")


class Training(NamedTuple):
    """What was drawn for a run.

    Attributes:
        network: of ``_network``.
        activation: ``"Tanh"``, ``"GELU"`` or ``"ReLU"``.
        loss: ``"mse"`` or ``"cross-entropy"``.
        optimizer: its name.
        k: dimension of the subspace.
        before: steps of SGD before.
        rate: what the usual learning rate is multiplied by.
        events: a name of ``EVENTS`` for some of the steps.
        seed: of all that is random in it.
    """

    network: str
    activation: str
    loss: str
    optimizer: str
    k: int
    before: int
    rate: float
    events: dict[int, str]
    seed: int


def drawn(seed: int) -> Training:
    """Returns the training of a seed."""
    random = np.random.default_rng(seed)
    steps = random.choice(np.arange(5, STEPS - 5), 2, replace=False)
    return Training(
        network=str(random.choice(list(_SHAPES))),
        activation=str(random.choice(["Tanh", "GELU", "ReLU"])),
        loss=str(random.choice(["mse", "cross-entropy"])),
        optimizer=_OPTIMIZERS[seed % len(_OPTIMIZERS)],
        k=int(random.integers(1, 7)),
        before=int(random.choice([0, 50, 300])),
        rate=float(10 ** random.uniform(-3, 0)),
        events={int(step): str(random.choice(EVENTS)) for step in steps},
        seed=seed,
    )


class Dense(so.CurvatureOperator):
    """The Hessian of a small model as a float64 matrix, made once at each parameter state."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.parameters, self.stats = so.ParameterSpace(model), OperatorStats()
        names = [name for name, _ in model.named_parameters()]
        shapes = [p.shape for p in model.parameters()]
        sizes = [p.numel() for p in model.parameters()]

        def mean_loss(theta: Tensor) -> Tensor:
            pieces = theta.split(sizes)
            state = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
            return loss(functional_call(model, state, (x,)))

        self._loss, self._hessian = mean_loss, hessian(mean_loss)
        self._made: tuple[Tensor, Tensor] | None = None

    @property
    def theta(self) -> Tensor:
        """The parameters, ``(P,)``."""
        return self.parameters.flatten(self.parameters.tensors).detach().clone()

    def matrix(self) -> Tensor:
        """Returns the Hessian at the present parameters."""
        theta = self.theta
        if self._made is None or not torch.equal(self._made[0], theta):
            self._made = theta, self._hessian(theta).detach()
        return self._made[1]

    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns products with the matrix."""
        self.stats.products += len(vectors)
        return vectors @ self.matrix()

    def gradient(self) -> Tensor:
        """Returns the gradient of the mean loss."""
        gradient: Tensor = torch.func.grad(self._loss)(self.theta)
        return gradient

    def loss(self) -> float:
        """Returns the mean loss."""
        return float(self._loss(self.theta))


class Problem:
    """A network, its data, and one way to train it."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.random = torch.Generator().manual_seed(training.seed)
        shape = _SHAPES[training.network]
        classes = 3
        centres = 1.5 * torch.randn(classes, *shape, generator=self.random)
        labels = torch.arange(_EXAMPLES) % classes
        noise = torch.randn(_EXAMPLES, *shape, generator=self.random)
        self.x = (centres[labels] + noise).double()
        entropy = training.loss == "cross-entropy"
        self.y = labels if entropy else F.one_hot(labels).double()
        widest = 11 if training.network in ("mlp", "deep") else 6
        width = int(torch.randint(3, widest, (), generator=self.random))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(training.seed)
            activation = getattr(nn, training.activation)
            self.model = _network(training.network, activation, width, classes).double()
        self.criterion = F.cross_entropy if entropy else F.mse_loss
        self.hessian = Dense(self.model, lambda out: self.criterion(out, self.y), self.x)
        self.lr = 0.1 if entropy else 0.2

    def loss(self, full: bool) -> Tensor:
        """The loss of a batch of 8, or of all examples."""
        if full:
            return self.criterion(self.model(self.x), self.y)
        chosen = torch.randint(len(self.x), (8,), generator=self.random)
        return self.criterion(self.model(self.x[chosen]), self.y[chosen])

    def optimizer(self, name: str, subspace: so.DominantSubspace) -> torch.optim.Optimizer:
        """Returns the optimizer of that name."""
        rate = self.training.rate
        parameters, lr = list(self.model.parameters()), rate * self.lr
        make: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "sgd": lambda: torch.optim.SGD(parameters, lr=lr),
            "momentum": lambda: torch.optim.SGD(parameters, lr=lr / 5, momentum=0.9),
            "nesterov": lambda: torch.optim.SGD(parameters, lr=lr / 5, momentum=0.9, nesterov=True),
            "full batch": lambda: torch.optim.SGD(parameters, lr=2 * lr),
            "adam": lambda: torch.optim.Adam(parameters, lr=1e-2 * rate),
            "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-2 * rate, weight_decay=0.1),
            "rmsprop": lambda: torch.optim.RMSprop(parameters, lr=1e-2 * rate),
            "lbfgs": lambda: torch.optim.LBFGS(
                parameters,
                lr=min(1.0, 3 * rate),
                max_iter=(1, 4, 20)[self.training.seed // 10 % 3],
                line_search_fn=(None, "strong_wolfe")[self.training.seed // 30 % 2],
            ),
            "sam": lambda: so.SAM(parameters, lr=lr, rho=0.05),
            "bulk": lambda: so.BulkSGD(parameters, lr=lr, subspace=subspace),
        }
        return make[name]()

    def step(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        """Takes one step."""
        state = self.random.get_state()

        def closure() -> Tensor:
            self.random.set_state(state)
            optimizer.zero_grad()
            loss = self.loss(name in ("full batch", "lbfgs"))
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]

    @torch.no_grad()
    def meet(self, event: str, earlier: dict[str, Any]) -> None:
        """Lets an event happen to the parameters."""
        if event == "load":
            self.model.load_state_dict(earlier)
        elif event == "noise":
            for p in self.model.parameters():
                noise = torch.randn(p.shape, generator=self.random)
                p.add_(0.1 * p.std(correction=0) * noise)
        elif event == "layer":
            layers = [m for m in self.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            layer = layers[int(torch.randint(len(layers), (), generator=self.random))]
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.training.seed)
                layer.reset_parameters()
        elif event == "exchange":
            first = next(m for m in self.model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
            for p in first.parameters():
                p[:2] = p[:2].flip(0)


@dataclass
class Outcome:
    """What a run has shown.

    Attributes:
        training: what it was.
        parameters: P.
        sines: the true sine at each step with a gap.
        estimates: the estimate there.
        bounds: the bound there.
        steps: which steps these are.
        products: in all.
        counts: refreshes, cold solves and probes.
    """

    training: Training
    parameters: int = 0
    sines: list[float] = field(default_factory=list)
    estimates: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    products: int = 0
    counts: dict[str, int] = field(default_factory=dict)


def follow(
    training: Training,
    see: Callable[[Problem, so.DominantSubspace, int], None] | None = None,
) -> Outcome:
    """Trains, and compares the basis with the truth at every step.

    Args:
        training: which.
        see: is shown each step, for a closer look.

    Returns:
        What was found. A training that diverges ends there.
    """
    problem = Problem(training)
    plain = torch.optim.SGD(problem.model.parameters(), lr=problem.lr)
    for _ in range(training.before):
        problem.step(plain, "sgd")
    subspace = so.DominantSubspace(
        problem.hessian, training.k, max_angle=MAX_ANGLE, tol=_TOL, seed=training.seed
    )
    optimizer = problem.optimizer(training.optimizer, subspace)
    outcome = Outcome(training, problem.hessian.size)
    rates = [group["lr"] for group in optimizer.param_groups]
    start = copy.deepcopy(problem.model.state_dict())
    earlier = {0: start}
    pause = 0
    for step in range(STEPS):
        event = training.events.get(step, "")
        factor = {"rate times 100": 100.0, "rate times 10": 10.0}.get(event, 1.0)
        pause = 5 if event == "pause" else max(0, pause - 1)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        problem.meet(event, earlier[max(0, step - 10)])
        if not _is_sound(problem):
            break
        basis = subspace.update()
        _compare(outcome, problem.hessian.matrix(), basis.vectors, subspace.stats, step)
        if see is not None:
            see(problem, subspace, step)
        if not pause:
            problem.step(optimizer, training.optimizer)
        earlier[step + 1] = copy.deepcopy(problem.model.state_dict())
    outcome.products = subspace.stats.products
    for name in ("refreshes", "cold", "probes", "looks"):
        outcome.counts[name] = getattr(subspace.stats, name)
    return outcome


def _is_sound(problem: Problem) -> bool:
    theta = problem.hessian.theta
    return bool(torch.isfinite(theta).all()) and float(theta.norm()) < 1e4


def _compare(outcome: Outcome, matrix: Tensor, vectors: Tensor, stats: Any, step: int) -> None:
    k = len(vectors)
    values, truth = torch.linalg.eigh(matrix)
    gap = float(values[-k] - values[-k - 1])
    largest = float(values[-k:].abs().max())
    if gap <= 2 * _TOL * largest or largest < _FLAT:
        return
    outcome.steps.append(step)
    outcome.sines.append(largest_sine(vectors, truth.T[-k:].contiguous()))
    outcome.estimates.append(stats.estimate)
    outcome.bounds.append(stats.bound)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns how often certificates were false, and by how much."""
    told = [pair for o in outcomes for pair in zip(o.sines, o.estimates, strict=True)]
    kept = [sine for sine, estimate in told if sine > MAX_ANGLE >= estimate]
    found = {
        "above_estimate": statistics.fmean(s > e for s, e in told) if told else None,
        "kept_beyond": len(kept) / len(told) if told else None,
        "worst_excess": max((sine - MAX_ANGLE for sine in kept), default=0.0),
    }
    return {
        "runs": len(outcomes),
        "steps": len(told),
        **found,
        "met": {name: v is not None and v <= BARS[name] for name, v in found.items()},
        "median_estimate_over_true": _median([e / s for s, e in told if s > 0]),
        "products": sum(o.products for o in outcomes),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def measure(runs: int, first: int = FIRST) -> dict[str, Any]:
    """Follows trainings, and sums up what they have shown.

    Args:
        runs: how many trainings.
        first: the seed of the first; the others follow.

    Returns:
        ``all``, and the same by activation (a Hessian of ReLU networks jumps where a unit changes
        its side) and by optimizer; ``trainings``: each with its sines and estimates.
    """
    counter = counted("trainings", range(first, first + runs), unit="run")
    outcomes = [follow(drawn(seed)) for seed in counter]
    groups: dict[str, dict[str, Any]] = {}
    for name in ("activation", "optimizer"):
        values = sorted({getattr(o.training, name) for o in outcomes})
        groups[name] = {
            value: summary([o for o in outcomes if getattr(o.training, name) == value])
            for value in values
        }
    return {
        "bars": BARS,
        "max_angle": MAX_ANGLE,
        "all": summary(outcomes),
        "groups": groups,
        "trainings": [asdict(o) for o in outcomes],
    }
