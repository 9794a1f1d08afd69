"""``Proof``: an operator shows that it measures the user's own function before it is trusted.

At its first use, on some examples of the first batch:

- *one function*: two evaluations agree bit for bit;
- *the user's gradient*: it is the one that ``loss.backward()`` would put into ``.grad``;
- *its derivative*: a product along a random direction is the central difference of gradients, and
  two products are symmetric; in float64, where the model can be computed in it, since the step is
  then too short for kinks to be counted;
- *a mean*: the loss of two batches together, by the model's outputs, is the weighted mean of
  theirs.

What a loss detaches, or computes under ``no_grad``, is constant to its derivatives, and is held
constant in the differences too.

It takes eight gradients of a few examples, once, and again where the structure of the model has
changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from subspace_optim._validation import (
    InconsistentDerivativeError,
    NotOneFunctionError,
    SecondDerivativeError,
)
from subspace_optim.curvature.averages import concatenated
from subspace_optim.curvature.batches import Batches
from subspace_optim.curvature.evaluation import (
    Derivatives,
    Point,
    loss_alone,
    loss_and_gradient,
)
from subspace_optim.curvature.objective import BatchLoss, BatchLossFunction, Supervised
from subspace_optim.curvature.operator import OperatorStats, rounding_at
from subspace_optim.curvature.parameters import LOW_PRECISION, ParameterSpace, length
from subspace_optim.curvature.second_derivatives import has_functions
from subspace_optim.curvature.structure import moved
from subspace_optim.curvature.surroundings import dtype_inside

_EXAMPLES = 24
"""Examples of the first batch that the proof is made on, where it can be cut."""
_FEWER = 15
"""... and of the last one: another number, so that a sum and a mean are told apart."""
_ASIDE = 1e-3
"""Products are proved this far from the parameters, relative to their length: kinks that lie
exactly at them, as of a unit that is zero because its inputs are, are no longer there."""
_STEP = 1e-7
"""Length of the difference in float64, relative as well."""
_AGREE = {torch.float64: 1e-3, torch.float32: 3e-2}
"""How well a product and a difference agree: those that are wrong differ by 3 % and more."""
_SYMMETRIC = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How symmetric products are: those that are wrong have gaps of 3 % and more."""
_SAME = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How well two ways to one gradient agree ..."""
_ROUNDED = 5e-2
"""... and if one of them is rounded to low precision."""
_LINEAR = 1e-3
"""How well the gradient of a batch alone has the direction that it has beside another."""
_WEIGHED = 2e-2
"""How well its share is the one that weights say."""


@dataclass
class Report:
    """What a proof has found. What was not looked at is NaN.

    Attributes:
        engine: how products are computed.
        loss_gap: of two evaluations of one batch, relative; 0 if the loss is one function.
        gradient_error: to the gradient at the user's own parameters, relative.
        product_error: of a product to the central difference of gradients, relative.
        asymmetry: ``|⟨u, Hv⟩ − ⟨v, Hu⟩|`` for ``u = Hv/‖Hv‖``, relative to the products.
        mean_error: of the gradient of two batches together to the weighted mean of theirs.
        failed: what one would have been told of each failure.
        gradients: what it took: gradients and products of some examples.
    """

    engine: str
    loss_gap: float = math.nan
    gradient_error: float = math.nan
    product_error: float = math.nan
    asymmetry: float = math.nan
    mean_error: float = math.nan
    failed: list[str] = field(default_factory=list)
    gradients: int = 0

    @property
    def passed(self) -> bool:
        """Whether nothing has failed."""
        return not self.failed

    def __str__(self) -> str:
        rows = {
            "two evaluations of a batch differ by": self.loss_gap,
            "gradient, to that at the model's parameters": self.gradient_error,
            "product, to a difference of gradients": self.product_error,
            "asymmetry of two products": self.asymmetry,
            "two batches together, to the mean of both": self.mean_error,
        }
        width = max(map(len, rows))
        lines = [
            f"  {name:<{width}}  {'not looked at' if math.isnan(x) else format(x, '.1e')}"
            for name, x in rows.items()
        ]
        verdict = "passed" if self.passed else "failed: " + " ".join(self.failed)
        return "\n".join([f"engine {self.engine}, {self.gradients} gradients", *lines, verdict])


Products = Literal["derivative", "symmetric", "differences"]
"""Products with the derivative of the gradient; with another symmetric matrix; its differences."""


@dataclass
class Parts:
    """What a proof needs of an operator.

    Attributes:
        model: the model.
        batch_loss: its loss of a batch.
        space: the coordinates.
        stats: of the operator, where the costs are added.
        seed: of dropout masks and directions.
        batches: the data.
        linearize: what makes the operator's products.
        products: what they are.
    """

    model: nn.Module
    batch_loss: BatchLossFunction
    space: ParameterSpace
    stats: OperatorStats
    seed: int
    batches: Batches
    linearize: Callable[[BatchLoss, Point], Derivatives]
    products: Products


class Proof:
    """What of an operator has been proved, and how.

    Args:
        parts: of the operator.
        demanded: whether it has to be proved before it is used.

    Attributes:
        written: tensors that an evaluation was seen to write to, beside buffers.
        moved_names: of attributes that an evaluation was seen to change.
        sure: whether the last run has come to its end.
    """

    def __init__(self, parts: Parts, *, demanded: bool) -> None:
        self._parts, self._demanded = parts, demanded
        self._proved: dict[str, int] = {}  # the structure of the model when that was proved
        self.written: list[Tensor] = []
        self.moved_names: set[Any] = set()
        self.sure = False

    def is_due(self, what: str) -> bool:
        """Whether the ``"function"``, its ``"products"`` or the ``"mean"`` are to be proved."""
        return self._demanded and self._proved.get(what) != self._structure()

    def done(self, what: str) -> None:
        """Takes something as proved, for as long as the model has this structure."""
        self._proved[what] = self._structure()

    def _structure(self) -> int:
        model = self._parts.model
        return hash(
            tuple((type(m), tuple(m._parameters), tuple(m._buffers)) for m in model.modules())  # noqa: SLF001
        )

    def watching(self, point: Point) -> AbstractContextManager[Any]:
        """Learns inside what an evaluation writes to, where that is not known yet."""
        stage = hash((self._structure(), point.surroundings.modes()))
        return nullcontext() if self._proved.get("writes") == stage else self._learned(point, stage)

    @contextmanager
    def _learned(self, point: Point, stage: int) -> Iterator[None]:
        with point.learning_writes():
            yield
        self._proved["writes"] = stage

    def run(self, point: Point, *, products: bool) -> None:
        """Proves that the operator is one function at ``point``, and its products if asked.

        Raises:
            TransformError: the forward pass writes to parameters, inside of a transform.
        """
        report = Report(self._parts.stats.engine)
        self.sure = False
        try:
            trial = self._trial(point, report)
            if trial is None:
                return  # no loss is finite: the pass itself tells
            own = {id(p) for p in point.own}
            if not point.in_place and report.engine == "func" and own & set(map(id, self.written)):
                raise TransformError("The forward pass writes to parameters.")
            trial.gradient()
            if products:
                trial.products()
            self.sure = True
        finally:
            self._parts.stats.verification += report.gradients

    def report(self, point: Point) -> Report:
        """Proves everything, and collects what fails instead of raising it."""
        report = Report(self._parts.stats.engine)
        pieces: list[Any] = []
        for batch in self._read(point):
            pieces = see(batch, pieces)
        try:
            trial = self._trial(point, report)
            proofs: list[Callable[[], None]] = [partial(self.mean, point, pieces, report)]
            if trial is not None:
                proofs = [trial.gradient, trial.products, *proofs]
            for prove in proofs:
                try:
                    prove()
                except _FAILURES as error:
                    report.failed.append(str(error))
        except NotOneFunctionError as error:
            report.failed.append(str(error))
        self._parts.stats.verification += report.gradients
        return report

    def _read(self, point: Point) -> Iterator[Any]:
        parts = self._parts
        for _, batch, _ in parts.batches.read(parts.space.device, upcast=point.upcast):
            yield batch

    def _trial(self, point: Point, report: Report) -> _Trial | None:
        """Returns the proof on the first batch that has a loss: on a part of it, if that has."""
        for whole in self._read(point):
            part = head(whole, _EXAMPLES)
            for batch in [whole] if part is None else [part, whole]:
                trial = _Trial(self._parts, point, batch, report)
                try:
                    usable = trial.one_function(self.watching(point))
                except Exception as error:
                    if batch is whole or isinstance(error, NotOneFunctionError):
                        raise
                    continue  # a batch that cannot be cut
                self.moved_names |= point.surroundings.moved_names
                if usable:
                    return trial
        return None

    # --- what the mean is over ------------------------------------------------------------------

    def mean(self, point: Point, pieces: list[Any], report: Report | None = None) -> None:
        """Proves that the loss of two batches together is the weighted mean of theirs.

        The gradient by the outputs of one of them is then its weight times what it is alone. A loss
        that couples examples, as a contrast does, has another gradient altogether, and is a
        function of the batches as they are. Weights that the user tells are not doubted.

        Args:
            point: where.
            pieces: a part of the first batch, and one of the last.
            report: what is found is added to it.

        Raises:
            NotOneFunctionError: both have other weights.
        """
        report = report or Report(self._parts.stats.engine)
        supervised = self._parts.batch_loss
        if len(pieces) < 2 or not isinstance(supervised, Supervised):
            return
        try:
            shares = self._shares(supervised, pieces, point)
        except Exception:  # noqa: BLE001 (outputs or losses that do not go together)
            return
        if shares is None:
            return
        found, claimed = shares
        report.mean_error = max(abs(f / c - 1) for f, c in zip(found, claimed, strict=True))
        if report.mean_error <= _WEIGHED:
            return
        message = (
            "The loss is not the mean that it is taken for: of the loss of two batches together "
            f"the one is {found[0]:.3g} and the other {found[1]:.3g}, where their examples say "
            f"{claimed[0]:.3g} and {claimed[1]:.3g}. Other batches of the same data would have "
            "another matrix. Give the weight yourself: "
            "HessianOperator.from_loss(model, batch_loss, data), where "
            "batch_loss(model, batch) returns (mean loss, weight), the weight being what the mean "
            "is over (examples, tokens that count, elements)."
        )
        raise NotOneFunctionError(message)

    def _shares(
        self, supervised: Supervised, pieces: list[Any], point: Point
    ) -> tuple[list[float], list[float]] | None:
        """Returns the shares of two batches in the loss of both, and those that weights claim."""
        model, seed = self._parts.model, self._parts.seed
        outputs = []
        for x, y in pieces:
            with point.at(seed):
                outputs.append((tree_map(_as_leaf, model(x)), y))
        both = concatenated(*outputs)
        if both is None:
            return None
        with point.at(seed):
            alone = [supervised(_itself, batch) for batch in outputs]
            together, _ = supervised(_itself, both)
        leaves = [
            [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            for out, _ in outputs
        ]
        weights = [float(weight) for _, weight in alone]
        total = 1.0 if supervised.summed else sum(weights)
        found, claimed = [], []
        for (loss, _), weight, of in zip(alone, weights, leaves, strict=True):
            slope = torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, of)])
            part = torch.autograd.grad(together, of, retain_graph=True)
            share_of = torch.cat([g.flatten().double() for g in part])
            share = float(share_of @ slope / (slope @ slope))
            if not float((share_of - share * slope).norm()) <= _LINEAR * float(share_of.norm()):
                return None
            found.append(share)
            claimed.append(weight / total)
        return found, claimed


_FAILURES = (NotOneFunctionError, InconsistentDerivativeError, SecondDerivativeError)


class _Trial:
    """The proof on one batch, at one point."""

    def __init__(self, parts: Parts, point: Point, batch: Any, report: Report) -> None:
        self.parts, self.point, self.batch, self.report = parts, point, batch, report
        self.evaluate = self.of(batch)
        self.slopes = torch.zeros(0, device="cpu")
        self.opaque = False  # whether functions of the user's own are in the graph
        self.stops = False  # whether the loss makes something of the parameters constant

    def of(self, batch: Any) -> BatchLoss:
        """Returns the loss of a batch."""
        return BatchLoss(self.parts.model, self.parts.batch_loss, batch, self.parts.seed)

    def flat(self, slopes: Any) -> Tensor:
        """Returns a gradient, or a product, as one vector in float64."""
        return _flat(slopes, self.parts.space)

    def one_function(self, watching: AbstractContextManager[Any]) -> bool:
        """Evaluates the loss twice.

        Args:
            watching: entered for the first time.

        Returns:
            Whether the loss is finite, and of something.

        Raises:
            NotOneFunctionError: the two differ.
        """
        point = self.point

        def watched() -> tuple[Tensor, Tensor]:
            with _Constants() as constants:
                loss, weight = self.evaluate()
            # Inside of such functions gradients are off as well, and nothing is constant.
            self.opaque = has_functions(loss)
            self.stops = bool(constants.seen) and not self.opaque
            return loss, weight

        with point.at(self.parts.seed), watching:
            first = loss_and_gradient(watched, point)
        with point.at(self.parts.seed):
            second = loss_alone(self.evaluate, point)
        self.report.gradients += 2
        self.slopes = self.flat(first.gradient)
        loss, again = float(first.loss), float(second.loss)
        if not (math.isfinite(loss) and first.weight > 0):
            return False
        self.loss = loss
        gap = abs(loss - again)
        self.report.loss_gap = gap / max(abs(loss), abs(again)) if gap else 0.0
        slack = 0.0 if first.loss.device.type == "cpu" else 1e-5  # sums of atomic additions
        if not self.report.loss_gap <= slack:
            message = (
                "The loss is not one function of parameters and data: two evaluations of one batch "
                f"at the same parameters gave {loss:.9g} and {again:.9g}. Something draws at "
                "random from a generator that cannot be reached from the model and its loss, or "
                "keeps state in a place that cannot: make it an attribute of the model or of the "
                "loss, or a constant while curvature is measured."
            )
            raise NotOneFunctionError(message)
        return True

    def gradient(self) -> None:
        """Compares the gradient with the one at the user's own parameters.

        Raises:
            InconsistentDerivativeError: it is another.
        """
        point = self.point
        low = any(p.dtype in LOW_PRECISION for p in point.own)
        user = Point(point.own, point.surroundings, in_place="always", written=point.written)
        self.report.gradients += 1
        with user.at(self.parts.seed, hooks=True), ExitStack() as stack:
            if low:
                wide = [p.detach().to(dtype_inside(p, None)) for p in point.own]
                stack.enter_context(user.displaced(wide))
            found = loss_and_gradient(self.evaluate, user)
        theirs = self.flat(found.gradient)
        scale = float(torch.maximum(self.slopes.norm(), theirs.norm()))
        error = float((self.slopes - theirs).norm())
        self.report.gradient_error = error / scale if scale > 0 else 0.0
        # What torch knows a parameter's dtype to be, it rounds the gradient to.
        tolerance = _ROUNDED if low else _SAME[self.parts.space.dtype]
        if not self.report.gradient_error <= tolerance:
            message = (
                f"The gradient that is measured ({float(self.slopes.norm()):.4g}) is not the one "
                f"that loss.backward() gives the model's parameters ({float(theirs.norm()):.4g}): "
                f"they differ by {self.report.gradient_error:.2g} of it. The loss reaches "
                "parameters past the modules that hold them: in a list, a closure, a cache, or "
                "another module's attribute. engine='double_backward' differentiates by the "
                "parameters themselves, where they are not in low precision. Or a hook of a "
                "parameter changes its gradient: what then trains has no loss."
            )
            raise InconsistentDerivativeError(message)

    def products(self) -> None:
        """Compares a product with a central difference of gradients, and two with each other.

        Raises:
            InconsistentDerivativeError: they differ by more than the dtype can explain.
        """
        if self.parts.products == "differences":
            return
        found = self._in_float64() or self._measured(self.point, self.evaluate)
        self.report.product_error, self.report.asymmetry = found.error, found.asymmetry
        rounding = rounding_at(found.loss, found.dtype)
        differs = found.error > _AGREE[found.dtype] + rounding  # not if it is NaN
        if not differs and found.asymmetry <= _SYMMETRIC[found.dtype] + rounding:
            return
        what = (
            f"a product with a vector differs from the difference of gradients along it by "
            f"{found.error:.2g} of its length"
            if differs
            else f"two products are asymmetric by {found.asymmetry:.2g}"
        )
        message = (
            f"The second derivative of the loss is wrong: {what}, by {self.report.engine}. Likely "
            "causes: an autograd.Function that keeps intermediates on ctx instead of "
            "save_for_backward(), or whose backward() detaches; a gradient that is no gradient of "
            "the loss (gradient reversal, straight-through estimators, hooks); an operation of "
            "which torch's own second derivative is wrong. Write that part in plain operations, "
            "or use FiniteDifferenceHessian, if the gradient itself is right."
        )
        raise InconsistentDerivativeError(message)

    def _in_float64(self) -> _Found | None:
        """Measures with everything in float64; ``None`` where the model cannot be computed so."""
        if self.parts.space.dtype == torch.float64:
            return self._measured(self.point, self.evaluate)
        wide = Point(
            self.point.own,
            self.point.surroundings,
            in_place=False,
            dtype=torch.float64,
            written=self.point.written,
        )
        evaluate = self.of(
            moved(
                self.batch,
                self.parts.space.device,
                lambda own: torch.float64 if own.is_floating_point else own,
            )
        )
        self.report.gradients += 1
        try:
            with wide.at(self.parts.seed):
                there = loss_and_gradient(evaluate, wide)
            slopes = self.flat(there.gradient)
        except Exception:  # noqa: BLE001 (float32 is written into the model, or there is no float64)
            return None
        if there.loss.dtype != torch.float64 or not math.isclose(
            float(there.loss), self.loss, rel_tol=1e-2, abs_tol=1e-6
        ):
            return None
        near = _AGREE[torch.float32] + rounding_at(float(there.loss), torch.float32)
        if float((slopes - self.slopes).norm()) > near * float(slopes.norm()):
            return None
        return self._measured(wide, evaluate)

    def _measured(self, point: Point, evaluate: BatchLoss) -> _Found:
        """Measures a product along a random direction, and the symmetry of two.

        Returns:
            What was found; an error of NaN where differences cannot tell, or are of something else.

        Raises:
            SecondDerivativeError: the product is not finite.
            TransformError: the loss is another inside of the transform.
        """
        dtype = point.leaves[0].dtype if point.dtype is None else point.dtype
        exact = dtype == torch.float64
        scale = float(length(point.leaves))
        generator = torch.Generator("cpu").manual_seed(self.parts.seed + 1)
        aside, v = (_random_like(point.leaves, generator) for _ in range(2))
        base = [p.detach().clone() for p in point.leaves]
        if exact:
            base = [b + _ASIDE * scale * a for b, a in zip(base, aside, strict=True)]

        constants = _Constants()
        if self.stops:
            with point.at(self.parts.seed), point.displaced(base), constants:
                evaluate()

        def gradient(distance: float) -> Tensor:
            values = [b + distance * d for b, d in zip(base, v, strict=True)]
            self.report.gradients += 1
            held = constants.held() if self.stops else nullcontext()
            with point.at(self.parts.seed), point.displaced(values) as there, held:
                return self.flat(loss_and_gradient(evaluate, there).gradient)

        def difference(step: float) -> Tensor:
            ahead, behind = gradient(step * scale), gradient(-step * scale)
            return (ahead - behind) / (2 * step * scale)

        self.report.gradients += 3
        with point.at(self.parts.seed), point.displaced(base) as there:
            here = self.parts.linearize(evaluate, there)
            slopes = self.flat(here.gradient)
            product = self.flat(here.product(v))
            norm = float(product.norm())
            u = torch.nan_to_num(product / norm) if norm > 0 else product
            pieces = self.parts.space.unflatten(u.to(dtype))
            again = self.flat(here.product(pieces))
        with point.at(self.parts.seed), point.displaced(base):
            plain = float(loss_alone(evaluate, point).loss)
        if not math.isclose(plain, float(here.loss), rel_tol=1e-4, abs_tol=1e-6):
            message = f"The transformed loss is {float(here.loss):.6g}, and not {plain:.6g}."
            raise TransformError(message)
        if not math.isfinite(norm) and bool(slopes.isfinite().all()):
            raise SecondDerivativeError(_NOT_FINITE)
        along = sum(
            float((a.double() * b.double().view_as(a)).sum())
            for a, b in zip(v, self.parts.space.unflatten(again), strict=True)
        )
        largest = max(norm, float(again.norm()))
        asymmetry = abs(norm - along) / largest if largest > 0 else 0.0
        # A forward pass that writes to parameters is a constant step that differences would see.
        written = set(map(id, point.written)) & set(map(id, point.own))
        if self.parts.products == "symmetric" or written:
            return _Found(math.nan, asymmetry, plain, dtype)
        # A difference cannot tell what is less than the rounding of the gradients that it is of.
        u_ = torch.finfo(dtype).eps
        step = _STEP if exact else (3 * u_) ** (1 / 3)
        try:
            found = difference(step)
        except _OutOfStepError:
            return _Found(math.nan, asymmetry, plain, dtype)
        rounded = 100 * u_ + rounding_at(plain, dtype) / 40  # hardly ever all that it may be
        rounding = rounded * max(float(slopes.norm()), norm * scale) / (step * scale)
        beside = max(norm, float(found.norm()))
        off = float((product - found).norm()) - rounding
        if off > _AGREE[dtype] * beside:  # kinks, or gradients that are rounded by more than that
            nearer = difference(step / 8)
            off = float((product - nearer).norm()) - 2 * float((found - nearer).norm()) - rounding
        error = max(0.0, off) / beside if beside > 0 else 0.0
        return _Found(error, asymmetry, plain, dtype)


class _Found(NamedTuple):
    """What was measured of products: error and asymmetry, at which loss and in which dtype."""

    error: float
    asymmetry: float
    loss: float
    dtype: torch.dtype


class TransformError(RuntimeError):
    """A loss that is another inside of a transform, as where masks are drawn in another order."""


class _OutOfStepError(Exception):
    """What a loss makes constant comes in another order elsewhere: differences cannot tell."""


class _Constants(TorchFunctionMode):
    """Notes what a loss makes constant of its parameters, and holds it so at other parameters.

    That is what it detaches, and what it computes without gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self._held: Iterator[Any] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is made constant inside has the values that were seen."""
        self._held = iter(self.seen)
        try:
            with self:
                yield
        finally:
            self._held = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result: Any
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        stops = func in _STOPS or not torch.is_grad_enabled()
        if not stops or not any(t.requires_grad for t in tensors):
            return func(*args, **kwargs)
        if self._held is None:
            result = func(*args, **kwargs)
            with torch.no_grad():
                self.seen.append((func, tree_map(_copied, result)))
            return result
        noted: Any = next(self._held, (None, None))
        known, held = noted
        if known is not func:
            raise _OutOfStepError
        written = kwargs.get("out", args[0] if args else None)
        if not isinstance(written, Tensor):
            return held
        return written.copy_(held) if func(*args, **kwargs) is written else held


_DATA: Any = Tensor.data
_STOPS = (Tensor.detach, torch.detach, _DATA.__get__)
_NOT_FINITE = (
    "The loss has no finite second derivative, though it and its gradient are finite: somewhere "
    "there is a norm or a square root of exactly 0 (a distance of two equal rows, a row of zeros "
    "that is normalised), or a power below 2 at 0. Add a small number inside of the root, or use "
    "FiniteDifferenceHessian, which takes the same arguments."
)


def _flat(slopes: Any, space: ParameterSpace) -> Tensor:
    """Returns tensors of the parameters' shapes, zeros for ``None``, as a vector in float64."""
    parts = [
        torch.zeros(shape.numel(), dtype=torch.float64, device=space.device)
        if slope is None
        else slope.detach().to_dense().double().flatten()
        for slope, shape in zip(slopes, space.shapes, strict=True)
    ]
    return torch.cat(parts)


def _random_like(leaves: Any, generator: torch.Generator) -> list[Tensor]:
    """Returns a random direction of unit length, in tensors of the leaves' shapes."""
    options: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    drawn = [torch.randn(p.shape, **options) for p in leaves]
    norm = torch.stack([d.norm() for d in drawn]).norm()
    return [(d / norm).to(p) for d, p in zip(drawn, leaves, strict=True)]


def head(batch: Any, examples: int) -> Any:
    """Returns the first examples of a batch that has more, ``None`` of one that cannot be cut."""
    leaves = tree_leaves(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    plain = all(isinstance(leaf, Tensor | int | float | str | None) for leaf in leaves)
    lengths = {len(t) if t.dim() and t.layout == torch.strided else 0 for t in tensors}
    if not plain or len(lengths) != 1 or lengths.pop() <= examples:
        return None
    return tree_map(lambda leaf: leaf[:examples] if isinstance(leaf, Tensor) else leaf, batch)


def see(batch: Any, pieces: list[Any]) -> list[Any]:
    """Returns a part of the first batch of a pass and of the latest, given those so far."""
    part = head(batch, _FEWER if pieces else _EXAMPLES)
    return [*pieces[:1], batch if part is None else tree_map(_copied, part)]


def _as_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().requires_grad_()
    return leaf


def _itself(output: Any) -> Any:
    return output


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf  # a view would hold the whole batch
