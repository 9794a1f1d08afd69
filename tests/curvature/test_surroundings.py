"""An evaluation leaves everything as it found it, whatever the loss reads, writes and draws."""

import random
import signal
import threading
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.curvature.surroundings import Surroundings
from tests.failing import Fails
from tests.observe import Seen

X, Y = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2
CPU = torch.device("cpu")
shared_rng = np.random.default_rng(3)
calls = 0
elsewhere = ModuleType("elsewhere")  # as a file of the user's own
elsewhere.__file__, elsewhere.calls = __file__, 0


class Net(nn.Module):
    """A network whose forward pass does something on the side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Counter(Net):
    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return self.body(x) * (1 + self.steps)


class GlobalCounter(Net):
    def forward(self, x: Tensor) -> Tensor:
        global calls  # noqa: PLW0603 (what some people write)
        calls += 1
        return self.body(x) * (1 + calls)


class ModuleCounter(Net):
    """Counts in another module than its own."""

    def forward(self, x: Tensor) -> Tensor:
        elsewhere.calls += 1
        return self.body(x) * (1 + elsewhere.calls)


class Lists(Net):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[float] = []
        self.table: dict[str, int] = {}
        self.recent: deque[int] = deque(maxlen=3)
        self.nested = {"inner": [1.0]}

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1.0)
        self.table[str(len(self.log))] = 1
        self.recent.append(len(self.log))
        self.nested["inner"][0] += 1
        return self.body(x) * self.nested["inner"][0] + len(self.recent)


class Hidden(Net):
    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out = out if self.hidden is None else out + self.hidden
        self.hidden = out.detach().mean(0)
        return out


class WrittenInPlace(Net):
    """A plain tensor, no buffer, that the forward pass writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        result = out - self.centre
        with torch.no_grad():
            self.centre.mul_(0.5).add_(out.mean(0))
        return result


class Momentum(Net):
    """An encoder that follows the other one by writing through `.data`, as MoCo's does."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(3, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for p in self.key.parameters():
            p.data.mul_(0.9).add_(0.1)
        return self.body(x) * self.key(x)


class NumpyArray(Net):
    def __init__(self) -> None:
        super().__init__()
        self.running = np.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.running[:] = 0.5 * self.running + 1
        return self.body(x) + float(self.running[0])


class OwnGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rng = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.rand(2, generator=self.rng)


class NumpyGenerators(Net):
    def __init__(self) -> None:
        super().__init__()
        self.new, self.old = np.random.default_rng(1), np.random.RandomState(2)
        self.python = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (self.new.random() + self.old.rand() + self.python.random())


class GlobalGenerators(Net):
    def forward(self, x: Tensor) -> Tensor:
        drawn = np.random.rand() + random.random() + shared_rng.random()  # noqa: NPY002
        return self.body(x) * drawn


class Meter:
    """An object of the user's that is no module."""

    def __init__(self) -> None:
        self.total, self.history = 0.0, [0.0]

    def __call__(self, out: Tensor) -> None:
        self.total += float(out.detach().sum())
        self.history.append(self.total)


class Metered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        self.meter(out)
        return out * (1 + len(self.meter.history))


class Rebound(Net):
    """A buffer that the forward pass replaces by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale * 0.5
        return self.body(x) * self.scale


class ClassCounter(Net):
    """Counts on the class, in a helper method, with a table that a cache keeps in order."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.recent = dict.fromkeys(range(3), 1.0)

    def helper(self) -> float:
        type(self).calls += 1
        first = next(iter(self.recent))
        self.recent[first] = self.recent.pop(first) + 1  # to the end
        return shared_rng.random() + next(iter(self.recent.values()))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.helper() * self.calls


class LongHistory(Net):
    def __init__(self) -> None:
        super().__init__()
        self.history = [0.0] * 5000

    def forward(self, x: Tensor) -> Tensor:
        self.history.append(1.0)
        return self.body(x) * len(self.history) / 5000


NETS = [
    ClassCounter, ModuleCounter, LongHistory,
    Net, Counter, GlobalCounter, Lists, Hidden, WrittenInPlace, Momentum, NumpyArray, OwnGenerator,
    NumpyGenerators, GlobalGenerators, Metered, Rebound,
]  # fmt: skip


class CentredLoss(nn.Module):
    """A loss with a running centre, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(2))
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy((out - self.centre) * self.weight, y)
        self.centre.mul_(0.9).add_(out.detach().mean(0), alpha=0.1)
        return loss


def closure_loss() -> Callable[[Tensor, Tensor], Tensor]:
    """A loss with a critic and a counter in its closure."""
    torch.manual_seed(2)
    critic = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    seen = 0

    def loss(out: Tensor, y: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        return F.cross_entropy(out, y) + F.softplus(-critic(out)).mean() / seen

    return loss


LOSSES = {"plain": lambda: F.cross_entropy, "module": CentredLoss, "closure": closure_loss}


# Each model with a plain loss, and each loss with one plain model and one that draws and counts.
CASES = [(kind, "plain") for kind in NETS]
CASES += [(kind, loss) for kind in (Net, ClassCounter) for loss in ("module", "closure")]


def train(net: nn.Module, loss_fn: Any, *, watched: bool) -> tuple[Tensor, Any]:
    """Five steps; the state of everything that a forward pass can change, at the end."""
    global calls, shared_rng
    calls, shared_rng = 0, np.random.default_rng(3)
    ClassCounter.calls = elsewhere.calls = 0
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hessian = so.HessianOperator(net, loss_fn, (X, Y))
    if watched:
        so.Monitor(optimizer, so.DominantSubspace(hessian, k=1), every=2)
    for _ in range(5):
        optimizer.zero_grad()
        loss_fn(net(X), Y).backward()
        optimizer.step()
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    drawn = torch.rand(1).item(), np.random.rand(), random.random(), shared_rng.random()  # noqa: NPY002
    return theta, (calls, elsewhere.calls, ClassCounter.calls, drawn)


@pytest.mark.parametrize(("kind", "loss"), CASES)
def test_training_does_not_change_by_a_bit_because_somebody_looks(kind, loss):
    plain, watched = (train(kind(), LOSSES[loss](), watched=w) for w in (False, True))
    assert torch.equal(plain[0], watched[0])
    assert plain[1] == watched[1]


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(("kind", "loss"), CASES)
def test_one_parameter_state_has_one_loss_gradient_and_matrix(kind, loss, budget):
    net = kind()
    data = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    operator = so.HessianOperator(net, LOSSES[loss](), data, memory_budget=budget)
    v = torch.ones(operator.size)
    first = operator.matvec(v), operator.gradient(), operator.loss()
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002 (what goes on elsewhere)
    operator._forget()
    second = operator.matvec(v), operator.gradient(), operator.loss()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]


def test_what_the_loss_depends_on_is_part_of_the_parameter_state():
    """Its own parameters and buffers, those of a critic in its closure, and modes."""
    net, loss = Net(), CentredLoss()
    critic = nn.Linear(2, 1)

    def together(out: Tensor, y: Tensor) -> Tensor:
        return loss(out, y) + critic(out).mean()

    operator = so.HessianOperator(net, together, (X, Y))
    states = [operator.state()]
    assert operator.state() == states[0]
    for change in (
        lambda: loss.weight.data.add_(1),
        lambda: loss.centre.add_(1),
        lambda: critic.weight.data.mul_(2),
        critic.eval,
        lambda: net.body[0].bias.data.add_(1),
    ):
        change()
        states.append(operator.state())
        true = torch.cat([g.flatten() for g in torch.autograd.grad(
            F.cross_entropy((net(X) - loss.centre) * loss.weight, Y) + critic(net(X)).mean(),
            list(net.parameters()),
        )])  # fmt: skip
        torch.testing.assert_close(operator.gradient(), true)
    assert len(set(states)) == len(states)


def test_statistics_that_batch_norm_only_writes_are_no_part_of_the_state():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    operator = so.HessianOperator(net, F.cross_entropy, (X, Y))
    before = operator.state()
    net(X)
    assert operator.state() == before
    net.eval()
    still = operator.state()
    net[1].running_mean += 1
    assert len({before, still, operator.state()}) == 3


# --- object identity, whatever is called and whatever fails ---------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Shared(nn.Module):
    """One layer under several names, in lists, and as an attribute beside them."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.layers = nn.ModuleList([self.layer] * times)
        self.again = nn.Sequential(*self.layers, nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.layers[0](x)))


def parametrized(kind: str) -> nn.Module:
    wrap = getattr(nn.utils.parametrizations, kind)
    return nn.Sequential(wrap(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2))


def models() -> st.SearchStrategy[nn.Module]:
    return st.one_of(
        st.builds(Tied),
        st.builds(Shared, st.integers(1, 3)),
        st.sampled_from(["weight_norm", "spectral_norm", "orthogonal"]).map(parametrized),
        st.sampled_from([Momentum, Rebound, Hidden]).map(lambda kind: kind()),
        st.just(None).map(
            lambda _: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        ),
    )


def held(model: nn.Module) -> list[Any]:
    """Every parameter and buffer by its place, with what it holds."""
    return [
        (id(module), name, id(t), None if t is None else t.detach().clone())
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for name, t in owner.items()
    ]


def assert_as_it_was(model: nn.Module, before: list[Any]) -> None:
    now = held(model)
    assert [entry[:3] for entry in now] == [entry[:3] for entry in before]
    for (*_, a), (*_, b) in zip(now, before, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


USES: dict[str, Callable[[nn.Module], Any]] = {
    "loss": lambda m: so.HessianOperator(m, F.cross_entropy, (X, Y)).loss(),
    "gradient": lambda m: so.HessianOperator(m, F.cross_entropy, (X, Y)).gradient(),
    "func": lambda m: _product(so.HessianOperator(m, F.cross_entropy, (X, Y))),
    "double_backward": lambda m: _product(
        so.HessianOperator(m, F.cross_entropy, (X, Y), engine="double_backward")
    ),
    "gauss_newton": lambda m: _product(so.GaussNewtonOperator(m, F.cross_entropy, (X, Y))),
    "differences": lambda m: _product(so.FiniteDifferenceHessian(m, F.cross_entropy, (X, Y))),
    "check": lambda m: so.HessianOperator(m, F.cross_entropy, (X, Y)).check(),
    "class_gradients": lambda m: so.ClassGradientSubspace(m, 2).observe(X, Y),
}


def _product(operator: so.CurvatureOperator) -> Tensor:
    return operator.matvec(torch.ones(operator.size))


@settings(max_examples=25)
@given(model=models(), use=st.sampled_from(sorted(USES)))
def test_modules_hold_the_same_objects_after_every_call(model, use):
    before = held(model)
    USES[use](model)
    assert_as_it_was(model, before)
    assert all(p.grad is None for p in model.parameters())


@settings(max_examples=40)
@given(
    model=models(),
    use=st.sampled_from(["func", "double_backward", "differences", "class_gradients"]),
    share=st.floats(0, 1),
    error=st.sampled_from([torch.OutOfMemoryError("injected"), KeyboardInterrupt()]),
)
def test_modules_hold_the_same_objects_after_an_error_at_any_operation(model, use, share, error):
    before = held(model)
    count = Fails(0, error)
    with count:
        USES[use](model)
    failing = Fails(1 + int(share * (count.seen - 1)), error)
    try:
        with failing:
            USES[use](model)
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert_as_it_was(model, before)
    USES[use](model)


def test_an_interrupt_waits_until_the_evaluation_is_over():
    net, seen = Net(), Seen()

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        if not seen:
            signal.raise_signal(signal.SIGINT)
        seen.append(1)
        return F.cross_entropy(out, y)

    before = held(net)
    operator = so.HessianOperator(net, loss_fn, (X, Y))
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            operator.gradient()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)
    assert len(seen) == 1
    assert_as_it_was(net, before)
    operator.gradient()


def test_threads_evaluate_one_after_the_other():
    net = Net()
    before, inside, most = held(net), Seen(), Seen()

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.001)
        inside.clear()
        return F.cross_entropy(out, y)

    operators = [so.HessianOperator(net, loss_fn, (X, Y)) for _ in range(3)]
    threads = [threading.Thread(target=operator.gradient) for operator in operators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) >= 3
    assert max(most) == 1
    assert_as_it_was(net, before)


@pytest.mark.parametrize("engine", ["func", "double_backward"])
def test_a_gradient_hook_that_only_looks_is_no_part_of_the_loss(engine):
    net, called = Net(), Seen()
    net.body[0].weight.register_hook(lambda g: called.append(1))
    operator = so.HessianOperator(net, F.cross_entropy, (X, Y), engine=engine)
    ours = operator.gradient()
    called.clear()
    assert torch.equal(operator.gradient(), ours)
    operator.matvec(ours)
    assert torch.equal(ours, so.HessianOperator(Net(), F.cross_entropy, (X, Y)).gradient())
    F.cross_entropy(net(X), Y).backward()
    assert called


@pytest.mark.parametrize("options", [{}, {"engine": "double_backward"}])
def test_a_gradient_hook_that_makes_another_gradient_is_refused(options):
    """What then trains is not the loss: its curvature would be of something else."""
    net = Net()
    net.body[0].weight.register_hook(lambda g: g * 0)
    operator = so.HessianOperator(net, F.cross_entropy, (X, Y), **options)
    with pytest.raises(so.InconsistentDerivativeError, match="a hook of a parameter"):
        operator.gradient()


# --- what a forward pass does to parameters, and a loss to gradients -----------------------------


class Renormalised(nn.Module):
    """`max_norm` writes into the weights, and clipping into all parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.table = nn.Embedding(9, 3, max_norm=0.5 if kind == "max_norm" else None)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "clamp":
            with torch.no_grad():
                for p in self.parameters():
                    p.clamp_(-0.3, 0.3)
        return self.head(torch.tanh(self.table(x[:, 0].abs().long() % 9)))


@pytest.mark.parametrize("kind", ["max_norm", "clamp"])
def test_parameters_that_a_forward_pass_writes_to_are_left_as_they_are(kind):
    for use in USES.values():
        model = Renormalised(kind)
        before = held(model)
        use(model)
        assert_as_it_was(model, before)
    plain, watched = (train(Renormalised(kind), F.cross_entropy, watched=w) for w in (False, True))
    assert torch.equal(plain[0], watched[0])


def test_a_loss_that_calls_backward_itself_leaves_gradients_as_they_are():
    """Adversarial training: a step along the gradient by the inputs, found inside of the loss."""

    def attacked(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x = batch[0].clone().requires_grad_()
        F.cross_entropy(model(x), batch[1]).backward()
        model.zero_grad()
        return F.cross_entropy(model(batch[0] + 0.1 * x.grad.sign()), batch[1]), len(x)

    net = Net()
    F.cross_entropy(net(X), Y).backward()
    grads = [(p.grad, p.grad.clone()) for p in net.parameters()]
    operator = so.HessianOperator.from_loss(net, attacked, [(X, Y)])
    operator.gradient()
    operator.matvec(torch.ones(operator.size))
    for p, (grad, value) in zip(net.parameters(), grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)


# --- what is found --------------------------------------------------------------------------------


def test_closures_globals_partials_and_methods_lead_to_modules():
    critic, teacher, other = nn.Linear(2, 1), nn.Linear(2, 2), nn.Linear(1, 1)

    class Loss:
        def __init__(self) -> None:
            self.parts = {"teacher": [teacher]}

        def compute(self, out: Tensor, y: Tensor, extra: nn.Module = other) -> Tensor:
            return critic(out).mean() + self.parts["teacher"][0](out).mean()

    net = Net()
    found = Surroundings(net, Loss().compute, CPU).modules
    assert {id(m) for m in (critic, teacher, other, net)} <= {id(m) for m in found}
    assert found[0] is net


class Keeper(nn.Module):
    """Holds what the loss may depend on, in a place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


def _an_attribute(keeper: Keeper, thing: nn.Module) -> None:
    keeper.things = {"a": [(thing,)]}


def _an_entry_that_comes_before_torchs(keeper: Keeper, thing: nn.Module) -> None:
    held = dict(vars(keeper))
    vars(keeper).clear()
    vars(keeper).update({"things": [thing]} | held)


def _torchs_entries_in_another_order(keeper: Keeper, thing: nn.Module) -> None:
    held = dict(vars(keeper))
    vars(keeper).clear()
    vars(keeper).update(dict(reversed(held.items())) | {"things": [thing]})


def _a_forward_hook(keeper: Keeper, thing: nn.Module) -> None:
    keeper.inner.register_forward_hook(lambda *_: thing and None)


def _a_hook_of_a_parameter(keeper: Keeper, thing: nn.Module) -> None:
    keeper.inner.weight.register_hook(lambda g: thing and g)


def _a_hook_of_a_buffer(keeper: Keeper, thing: nn.Module) -> None:
    keeper.register_buffer("state", torch.zeros(2, requires_grad=True))
    keeper.state.register_hook(lambda g: thing and g)


def _a_submodule_far_down(keeper: Keeper, thing: nn.Module) -> None:
    keeper.inner = nn.Sequential(nn.Tanh(), nn.ModuleList([nn.Identity(), nn.ModuleList([thing])]))


def _an_attribute_of_the_class(keeper: Keeper, thing: nn.Module) -> None:
    keeper.__class__ = type("Other", (Keeper,), {"thing": [thing], "__module__": __name__})


@pytest.mark.parametrize("depth", [0, 30])
@pytest.mark.parametrize(
    "put",
    [
        _an_attribute,
        _an_entry_that_comes_before_torchs,
        _torchs_entries_in_another_order,
        _a_forward_hook,
        _a_hook_of_a_parameter,
        _a_hook_of_a_buffer,
        _a_submodule_far_down,
        _an_attribute_of_the_class,
    ],
)
def test_whatever_one_of_many_modules_refers_to_is_found(put, depth):
    keeper, thing = Keeper(), nn.Linear(1, 1)
    net: nn.Module = keeper
    for _ in range(depth):
        net = nn.Sequential(nn.Tanh(), net, nn.Identity())
    assert all(m is not thing for m in Surroundings(net, None, CPU).modules)
    put(keeper, thing)
    found = Surroundings(net, None, CPU)
    assert sum(m is thing for m in found.modules) == 1
    assert {id(p) for p in thing.parameters()} <= {id(t) for t in found.tensors()}
    assert len(found.modules) == len(set(map(id, found.modules)))


@pytest.mark.parametrize("order", [list, lambda held: reversed(list(held))])
def test_the_numbers_of_all_modules_count(order):
    nets = [nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), Keeper()), Keeper()]
    nets[2].register_forward_hook(lambda *_: None)
    net = nn.Sequential(*nets)
    for module in net.modules():
        held = dict(order(vars(module).items()))
        vars(module).clear()
        vars(module).update(held)
    seen = {Surroundings(net, None, CPU).numbers(set())}
    for module in net.modules():
        module.count = 1.5
        seen.add(Surroundings(net, None, CPU).numbers(set()))
        assert Surroundings(net, None, CPU).numbers({"count"}) in seen
    assert len(seen) == 1 + len(list(net.modules()))


def test_libraries_are_not_walked_through():
    """Torch, NumPy and the standard library are large, and keep no state of the user's."""
    found = Surroundings(Net(), F.cross_entropy, CPU)
    assert len(found.modules) == 5
    assert len(found._namespaces) < 100
