"""The optimizers of a comparison: by name, as a projected version, as a pair, with their options.

==================== ============================================================================
spelling             what takes part
==================== ============================================================================
``sgd``, ``domsam``  ours, and SGD: ``BUILT_IN``, in any case; ``newton`` and ``quasinewton`` for
                     ``LowRankNewton`` and ``ClassGradientQuasiNewton``
``adamw``, ``muon``  any optimizer of ``torch.optim``
``module:Class``     any other subclass of ``torch.optim.Optimizer``
``a+b``              a pair: a takes the parameters with exactly two dimensions, b the rest
``dom:a``            a, or a pair, with its updates projected onto the subspace
``bulk:a``           the same, projected out of it
==================== ============================================================================
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

import subspace_optim as so
from subspace_optim.subspaces import DominantSubspace

__all__ = ["BUILT_IN", "DEFAULT", "PAPERS", "Part", "Recipe", "kinship", "recipes", "step_together"]

PAPERS: Final = ("SGD", "DomSGD", "BulkSGD")
"""What the critical experiment of `song_2024` compares."""

DEFAULT: Final = (
    *PAPERS,
    "SAM",
    "DomSAM",
    "BulkSAM",
    "LowRankNewton",
    "ClassGradientQuasiNewton",
)
"""What ``python -m benchmarks.compare`` compares."""

_OURS: Final[dict[str, type[Optimizer]]] = {
    "SGD": torch.optim.SGD,
    "DomSGD": so.DomSGD,
    "BulkSGD": so.BulkSGD,
    "SAM": so.SAM,
    "DomSAM": so.DomSAM,
    "BulkSAM": so.BulkSAM,
    "LowRankNewton": so.LowRankNewton,
    "ClassGradientQuasiNewton": so.ClassGradientQuasiNewton,
}


def _optimizers_of(module: Any) -> dict[str, type[Optimizer]]:
    """The optimizers that a module has, by name."""
    classes = {name: kind for name, kind in vars(module).items() if inspect.isclass(kind)}
    return {n: k for n, k in classes.items() if issubclass(k, Optimizer) and k is not Optimizer}


_TORCHS: Final = _optimizers_of(torch.optim)
del _TORCHS["SparseAdam"]  # it takes sparse gradients alone, which have no curvature here
_KNOWN: Final = _TORCHS | _OURS
_ALIASES: Final = {name.lower(): name for name in _KNOWN} | {
    "newton": "LowRankNewton",
    "quasinewton": "ClassGradientQuasiNewton",
}
_AT_LR: Final = {*_OURS, "ASGD"} - {"LowRankNewton"}
"""Those whose default rate is that of the comparison."""
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "SAM": {"rho": 0.02},
    "DomSAM": {"rho": 0.02},
    "BulkSAM": {"rho": 0.02},
    "LowRankNewton": {"lr": 0.1},
    "ClassGradientQuasiNewton": {"momentum": 0.0},
    "LBFGS": {"lr": 0.1, "max_iter": 5},
    "Muon": {"lr": 0.005},
    "RMSprop": {"lr": 1e-4},
}
"""Where our default is not the class's own; docs/compare.md tells why."""
_OF_SUBSPACE: Final[tuple[str, ...]] = ("decay", "orthogonal")
"""Options that ``ClassGradientQuasiNewton`` passes on to its ``ClassGradientSubspace``."""
_ONTO: Final[dict[str, Literal["dominant", "bulk"]]] = {"dom": "dominant", "bulk": "bulk"}
_SPELLINGS: Final = (
    f"{', '.join(_OURS)}; one of torch.optim ({', '.join(n for n in _TORCHS if n not in _OURS)}); "
    "module:Class for any other torch.optim.Optimizer; a+b for a pair of which a takes the "
    "parameters with exactly two dimensions and b the rest; dom: or bulk: before any of these "
    "for its projected version"
)


@dataclass(frozen=True)
class Part:
    """An optimizer class, with the options that it is made with.

    Attributes:
        name: canonical: the class's own, or ``module:Class``.
        kind: the class.
        options: its keyword arguments, beside parameters and subspace.
    """

    name: str
    kind: type[Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_subspace(self) -> bool:
        """Whether it is an optimizer in a subspace already."""
        return "subspace" in _parameters(self.kind)

    def allowed(self) -> dict[str, Any] | None:
        """Returns the options that can be set, with their defaults; ``None`` for any."""
        parameters = _parameters(self.kind)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return None
        names = [n for n in parameters if n not in ("params", "subspace")]
        options = {name: parameters[name].default for name in names}
        if self.kind is so.ClassGradientQuasiNewton:
            of_subspace = inspect.signature(so.ClassGradientSubspace).parameters
            options |= {name: of_subspace[name].default for name in _OF_SUBSPACE}
        return options

    def make(
        self, params: list[Tensor], lr: float, subspace: DominantSubspace, classes: int | None
    ) -> Optimizer:
        """Returns the optimizer.

        Args:
            params: all that it trains.
            lr: the rate of those that have none of their own.
            subspace: of those that need one.
            classes: C; ``None`` where targets or outputs are no classes.

        Raises:
            ValueError: it cannot be made with these options or parameters.
        """
        options = _DEFAULTS.get(self.name, {}) | dict(self.options)
        own = _parameters(self.kind).get("lr")
        if self.name in _AT_LR or (own is not None and own.default is own.empty):
            options.setdefault("lr", lr)
        kind: Any = self.kind
        try:
            if self.kind is so.ClassGradientQuasiNewton and self.name in _OURS:
                options.setdefault("newton_lr", options["lr"])
                averages = {n: options.pop(n) for n in _OF_SUBSPACE if n in options}
                options["subspace"] = _class_gradients(subspace, classes, averages)
            elif self.takes_subspace:
                options["subspace"] = subspace
            made: Optimizer = kind(params, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
            remedy = ""
            if any(p.dim() != 2 for p in params):
                remedy = " One that takes matrices only is the first of a pair, as in muon+adamw."
            remedy = remedy if self.kind is torch.optim.Muon else ""
            raise ValueError(
                f"{self.name} cannot be made with {given or 'its defaults'}: {error}{remedy}"
            ) from error
        return made


def _parameters(kind: type[Optimizer]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a class's constructor."""
    return inspect.signature(kind).parameters


def _class_gradients(
    subspace: DominantSubspace, classes: int | None, options: dict[str, Any]
) -> so.ClassGradientSubspace:
    """Returns class gradients of the same model.

    Raises:
        ValueError: there are no classes.
    """
    if classes is None:
        raise ValueError(
            "it needs outputs (N, C), and targets that are integers, the classes. "
            "Leave it out of the optimizers."
        )
    operator: Any = subspace.operator
    return so.ClassGradientSubspace(operator.model, classes, **options)


@dataclass(frozen=True)
class Recipe:
    """How to make one competitor: ``build`` is called for each run of it.

    Attributes:
        name: canonical, such as ``SGD`` or ``bulk:Muon+AdamW``.
        parts: one optimizer, or the two of a pair.
        onto: what its updates are projected onto, if anything.
    """

    name: str
    parts: tuple[Part, ...]
    onto: Literal["dominant", "bulk"] | None = None

    def build(
        self,
        params: Iterable[Tensor],
        lr: float,
        subspace: DominantSubspace,
        classes: int | None,
    ) -> list[Optimizer]:
        """Returns the optimizers, projected if they are to be; they step one after the other.

        Args:
            params: all parameters of the model.
            lr: the rate of those that have none of their own.
            subspace: the dominant subspace.
            classes: C; ``None`` where targets or outputs are no classes.

        Raises:
            ValueError: they cannot be made with these options or parameters.
        """
        shares = [list(params)]
        if len(self.parts) == 2:
            shares = [[p for p in shares[0] if (p.dim() == 2) is first] for first in (True, False)]
        made = []
        for part, share, of in zip(self.parts, shares, ("exactly two", "other"), strict=False):
            if not share:
                raise ValueError(
                    f"{self.name}: no parameter is left for {part.name}, as the model has none "
                    f"with {of} dimensions. Of a pair the first takes those with exactly two, the "
                    "second the rest: name one optimizer alone."
                )
            made.append(part.make(share, lr, subspace, classes))
        if self.onto is not None:
            so.project_updates(made, subspace, self.onto)
        return made


def _import(spelling: str) -> type[Optimizer]:
    """Returns the class of ``module:Class``.

    Raises:
        ValueError: there is none, or it is no optimizer.
    """
    module_name, _, class_name = spelling.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(
            f"optimizer {spelling!r}: the module {module_name!r} cannot be imported ({error}). "
            "Install it, or put its folder on PYTHONPATH."
        ) from error
    found = _optimizers_of(module)
    if class_name not in found:
        there = hasattr(module, class_name)
        problem = "is no subclass of torch.optim.Optimizer" if there else "is not in that module"
        raise ValueError(
            f"optimizer {spelling!r}: {class_name!r} {problem}. "
            f"Optimizers there: {', '.join(found) or 'none'}."
        )
    return found[class_name]


def _part(text: str, spelling: str) -> Part:
    """Returns one optimizer by its name.

    Raises:
        ValueError: nothing is called so.
    """
    if text.lower() in _ALIASES:
        name = _ALIASES[text.lower()]
        return Part(name, _KNOWN[name])
    if ":" in text:
        return Part(text, _import(text))
    what = f"{text!r} in {spelling!r}" if text != spelling else f"{text!r}"
    raise ValueError(f"unknown optimizer {what}: allowed are {_SPELLINGS}.")


def _recipe(spelling: str) -> Recipe:
    """Returns what one argument of ``--optimizers`` stands for.

    Raises:
        ValueError: it stands for nothing.
    """
    prefix, _, inner = spelling.partition(":")
    prefix = prefix.lower()
    if prefix not in _ONTO:
        prefix, inner = "", spelling
    parts = tuple(_part(text, spelling) for text in inner.split("+"))
    name = "+".join(part.name for part in parts)
    if prefix and any(part.takes_subspace for part in parts):
        raise ValueError(
            f"optimizer {spelling!r}: {name} works in a subspace already, so {prefix}: has "
            f"nothing to project. Write {inner!r}, or {prefix}: before a plain optimizer."
        )
    if len(parts) > 2:
        raise ValueError(
            f"optimizer {spelling!r} has {len(parts)} parts: a pair a+b has two, of which a takes "
            "the parameters with exactly two dimensions and b the rest."
        )
    for part in parts if len(parts) == 2 else ():
        again = part.kind in (so.SAM, torch.optim.LBFGS)
        if part.takes_subspace or again:
            moved = "evaluates the loss again, at a point that the other has moved"
            what = moved if again else "works on all parameters together"
            raise ValueError(
                f"optimizer {spelling!r}: {part.name} cannot be a part of a pair, as it {what}. "
                f"Name {part.name} alone."
            )
    return Recipe(f"{prefix}:{name}" if prefix else name, parts, _ONTO[prefix] if prefix else None)


BUILT_IN: Final = {name: _recipe(name) for name in _OURS}
"""Ours, and SGD, by their canonical names."""


@dataclass(frozen=True)
class _Setting:
    """One ``--set NAME.option=value``."""

    text: str
    name: str
    option: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> _Setting:
        """Takes the argument apart.

        Raises:
            ValueError: it is of another form.
        """
        target, equals, value = text.partition("=")
        name, dot, option = target.strip().rpartition(".")
        if not (equals and dot and name and option.isidentifier()):
            raise ValueError(
                f"--set {text!r} must be NAME.option=value, such as --set adamw.lr=1e-3."
            )
        try:
            parsed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            parsed = value.strip()
        return cls(text, name, option, parsed)

    def rank(self, recipe: Recipe, part: Part) -> int:
        """Returns how closely its name fits: 3 for all of a spelling, 1 for a part; 0: not."""
        inner = "+".join(p.name for p in recipe.parts)
        names = (part.name.lower(), inner.lower(), recipe.name.lower())
        own = "+".join(
            _ALIASES.get(piece, piece)
            for piece in self.name.lower().removeprefix("dom:").removeprefix("bulk:").split("+")
        ).lower()
        head = self.name.lower().partition(":")[0]
        own = f"{head}:{own}" if head in _ONTO else own
        return max((rank for rank, name in enumerate(names, 1) if name == own), default=0)

    def check(self, part: Part) -> bool:
        """Whether the optimizer has this option.

        Raises:
            ValueError: it has, but not for such a value.
        """
        allowed = part.allowed()
        if allowed is None:
            return self.option not in ("params", "subspace")
        if self.option not in allowed:
            return False
        default, kind = allowed[self.option], None
        if isinstance(default, bool) and not isinstance(self.value, bool):
            kind = "True or False"
        elif isinstance(default, int | float) and isinstance(self.value, str):
            kind = "a number"
        if kind is not None:
            raise ValueError(
                f"--set {self.text!r}: {self.option} is {self.value!r}, but must be {kind}."
            )
        return True


def recipes(spellings: Sequence[str], settings: Sequence[str] = ()) -> dict[str, Recipe]:
    """Returns the competitors by their canonical names, with their options set.

    Args:
        spellings: as ``--optimizers`` takes them.
        settings: as ``--set`` takes them, ``NAME.option=value``. NAME is one of the optimizers, or
            what is inside of one: the optimizer behind ``dom:`` or ``bulk:``, a part of a pair. It
            sets the option in all that hold it; the longer name wins over the shorter.

    Raises:
        ValueError: something is unknown, given twice, or cannot be set.
    """
    if not spellings:
        raise ValueError(f"optimizers are none, but must be at least one of {_SPELLINGS}.")
    chosen: dict[str, Recipe] = {}
    for spelling in spellings:
        recipe = _recipe(spelling.strip())
        if recipe.name in chosen:
            raise ValueError(f"optimizer {recipe.name} is given twice: name it once.")
        chosen[recipe.name] = recipe
    parsed = [_Setting.parse(text) for text in settings]
    for setting in parsed:
        fitting = [p for r in chosen.values() for p in r.parts if setting.rank(r, p)]
        if not fitting:
            names = [n for r in chosen.values() for n in (r.name, *(p.name for p in r.parts))]
            raise ValueError(
                f"--set {setting.text!r}: {setting.name!r} is not among the optimizers of this "
                f"run. Allowed are {', '.join(dict.fromkeys(names))}; or add it to --optimizers."
            )
        held = [setting.check(part) for part in fitting]
        if not any(held):
            lists = {part.name: ", ".join(part.allowed() or ()) for part in fitting}
            options = "; ".join(f"{name} has {listed}" for name, listed in lists.items())
            raise ValueError(
                f"--set {setting.text!r}: {setting.option!r} is no option of {setting.name}. "
                f"Allowed: {options}."
            )
    return {name: _with_options(recipe, parsed) for name, recipe in chosen.items()}


def _with_options(recipe: Recipe, settings: list[_Setting]) -> Recipe:
    """Returns the recipe with what the settings say of it."""

    def options(part: Part) -> dict[str, Any]:
        ranked = [(setting.rank(recipe, part), setting) for setting in settings]
        of_part = [(rank, s) for rank, s in ranked if rank and s.check(part)]
        return {s.option: s.value for _, s in sorted(of_part, key=lambda pair: pair[0])}

    parts = tuple(replace(part, options=options(part)) for part in recipe.parts)
    return replace(recipe, parts=parts)


def takes_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` evaluates a closure; third parties' may take none."""
    step: Callable[..., Any] = optimizer.step
    first = next(iter(inspect.signature(step).parameters.values()), None)
    return first is not None and (first.name == "closure" or first.kind is first.VAR_POSITIONAL)


def step_together(optimizers: Sequence[Optimizer], loss: Callable[[], Tensor]) -> list[Tensor]:
    """Takes a step: of one optimizer by itself, or of several after one backward pass.

    Args:
        optimizers: one that evaluates a closure gets one, as often as it asks.
        loss: of the minibatch, at the present parameters.

    Returns:
        The losses, as they were evaluated: the first is that before the step.
    """
    losses: list[Tensor] = []

    def closure() -> Any:  # torch's annotation: a float
        with torch.enable_grad():
            for each in optimizers:
                each.zero_grad()
            found = loss()
            found.backward()
        losses.append(found.detach())
        return losses[-1]

    if len(optimizers) == 1 and takes_closure(optimizers[0]):
        optimizers[0].step(closure)
    else:
        closure()
        for each in optimizers:
            each.step()
    return losses


_KINSHIP: Final = {
    "DomSGD": ("dominant", "SGD"),
    "BulkSGD": ("bulk", "SGD"),
    "DomSAM": ("dominant", "SAM"),
    "BulkSAM": ("bulk", "SAM"),
    "LowRankNewton": ("newton", "LowRankNewton"),
    "ClassGradientQuasiNewton": ("newton", "ClassGradientQuasiNewton"),
}


def kinship(name: str) -> tuple[str, str]:
    """Returns the family of a competitor, and the optimizer that it is a version of.

    Args:
        name: canonical, or any other.

    Returns:
        ``"plain"``, ``"dominant"``, ``"bulk"`` or ``"newton"``, and the plain optimizer's name.
    """
    prefix, _, inner = name.partition(":")
    if prefix in _ONTO:
        return _ONTO[prefix], inner
    return _KINSHIP.get(name, ("plain", name))
