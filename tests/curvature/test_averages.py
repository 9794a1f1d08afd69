"""What the loss of a batch is a mean over: how data are split changes nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature import HessianOperator
from subspace_optim.curvature.averages import averaged, concatenated, examples
from subspace_optim.curvature.objective import Supervised

CLASSES = 4
LossFn = Callable[[Any, Any], Tensor]
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Case:
    """A loss by its reduction, the shape of the output of an example, and targets of examples.

    ``loss`` makes the function of (output, target) that has the given reduction.
    """

    loss: Callable[[str], LossFn]
    shape: tuple[int, ...]
    targets: Callable[[int], Any]
    mean: str = "mean"
    has_sum: bool = True  # that the mean is a part of
    twice: bool = True  # torch has its second derivative


class Outputs(nn.Module):
    """A nonlinear layer whose output has the given shape for each example."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = shape
        self.layer = nn.Linear(2, int(torch.Size(shape).numel()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).mul(2).view(len(x), *self.shape)


# --- torch's losses, with options that are drawn ------------------------------------------------


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _signs(*shape: int) -> Tensor:
    return _floats(*shape).sign()


def _positions(draw: Draw) -> tuple[int, ...]:
    return draw(st.sampled_from([(), (2,), (2, 3)]))


def _class_weights(draw: Draw) -> Tensor | None:
    return _floats(CLASSES).exp() if draw(st.booleans()) else None


def _spelled(draw: Draw, module: Any, function: Any, **options: Any) -> Callable[[str], LossFn]:
    """The loss as a module, a function with keywords, or inside of a function of one's own."""

    def make(reduction: str) -> LossFn:
        with_keywords = partial(function, **options, reduction=reduction)
        return {
            "module": lambda: module(**options, reduction=reduction),
            "partial": lambda: with_keywords,
            "function": lambda: lambda output, target: with_keywords(output.clone(), target),
            "subclass": lambda: type("Own", (module,), {})(**options, reduction=reduction),
        }[spelling]()

    spelling = draw(st.sampled_from(["module", "partial", "function", "subclass"]))
    return make


def _after(transform: Callable[[Tensor], Tensor], loss: Callable[[str], LossFn]) -> Any:
    """The loss of the output, transformed first: log-probabilities, and the like."""

    def make(reduction: str) -> LossFn:
        loss_fn = loss(reduction)
        return lambda output, target: loss_fn(transform(output), target)

    return make


def _indices(draw: Draw, positions: tuple[int, ...], ignored: int) -> Callable[[int], Tensor]:
    share = draw(st.sampled_from([0.0, 0.3, 0.8]))

    def targets(n: int) -> Tensor:
        y = torch.randint(CLASSES, (n, *positions))
        y[torch.rand(y.shape) < share] = ignored
        y.view(-1)[0] = CLASSES - 1  # all data together have a target that counts
        return y

    return targets


def _cross_entropy(draw: Draw) -> Case:
    positions, ignored = _positions(draw), draw(st.sampled_from([-100, 1]))
    options = {"weight": _class_weights(draw), "ignore_index": ignored}
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.2]))
    loss = _spelled(draw, nn.CrossEntropyLoss, F.cross_entropy, **options)
    return Case(loss, (CLASSES, *positions), _indices(draw, positions, ignored))


def _cross_entropy_of_probabilities(draw: Draw) -> Case:
    positions = _positions(draw)
    options = {"weight": _class_weights(draw), "label_smoothing": draw(st.sampled_from([0, 0.2]))}
    loss = _spelled(draw, nn.CrossEntropyLoss, F.cross_entropy, **options)
    shape = (CLASSES, *positions)
    return Case(loss, shape, lambda n: _floats(n, *shape).softmax(1))


def _nll(draw: Draw) -> Case:
    positions, ignored = _positions(draw), draw(st.sampled_from([-100, 0]))
    options = {"weight": _class_weights(draw), "ignore_index": ignored}
    loss = _after(partial(F.log_softmax, dim=1), _spelled(draw, nn.NLLLoss, F.nll_loss, **options))
    return Case(loss, (CLASSES, *positions), _indices(draw, positions, ignored))


def _linear_cross_entropy(draw: Draw) -> Case:
    ignored, weight, matrix = -100, _class_weights(draw), _floats(CLASSES, 3)

    def make(reduction: str) -> LossFn:
        options = {"weight": weight, "reduction": reduction}
        return lambda o, y: F.linear_cross_entropy(o, matrix, y, **options)

    if draw(st.booleans()):
        return Case(make, (3,), lambda n: _floats(n, CLASSES).softmax(1))
    return Case(make, (3,), _indices(draw, (), ignored))


def _elementwise(
    module: Any, function: Any, targets: Callable[..., Tensor], **options: Any
) -> Callable[[Draw], Case]:
    def case(draw: Draw) -> Case:
        shape = (3, *_positions(draw))
        loss = _spelled(draw, module, function, **options)
        return Case(loss, shape, lambda n: targets(n, *shape))

    return case


def _squares_with_weights(draw: Draw) -> Case:
    def make(reduction: str) -> LossFn:
        return lambda o, y: F.mse_loss(o, y[..., 0], weight=y[..., 1], reduction=reduction)

    return Case(make, (3,), lambda n: torch.stack([_floats(n, 3), _floats(n, 3).exp()], dim=-1))


def _huber_with_weights(draw: Draw) -> Case:
    def make(reduction: str) -> LossFn:
        return lambda o, y: F.huber_loss(o, y[..., 0], weight=y[..., 1], reduction=reduction)

    return Case(make, (3,), lambda n: torch.stack([_floats(n, 3), _floats(n, 3).exp()], dim=-1))


def _probabilities(draw: Draw) -> Case:
    weight = _floats(3).exp() if draw(st.booleans()) else None
    loss = _spelled(draw, nn.BCELoss, F.binary_cross_entropy, weight=weight)
    return Case(_after(torch.sigmoid, loss), (3,), lambda n: torch.rand(n, 3).double())


def _logits(draw: Draw) -> Case:
    weight = _floats(3).exp() if draw(st.booleans()) else None
    options = {"weight": weight, "pos_weight": _floats(3).exp() if draw(st.booleans()) else None}
    function = F.binary_cross_entropy_with_logits
    loss = _spelled(draw, nn.BCEWithLogitsLoss, function, **options)
    return Case(loss, (3,), lambda n: torch.rand(n, 3).double())


def _divergence(draw: Draw) -> Case:
    positions, mean = _positions(draw), draw(st.sampled_from(["mean", "batchmean"]))
    loss = _after(partial(F.log_softmax, dim=1), _spelled(draw, nn.KLDivLoss, F.kl_div))
    shape = (CLASSES, *positions)
    return Case(loss, shape, lambda n: _floats(n, *shape).softmax(1), mean)


def _gaussian(draw: Draw) -> Case:
    def make(reduction: str) -> LossFn:
        if as_module:
            return partial(nn.GaussianNLLLoss(reduction=reduction), var=0.7)
        return partial(F.gaussian_nll_loss, var=0.7, reduction=reduction)

    as_module = draw(st.booleans())
    return Case(make, (3,), lambda n: _floats(n, 3))


def _multi_margin(draw: Draw) -> Case:
    options = {"weight": _class_weights(draw), "p": draw(st.sampled_from([1, 2]))}
    loss = _spelled(draw, nn.MultiMarginLoss, F.multi_margin_loss, **options)
    return Case(loss, (CLASSES,), lambda n: torch.randint(CLASSES, (n,)), twice=False)


def _multilabel_margin(draw: Draw) -> Case:
    def targets(n: int) -> Tensor:
        y = torch.full((n, CLASSES), -1)
        y[:, 0] = torch.randint(CLASSES, (n,))
        return y

    loss = _spelled(draw, nn.MultiLabelMarginLoss, F.multilabel_margin_loss)
    return Case(loss, (CLASSES,), targets, twice=False)


def _multilabel_soft_margin(draw: Draw) -> Case:
    options = {"weight": _class_weights(draw)}
    loss = _spelled(draw, nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss, **options)
    positions = draw(st.sampled_from([(), (2,)]))
    shape = (*positions, CLASSES)
    return Case(loss, shape, lambda n: (_floats(n, *shape) > 0).double())


def _cosine(draw: Draw) -> Case:
    def make(reduction: str) -> LossFn:
        return lambda o, y: F.cosine_embedding_loss(o[:, 0], o[:, 1], y, reduction=reduction)

    return Case(make, (2, 3), _signs)


def _ranking(draw: Draw) -> Case:
    def make(reduction: str) -> LossFn:
        return lambda o, y: F.margin_ranking_loss(o[:, 0], o[:, 1], y, 0.5, reduction=reduction)

    return Case(make, (2, 3), lambda n: _signs(n, 3))


def _triplets(draw: Draw) -> Case:
    def make(reduction: str) -> LossFn:
        loss = nn.TripletMarginLoss(reduction=reduction)
        return lambda o, y: loss(o[:, 0], o[:, 1], y)

    return Case(make, (2, 3), lambda n: _floats(n, 3))


def _ctc(draw: Draw) -> Case:
    """Targets of 1 to 3 symbols, the number first. Its mean divides each by its length."""

    def make(reduction: str) -> LossFn:
        def loss(output: Tensor, y: Tensor) -> Tensor:
            log_probabilities = output.log_softmax(-1).transpose(0, 1)
            lengths = torch.full((len(y),), output.shape[1])
            args = (log_probabilities, y[:, 1:], lengths, y[:, 0])
            return F.ctc_loss(*args, reduction=reduction)

        return loss

    def targets(n: int) -> Tensor:
        return torch.cat([torch.randint(1, 4, (n, 1)), torch.randint(1, CLASSES, (n, 3))], dim=1)

    return Case(make, (7, CLASSES), targets, has_sum=False, twice=False)


CASES: dict[str, Callable[[Draw], Case]] = {
    "cross_entropy": _cross_entropy,
    "cross_entropy_of_probabilities": _cross_entropy_of_probabilities,
    "nll_loss": _nll,
    "mse_loss": _elementwise(nn.MSELoss, F.mse_loss, _floats),
    "mse_loss_with_weights": _squares_with_weights,
    "l1_loss": _elementwise(nn.L1Loss, F.l1_loss, _floats),
    "smooth_l1_loss": _elementwise(nn.SmoothL1Loss, F.smooth_l1_loss, _floats, beta=0.5),
    "huber_loss": _elementwise(nn.HuberLoss, F.huber_loss, _floats, delta=0.5),
    "huber_loss_with_weights": _huber_with_weights,
    "poisson_nll_loss": _elementwise(
        nn.PoissonNLLLoss, F.poisson_nll_loss, lambda *shape: _floats(*shape).abs()
    ),
    "soft_margin_loss": _elementwise(nn.SoftMarginLoss, F.soft_margin_loss, _signs),
    "hinge_embedding_loss": _elementwise(nn.HingeEmbeddingLoss, F.hinge_embedding_loss, _signs),
    "binary_cross_entropy": _probabilities,
    "binary_cross_entropy_with_logits": _logits,
    "kl_div": _divergence,
    "gaussian_nll_loss": _gaussian,
    "multi_margin_loss": _multi_margin,
    "multilabel_margin_loss": _multilabel_margin,
    "multilabel_soft_margin_loss": _multilabel_soft_margin,
    "cosine_embedding_loss": _cosine,
    "margin_ranking_loss": _ranking,
    "triplet_margin_loss": _triplets,
    "ctc_loss": _ctc,
}
if hasattr(F, "linear_cross_entropy"):  # not in the oldest torch
    CASES["linear_cross_entropy"] = _linear_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")


def _problem(name: str, data: st.DataObject, seed: int, n: int) -> tuple[Case, Any, Tensor, Any]:
    torch.manual_seed(seed)
    case = CASES[name](data.draw)
    return case, Outputs(case.shape).double(), _floats(n, 2), case.targets(n)


many = given(data=st.data(), seed=st.integers(0, 2**31), n=st.integers(1, 7))


@pytest.mark.parametrize("name", CASES)
@many
@settings(max_examples=6)
def test_the_mean_is_the_sum_over_its_weight(name, data, seed, n):
    """Torch's own sum says what its mean was divided by."""
    case, model, x, y = _problem(name, data, seed, n)
    output = model(x).detach()
    mean = averaged(case.loss(case.mean), output, y)
    if not case.has_sum:
        single = [averaged(case.loss("mean"), output[i : i + 1], y[i : i + 1]) for i in range(n)]
        assert mean.weight == sum(float(s.weight) for s in single) == n
        return
    total = averaged(case.loss("sum"), output, y)
    assert (total.weight, total.summed, mean.summed) == (1, True, False)
    expected = float(total.loss)
    assert float(mean.loss) * float(mean.weight) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
@many
@settings(max_examples=3)
def test_how_data_are_split_changes_nothing(name, data, seed, n):
    """Loss, gradient and products are those of all data as one batch, by torch itself."""
    case, model, x, y = _problem(name, data, seed, n)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    loss_fn = case.loss(case.mean)
    pieces = zip([0, *cuts], [*cuts, n], strict=True)
    operator = HessianOperator(model, loss_fn, [(x[a:b], y[a:b]) for a, b in pieces])
    loss, parameters = loss_fn(model(x), y), list(model.parameters())
    assert operator.loss() == pytest.approx(loss.item(), rel=1e-12)
    gradient = _flat(torch.autograd.grad(loss, parameters, create_graph=case.twice))
    torch.testing.assert_close(operator.gradient(), gradient, rtol=0, atol=1e-12)
    if case.twice:
        v = _floats(operator.size)
        product = torch.zeros_like(v)
        if gradient.requires_grad:  # that of an absolute value is constant
            slopes = torch.autograd.grad(gradient @ v, parameters, materialize_grads=True)
            product = _flat(slopes)
        torch.testing.assert_close(operator.matvec(v), product, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in CASES if name != "ctc_loss"])
@many
@settings(max_examples=4)
def test_how_data_are_split_does_not_change_a_sum(name, data, seed, n):
    case, model, x, y = _problem(name, data, seed, n)
    cut = data.draw(st.integers(0, n - 1))
    supervised = Supervised(case.loss("sum"))
    total, weights = 0.0, []
    for piece in (slice(0, cut), slice(cut, n)):
        if len(y[piece]):
            loss, weight = supervised(model, (x[piece], y[piece]))
            total, weights = total + loss, [*weights, weight]
    assert supervised.summed
    assert set(weights) == {1}
    expected = case.loss("sum")(model(x), y)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 2**31))
@settings(max_examples=10)
@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss()])
def test_a_mean_over_elements_counts_those_of_batches_of_unequal_shapes(loss_fn, lengths, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double()
    batches = [(_floats(2, length, 2), _floats(2, length, 3)) for length in lengths]
    operator = HessianOperator(net, loss_fn, batches)
    x, y = (torch.cat([t.flatten(0, 1) for t in part]) for part in zip(*batches, strict=True))
    assert operator.loss() == pytest.approx(loss_fn(net(x), y).item(), rel=1e-12)


def test_targets_of_time_and_batch_are_counted_one_by_one():
    """Where time comes first, the length of the target is the same for all sizes of batches."""
    torch.manual_seed(0)
    net, steps = nn.Linear(2, CLASSES).double(), 5

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    x, y = _floats(steps, 7, 2), torch.randint(CLASSES, (steps, 7))
    batches = [(x[:, a:b], y[:, a:b]) for a, b in ((0, 4), (4, 6), (6, 7))]
    assert HessianOperator(net, loss_fn, batches).loss() == pytest.approx(loss_fn(net(x), y).item())


def test_a_batch_without_a_target_that_counts_contributes_nothing():
    """Its own mean is 0/0."""
    torch.manual_seed(0)
    net, weight = nn.Linear(2, CLASSES).double(), _floats(CLASSES).exp()
    x, y = _floats(6, 2), torch.tensor([2, 0, 3, -1, -1, -1])
    loss_fn = nn.CrossEntropyLoss(weight=weight, ignore_index=-1)
    assert loss_fn(net(x[3:]), y[3:]).isnan()
    split = HessianOperator(net, loss_fn, [(x[:3], y[:3]), (x[3:], y[3:])])
    counted = HessianOperator(net, loss_fn, (x[:3], y[:3]))
    assert split.loss() == pytest.approx(counted.loss(), rel=1e-14)
    torch.testing.assert_close(split.gradient(), counted.gradient(), rtol=1e-13, atol=0)
    v = _floats(split.size)
    torch.testing.assert_close(split.matvec(v), counted.matvec(v), rtol=1e-12, atol=1e-14)


# --- what a loss tells of itself ----------------------------------------------------------------

X, Y = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 4


class Smoothed(nn.CrossEntropyLoss):
    """Overrides ``forward``, and returns what torch's loss does."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input / 2, target)


class Doubled(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) * 2


@pytest.mark.parametrize(
    ("loss_fn", "weight"),
    [
        (nn.CrossEntropyLoss(ignore_index=0), 3),
        (Smoothed(ignore_index=0), 3),
        (partial(F.cross_entropy, ignore_index=0), 3),
        (lambda o, y: F.cross_entropy(o[y > 1], y[y > 1]), 2),
        (lambda o, y: (F.mse_loss(o, o), F.cross_entropy(o, y))[1], 5),
        # What is done with the mean of torch may be anything.
        (Doubled(ignore_index=0), None),
        (lambda o, y: F.cross_entropy(o, y) + o.square().mean(), None),
        (lambda o, y: F.cross_entropy(o, y, reduction="none").mean(), None),
        (lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(y), None),
        (lambda o, y: (o - 1).square().mean(), None),
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), None),
    ],
)
def test_a_loss_tells_its_weight_if_it_is_what_torchs_loss_returned(loss_fn, weight):
    average = averaged(loss_fn, X, Y)
    assert not average.summed
    assert average.weight == weight


@pytest.mark.parametrize("compiled", [nn.CrossEntropyLoss(ignore_index=0), F.cross_entropy])
def test_a_compiled_loss_is_the_loss(compiled):
    """It is never compiled: that would take the second derivative away."""

    def backend(*_: Any) -> Any:
        raise AssertionError("it was compiled")

    average = averaged(torch.compile(compiled, backend=backend), X, Y)
    assert average.weight == (5 if compiled is F.cross_entropy else 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size_average": False}, (1, True)),
        ({"size_average": True}, (20, False)),
        ({"reduce": False}, (None, False)),
        ({"reduce": True, "size_average": False}, (1, True)),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_the_older_arguments_tell_the_reduction_too(options, expected):
    average = averaged(partial(F.mse_loss, **options), X, torch.zeros_like(X))
    assert (average.weight, average.summed) == expected


def test_a_reduction_that_is_changed_later_counts():
    loss_fn = nn.CrossEntropyLoss()
    supervised = Supervised(loss_fn)
    assert (float(supervised(nn.Identity(), (X, Y))[1]), supervised.summed) == (5, False)
    loss_fn.reduction = "sum"
    assert (float(supervised(nn.Identity(), (X, Y))[1]), supervised.summed) == (1, True)
    loss_fn.reduction = "mean"
    assert (float(supervised(nn.Identity(), (X, Y))[1]), supervised.summed) == (5, False)


def test_the_loss_is_told_under_the_transforms_of_torch_func():
    weights = []

    def loss(x: Tensor) -> Tensor:
        average = averaged(nn.CrossEntropyLoss(ignore_index=0), x, Y)
        weights.append(float(average.weight))
        return average.loss

    torch.func.vjp(torch.func.grad(loss), X)[1](X)
    assert set(weights) == {3}


def test_an_error_of_the_loss_is_the_users_own():
    def fail(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError("the loss failed")

    with pytest.raises(KeyError, match="the loss failed"):
        averaged(fail, X, Y)


def test_the_weight_has_no_part_in_the_gradient():
    """The weights of elements may be learned; what the mean is over is a number all the same."""
    weight = torch.rand_like(X).requires_grad_()
    average = averaged(partial(F.mse_loss, weight=weight), X, torch.zeros_like(X))
    assert average.loss.requires_grad
    assert not average.weight.requires_grad


# --- examples -----------------------------------------------------------------------------------


def _boxes(*numbers: int) -> list[dict[str, Tensor]]:
    return [{"boxes": torch.rand(n, 4), "labels": torch.zeros(n)} for n in numbers]


@pytest.mark.parametrize(
    ("x", "y", "count"),
    [
        (torch.rand(5, 3), torch.rand(5), 5),
        (torch.rand(5, 3), torch.rand(4, 2), 4),  # the target decides
        (torch.rand(5, 3), torch.tensor(1.0), 5),  # but one that has a length
        (torch.rand(5, 3), None, 5),
        (torch.rand(5, 3), {"a": torch.rand(5, 2), "b": torch.rand(5)}, 5),
        (torch.rand(5, 3), (torch.rand(5, 2), torch.rand(5)), 5),  # two heads
        (torch.rand(2, 3), (torch.rand(2, 2), torch.rand(2)), 2),
        ((torch.rand(5, 3), torch.rand(5)), (torch.rand(5, 2), torch.rand(5)), 5),
        (torch.rand(3, 3), _boxes(1, 5, 2), 3),
        (torch.rand(2, 3), tuple(_boxes(4, 4)), 2),
        ([torch.rand(3, 8, 6), torch.rand(3, 7, 7)], _boxes(4, 9), 2),  # images of two sizes
        ([torch.rand(3, 8, 8), torch.rand(3, 8, 8)], _boxes(3, 3), 2),
        (tuple(torch.rand(3, 8, 8) for _ in range(4)), tuple(_boxes(0, 1, 2, 3)), 4),
        (torch.rand(3, 3), [torch.rand(2, 4), torch.rand(7, 4), torch.rand(1, 4)], 3),
        ([torch.rand(4, 2), torch.rand(6, 2)], [torch.rand(4), torch.rand(6)], 2),  # sequences
        (torch.rand(3, 3), [0, 1, 2], 3),
        (pack_sequence([torch.rand(4, 2), torch.rand(1, 2)]), torch.rand(2), 2),
        (pack_sequence([torch.rand(4, 2), torch.rand(1, 2)]), None, 2),
        (torch.rand(4, 2), pack_sequence([torch.rand(3), torch.rand(1), torch.rand(1)]), 3),
        (torch.eye(6).to_sparse(), torch.rand(6), 6),
    ],
)
def test_examples_are_counted(x, y, count):
    assert examples(x, y) == count


@pytest.mark.parametrize(("x", "y"), [(3, 4), (torch.tensor(1.0), None), ("a", [])])
def test_a_batch_of_no_example_is_refused(x, y):
    with pytest.raises(ArgumentError, match="'of no tensor', but must be of at least one example"):
        examples(x, y)


def test_a_loss_of_detection_is_weighted_by_images():
    torch.manual_seed(0)
    net = nn.Linear(6, 4).double()
    images, targets = _floats(7, 6), _boxes(1, 5, 2, 9, 3, 1, 4)

    def loss_fn(output: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        pairs = zip(output, targets, strict=True)
        return torch.stack([(o - t["boxes"]).square().mean() for o, t in pairs]).mean()

    batches = [(images[a:b], targets[a:b]) for a, b in ((0, 4), (4, 6), (6, 7))]
    whole = loss_fn(net(images), targets)
    assert HessianOperator(net, loss_fn, batches).loss() == pytest.approx(whole.item(), rel=1e-12)


# --- two batches as one -------------------------------------------------------------------------


def test_two_batches_are_joined_example_by_example():
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    boxes = _boxes(1, 5, 2, 9, 3)

    def batch(a: int, b: int) -> Any:
        return ({"x": x[a:b], "pair": (x[a:b], y[a:b])}, y[a:b]), (x[a:b], boxes[a:b])

    for first, second, whole in zip(batch(0, 2), batch(2, 5), batch(0, 5), strict=True):
        joined = concatenated(first, second)
        flat, expected = (torch.utils._pytree.tree_flatten(tree) for tree in (joined, whole))
        assert flat[1] == expected[1]
        assert all(torch.equal(a, b) for a, b in zip(flat[0], expected[0], strict=True))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((torch.rand(2, 3), torch.rand(2)), (torch.rand(2, 4), torch.rand(2))),
        ((torch.rand(2, 3), torch.rand(2)), (torch.rand(2, 3).double(), torch.rand(2))),
        ((torch.rand(2, 3), torch.tensor(1.0)), (torch.rand(2, 3), torch.tensor(1.0))),
        (({"a": torch.rand(2)}, torch.rand(2)), ({"b": torch.rand(2)}, torch.rand(2))),
        ((torch.eye(2).to_sparse(), torch.rand(2)), (torch.eye(2).to_sparse(), torch.rand(2))),
        ((pack_sequence([torch.rand(2)]), torch.rand(1)),) * 2,
        ((torch.rand(6, 3), torch.rand(2)), (torch.rand(6, 3), torch.rand(2))),
        (([torch.rand(2), torch.rand(2)], torch.rand(2)),) * 2,  # two inputs, or two examples?
        ((torch.rand(2, 3), torch.rand(2)), (torch.rand(2, 3), {"a": torch.rand(2)})),
    ],
    ids=["shapes", "dtypes", "scalars", "keys", "sparse", "packed", "nodes", "inputs", "forms"],
)
def test_batches_that_do_not_fit_together_are_notconcatenated(first, second):
    assert concatenated(first, second) is None


def test_the_joint_loss_tells_whether_the_weights_are_right():
    """What batches are joined for."""
    weights = torch.linspace(0.2, 3.0, CLASSES, dtype=torch.float64)
    first, second = (X.double(), Y), (X[:2].double(), Y[:2])
    joint = concatenated(first, second)

    def gap(loss_fn: LossFn) -> float:
        parts = [averaged(loss_fn, *batch) for batch in (first, second)]
        counts = [examples(*batch) for batch in (first, second)]
        ws = [c if p.weight is None else p.weight for p, c in zip(parts, counts, strict=True)]
        mean = sum(float(p.loss * w) for p, w in zip(parts, ws, strict=True)) / float(sum(ws))
        return abs(mean - float(loss_fn(*joint)))

    assert gap(nn.CrossEntropyLoss(weight=weights)) < 1e-14
    assert gap(lambda o, y: F.cross_entropy(o, y, weight=weights) * 1) > 1e-3
