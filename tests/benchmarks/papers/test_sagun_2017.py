"""`sagun_2017`: its cheapest claim as it stands, and everything else at a tiny size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import subspace_optim as so
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.networks import fully_connected, made
from benchmarks.papers.problems import blobs
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.sagun_2017 import analysis, clusters, random_matrices, runs
from benchmarks.papers.sagun_2017.pictures import (
    table_clusters,
    table_growth,
    table_moves,
    table_negative,
)
from benchmarks.papers.training import Problem
from tests.benchmarks.papers.tiny import claim_of
from tests.benchmarks.papers.tiny import size as tiny_size

PAPER = PAPERS["sagun_2017"]
NOTHING: dict[str, dict[int, Raw]] = {run.name: {} for run in PAPER.runs}


@pytest.fixture(scope="module")
def measured(tiny: Callable[[str, str], Raw]) -> Callable[[str], Raw]:
    return functools.partial(tiny, "sagun_2017")


claim = functools.partial(claim_of, PAPER)


# --- as it stands --------------------------------------------------------------------------------


def test_the_spectrum_of_white_data_follows_its_law() -> None:
    run = PAPER.run("white")
    raw = run.measure(Job(), **run.size("small"))
    assert claim("bulk-is-marchenko-pastur").holds(claim("bulk-is-marchenko-pastur").measure(raw))
    # One output, so that G has rank N: not one zero more or less than P − N.
    assert [row["zeros"] for row in raw["rows"]] == [row["trivial"] for row in raw["rows"]]
    assert [row["trivial"] for row in raw["rows"]] == [0, 0, 250]


# --- at a tiny size ------------------------------------------------------------------------------


def test_an_interrupted_training_ends_the_same(tmp_path: Any) -> None:
    size = tiny_size("sagun_2017", "growth") | {"widths": (4,)}
    whole = runs.growth(Job(scratch=tmp_path / "a"), **size)
    assert whole["networks"][0]["steps"] == 200
    runs.growth(Job(scratch=tmp_path / "b"), **(size | {"most": 100}))
    assert runs.growth(Job(scratch=tmp_path / "b"), **size) == whole


# --- Table 1 -------------------------------------------------------------------------------------


def row_like(number: int, gap: int, ratio: int, elbow: int, covariance: float = 1.0) -> Raw:
    counts = {"gap": gap, "ratio": ratio, "elbow": elbow}
    figures = {"mean": 1e-5, "std": 2e-4, "cutoff": 0.003, "outlying": 0.1, "bulk": 1e-4}
    return {"clusters": number, "covariance": covariance} | counts | figures


def raw_like(key: tuple[str, str], *rows: Raw) -> Raw:
    return {"algorithm": key[0], "activation": key[1], "rows": list(rows)}


def as_printed(algorithm: str, activation: str) -> Raw:
    rows = [
        row_like(number, theirs["gap"], theirs["ratio"], theirs.get("elbow", 0), covariance)
        for (a, f, covariance, number), theirs in clusters.TABLE.items()
        if (a, f) == (algorithm, activation)
    ]
    return raw_like((algorithm, activation), *rows)


def test_the_table_has_the_papers_rows() -> None:
    assert len(clusters.TABLE) == 19
    sizes = {
        sum(p.numel() for p in fully_connected((100, 30, 30, c)).parameters()) for c in (2, 50)
    }
    assert sizes == {4022, 5510}
    rows = table_clusters(NOTHING)
    assert [row[1] for row in rows[1:6]] == ["4022", "4115", "4270", "4580", "4022"]
    assert len(rows) == 22


def test_the_papers_own_table_agrees_with_itself_and_not_with_its_text() -> None:
    for key in (("GD", "tanh"), ("GD", "relu"), ("SGD", "relu")):
        assert all(all(column) for column in analysis.agreeing(as_printed(*key)))
        assert analysis.off_printed(as_printed(*key), "gap") == 0
    assert math.isnan(analysis.off_printed(as_printed("GD", "tanh"), "elbow"))
    assert analysis.clusters_matched(as_printed("GD", "relu")) == 1
    assert analysis.clusters_matched(as_printed("SGD", "relu")) == pytest.approx(0.8)
    assert claim("one-outlier-a-cluster").holds(0.8)
    assert analysis.matches_beyond_two(as_printed("GD", "tanh")) == 0
    assert analysis.matches_beyond_two(as_printed("GD", "relu")) == 1
    # 2, 7, 15, 21, 49 for 2, 5, 10, 20, 50 clusters: one of five.
    exact = analysis.exact_matches(as_printed("SGD", "relu"))
    assert exact == pytest.approx(0.2)
    assert not claim("exactly-one-a-class").holds(exact)


def test_printed_cutoffs_contradict_printed_deviations() -> None:
    """As the evidence of `deviation-is-mean` has it; first for a spectrum that is known."""
    spectrum = torch.cat([torch.full((3,), 0.5), torch.zeros(analysis.parameters_of(2) - 3)])
    row = {"clusters": 2, "elbow": 3, "cutoff": 0.5, "mean": float(spectrum.mean())}
    assert analysis.deviation_by_cutoff(row) == pytest.approx(float(spectrum.std(correction=0)))
    rows = [row for row in clusters.TABLE.values() if "cutoff" in row]
    times = [analysis.deviation_by_cutoff(row) / row["mean"] for row in rows]
    assert len(times) == 15
    assert [f"{bound:.1f}" for bound in (min(times), max(times))] == ["2.2", "9.3"]
    assert "2.2 to 9.3 times" in claim("deviation-is-mean").evidence


def test_counts_are_compared_less_the_offsets_of_their_columns() -> None:
    key = ("GD", "relu")
    found = raw_like(key, row_like(10, gap=9, ratio=11, elbow=12))  # printed: 11, 12, 10
    assert analysis.agreeing(found) == ([False], [True], [False])
    assert analysis.agreeing(found, analysis.OFFSETS) == ([True], [True], [False])
    assert analysis.agreeing(raw_like(key, row_like(3, 3, 3, 3))) == ([], [], [])
    first, second = table_clusters(NOTHING | {"gd-relu": {0: found}})[-2:]
    assert first[5:10:2] == ["0 of 1", "1 of 1", "0 of 1"]
    assert second[5:10:2] == ["1 of 1", "1 of 1", "0 of 1"]


def test_seeds_of_a_row_stand_in_order() -> None:
    raws = NOTHING | {
        "gd-relu": {
            0: raw_like(("GD", "relu"), row_like(2, 3, 4, 2)),
            1: raw_like(("GD", "relu"), row_like(2, 1, 4, 2)),
        }
    }
    row = next(row for row in table_clusters(raws) if row[:4] == ["GD relu", "4022", "1", "2"])
    assert row[4:10] == ["3", "3, 1", "4", "4, 4", "2", "2, 2"]


def test_a_prescribed_spectrum_is_counted() -> None:
    spectrum = torch.cat([torch.tensor([9.0, 8.0, 7.0, 1.0]), torch.zeros(46)]).double()
    row = clusters.counted(spectrum, 3, outliers=3, past=6)
    assert (row["size"], row["gap"], row["elbow"]) == (50, 3, 3)
    assert row["mean"] == pytest.approx(0.5)
    assert row["std"] == pytest.approx(math.sqrt(195 / 50 - 0.25))
    assert row["outlying"] == pytest.approx(8.0)
    assert row["bulk"] == 0
    assert row["top"] == spectrum[:33].tolist()


def test_principal_components_are_those_of_numpy() -> None:
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    truth = np.linalg.eigvalsh(np.cov(x.double().numpy(), rowvar=False))[::-1]
    np.testing.assert_allclose(clusters.principal(x, 2), truth, rtol=1e-6)


def test_a_training_ends_where_a_number_has_fallen_to_a_level() -> None:
    """Not where it is still below it."""
    numbers = iter([1.0, 2.0, 5.0, 3.0, 2.0])
    fallen = clusters.fallen_to(2.0, lambda: next(numbers))
    assert [fallen() for _ in range(5)] == [False, False, False, False, True]


def test_the_mean_eigenvalue_is_that_of_all(measured: Callable[[str], Raw]) -> None:
    job = Job()
    x, y = blobs(3, 40, 5, covariance=1.0, job=job)
    problem = Problem(made(job, lambda: fully_connected((5, 4, 3))), nn.CrossEntropyLoss(), x, y)
    truth = float(so.diagnostics.exact_spectrum(problem.hessian()).mean())
    assert clusters.mean_eigenvalue(problem, 0) == pytest.approx(truth, rel=1e-4)


def test_more_clusters_than_classes(measured: Callable[[str], Raw]) -> None:
    """The network stays the same, and the bulk begins at the same place."""
    raw = measured("more-clusters")
    assert [row["clusters"] for row in raw["rows"]] == [3, 6, 9]
    assert [row["classes"] for row in raw["rows"]] == [3, 3, 3]
    assert len({row["size"] for row in raw["rows"]}) == 1
    moves = table_moves(NOTHING | {"more-clusters": {0: raw}})
    data = [f"{count} clusters, covariance 1" for count in (3, 6, 9)]
    assert [row[:3] for row in moves[1:]] == [[*data[:2], "3"], [*data[1:], "3"]]


def test_clusters_scatter_by_two_covariances() -> None:
    """In the span of their centres by one, across it by the other."""
    x, y = blobs(3, 6000, 5, covariance=9.0, job=Job(3), between=1.0)
    x = x.double()
    centres = torch.stack([x[y == c].mean(0) for c in range(3)])
    spread = torch.cat([x[y == c] - centres[c] for c in range(3)]).T.cov()
    variances, directions = torch.linalg.eigh(spread)
    ratio = variances / variances[:3].mean()
    np.testing.assert_allclose(ratio, [1, 1, 1, 9, 9], rtol=0.1)
    # Centres differ within the span alone, up to the error of their estimates.
    moved = (centres - centres.mean(0)) @ directions
    assert moved[:, 3:].abs().max() < 0.1 * moved[:, :3].abs().max()


# --- edges ---------------------------------------------------------------------------------------


def networks(*spectra: torch.Tensor) -> Raw:
    return {
        "networks": [
            runs.edges(spectrum[:30], spectrum[-30:])
            | {"ratios": runs.left_edge(spectrum), "size": len(spectrum), "width": len(spectrum)}
            for spectrum in spectra
        ]
    }


def bulk(size: int, largest: float = 10.0) -> torch.Tensor:
    """Three outliers, and the rest from 0.05 down to -0.05 in a straight line."""
    outliers = torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64) * largest
    return torch.cat([outliers, torch.linspace(0.05, -0.05, size - 3, dtype=torch.float64)])


def test_scaled_copies_of_a_spectrum_have_its_shape() -> None:
    raw = networks(bulk(400), bulk(4000))
    assert raw["networks"][0]["left"][0] == -0.05
    assert analysis.most_negative(raw) == pytest.approx(0.005)
    assert analysis.outliers_grow(raw) == pytest.approx(0)
    assert analysis.right_edge_distances(raw)[0] < 0.01
    assert analysis.left_edge_distances(raw)[0] < 0.02


def test_another_spectrum_has_another_shape() -> None:
    power = bulk(400).clone()
    power[3:] = 0.05 - 0.3 * torch.linspace(0, 1, 397, dtype=torch.float64) ** 20
    raw = networks(bulk(400), power)
    assert analysis.left_edge_distances(raw)[0] > 0.2
    assert not claim("negative-but-tiny").holds(analysis.most_negative(raw))
    steep = bulk(800).clone()
    steep[:16] = torch.linspace(10, 9, 16)
    raw = networks(bulk(400), steep)
    assert analysis.outliers_grow(raw) == pytest.approx(13)
    assert not claim("outliers-belong-to-data").holds(13)


def test_right_edges_are_compared_with_that_on_other_data() -> None:
    raw = networks(bulk(400), bulk(800), bulk(1600))
    shape = np.array(raw["networks"][-1]["right"])
    for network, distance in zip(raw["networks"], (0.02, 0.04), strict=False):
        network["right"] = list(shape + 10 * distance * np.append(0, np.full(29, 20 / 19)))
    raw["other"] = {"right": list(shape + 10 * 0.06 * np.append(0, np.full(29, 20 / 19)))}
    assert analysis.right_edge_distances(raw) == pytest.approx([0.02, 0.04])
    assert analysis.other_edge_distance(raw) == pytest.approx(0.06)
    assert analysis.right_edges_apart(raw) == pytest.approx(0.5)


def test_left_edges_converge_where_their_distances_fall() -> None:
    """By halves, of shapes that turn by less and less."""
    angles = np.cumsum([0, 0.4, 0.2, 0.1])
    shapes = [[-np.cos(angle), -np.sin(angle)] for angle in angles]
    raw = {"networks": [{"ratios": shape} for shape in shapes]}
    assert analysis.left_edges_converge(raw) == pytest.approx(0.5, rel=0.01)
    assert claim("left-edge-scales").holds(analysis.left_edges_converge(raw))
    backwards = {"networks": raw["networks"][::-1]}
    assert analysis.left_edges_converge(backwards) == pytest.approx(2, rel=0.01)
    assert math.isnan(analysis.left_edges_converge({"networks": raw["networks"][:2]}))


def test_networks_that_are_not_exact_have_no_left_edge(measured: Callable[[str], Raw]) -> None:
    """They come back from the file as they were, and the others decide."""
    raw = measured("growth")
    assert [len(network["ratios"]) for network in raw["networks"]] == [101, 101, 101, 0]
    assert len(analysis.left_edge_distances(raw)) == 2
    assert raw["whole"]["size"] == raw["networks"][2]["size"]
    table = table_growth(NOTHING | {"growth": {0: raw}})
    assert [row[0] for row in table[1:]] == ["3", "4", "6", "9", "other data"]


def test_no_negative_eigenvalue_refutes_that_there_are() -> None:
    positive = torch.linspace(1, 0, 100, dtype=torch.float64)
    assert not claim("negative-but-tiny").holds(analysis.most_negative(networks(positive)))


def test_negative_eigenvalues_are_no_more_than_later_weights(
    measured: Callable[[str], Raw],
) -> None:
    """As the whole Hessian of one network has it: nowhere negative in the first layer's block."""
    job = Job()
    x, y = blobs(10, 40, 6, covariance=1.0, job=job)
    model = made(job, lambda: fully_connected((6, 4, 4, 10))).double()
    problem = Problem(model, nn.CrossEntropyLoss(), x.double(), y)
    spectrum = so.diagnostics.exact_spectrum(problem.hessian())
    negative = int((spectrum < -1e-6 * spectrum[0]).sum())
    first, *later = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    bound = sum(p.numel() for layer in later for p in layer.parameters())
    assert first.in_features == 6
    assert analysis.later_weights({"width": 4}) == bound
    assert 0 < negative <= bound < len(spectrum)
    network = {"negative": negative / len(spectrum), "size": len(spectrum), "width": 4}
    both = {"networks": [network | {"negative": network["negative"] / 2}, network]}
    assert analysis.negative_of_later_grows(both) == pytest.approx(2)
    assert not claim("later-weights-hold-negatives").holds(2)
    raw = measured("small-images")
    theorem = claim("later-weights-bound-negatives")
    assert theorem.holds(theorem.measure(raw))
    assert not theorem.holds(theorem.measure({"networks": [network | {"negative": 0.9}]}))
    table = table_negative(NOTHING | {"small-images": {0: raw}})
    assert [row[:2] for row in table[1:]] == [["7x7", "3"], ["7x7", "6"]]


def test_large_batches_are_over_small_ones() -> None:
    raw = networks(2 * bulk(100), bulk(100))
    assert analysis.large_over_small(raw) == pytest.approx(2)
    assert claim("large-batch-is-sharper").holds(analysis.large_over_small(raw))


def test_the_left_edge_goes_to_the_median() -> None:
    spectrum = torch.linspace(5, -5, 201, dtype=torch.float64)
    np.testing.assert_allclose(runs.left_edge(spectrum), np.linspace(-5, 0, 101), atol=1e-12)


def test_near_zero_is_by_size_and_not_by_sign() -> None:
    spectrum = torch.tensor([1.0, 0.02, 0.009, 0.0, -0.009, -0.5])
    assert runs.near_zero(spectrum) == 3
    assert runs.near_zero(spectrum, of=2.0) == 4
    whole = runs.thinned(torch.linspace(1, -1, 202), 4.0)
    assert whole["near_zero_of_own"] == pytest.approx(2 / 202)
    assert whole["near_zero"] == pytest.approx(8 / 202)
    assert whole["index"][-1] == 201
    assert {0, 1, 49, 60, 151, 200} <= set(whole["index"])


def test_the_line_goes_through_both_ends(measured: Callable[[str], Raw]) -> None:
    raw = measured("phases")
    ends = {row["alpha"]: row["train_loss"] for row in raw["line"]}
    by_step = {row["step"]: row["train_loss"] for row in raw["training"]}
    assert ends[0.0] == pytest.approx(by_step[raw["switch"]], rel=1e-5)
    assert ends[1.0] == pytest.approx(by_step[2 * raw["switch"]], rel=1e-5)
    assert min(ends) == -0.5
    assert max(ends) == 1.5
    other = {row["alpha"]: row["train_loss"] for row in raw["other"]}
    assert (min(other), max(other)) == (0, 1)
    assert other[0] == pytest.approx(ends[0.0], rel=1e-5)
    assert other[1] != pytest.approx(ends[0.0], rel=1e-3)


# --- parts of the Hessian ------------------------------------------------------------------------


def test_the_parts_are_those_of_the_dense_matrices(measured: Callable[[str], Raw]) -> None:
    job = Job()
    x, y = blobs(10, 40, 100, covariance=1.0, job=job)
    model = made(job, lambda: fully_connected((100, 2, 2, 10)))
    loss = nn.CrossEntropyLoss()
    hessian = so.HessianOperator(model, loss, (x, y))
    gauss_newton = so.GaussNewtonOperator(model, loss, (x, y))
    residual = so.diagnostics.exact_spectrum(so.ResidualOperator(hessian, gauss_newton))
    row = measured("parts-clusters")["rows"][0]
    np.testing.assert_allclose(row["residual"], [residual[0], residual[-1]], rtol=0.02)
    for name, operator in (("hessian", hessian), ("gauss_newton", gauss_newton)):
        truth = so.diagnostics.exact_spectrum(operator)[:5]
        np.testing.assert_allclose(row[name][:5], truth, rtol=0.02)


def test_zeros_of_the_gauss_newton_matrix(measured: Callable[[str], Raw]) -> None:
    """Its rank is at most N(C - 1) for softmax, so that it has N zeros more than P - NC."""
    raw = measured("trivial")
    for row in raw["rows"]:
        assert row["bound"] == row["size"] - 80
        assert row["zeros"] >= row["bound"] + 8
    assert claim("trivial-eigenvalues-of-first-part").measure(raw) >= 8


# --- appendix B ----------------------------------------------------------------------------------


def test_a_linear_model_has_the_covariance_of_its_inputs() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    truth = torch.linalg.eigvalsh(x.double().T @ x.double() / 40).flip(0)
    spectrum = so.diagnostics.exact_spectrum(random_matrices.linear(x))
    torch.testing.assert_close(spectrum, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 2.0])
def test_the_distance_from_the_law(ratio: float) -> None:
    """By the quantiles of the law, here by its density on a fine grid of x, and not of angles."""
    lower, upper = so.diagnostics.marchenko_pastur_edges(ratio)
    x = torch.linspace(lower, upper, 400_001, dtype=torch.float64)
    density = so.diagnostics.marchenko_pastur_density(x, ratio)
    mass = torch.cumsum(density, 0) * (x[1] - x[0])
    count = 1000
    zeros = round(count * so.diagnostics.marchenko_pastur_atom(ratio))
    levels = (torch.arange(count - zeros, dtype=torch.float64) + 0.5) / count
    law = torch.cat([torch.zeros(zeros), x[torch.searchsorted(mass, levels)]])
    assert random_matrices.kolmogorov_distance(law, ratio) == pytest.approx(0.5 / count, abs=2e-4)
    assert random_matrices.kolmogorov_distance(2 * law, ratio) > 0.05


# --- the network and the texts -------------------------------------------------------------------


def test_a_training_ends_where_its_loss_is_reached() -> None:
    job = Job()
    x, y = blobs(2, 40, 5, covariance=0.1, job=job)
    model = made(job, lambda: fully_connected((5, 4, 2)))
    problem = Problem(model, nn.CrossEntropyLoss(), x, y)
    start = problem.loss()
    until = functools.partial(runs.train_until, job, lr=0.5, most=500, chunk=10)
    assert until("a", problem, lambda: runs.below(problem, start)) == 0
    taken = until("b", problem, lambda: runs.below(problem, start / 10))
    assert 0 < taken < 500
    assert problem.loss() <= start / 10


def test_chunks_of_a_training_grow_with_its_steps() -> None:
    job = Job()
    x, y = blobs(2, 40, 5, covariance=0.1, job=job)
    problem = Problem(made(job, lambda: fully_connected((5, 2))), nn.CrossEntropyLoss(), x, y)
    looks: list[int] = []

    def never() -> bool:
        looks.append(0)
        return False

    taken = runs.train_until(
        job, "a", problem, never, lr=0.1, most=50, batch_size=7, chunk=10, growth=1.0
    )
    assert (taken, len(looks)) == (80, 5)  # 0, 10, 20, 40, 80
