"""The command: what it lists, refuses, runs in processes, takes up again and reports."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.files import alone
from benchmarks.papers import __main__ as command
from benchmarks.papers import worker
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.raw_files import RawFiles, measure
from benchmarks.papers.reproduction import Job
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
    results = RawFiles(tmp_path)

    def tasks(*names):
        wanted = {"song_2024": [paper.exhibit(name) for name in names]}
        return [str(task) for task in command.tasks_of(options, wanted, results)]

    assert tasks("figure-4", "figure-6", "figure-7") == [
        "song_2024 switching seed 10",
        "song_2024 toy seed 10",
        "song_2024 switching seed 11",
        "song_2024 toy seed 11",
    ]
    results.write(measure(paper, paper.run("toy"), "small", Job(11)))
    assert tasks("figure-6") == ["song_2024 toy seed 10"]
    # The other readings of its runs as well.
    everything = tasks(*(exhibit.name for exhibit in paper.exhibits))
    assert len(everything) == 2 * len(paper.runs) - 1


def test_by_default_there_are_the_seeds_that_runs_are_told_to_have(tmp_path):
    options = command._parser().parse_args(["sagun_2017", "figure-9", "figure-1"])
    paper = PAPERS["sagun_2017"]
    wanted = {"sagun_2017": [paper.exhibit(name) for name in options.exhibits]}
    tasks = [str(task) for task in command.tasks_of(options, wanted, RawFiles(tmp_path))]
    needed = {run for exhibit in wanted["sagun_2017"] for run in exhibit.runs}
    expected = (
        f"sagun_2017 {name} seed {seed}"
        for name in needed
        for seed in range(10, 30 if paper.run(name).looked_again else 10 + paper.run(name).seeds)
    )
    assert sorted(tasks) == sorted(expected)


def test_a_second_command_is_refused_before_it_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.Queue, "__call__", lambda *_: pytest.fail("it started"))
    with alone(tmp_path / "lock"):
        assert command.main(["song_2024", "figure-7", "--results", str(tmp_path)]) == 2
    assert f"papers: Process {os.getpid()} is at work in {tmp_path} already" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", '{"paper": "song_2024", "run', "\udcff", "null"])
def test_a_foreign_raw_file_is_told_in_one_message_and_not_written_over(text, tmp_path, capsys):
    path = RawFiles(tmp_path).path("song_2024", "toy", "small", 1)
    path.parent.mkdir(parents=True)
    content = text.encode(errors="surrogateescape")
    path.write_bytes(content)
    assert command.main(["song_2024", "figure-7", "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"papers: {path} is no raw file: " in error
    assert "Remove it, or choose another folder" in error
    assert error.count("\n") == 1
    assert path.read_bytes() == content


def test_a_run_that_another_process_has_in_hand_is_left_to_it(tmp_path, monkeypatch):
    """Its command may have been killed, and the run goes on."""
    arguments = ["worker", "song_2024", "toy", "0", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(worker.zlib, "crc32", lambda _: 0xABC)
    with (
        alone(tmp_path / "small" / "song_2024" / "toy" / "seed-0-00000abc" / "lock"),
        pytest.raises(SystemExit, match="is at work in"),
    ):
        worker.main()


@pytest.mark.slow
def test_a_figure_is_measured_drawn_judged_and_not_measured_again(tmp_path, capfd):
    """In processes of their own; a second time nothing is left to measure."""
    arguments = ["song_2024", "figure-7", "--seeds", "10", "--results", str(tmp_path)]
    assert command.main([*arguments, "--jobs", "2"]) == 0
    output = capfd.readouterr().out
    assert "10 runs" in output.splitlines()[0]  # the estimate comes first
    assert "song_2024 toy seed 19" in output
    assert "holds: toy-sgd: On the toy quadratic the gradient along SGD" in output
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert {claim["claim"]: claim["verdict"] for claim in kept}["toy-sgd"] == "holds"
    picture = tmp_path / "small" / "song_2024" / "figure-7.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = tmp_path / "small" / "song_2024" / "toy"
    assert sorted(path.name for path in runs.iterdir()) == [f"seed-1{n}.json" for n in range(10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claims.json", "small"]
    first = json.loads((runs / "seed-10.json").read_text())
    before = (runs / "seed-10.json").stat().st_mtime_ns
    assert command.main(arguments) == 0
    assert "runs" not in capfd.readouterr().out.splitlines()[0]
    assert (runs / "seed-10.json").stat().st_mtime_ns == before
    assert first["size"]["lr"] == 1e-4


@pytest.mark.slow
def test_an_interrupt_ends_the_runs_and_what_was_measured_stays(tmp_path):
    code = [sys.executable, "-m", "benchmarks.papers", "sagun_2017", "figure-9", "appendix-b"]
    code += ["--results", str(tmp_path), "--seeds", "1", "--jobs", "1"]
    process = subprocess.Popen(
        code, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # The first run is on its way for minutes, at steps of a few milliseconds.
    run = tmp_path / "small" / "sagun_2017" / "phases"
    log = run / "seed-10.log"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if log.exists() and re.search(r"training .+, step [1-9]", log.read_text()):
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "goes on from here" in output
    workers = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout
    assert str(tmp_path) not in workers
    # No raw file, and what the training had reached.
    assert not list(run.glob("*.json"))
    (kept,) = run.glob("seed-10-*/*.pt")
    assert torch.load(kept, weights_only=True)["step"] >= 1
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize(
    ("seeds", "lines"),
    [
        (
            range(9, 11),  # a trial, and one of five
            ["not decided by so few seeds: two: It is 2.", "1.8 ≤ y(1) ≤ 2.2", "steep: 2.1"],
        ),
        (
            range(10, 15),
            [
                "holds: two: It is 2.",
                "1.8 ≤ y(1) ≤ 2.2",
                "steep: 2.12 [2.1, 2.14], holds: 2.1 2.11 2.12 2.13 2.14",
            ],
        ),
    ],
)
def test_the_command_shows_the_verdicts(seeds, lines, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PAPERS, made_up.PAPER.key, made_up.PAPER)
    results = RawFiles(tmp_path)
    for seed in seeds:
        results.write(measure(made_up.PAPER, made_up.PAPER.run("steep"), "small", Job(seed)))
    wanted = {"made_up": [made_up.PAPER.exhibit("figure-1")]}
    command._show(wanted, results, "small", Console(width=200))
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    first = shown.index(lines[0])
    assert shown[first : first + 3] == lines


def test_a_run_that_fails_is_reported_and_the_others_are_made(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        command.Queue,
        "_command",
        lambda _, task: [
            sys.executable,
            "-c",
            f"import sys; sys.exit({task.seed - 10} and '[/x]')",
        ],
    )
    arguments = ["song_2024", "figure-7", "--seeds", "2", "--jobs", "1"]
    assert command.main([*arguments, "--results", str(tmp_path)]) == 1
    shown = capfd.readouterr().out
    assert "toy seed 11 failed: [/x]" in shown.replace("\n", " ")
    assert "seed 10" in shown
    left = (tmp_path / "small" / "song_2024" / "toy").iterdir()
    assert [path.name for path in left] == ["seed-11.log"]
