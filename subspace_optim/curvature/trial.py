"""The proof of an operator on one batch, at one point."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspace_optim._validation import (
    InconsistentDerivativeError,
    NotOneFunctionError,
    SecondDerivativeError,
)
from subspace_optim.curvature.evaluation import PerParameter, Point, loss_alone, loss_and_gradient
from subspace_optim.curvature.objective import BatchLoss
from subspace_optim.curvature.operator import rounding_at
from subspace_optim.curvature.parameters import LOW_PRECISION
from subspace_optim.curvature.report import Parts, Report
from subspace_optim.curvature.second_derivatives import has_functions
from subspace_optim.curvature.stopped_gradients import ReplayError, StoppedGradients
from subspace_optim.curvature.structure import moved
from subspace_optim.curvature.surroundings import dtype_inside

_ASIDE = 1e-3
"""Products are proved at this distance from the parameters, relative to their length. That avoids
kinks exactly at the parameters, such as that of a unit whose inputs are all zero."""
_STEP = 1e-7
"""Length of the step of a difference in float64, relative to the length of the parameters."""
_AGREE = {torch.float64: 1e-3, torch.float32: 3e-2}
"""Relative difference allowed between a product and a difference: wrong ones differ by 3 % or
more."""
_SYMMETRIC = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative asymmetry allowed of products: wrong ones have 3 % or more."""
_SAME = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative difference allowed between two gradients ..."""
_ROUNDED = 5e-2
"""... and where one of them is rounded to low precision."""
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
        self.batch_loss = self.of(batch)
        self.ours = torch.zeros(0, device="cpu")
        self.stops = False  # whether the loss stops gradients of its own accord

    def of(self, batch: Any) -> BatchLoss:
        """Returns the loss of a batch."""
        parts = self.parts
        return BatchLoss(parts.model, parts.batch_loss, batch, parts.seed, parts.space.layout)

    def flat(self, pieces: PerParameter) -> Tensor:
        """Returns a gradient, or a product, as one vector in float64."""
        return self.parts.space.flatten(pieces, torch.float64)

    def norm(self, v: Tensor) -> float:
        """Returns the length of a vector."""
        return math.sqrt(float(self.parts.space.inner.sum(v.square().sum())))

    def one_function(self, watching: AbstractContextManager[Any]) -> bool:
        """Evaluates the loss twice.

        Args:
            watching: entered for the first time.

        Returns:
            Whether the loss is finite and has a weight.

        Raises:
            NotOneFunctionError: the two differ.
        """
        point = self.point

        def watched() -> tuple[Tensor, Tensor]:
            with StoppedGradients() as stopped:
                loss, weight = self.batch_loss()
            # Autograd functions written in Python run without gradients, but have their own.
            self.stops = bool(stopped.recorded) and not has_functions(loss)
            return loss, weight

        with point.at(self.parts.seed), watching:
            first = loss_and_gradient(watched, point)
        with point.at(self.parts.seed):
            second = loss_alone(self.batch_loss, point)
        self.report.gradients += 2
        self.ours = self.flat(first.gradient)
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
            InconsistentDerivativeError: they differ.
        """
        point = self.point
        if point.layout is not None:
            return  # the user's own is for fully_shard to compute, with what hangs on its hooks
        low = any(p.dtype in LOW_PRECISION for p in point.own)
        user = replace(point, in_place="always")
        self.report.gradients += 1
        with user.at(self.parts.seed, hooks=True), ExitStack() as stack:
            if low:
                wide = [p.detach().to(dtype_inside(p, None)) for p in point.own]
                stack.enter_context(user.displaced(wide))
            found = loss_and_gradient(self.batch_loss, user)
        theirs = self.flat(found.gradient)
        scale = max(self.norm(self.ours), self.norm(theirs))
        error = self.norm(self.ours - theirs)
        self.report.gradient_error = error / scale if scale > 0 else 0.0
        # Torch rounds a gradient to the dtype that it knows the parameter by.
        tolerance = _ROUNDED if low else _SAME[self.parts.space.dtype]
        if not self.report.gradient_error <= tolerance:
            message = (
                f"The gradient that is measured ({self.norm(self.ours):.4g}) is not the one "
                f"that loss.backward() gives the model's parameters ({self.norm(theirs):.4g}): "
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
        found = self._in_float64() or self._measured(self.point, self.batch_loss)
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
            return self._measured(self.point, self.batch_loss)

        def widened(own: torch.dtype) -> torch.dtype:
            return torch.float64 if own.is_floating_point else own

        wide = replace(self.point, in_place=False, dtype=torch.float64)
        batch_loss = self.of(moved(self.batch, self.parts.space.device, widened))
        self.report.gradients += 1
        try:
            with wide.at(self.parts.seed):
                there = loss_and_gradient(batch_loss, wide)
            gradient = self.flat(there.gradient)
        except Exception:  # noqa: BLE001 (float32 is written into the model, or there is no float64)
            return None
        if there.loss.dtype != torch.float64 or not math.isclose(
            float(there.loss), self.loss, rel_tol=1e-2, abs_tol=1e-6
        ):
            return None
        near = _AGREE[torch.float32] + rounding_at(float(there.loss), torch.float32)
        if self.norm(gradient - self.ours) > near * self.norm(gradient):
            return None
        return self._measured(wide, batch_loss)

    def _measured(self, point: Point, batch_loss: BatchLoss) -> _Found:
        """Measures a product along a random direction, and the symmetry of two.

        Returns:
            What was found, with an error of NaN where differences do not tell it.

        Raises:
            SecondDerivativeError: the product is not finite.
            TransformError: the loss is another inside of the transform.
        """
        dtype = point.leaves[0].dtype if point.dtype is None else point.dtype
        scale = float(self.parts.space.length(point.leaves))
        seed = self.parts.space.inner.seed(self.parts.seed + 1)
        generator = torch.Generator("cpu").manual_seed(seed)
        aside, v = (self._random(point.leaves, generator) for _ in range(2))
        base = [p.detach().clone() for p in point.leaves]
        if dtype == torch.float64:
            base = [b + _ASIDE * scale * a for b, a in zip(base, aside, strict=True)]

        self.report.gradients += 3
        with point.at(self.parts.seed), point.displaced(base) as there:
            here = self.parts.linearize(batch_loss, there)
            gradient = self.flat(here.gradient)
            product = self.flat(here.product(v))
            norm = self.norm(product)
            u = torch.nan_to_num(product / norm) if norm > 0 else product
            again = self.flat(here.product(self.parts.space.unflatten(u.to(dtype))))
        with point.at(self.parts.seed), point.displaced(base):
            plain = float(loss_alone(batch_loss, point).loss)
        if not math.isclose(plain, float(here.loss), rel_tol=1e-4, abs_tol=1e-6):
            message = f"The transformed loss is {float(here.loss):.6g}, and not {plain:.6g}."
            raise TransformError(message)
        if not math.isfinite(norm) and math.isfinite(self.norm(gradient)):
            raise SecondDerivativeError(_NOT_FINITE)
        along = float(self.parts.space.inner.sum(self.flat(v) @ again))
        largest = max(norm, self.norm(again))
        asymmetry = abs(norm - along) / largest if largest > 0 else 0.0
        written = set(map(id, point.written)) & set(map(id, point.own))
        if self.parts.products == "symmetric" or written:
            # The product is with another matrix than the Hessian, or the loss moves its parameters
            # itself: differences of gradients would measure something else.
            return _Found(math.nan, asymmetry, plain, dtype)
        # The bound of `rounding_at` is rarely met: a fortieth of it is what one finds.
        rounded = 100 * torch.finfo(dtype).eps + rounding_at(plain, dtype) / 40
        rounding = rounded * max(self.norm(gradient), norm * scale)
        error = self._error(point, batch_loss, base, v, product, rounding)
        return _Found(error, asymmetry, plain, dtype)

    def _random(self, leaves: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Returns a random direction of unit length, in tensors like the leaves."""
        space = self.parts.space
        drawn = torch.randn(space.size_here, generator=generator, dtype=torch.float64, device="cpu")
        drawn = drawn.to(space.device)
        pieces = space.unflatten(drawn / self.norm(drawn))
        return [d.to(p) for d, p in zip(pieces, leaves, strict=True)]

    def _error(
        self,
        point: Point,
        batch_loss: BatchLoss,
        base: list[Tensor],
        v: list[Tensor],
        product: Tensor,
        rounding: float,
    ) -> float:
        """Compares a product with a central difference of gradients.

        Args:
            point: where.
            batch_loss: what is differentiated.
            base: the parameters at which the product was taken.
            v: the direction.
            product: with ``v``.
            rounding: of the gradients: a difference cannot tell less.

        Returns:
            How far they are apart, beyond rounding, relative to the longer of them; NaN where the
            loss stops gradients in another order at other parameters.
        """
        dtype, scale = base[0].dtype, float(self.parts.space.length(point.leaves))
        stopped = StoppedGradients()
        if self.stops:
            with point.at(self.parts.seed), point.displaced(base), stopped:
                batch_loss()

        def gradient_at(distance: float) -> Tensor:
            values = [b + distance * d for b, d in zip(base, v, strict=True)]
            self.report.gradients += 1
            held = stopped.replayed() if self.stops else nullcontext()
            with point.at(self.parts.seed), point.displaced(values) as there, held:
                return self.flat(loss_and_gradient(batch_loss, there).gradient)

        def difference(step: float) -> Tensor:
            ahead, behind = gradient_at(step * scale), gradient_at(-step * scale)
            return (ahead - behind) / (2 * step * scale)

        step = _STEP if dtype == torch.float64 else (3 * torch.finfo(dtype).eps) ** (1 / 3)
        try:
            found = difference(step)
        except ReplayError:
            return math.nan
        rounding = rounding / (step * scale)
        longer = max(self.norm(product), self.norm(found))
        off = self.norm(product - found) - rounding
        if off > _AGREE[dtype] * longer:  # kinks, or gradients that are rounded by more than that
            nearer = difference(step / 8)
            off = self.norm(product - nearer) - 2 * self.norm(found - nearer) - rounding
        return max(0.0, off) / longer if longer > 0 else 0.0


class _Found(NamedTuple):
    """What was measured of products: error and asymmetry, at which loss and in which dtype."""

    error: float
    asymmetry: float
    loss: float
    dtype: torch.dtype


class TransformError(RuntimeError):
    """The loss has another value inside of a transform, as where it draws in another order."""
