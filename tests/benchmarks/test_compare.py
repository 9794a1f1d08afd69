"""The command: its files, its messages, and that nothing measured is lost."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest

from benchmarks.compare import main
from benchmarks.optimizers import DEFAULT

ROOT = Path(__file__).parents[2]
QUICK = ["--data", "digits", "--steps", "6", "--switch-at", "4", "--warmup-measure", "2"]
QUICK += ["--measure", "3", "--refresh", "3", "--spectrum", "0"]


def files(folder):
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "history.csv").open() as file:
        return summary, list(csv.DictReader(file))


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
    assert rows[0]["eigenvalue_20"]
    assert rows[3]["eigenvalue_10"]
    assert rows[3]["eigenvalue_11"] == ""  # step 7 asks for no spectrum
    image = matplotlib.image.imread(folder / "comparison.png")
    assert image.shape[0] > 500
    assert image[..., :3].std() > 0.05
    assert not (folder / "checkpoint.pt").exists()
    out = capsys.readouterr().out
    assert all(name in out for name in DEFAULT)
    assert "98.5 %" in out


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
    quick = [*QUICK[:-4], "--refresh", "auto", "--spectrum", "0", "--control", "random"]
    assert main([*quick, "--results", str(tmp_path)]) == 0
    summary, _ = files(tmp_path / "digits-mlp-mse-random-seed0")
    assert set(summary["branches"]) == set(DEFAULT)


def test_claims_are_about_the_papers_optimizers(tmp_path):
    options = [*QUICK, "--optimizers", "sgd", "domsgd", "bulksgd", "--set", "sgd.momentum=0.9"]
    assert main([*options, "--results", str(tmp_path)]) == 0
    summary, _ = files(tmp_path / "digits-mlp-mse-seed0")
    assert summary["claims"] == []
    assert summary["branches"]["SGD"]["expected_step_norm"] is None
    assert summary["branches"]["BulkSGD"]["expected_step_norm"] > 0


def test_a_second_run_takes_a_folder_of_its_own(tmp_path):
    for _ in range(2):
        assert main([*QUICK, "--optimizers", "SGD", "--results", str(tmp_path)]) == 0
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert names == ["digits-mlp-mse-seed0", "digits-mlp-mse-seed0-2"]


def figures(summary):
    """The branches without the wall time."""
    return {
        name: {key: value for key, value in branch.items() if "seconds" not in key}
        for name, branch in summary["branches"].items()
    }


LONG = [*QUICK, "--steps", "30", "--optimizers", "SGD", "DomSGD", "quasinewton"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main([*LONG, "--results", str(folder)]) == 0
    return files(folder / "digits-mlp-mse-seed0")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_measured_is_lost_to_a_signal(tmp_path, uninterrupted, how):
    """Stopped from outside in the middle, by any signal, a run goes on to the same end."""
    options = [*LONG, "--results", str(tmp_path)]
    expected, expected_rows = uninterrupted

    command = [sys.executable, "-m", "benchmarks.compare", *options]
    folder = tmp_path / "digits-mlp-mse-seed0"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            path = folder / "history.csv"
            if path.exists() and "DomSGD" in path.read_text():
                break
            time.sleep(0.02)
        process.send_signal(how)
    assert process.returncode == (130 if how != signal.SIGKILL else -signal.SIGKILL)
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


def test_resuming_with_other_options_is_refused(tmp_path, capsys):
    options = [*QUICK, "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.compare", *options, "--steps", "5000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (tmp_path / "digits-mlp-mse-seed0" / "checkpoint.pt").exists():
                break
            time.sleep(0.02)
        process.kill()
    assert main([*options, "--steps", "5000", "--lr", "0.5", "--resume"]) == 2
    assert "--lr was 0.01, is 0.5" in capsys.readouterr().err
