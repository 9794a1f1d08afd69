"""Raw figures on disk: one JSON file for each run and seed, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.files import ForeignFileError, jsonable, replacing
from benchmarks.papers.reproduction import Job, Paper, Raw, RawOfSeeds, Run, Scale

_DIGITS = 6
_compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class Record:
    """What a raw file holds.

    Attributes:
        paper: its key.
        run: its name.
        scale: ``small`` or ``paper``.
        seed: the seed.
        version: of the run, and ...
        size: ... its arguments; a record of others than the run's present ones is measured anew.
        rules: of the claims about the run as they were then, by the names of the claims.
        seconds: of the processor, or of the clock where a GPU computed; of a run that was taken up
            again, of the process that finished it.
        machine: on which hardware, as ``benchmarks.report.machine`` tells.
        versions: of what took part.
        raw: the figures, with 6 significant digits. What JSON has no word for is null there, and
            NaN here.
    """

    paper: str
    run: str
    scale: Scale
    seed: int
    version: int
    size: dict[str, Any]
    rules: dict[str, str]
    seconds: float
    machine: dict[str, Any]
    versions: dict[str, str | None]
    raw: Raw


class RawFiles:
    """The raw files of a folder, ``<scale>/<paper>/<run>/seed-<n>.json``.

    Args:
        folder: it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, paper: str, run: str, scale: Scale, seed: int) -> Path:
        """Returns where the raw file of a run and seed is."""
        return self.folder / scale / paper / run / f"seed-{seed}.json"

    def read(self, paper: str, run: Run, scale: Scale, seed: int) -> Record | None:
        """Returns the record; ``None`` if there is none of the run's present version and size.

        Raises:
            ForeignFileError: the file is no record; to count it as none would write over it.
        """
        path = self.path(paper, run.name, scale, seed)
        remedy = "Remove it, or choose another folder for the results."
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ForeignFileError(path, "raw file", error, remedy) from error
        try:
            # Those from before rules were kept decide nothing.
            record = Record(**({"rules": {}} | _with_nan(json.loads(text))))
        except (TypeError, ValueError) as error:
            raise ForeignFileError(path, "raw file", error, remedy) from error
        found = (record.paper, record.run, record.scale, record.seed)
        if found != (paper, run.name, scale, seed) or not isinstance(record.raw, dict):
            reason = f"it holds no figures of this run, but what is of {found}"
            raise ForeignFileError(path, "raw file", reason, remedy)
        present = record.version == run.version and record.size == jsonable(
            run.size(scale), _DIGITS
        )
        return record if present else None

    def of(self, paper: Paper, run: str, scale: Scale) -> dict[int, Record]:
        """Returns all records of a run by their seeds, in order."""
        found = {}
        for path in self.path(paper.key, run, scale, 0).parent.glob("seed-*.json"):
            seed = path.stem.removeprefix("seed-")
            record = (
                self.read(paper.key, paper.run(run), scale, int(seed)) if seed.isdecimal() else None
            )
            if record is not None:
                found[int(seed)] = record
        return dict(sorted(found.items()))

    def raws(self, paper: Paper, runs: Iterable[str], scale: Scale) -> RawOfSeeds:
        """Returns the raw figures of the runs by name and seed."""
        return {
            run: {seed: record.raw for seed, record in self.of(paper, run, scale).items()}
            for run in runs
        }

    def digest(self, paper: str, run: str, scale: Scale, seed: int) -> str:
        """Returns the SHA-256 of a raw file."""
        return hashlib.sha256(self.path(paper, run, scale, seed).read_bytes()).hexdigest()

    def write(self, record: Record) -> Path:
        """Writes the raw file: a kill leaves that which was there, or this one."""
        path = self.path(record.paper, record.run, record.scale, record.seed)
        fields = jsonable(asdict(record), _DIGITS)
        # A line for each field and each part of the figures: a change is a change of few lines.
        parts = fields.pop("raw").items()
        raw = ",\n".join(f"  {json.dumps(key)}: {_compact(value)}" for key, value in parts)
        lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in fields.items()]
        text = "{\n" + ",\n".join([*lines, f'"raw": {{\n{raw}\n}}']) + "\n}"
        with replacing(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        return path


def measure(paper: Paper, run: Run, scale: Scale, job: Job) -> Record:
    """Runs a run for one seed.

    Args:
        paper: it belongs to.
        run: what is measured.
        scale: its size.
        job: seed and device.

    Returns:
        What was measured, and on what.
    """
    # Processor time is what the run takes on a machine that has nothing else to do.
    clock = time.perf_counter if job.device.type == "cuda" else time.process_time
    start = clock()
    size = run.size(scale)
    raw = run.measure(job, **size)
    seconds = clock() - start
    return Record(
        paper.key,
        run.name,
        scale,
        job.seed,
        run.version,
        jsonable(size, _DIGITS),
        {claim.name: claim.rule for claim in paper.claims_about(run)},
        seconds,
        report.machine(),
        report.versions(),
        raw,
    )


def _with_nan(value: Any) -> Any:
    """The value with NaN for null, but for the fields that are text."""
    if isinstance(value, dict):
        return {
            key: each if key in ("machine", "versions", "size", "rules") else _with_nan(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value
