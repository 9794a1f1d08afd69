"""What is put back: modes, buffers, gradients, random state and precision settings."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from subspace_optim.curvature import FiniteDifferenceHessian, HessianOperator, MeanLossOperator
from tests.dense import make_problem
from tests.observe import Seen

BACKENDS = torch.backends.mkldnn
SETTINGS = {"matmul": BACKENDS.matmul, "conv": BACKENDS.conv, "rnn": BACKENDS.rnn}


def precisions() -> dict[str, str]:
    return {name: setting.fp32_precision for name, setting in SETTINGS.items()}


class Everything(nn.Module):
    """All that a forward pass may change: buffers of three layers, random state, and modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.frozen, self.head = nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2)
        self.seen = Seen()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        found = tuple(precisions().values())
        self.seen.append((found, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        if self.fails:
            raise RuntimeError("the forward pass failed")
        return self.head(self.frozen(self.drop(torch.tanh(self.norm(self.first(x))))))


def everything() -> tuple[Everything, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model, batches = Everything().double(), make_problem(sizes=[5, 3]).batches
    nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    model.frozen.eval()  # a part in another mode than the rest
    return model, batches


def snapshot(model: nn.Module) -> dict[str, Any]:
    numpy_state = np.random.get_state()  # noqa: NPY002 (the global state is what is tested)
    state = {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    state |= {f"identity of {n}": id(b) for n, b in model.named_buffers()}
    for n, p in model.named_parameters():
        gradient = None if p.grad is None else p.grad.clone()
        state |= {n: p.detach().clone(), f"grad of {n}": gradient, f"id of {n}": id(p)}
    state |= {f"mode of {n}": m.training for n, m in model.named_modules()}
    state |= {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy_state[1].copy())}
    return state | {"numpy position": numpy_state[2], "python": random.getstate()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return [n for n in before | after if not same(before.get(n), after.get(n))]


def _ones(operator: MeanLossOperator) -> Tensor:
    return torch.ones(operator.size, dtype=operator.dtype)


KINDS = [HessianOperator, FiniteDifferenceHessian]
READINGS: dict[str, Callable[[MeanLossOperator], Any]] = {
    "loss": lambda operator: operator.loss(),
    "gradient": lambda operator: operator.gradient(),
    "products": lambda operator: operator.matmat(_ones(operator)[None].repeat(2, 1)),
}
# What is kept within the budget is kept for products: the others do not depend on it.
PASSES = [("loss", None), ("gradient", None), ("products", None), ("products", 0)]


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("mode", [None, "train", "eval"])
@pytest.mark.parametrize(("read", "budget"), PASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_model_or_the_random_state_changes(kind, read, budget, mode, fails):
    model, batches = everything()
    loss = nn.CrossEntropyLoss()
    operator = kind(model, loss, batches, mode=mode, memory_budget=budget)
    model.fails = fails
    before = snapshot(model)
    if fails:
        with pytest.raises(RuntimeError, match="the forward pass failed"):
            READINGS[read](operator)
    else:
        READINGS[read](operator)
    assert differences(before, snapshot(model)) == []


def test_the_snapshot_sees_what_a_plain_forward_and_backward_pass_changes():
    """So that the test above can fail."""
    model, batches = everything()
    before = snapshot(model)
    model.train()
    np.random.rand()  # noqa: NPY002
    random.random()
    nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    changed = differences(before, snapshot(model))
    assert {"mode of frozen", "torch", "python", "numpy position"} <= set(changed)
    assert {"buffer norm.running_mean", "buffer frozen.num_batches_tracked"} <= set(changed)
    assert any("parametrizations" in name and "buffer" in name for name in changed)
    assert {f"grad of {n}" for n, p in model.named_parameters() if p.grad is not None} & set(
        changed
    )


def test_gradients_that_are_none_stay_none():
    problem = make_problem()
    operator = HessianOperator(problem.model, problem.loss_fn, problem.batches)
    for read in READINGS.values():
        read(operator)
    assert all(p.grad is None for p in problem.model.parameters())


# --- precision ----------------------------------------------------------------------------------


@pytest.fixture
def settings_put_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    for backend in (BACKENDS, torch.backends.cudnn):
        backend.fp32_precision = "none"
    others = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    for setting in (*SETTINGS.values(), *others):
        setting.fp32_precision = "none"


def _nothing() -> None:
    """Leaves torch's own settings."""


def _medium() -> None:
    torch.set_float32_matmul_precision("medium")


def _tf32() -> None:
    for setting in SETTINGS.values():
        setting.fp32_precision = "tf32"


def _bf16_everywhere() -> None:
    torch.backends.fp32_precision = "bf16"


@pytest.mark.usefixtures("settings_put_back")
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("users", [_nothing, _medium, _tf32, _bf16_everywhere])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_float32_inside_and_what_the_user_set_outside(kind, users, fails):
    model, batches = everything()
    operator = kind(model, nn.CrossEntropyLoss(), batches)
    users()
    before = precisions()
    assert (users is _nothing) == (before["matmul"] == "none")
    model.fails = fails
    for read in READINGS.values():
        model.seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            if fails:
                with pytest.raises(RuntimeError, match="the forward pass failed"):
                    read(operator)
            else:
                read(operator)
            assert torch.is_autocast_enabled("cpu")
        assert precisions() == before
        assert {seen[:2] for seen in model.seen} == {(("ieee",) * 3, False)}


@pytest.mark.usefixtures("settings_put_back")
def test_settings_that_follow_a_general_one_still_do_afterwards():
    problem = make_problem()
    operator = HessianOperator(problem.model, problem.loss_fn, problem.batches)
    torch.backends.fp32_precision = "tf32"
    assert precisions() == dict.fromkeys(SETTINGS, "tf32")
    operator.loss()
    torch.backends.fp32_precision = "ieee"
    assert precisions() == dict.fromkeys(SETTINGS, "ieee")


@pytest.mark.gpu
@pytest.mark.usefixtures("settings_put_back")
def test_tf32_is_off_inside_and_back_outside_on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("only CUDA has TF32")
    problem = make_problem(dtype=torch.float32)
    model, inside = problem.model.cuda(), Seen()
    model.register_forward_hook(lambda *_: inside.append(torch.backends.cuda.matmul.fp32_precision))
    operator = HessianOperator(model, problem.loss_fn, problem.batches)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    operator.matvec(torch.ones(operator.size, device="cuda"))
    assert set(inside) == {"ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_no_grad_around_it_stays_and_inside_gradients_are_on():
    """Also for the loss alone: there are losses that differentiate by themselves."""
    model, batches = everything()
    operator = HessianOperator(model, nn.CrossEntropyLoss(), batches)
    for context, enabled in ((torch.no_grad(), False), (torch.enable_grad(), True)):
        with context:
            for read in READINGS.values():
                read(operator)
            assert torch.is_grad_enabled() == enabled
    model.seen.clear()
    HessianOperator(model, nn.CrossEntropyLoss(), batches).loss()
    assert {grad for _, _, grad in model.seen} == {True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_of_what_accumulates_a_gradient_outlast_a_look_in_another_dtype(dtype):
    """``DistributedDataParallel`` sums gradients by them. The proof is made in float64."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    x, y = torch.randn(20, 4, dtype=dtype), torch.randint(3, (20,))
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]
    fired = []
    for node in nodes:
        node.register_hook(lambda *_: fired.append(1))
    hessian = HessianOperator(model, nn.functional.cross_entropy, (x, y))
    assert hessian.matvec(torch.ones(hessian.size)).dtype == torch.float32
    assert not fired
    nn.functional.cross_entropy(model(x), y).backward()
    assert len(fired) == 2
    assert all(p.grad.dtype == p.dtype == dtype for p in model.parameters())
