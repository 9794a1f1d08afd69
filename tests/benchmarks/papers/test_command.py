"""The command: what it lists, refuses, runs in processes, takes up again and reports."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.papers import __main__ as command
from benchmarks.papers import worker
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.reproduction import Job
from benchmarks.papers.results import Results, measure
from tests.benchmarks.papers import made_up

ROOT = Path(__file__).parents[3]


def test_it_lists_papers_and_what_a_paper_has(capsys):
    assert command.main([]) == 0
    listed = capsys.readouterr().out
    assert all(key in listed for key in PAPERS)
    assert command.main(["song_2024"]) == 0
    listed = capsys.readouterr().out
    assert "figure-10" in listed
    assert "edge-of-stability" in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["song_2025"], "invalid choice: 'song_2025'"),
        (["song_2024", "figure-8"], "song_2024 has no figure-8: it has figure-1, "),
        (["all", "figure-1"], "name one paper"),
        (["song_2024", "all", "--seeds", "0"], "--seeds 0: at least 1"),
        (["song_2024", "all", "--jobs", "0"], "--jobs 0: at least 1"),
        (["song_2024", "--publish"], "--publish writes the pages of all papers"),
    ],
)
def test_what_there_is_not_is_refused_in_one_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as ended:
        command.main(["song_2024", "figure-7", "--results", str(file / "papers")])
    assert ended.value.code == 2
    assert f"--results {file}/papers: Not a directory" in capsys.readouterr().err


def test_only_what_is_not_on_disk_is_run_all_of_a_seed_first(tmp_path):
    options = command._parser().parse_args(["song_2024", "all", "--seeds", "2"])
    paper = PAPERS["song_2024"]
    results = Results(tmp_path)

    def tasks(*names):
        wanted = {"song_2024": [paper.exhibit(name) for name in names]}
        return [str(task) for task in command.tasks_of(options, wanted, results)]

    assert tasks("figure-4", "figure-6", "figure-7") == [
        "song_2024 switching seed 0",
        "song_2024 toy seed 0",
        "song_2024 switching seed 1",
        "song_2024 toy seed 1",
    ]
    results.write(measure(paper, paper.run("toy"), "small", Job(1)))
    assert tasks("figure-6") == ["song_2024 toy seed 0"]
    everything = tasks(*(exhibit.name for exhibit in paper.exhibits))
    assert len(everything) == 2 * len(paper.runs) - 1


def test_by_default_there_are_the_seeds_that_claims_take(tmp_path):
    options = command._parser().parse_args(["sagun_2017", "figure-9", "figure-1"])
    wanted = {"sagun_2017": [PAPERS["sagun_2017"].exhibit(name) for name in options.exhibits]}
    tasks = [str(task) for task in command.tasks_of(options, wanted, Results(tmp_path))]
    growth, phases = (
        [f"sagun_2017 {run} seed {s}" for s in range(4)] for run in ("growth", "phases")
    )
    assert sorted(tasks) == sorted(growth[:3] + phases)


def test_a_second_process_leaves_a_run_to_the_first(tmp_path):
    with worker.alone_in(tmp_path / "seed-0-1"):
        with (
            pytest.raises(SystemExit, match="another process"),
            worker.alone_in(tmp_path / "seed-0-1"),
        ):
            pass
        with worker.alone_in(tmp_path / "seed-1-1"):
            pass
    with worker.alone_in(tmp_path / "seed-0-1"):
        pass


def start(results, *arguments):
    code = [sys.executable, "-m", "benchmarks.papers", "song_2024", *arguments]
    code += ["--results", str(results)]
    return subprocess.Popen(
        code, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_figure_is_measured_drawn_judged_and_not_measured_again(tmp_path):
    process = start(tmp_path, "figure-7", "--seeds", "2", "--jobs", "2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "2 runs" in output.splitlines()[0]  # the estimate comes first
    assert "song_2024 toy seed 1" in output
    assert "reproduced: toy-sgd: On the toy quadratic the gradient along SGD" in output
    assert "reproduced: toy-gd: " in output
    assert "vector. (identity)" in output
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert {claim["claim"]: claim["verdict"] for claim in kept}["toy-sgd"] == "reproduced"
    picture = tmp_path / "small" / "song_2024" / "figure-7.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = tmp_path / "small" / "song_2024" / "toy"
    assert sorted(path.name for path in runs.iterdir()) == ["seed-0.json", "seed-1.json"]
    first = json.loads((runs / "seed-0.json").read_text())
    before = (runs / "seed-0.json").stat().st_mtime_ns
    process = start(tmp_path, "figure-7", "--seeds", "2")
    output, _ = process.communicate(timeout=300)
    assert "runs" not in output.splitlines()[0]
    assert (runs / "seed-0.json").stat().st_mtime_ns == before
    assert first["size"]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("seeds", "verdict", "figures"),
    [
        (1, "not decided by seeds known when it changed: near: It is near 2. (identity)", "(2)"),
        (2, "reproduced: near: It is near 2. (identity)", "(2) 2.01"),
    ],
)
def test_what_a_trial_changed_is_decided_by_other_seeds(
    seeds, verdict, figures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(PAPERS, made_up.PAPER.key, made_up.PAPER)
    results = Results(tmp_path)
    for seed in range(seeds):
        results.write(measure(made_up.PAPER, made_up.PAPER.run("steep"), "small", Job(seed)))
    wanted = {"made_up": [made_up.PAPER.exhibit("figure-1")]}
    command._show(wanted, results, "small", Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index(verdict) + 1].endswith(f": {figures}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_runs_and_what_was_measured_stays(tmp_path, kind):
    process = start(tmp_path, "figure-4", "figure-7", "--seeds", "1", "--jobs", "1")
    # The toy comes second: the first run is on its way for minutes.
    deadline = time.monotonic() + 120
    log = tmp_path / "small" / "song_2024" / "switching" / "seed-0.log"
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(kind)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from here" in output
    workers = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout
    assert str(tmp_path) not in workers


def test_a_run_that_fails_is_reported_and_the_others_are_made(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        command.Queue,
        "_command",
        lambda _, task: [sys.executable, "-c", f"import sys; sys.exit({task.seed} and '[/x]')"],
    )
    arguments = ["song_2024", "figure-7", "--seeds", "2", "--jobs", "1"]
    assert command.main([*arguments, "--results", str(tmp_path)]) == 1
    shown = capfd.readouterr().out
    assert "toy seed 1 failed: [/x]" in shown.replace("\n", " ")
    assert "seed 0" in shown
    left = (tmp_path / "small" / "song_2024" / "toy").iterdir()
    assert [path.name for path in left] == ["seed-1.log"]
