"""The optimizers of a comparison: their spellings, options, errors, and that each of them runs."""

import copy
import io
import math
import re

import pytest
import torch
from torch import nn

import subspace_optim as so
from benchmarks.experiment import OPTIMIZERS, Settings, compare, minibatch
from benchmarks.optimizers import DEFAULT, kinship, recipes, takes_closure
from tests.benchmarks.comparisons import problem, same

SETTINGS = Settings(
    k=3, lr=0.1, batch_size=8, switch_at=4, steps=4, warmup_measure=2, measure=1, refresh=1
)


def run(*spellings, settings=SETTINGS, set_=(), **options):
    chosen = recipes(spellings, set_)
    return compare(*problem(), chosen, settings=settings, **options)


def built(spelling, *settings, lr=0.1):
    """The optimizers of one spelling, made for a small model."""
    model, loss_fn, data = problem()
    subspace = so.DominantSubspace(so.HessianOperator(model, loss_fn, data), 3)
    (recipe,) = recipes([spelling], settings).values()
    return recipe.build(model.parameters(), lr, subspace, 3)


# --- spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "name", "parts", "onto"),
    [
        ("sgd", "SGD", ["SGD"], None),
        ("domsgd", "DomSGD", ["DomSGD"], None),
        ("newton", "LowRankNewton", ["LowRankNewton"], None),
        ("quasinewton", "ClassGradientQuasiNewton", ["ClassGradientQuasiNewton"], None),
        ("adamw", "AdamW", ["AdamW"], None),
        ("torch.optim:NAdam", "torch.optim:NAdam", ["torch.optim:NAdam"], None),
        ("muon+adamw", "Muon+AdamW", ["Muon", "AdamW"], None),
        ("dom:adamw", "dom:AdamW", ["AdamW"], "dominant"),
        ("DOM:SGD", "dom:SGD", ["SGD"], "dominant"),
        ("bulk:sam", "bulk:SAM", ["SAM"], "bulk"),
        ("bulk:muon+adamw", "bulk:Muon+AdamW", ["Muon", "AdamW"], "bulk"),
        ("bulk:torch.optim:NAdam", "bulk:torch.optim:NAdam", ["torch.optim:NAdam"], "bulk"),
    ],
)
def test_every_spelling_has_one_meaning(spelling, name, parts, onto):
    (recipe,) = recipes([spelling]).values()
    assert recipe.name == name
    assert [part.name for part in recipe.parts] == parts
    assert recipe.onto == onto


@pytest.mark.parametrize(
    ("spelling", "kin"),
    [
        ("sgd", ("plain", "SGD")),
        ("domsam", ("dominant", "SAM")),
        ("bulksgd", ("bulk", "SGD")),
        ("newton", ("newton", "LowRankNewton")),
        ("dom:adamw", ("dominant", "AdamW")),
        ("bulk:muon+adamw", ("bulk", "Muon+AdamW")),
    ],
)
def test_kinship_tells_what_is_projected(spelling, kin):
    assert [kinship(name) for name in recipes([spelling])] == [kin]


def test_of_a_pair_the_first_takes_the_matrices():
    muon, adamw = built("muon+adamw")
    assert type(muon) is torch.optim.Muon
    assert type(adamw) is torch.optim.AdamW
    assert [p.dim() for p in muon.param_groups[0]["params"]] == [2, 2]
    assert [p.dim() for p in adamw.param_groups[0]["params"]] == [1, 1]


OWN = """
import torch

class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, power=1):
        super().__init__(params, {"lr": lr, "power": power})

    @torch.no_grad()
    def step(self):  # as some have it: without a closure
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"] * group["power"])

class NoOptimizer:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_optimizers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own")
def test_any_other_class_takes_part():
    lion = "own_optimizers:Lion"
    result = run(lion, f"bulk:{lion}", set_=[f"{lion}.power=0.5"])
    assert set(result.branches) == {lion, f"bulk:{lion}"}
    for name in result.branches:
        assert result.branches[name].options == [{"lr": 0.1, "power": 0.5}]
        assert result.branches[name].steps == 4
    (plain,) = built(lion)
    assert not takes_closure(plain)
    # 48 signs of ±1 at the rate 0.05: every step is that long.
    parameters = sum(p.numel() for p in problem()[0].parameters())
    for row in result.of(lion):
        assert row["update_norm"] == pytest.approx(0.05 * math.sqrt(parameters), rel=1e-5)


# --- options --------------------------------------------------------------------------------------


def options_of(recipe):
    return [dict(part.options) for part in recipe.parts]


def test_options_reach_what_they_name():
    settings = ["adamw.lr=1e-3", "adamw.betas=(0.5, 0.6)", "muon.adjust_lr_fn=match_rms_adamw"]
    chosen = recipes(["sgd", "dom:adamw", "bulk:muon+adamw"], settings)
    adamw = {"lr": 1e-3, "betas": (0.5, 0.6)}
    assert options_of(chosen["SGD"]) == [{}]
    assert options_of(chosen["dom:AdamW"]) == [adamw]
    assert options_of(chosen["bulk:Muon+AdamW"]) == [{"adjust_lr_fn": "match_rms_adamw"}, adamw]


def test_the_longer_name_wins_whatever_the_order():
    for order in (1, -1):
        settings = ["dom:adamw.lr=3", "adamw.lr=1", "muon+adamw.lr=2"][::order]
        chosen = recipes(["adamw", "dom:adamw", "muon+adamw"], settings)
        assert options_of(chosen["AdamW"]) == [{"lr": 1}]
        assert options_of(chosen["dom:AdamW"]) == [{"lr": 3}]
        assert options_of(chosen["Muon+AdamW"]) == [{"lr": 2}, {"lr": 2}]
    later = recipes(["sgd"], ["sgd.lr=1", "SGD.lr=2"])
    assert options_of(later["SGD"]) == [{"lr": 2}]


def test_options_are_those_that_the_optimizer_has():
    (adamw,) = built("adamw", "adamw.lr=0.25", "adamw.amsgrad=True")
    assert adamw.param_groups[0]["lr"] == 0.25
    assert adamw.param_groups[0]["amsgrad"] is True
    (quasi,) = built("quasinewton", "quasinewton.decay=0.5", "quasinewton.orthogonal=True")
    assert quasi.subspace.decay == 0.5
    assert quasi.subspace.orthogonal is True
    assert quasi.subspace.num_classes == 3


def test_rates_without_options():
    """SGD's kind follows --lr, 0.3 here; the others have rates of their own."""
    own = {"newton": 0.1, "adamw": 1e-3, "rmsprop": 1e-4, "lbfgs": 0.1, "adagrad": 0.01}
    of_sgd = dict.fromkeys(["sgd", "domsgd", "bulksam", "quasinewton", "asgd"], 0.3)
    for spelling, lr in (own | of_sgd).items():
        (optimizer,) = built(spelling, lr=0.3)
        assert optimizer.param_groups[0]["lr"] == lr, spelling
    assert [o.param_groups[0]["lr"] for o in built("muon+adamw")] == [0.005, 1e-3]
    (quasi,) = built("quasinewton", lr=0.3)
    assert quasi.param_groups[0]["newton_lr"] == 0.3
    assert quasi.param_groups[0]["momentum"] == 0


@pytest.mark.parametrize(
    ("spellings", "settings", "message"),
    [
        (["foo"], [], "unknown optimizer 'foo': allowed are SGD, .*AdamW.*module:Class.*dom:"),
        (["sgd", "dom:foo+adamw"], [], "unknown optimizer 'foo' in 'dom:foo\\+adamw'"),
        (["muon+"], [], "unknown optimizer '' in 'muon\\+'"),
        ([], [], "at least one of"),
        (["dom:domsgd"], [], "DomSGD works in a subspace already.*Write 'domsgd'"),
        (["bulk:newton"], [], "LowRankNewton works in a subspace already"),
        (["adam+sgd+rprop"], [], "has 3 parts.*exactly two dimensions and b the rest"),
        (["muon+lbfgs"], [], "LBFGS cannot be a part of a pair.*evaluates the loss again"),
        (["sam+adamw"], [], "SAM cannot be a part of a pair"),
        (["muon+domsgd"], [], "DomSGD cannot be a part of a pair"),
        (["sgd", "SGD"], [], "SGD is given twice"),
        (["nowhere_to_be_found:Lion"], [], "module 'nowhere_to_be_found' cannot be imported"),
        (["torch.optim:Lion"], [], "'Lion' is not in that module. Optimizers there: .*AdamW"),
        (["own_optimizers:NoOptimizer"], [], "'NoOptimizer' is no subclass.*there: Lion"),
        (["sgd"], ["adamw.lr=1"], "'adamw' is not among the optimizers of this run.*SGD"),
        (["adamw"], ["dom:adamw.lr=1"], "'dom:adamw' is not among"),
        (["sgd"], ["sgd.lrr=1"], "'lrr' is no option of sgd.*Allowed: SGD has lr, momentum"),
        (["domsgd"], ["domsgd.subspace=1"], "'subspace' is no option of domsgd"),
        (["sgd"], ["lr=1"], "must be NAME.option=value, such as"),
        (["sgd"], ["sgd.lr"], "must be NAME.option=value, such as"),
        (["sgd"], ["sgd.lr=high"], "lr is 'high', but must be a number"),
        (["sgd"], ["sgd.nesterov=yes"], "nesterov is 'yes', but must be True or False"),
    ],
)
@pytest.mark.usefixtures("own")
def test_what_cannot_be_meant_is_told(spellings, settings, message):
    with pytest.raises(ValueError, match=message):
        recipes(spellings, settings)


@pytest.mark.parametrize(
    ("spelling", "settings", "message"),
    [
        ("adamw", ["adamw.lr=-1.0"], r"AdamW cannot be made with lr=-1.0: .*-1.0"),
        ("domsgd", ["domsgd.momentum=-1"], "DomSGD cannot be made with momentum=-1: momentum"),
        ("muon", [], r"Muon cannot be made.*2D.*muon\+adamw"),
        ("sgd", ["sgd.nesterov=True"], "SGD cannot be made with nesterov=True: Nesterov"),
        ("adamw", ["adamw.betas=3"], "AdamW cannot be made with betas=3"),
    ],
)
def test_what_cannot_be_made_is_told_before_anything_runs(spelling, settings, message):
    steps = []
    with pytest.raises(ValueError, match=message):
        run("rprop", spelling, set_=settings, on_progress=lambda *_: steps.append(1))
    assert not steps


def test_a_pair_needs_both_kinds_of_parameters():
    linear = nn.Linear(4, 2, bias=False)
    data = torch.randn(10, 4), torch.randint(2, (10,))
    with pytest.raises(ValueError, match=r"no parameter is left for AdamW.*other dimensions"):
        compare(linear, nn.CrossEntropyLoss(), data, ["muon+adamw"], settings=SETTINGS)


def test_class_gradients_need_classes():
    model, _, (x, _) = problem()
    message = r"ClassGradientQuasiNewton cannot be made.*needs outputs \(N, C\)"
    with pytest.raises(ValueError, match=message):
        compare(model, nn.MSELoss(), (x, torch.randn(40, 3)), ["quasinewton"], settings=SETTINGS)


# --- runs -----------------------------------------------------------------------------------------

KINDS = [*DEFAULT, "adam", "adagrad", "rmsprop", "lbfgs", "adafactor", "muon+adamw"]
KINDS += ["dom:adamw", "bulk:adamw", "dom:sam", "bulk:lbfgs", "bulk:muon+adamw"]


@pytest.mark.parametrize("spelling", KINDS)
def test_each_kind_is_measured_in_the_common_columns(spelling):
    result = run(spelling)
    ((name, branch),) = result.branches.items()
    assert result.finished
    assert branch.steps == 4
    assert not branch.stopped
    rows = result.of(name)
    assert len(rows) == 4
    columns = set(result.of("warmup")[0])
    for row in rows:
        assert set(row) == columns
        assert all(math.isfinite(row[c]) for c in ("loss", "dom_lr", "bulk_lr", "chi_update"))
    assert branch.distance > 0
    inside = {"dominant": 1.0, "bulk": 0.0}.get(kinship(name)[0])
    inside = 1.0 if name == "LowRankNewton" else inside
    for row in rows if inside is not None else []:
        assert row["chi_update"] == pytest.approx(inside, abs=1e-3)


def test_the_projections_of_a_pair_sum_up_to_it():
    once = Settings(**vars(SETTINGS) | {"steps": 1})
    result = run("muon+adamw", "dom:muon+adamw", "bulk:muon+adamw", settings=once)
    whole, dominant, bulk = (result.of(name)[0]["update_norm"] for name in result.branches)
    assert min(dominant, bulk) > 0.01 * whole
    assert math.hypot(dominant, bulk) == pytest.approx(whole, rel=1e-4)


def by_hand(make, closures=True, observe=False):
    """Warm-up and branch as a plain loop; the training loss at the end."""
    model, loss_fn, (x, y) = problem()
    operator = so.HessianOperator(model, loss_fn, (x, y))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(8):
        if step == 4:
            optimizer = make(model, so.DominantSubspace(operator, 3, refresh=1))
        batch = minibatch(40, 8, step, 0)

        def closure(batch=batch, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_fn(model(x[batch]), y[batch])
            loss.backward()
            return loss.detach()

        if observe and step >= 4:
            optimizer.subspace.observe(x[batch], y[batch])
        if closures:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return operator.loss()


def test_quasi_newton_observes_each_minibatch_before_its_step():
    def make(model, _):
        subspace = so.ClassGradientSubspace(model, 3)
        return so.ClassGradientQuasiNewton(
            model.parameters(), 0.1, 0.1, momentum=0.0, subspace=subspace
        )

    seen = []

    def look(experiment, _):
        seen.append([observer.stats.observations for observer in experiment.observers])

    result = run("quasinewton", on_progress=look)
    # Four steps before the switch, one call for the switch, four after it, and one for the end.
    assert [each for each in seen if each] == [[0], [1], [2], [3], [4], [4]]
    expected = by_hand(make, observe=True)
    assert result.branches["ClassGradientQuasiNewton"].train_loss == expected


def test_class_gradients_of_ones_own_optimizer_observe_too():
    model, loss_fn, data = problem()
    subspace = so.ClassGradientSubspace(model, 3, orthogonal=True)
    made = {"mine": lambda params, lr, _: so.BulkSGD(params, lr, subspace=subspace)}
    assert compare(model, loss_fn, data, made, settings=SETTINGS).finished
    assert subspace.stats.observations == 4


@pytest.mark.parametrize(
    ("spelling", "make"),
    [
        ("sam", lambda model, _: so.SAM(model.parameters(), 0.1, 0.02)),
        (
            "bulksam",
            lambda model, subspace: so.BulkSAM(model.parameters(), 0.1, 0.02, subspace=subspace),
        ),
        ("lbfgs", lambda model, _: torch.optim.LBFGS(model.parameters(), 0.1, max_iter=5)),
    ],
)
def test_closures_are_evaluated_as_by_hand(spelling, make):
    (branch,) = run(
        spelling, settings=Settings(**vars(SETTINGS) | {"measure": 4})
    ).branches.values()
    assert branch.train_loss == by_hand(make)


def test_dropout_draws_the_same_in_every_evaluation_of_a_step():
    torch.manual_seed(0)
    seen = []

    class Noisy(nn.Linear):
        def forward(self, x):
            if self.training and torch.is_grad_enabled() and len(x) == 8:
                seen.append(float(torch.rand(1)))
            return super().forward(x)

    model = Noisy(6, 3)
    data = torch.randn(40, 6), torch.randint(3, (40,))
    settings = Settings(**vars(SETTINGS) | {"switch_at": 0, "steps": 2, "spectrum": 0})
    compare(model, nn.CrossEntropyLoss(), data, ["sam"], settings=settings)
    first, again, second, third = seen
    assert first == again
    assert second == third
    assert first != second


def test_one_that_diverges_ends_alone():
    chosen = OPTIMIZERS | {"wild": lambda params, lr, _: torch.optim.SGD(params, 1e38)}
    names = ["wild", "SGD"]
    settings = Settings(**vars(SETTINGS) | {"measure": 4})
    result = compare(*problem(), {name: chosen[name] for name in names}, settings=settings)
    assert result.finished
    assert re.match(r"step \d: .*not finite", result.branches["wild"].stopped)
    assert result.branches["wild"].train_loss == math.inf
    assert result.branches["SGD"].steps == 4
    assert not result.branches["SGD"].stopped


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [2, "auto"])
@pytest.mark.parametrize(
    "spelling", ["quasinewton", "newton", "domsam", "lbfgs", "bulk:muon+adamw"]
)
def test_a_run_that_was_taken_up_again_ends_as_the_other(spelling, refresh):
    settings = Settings(**vars(SETTINGS) | {"steps": 6, "measure": 2, "refresh": refresh})
    kept = []

    def keep(experiment, _):
        file = io.BytesIO()
        torch.save(copy.deepcopy(experiment.state_dict()), file)
        kept.append(file.getvalue())

    whole = run(spelling, settings=settings, on_progress=keep)
    for state in (kept[5], kept[7], kept[-2]):  # at its first step, amid, and before its end
        loaded = torch.load(io.BytesIO(state), weights_only=True)
        rest = run(spelling, settings=settings, resume_from=loaded)
        assert same(rest.rows, whole.rows)
        for name, branch in whole.branches.items():
            for figure in ("train_loss", "distance", "steps", "products", "options"):
                assert getattr(rest.branches[name], figure) == getattr(branch, figure)
