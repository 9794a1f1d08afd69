"""The tables, in Markdown, of what was simulated and of how that compares with real ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_GIB = 2**30
_SHOWN = ("product", "refresh")  # of what was checked: the file has all


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines)


def _figures(number: float) -> str:
    """Returns a number with three digits, and no more than it needs."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def simulated(result: dict[str, Any]) -> str:
    """What refreshes and steps cost: a row for each model, number of ranks and case."""
    columns = (
        "model", "ranks", "graphs", "GiB at the peak of a refresh", "of them vectors",
        "collectives of a product", "GB received", "TFLOP", "s of a product", "of them link",
        "s of a refresh", "ms of a step",
    )  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for name, model in result["simulated"].items():
            for ranks, cases in model["ranks"].items():
                for case, pieces in cases.items():
                    yield [name, ranks, case, *_cells(model, int(ranks), pieces)]

    return _table(columns, rows())


def _cells(model: dict[str, Any], ranks: int, pieces: dict[str, Any]) -> Iterator[str]:
    product, refresh, step = (pieces[name] for name in ("product", "refresh", "step"))
    held = 4 * model["parameters"] / ranks
    yield _figures((refresh["peak"] + held) / _GIB)
    yield _figures(pieces["solve"]["peak"] / _GIB)
    yield f"{product['gathers']} + {product['scatters']} + {product['sums']}"
    yield _figures(product["received"] / 1e9)
    yield _figures(product["flops"] / 1e12)
    yield _figures(product["seconds"]["total"])
    yield _figures(product["seconds"]["link"])
    yield _figures(refresh["seconds"]["total"])
    yield _figures(1000 * step["seconds"]["total"])


def checked(result: dict[str, Any]) -> str:
    """How real ranks compare: a row for each number of ranks, case and piece that is shown."""
    columns = (
        "ranks", "graphs", "piece", "collectives", "MB received", "the same as simulated",
        "MB at the peak", "over simulated", "ms", "over the model",
    )  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for check in result["checks"]:
            for case, pieces in check["cases"].items():
                for name in _SHOWN:
                    piece = pieces[name]
                    yield [
                        str(check["ranks"]),
                        case,
                        name,
                        f"{piece['gathers']} + {piece['scatters']} + {piece['sums']}",
                        _figures(piece["received"] / 1e6),
                        "yes" if piece["alike"] else "NO",
                        _figures(piece["peak"] / 1e6),
                        f"{piece['peak_ratio']:.3f}",
                        "" if piece["measured"] is None else _figures(1000 * piece["measured"]),
                        "" if piece["ratio"] is None else f"{piece['ratio']:.2f}",
                    ]

    return _table(columns, rows())
