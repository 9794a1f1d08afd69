"""Files that are whole or not there, that one process writes, and that are what they should be."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class BusyError(RuntimeError):
    """Another process writes there already."""


class ForeignFileError(ValueError):
    """A file that is not what a command wrote, or not whole: what it is, and the way out."""

    def __init__(self, path: Path, kind: str, reason: object, remedy: str) -> None:
        super().__init__(f"{path} is no {kind}: {reason}. {remedy}")


def jsonable(value: Any, digits: int = 17) -> Any:
    """Returns a value as JSON gives it back: lists for tuples, and null for NaN and infinities.

    Args:
        value: what JSON can hold, and numbers that it has no word for.
        digits: significant ones, that are left of numbers.
    """

    def rounded(number: str) -> float:
        return float(f"{float(number):.{digits}g}")

    return json.loads(json.dumps(value), parse_constant=lambda _: None, parse_float=rounded)


def first_line(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    return ": ".join((type(error).__name__, *str(error).splitlines()[:1]))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file beside ``path`` to be written, and then renames it.

    A kill leaves what was at ``path``, or what was written. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        yield partial
        os.replace(partial, path)  # noqa: PTH105 (atomic)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, whole: a kill leaves the file that was there before, or this one."""
    text = json.dumps(jsonable(value), indent=2)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Keeps other processes out, as long as it lasts; missing folders are made.

    The file says who holds it, and is removed at the end. The system releases it when its process
    dies, however that comes: what a kill leaves behind is taken over.

    Args:
        lock: the file; a process that holds it is a ``BusyError``.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(lock)
    try:
        os.truncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def _locked(lock: Path) -> int:
    """Returns the open file, locked.

    Raises:
        BusyError: another process holds it.
    """
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that ended meanwhile has removed the file that we hold: it keeps nobody out.
            if lock.exists() and os.path.samestat(os.fstat(file), lock.stat()):
                return file
        except FileNotFoundError:  # ... between the two looks at it
            pass
        except BlockingIOError:
            holder = os.pread(file, 20, 0).decode(errors="replace").strip() or "another"
            os.close(file)
            message = f"Process {holder} is at work in {lock.parent} already ({lock.name}). "
            raise BusyError(message + "Wait for it, or choose another place.") from None
        os.close(file)
