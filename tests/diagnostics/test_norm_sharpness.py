"""Sharpness in other norms against brute force in small dimensions, and closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.diagnostics import dual_norm, norm_sharpness
from subspace_optim.diagnostics.unit_balls import ball_of_norm, ball_of_optimizer
from tests.dense import Problem, problems, spectra, symmetric


class Quadratic(nn.Module):
    """Parameters of these shapes, at random; the loss is ½ θᵀHθ."""

    def __init__(self, matrix: Tensor, *shapes: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = matrix
        for i, shape in enumerate(shapes):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(f"p{i}", nn.Parameter(value))

    def forward(self) -> Tensor:
        theta = torch.cat([p.flatten() for p in self.parameters()])
        return theta @ self.matrix @ theta / 2


def operator(matrix: Tensor, *shapes: tuple[int, ...], seed: int = 0) -> so.HessianOperator:
    model = Quadratic(matrix, *(shapes or [(len(matrix),)]), seed=seed)
    return so.HessianOperator.from_loss(model, lambda m, _: (m(), 1), [torch.zeros(1)])


def form(matrix: Tensor, rows: Tensor) -> Tensor:
    return ((rows @ matrix) * rows).sum(dim=-1)


def largest_in_cube(matrix: Tensor) -> float:
    """By enumeration of the faces: the maximum is a stationary point of the face it lies in."""
    size, best = len(matrix), 0.0
    for face in itertools.product((-1.0, 0.0, 1.0), repeat=size):
        x = torch.tensor(face, dtype=torch.float64)
        free = x == 0
        if free.any():
            inside = matrix[free][:, free]
            x[free] = torch.linalg.lstsq(inside, -matrix[free] @ x, driver="gelsd").solution
        if x.abs().max() <= 1 + 1e-12:
            best = max(best, float(form(matrix, x)))
    return best


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_signs_against_all_faces_of_the_cube(spectrum: list[int], seed: int) -> None:
    """Convex, concave and indefinite. What is found is never above, and here it is all of it."""
    matrix = symmetric(torch.tensor(spectrum), seed)
    exact = largest_in_cube(matrix)
    slack = 1e-9 * float(matrix.abs().max()) + 1e-12
    hessian = operator(matrix, seed=seed)
    found = norm_sharpness(hessian, norm="sign", starts=24, steps=300, tol=1e-9)
    assert found <= exact + slack
    assert found == pytest.approx(exact, rel=1e-5, abs=1e3 * slack)
    assert norm_sharpness(hessian, norm="sign", starts=1, steps=3) <= exact + slack


@given(spectra(max_size=5), st.integers(0, 99))
def test_signs_are_never_above_however_the_spectrum_is_scaled(spectrum: Tensor, seed: int) -> None:
    matrix = symmetric(spectrum, seed)
    slack = 1e-9 * float(matrix.abs().max()) + 1e-12
    found = norm_sharpness(operator(matrix, seed=seed), norm="sign")
    assert found <= largest_in_cube(matrix) + slack


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.integers(0, 9))
def test_signs_of_a_diagonal_matrix(diagonal: list[float], seed: int) -> None:
    """The coordinates of negative curvature stay at 0: the maximum is at no corner."""
    hessian = operator(torch.diag(torch.tensor(diagonal, dtype=torch.float64)), seed=seed)
    found = norm_sharpness(hessian, norm="sign", tol=1e-9, steps=300)
    assert found == pytest.approx(sum(max(0.0, h) for h in diagonal), rel=1e-4, abs=1e-4)


def test_where_negative_curvature_rules_the_maximum_inside_is_reached() -> None:
    """By a conditional gradient alone it would be four fifths of it: there is no corner near."""
    spectrum = torch.cat([torch.tensor([3.0, 2.0, 1.0]), -20 * torch.linspace(0, 1, 197)])
    hessian = operator(symmetric(spectrum, 1))
    usual = norm_sharpness(hessian, norm="sign")
    patient = norm_sharpness(hessian, norm="sign", starts=8, steps=1000, tol=1e-8)
    assert usual == pytest.approx(patient, rel=0.03)


def rotations(count: int) -> Tensor:
    """All orthogonal 2×2 matrices, on a grid of angles: ``(2 count, 2, 2)``."""
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    c, s = angle.cos(), angle.sin()
    turned = torch.stack([c, -s, s, c], dim=1).view(-1, 2, 2)
    return torch.cat([turned, turned * torch.tensor([1.0, -1.0])])


@pytest.mark.parametrize("seed", range(4))
def test_spectral_norms_of_two_matrices_against_a_grid(seed: int) -> None:
    """Of a convex form the maximum is at orthogonal matrices, which a grid of angles covers."""
    generator = torch.Generator().manual_seed(seed)
    matrix = symmetric(torch.rand(8, generator=generator, dtype=torch.float64) * 4, seed)
    flat = rotations(180).flatten(1)
    first = flat.repeat_interleave(len(flat), 0)
    grid = float(form(matrix, torch.cat([first, flat.repeat(len(flat), 1)], dim=1)).max())
    hessian = operator(matrix, (2, 2), (2, 2), seed=seed)
    found = norm_sharpness(hessian, norm="spectral", starts=30, steps=400, tol=1e-9)
    # The nearest point of the grid is off by half a step in each angle, at a maximum: in squares.
    assert grid - 1e-9 <= found <= grid * (1 + 4 * (math.pi / 180) ** 2)


@pytest.mark.parametrize("seed", range(4))
def test_spectral_norms_of_an_indefinite_form_against_a_grid(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = symmetric(torch.randn(4, generator=generator, dtype=torch.float64) * 3, seed)
    sizes = torch.linspace(-1, 1, 41, dtype=torch.float64)
    values = torch.cartesian_prod(sizes, sizes)
    turned = rotations(60)[:60]
    points = torch.einsum("aij,sj,bjk->asbik", turned, values, turned[:30]).reshape(-1, 4)
    grid = float(form(matrix, points).max())
    hessian = operator(matrix, (2, 2), seed=seed)
    found = norm_sharpness(hessian, norm="spectral", starts=30, steps=400, tol=1e-9)
    room = float(torch.linalg.eigvalsh(matrix).abs().max()) * 0.05
    assert grid - 1e-9 <= found <= grid + room
    assert found > 0


@pytest.mark.parametrize(
    "norm", ["euclidean", "sign", "spectral", {"p0": "spectral", "p1": "sign", "*": "euclidean"}]
)
@pytest.mark.parametrize("seed", range(3))
def test_of_a_matrix_of_rank_one(norm: Any, seed: int) -> None:
    """``max (vᵀd)²`` is the square of the dual norm, whatever the norm; that is in closed form."""
    shapes = [(3, 5), (4,), (2, 3, 2), (3,)]
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(34, generator=generator, dtype=torch.float64)
    pieces = [p.view(s) for p, s in zip(v.split([15, 4, 12, 3]), shapes, strict=True)]
    nuclear = [
        float(torch.linalg.svdvals(p.flatten(1) if p.dim() > 1 else p[:, None]).sum())
        for p in pieces
    ]
    expected = {
        "euclidean": float(v.norm()),
        "sign": float(v.abs().sum()),
        "spectral": sum(nuclear),
    }
    mixed = nuclear[0] + float(pieces[1].abs().sum()) + float(torch.cat([v[19:]]).norm())
    exact = expected[norm] if isinstance(norm, str) else mixed
    hessian = operator(torch.outer(v, v), *shapes, seed=seed)
    assert norm_sharpness(hessian, norm=norm) == pytest.approx(exact**2)
    assert dual_norm(hessian, norm=norm, gradient=v) == pytest.approx(exact)


@given(problems())
def test_the_euclidean_one_is_the_largest_eigenvalue(problem: Problem) -> None:
    hessian = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    largest = float(torch.linalg.eigvalsh(problem.dense().hessian)[-1])
    found = norm_sharpness(hessian, torch.optim.SGD(problem.model.parameters(), lr=0.1))
    assert found == pytest.approx(max(0.0, largest), rel=1e-5, abs=1e-9)


@given(problems(), st.sampled_from(["sign", "spectral"]))
def test_of_models_it_is_a_stationary_point_above_the_gradient_s_direction(
    problem: Problem, norm: Any
) -> None:
    hessian = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    dense = problem.dense()
    ball = ball_of_norm(norm, hessian.parameters)
    own = ball.best(dense.gradient[None])[0]
    found = norm_sharpness(hessian, norm=norm, steps=200)
    slack = 1e-9 * float(dense.hessian.abs().max())
    assert found >= float(form(dense.hessian, own)) - slack
    # Bounds: the ball holds that of radius 1, and is in that of the largest Euclidean length.
    eigenvalues = torch.linalg.eigvalsh(dense.hessian)
    widest = float(ball.best(torch.randn_like(dense.gradient)[None]).square().sum())
    assert found <= float(eigenvalues[-1]) * widest + slack


@pytest.mark.parametrize("norm", ["sign", "spectral"])
def test_a_fixed_step_below_the_threshold_lowers_the_loss(norm: Any) -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        matrix = symmetric(torch.randn(12, generator=generator, dtype=torch.float64), seed)
        hessian = operator(matrix, (3, 4), seed=seed)
        sharpness, length = norm_sharpness(hessian, norm=norm), dual_norm(hessian, norm=norm)
        gradient, theta = hessian.gradient(), hessian.parameters.flatten(hessian.parameters.tensors)
        step = ball_of_norm(norm, hessian.parameters).best(gradient[None])[0]
        assert float(gradient @ step) == pytest.approx(length)
        before = hessian.loss()
        with hessian.at(theta - 0.99 * 2 * length / sharpness * step):
            assert hessian.loss() < before


def test_more_starts_and_steps_never_find_less() -> None:
    matrix = symmetric(torch.linspace(-2, 3, 40), 1)
    hessian = operator(matrix)
    by_steps = [norm_sharpness(hessian, norm="sign", steps=n, tol=0.0) for n in (1, 2, 4, 8, 16)]
    assert by_steps == sorted(by_steps)
    assert by_steps[0] < by_steps[-1]
    few, many = (norm_sharpness(hessian, norm="sign", starts=n) for n in (1, 30))
    assert few < many
    basis = so.DominantSubspace(hessian, 3).update()
    assert norm_sharpness(hessian, norm="sign", starts=1, basis=basis) > few


def test_products_are_as_many_as_said() -> None:
    hessian = operator(symmetric(torch.linspace(-2, 3, 40), 1))
    before = hessian.stats.products
    norm_sharpness(hessian, norm="sign", starts=5, steps=1, tol=0.0)
    assert hessian.stats.products - before == 5 * 2 + 1
    assert hessian.stats.gradients == 1
    before = hessian.stats.products
    norm_sharpness(hessian, norm="sign", starts=5, steps=500, tol=0.1)
    assert hessian.stats.products - before < 5 * 20  # each ends where it gains little


# --- of optimizers ------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(6, 3), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(torch.tanh(self.wide(x)))


def net() -> tuple[Net, so.HessianOperator]:
    torch.manual_seed(0)
    model = Net()
    data = torch.randn(20, 6), torch.randn(20, 8)
    return model, so.HessianOperator(model, nn.MSELoss(), data)


def muon(model: Net, companion: type, *, lr: float = 0.02, **options: Any) -> list[Any]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [
        torch.optim.Muon(matrices, lr=lr, **options),
        companion(vectors, lr=0.004, weight_decay=0.0),
    ]


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_muon_s_ball_is_as_large_as_its_steps(adjust: str | None) -> None:
    model, hessian = net()
    optimizers = muon(model, torch.optim.AdamW, adjust_lr_fn=adjust, weight_decay=0.0)
    ball = ball_of_optimizer(optimizers, hessian.parameters)
    assert ball.norms == ["spectral", "sign", "spectral", "sign"]
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(9, 6)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    for p, old, radius in zip(model.parameters(), before, ball.radii, strict=True):
        step = (p - old).detach()
        if p.dim() == 2:  # Newton-Schulz leaves singular values between 0.7 and 1.2, mostly
            sizes = torch.linalg.svdvals(step) / (0.02 * radius)
            assert float(sizes.min()) > 0.6
            assert float(sizes.max()) < 1.3
        else:  # Adam's first step is that of signs
            torch.testing.assert_close(step.abs(), torch.full_like(step, 0.02 * radius))


def test_muon_beside_sgd_and_alone() -> None:
    model, hessian = net()
    ball = ball_of_optimizer(muon(model, torch.optim.SGD, lr=0.001), hessian.parameters)
    assert ball.norms == ["spectral", "euclidean", "spectral", "euclidean"]
    assert ball.radii == pytest.approx([0.25, 1.0, 0.25 * math.sqrt(8 / 3), 1.0])
    alone = muon(model, torch.optim.SGD)[0]
    radii = ball_of_optimizer(alone, hessian.parameters).radii
    assert radii == pytest.approx([1.0, 0.0, math.sqrt(8 / 3), 0.0])
    matrices = so.HessianOperator(
        model, nn.MSELoss(), (torch.randn(20, 6), torch.randn(20, 8)), params="*.weight"
    )
    assert norm_sharpness(matrices, alone) > 0


def test_rates_scale_the_ball() -> None:
    """With rates a and b the form has blocks a² H_aa, a b H_ab, b² H_bb over (max rate)²."""
    matrix = symmetric(torch.tensor([1.0, 2.0, 3.0, 4.0]), 3)
    hessian = operator(matrix, (2,), (2,))
    a, b = hessian.parameters.tensors
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.4}]
    scale = torch.tensor([0.25, 0.25, 1.0, 1.0], dtype=torch.float64)
    scaled = matrix * scale * scale[:, None]
    found = norm_sharpness(hessian, torch.optim.SGD(groups))
    assert found == pytest.approx(float(torch.linalg.eigvalsh(scaled)[-1]))
    signs = norm_sharpness(hessian, torch.optim.Adam(groups, lr=0.1), starts=20)
    assert signs == pytest.approx(largest_in_cube(scaled))
    frozen = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.0}])
    block = float(torch.linalg.eigvalsh(matrix[:2, :2])[-1])
    assert norm_sharpness(hessian, frozen) == pytest.approx(block)


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        """Nothing: its name tells the norm."""


def test_which_norm_an_optimizer_has() -> None:
    model, hessian = net()
    p = list(model.parameters())
    for optimizer, norm in (
        (Lion(p, 0.1), "sign"),
        (torch.optim.AdamW(p), "sign"),
        (torch.optim.Adam(p, betas=(0.0, 0.0)), "sign"),
        (torch.optim.SGD(p, 0.1, momentum=0.9), "euclidean"),
        (so.SAM(p, 0.1), "euclidean"),
    ):
        assert ball_of_optimizer(optimizer, hessian.parameters).norms == [norm] * 4


def test_refusals() -> None:
    model, hessian = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for wrong in ({}, {"optimizer": sgd, "norm": "sign"}):
        with pytest.raises(ArgumentError, match=r"norm is .*instead of an optimizer"):
            norm_sharpness(hessian, **wrong)
    with pytest.raises(ArgumentError, match="norm is 'frobenius'"):
        norm_sharpness(hessian, norm="frobenius")
    with pytest.raises(ArgumentError, match=r"without a pattern for 'wide.bias'"):
        norm_sharpness(hessian, norm={"*.weight": "spectral"})
    with pytest.raises(ArgumentError, match=r"optimizer is 'Adagrad'.*Give the norm"):
        norm_sharpness(hessian, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(ArgumentError, match="lr is"):
        norm_sharpness(hessian, torch.optim.SGD(model.parameters(), 0.0))
    for wrong in ({"starts": 0}, {"steps": 0}, {"tol": -1}, {"seed": -1}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            norm_sharpness(hessian, norm="sign", **wrong)


def test_float32_and_no_curvature() -> None:
    _, hessian = net()
    exact = so.HessianOperator(
        net()[0].double(), nn.MSELoss(), tuple(t.double() for t in _data(hessian))
    )
    for norm in ("sign", "spectral"):
        single, double = (norm_sharpness(each, norm=norm, starts=1) for each in (hessian, exact))
        assert single == pytest.approx(double, rel=1e-2)
    assert norm_sharpness(operator(torch.zeros(3, 3).double()), norm="sign") == 0.0
    assert norm_sharpness(operator(-torch.eye(3).double()), norm="sign") == pytest.approx(0.0)


def _data(hessian: so.HessianOperator) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    Net()
    return torch.randn(20, 6), torch.randn(20, 8)


def test_products_that_are_not_finite() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self) -> Tensor:
            return self.weight.abs().pow(1.5).sum() + self.weight.sum()

    loss = lambda m, _: (m(), 1)  # noqa: E731
    hessian = so.HessianOperator.from_loss(Root(), loss, [torch.zeros(1)], verify=False)
    with pytest.raises(NonFiniteError, match="product"):
        norm_sharpness(hessian, norm="sign")
