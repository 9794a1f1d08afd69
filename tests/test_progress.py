"""Long work says how far it is: in the log, by a bar, or to a function; short work says nothing."""

import io
import logging
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

import subspace_optim as so
from subspace_optim import _progress
from subspace_optim._progress import Progress, ProgressReport, shown
from subspace_optim.linalg.lanczos import top_eigenpairs


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def lines_of(durations, caplog, level=logging.INFO):
    """The lines of work whose ticks come after these seconds."""
    clock = Clock()
    with caplog.at_level(level, logger="subspace_optim"):
        progress = Progress("top 3 eigenpairs", "products", clock=clock)
        for count, seconds in enumerate(durations, 1):
            clock.now += seconds
            progress.tick(count)
    return caplog.messages


def test_work_of_less_than_ten_seconds_is_silent(caplog):
    assert lines_of([1.0] * 9, caplog) == []


def test_the_first_line_comes_after_ten_seconds_and_says_how_far_and_how_long(caplog):
    messages = lines_of([2.5] * 4, caplog)
    assert messages == ["top 3 eigenpairs: 4 products, 10 s"]


@pytest.mark.parametrize("tick", [0.01, 0.7, 3.0, 9.9])
def test_no_gap_is_longer_than_half_a_minute(caplog, tick):
    """Where ticks come at least every 10 seconds."""
    messages = lines_of([tick] * int(300 / tick), caplog)
    counts = [int(message.split()[3]) for message in messages]
    times = [0.0, *(count * tick for count in counts)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(messages) >= 10
    assert max(gaps) <= 30.0
    assert min(gaps) >= 10.0 - 1e-9
    assert 300.0 - times[-1] <= 30.0


def test_ticks_that_are_further_apart_all_tell(caplog):
    messages = lines_of([45.0] * 3, caplog)
    assert [message.split(", ")[1] for message in messages] == ["45 s", "90 s", "135 s"]


def test_nothing_is_told_where_nobody_listens(caplog):
    assert lines_of([60.0] * 3, caplog, level=logging.WARNING) == []


def test_the_package_configures_no_handler():
    assert logging.getLogger("subspace_optim").handlers == []
    assert logging.getLogger("subspace_optim").level == logging.NOTSET


@pytest.mark.parametrize(
    ("total", "estimated", "residual", "inside", "line"),
    [
        (None, True, None, "", "trace: 7 products, 3 s"),
        (60, False, None, "", "trace: 7 of 60 products, 3 s"),
        (26, True, 0.0312, "", "trace: 7 of about 26 products, largest residual 3.1e-02, 3 s"),
        (60, False, None, "pass: 4 batches", "trace: 7 of 60 products (pass: 4 batches), 3 s"),
    ],
)
def test_a_report_is_a_line(total, estimated, residual, inside, line):
    report = ProgressReport("trace", 7, total, "products", estimated, residual, 3.2, inside)
    assert str(report) == line


def test_what_runs_inside_lets_the_outer_one_tell_now_and_then():
    clock, told = Clock(), []
    with shown(told.append), Progress("solve", "products", clock=clock) as outer:
        outer.tick(1, 5, 0.5)
        passing = Progress("pass", "batches", clock=clock)
        for batch in range(1, 31):  # 6 seconds
            clock.now += 0.2
            passing.tick(batch)
        with Progress("another solve", "products", clock=clock) as inner:  # no outer one either
            clock.now += 2.0
            inner.tick(3, 4)
        outer.tick(2, 5, 0.25)
    assert {report.what for report in told} == {"solve"}
    assert [report.done for report in told] == [1] * (len(told) - 1) + [2]
    within = [report.inside for report in told[1:-2]]
    assert within == [f"pass: {batch} batches" for batch in (5, 10, 15, 20, 25, 30)]
    assert told[-2].inside == "another solve: 3 of 4 products"
    assert (told[-1].inside, told[-1].residual) == ("", 0.25)


def test_the_inner_of_two_listeners_is_told_and_then_the_outer_one_again():
    first, second = [], []
    with shown(first.append), Progress("outer", "products") as outer:
        with shown(second.append), Progress("inner", "products") as inner:
            inner.tick(1)
        with shown(progress=False), Progress("silent", "products"):
            pass
        outer.tick(4)
    assert [report.what for report in first] == ["outer"]
    assert [report.what for report in second] == ["inner"]
    with Progress("later", "products") as later:
        later.tick(1)
    assert len(first) == len(second) == 1


def test_an_error_inside_leaves_nobody_listening():
    told = []
    with pytest.raises(KeyError), shown(told.append), Progress("solve", "products"):
        raise KeyError
    with Progress("later", "products") as later:
        later.tick(1)
    assert told == []


@pytest.mark.parametrize("progress", [None, "bar", 1, 0.5])
def test_a_listener_that_cannot_be_called_is_refused(progress):
    hessian, _ = problem()
    with pytest.raises(so.ArgumentError, match=r"progress is .* True, False or a function"):
        so.diagnostics.trace(hessian, progress=progress)
    with pytest.raises(so.ArgumentError, match=r"progress is .* True, False or a function"):
        so.DominantSubspace(hessian, k=2, progress=progress)
    assert hessian.stats.products == 0


# --- bars and lines -------------------------------------------------------------------------------


def test_true_is_a_bar_that_leaves_nothing_behind(monkeypatch):
    pytest.importorskip("tqdm")
    stream, clock = io.StringIO(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(_progress, "_BAR_AFTER", 0.0)
    with shown(progress=True), Progress("top 3", "products", estimated=True, clock=clock) as on:
        on.tick(1, 4, None)
        passing = Progress("pass", "batches", clock=clock)
        clock.now += 2.0
        passing.tick(7)
        on._listener._bar.mininterval = 0
        on.tick(3, 8, 0.5)
    text = stream.getvalue()
    assert "1/4" in text
    assert "pass: 7 batches" in text
    assert "3/8" in text  # the total was guessed anew
    assert "residual 5.0e-01" in text
    assert text.split("\r")[-1] == ""  # wiped


def test_a_solve_that_ends_at_once_shows_no_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with shown(progress=True), Progress("top 3 eigenpairs", "products") as on:
        on.tick(1, 4)
        on.tick(4, 4)
    assert "eigenpairs" not in stream.getvalue()


def test_of_several_ranks_the_first_shows_a_bar():
    with shown(progress=True, rank=1):
        assert type(Progress("solve", "products")._listener) is _progress._Log
    with shown(progress=True, rank=0):
        assert type(Progress("solve", "products")._listener) is _progress._Bar


def test_without_tqdm_true_is_lines_in_the_log_or_on_stderr(monkeypatch, caplog, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    clock = Clock()

    def work():
        with shown(progress=True), Progress("trace", "products", clock=clock) as on:
            for count in range(1, 13):
                clock.now += 1.0
                on.tick(count, 12)

    with caplog.at_level(logging.INFO, logger="subspace_optim"):
        work()
    told = [f"trace: {n} of 12 products, {n} s" for n in (1, 6, 11)]
    assert caplog.messages == told
    assert capsys.readouterr().err == ""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="subspace_optim"):
        work()
    assert caplog.messages == []
    assert capsys.readouterr().err.splitlines() == told


# --- what tells -----------------------------------------------------------------------------------


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    batches = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 24, 6)]
    hessian = so.HessianOperator(model, nn.CrossEntropyLoss(), batches)
    optimizer = torch.optim.Adam(model.parameters())
    nn.CrossEntropyLoss()(model(x), y).backward()
    optimizer.step()
    return hessian, optimizer


SOLVES = {
    "exact_spectrum": (lambda h, _, p: so.diagnostics.exact_spectrum(h, progress=p), 75),
    "spectral_density": (
        lambda h, _, p: so.diagnostics.spectral_density(h, probes=2, steps=5, progress=p),
        10,
    ),
    "trace": (lambda h, _, p: so.diagnostics.trace(h, products=12, progress=p), 12),
    "all of trace": (lambda h, _, p: so.diagnostics.trace(h, products=500, progress=p), 75),
    "spectrum_edges": (lambda h, _, p: so.diagnostics.spectrum_edges(h, 2, progress=p), None),
    "lowest_eigenvalue": (lambda h, _, p: so.diagnostics.lowest_eigenvalue(h, progress=p), None),
    "block_sharpness": (lambda h, _, p: so.diagnostics.block_sharpness(h, "*", progress=p), 2),
    "norm_sharpness": (
        lambda h, _, p: so.diagnostics.norm_sharpness(h, norm="sign", steps=7, progress=p),
        None,
    ),
    "preconditioned_sharpness": (
        lambda h, o, p: so.diagnostics.preconditioned_sharpness(h, o, progress=p),
        None,
    ),
    "gradient_noise": (
        lambda h, _, p: so.diagnostics.gradient_noise(
            h, so.DominantSubspace(h, 2).update(), progress=p
        ),
        4,
    ),
    "batch_sharpness": (lambda h, _, p: so.diagnostics.batch_sharpness(h, progress=p), 4),
    "central_flow": (
        lambda h, _, p: so.diagnostics.central_flow(h, 0.01, steps=3, progress=p),
        3,
    ),
    "DominantSubspace": (lambda h, _, p: so.DominantSubspace(h, 2, progress=p).update(), None),
}


@pytest.mark.parametrize("name", SOLVES)
def test_every_long_solve_tells_how_far_it_is(name):
    """Counts rise to the end; where the total is no guess it is the same all the time, and met."""
    solve, total = SOLVES[name]
    told = []
    hessian, optimizer = problem()
    solve(hessian, optimizer, told.append)
    assert told
    by_name = {}
    for report in told:
        assert isinstance(report, ProgressReport)
        by_name.setdefault(report.what, []).append(report.done)
    for counts in by_name.values():
        starts = sum(later < earlier for earlier, later in pairwise(counts))
        assert starts <= (1 if name == "spectrum_edges" else 0)  # two solves, one after the other
    if total is not None:
        last = told[-1]
        assert {report.total for report in told if report.what == last.what} == {total}
        assert (last.done, last.estimated) == (total, False)


def plain(result):
    """What a solve returned, as numbers with all their digits."""
    if isinstance(result, torch.Tensor):
        return result.tolist()
    if type(result) is tuple:
        return [plain(each) for each in result]
    fields = result._asdict() if hasattr(result, "_fields") else getattr(result, "__dict__", None)
    return repr(result) if fields is None else {name: plain(v) for name, v in fields.items()}


@pytest.mark.parametrize("name", SOLVES)
def test_who_listens_changes_no_bit(name):
    solve, _ = SOLVES[name]
    results = [plain(solve(*problem(), progress)) for progress in (False, lambda _: None)]
    assert results[0] == results[1]


def test_a_refresh_tells_of_itself_and_a_kept_basis_of_nothing():
    told = []
    hessian, _ = problem()
    subspace = so.DominantSubspace(hessian, 2, progress=told.append)
    subspace.update()
    first = len(told)
    assert {report.what for report in told} == {"top 2 eigenpairs"}
    assert told[-1].done <= hessian.stats.products
    subspace.update()
    assert len(told) == first
    subspace.refresh()  # refined
    assert {"3 products"} <= {report.what for report in told[first:]}
    assert not any("eigenpairs" in report.what for report in told[first:])
    subspace.progress = False
    before = len(told)
    subspace.refresh()
    assert len(told) == before


@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("decay", [0.7, 0.9])
def test_a_solve_foresees_its_end_and_knows_its_residual(k, decay):
    """In the second half of a solve the guess is within a factor of two of what it was."""
    size = 2000
    values = torch.cat([decay ** torch.arange(60.0), torch.linspace(0, 0.001, size - 60)])
    told = []
    with shown(told.append):
        solution = top_eigenpairs(lambda rows: rows * values, size, k)
    scale = float(solution.basis.eigenvalues.abs().max())
    late = [report for report in told if 2 * report.done >= solution.products]
    assert len(late) >= 3
    for report in late:
        assert report.estimated
        assert 0.5 <= report.total / solution.products <= 2.0
    residuals = [report.residual for report in told if report.residual is not None]
    assert residuals[0] >= residuals[-1] > float(solution.basis.residuals.max()) / scale / 100
