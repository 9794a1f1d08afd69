"""``ClassGradientSubspace`` against one example after another, and sums that are written out.

The oracle takes the gradient of one logit of one example at a time, in float64, keeps all
minibatches, and adds up eqs. 16 and 17 from the beginning.
"""

import copy
import io
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import subspace_optim as so
from subspace_optim.curvature import logit_gradients
from subspace_optim.subspaces import Subspace
from tests.dense import DTYPES, projector
from tests.failing import Fails
from tests.observe import Seen

C = 4
Minibatch = tuple[Tensor, Tensor]


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C)).to(dtype)


def normed(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(6, C)]
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *layers).to(dtype)


def minibatch(labels: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Minibatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 3, dtype=torch.float64, generator=generator)
    return (2 * x).to(dtype), torch.tensor(labels)


LABELS = [2, 0, 3, 0, 1, 2, 2, 0, 3]


# --- the oracle ---------------------------------------------------------------------------------


def flat(model: nn.Module, score: Tensor) -> Tensor:
    """The gradient of a scalar, by ``.grad``."""
    model.zero_grad()
    score.backward(retain_graph=True)
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    result = torch.cat([g.flatten() for g in grads])
    model.zero_grad()
    return result


def of_minibatch(model: nn.Module, x: Tensor, y: Tensor, *, whole: bool = False) -> list[Any]:
    """For each class ``c_k^B`` and ``λ_k^B`` of eqs. 16 and 17; ``None`` for an absent one."""
    model = copy.deepcopy(model).double()
    x, found = x.double(), []
    together = model(x) if whole else None
    for k in range(C):
        members = [mu for mu in range(len(y)) if y[mu] == k]
        if not members:
            found.append(None)
            continue
        c, spread = 0, 0.0
        for mu in members:
            z = together[mu] if whole else model(x[mu : mu + 1])[0]
            logits = z.tolist()
            p = math.exp(logits[k]) / sum(math.exp(other) for other in logits)
            c = c + flat(model, z[k]) / len(members)
            spread += p * (1 - p) / len(y)
        found.append((c, spread * float(c @ c)))
    return found


def averaged(history: list[list[Any]], decay: float, size: int) -> tuple[Tensor, Tensor]:
    """The closed sums of eqs. 16 and 17: ``c_k (C, P)`` and ``λ_k (C,)``."""
    gradients, values = torch.zeros(C, size).double(), torch.ones(C).double()
    for k in range(C):
        seen = [found[k] for found in history if found[k] is not None]
        t = len(seen)
        if t == 0:
            continue
        shares = [(1 - decay) / (1 - decay**t) * decay ** (t - i) for i in range(1, t + 1)]
        gradients[k] = sum(share * c for share, (c, _) in zip(shares, seen, strict=True))
        square = sum(share * value**2 for share, (_, value) in zip(shares, seen, strict=True))
        values[k] = square**0.5
    return gradients, values


def check(subspace: Any, gradients: Tensor, values: Tensor, tolerance: float = 1e-12) -> None:
    terms = subspace.update()
    assert isinstance(terms, so.LowRankCurvature)
    assert terms.vectors.shape == gradients.shape
    norms = gradients.norm(dim=1)
    expected = gradients / torch.where(norms > 0, norms, 1.0)[:, None]
    torch.testing.assert_close(terms.vectors.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(terms.eigenvalues.double(), values, rtol=4 * tolerance, atol=0)


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- eqs. 8, 12, 16, 17 -------------------------------------------------------------------------


@pytest.mark.parametrize("coupled", [None, True])
@pytest.mark.parametrize("labels", [LABELS, [1], [3, 3], [0, 2, 0, 2]])
def test_one_minibatch_is_the_mean_over_its_examples(labels, coupled):
    model = mlp()
    subspace = so.ClassGradientSubspace(model, C, coupled=coupled)
    x, y = minibatch(labels)
    subspace.observe(x, y)
    check(subspace, *averaged([of_minibatch(model, x, y)], 0.9, size_of(model)))


@given(
    batches=st.lists(st.lists(st.integers(0, C - 1), min_size=1, max_size=6), max_size=5),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    orthogonal=st.booleans(),
)
def test_averages_are_the_closed_sums_while_the_parameters_move(batches, decay, orthogonal):
    """Also of classes that are absent now and then, or never seen."""
    model, history = mlp(), []
    subspace = so.ClassGradientSubspace(model, C, decay=decay, orthogonal=orthogonal)
    for step, labels in enumerate([[0, 1], *batches]):
        x, y = minibatch(labels, step)
        subspace.observe(x, y)
        history.append(of_minibatch(model, x, y))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.2)
    gradients, values = averaged(history, decay, size_of(model))
    if not orthogonal:
        check(subspace, gradients, values)
        return
    v = torch.nan_to_num(gradients / gradients.norm(dim=1, keepdim=True))
    matrix = sum(values[k] * torch.outer(v[k], v[k]) for k in range(C))
    exact, vectors = torch.linalg.eigh(matrix)
    basis = subspace.update()
    assert isinstance(basis, so.EigenBasis)
    scale = exact[-1]
    assert (basis.eigenvalues - exact.flip(0)[: basis.k]).abs().max() <= 1e-13 * scale
    assert exact.flip(0)[basis.k :].abs().sum() <= 1e-12 * scale
    gap = exact[-basis.k] / scale
    P = projector(vectors.T.flip(0)[: basis.k])
    assert (projector(basis.vectors) - P).abs().max() <= 1e-13 / gap


def test_an_absent_class_keeps_its_averages_to_the_last_bit():
    subspace = so.ClassGradientSubspace(mlp(torch.float32), C)
    subspace.observe(*minibatch(LABELS, dtype=torch.float32))
    before = subspace.update()
    for seed in range(20):
        subspace.observe(*minibatch([0, 2], seed, torch.float32))
    after = subspace.update()
    for k in (1, 3):
        assert torch.equal(after.vectors[k], before.vectors[k])
        assert after.eigenvalues[k] == before.eigenvalues[k]
    assert not torch.equal(after.vectors[0], before.vectors[0])


def test_a_class_that_was_never_seen_has_no_vector_and_a_value_of_one():
    """And its first minibatch is its average: the initial 1 is no term of eq. 17."""
    model = mlp()
    subspace = so.ClassGradientSubspace(model, C)
    subspace.observe(*minibatch([0, 0, 1]))
    terms = subspace.update()
    assert terms.eigenvalues[2:].tolist() == [1, 1]
    assert not terms.vectors[2:].any()
    x, y = minibatch([3, 0], 1)
    subspace.observe(x, y)
    c, value = of_minibatch(model, x, y)[3]
    terms = subspace.update()
    assert float(terms.eigenvalues[3]) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(terms.vectors[3], c / c.norm(), rtol=0, atol=1e-12)


def test_a_value_survives_a_probability_near_one():
    """``1 − p`` of a p that was rounded to 1 would be 0: here it is about 1e-30."""
    model = nn.Linear(3, C, bias=False)
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.weight[1, 0] = 70.0
    x = torch.tensor([[1.0, 0.0, 0.0]])
    subspace = so.ClassGradientSubspace(model, C)
    subspace.observe(x, torch.tensor([1]))
    # ∇z_1 is x in the second row: of norm 1.
    expected = 3 * math.exp(-70)
    assert float(subspace.update().eigenvalues[1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("coupled", [None, True])
def test_a_linear_model_has_the_means_of_the_textbook(coupled):
    """``c_k`` is the mean of class k's inputs, in row k."""
    model = nn.Linear(3, C, bias=False)
    x, y = minibatch(LABELS, dtype=torch.float32)
    subspace = so.ClassGradientSubspace(model, C, coupled=coupled)
    subspace.observe(x, y)
    vectors = subspace.update().vectors.view(C, C, 3)
    for k in range(C):
        mean = x[y == k].mean(dim=0)
        torch.testing.assert_close(vectors[k, k], mean / mean.norm(), rtol=0, atol=1e-6)
        assert not vectors[k, torch.arange(C) != k].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coupled", [None, True])
def test_low_precision_is_differentiated_through_float32_copies(dtype, coupled):
    model = mlp(dtype)
    subspace = so.ClassGradientSubspace(model, C, coupled=coupled)
    x, y = minibatch(LABELS, dtype=dtype)
    subspace.observe(x, y)
    assert subspace.update().dtype == torch.float32
    check(subspace, *averaged([of_minibatch(model, x, y)], 0.9, size_of(model)), tolerance=2e-6)
    assert all(p.dtype == dtype for p in model.parameters())


def test_params_are_the_coordinates():
    model = mlp()
    model[2].bias.requires_grad_(False)
    x, y = minibatch(LABELS)
    chosen = [model[2].weight, model[0].bias]
    subspace = so.ClassGradientSubspace(model, C, params=chosen)
    subspace.observe(x, y)
    assert subspace.parameters.tensors == chosen
    model.requires_grad_(True)
    gradients, values = averaged([of_minibatch(model, x, y)], 0.9, size_of(model))
    pieces = gradients.split([p.numel() for p in model.parameters()], dim=1)
    own = torch.cat([pieces[2], pieces[1]], dim=1)
    expected = own / own.norm(dim=1, keepdim=True)
    torch.testing.assert_close(subspace.update().vectors, expected, rtol=0, atol=1e-12)
    ratio = (own.norm(dim=1) / gradients.norm(dim=1)).square()
    torch.testing.assert_close(subspace.update().eigenvalues, values * ratio, rtol=1e-12, atol=0)


class Tied(nn.Module):
    """One weight used twice, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 3), nn.Linear(3, C)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Checkpointed(nn.Module):
    """A part that runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


@pytest.mark.parametrize("coupled", [None, True])
@pytest.mark.parametrize("kind", [Tied, Checkpointed])
def test_models_of_other_kinds(kind, coupled):
    torch.manual_seed(0)
    model = kind().double()
    x, y = minibatch(LABELS)
    subspace = so.ClassGradientSubspace(model, C, coupled=coupled)
    subspace.observe(x, y)
    check(subspace, *averaged([of_minibatch(model, x, y)], 0.9, size_of(model)))


class Records:
    """Inputs that are no tensor: rows of a table, in the model's own form."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, indices: Tensor) -> "Records":
        return Records(self.rows[indices])


class OfRecords(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, records: Records) -> Tensor:
        return self.inner(records.rows)


@pytest.mark.parametrize("coupled", [None, True])
def test_inputs_are_whatever_takes_a_tensor_of_indices(coupled):
    model = mlp()
    x, y = minibatch(LABELS)
    subspace = so.ClassGradientSubspace(OfRecords(model), C, coupled=coupled)
    subspace.observe(Records(x), y)
    check(subspace, *averaged([of_minibatch(model, x, y)], 0.9, size_of(model)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_classes_may_be_integers_of_any_width(dtype):
    model = mlp()
    x, y = minibatch(LABELS)
    subspace = so.ClassGradientSubspace(model, C)
    subspace.observe(x, y.to(dtype))
    check(subspace, *averaged([of_minibatch(model, x, y)], 0.9, size_of(model)))


# --- examples that are coupled ------------------------------------------------------------------


class Counting(nn.Module):
    """Notes how many examples each call brings."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = Seen()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.inner(x)


def running_statistics_off(model: nn.Module) -> nn.Module:
    model[2].track_running_stats = False
    model[2].running_mean = model[2].running_var = None
    return model


CASES = {  # the model, its mode, what is said of it, and the sizes of the forward passes
    "mlp": (mlp, True, None, [3, 1, 3, 2]),
    "mlp, forced": (mlp, True, True, [9]),
    "batch norm": (normed, True, None, [9]),
    "batch norm in eval mode": (normed, False, None, [3, 1, 3, 2]),
    "batch norm without statistics": (
        lambda: running_statistics_off(normed()),
        False,
        None,
        [9],
    ),
    "batch norm, denied": (normed, True, False, [3, 1, 3, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_coupled_examples_go_through_the_model_together(case):
    make, train, coupled, expected = CASES[case]
    model = Counting(make()).train(train)
    subspace = so.ClassGradientSubspace(model, C, coupled=coupled)
    subspace.observe(*minibatch(LABELS))
    assert model.calls == expected


@pytest.mark.parametrize("looped", [(), ("cpu",)], ids=["batched", "looped"])
def test_batch_norm_is_differentiated_through_its_statistics(looped, monkeypatch):
    """Against one backward pass for each example's logit through the whole minibatch."""
    monkeypatch.setattr(logit_gradients, "_LOOPED", looped)
    model = normed()
    x, y = minibatch(LABELS)
    subspace = so.ClassGradientSubspace(model, C)
    subspace.observe(x, y)
    check(subspace, *averaged([of_minibatch(model, x, y, whole=True)], 0.9, size_of(model)))


class OneByOne(torch.autograd.Function):
    """The identity, in a form that vmap refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        assert float(slope.sum()) == float(slope.sum())  # a host's number is no batched tensor
        return slope


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OneByOne.apply(x)


def test_what_vmap_cannot_transform_is_looped_over(monkeypatch):
    monkeypatch.setattr(logit_gradients, "_LOOPED", ())
    model = mlp()
    x, y = minibatch(LABELS)
    subspace = so.ClassGradientSubspace(nn.Sequential(model, Refusing()), C, coupled=True)
    subspace.observe(x, y)
    check(subspace, *averaged([of_minibatch(model, x, y)], 0.9, size_of(model)))


# --- nothing is left behind ---------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = normed(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x)) + 0 * random.random() + 0 * float(np.random.rand())  # noqa: NPY002 (the global one)


def trace(model: nn.Module) -> list[Any]:
    """Everything that an observation could leave a mark on."""
    return [
        *(p.detach().clone() for p in model.parameters()),
        *(None if p.grad is None else p.grad.clone() for p in model.parameters()),
        *(b.clone() for b in model.buffers()),
        *(p.requires_grad for p in model.parameters()),
        *(m.training for m in model.modules()),
        torch.get_rng_state(),
        *np.random.get_state()[1:3],  # noqa: NPY002
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    ]


def same(before: list[Any], after: list[Any]) -> Iterator[bool]:
    for a, b in zip(before, after, strict=True):
        if isinstance(a, Tensor):
            yield torch.equal(a, b)
        else:
            yield bool(np.all(a == b))


CONTEXTS = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_found_afterwards(context, coupled, fails):
    """Also where the model raises in its middle; and what is found is the same in any context."""
    model = Dropping()
    model.body[1].weight.grad = torch.ones_like(model.body[1].weight)
    model.body[2].momentum = 0.7
    x, y = minibatch(LABELS)
    expected = so.ClassGradientSubspace(model, C, coupled=coupled)
    expected.observe(x, y)
    subspace = so.ClassGradientSubspace(model, C, coupled=coupled)
    if fails:

        def fail(*_: Any) -> None:
            raise KeyError("in the forward pass")

        model.drop.register_forward_hook(fail)
    with context():
        before = trace(model)
        if fails:
            with pytest.raises(KeyError, match="in the forward pass"):
                subspace.observe(x, y)
        else:
            subspace.observe(x, y)
        assert all(same(before, trace(model)))
    if not fails:
        assert torch.equal(subspace.update().vectors, expected.update().vectors)
        assert not subspace.update().vectors.requires_grad
        assert not subspace.update().vectors.is_inference()


def test_dropout_masks_come_from_the_present_random_state():
    model = nn.Sequential(mlp(), nn.Dropout(0.5))
    x, y = minibatch(LABELS * 5)

    def observed(seed: int) -> Tensor:
        subspace = so.ClassGradientSubspace(model, C)
        torch.manual_seed(seed)
        subspace.observe(x, y)
        return subspace.update().eigenvalues

    assert torch.equal(observed(1), observed(1))
    assert not torch.equal(observed(1), observed(2))


def test_the_mode_is_the_models():
    model = nn.Sequential(mlp(), nn.Dropout(0.5)).eval()
    x, y = minibatch(LABELS)
    subspace = so.ClassGradientSubspace(model, C)
    subspace.observe(x, y)
    check(subspace, *averaged([of_minibatch(model, x, y)], 0.9, size_of(model)))


def test_what_was_given_out_does_not_change():
    subspace = so.ClassGradientSubspace(mlp(), C)
    subspace.observe(*minibatch(LABELS))
    terms = subspace.update()
    assert subspace.update() is terms
    before = terms.vectors.clone(), terms.eigenvalues.clone()
    subspace.observe(*minibatch(LABELS, 1))
    assert subspace.update() is not terms
    assert torch.equal(terms.vectors, before[0])
    assert torch.equal(terms.eigenvalues, before[1])


def test_parameters_may_change_in_place_right_after():
    model = mlp()
    subspace = so.ClassGradientSubspace(model, C)
    x, y = minibatch(LABELS)
    expected = averaged([of_minibatch(model, x, y)], 0.9, size_of(model))
    subspace.observe(x, y)
    with torch.no_grad():
        model[0].weight.zero_()
    check(subspace, *expected)


def test_wrappers_are_taken_off():
    model = mlp()
    subspace = so.ClassGradientSubspace(torch.compile(model), C)
    assert subspace.model is model
    x, y = minibatch(LABELS)
    subspace.observe(x, y)
    check(subspace, *averaged([of_minibatch(model, x, y)], 0.9, size_of(model)))


def test_stats_count_observations():
    subspace = so.ClassGradientSubspace(mlp(), C)
    assert subspace.stats.observations == 0
    for _ in range(3):
        subspace.observe(*minibatch(LABELS))
    assert subspace.stats.observations == 3
    assert subspace.stats.seconds > 0


def test_it_is_a_subspace():
    assert isinstance(so.ClassGradientSubspace(mlp(), C), Subspace)
    assert not so.ClassGradientSubspace(mlp(), C).orthogonal
    assert so.ClassGradientSubspace(mlp(), C, orthogonal=True).orthogonal


# --- what cannot be used ------------------------------------------------------------------------


def test_a_step_before_any_observation_says_what_to_do():
    subspace = so.ClassGradientSubspace(mlp(), C, orthogonal=True)
    with pytest.raises(so.ArgumentError, match=r"subspace\.observe\(x, y\).* before `optimizer"):
        subspace.update()


X, Y = minibatch(LABELS)
BAD = {
    "floats": (X, Y.double(), r"y is torch\.float64, .*integers"),
    "one-hot": (X, torch.eye(C)[Y], r"y is torch.float32.*argmax"),
    "booleans": (X, Y > 1, r"y is torch\.bool"),
    "no tensor": (X, LABELS, "y is 'list'"),
    "two dimensions": (X, Y[:, None], r"the shape of y is \(9, 1\), but must be \(N,\)"),
    "no example": (X[:0], Y[:0], r"the shape of y is \(0,\)"),
    "too large": (X, Y + 1, "a class in y is 4, but must be from 0 to 3, as num_classes is 4"),
    "negative": (X, Y - 1, "a class in y is -1"),
    "lengths": (X[:4], Y, "the length of x is 4, but must be 9"),
    "list": ([X], Y, r"x is 'list', .*x\[indices\]"),
    "pair": ((X, X), Y, "x is 'tuple'"),
    "mapping": ({"x": X}, Y, "x is 'dict'"),
    "nothing": (None, Y, "x is 'NoneType'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_minibatch_that_cannot_be_used_changes_nothing(case):
    x, y, message = BAD[case]
    subspace = so.ClassGradientSubspace(mlp(), C)
    subspace.observe(X, Y)
    given, state = subspace.update(), copy.deepcopy(subspace.state_dict())
    with pytest.raises(so.ArgumentError, match=message):
        subspace.observe(x, y)
    assert subspace.update() is given
    check_states(subspace.state_dict(), state)


class Fussy(Records):
    def __getitem__(self, indices: Any) -> Any:
        raise TypeError("one at a time")


def test_inputs_that_cannot_be_indexed_are_refused():
    subspace = so.ClassGradientSubspace(OfRecords(mlp()), C)
    with pytest.raises(so.ArgumentError, match=r"x is 'Fussy', .*It raised: one at a time"):
        subspace.observe(Fussy(X), Y)


class Wrong(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.inner, self.output = mlp(), output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.inner(x))


OUTPUTS = {
    "fewer": (lambda z: z[:, :3], r"the shape of the logits is \(., 3\), .*num_classes=4"),
    "flat": (lambda z: z[:, 0], "the shape of the logits"),
    "tuple": (lambda z: (z, z), "the model's output is 'tuple'"),
    "integers": (lambda z: z.long(), r"the model's output is torch\.int64"),
}


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_that_are_no_logits_are_refused(case, coupled):
    output, message = OUTPUTS[case]
    subspace = so.ClassGradientSubspace(Wrong(output), C, coupled=coupled)
    with pytest.raises(so.ArgumentError, match=message):
        subspace.observe(X, Y)
    with pytest.raises(so.ArgumentError, match="observe"):
        subspace.update()


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["input", "parameter", "last"])
def test_what_is_not_finite_changes_nothing(where, value, coupled):
    model = mlp()
    subspace = so.ClassGradientSubspace(model, C, coupled=coupled)
    subspace.observe(X, Y)
    given, state = subspace.update(), copy.deepcopy(subspace.state_dict())
    x = X.clone()
    if where == "input":
        x[-1, 0] = torch.nan
    elif where == "parameter":
        model[2].bias.data[1] = value
    else:
        model[2].weight.data[:, 0] = value
    with pytest.raises(so.NonFiniteError, match="was not added"):
        subspace.observe(x, Y)
    assert subspace.update() is given
    check_states(subspace.state_dict(), state)


def test_an_infinite_logit_of_an_absent_class_changes_nothing():
    """The gradient of the class that is there is finite all the same."""
    model = mlp()
    model[2].bias.data[1] = torch.inf
    subspace = so.ClassGradientSubspace(model, C)
    with pytest.raises(so.NonFiniteError, match="was not added"):
        subspace.observe(X, torch.zeros_like(Y))
    with pytest.raises(so.ArgumentError, match="observe"):
        subspace.update()


OPTIONS = {
    "decay": ({"decay": 1.0}, r"decay is 1\.0, but must be at least 0 and below 1"),
    "negative decay": ({"decay": -0.1}, r"decay is -0\.1"),
    "no decay": ({"decay": None}, "decay is None"),
    "one class": ({"num_classes": 1}, "num_classes is 1, but must be an integer of at least 2"),
    "half a class": ({"num_classes": 2.5}, r"num_classes is 2\.5"),
    "orthogonal": ({"orthogonal": 1}, "orthogonal is 1"),
    "coupled": ({"coupled": "yes"}, "coupled is 'yes'"),
    "model": ({"model": []}, "model is 'list'"),
    "group": ({"process_group": 0}, "process_group is 'int'"),
    "params": ({"params": []}, r"params is \[\]"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_arguments_that_cannot_be_used_are_named(case):
    options, message = OPTIONS[case]
    with pytest.raises(so.ArgumentError, match=message):
        so.ClassGradientSubspace(**({"model": mlp(), "num_classes": C} | options))


# --- states and copies --------------------------------------------------------------------------


def check_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
        else:
            assert found[name] == value


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("observed", [0, 1, 3])
def test_a_resumed_run_is_the_same_bit_by_bit(observed, orthogonal, dtype):
    model = mlp(dtype)
    subspace = so.ClassGradientSubspace(model, C, orthogonal=orthogonal)
    for seed in range(observed):
        subspace.observe(*minibatch([0, 1, 2, seed], seed, dtype))
    other = so.ClassGradientSubspace(model, C, orthogonal=orthogonal)
    other.observe(*minibatch([3], 9, dtype))
    other.load_state_dict(saved(subspace.state_dict()))
    if observed:
        assert torch.equal(other.update().vectors, subspace.update().vectors)
        assert torch.equal(other.update().eigenvalues, subspace.update().eigenvalues)
    else:
        with pytest.raises(so.ArgumentError, match="observe"):
            other.update()
    assert other.stats == subspace.stats
    for seed in range(10, 13):
        for s in (subspace, other):
            s.observe(*minibatch([seed % C, 1], seed, dtype))
        assert torch.equal(other.update().vectors, subspace.update().vectors)
        assert torch.equal(other.update().eigenvalues, subspace.update().eigenvalues)


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    subspace = so.ClassGradientSubspace(mlp(), C)
    subspace.observe(X, Y)
    state = copy.deepcopy(subspace.state_dict())
    smaller = so.ClassGradientSubspace(nn.Linear(3, C).double(), C)
    smaller.observe(X, Y)
    fewer = so.ClassGradientSubspace(mlp(), C - 1, params=None)
    with pytest.raises(so.ArgumentError, match=r"the shape of the loaded vectors is \(4, 16\)"):
        subspace.load_state_dict(smaller.state_dict())
    with pytest.raises(so.ArgumentError, match="of another model or num_classes"):
        fewer.load_state_dict(state)
    with pytest.raises(so.ArgumentError, match="the loaded norms is 'NoneType', but must be"):
        subspace.load_state_dict(state | {"norms": None})
    check_states(subspace.state_dict(), state)


def test_a_state_that_was_changed_is_refused_and_changes_nothing():
    """One class has not been seen: its averages are zeros, and are so known."""
    subspace, other = (so.ClassGradientSubspace(mlp(), C) for _ in range(2))
    subspace.observe(*minibatch([0, 1, 1, 2], 1))
    other.observe(X, Y)
    state, before = subspace.state_dict(), copy.deepcopy(other.state_dict())
    swapped = torch.tensor([1, 0, 2, 3])
    changes = [
        ({"version": 2}, "the version of the loaded state is 2, but must be 1"),
        ({"observed": None}, "the loaded observed is None"),
        ({"vectors": state["vectors"] * 2}, r"the norm of the loaded vectors\[0\] is (2|1\.99)"),
        ({"vectors": state["vectors"] * torch.nan}, "the loaded vectors is 'not finite'"),
        ({"vectors": state["vectors"][swapped]}, "the loaded checksum is"),
        ({"norms": -state["norms"]}, "the smallest of the loaded norms is -"),
        ({"norms": state["norms"] * 2}, "the loaded checksum is"),
        ({"squares": state["squares"] / 0}, "the loaded squares is 'not finite'"),
        ({"updates": state["updates"] + 1}, "the largest of the loaded updates is 2, .* at most"),
        ({"updates": state["updates"] * 0}, r"the loaded updates\[0\] is 0, .*at least 1"),
        ({"updates": state["updates"].double()}, "the dtype of the loaded updates is"),
        ({"stats": {"observations": 1}}, "the loaded stats is 'without seconds'"),
        ({"stats": {"observations": -1, "seconds": 0.0}}, "the loaded stats.observations is -1"),
        ({"stats": {"observations": 1, "seconds": torch.nan}}, "the loaded stats.seconds is nan"),
    ]
    for change, message in changes:
        with pytest.raises(so.ArgumentError, match=message):
            other.load_state_dict(state | change)
        check_states(other.state_dict(), before)
    other.load_state_dict(state)
    check_states(other.state_dict(), state)


def test_memory_that_runs_out_while_a_minibatch_is_observed_leaves_the_averages():
    subspace = so.ClassGradientSubspace(mlp(), C, orthogonal=True)
    subspace.observe(X, Y)
    basis, before = subspace.update(), copy.deepcopy(subspace.state_dict())

    x, y = minibatch([1, 3, 3, 2], 5)
    ran_out = 0
    for at in range(1, 400, 7):
        mode = Fails(at, torch.OutOfMemoryError("memory has run out"))
        try:
            with mode:
                subspace.observe(x, y)
        except torch.OutOfMemoryError:
            ran_out += 1
            assert subspace.update() is basis
            check_states(subspace.state_dict(), before)
        else:
            break
    assert ran_out > 5
    assert subspace.stats.observations == 2


def test_a_copy_with_its_model_is_an_independent_pair():
    model = mlp()
    subspace = so.ClassGradientSubspace(model, C)
    subspace.observe(X, Y)
    before = subspace.update().vectors.clone()
    other_model, other = copy.deepcopy((model, subspace))
    assert other.parameters.tensors[0] is other_model[0].weight
    assert other.model is other_model
    assert torch.equal(other.update().vectors, before)
    with torch.no_grad():
        other_model[0].weight.mul_(3)
    x, y = minibatch([1, 3, 3, 2], 5)
    other.observe(x, y)
    assert torch.equal(subspace.update().vectors, before)
    history = [of_minibatch(model, X, Y), of_minibatch(other_model, x, y)]
    check(other, *averaged(history, 0.9, size_of(model)))
    assert (subspace.stats.observations, other.stats.observations) == (1, 2)


def test_training_in_the_bulk_of_it():
    """One line in the loop; the update has no part in the span of the class gradients."""
    model = mlp(torch.float32)
    subspace = so.ClassGradientSubspace(model, C, orthogonal=True)
    optimizer = so.BulkSGD(model.parameters(), lr=0.1, subspace=subspace)
    x, y = minibatch(LABELS, dtype=torch.float32)
    for _ in range(3):
        before = subspace.parameters.flatten(subspace.parameters.tensors)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        subspace.observe(x, y)
        optimizer.step()
        moved = subspace.parameters.flatten(subspace.parameters.tensors) - before
        assert moved.norm() > 1e-3
        assert subspace.update().coefficients(moved).abs().max() <= 1e-6
