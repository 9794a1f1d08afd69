"""The GPU's run in miniature on the CPU: budget, tables, and the arithmetic under them."""

import json
import signal
import subprocess
import time

import pytest
import torch

import subspace_optim as so
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import capture, problems, rows, solves, starts, suite, waits
from benchmarks.gpu.graphs import GradientGraph
from benchmarks.gpu.sections import NEEDS_CUDA, Section, run, time_limit
from benchmarks.losses import mse
from benchmarks.speed.reference import Residuals
from subspace_optim.linalg import top_eigenpairs
from tests.benchmarks.small import small_problem
from tests.dense import dense_curvature, supervised


@pytest.fixture
def problem():
    return small_problem(y=torch.arange(30) % 3)


@pytest.fixture
def matrix(problem):
    """The dense Hessian, in float64."""
    batch = (problem.x.double(), problem.y)
    return dense_curvature(problem.model, supervised(mse), [batch]).hessian


# --- the budget --------------------------------------------------------------------------------


def outcome(*sections, seconds=60.0, measured=None):
    """Runs sections; returns what they left, and what was on disk at each write."""
    measured = {} if measured is None else measured
    written = []
    run(
        [Section(name, limit, measure) for name, limit, measure in sections],
        measured,
        time.time() + seconds,
        lambda: written.append(json.loads(json.dumps(measured))),
        lambda _: None,
    )
    return measured, written


def test_sections_are_written_before_and_after_and_go_on_after_a_failure():
    def fails(found):
        found["first"] = 1
        raise ValueError("no luck\nat all")

    measured, written = outcome(("a", 9, fails), ("b", 9, lambda found: found.update(x=2)))
    assert measured["a"]["status"] == "failed: ValueError: no luck"
    assert measured["a"]["rows"] == {"first": 1}
    assert measured["b"]["status"] == "done"
    assert [w.get("b", {}).get("status") for w in written] == [None, None, "killed", "done"]
    assert written[0]["a"]["status"] == "killed"  # what a kill leaves


def test_a_section_is_ended_at_its_limit_with_the_rows_it_has():
    def endless(found):
        found["row"] = "there"
        try:
            while True:
                time.sleep(0.01)
        except Exception:  # noqa: BLE001 (as a peer may do)
            found["row"] = "lost"

    measured, _ = outcome(("a", 0.1, endless), ("b", 9, lambda found: found.update(x=2)))
    assert measured["a"]["status"].startswith("ended after")
    assert measured["a"]["rows"] == {"row": "there"}
    assert measured["b"]["status"] == "done"


def test_no_section_begins_without_time_and_none_is_measured_twice():
    def forbidden(found):
        raise AssertionError

    known = {"a": {"status": "done", "rows": {"x": 1}}}
    measured, _ = outcome(
        ("a", 9, forbidden), ("b", 9, forbidden), seconds=0.5, measured=dict(known)
    )
    assert measured["a"] == known["a"]
    assert measured["b"]["status"] == "not begun: no time left"


def test_a_limit_gives_back_the_alarm_that_was_there():
    before = signal.getsignal(signal.SIGALRM)
    timer = signal.setitimer(signal.ITIMER_REAL, 300)
    try:
        with time_limit(5):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5
        assert 5 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
    assert signal.getsignal(signal.SIGALRM) is before


# --- what is measured --------------------------------------------------------------------------


def test_products_of_a_graph_one_by_one_and_batched(problem, matrix):
    block = torch.randn(4, problem.size, generator=torch.Generator().manual_seed(1))
    graph = GradientGraph(problem)
    wanted = (block.double() @ matrix).float()
    tolerance = 1e-5 * float(wanted.abs().max())
    for found in (graph.matmat(block), graph.batched(block)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(graph.product(block[2]), wanted[2], rtol=0, atol=tolerance)


def test_rows_tell_costs_of_both_ways_and_their_difference(problem):
    found = {}
    rows.measure(problem, found)
    assert set(found) == {"2", "4", "10"}
    for row in found.values():
        ratio = row["batched_seconds"] / row["one_by_one_seconds"]
        assert row["batched_over_one_by_one"] == ratio
        assert row["difference"] < 1e-5


def test_an_operation_that_cannot_be_batched_is_a_row(problem, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(GradientGraph, "batched", refuse)
    found = {}
    rows.measure(problem, found)
    assert found["10"]["batched"] == "failed: RuntimeError: no batching rule"


def test_a_certificate_is_of_the_matrix_that_counts():
    """From the pairs of a matrix that is off by 1 %, to those of the right one."""
    values = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.linspace(-0.5, 0.5, 297)])
    noise = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)) / 300**0.5
    wrong = values.diag() + 0.02 * (noise + noise.T)
    start = top_eigenpairs(lambda v: v @ wrong, 300, 3, tol=1e-2)
    calls = []

    def matmat(v):
        calls.append(len(v))
        return v * values

    assert torch.linalg.vector_norm(start.basis.vectors[:, 3:]) > 1e-2
    found = starts.certified(matmat, start, 1e-4)
    assert found.products == sum(calls)
    true = found.basis.vectors * values - found.basis.eigenvalues[:, None] * found.basis.vectors
    residual = float(torch.linalg.vector_norm(true, dim=1).max() / 9)
    assert found.residual == pytest.approx(residual, rel=1e-3)
    assert residual <= 1e-4
    torch.testing.assert_close(found.basis.eigenvalues, values[:3], rtol=1e-5, atol=0)


def test_starts_in_low_precision_are_measured_in_full(problem, matrix):
    found = {}
    starts.measure(problem, 2, found)
    assert found["tf32"] == NEEDS_CUDA
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    for name in ("fp32", "bf16"):
        assert found[name]["largest_eigenvalue"] == pytest.approx(largest, rel=1e-2)
        assert found[name]["reached"] == (found[name]["residual"] <= starts.RESIDUAL)
    assert found["fp32"]["reached"]
    assert found["fp32"]["full_products"] == 2  # measured once, and refined never
    assert found["fp32"]["sine"] < 1e-5


def test_what_only_cuda_has_says_so_and_the_rest_runs(problem):
    captured, counted = {}, {}
    capture.measure(problem, captured)
    assert captured["replayed"] == NEEDS_CUDA
    assert captured["eager"]["seconds"] > 0
    theta = problem.theta()
    waits.measure(problem, 2, counted)
    assert {row["waits"] for row in counted.values()} == {NEEDS_CUDA}
    assert counted["solve"]["products"] > 0
    assert torch.equal(problem.theta(), theta)


def test_a_solve_is_checked_by_float64_products(problem, matrix):
    found = {}
    solves.measure(problem, 2, 2, 1.0, found)
    ours = found["subspace_optim"]
    assert ours["reached"]
    assert len(ours["seconds"]) == 2
    assert ours["eigenvalues"][0] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), 1e-3)
    peers = [row for name, row in found.items() if name not in ("gradient", "subspace_optim")]
    assert len(peers) == 3
    assert all(("left_out" in row) != ("ours_over_this" in row) for row in peers)


def test_residuals_need_no_true_pairs(problem, matrix):
    values, vectors = torch.linalg.eigh(matrix)
    top, rows = values.flip(0)[:2], vectors.T.flip(0)[:2]
    exact = Residuals(problem)
    assert exact.check(top, rows).residual < 1e-12
    shifted = exact.check(top + 0.01 * top[0], 3 * rows)
    assert shifted.residual == pytest.approx(0.01 / 1.01, rel=1e-9)
    v = torch.randn(problem.size, dtype=torch.float64)
    torch.testing.assert_close(exact.product(v), matrix @ v)


@pytest.mark.slow
@pytest.mark.parametrize("name", problems.NAMES)
def test_problems_in_miniature_have_a_second_derivative(name):
    made = problems.made(name, "tiny", None, "cpu")
    start = made.states[0]
    assert not torch.equal(made.theta(), start)  # some steps from it
    eigenvalues = so.DominantSubspace(made.hessian(), made.k).refresh().eigenvalues
    assert eigenvalues[0] > 0


def test_images_are_drawn_where_there_are_no_data(monkeypatch):
    def nothing(*_, **__):
        raise problems.DataUnavailableError("none here")

    monkeypatch.setattr(problems, "load", nothing)
    made = problems.made("resnet18", "tiny", None, "cpu")
    assert made.x.shape[1:] == (3, 16, 16)
    assert set(made.y.tolist()) <= set(range(10))


# --- the tests of a device ---------------------------------------------------------------------


def test_the_files_of_marked_tests_are_found(tmp_path):
    (tmp_path / "deep").mkdir()
    marked = tmp_path / "deep" / "test_a.py"
    marked.write_text("@pytest.mark.gpu\ndef test(): pass\n")
    (tmp_path / "test_b.py").write_text("def test(): pass\n")
    assert suite.files(tmp_path) == [marked]
    assert suite.ROOT / "tests" / "test_device.py" in suite.files(suite.ROOT / "tests")


def test_tests_run_on_the_device_and_are_counted(tmp_path, monkeypatch):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--device')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (folder / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n"
        "def test_device(request): assert request.config.getoption('--device') == 'cpu'\n"
        "@pytest.mark.gpu\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.mark.gpu\n"
        "def test_skips(): pytest.skip('no such thing')\n"
        "def test_other(): raise ValueError\n"
    )
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    found = {}
    suite.measure("cpu", 120.0, found)
    assert found["passed"] == 1
    assert [name.split("::")[1] for name in found["failed"]] == ["test_fails"]
    assert list(found["skipped"].values()) == ["no such thing"]


# --- the command -------------------------------------------------------------------------------


def arguments(tmp_path, *more):
    output = tmp_path / "gpu.json"
    fixed = ["--device", "cpu", "--size", "tiny", "--output", str(output)]
    return [*fixed, "--peers", str(tmp_path / "peers"), *more], output


def test_the_command_writes_what_was_asked_for(tmp_path):
    asked, output = arguments(tmp_path, "--here", "--sections", "capture mlp", "waits mlp")
    assert command.main(asked) == 0
    read = json.loads(output.read_text())
    assert read["finished"]
    assert list(read["sections"]) == ["waits mlp", "capture mlp"]
    assert {section["status"] for section in read["sections"].values()} == {"done"}


def test_it_goes_on_without_peers_that_cannot_be_installed(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise subprocess.CalledProcessError(1, ["pip"])

    monkeypatch.setattr(command.environment, "make", fails)
    asked, output = arguments(tmp_path, "--sections", "capture mlp")
    assert command.main(asked) == 0
    read = json.loads(output.read_text())
    assert read["finished"]
    assert read["peers"].startswith("not installed")
    assert read["sections"]["capture mlp"]["status"] == "done"


def test_the_most_important_sections_come_first_and_fit_the_budget():
    options = command._parser().parse_args(["--device", "cpu"])
    names = [section.name for section in command.sections(options)]
    assert names[:4] == ["tests", "solves mlp", "solves resnet18", "solves gpt2"]
    assert len(set(names)) == len(names) == 19
    first = sum(section.seconds for section in command.sections(options)[:4])
    assert first < command.BUDGET


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(tmp_path, capsys):
    asked, output = arguments(tmp_path)
    assert command.main(["--device", "cuda", *asked[2:]]) == 2
    assert "--device cpu --size tiny" in capsys.readouterr().err
    assert not output.exists()
