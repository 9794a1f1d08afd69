"""What the loss of a batch is a mean over.

The loss of all data is the mean of the losses of the batches, each weighted by what it is a mean
over. So it does not depend on how the data are split into batches.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.structure import tensors

Weight = Tensor | float


@dataclass(frozen=True)
class Average:
    """A loss, and what it is a mean over.

    Attributes:
        loss: of a batch, as the user's function returned it.
        weight: how many examples, targets or elements it is a mean over; ``None`` if the loss does
            not tell.
        summed: whether it is a sum and no mean; its weight is then 1.
        unit: what the weight counts, in words.
    """

    loss: Tensor
    weight: Weight | None
    summed: bool = False
    unit: str = "examples"


def averaged(loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Average:
    r"""Returns ``loss_fn(output, target)``, and what it is a mean over if that can be told.

    It can be told where ``loss_fn`` returns unchanged what a loss function of
    ``torch.nn.functional`` returned: as a loss module of torch does, a ``partial``, or a function
    of the user's that reshapes, masks or selects the output first. With ``reduction="sum"`` it is
    a sum. With ``"mean"``, for an output of N examples:

    ======================================================= =====================================
    loss                                                    is a mean over
    ======================================================= =====================================
    ``cross_entropy``, ``nll_loss``                         targets other than ``ignore_index``,
                                                            each as its class weight
    ``cross_entropy`` of class probabilities                N, times positions in space or time
    ``mse_loss``                                            elements, each as its ``weight``
    ``l1_loss``, ``smooth_l1_loss``, ``huber_loss``,
    ``binary_cross_entropy`` (also ``..._with_logits``),
    ``kl_div``, ``poisson_nll_loss``,
    ``gaussian_nll_loss``, ``soft_margin_loss``,
    ``hinge_embedding_loss``, ``margin_ranking_loss``,
    ``cosine_embedding_loss``                               elements of the loss
    ``kl_div`` with ``"batchmean"``                         N
    ``multi_margin_loss``, ``multilabel_margin_loss``,
    ``multilabel_soft_margin_loss``,
    ``triplet_margin_loss``                                 N (and what else precedes classes)
    ``ctc_loss``                                            sequences
    ======================================================= =====================================

    Anything else does not tell, and neither does half of one of these.
    """
    seen = _TorchLosses()
    with seen:
        loss = _eager(loss_fn)(output, target)
    return seen.average(loss)


def examples(x: Any, y: Any) -> int:
    """Returns the number of examples of a batch ``(x, y)``.

    It is the length of a tensor ``y``; that of a sequence ``y`` of one entry an example, such as
    the objects of each image; or else that of the first tensor in ``y``, or in ``x``.

    Raises:
        ArgumentError: it holds no tensor.
    """
    if isinstance(y, Tensor) and y.dim() > 0:
        return y.size(0)
    size_of_x = _size(x)
    if isinstance(y, list | tuple) and not isinstance(y, PackedSequence) and len(y) > 0:
        mappings = all(isinstance(entry, Mapping) for entry in y)
        of_sequences = isinstance(x, list | tuple) and len(x) == len(y) and not _one_size(x, y)
        if mappings or of_sequences or len(y) == size_of_x:
            return len(y)
    size_of_y = _size(y)
    size = size_of_x if size_of_y is None else size_of_y
    if size is None:
        raise ArgumentError("a batch of data", "of no tensor", "of at least one example")
    return size


def concatenated(first: tuple[Any, Any], second: tuple[Any, Any]) -> tuple[Any, Any] | None:
    """Returns two batches as one, or ``None`` where it cannot be told how they are joined.

    Tensors are joined along their first dimension, mappings key by key, and sequences entry by
    entry, or end to end if they have one entry an example.

    Args:
        first: inputs, or outputs, and targets.
        second: the same of another batch.
    """
    sizes = examples(*first), examples(*second)
    try:
        x, y = (_concatenated(*parts, sizes) for parts in zip(first, second, strict=True))
    except _CannotBeJoinedError:
        return None
    return x, y


class _CannotBeJoinedError(Exception):
    """Two parts of batches that are joined in no way, or in more than one."""


def _concatenated(first: Any, second: Any, sizes: tuple[int, int]) -> Any:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        plain = all(t.layout == torch.strided and not t.is_nested for t in (first, second))
        alike = first.shape[1:] == second.shape[1:] and first.dtype == second.dtype
        if plain and alike and first.dim() > 0 and (len(first), len(second)) == sizes:
            return torch.cat([first, second])
    elif type(first) is dict and type(second) is dict and first.keys() == second.keys():
        return {key: _concatenated(first[key], second[key], sizes) for key in first}
    elif type(first) is type(second) and type(first) in (list, tuple):
        one_each = (len(first), len(second)) == sizes
        one_size = all(
            isinstance(t, Tensor) and t.dim() > 0 and len(t) == size
            for part, size in zip((first, second), sizes, strict=True)
            for t in part
        )
        if one_each and not one_size:
            return first + second
        if len(first) == len(second) and not one_each:
            pairs = zip(first, second, strict=True)
            return type(first)(_concatenated(a, b, sizes) for a, b in pairs)
    raise _CannotBeJoinedError


def _size(part: Any) -> int | None:
    """The number of examples in ``x`` or in ``y`` alone, by its first tensor."""
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])
    first = next((tensor for tensor in tensors(part) if tensor.dim() > 0), None)
    return None if first is None else first.size(0)


def _one_size(x: Any, y: Any) -> bool:
    """Whether all tensors have one first dimension, as the inputs and heads of a batch have."""
    return len({t.size(0) if t.dim() else None for t in tensors([x, y])}) == 1


def _eager(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Takes the wrapper of ``torch.compile`` off."""
    for name in ("_orig_mod", "_torchdynamo_orig_callable"):
        loss_fn = getattr(loss_fn, name, loss_fn)
    return loss_fn


# --- torch's own losses -------------------------------------------------------------------------


def _targets(arguments: Mapping[str, Any], probabilities: bool, classes: int) -> Weight:
    """Of ``cross_entropy`` and its kin: the weights of the targets that count, added up."""
    target: Tensor = arguments["target"]
    weight: Tensor | None = arguments["weight"]
    ignored = arguments["ignore_index"]
    if probabilities:
        return target.numel() / classes
    counts = target != (-100 if ignored is None else ignored)
    if weight is None:
        return counts.sum()
    return torch.where(counts, weight.detach().double()[target.where(counts, 0)], 0.0).sum()


def _targets_of_logits(arguments: Mapping[str, Any]) -> Weight:
    shape = arguments["input"].shape
    return _targets(arguments, arguments["target"].shape == shape, shape[min(1, len(shape) - 1)])


def _targets_of_linear(arguments: Mapping[str, Any]) -> Weight:
    classes = len(arguments["linear_weight"])
    return _targets(arguments, arguments["target"].is_floating_point(), classes)


def _weighted_elements(arguments: Mapping[str, Any]) -> Weight:
    weight: Tensor | None = arguments["weight"]
    return _ELEMENTS(arguments) if weight is None else weight.detach().sum()


def _elements(*names: str) -> Callable[[Mapping[str, Any]], Weight]:
    """Of losses with one value for each element of these arguments, broadcast."""
    return lambda arguments: math.prod(_broadcast(arguments, names))


def _rows(*names: str) -> Callable[[Mapping[str, Any]], Weight]:
    """Of losses with one value for all classes, or all features, of an example."""
    return lambda arguments: math.prod(_broadcast(arguments, names)[:-1])


def _broadcast(arguments: Mapping[str, Any], names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(arguments[name].shape for name in names)))


def _divergence(arguments: Mapping[str, Any]) -> Weight:
    shape = arguments["input"].shape
    batchmean = arguments["reduction"] == "batchmean"
    return math.prod(shape[:1]) if batchmean else _ELEMENTS(arguments)


def _sequences(arguments: Mapping[str, Any]) -> Weight:
    time_batch_classes: tuple[int, ...] = tuple(arguments["log_probs"].shape)
    return time_batch_classes[1] if len(time_batch_classes) == 3 else 1


_ELEMENTS = _elements("input", "target")

_WEIGHTS: dict[str, Callable[[Mapping[str, Any]], Weight]] = {
    "binary_cross_entropy": _ELEMENTS,
    "binary_cross_entropy_with_logits": _ELEMENTS,
    "cosine_embedding_loss": _elements("target"),
    "cross_entropy": _targets_of_logits,
    "ctc_loss": _sequences,
    "gaussian_nll_loss": _ELEMENTS,
    "hinge_embedding_loss": _ELEMENTS,
    "huber_loss": _ELEMENTS,
    "kl_div": _divergence,
    "l1_loss": _ELEMENTS,
    "linear_cross_entropy": _targets_of_linear,
    "margin_ranking_loss": _elements("input1", "input2", "target"),
    "mse_loss": _weighted_elements,
    "multi_margin_loss": _elements("target"),
    "multilabel_margin_loss": _rows("input"),
    "multilabel_soft_margin_loss": _rows("input", "target"),
    "nll_loss": _targets_of_logits,
    "poisson_nll_loss": _ELEMENTS,
    "smooth_l1_loss": _ELEMENTS,
    "soft_margin_loss": _ELEMENTS,
    "triplet_margin_loss": _rows("anchor", "positive", "negative"),
}

_UNITS: dict[Callable[[Mapping[str, Any]], Weight], str] = {
    _targets_of_logits: "targets",
    _targets_of_linear: "targets",
    _sequences: "sequences",
}

# Not every version of torch has all of them.
_FUNCTIONS = {getattr(F, name): name for name in _WEIGHTS if hasattr(F, name)}
_SIGNATURES = {function: inspect.signature(function) for function in _FUNCTIONS}


def _reduction(arguments: Mapping[str, Any]) -> str:
    """The argument, or what two older ones say instead."""
    mean, reduced = arguments.get("size_average"), arguments.get("reduce")
    if mean is None and reduced is None:
        return str(arguments["reduction"])
    if reduced is False:
        return "none"
    return "sum" if mean is False else "mean"


class _TorchLosses(TorchFunctionMode):
    """Records the calls of torch's own losses, wherever they are made."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Callable[..., Any], Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and records the call if it is one of a loss."""
        result = func(*args, **(kwargs or {}))
        if func in _FUNCTIONS:
            self._calls.append((result, func, args, kwargs or {}))
        return result

    def average(self, loss: Tensor) -> Average:
        """Returns what ``loss`` is a mean over, if one of the recorded calls returned it."""
        for result, function, args, kwargs in self._calls:
            if result is loss:
                bound = _SIGNATURES[function].bind(*args, **kwargs)
                bound.apply_defaults()
                reduction = _reduction(bound.arguments)
                if reduction == "sum":
                    return Average(loss, 1.0, summed=True)
                if reduction in ("mean", "batchmean"):
                    count = _WEIGHTS[_FUNCTIONS[function]]
                    unit = _UNITS.get(count, "elements")
                    if bound.arguments.get("weight") is not None:
                        unit = f"weighted {unit}"
                    return Average(loss, count(bound.arguments), unit=unit)
        return Average(loss, None)
