"""What each section prints: medians, with the smallest and the largest in parentheses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table

from benchmarks.speed.timing import spread


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)


def _bar(met: bool | None) -> str:
    return "" if met is None else "met" if met else "MISSED"


def products(name: str, result: dict[str, Any]) -> Table:
    """Costs of products in gradients."""
    table = _table(f"{name}: Hessian products, in gradients", "what", "gradients", "ms", "target")
    words = {
        "gradient": "one gradient over the data",
        "first": "the first product at new parameters",
        "further": "each further product",
        "average": f"average over a cold solve ({result['solve_products']} products)",
        "streamed average": "the same, streamed (memory_budget=0)",
    }
    for key, label in words.items():
        milliseconds = spread([1000 * s for s in result["seconds"][key]])
        bar = result["bar"].get(key)
        verdict = "" if bar is None else f"{bar:g} {_bar(result['met'])}"
        table.add_row(label, str(spread(result["gradients"][key])), str(milliseconds), verdict)
    return table


def cold(name: str, result: dict[str, Any]) -> Table:
    """The solvers side by side."""
    title = f"{name}: cold top {result['k']}, residual {result['residual']:g}"
    columns = ("solver", "gradients", "products", "residual", "sine", "ours / this", "target")
    table = _table(title, *columns)
    for solver, row in result["solvers"].items():
        if "left_out" in row:
            table.add_row(solver, f"left out: {row['left_out']}")
            continue
        worst = {key: max(check[key] for check in row["checks"]) for key in row["checks"][0]}
        bar = result["bars"].get(solver)
        table.add_row(
            solver,
            str(spread(row["gradients"])),
            str(row["products"] or "-"),
            f"{worst['residual']:.1e}" + ("" if row["reached"] else " (not reached)"),
            "-" if math.isnan(worst["sine"]) else f"{worst['sine']:.1e}",
            str(spread(row["ours_over_this"])),
            "" if bar is None else f"{bar:g} {_bar(result['met'][solver])}",
        )
    return table


def warm(name: str, result: dict[str, Any]) -> Table:
    """Warm beside cold."""
    age, before = result["age"], result["sine_before"]
    title = f"{name}: refresh of a basis {age} steps old (true sine {before:.3f})"
    table = _table(title, "refresh", "gradients", "products", "true sine after", "target")
    bar = f"{result['bar']['gradients']:g}, sine {result['bar']['sine']:g} {_bar(result['met'])}"
    for key in ("warm", "cold"):
        table.add_row(
            key,
            str(spread(result["gradients"][key])),
            str(result["products"][key]),
            f"{max(result['sines'][key]):.4f}",
            bar if key == "warm" else "",
        )
    return table


def runs(name: str, result: dict[str, Any]) -> Table:
    """One row a scenario."""
    columns = (
        "run",
        "steps",
        "added s",
        "gradients",
        "products",
        "refreshes (cold)",
        "probes",
        "recipe / ours",
        "largest sine",
        "below",
        "est./true",
        "rank",
        "target",
    )
    table = _table(f"{name}: whole runs, ours beside the recipe at every step", *columns)
    for row in result.values():
        stats, agree, bar = row["stats"], row["agreement"], row["scenario"]["bar"]
        inverse = spread([1 / ratio for ratio in row["ours_over_recipe"] if ratio > 0] or [0.0])
        table.add_row(
            row["scenario"]["title"],
            str(row["scenario"]["steps"]),
            str(spread(row["added_seconds"])),
            f"{spread(row['added_gradients']).median:.0f}",
            f"{stats['full_products']:.0f}",
            f"{stats['refreshes']} ({stats['cold']})",
            str(stats["probes"]),
            str(inverse),
            f"{row['largest_sine']:.3f}",
            *("-" if value is None else f"{value:.2f}" for value in agree.values()),
            "" if bar is None else f"{1 / bar:.0f} {_bar(row['met'])}",
        )
    return table


def estimates(name: str, result: dict[str, Any]) -> Table:
    """One row a trajectory, of all seeds; the last one pools them."""
    columns = ("trajectory", "samples", "below estimate", "within", "est./true", "rank", "target")
    title = f"{name}: true sines beside estimates, seeds {result['seeds']}"
    table = _table(title, *columns)
    for row in [*result["trajectories"], result["all"]]:
        agree = row["agreement"]
        shown = [row["within_max_angle"], *list(agree.values())[1:]]
        table.add_row(
            row["title"],
            str(len(row["samples"])),
            *("-" if v is None else f"{v:.3g}" for v in (agree["true_below_estimate"], *shown)),
            _bar(row.get("met")),
        )
    return table


def models(name: str, result: dict[str, Any]) -> Group:
    """Where a solve spends its time in each mode, and the solvers side by side."""
    columns = ("mode", "products", "graph", "products' share", "arithmetic", "target", "peer")
    table = _table(f"{name}: where a cold solve spends its time", *columns, "target")
    for mode, row in result.items():
        parts, over = row["parts"], row["ours_over_faster_peer"]
        table.add_row(
            mode,
            str(parts["products"]),
            *(
                f"{100 * parts['share'][part]:.0f} %"
                for part in ("graph", "products", "arithmetic")
            ),
            f"{parts['bar']:g} {_bar(parts['met'])}",
            "-" if over is None else f"{over:.2f}",
            f"{row['bar']:g} {_bar(row['met'])}",
        )
    return Group(table, *(cold(f"{name}, {mode}", row["cold"]) for mode, row in result.items()))


def trajectories(name: str, result: dict[str, Any]) -> Table:
    """The true sine beside its estimate, along a trajectory."""
    stats, steps = result["stats"], result["steps"]
    title = f"{name}: {steps} steps of SGD, {stats['products']} products"
    table = _table(title, "step", "true sine", "estimate", "λ_k", "λ_k+1")
    for row in result["samples"]:
        sines = (f"{row['true_sine']:.4f}", f"{row['estimate']:.4f}")
        beyond = row["next_eigenvalue"]
        last = f"{row['last_eigenvalue']:.3g}", "-" if beyond is None else f"{beyond:.3g}"
        table.add_row(str(row["step"]), *sines, *last)
    return table


def memory(name: str, result: dict[str, Any]) -> Table:
    """Peaks in vectors."""
    columns = ("graphs", "peak MiB", "graph MiB", "vectors of P", "beyond one product", "target")
    table = _table(f"{name}: peak memory of a cold solve", *columns)
    for case, row in result["cases"].items():
        met = row["vectors_beyond_a_product"] <= result["bar_vectors"]
        table.add_row(
            case,
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['graph_bytes'] / 2**20:.1f}",
            f"{row['vectors']:.1f}",
            f"{row['vectors_beyond_a_product']:.1f}",
            f"{result['bar_vectors']} {_bar(met)}",
        )
    return table


def synchronisations(name: str, result: dict[str, Any]) -> Table:
    """Counts."""
    table = _table(f"{name}: a cold solve on the GPU", *result)
    table.add_row(*map(str, result.values()))
    return table


def apply(_: str, result: dict[str, Any]) -> Table:
    """Bandwidths."""
    title = f"Applying a basis, P = {result['size']:,}, k = {result['k']}"
    table = _table(title, "what", "GB/s", "of the read bandwidth", "target")
    for key, speed in result["gigabytes_per_second"].items():
        fraction, met = result["fraction"].get(key), result["met"].get(key)
        table.add_row(
            key,
            str(spread(speed)),
            "" if fraction is None else str(spread(fraction)),
            "" if met is None else f"{result['bar']:g} {_bar(met)}",
        )
    return table


def observation(name: str, result: dict[str, Any]) -> Table:
    """Costs in gradients of the minibatch."""
    title = f"{name}: class gradients of a minibatch of {result['batch']}, C = {result['classes']}"
    table = _table(title, "what", "minibatch gradients", "ms", "target")
    for what, times in result["seconds"].items():
        met = result["met"].get(what)
        verdict = "" if met is None else f"{result['bar']:g} {_bar(met)}"
        milliseconds = str(spread([1000 * t for t in times]))
        table.add_row(what, str(spread(result["gradients"][what])), milliseconds, verdict)
    return table


def step(_: str, result: dict[str, Any]) -> Table:
    """Times of steps."""
    title = f"One step while the basis serves, P = {result['size']:,}, k = {result['k']}"
    columns = "what", "ms", "more than SGD, in double reads of the basis", "target"
    return _beside_sgd(_table(title, *columns), result, result["double_reads"])


def small(_: str, result: dict[str, Any]) -> Table:
    """Times of steps of many small tensors."""
    title = f"One step of {result['tensors']} small tensors while the basis serves"
    columns = "what", "ms of the processor", "over SGD", "target"
    return _beside_sgd(_table(title, *columns), result, result["times"])


def _beside_sgd(table: Table, result: dict[str, Any], more: dict[str, list[float]]) -> Table:
    """Adds a row for each kind of step, with what it takes more than SGD's."""
    for name, times in result["seconds"].items():
        over, met = more.get(name), result["met"].get(name)
        table.add_row(
            name,
            str(spread([1000 * t for t in times])),
            "" if over is None else str(spread(over)),
            "" if met is None else f"{result['bar']:g} {_bar(met)}",
        )
    return table


def monitor(name: str, result: dict[str, Any]) -> Group:
    """Overheads, what rows cost far apart, and whether the errors of samples are the true ones."""
    return Group(
        _monitor_overheads(name, result), _spaced(name, result), _errors(result["coverage"])
    )


def _monitor_overheads(name: str, result: dict[str, Any]) -> Table:
    table = _table(f"{name}: a monitor of SGD late, {result['steps']} steps", "what", "", "target")
    what = {
        "over_columns": "time of rows, over the gradients and products that they report",
        "row_gradients": "a row, in gradients",
        "unrecorded": "a step that is not recorded, over one without a monitor",
    }
    for key, text in what.items():
        bar = f"{result['bars'][key]:g} {_bar(result['met'][key])}"
        table.add_row(text, str(spread(result[key])), bar)
    return table


def _spaced(name: str, result: dict[str, Any]) -> Table:
    columns = ("every", "basis and gradient of", "examples", "a row, in gradients", "slowdown")
    table = _table(f"{name}: rows far apart", *columns)
    for every, ways in result["spaced"].items():
        table.add_section()
        for way, row in ways.items():
            examples = f"{max(row['examples']):,.0f}"
            cost = (f"{row['row_in_gradients']:.1f}", f"{row['slowdown']:.3g}")
            table.add_row(f"{every:,}", way, examples, *cost)
    return table


def _errors(result: dict[str, Any]) -> Table:
    title = f"What {result['draws']} samples tell {_bar(result['met'])}"
    columns = ("step", "share", "column", "truth", "mean", "deviation", "error", "told", "covered")
    table = _table(title, *columns)
    for row in result["rows"]:
        numbers = [row[key] for key in ("truth", "mean", "deviation", "error", "told", "covered")]
        shown = ["-" if number is None else f"{number:.3g}" for number in numbers]
        table.add_row(str(row["state"]), f"{row['share']:.0%}", row["column"], *shown)
    return table


def scaling(_: str, result: dict[str, Any]) -> Table:
    """Measured rows, exponents, and the model."""
    columns = ("P", "N", "k", "gradient s", "product s", "solve s", "products", "apply s")
    table = _table("How the costs grow (seconds)", *columns)
    costs = ("gradient", "product", "solve", "apply")
    for size, rows in [*result["measured"].items(), ("modelled", result["modelled"])]:
        table.add_section()
        for row in rows:
            gradient, product, solve, apply_ = (f"{row[cost]:.3g}" for cost in costs)
            count = str(row.get("solve_products", "modelled"))
            sizes = (f"{row['parameters']:,}", str(row["examples"]), str(row["k"]))
            table.add_row(*sizes, gradient, product, solve, count, apply_)
        if size in result["exponents"]:
            powers = [f"^{result['exponents'][size][cost]:.2f}" for cost in costs]
            table.add_row(f"grows with {size}", "", "", *powers[:3], "", powers[3])
    return table


def sampling(_: str, result: dict[str, Any]) -> Group:
    """How often the expected error covers the true one; and costs beside sizes."""
    return Group(_coverage(result["coverage"]), *map(_growth, result["growth"]))


def _coverage(result: dict[str, Any]) -> Table:
    columns = (
        "samples of",
        "drawn",
        "covered",
        "told",
        "covered",
        "told / true",
        "margin (needed)",
    )
    table = _table("True sines of bases of samples, beside what is expected", *columns)
    groups = {"": {f"all {_bar(result['met'])}": result["all"]}, **result["groups"]}
    for group, rows in groups.items():
        table.add_section()
        for name, row in rows.items():
            shares = (row["covered_told"], row["median_ratio"], row["margin"], row["margin_needed"])
            told, ratio, margin, needed = ("-" if v is None else f"{v:.3g}" for v in shares)
            counts = (str(row["samples"]), f"{row['covered']:.3f}", str(row["told"]))
            table.add_row(f"{group} {name}", *counts, told, ratio, f"{margin} ({needed})")
    return table


def _growth(result: dict[str, Any]) -> Table:
    columns = ("N", "sample", "examples", "CPU s", "gradients", "example-products", "sine", "told")
    table = _table(f"A basis at its first certificate: {result['title']}", *columns)
    for row in result["rows"]:
        table.add_row(
            f"{row['N']:,}",
            row["sample"] or "all",
            f"{row['examples']:,.0f}",
            f"{row['seconds']:.3g}",
            f"{row['gradients']:.3g}",
            f"{row['example_products']:,.0f}",
            f"{row['true_sine']:.2g}",
            f"{row['estimate']:.2g}",
        )
    for key, growth in result["growth"].items():
        if growth is not None:
            what = f"{key.replace('_', ' ')}: largest over smallest of the large sizes"
            table.add_row(what, "", "", f"{growth:.2f} {_bar(result['met'][key])}")
    return table


def drift(_: str, result: dict[str, Any]) -> Table:
    """How often a kept basis was not what it was said to be."""
    columns = (
        "trainings",
        "runs",
        "steps",
        "above",
        "kept beyond",
        "by",
        "told / true",
        "products",
    )
    table = _table("Kept bases beside dense Hessians, at every step of small trainings", *columns)
    groups = {"": {"all": result["all"]}, **result["groups"]}
    for group, rows in groups.items():
        table.add_section()
        for name, row in rows.items():
            shares = [
                "-" if row[key] is None else f"{row[key]:{form}} {_bar(row['met'][key])}"
                for key, form in (
                    ("above_estimate", ".2%"),
                    ("kept_beyond", ".2%"),
                    ("worst_excess", ".2g"),
                )
            ]
            ratio = row["median_estimate_over_true"]
            told = "-" if ratio is None else f"{ratio:.3g}"
            counts = (str(row["runs"]), f"{row['steps']:,}")
            table.add_row(f"{group} {name}", *counts, *shares, told, f"{row['products']:,}")
    return table


TABLES: Final[dict[str, Callable[[str, dict[str, Any]], RenderableType]]] = {
    "products": products,
    "cold": cold,
    "warm": warm,
    "runs": runs,
    "memory": memory,
    "synchronisations": synchronisations,
    "models": models,
    "estimates": estimates,
    "trajectories": trajectories,
    "observation": observation,
    "monitor": monitor,
    "apply": apply,
    "step": step,
    "small": small,
    "scaling": scaling,
    "sampling": sampling,
    "drift": drift,
}
