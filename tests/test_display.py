"""How objects show themselves: what is known already, in a line and in a notebook."""

import copy
import io
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import subspace_optim as so
from subspace_optim import _display
from subspace_optim._display import html_facts, html_rows, numbers


class Cells(HTMLParser):
    """The texts of the cells of tables, unescaped; markup of others would be tags of its own."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.rows = set(), []
        self.open = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def problem(loss_fn=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(1200, 5), torch.randint(3, (1200,))
    hessian = so.HessianOperator(model, loss_fn or nn.CrossEntropyLoss(), (x, y), **options)
    return model, hessian, (x, y)


def trained(every=1, steps=7, **options):
    model, hessian, (x, y) = problem()
    subspace = so.DominantSubspace(hessian, k=2, **options)
    optimizer = so.BulkSGD(model.parameters(), lr=0.1, subspace=subspace)
    monitor = so.Monitor(optimizer, subspace, every=every)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return monitor, subspace, optimizer, hessian


def all_shown(*objects):
    return [text for each in objects for text in (repr(each), each._repr_html_())]


# --- what is shown --------------------------------------------------------------------------------


def test_an_operator_shows_what_it_is_of_before_and_after_it_has_been_used():
    model, hessian, _ = problem(params="*.weight")
    assert repr(hessian) == (
        "HessianOperator(P=64, N=not read yet, mean over=not known yet, engine=func, "
        "mode=train, as the model, params=2 tensors, '0.weight' … '2.weight')"
    )
    hessian.matvec(torch.ones(64))
    model.eval()
    assert repr(hessian) == (
        "HessianOperator(P=64, N=1,200, mean over=examples, engine=func, "
        "mode=eval, as the model, params=2 tensors, '0.weight' … '2.weight')"
    )
    assert Cells(hessian._repr_html_()).rows[:3] == [
        ["P", "64"],
        ["N", "1,200"],
        ["mean over", "examples"],
    ]


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        (lambda out, y: (out.sum(1) - y).square().mean(), "examples"),  # which nobody can tell
        (nn.CrossEntropyLoss(ignore_index=2), "{} targets"),
        (nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 4.0])), "{} weighted targets"),
        (nn.CrossEntropyLoss(reduction="sum"), "nothing: it is a sum"),
        (lambda out, y: nn.functional.mse_loss(out, torch.eye(3)[y]), "3,600 elements"),
    ],
)
def test_an_operator_tells_what_its_mean_is_over(loss_fn, said):
    _, hessian, (_, y) = problem(loss_fn)
    hessian.loss()
    weight = torch.tensor([0.5, 2.0, 4.0])[y].sum().item() if "weighted" in said else (y != 2).sum()
    expected = said.format(f"{float(weight):,.10g}")
    assert f"mean over={expected}, " in repr(hessian)


def test_an_operator_of_a_loss_of_ones_own_and_of_a_sample():
    model, _, (x, y) = problem()

    def batch_loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1]), 7 * len(batch[0])

    batches = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 1200, 100)]
    hessian = so.HessianOperator.from_loss(model, batch_loss, batches, mode="eval")
    hessian.loss()
    assert "N=1,200, mean over=the weights of batch_loss, 8,400 in all, " in repr(hessian)
    assert "mode=eval, params" in repr(hessian)
    assert "N=300 of 1,200, " in repr(hessian.sample(300, seed=0))


def test_an_operator_of_the_current_batch_says_so():
    model, _, (x, y) = problem()
    batch = so.CurrentBatch()
    hessian = so.HessianOperator(model, nn.CrossEntropyLoss(), batch)
    assert "N=not read yet of the CurrentBatch, " in repr(hessian)
    batch.set(x[:30], y[:30])
    hessian.loss()
    assert "N=30 of the CurrentBatch, " in repr(hessian)


def test_an_operator_of_two_and_one_that_could_not_be_made():
    model, hessian, data = problem()
    gauss_newton = so.GaussNewtonOperator(model, nn.CrossEntropyLoss(), data)
    both = so.ResidualOperator(hessian, gauss_newton)
    shown = f"hessian={hessian!r}, gauss_newton={gauss_newton!r}"
    assert repr(both) == f"ResidualOperator(P=75, {shown})"
    half_made = so.DominantSubspace.__new__(so.DominantSubspace)  # as a debugger meets it
    assert repr(half_made) == object.__repr__(half_made)


def test_a_subspace_shows_its_eigenvalues_age_angle_and_cost():
    _, hessian, _ = problem()
    subspace = so.DominantSubspace(hessian, k=2)
    assert repr(subspace).startswith(
        "DominantSubspace(k=2, eigenvalues=none yet, update() finds them, refresh=auto, "
        "max_angle=0.05, cost=0 refreshes by 0 products and 0 gradients in 0 s, "
        "operator=HessianOperator(P=75, "
    )
    _, subspace, _, _ = trained(refresh=3)
    assert subspace.clock == 7
    first, second = subspace.basis.eigenvalues.tolist()
    stats = subspace.stats
    assert repr(subspace).startswith(
        f"DominantSubspace(k=2, eigenvalues=[{first:.4g}, {second:.4g}], age=0 steps, refresh=3, "
        f"cost=3 refreshes by {stats.products} products and {stats.gradients} gradients in "
    )
    _, subspace, _, _ = trained(refresh=2, steps=4)
    assert ", age=1 step, " in repr(subspace)
    _, subspace, _, _ = trained()
    estimate = f"{subspace.stats.estimate:.2g}"
    assert f", estimated angle={estimate} of at most 0.05, refresh=auto, " in repr(subspace)
    assert ["estimated angle", f"{estimate} of at most 0.05"] in Cells(subspace._repr_html_()).rows


def test_bases_and_other_subspaces():
    model, _, (x, y) = problem()
    fixed = so.FixedSubspace(model, torch.eye(75)[:8], torch.arange(8.0), params=lambda *_: True)
    assert repr(fixed.basis) == "EigenBasis(k=8, P=75, eigenvalues=[7, 6, 5, 4, 3, …, 0])"
    assert repr(fixed) == (
        "FixedSubspace(k=8, eigenvalues=[7, 6, 5, 4, 3, …, 0], "
        "parameters=ParameterSpace(P=75, 4 tensors, '0.weight' … '2.bias'))"
    )
    classes = so.ClassGradientSubspace(model, num_classes=3)
    assert repr(classes).startswith(
        "ClassGradientSubspace(num_classes=3, decay=0.9, orthogonal=False, observations=0, param"
    )
    classes.observe(x, y)
    assert "observations=1, parameters" in repr(classes)  # the terms are computed when asked for
    values = [f"{value:.4g}" for value in classes.update().eigenvalues.tolist()]
    assert f"observations=1, eigenvalues=[{', '.join(values)}], " in repr(classes)
    assert repr(classes.update()).startswith("LowRankCurvature(k=3, P=75, eigenvalues=[")


def test_an_optimizer_shows_its_options_as_torch_does_and_its_subspace():
    _, subspace, optimizer, _ = trained()
    shown = repr(optimizer)
    torchs = torch.optim.Optimizer.__repr__(optimizer)
    assert shown == f"{torchs[:-1]}subspace: {subspace!r}\n)"
    assert "    lr: 0.1\n" in torchs
    assert repr(copy.deepcopy(optimizer)).endswith("subspace: None\n)")


def test_a_monitor_shows_rows_and_the_latest_values():
    monitor, subspace, _, hessian = trained(every=3)
    latest = monitor.rows()[-1]
    assert repr(monitor).startswith(
        f"Monitor(rows=3, steps 0 to 6, every=3, optimizer=BulkSGD, source={subspace!r}, "
        f"latest=step 6; loss {latest['loss']:.4g}; "
    )
    assert f"eigenvalue_2 {latest['eigenvalue_2']:.4g}" in repr(monitor)
    cells = Cells(monitor._repr_html_())
    assert cells.rows[:3] == [
        ["rows", "3, steps 0 to 6"],
        ["every", "3"],
        ["optimizer", "BulkSGD"],
    ]
    assert cells.rows[-4] == list(latest)
    assert [row[0] for row in cells.rows[-3:]] == ["0", "3", "6"]
    assert cells.rows[-1] == [_display.number(value) for value in latest.values()]
    monitor, *_ = trained(steps=9)
    cells = Cells(monitor._repr_html_())
    assert [row[0] for row in cells.rows[-6:]] == ["step", "4", "5", "6", "7", "8"]
    both = [torch.optim.SGD([p], 0.1) for p in hessian.parameters.tensors]
    fresh = so.Monitor(both, hessian, every=lambda step: step > 3)
    assert repr(fresh).startswith("Monitor(rows=0, every=<lambda>, optimizer=SGD, SGD, SGD, SGD, ")
    assert ", columns=step, " in repr(fresh)
    assert "every=every_share(0.05), " in repr(
        so.Monitor(torch.optim.SGD(hessian.parameters.tensors), hessian, every=so.every_share(0.05))
    )


# --- what it may cost and may not break -----------------------------------------------------------


def test_nothing_is_computed_though_the_parameters_have_moved():
    monitor, subspace, optimizer, hessian = trained()
    with torch.no_grad():
        hessian.parameters.tensors[0].add_(1.0)
    before = copy.deepcopy((hessian.stats, subspace.stats, subspace.steps.looks, subspace.clock))
    random = torch.get_rng_state()
    shown = [*all_shown(monitor, subspace, hessian), repr(optimizer), repr(subspace.basis)]
    assert before == (hessian.stats, subspace.stats, subspace.steps.looks, subspace.clock)
    assert torch.equal(random, torch.get_rng_state())
    assert shown == [*all_shown(monitor, subspace, hessian), repr(optimizer), repr(subspace.basis)]


def test_a_device_that_is_at_work_is_not_waited_for(monkeypatch):
    values = torch.ones(3, device="meta")  # to read it would be an error
    monkeypatch.setattr(_display, "_busy", lambda device: device.type == "meta")
    assert numbers(values) == "3 on meta"
    assert numbers(torch.ones(2)) == "[1, 1]"


def test_a_model_that_has_lost_a_parameter_can_still_be_shown():
    model, hessian, _ = problem()
    subspace = so.DominantSubspace(hessian, k=2)
    subspace.update()
    monitor = so.Monitor(torch.optim.SGD(model.parameters(), 0.1), subspace)
    before = all_shown(hessian, subspace, monitor)
    model[0] = nn.Identity()
    assert all_shown(hessian, subspace, monitor) == before


def test_names_and_texts_are_escaped():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("<script>alert('&')</script>", nn.Linear(2, 2))
    data = torch.ones(4, 2), torch.zeros(4, 2)
    hessian = so.HessianOperator(model, nn.MSELoss(), data)
    cells = Cells(hessian._repr_html_())
    assert "script" not in cells.tags
    assert "<script>alert('&')</script>.weight" in cells.rows[-1][1]
    assert Cells(html_facts("<i>", {"<b>": "1 < 2 & 3"})).rows == [["<b>", "1 < 2 & 3"]]
    assert Cells(html_rows(["<b>"], [{"<b>": "<td>"}])).rows == [["<b>"], ["<td>"]]


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_figure_is_a_picture_in_its_own_colours(theme):
    """What a notebook takes: a png of twice the dots, and the size to show it in."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from subspace_optim.diagnostics.plots.style import THEMES

    monitor, *_ = trained()
    figure = monitor.plot(theme=theme)
    png, size = figure._repr_png_()
    picture = imread(io.BytesIO(png), format="png")
    width, height = (round(float(inches) * 120) for inches in figure.get_size_inches())
    assert size == {"width": width, "height": height}
    assert picture.shape[:2] == (2 * height, 2 * width)
    background = torch.tensor(to_rgb(THEMES[theme].background))
    corner = torch.from_numpy(picture[0, 0, :3].copy()).double()
    torch.testing.assert_close(corner, background.double(), atol=1e-2, rtol=0)
    assert picture.reshape(-1, picture.shape[2]).std(axis=0)[:3].min() > 0.01  # it is drawn
    assert figure._repr_png_()[0] == png
