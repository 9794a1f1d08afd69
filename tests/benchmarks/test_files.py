"""Files that are whole or not there, and folders that one process at a time writes to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.files import BusyError, alone, replacing

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys\n"
    "from pathlib import Path\n"
    "from benchmarks.files import BusyError, alone\n"
    "try:\n"
    "    with alone(Path(sys.argv[1])):\n"
    "        print('held', flush=True)\n"
    "        sys.stdin.read()\n"
    "except BusyError as error:\n"
    "    sys.exit(str(error))\n"
)


def holder(lock):
    """A process that holds the lock until it is told to end."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_second_of_two_processes_is_told_who_is_there(tmp_path):
    lock = tmp_path / "new" / "lock"
    with holder(lock) as first:
        assert first.stdout.readline() == "held\n"
        assert lock.read_text() == f"{first.pid}\n"
        with holder(lock) as second:
            _, error = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"Process {first.pid} is at work in {lock.parent} already" in error
        assert lock.read_text() == f"{first.pid}\n"
        with pytest.raises(BusyError, match=str(first.pid)), alone(lock):
            pass
        first.communicate("", timeout=60)
    assert not lock.exists()
    with alone(lock):
        assert lock.read_text() == f"{os.getpid()}\n"
    assert not lock.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_dead_process_left_is_taken_over(tmp_path, number):
    lock = tmp_path / "lock"
    with holder(lock) as first:
        first.stdout.readline()
        first.send_signal(number)
        first.wait(timeout=60)
    assert lock.exists()
    with alone(lock):
        assert lock.read_text() == f"{os.getpid()}\n"
    assert not lock.exists()


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    lock = tmp_path / "lock"
    processes = [holder(lock) for _ in range(4)]
    told = [process.stdout.readline() for process in processes]
    assert sorted(told) == ["", "", "", "held\n"]
    for process in processes:
        process.communicate("", timeout=60)
    assert not lock.exists()


def test_it_is_let_go_on_an_error_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), alone(tmp_path / "lock"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with alone(tmp_path / "lock"):
        pass


def test_a_lock_that_was_removed_while_it_was_waited_for_keeps_nobody_out(tmp_path, monkeypatch):
    """The holder before ends between our opening of its file and our locking of it."""
    lock = tmp_path / "lock"
    lock.touch()
    opened, original = [], os.open

    def open_and_lose(*arguments, **options):
        file = original(*arguments, **options)
        if not opened:
            lock.unlink()
        opened.append(file)
        return file

    monkeypatch.setattr(os, "open", open_and_lose)
    with alone(lock):
        assert len(opened) == 2
        monkeypatch.undo()
        with pytest.raises(BusyError), alone(lock):
            pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, error):
    path = tmp_path / "new" / "figures.json"
    with replacing(path) as partial:
        partial.write_text("old")
        assert not path.exists()

    def fail():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["figures.json"]
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
