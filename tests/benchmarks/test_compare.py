"""The command: its files, its messages, and that nothing measured is lost."""

import csv
import json
import os
import pickle
import signal
import time
from dataclasses import replace

import matplotlib.image
import pytest
import torch

from benchmarks import compare
from benchmarks.compare import main
from benchmarks.data import load
from benchmarks.files import alone
from benchmarks.optimizers import DEFAULT
from tests.processes import ended, started

QUICK = ["--data", "digits", "--steps", "6", "--switch-at", "4", "--warmup-measure", "2"]
QUICK += ["--measure", "3", "--refresh", "3", "--spectrum", "0", "--tol", "0.1", "--k", "3"]
FOLDER = "digits-mlp-mse-seed0"


def few(name, *, root):
    """The data set, every fifth of its images."""
    data = load(name, root=root)
    return replace(data, x_train=data.x_train[::5], y_train=data.y_train[::5])


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "load", few)
        yield


def command(options):
    """The command in a process of its own, on the same images."""
    compare.load = few
    return main(options)


def files(folder):
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "history.csv").open() as file:
        return summary, list(csv.DictReader(file))


@pytest.mark.slow
def test_writes_picture_history_and_summary(tmp_path, capsys):
    assert main([*QUICK, "--spectrum", "4", "--results", str(tmp_path)]) == 0
    folder = tmp_path / "digits-mlp-mse-seed0"
    summary, rows = files(folder)
    assert summary["finished"]
    assert summary["switch"]["step"] == 4
    assert list(summary["branches"]) == list(summary["arguments"]["optimizers"]) == list(DEFAULT)
    assert summary["arguments"]["lr"] == 0.01
    assert summary["versions"]["torch"]
    assert summary["machine"]["cores"] == os.cpu_count()
    assert [c["claim"] for c in summary["claims"]]
    phases = [row["phase"] for row in rows]
    assert phases == ["warmup"] * 2 + [name for name in DEFAULT for _ in range(2)]
    assert [row["step"] for row in rows[:4]] == ["0", "2", "4", "7"]
    assert rows[0]["eigenvalue_6"]
    assert rows[3]["eigenvalue_3"]
    assert rows[3]["eigenvalue_4"] == ""  # step 7 asks for no spectrum
    image = matplotlib.image.imread(folder / "comparison.png")
    assert image.shape[0] > 500
    assert image[..., :3].std() > 0.05
    assert not (folder / "checkpoint.pt").exists()
    out = capsys.readouterr().out
    assert all(name in out for name in DEFAULT)
    assert "98.5 %" in out


@pytest.mark.slow
def test_any_optimizer_takes_part_with_its_options(tmp_path, capsys):
    chosen = ["sgd", "dom:adamw", "bulk:muon+adamw", "torch.optim:NAdam"]
    options = ["--set", "adamw.lr=1e-4", "--set", "torch.optim:NAdam.betas=(0.8, 0.9)"]
    options = [*QUICK, "--optimizers", *chosen, *options]
    assert main([*options, "--results", str(tmp_path)]) == 0
    folder = tmp_path / "digits-mlp-mse-seed0"
    summary, _ = files(folder)
    names = ["SGD", "dom:AdamW", "bulk:Muon+AdamW", "torch.optim:NAdam"]
    assert list(summary["branches"]) == names
    taken = {name: branch["options"] for name, branch in summary["branches"].items()}
    assert taken["SGD"][0]["lr"] == 0.01
    assert taken["dom:AdamW"][0]["lr"] == taken["bulk:Muon+AdamW"][1]["lr"] == 1e-4
    assert taken["bulk:Muon+AdamW"][0]["lr"] == 0.005
    assert taken["torch.optim:NAdam"][0]["betas"] == [0.8, 0.9]
    assert summary["claims"] == []
    assert "bulk:Muon+AdamW" in capsys.readouterr().out


def test_what_diverges_is_in_all_files(tmp_path, capsys):
    options = ["--optimizers", "sgd", "adamw", "--set", "adamw.lr=1e30"]
    assert main([*QUICK, *options, "--results", str(tmp_path)]) == 0
    folder = tmp_path / "digits-mlp-mse-seed0"
    summary, rows = files(folder)
    assert summary["finished"]
    assert "not finite" in summary["branches"]["AdamW"]["stopped"]
    assert summary["branches"]["AdamW"]["train_loss"] is None
    assert summary["branches"]["SGD"]["steps"] == 6
    assert [row["phase"] for row in rows].count("SGD") == 2
    assert (folder / "comparison.png").stat().st_size > 1000
    assert "AdamW was stopped: step" in capsys.readouterr().out


def test_the_random_control_takes_all_of_them(tmp_path):
    quick = [*QUICK, "--refresh", "auto", "--control", "random"]
    assert main([*quick, "--results", str(tmp_path)]) == 0
    summary, _ = files(tmp_path / "digits-mlp-mse-random-seed0")
    assert set(summary["branches"]) == set(DEFAULT)


@pytest.mark.slow
def test_claims_are_about_the_papers_optimizers(tmp_path):
    options = [*QUICK, "--optimizers", "sgd", "domsgd", "bulksgd", "--set", "sgd.momentum=0.9"]
    assert main([*options, "--results", str(tmp_path)]) == 0
    summary, _ = files(tmp_path / "digits-mlp-mse-seed0")
    assert summary["claims"] == []
    assert summary["branches"]["SGD"]["expected_step_norm"] is None
    assert summary["branches"]["BulkSGD"]["expected_step_norm"] > 0


@pytest.mark.slow
def test_a_second_run_takes_a_folder_of_its_own_and_k_is_the_number_of_classes(tmp_path):
    for _ in range(2):
        assert main([*QUICK[:-2], "--optimizers", "SGD", "--results", str(tmp_path)]) == 0
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert names == [FOLDER, f"{FOLDER}-2"]
    summary, rows = files(tmp_path / FOLDER)
    assert summary["arguments"]["k"] == summary["settings"]["k"] == 10
    assert rows[0]["eigenvalue_10"]


@pytest.mark.slow
def test_two_that_start_at_once_write_into_folders_of_their_own(tmp_path):
    results, logs = tmp_path / "results", [tmp_path / "first", tmp_path / "second"]
    options = [*QUICK, "--optimizers", "SGD", "--results", str(results)]
    both = [started(command, options, log) for log in logs]
    assert [ended(process) for process in both] == [0, 0]
    outputs = [log.read_text() for log in logs]
    assert sorted(folder.name for folder in results.iterdir()) == [FOLDER, f"{FOLDER}-2"]
    for name in (FOLDER, f"{FOLDER}-2"):
        assert sum(f"{name}/comparison.png" in output for output in outputs) == 1
        summary, rows = files(results / name)
        assert summary["finished"]
        assert [row["phase"] for row in rows] == ["warmup"] * 2 + ["SGD"] * 2
        kept = sorted(file.name for file in (results / name).iterdir())
        assert kept == ["comparison.png", "history.csv", "summary.json"]  # no lock, no parts


def figures(summary):
    """The branches without the wall time."""
    return {
        name: {key: value for key, value in branch.items() if "seconds" not in key}
        for name, branch in summary["branches"].items()
    }


LONG = [*QUICK, "--steps", "30", "--measure", "9", "--refresh", "9"]
LONG += ["--optimizers", "SGD", "DomSGD", "quasinewton"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main([*LONG, "--results", str(folder)]) == 0
    return files(folder / "digits-mlp-mse-seed0")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_nothing_measured_is_lost_to_a_signal(tmp_path, uninterrupted, how):
    """Stopped from outside in the middle, by any signal, a run goes on to the same end."""
    options = [*LONG, "--results", str(tmp_path)]
    expected, expected_rows = uninterrupted

    folder = tmp_path / "digits-mlp-mse-seed0"
    process = started(command, options, tmp_path / "log")
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        path = folder / "history.csv"
        if path.exists() and "DomSGD" in path.read_text():
            break
        time.sleep(0.02)
    os.kill(process.pid, how)
    assert ended(process) == (130 if how != signal.SIGKILL else -signal.SIGKILL)
    with (folder / "history.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert kept == expected_rows[: len(kept)]
    assert len(kept) > 2
    if how != signal.SIGKILL:
        summary, _ = files(folder)
        assert not summary["finished"]
        assert (folder / "comparison.png").stat().st_size > 1000

    assert main([*options, "--resume"]) == 0
    summary, rows = files(folder)
    assert summary["finished"]
    assert rows == expected_rows
    assert figures(summary) == figures(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "Nothing to resume"),
        (["--model", "transformer"], "transformer"),
        (["--k", "100000000"], "k is 100000000, but must be an integer from 1 to"),
        (["--lr", "-1"], "lr is -1.0, but must be a finite number above 0"),
        (["--measure", "0"], "measure is 0"),
        (["--refresh", "0"], "refresh is 0, but must be an integer of at least 1. Or 'auto'"),
        (["--optimizers", "foo"], "unknown optimizer 'foo'"),
        (["--optimizers", "sgd", "--set", "adamw.lr=1"], "'adamw' is not among"),
        (["--optimizers", "muon"], "Muon cannot be made with its defaults"),
        (["--lr", "1e30", "--switch-at", "30"], "not finite"),
    ],
)
def test_bad_options_end_in_one_sentence(tmp_path, capsys, options, message):
    assert main([*QUICK, *options, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "--lr" in options or not any(tmp_path.iterdir())  # nothing has run


def interrupted(options, monkeypatch):
    """Leaves an unfinished run, as Ctrl-C after its first checkpoint does."""

    def call(self, experiment, measured):
        kept(self, experiment, measured)
        if measured:
            raise KeyboardInterrupt

    kept = compare._Recorder.__call__
    with monkeypatch.context() as patch:
        patch.setattr(compare._Recorder, "__call__", call)
        assert main(options) == 130


def test_resuming_with_other_options_is_refused(tmp_path, monkeypatch, capsys):
    options = [*QUICK, "--results", str(tmp_path)]
    interrupted(options, monkeypatch)
    assert main([*options, "--lr", "0.5", "--resume"]) == 2
    assert "--lr was 0.01, is 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_what_another_process_has_in_hand_is_not_resumed(tmp_path, monkeypatch, capsys):
    options = [*QUICK, "--optimizers", "SGD", "--results", str(tmp_path)]
    interrupted(options, monkeypatch)
    before = (tmp_path / FOLDER / "checkpoint.pt").read_bytes()
    with alone(tmp_path / FOLDER / "lock"):
        assert main([*options, "--resume"]) == 2
    assert f"Process {os.getpid()} is at work" in capsys.readouterr().err
    assert (tmp_path / FOLDER / "checkpoint.pt").read_bytes() == before
    assert main([*options, "--resume"]) == 0


@pytest.mark.slow
def test_foreign_checkpoints_are_told_in_one_message_and_left_as_they_are(
    tmp_path, monkeypatch, capsys
):
    options = [*QUICK, "--optimizers", "SGD", "--results", str(tmp_path)]
    interrupted(options, monkeypatch)
    capsys.readouterr()
    path = tmp_path / FOLDER / "checkpoint.pt"
    whole = path.read_bytes()
    kept = torch.load(path, weights_only=True)
    state = kept["state"]

    def saved(content):
        torch.save(content, path)
        return path.read_bytes()

    foreign = {
        "is no checkpoint of this version": [
            b"",
            b"\x89PNG\r\n",
            whole[: len(whole) // 2],
            b"x" + whole[1:],
            pickle.dumps(print),  # would run code, if it were trusted
            saved([1, 2]),
            saved(kept | {"format": "benchmarks.compare, 0"}),
            saved(kept | {"state": 3}),
        ],
        "is no state of this comparison": [
            saved(kept | {"state": {}}),
            saved(kept | {"state": state | {"model": {}}}),
            saved(kept | {"state": state | {"phase": "Muon"}}),
            saved(kept | {"state": state | {"optimizers": []}}),
            saved(kept | {"state": state | {"result": {"rows": []}}}),
            saved(kept | {"state": state | {"subspace": {"k": 2}}}),
        ],
    }
    for reason, contents in foreign.items():
        for content in contents:
            path.write_bytes(content)
            assert main([*options, "--resume"]) == 2
            error = capsys.readouterr().err
            assert reason in error
            assert error.count("\n") == 1
            assert path.read_bytes() == content
    path.write_bytes(whole)
    assert main([*options, "--resume"]) == 0


def often(options):
    """The command, with a line in its log every 20 ms."""
    shown = compare.shown
    compare.shown = lambda what, console: shown(what, console, 0.02)
    return command(options)


@pytest.mark.slow
def test_a_log_file_gets_lines_while_it_runs(tmp_path):
    """A line every 20 ms for every 20 s: the phases end with one, and between them others come."""
    path = tmp_path / "log"
    options = [*QUICK, "--optimizers", "SGD", "--results", str(tmp_path / "results")]
    assert ended(started(often, options, path)) == 0
    lines = [line for line in path.read_text().splitlines() if line.startswith("[")]
    assert any("compare, 0 s | loading digits" in line for line in lines)
    assert any("| SGD to the switch, step " in line and "chi" in line for line in lines)
    assert any("] SGD, step 6 of 6, " in line and "loss" in line for line in lines)
