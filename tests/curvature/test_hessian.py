"""``HessianOperator`` against closed forms, the dense Hessian, and finite differences."""

import copy
import pickle
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.curvature import HessianOperator, dependencies
from tests.dense import (
    LOSSES,
    MODELS,
    Dense,
    Problem,
    dense_curvature,
    half_squared_error,
    make_problem,
    probes,
    problems,
    supervised,
)
from tests.observe import Seen

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def operator_of(problem: Problem, **options: Any) -> HessianOperator:
    return HessianOperator(problem.model, problem.loss_fn, problem.batches, **options)


def check(operator: HessianOperator, dense: Dense) -> None:
    """Everything that an operator says of its matrix, its gradient and its loss."""
    P, dtype = len(dense.gradient), operator.dtype
    assert operator.size == P
    scale = float(dense.hessian.abs().max())
    tolerance = {"rtol": 0, "atol": TOLERANCE[dtype] * max(scale, 1.0)}

    assert operator.gradient().dtype == dtype
    torch.testing.assert_close(operator.gradient().double(), dense.gradient, **tolerance)

    V = probes(P, dtype)
    tolerance["atol"] *= P**0.5
    rows = operator.matmat(V)
    assert (rows.dtype, rows.shape) == (dtype, V.shape)
    torch.testing.assert_close(rows.double(), V.double() @ dense.hessian, **tolerance)
    product = operator.matvec(V[0])
    assert (product.dtype, product.shape) == (dtype, (P,))
    torch.testing.assert_close(product, rows[0], **tolerance)
    # Absolute too: a cross-entropy is a difference of numbers of order one, whatever is left of it.
    loss = pytest.approx(dense.loss, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    assert operator.loss() == loss


def products(operator: HessianOperator) -> Tensor:
    """Those with some random vectors, which tell one matrix from another."""
    return operator.matmat(probes(operator.size, operator.dtype))


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[12], [5, 1, 4, 2]])
def test_linear_least_squares_has_the_hessian_of_the_textbook(sizes):
    """``L = ‖X Wᵀ − Y‖² / 2N``: gradient ``(X Wᵀ − Y)ᵀX / N`` and Hessian ``I ⊗ XᵀX / N``."""
    problem = make_problem("mlp", "mse", sizes)
    model = nn.Linear(3, 2, bias=False).double()
    X, Y = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
    W, N = model.weight.detach(), len(X)
    residual = X @ W.T - Y
    dense = Dense(
        loss=float(residual.square().sum() / (2 * N)),
        gradient=(residual.T @ X / N).flatten(),
        hessian=torch.kron(torch.eye(2, dtype=torch.float64), X.T @ X / N),
    )
    check(HessianOperator(model, half_squared_error, problem.batches), dense)


def test_softmax_regression_has_the_hessian_of_the_textbook():
    """``H = Σ_n (diag p_n − p_n p_nᵀ) ⊗ x_n x_nᵀ / N``."""
    problem = make_problem("mlp", "cross_entropy", [4, 3])
    model = nn.Linear(3, 2, bias=False).double()
    X, y = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
    p = torch.softmax(X @ model.weight.detach().T, dim=1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = Dense(
        loss=float(-p[torch.arange(7), y].log().mean()),
        gradient=((p - F.one_hot(y, 2)).T @ X / 7).flatten(),
        hessian=torch.einsum("nab,ni,nj->aibj", blocks, X, X).reshape(6, 6) / 7,
    )
    check(HessianOperator(model, nn.CrossEntropyLoss(), problem.batches), dense)


# --- the dense Hessian --------------------------------------------------------------------------

BUDGETS = [None, 0, 6000]  # all graphs kept, none, and about as many as fit into 6 kB


@given(problem=problems(), budget=st.sampled_from(BUDGETS))
def test_it_is_the_dense_hessian_in_float64(problem, budget):
    check(operator_of(problem, memory_budget=budget), problem.dense())


@given(problem=problems(torch.float32), budget=st.sampled_from(BUDGETS))
def test_it_is_the_dense_hessian_in_float32(problem, budget):
    check(operator_of(problem, memory_budget=budget), problem.dense())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_and_loss_has_its_dense_hessian(model, loss):
    problem = make_problem(model, loss)
    dense = problem.dense()
    assert dense.hessian.abs().max() > 1e-2
    operator = operator_of(problem)
    check(operator, dense)
    matrix = operator.matmat(torch.eye(operator.size, dtype=operator.dtype))
    torch.testing.assert_close(matrix, dense.hessian, rtol=0, atol=1e-11)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_products_are_taken_where_the_parameters_live(model, device):
    problem = make_problem(model, dtype=torch.float32)
    dense = problem.dense()
    problem.model.to(device)
    operator = operator_of(problem)  # the batches are still on the host
    rows = operator.matmat(torch.eye(operator.size, device=device))
    assert rows.device.type == device.type
    torch.testing.assert_close(rows.double().cpu(), dense.hessian, rtol=0, atol=2e-5)


def test_params_choose_and_order_a_block_of_the_hessian():
    problem = make_problem("mlp")
    names = ["4.bias", "0.weight", "2.weight"]
    chosen = [problem.model.get_parameter(name) for name in names]
    check(operator_of(problem, params=chosen), problem.dense(names))


def test_frozen_parameters_are_constants():
    problem = make_problem("mlp")
    problem.model[2].requires_grad_(False)
    names = ["0.weight", "0.bias", "4.weight", "4.bias"]
    check(operator_of(problem), problem.dense(names))


@pytest.mark.parametrize("form", ["one_batch", "tuples", "lists"])
def test_the_forms_of_data_are_one_matrix(form):
    problem = make_problem("mlp", sizes=[6])
    (x, y) = problem.batches[0]
    data = {"one_batch": (x, y), "tuples": [(x[:4], y[:4]), (x[4:], y[4:])]}
    data["lists"] = [[x[:4], y[:4]], [x[4:], y[4:]]]
    check(HessianOperator(problem.model, problem.loss_fn, data[form]), problem.dense())


class Language(nn.Module):
    """A language model that returns its loss, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.embedding(ids)))
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def token_loss(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return model(**batch).loss, (batch["labels"] != -100).sum()


def language_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for examples, ignored in [(2, 3), (1, 0), (3, 9)]:  # very unequal numbers of tokens
        ids = torch.randint(5, (examples, 4), generator=generator)
        labels = ids.roll(1, dims=1).flatten()
        labels[:ignored] = -100
        batches.append({"ids": ids, "labels": labels.view_as(ids)})
    return batches


@pytest.mark.parametrize("budget", [None, 0])
def test_from_loss_weights_each_batch_as_it_says(budget):
    model = Language().double()
    operator = HessianOperator.from_loss(
        model, token_loss, language_batches(), memory_budget=budget
    )
    check(operator, dense_curvature(model, token_loss, language_batches()))


class Encoding(UserDict):
    """A tokenizer's batch: a mapping that torch does not know, and that moves itself."""

    moved_to: torch.device | None = None

    def to(self, device: torch.device) -> "Encoding":
        moved = Encoding({key: value.to(device) for key, value in self.items()})
        moved.moved_to = device
        return moved


def test_a_mapping_is_one_batch():
    model, batch = Language().double(), language_batches()[0]
    operator = HessianOperator.from_loss(model, token_loss, batch)
    check(operator, dense_curvature(model, token_loss, [batch]))


@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: [batch]])
def test_a_batch_that_moves_itself_is_moved(wrap):
    model, batch, devices = Language().double(), language_batches()[0], Seen()

    def batch_loss(model: Any, batch: Encoding) -> tuple[Tensor, Tensor]:
        devices.append(batch.moved_to)
        return token_loss(model, batch)

    operator = HessianOperator.from_loss(model, batch_loss, wrap(Encoding(batch)))
    check(operator, dense_curvature(model, token_loss, [batch]))
    assert set(devices) == {torch.device("cpu")}


def test_from_loss_takes_any_number_of_batches_that_are_tensors():
    model, x = nn.Linear(3, 1).double(), torch.randn(5, 3).double()

    def loss(model: Any, batch: Tensor) -> tuple[Tensor, int]:
        return model(batch).square().mean(), len(batch)

    dense = dense_curvature(model, loss, [x])
    check(HessianOperator.from_loss(model, loss, [x[:1], x[1:3], x[3:]]), dense)
    check(HessianOperator.from_loss(model, loss, [x[:2], x[2:]]), dense)


def test_bf16_models_are_differentiated_through_float32_copies():
    problem = make_problem("mlp", dtype=torch.bfloat16)
    low = operator_of(problem)
    high = Problem(copy.deepcopy(problem.model).float(), problem.loss_fn, [])
    for x, y in problem.batches:
        high.batches.append((x.float(), y))
    assert torch.equal(products(low), products(operator_of(high)))
    assert all(p.dtype == torch.bfloat16 for p in problem.model.parameters())
    check(low, high.dense())


@pytest.mark.parametrize("what", ["matvec", "gradient", "loss"])
def test_a_forward_pass_that_names_its_low_precision_is_refused_with_the_way_out(what):
    """Its input would be bf16 and its parameters are float32."""

    class Named(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(torch.bfloat16))

    x, y = torch.randn(4, 3).bfloat16(), torch.arange(4) % 2
    operator = HessianOperator(Named(3, 2).bfloat16(), nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(ArgumentError, match=r"a dtype inside of the model .*self\.weight\.dtype"):
        _read(operator, what)


# --- finite differences: an oracle without second derivatives -----------------------------------


class Dropping(nn.Module):
    """Dropout between two layers that have no part in which it is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(3, 6), nn.Dropout(0.4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.tanh(self.a(x))))


def _moved(operator: HessianOperator, step: Tensor, read: Callable[[], Any]) -> Any:
    pieces = operator.parameters.unflatten(step)
    with torch.no_grad():
        for p, piece in zip(operator.parameters.tensors, pieces, strict=True):
            p.add_(piece)
        result = read()
        for p, piece in zip(operator.parameters.tensors, pieces, strict=True):
            p.sub_(piece)
    return result


def check_finite_differences(operator: HessianOperator) -> None:
    """The gradient is the slope of the loss, and the product is the slope of the gradient."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(operator.size, dtype=torch.float64, generator=generator)
        step = 1e-5 * v / v.norm()
        for read, slope in [(operator.loss, operator.gradient() @ v), (operator.gradient, None)]:
            ahead, behind = _moved(operator, step, read), _moved(operator, -step, read)
            difference = torch.as_tensor(ahead - behind) * v.norm() / 2e-5
            expected = operator.matvec(v) if slope is None else slope
            torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-7)


def smooth_models() -> list[nn.Module]:
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    return [MODELS["mlp"][0](), Dropping(), normed]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("index", range(3), ids=["mlp", "dropout", "batch_norm"])
def test_finite_differences_agree(index, mode):
    batches = make_problem(sizes=[5, 3]).batches
    model = smooth_models()[index].double()
    check_finite_differences(HessianOperator(model, nn.CrossEntropyLoss(), batches, mode=mode))


# --- which function is differentiated -----------------------------------------------------------


def test_dropout_has_fixed_masks_and_a_symmetric_matrix():
    batches = make_problem(sizes=[5, 3]).batches
    model = Dropping().double().train()
    operator = HessianOperator(model, nn.CrossEntropyLoss(), batches)
    first = products(operator)
    torch.rand(7)  # the global random state has no part in it
    forms = probes(operator.size) @ first.T
    torch.testing.assert_close(forms, forms.T, rtol=0, atol=1e-12)
    operator.release()
    assert torch.equal(products(operator), first)
    streamed = HessianOperator(model, nn.CrossEntropyLoss(), batches, memory_budget=0)
    torch.testing.assert_close(products(streamed), first, rtol=0, atol=1e-13)
    other = HessianOperator(model, nn.CrossEntropyLoss(), batches, seed=1)
    assert not torch.allclose(products(other), first)


def test_each_batch_has_a_mask_of_its_own():
    """With one mask for two equal batches, the mean over them would be either of them."""
    x, y = make_problem(sizes=[4]).batches[0]
    torch.manual_seed(0)
    model = Dropping().double().train()
    one = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)])
    two = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y), (x, y)])
    assert abs(one.loss() - two.loss()) > 1e-3


@pytest.mark.parametrize("budget", [None, 0])
def test_modes_choose_the_function_and_none_takes_the_model_as_it_is(budget):
    batches = make_problem(sizes=[5, 3]).batches
    model = Dropping().double()
    dense = dense_curvature(model.eval(), supervised(nn.CrossEntropyLoss()), batches)

    def operator(mode: str | None) -> HessianOperator:
        loss = nn.CrossEntropyLoss()
        return HessianOperator(model, loss, batches, mode=mode, memory_budget=budget)

    trained = products(operator("train"))
    assert not torch.allclose(trained, probes(len(dense.hessian)) @ dense.hessian)
    as_it_is = operator(None)
    check(as_it_is, dense)
    check(operator("eval"), dense)
    model.train()
    assert torch.equal(products(as_it_is), trained)  # a change of mode is a change of matrix
    check(operator("eval"), dense)
    assert torch.equal(products(operator("train")), trained)


def test_a_part_in_eval_mode_stays_so():
    batches = make_problem(sizes=[5, 3]).batches
    model = Dropping().double().train()
    model.drop.eval()
    dense = dense_curvature(model, supervised(nn.CrossEntropyLoss()), batches)
    check(HessianOperator(model, nn.CrossEntropyLoss(), batches), dense)


def test_batch_norm_in_train_mode_takes_the_statistics_of_each_batch():
    batches = make_problem(sizes=[5, 3]).batches
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    model(torch.randn(9, 3).double() * 3)  # running statistics unlike those of any batch

    class Written(nn.Module):
        """The formula: torch's own, under the `vmap` of a dense Hessian, gives a wrong one."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = model[1].weight, model[1].bias

        def forward(self, x: Tensor) -> Tensor:
            centred = x - x.mean(dim=0)
            variance = centred.square().mean(dim=0)
            return centred / (variance + model[1].eps).sqrt() * self.weight + self.bias

    written = nn.Sequential(model[0], Written(), *model[2:])
    dense = dense_curvature(written, supervised(nn.CrossEntropyLoss()), batches)
    check(HessianOperator(model.train(), nn.CrossEntropyLoss(), batches), dense)
    dense = dense_curvature(model.eval(), supervised(nn.CrossEntropyLoss()), batches)
    check(HessianOperator(model, nn.CrossEntropyLoss(), batches), dense)


@pytest.mark.parametrize("budget", [None, 0])
def test_spectral_norm_takes_one_power_iteration_from_its_buffers_in_train_mode(budget):
    """The oracle is a copy that took that iteration by hand, and then stands still in eval mode."""
    batches = make_problem(sizes=[5, 3]).batches
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double().train()
    iterated = copy.deepcopy(model)
    iterated(batches[0][0])
    dense = dense_curvature(iterated.eval(), supervised(nn.CrossEntropyLoss()), batches)
    operator = HessianOperator(model, nn.CrossEntropyLoss(), batches, memory_budget=budget)
    check(operator, dense)
    assert torch.equal(products(operator), products(operator))


def test_autocast_around_it_has_no_effect():
    problem = make_problem("mlp", dtype=torch.float32)
    expected = products(operator_of(problem))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(products(operator_of(problem)), expected)
        gradient = operator_of(problem).gradient()
        loss = operator_of(problem).loss()
    assert torch.equal(gradient, operator_of(problem).gradient())
    assert loss == operator_of(problem).loss()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("budget", [None, 0])
def test_it_differentiates_where_gradients_are_switched_off(context, budget):
    problem = make_problem("mlp")
    operator = operator_of(problem, memory_budget=budget)
    with context():
        inside = products(operator).clone()
        assert not torch.is_grad_enabled()
    expected = probes(operator.size) @ problem.dense().hessian
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-10)
    check(operator, problem.dense())  # and what was kept from inside serves outside


@pytest.mark.parametrize("loss", LOSSES)
def test_attention_is_differentiated_twice_with_padding_and_causality(loss):
    """Fused attention has no second derivative: the mathematical form must be taken."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
            return self.head(
                F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(2).flatten(1)
            )

    problem = make_problem("attention", loss, sizes=[2, 3])
    model = Causal().double()
    dense = dense_curvature(model, supervised(problem.loss_fn), problem.batches)
    check(HessianOperator(model, problem.loss_fn, problem.batches), dense)


# --- parameters that change ---------------------------------------------------------------------


def _sgd(model: nn.Module, **options: Any) -> None:
    for p in model.parameters():
        p.grad = p.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1, **options).step()
    model.zero_grad()


def _data(model: nn.Module) -> None:
    model[0].weight.data[0, 0] += 0.5


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: p + 0.1 for name, p in model.state_dict().items()})


CHANGES = {
    "sgd": _sgd,
    "fused_sgd": lambda model: _sgd(model, fused=True),
    "data": _data,
    "load_state_dict": _load,
}


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parameters_that_changed_have_a_new_matrix(change, budget):
    problem = make_problem("mlp")
    operator = operator_of(problem, memory_budget=budget)
    before = products(operator)
    change(problem.model)
    assert not torch.allclose(products(operator), before)
    check(operator, problem.dense())


@pytest.mark.parametrize("engine", ["func", "double_backward"])
def test_no_copy_is_held_so_a_promise_that_is_broken_is_an_error(engine):
    """Inside `frozen` parameters are promised not to change: graphs that are kept share them."""
    problem = make_problem("mlp")
    operator = operator_of(problem, engine=engine)
    v = torch.ones(operator.size, dtype=torch.float64)
    with operator.frozen():
        operator.matvec(v)
        _sgd(problem.model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            operator.matvec(v)
    check(operator, problem.dense())


def test_frozen_looks_at_the_parameters_once(monkeypatch):
    looks = []
    digest = dependencies.digest
    monkeypatch.setattr(dependencies, "digest", lambda tensors: looks.append(1) or digest(tensors))
    operator = operator_of(make_problem("mlp"))
    v = torch.ones(operator.size, dtype=torch.float64)
    with operator.frozen():
        for _ in range(3):
            operator.matvec(v)
        operator.gradient()
        operator.loss()
    assert len(looks) == 1
    operator.matvec(v)
    operator.matvec(v)
    assert len(looks) == 3


def test_a_parameter_outside_of_params_that_changed_has_a_new_matrix():
    problem = make_problem("mlp")
    names = ["0.weight", "0.bias"]
    chosen = [problem.model.get_parameter(name) for name in names]
    operator = operator_of(problem, params=chosen)
    check(operator, problem.dense(names))
    _sgd(problem.model[4])
    check(operator, problem.dense(names))


def test_buffers_that_changed_have_a_new_matrix_in_eval_mode():
    """Recalibrated batch norm (as `swa_utils.update_bn` does) moves no parameter."""
    batches = make_problem(sizes=[5, 3]).batches
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    operator = HessianOperator(model.eval(), nn.CrossEntropyLoss(), batches)
    operator.loss()
    model[1].running_mean += 1
    check(operator, dense_curvature(model, supervised(nn.CrossEntropyLoss()), batches))


# --- kept and streamed graphs -------------------------------------------------------------------


class Counted(nn.Module):
    """Counts the calls of the model inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, Seen()

    @property
    def calls(self) -> int:
        return len(self.seen)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return self.inner(x)


def counted(sizes: tuple[int, ...] = (3, 1, 4), **options: Any) -> tuple[Counted, HessianOperator]:
    problem = make_problem("mlp", sizes=sizes)
    model = Counted(problem.model)
    options = {"verify": False} | options
    return model, HessianOperator(model, problem.loss_fn, problem.batches, **options)


def test_kept_graphs_are_built_once_for_all_products():
    model, operator = counted(memory_budget=1 << 30)
    eye = torch.eye(operator.size, dtype=torch.float64)
    operator.matmat(eye)
    operator.matvec(eye[0])
    assert model.calls == 3
    stats = operator.stats
    assert (stats.graphs_kept, stats.graphs_streamed) == (3, 0)
    assert stats.graph_bytes > 0
    assert (stats.products, stats.gradients, stats.passes) == (operator.size + 1, 1, 1)


def test_streamed_graphs_are_built_once_for_each_block_of_products():
    model, operator = counted(memory_budget=0)
    eye = torch.eye(operator.size, dtype=torch.float64)
    operator.matvec(eye[0])  # one pass more: weights and loss come first
    for block in (eye[:1], eye[:7], eye):
        before = model.calls
        operator.matmat(block)
        assert model.calls == before + 3
    stats = operator.stats
    assert (stats.graphs_kept, stats.graphs_streamed, stats.graph_bytes) == (0, 3, 0)
    assert stats.products == 1 + 1 + 7 + operator.size


def test_a_budget_for_some_graphs_keeps_those_and_streams_the_others():
    sizes = (4, 4, 4, 4)
    _, whole = counted(sizes, memory_budget=1 << 30)
    expected = products(whole)
    each = whole.stats.graph_bytes / 4
    model, operator = counted(sizes, memory_budget=int(2.5 * each))
    torch.testing.assert_close(products(operator), expected, rtol=0, atol=1e-13)
    stats = operator.stats
    assert (stats.graphs_kept, stats.graphs_streamed) == (2, 2)
    assert 0 < stats.graph_bytes <= 2.5 * each
    before = model.calls
    products(operator)
    assert model.calls == before + 2


def test_the_default_budget_keeps_the_graphs_of_a_small_model():
    _, operator = counted()
    products(operator)
    assert operator.stats.graphs_streamed == 0


def test_graph_bytes_grow_with_the_activations():
    """One batch of twice the examples holds twice the activations, beside copies of parameters."""

    def held(examples: int) -> int:
        _, operator = counted((examples,), memory_budget=1 << 30)
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
        return operator.stats.graph_bytes

    per_example = (held(4000) - held(2000)) / 2000
    assert per_example == pytest.approx((held(2000) - held(1000)) / 1000, rel=0.01)
    hidden = 4 + 4 + 3 + 3 + 2  # numbers that a forward pass makes of one example
    assert 8 * hidden <= per_example <= 30 * 8 * hidden


def test_kept_graphs_hold_no_gradient_of_their_own():
    """A wide layer and one example: gradients would be most of what is held."""

    def held(batches: int) -> int:
        data = [(torch.ones(1, 3000), torch.ones(1, 10))] * batches
        operator = HessianOperator(
            nn.Linear(3000, 10), half_squared_error, data, memory_budget=1 << 30
        )
        operator.matvec(torch.ones(operator.size))
        assert operator.stats.graphs_kept == batches
        return operator.stats.graph_bytes

    assert held(3) - held(2) < 4 * 3000 * 10


def test_batches_that_a_pass_brings_count_where_those_of_the_user_do_not():
    x, y = torch.ones(50, 3), torch.ones(50, 2)
    model = nn.Linear(3, 2)

    def held(data: Any) -> int:
        operator = HessianOperator(model, half_squared_error, data, memory_budget=1 << 30)
        operator.matvec(torch.ones(operator.size))
        return operator.stats.graph_bytes

    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=50)
    assert held(loader) - held([(x, y)]) == x.nbytes + y.nbytes


def test_the_graphs_of_one_state_are_gone_before_those_of_the_next_are_built():
    model, operator = counted()
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    old, alive = weakref.ref(operator._point), Seen()
    model.inner.register_forward_hook(lambda *_: alive.append(old() is not None))
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert alive == []
    _sgd(model)
    operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert alive == [False] * 3


def test_graphs_that_stream_are_gone_one_by_one():
    """The activations of a batch are freed before the model runs on the next one."""
    held, alive = Seen(), Seen()

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        alive.append(sum(not reference.expired() for reference in held))
        held.append(StorageWeakRef(output.untyped_storage()))  # saved for the backward pass

    model, operator = counted(memory_budget=0)
    model.inner[1].register_forward_hook(watch)
    operator.matmat(torch.eye(operator.size, dtype=torch.float64))
    assert alive == [0] * 6


def test_release_frees_the_graphs_and_the_next_product_builds_them_again():
    model, operator = counted()
    first, gradient = products(operator), operator.gradient()
    operator.release()
    assert torch.equal(operator.gradient(), gradient)
    assert operator.loss() == operator.loss()
    assert model.calls == 3
    assert torch.equal(products(operator), first)
    assert model.calls == 6


def test_gradient_and_loss_are_computed_once_for_each_parameter_state():
    model, operator = counted()
    loss, gradient = operator.loss(), operator.gradient()
    assert model.calls == 6  # the loss alone, without a graph, and then the gradient
    assert operator.loss() == pytest.approx(loss, rel=1e-14)
    assert torch.equal(operator.gradient(), gradient)
    assert model.calls == 6
    _sgd(model)
    operator.gradient()
    operator.loss()  # from the pass of the gradient
    assert model.calls == 9
    assert operator.stats.gradients == 2


def test_results_are_new_tensors():
    _, operator = counted()
    v = torch.ones(operator.size, dtype=torch.float64)
    for read in (operator.gradient, lambda: operator.matvec(v), lambda: operator.matmat(v[None])):
        expected = read().clone()
        read().zero_()
        assert torch.equal(read(), expected)
        assert not read().requires_grad
    assert torch.equal(v, torch.ones_like(v))


def test_vectors_of_another_dtype_and_layout_are_converted():
    _, operator = counted()
    V = torch.arange(2.0 * operator.size).view(-1, 2)
    expected = operator.matmat(V.T.double().contiguous())
    assert torch.equal(operator.matmat(V.T), expected)
    assert torch.equal(operator.matvec(V[:, 1]), expected[1])
    assert operator.matmat(V.T[:0]).shape == (0, operator.size)


# --- wrappers, copies, pickles ------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel_is_taken_off(process_group):
    problem = make_problem("mlp")
    wrapped = nn.parallel.DistributedDataParallel(problem.model)
    operator = HessianOperator(wrapped, problem.loss_fn, problem.batches)
    assert operator.model is problem.model
    assert operator.parameters.names[0] == "0.weight"
    check(operator, problem.dense())


def test_compiled_models_are_taken_out_and_never_compiled():
    problem = make_problem("mlp")

    def backend(*args: Any) -> None:
        raise AssertionError("compiled")

    compiled = torch.compile(problem.model, backend=backend)
    operator = HessianOperator(compiled, problem.loss_fn, problem.batches)
    assert operator.model is problem.model
    assert operator.parameters.names[0] == "0.weight"
    check(operator, problem.dense())


class NeverCopied(torch.utils.data.Dataset):
    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        raise AssertionError("the data were copied")


def test_a_copy_of_model_and_operator_is_independent_and_shares_the_data():
    problem = make_problem("mlp", sizes=[7])
    loader = torch.utils.data.DataLoader(NeverCopied(*problem.batches[0]), batch_size=3)
    operator = HessianOperator(problem.model, problem.loss_fn, loader, mode="eval")
    dense = problem.dense()
    check(operator, dense)
    products = operator.stats.products
    model, copied = copy.deepcopy((problem.model, operator))
    assert copied.model is model
    assert copied.parameters.tensors[0] is model[0].weight
    check(copied, dense)
    assert operator.stats.products == products
    _sgd(model)
    check(operator, dense)
    trained = Problem(model, problem.loss_fn, problem.batches)
    check(copied, trained.dense())
    _sgd(problem.model)
    check(operator, problem.dense())
    check(copied, trained.dense())


def test_a_copy_made_inside_frozen_looks_at_its_own_parameters():
    problem = make_problem("mlp")
    operator = operator_of(problem)
    with operator.frozen():
        model, copied = copy.deepcopy((problem.model, operator))
        _sgd(model)
        check(copied, Problem(model, problem.loss_fn, problem.batches).dense())


def test_an_operator_with_losses_of_a_module_survives_pickling():
    problem = make_problem("mlp", "mse")
    operator = HessianOperator(problem.model, half_squared_error, problem.batches, mode="eval")
    check(operator, problem.dense())
    check(pickle.loads(pickle.dumps(operator)), problem.dense())


def test_an_operator_made_from_a_batch_loss_of_a_module_survives_pickling():
    model = Language().double()
    operator = HessianOperator.from_loss(model, token_loss, language_batches())
    dense = dense_curvature(model, token_loss, language_batches())
    check(operator, dense)
    check(pickle.loads(pickle.dumps(operator)), dense)


# --- bad input ----------------------------------------------------------------------------------

X, Y = torch.randn(4, 3), torch.randint(2, (4,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": print}, r"model is 'builtin_function_or_method', but must be a torch.nn.Module"),
        (
            {"loss_fn": "mse"},
            r"loss_fn is 'mse', but must be callable as loss_fn\(output, target\)",
        ),
        ({"mode": "training"}, r"mode is 'training', but must be 'train', 'eval' or None"),
        ({"mode": True}, r"mode is True, but must be 'train', 'eval' or None"),
        ({"memory_budget": -1}, r"memory_budget is -1, but must be a number of bytes"),
        ({"memory_budget": float("nan")}, r"memory_budget is nan, but must be a number of bytes"),
        ({"params": []}, r"params is \[\], but must be at least one parameter"),
        ({"data": []}, r"data is 'empty', but must be at least one batch"),
        ({"data": None}, r"data is 'NoneType', but must be `\(x, y\)` or an iterable"),
        ({"data": 3}, r"data is 'int', but must be `\(x, y\)` or an iterable"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(options, message):
    arguments = {"model": nn.Linear(3, 2), "loss_fn": nn.CrossEntropyLoss(), "data": (X, Y)}
    with pytest.raises(ArgumentError, match=message):
        HessianOperator(**arguments | options)


def test_a_memory_budget_that_is_no_number_is_named():
    with pytest.raises(ArgumentError, match="memory_budget is '1GB', but must be"):
        HessianOperator(nn.Linear(3, 2), nn.CrossEntropyLoss(), (X, Y), memory_budget="1GB")


def test_a_batch_loss_that_cannot_be_called_is_named():
    with pytest.raises(ArgumentError, match=r"batch_loss is None, but must be callable"):
        HessianOperator.from_loss(nn.Linear(3, 2), None, (X, Y))


def _read(operator: HessianOperator, what: str) -> None:
    if what == "matvec":
        operator.matvec(torch.ones(operator.size))
    else:
        getattr(operator, what)()


@pytest.mark.parametrize("what", ["matvec", "gradient", "loss"])
@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (
            nn.CrossEntropyLoss(reduction="none"),
            ArgumentError,
            r"shape of the loss is \(4,\), but must be \(\)\. Take the mean",
        ),
        (lambda output, target: 1.0, ArgumentError, r"the loss is 'float', but must be a scalar"),
        (
            lambda output, target: output.sum() * 1j,
            ArgumentError,
            r"dtype of the loss is torch.complex64, but must be real floating point",
        ),
        (
            lambda output, target: output.sum().long(),
            ArgumentError,
            r"dtype of the loss is torch.int64, but must be real floating point",
        ),
        (lambda output, target: output.sum() / 0, NonFiniteError, r"loss over the data is -?inf"),
        (lambda output, target: output.sum() * torch.nan, NonFiniteError, "the data is nan"),
    ],
    ids=["not_a_mean", "no_tensor", "complex", "integer", "infinite", "nan"],
)
def test_losses_that_have_no_curvature_are_refused(loss_fn, error, message, what):
    operator = HessianOperator(nn.Linear(3, 2), loss_fn, (X, Y))
    with pytest.raises(error, match=message):
        _read(operator, what)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss: loss, r"batch_loss returns is 'Tensor', but must be \(mean loss, weight\)"),
        (lambda loss: (loss, 1, 2), r"batch_loss returns is 'tuple', but must be"),
    ],
)
def test_a_batch_loss_without_a_weight_is_refused(result, message):
    def batch_loss(model: Any, batch: Any) -> Any:
        return result(F.cross_entropy(model(batch[0]), batch[1]))

    with pytest.raises(ArgumentError, match=message):
        HessianOperator.from_loss(nn.Linear(3, 2), batch_loss, (X, Y)).loss()


def test_weights_that_sum_to_nothing_are_refused():
    def batch_loss(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1]), 0

    with pytest.raises(ArgumentError, match=r"data is 'of no examples'.*weight above 0"):
        HessianOperator.from_loss(nn.Linear(3, 2), batch_loss, (X, Y)).loss()


def test_one_bad_batch_among_many_is_an_error_and_the_operator_recovers():
    problem = make_problem("mlp")
    operator = operator_of(problem)
    dense = problem.dense()
    original = problem.model[0].weight.detach().clone()
    problem.model[0].weight.data[0, 0] = torch.nan
    for what in ("matvec", "gradient", "loss"):
        with pytest.raises(NonFiniteError, match="look for NaN"):
            _read(operator, what)
    problem.model[0].weight.data.copy_(original)
    check(operator, dense)


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("matvec", (9,)),
        ("matvec", (7,)),
        ("matvec", (2, 8)),
        ("matvec", ()),
        ("matmat", (8,)),
        ("matmat", (8, 2)),
        ("matmat", (1, 2, 8)),
    ],
)
def test_vectors_of_another_shape_are_refused(method, shape):
    operator = HessianOperator(nn.Linear(3, 2), nn.CrossEntropyLoss(), (X, Y))
    with pytest.raises(ArgumentError, match=r"shape of vectors is .* must be \(j, 8\), one a row"):
        getattr(operator, method)(torch.ones(shape))
    assert operator.stats.products == 0
