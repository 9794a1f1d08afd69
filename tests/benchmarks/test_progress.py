"""Signs of life: what is at work is shown in a terminal and in a log file, during a solve too."""

import io
import logging
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks import progress
from benchmarks.progress import Log, counted, doing, shown

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    made = SimpleNamespace(now=50.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: made.now)
    return made


def wait_for(condition):
    """Waits until it holds; that it never does is a failure, how long it takes is not."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_line_says_what_how_far_how_long_and_the_latest_figures(clock):
    file = io.StringIO()
    log = Log(Console(file=file, width=40), every=20)
    with doing("compare"), doing("BulkSGD", 400) as task:
        clock.now += 12
        task.at(34, "loss 0.1234  chi 0.980 (average 0.951)  sharpness [17.0]")
        clock.now += 8
        log.beat()
    # One line, however narrow the console, and brackets are no markup.
    assert file.getvalue() == (
        "[   20 s] compare, 20 s | BulkSGD, step 34 of 400, 20 s, "
        "loss 0.1234  chi 0.980 (average 0.951)  sharpness [17.0]\n"
    )


def test_no_thirty_seconds_pass_without_a_line(clock):
    """However the beats and the lines of the work itself fall."""
    file = io.StringIO()
    log = Log(Console(file=file))
    times = [clock.now]
    with doing("solve"):
        for beat in range(600):
            clock.now += 2.0 if beat % 3 else 1.3
            before = len(file.getvalue())
            if beat % 101 == 17:
                log.say("a phase is over")
            log.beat()
            if len(file.getvalue()) > before:
                times.append(clock.now)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert max(gaps) < 25
    assert len(times) < 60  # and not many more


def test_nothing_is_written_when_nothing_is_at_work(clock):
    file = io.StringIO()
    log = Log(Console(file=file))
    clock.now += 1000
    log.beat()
    assert file.getvalue() == ""


def test_figures_can_be_asked_for_when_they_are_shown(clock):
    asked = []

    def figures():
        asked.append(1)
        return f"asked {len(asked)} times"

    with doing("run", figures=figures) as task:
        assert asked == []
        assert str(task) == "run, 0 s, asked 1 times"


def test_lines_come_during_one_long_call_and_reach_the_file_at_once(tmp_path):
    path = tmp_path / "log"
    with path.open("w") as file, shown("speed", Console(file=file), every=0.02):
        with doing("cold solve"):
            wait_for(lambda: path.read_text().count("speed, 0 s | cold solve, 0 s") >= 2)
        with doing("true sines", 7, unit="sample") as task:
            task.at(3)
            wait_for(lambda: "true sines, sample 3 of 7" in path.read_text())
    assert "cold solve" not in path.read_text().splitlines()[-1]


def test_the_package_s_own_lines_are_shown_and_its_logger_left_as_it_was():
    logger = logging.getLogger("subspace_optim")
    before = (logger.level, list(logger.handlers), logger.propagate)
    file = io.StringIO()
    with shown("compare", Console(file=file)):
        logger.getChild("linalg").info("top %d eigenpairs: 340 products [35 s]", 10)
        logger.debug("not this")
    assert file.getvalue() == "[    0 s] top 10 eigenpairs: 340 products [35 s]\n"
    assert (logger.level, list(logger.handlers), logger.propagate) == before


def test_what_is_kept_stays_as_a_line():
    file = io.StringIO()

    def work():
        with shown("compare", Console(file=file)), doing("SGD", 10, keep=True) as task:
            task.at(4, "loss 2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert file.getvalue() == "[    0 s] SGD, step 4 of 10, 0 s, loss 2\n"


def test_a_terminal_gets_bars_and_no_lines():
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=100)
    with shown("compare", console), doing("BulkSGD [/x]", 400) as task:
        task.at(34, "loss 0.5")
        wait_for(lambda: "34/400" in file.getvalue())
        console.print("a table")
    text = file.getvalue()
    assert "BulkSGD [/x]" in text
    assert "loss 0.5" in text
    assert "━" in text
    assert "a table" in text
    assert "step 34 of 400" not in text


def test_what_is_at_work_is_forgotten_at_its_end_and_after_an_error():
    with pytest.raises(ZeroDivisionError), doing("a"), doing("b"):
        raise ZeroDivisionError
    assert [] == progress._tasks == progress._say
    assert list(counted("rounds", "xyz")) == ["x", "y", "z"]
    assert progress._tasks == []


def test_the_thread_ends_with_the_work_and_when_nobody_reads():
    before = threading.active_count()
    with shown("a", Console(file=io.StringIO()), every=0.02):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    file = io.StringIO()
    with shown("a", Console(file=file), every=0.02):
        wait_for(file.getvalue)
        file.close()  # as a reader that has gone: the work goes on
        wait_for(lambda: threading.active_count() == before)


def test_it_keeps_no_process_alive_and_a_worker_tells_too():
    """A process that leaves without a clean-up ends, though the thread was at work."""
    code = (
        "import sys, time\n"
        "from rich.console import Console\n"
        "from benchmarks.progress import doing, shown\n"
        "def work():\n"
        "    with shown('run', Console(width=80), 0.02), doing('training toy', 5) as task:\n"
        "        task.at(2, 'loss 1')\n"
        "        time.sleep(0.5)\n"
        "        yield\n"
        "left = work()\n"
        "next(left)\n"
        "sys.exit(3)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 3
    lines = ended.stdout.splitlines()
    assert lines[0] == "[    0 s] run, 0 s | training toy, step 2 of 5, 0 s, loss 1"
