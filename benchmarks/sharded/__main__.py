"""What sharded models cost, on paper and simulated: ``python -m benchmarks.sharded``.

The package's own code runs on decoders of 1 and 10 billion parameters that are sharded by FSDP2
over up to 64 ranks, without any memory: each collective, its bytes, each operation and the bytes
that are held are counted. Seconds are those counts over the figures of the hardware, which are
options. How many products a solve takes is that of a small decoder, trained and solved here. Real
ranks of this machine check it: collectives and operations have to be the same, one by one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import command
from benchmarks.files import alone, write_json
from benchmarks.progress import doing, shown
from benchmarks.report import machine, versions
from benchmarks.sharded import formulas, measured, shadow, tables
from benchmarks.sharded.formulas import H200, Hardware
from benchmarks.sharded.meter import Counts
from benchmarks.sharded.models import SHAPES, Shape
from benchmarks.text import windows

_LARGE = ("1B", "10B")


def main(arguments: list[str] | None = None) -> int:
    """Simulates, checks, and writes.

    Args:
        arguments: as on the command line.

    Returns:
        0; 1 where real ranks do otherwise than simulated ones; 2 for what cannot be run, with the
        reason in one sentence; 130 if it was interrupted.
    """
    options = _parser().parse_args(arguments)
    console = command.console(width=200)
    lock = options.output.with_name(f"{options.output.name}.lock")

    def work() -> int:
        with alone(lock), shown("sharded", console):
            return _run(options, console)

    return command.status("sharded", work, kept=f"what was counted is in {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharded",
        description=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="*", choices=tuple(SHAPES), default=list(_LARGE), help="simulated")
    add("--ranks", nargs="+", type=int, default=[8, 16, 32, 64], help="of the simulation")
    add("--k", type=int, default=10, help="dimension of the subspace")
    add("--check", nargs="*", type=int, default=[1, 2, 4], metavar="RANKS", help="real ones")
    add("--check-k", type=int, default=3, help="dimension of the subspace of real ranks")
    add("--rounds", type=int, default=5, help="of timing real ranks, of which the least counts")
    for name, what in _INPUTS.items():
        add(f"--{name}", type=float, default=getattr(H200, name), help=f"of a device: {what}")
    add("--data-root", help="folder of data sets (default: $SUBSPACE_OPTIM_DATA, else the hub)")
    add("--quick", action="store_true", help="the smallest decoder alone, to see that it works")
    add("--output", type=Path, default=Path("results/sharded.json"))
    return parser


_INPUTS = {
    "flops": "operations of float32 a second",
    "memory": "bytes of its memory a second",
    "link": "bytes that it receives a second",
    "latency": "seconds of a collective",
}
_QUICK = Shape(width=16, layers=2, heads=2, vocabulary=67, length=16, sequences=2)


def _run(options: argparse.Namespace, console: Console) -> int:
    """Does all of it; returns the exit status."""
    hardware = Hardware(**{name: getattr(options, name) for name in _INPUTS})
    small = _QUICK if options.quick else SHAPES["1M"]
    shapes = {"small": _QUICK} if options.quick else {n: SHAPES[n] for n in options.models}
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "hardware": asdict(hardware),
        "k": options.k,
        "simulated": {},
        "checks": [],
    }
    with doing("the small decoder"):
        operator, result["text"] = shadow.trained(small, options.data_root)
        operator.linearize()

    def solved(size: int, k: int) -> shadow.Solved:
        with operator.frozen():
            return shadow.solved(operator.matmat, operator.size, size, k)

    for ranks in options.check:
        with doing(f"{ranks} real ranks"):
            check = _checked(operator, small, ranks, options)
        result["checks"].append(check)
        write_json(options.output, result)
    for name, shape in shapes.items():
        with doing(f"a solve as of {name}"):
            solution = solved(shape.parameters, options.k)
        found: dict[str, Any] = {}
        result["simulated"][name] = {
            "shape": asdict(shape),
            "parameters": shape.parameters,
            "products": solution.products,
            "eigenvalues": solution.eigenvalues,
            "ranks": found,
        }
        read = dict.fromkeys(measured.CASES, solution.read)
        for ranks in options.ranks:
            with doing(f"{name} on {ranks} ranks that are not there"):
                dry = measured.dry(shape, ranks, options.k, read)
            found[str(ranks)] = {
                case: {piece: told(counts, ranks, hardware) for piece, counts in pieces.items()}
                for case, pieces in dry.counts.items()
            }
            write_json(options.output, result)
    console.print(tables.simulated(result), "\n", tables.checked(result), sep="\n", soft_wrap=True)
    console.print(f"Written: {options.output}")
    cases = [case for check in result["checks"] for case in check["cases"].values()]
    same = all(piece["alike"] for case in cases for piece in case.values())
    return 0 if same else 1


def told(counts: Counts, ranks: int, hardware: Hardware) -> dict[str, Any]:
    """Returns what is written of counts: numbers alone."""
    traffic = asdict(formulas.counted(counts))
    return traffic | {
        "summed": counts.payload("sum"),
        "received": formulas.received(counts, ranks),
        "touched": counts.touched,
        "operations": counts.operations,
        "reads": counts.reads,
        "peak": counts.peak,
        "left": counts.left,
        "seconds": formulas.seconds(counts, ranks, hardware),
    }


def _checked(
    operator: Any, shape: Shape, ranks: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Compares real ranks with simulated ones, on the small decoder and its text."""
    count = ranks * shape.sequences
    text = windows(options.data_root, count=count, length=shape.length, vocabulary=shape.vocabulary)
    batches = list(
        zip(text.tokens.split(shape.sequences), text.following.split(shape.sequences), strict=True)
    )
    start = measured.Start(operator.model.state_dict(), batches)
    real = measured.real(shape, ranks, options.check_k, start, options.rounds)
    dry = measured.dry(shape, ranks, options.check_k, real[0].read)
    of_machine = real[0].hardware or H200
    cases: dict[str, Any] = {}
    for case, pieces in real[0].counts.items():
        cases[case] = {}
        for name, counts in pieces.items():
            expected = dry.counts[case][name]
            seconds = real[0].seconds.get(case, {}).get(name)
            row = told(counts, ranks, of_machine)
            row["alike"] = measured.alike(counts, expected, in_order=name != "refresh")
            row["peak_ratio"] = counts.peak / expected.peak
            row["measured"] = seconds
            predicted = formulas.seconds(expected, ranks, of_machine)["total"]
            row["ratio"] = None if seconds is None else seconds / predicted
            cases[case][name] = row
    return {"ranks": ranks, "hardware": asdict(of_machine), "cases": cases}


if __name__ == "__main__":
    sys.exit(main())
