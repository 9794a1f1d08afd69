"""The proof of an operator on one batch, at one point."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspace_optim._validation import (
    InconsistentDerivativeError,
    NotOneFunctionError,
    SecondDerivativeError,
)
from subspace_optim.curvature.evaluation import Point, loss_alone, loss_and_gradient
from subspace_optim.curvature.objective import BatchLoss
from subspace_optim.curvature.operator import rounding_at
from subspace_optim.curvature.parameters import LOW_PRECISION, ParameterSpace, length
from subspace_optim.curvature.report import Parts, Report
from subspace_optim.curvature.second_derivatives import has_functions
from subspace_optim.curvature.stopped_gradients import ReplayError, StoppedGradients
from subspace_optim.curvature.structure import moved
from subspace_optim.curvature.surroundings import dtype_inside

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
_NOT_FINITE = (
    "The loss has no finite second derivative, though it and its gradient are finite: somewhere "
    "there is a norm or a square root of exactly 0 (a distance of two equal rows, a row of zeros "
    "that is normalised), or a power below 2 at 0. Add a small number inside of the root, or use "
    "FiniteDifferenceHessian, which takes the same arguments."
)


class Trial:
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
            with StoppedGradients() as stopped:
                loss, weight = self.evaluate()
            # Inside of such functions gradients are off as well, and nothing is constant.
            self.opaque = has_functions(loss)
            self.stops = bool(stopped.recorded) and not self.opaque
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

        stopped = StoppedGradients()
        if self.stops:
            with point.at(self.parts.seed), point.displaced(base), stopped:
                evaluate()

        def gradient(distance: float) -> Tensor:
            values = [b + distance * d for b, d in zip(base, v, strict=True)]
            self.report.gradients += 1
            held = stopped.replayed() if self.stops else nullcontext()
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
        except ReplayError:
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
