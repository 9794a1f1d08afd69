"""``FiniteDifferenceHessian``: for models that have a gradient and no second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subspace_optim._validation import check_number
from subspace_optim.curvature.contexts import Mode
from subspace_optim.curvature.evaluation import (
    Derivatives,
    PerParameter,
    Point,
    loss_and_gradient,
)
from subspace_optim.curvature.hessian import MeanLossHessian
from subspace_optim.curvature.names import Params
from subspace_optim.curvature.objective import BatchLoss, BatchLossFunction, Supervised
from subspace_optim.curvature.report import Products


class FiniteDifferenceHessian(MeanLossHessian):
    r"""The Hessian of the mean loss over ``data``, by central differences of gradients.

    .. math::
        H v \approx \frac{g(\theta + \varepsilon \hat v) - g(\theta - \varepsilon \hat v)}
        {2 \varepsilon} \, \lVert v \rVert, \qquad \hat v = v / \lVert v \rVert, \qquad
        \varepsilon = (3 u)^{1/3} \, \ell(\theta)

    For models with fused kernels, or functions made for one backward pass: it needs gradients
    only, and leaves every kernel as it is. Where ``HessianOperator`` works, it is faster and
    exact. Nothing is written to the parameters: they hold perturbed copies for the time of a
    gradient.

    The step is the best one under two assumptions: gradients have a relative error u, and the
    loss changes its shape over a length ℓ, so that with λ = ‖H‖ a gradient is of size λℓ and
    the third derivative of it λ/ℓ². The error of a difference is then at most
    λ((ε/ℓ)²/6 + uℓ/ε), which is least at ε = (3u)^{1/3} ℓ and there (3u)^{2/3}/2 times λ: the
    ``accuracy``, 4e-11 in float64 and 3e-5 in float32. The length is the size of the weights: a
    direction of high curvature moves a matrix by about one of rank one, which is to be compared
    with its spectral norm, for a square W of n random entries ‖W‖/n^{1/4}; ℓ is the median of
    this over the weight matrices.

    The accuracy is a floor. It is met where the loss is as smooth as assumed (measured, float32:
    3e-5 for a fresh tanh network of 200 000 parameters, where smaller and larger steps are
    worse), and missed where gradients cancel in the mean over data (4e-3 for the same network
    once it has learned its data). Where activations have kinks, as ReLU has, a difference also
    counts the kinks that lie within ε, whatever ε is: it is the curvature of the loss as seen at
    this length, and may be far from the Hessian almost everywhere (measured for a ReLU network:
    errors of λ itself in float32; in float64, where ε is a thousandth of that, 1e-10). Products
    are symmetric, and linear in v, up to the same errors.

    A product costs two gradients. Batches are kept on the device as long as they fit
    ``memory_budget``, else they are read once for each block of products.

    Args:
        model: called as ``model(x)``. ``DistributedDataParallel`` and ``torch.compile`` wrappers
            are taken off.
        loss_fn: ``loss_fn(output, target)``, a mean over examples.
        data: ``(x, y)``, or any re-iterable of such batches that yields the same ones in every
            pass. Batches are moved to the parameters' device. A pair of pairs is read as two
            batches; one batch of such parts is a list of one: ``[((a, b), (c, d))]``.
        params: the parameters to differentiate by: tensors, a pattern of names such as
            ``"blocks.*.attn.*"``, several, or a predicate of (name, tensor) (default: all that
            require a gradient).
        mode: ``"train"`` or ``"eval"`` (default: the mode that the model is in).
        memory_budget: bytes for kept batches (default: a quarter of the memory that is free).
        seed: of the dropout masks.
        rounding: u, the relative error of gradients (default: the machine epsilon of the dtype).
            For kernels that compute in bf16 take about 1e-4: their roundings partly cancel.
        process_group: sums over its ranks, as in ``HessianOperator`` (default: none).
        verify: whether it proves, as ``HessianOperator`` does, that the loss is one function and
            the gradient the user's. Its products are differences of these by definition.

    Raises:
        ArgumentError: an argument that cannot be used; the message names the way out.
    """

    _fused_kernels: ClassVar[bool] = True
    _products: ClassVar[Products] = "differences"

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Params = None,
        mode: Mode | None = None,
        memory_budget: int | None = None,
        seed: int = 0,
        rounding: float | None = None,
        process_group: Any = None,
        verify: bool = True,
    ) -> None:
        self._set_up(
            model,
            Supervised(loss_fn),
            data,
            params=params,
            mode=mode,
            memory_budget=memory_budget,
            seed=seed,
            rounding=rounding,
            process_group=process_group,
            verify=verify,
        )

    def _set_up(
        self,
        model: nn.Module,
        batch_loss: BatchLossFunction,
        data: Any,
        *,
        rounding: float | None = None,
        **options: Any,
    ) -> None:
        if rounding is not None:
            check_number("rounding", rounding, exclusive=True)
        super()._set_up(model, batch_loss, data, **options)
        self._rounding = rounding
        self.stats.engine = "finite_difference"

    @property
    def rounding(self) -> float:
        """u, the relative error of a gradient."""
        return torch.finfo(self.dtype).eps if self._rounding is None else self._rounding

    @property
    def accuracy(self) -> float:
        """Relative error of a product that is to be expected at best: ``(3u)^{2/3} / 2``."""
        return float((3 * self.rounding) ** (2 / 3) / 2)

    def _count(self, products: int) -> None:
        super()._count(products)
        self.stats.gradients += 2 * products
        self.stats.full_gradients += 2 * products * self._passes.share

    def _linearize(self, batch_loss: BatchLoss, point: Point) -> Derivatives:
        leaves = point.leaves
        step = (3 * self.rounding) ** (1 / 3) * self.parameters.length(leaves)

        def gradient(direction: list[Tensor], distance: Tensor) -> PerParameter:
            moved = [
                torch.add(p.detach(), d * distance).to(p.dtype)
                for p, d in zip(leaves, direction, strict=True)
            ]
            with point.at(batch_loss.seed), point.displaced(moved) as there:
                return loss_and_gradient(batch_loss, there).gradient

        def product(v: list[Tensor]) -> PerParameter:
            norm = self.parameters.norm(v)
            distance = torch.where(norm > 0, step / norm, 0.0)
            ahead, behind = gradient(v, distance), gradient(v, -distance)
            return [
                None if a is None or b is None else (a - b) * (norm / (2 * step))
                for a, b in zip(ahead, behind, strict=True)
            ]

        derivatives = loss_and_gradient(batch_loss, point)
        derivatives.product = product
        return derivatives
