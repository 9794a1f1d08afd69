"""What is measured for Table 1 and Figure 12 of `gur_ari_2018`, by the sizes of `runs.toml`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from benchmarks.losses import cross_entropy
from benchmarks.papers import problems
from benchmarks.papers.gur_ari_2018.cases import CASES
from benchmarks.papers.gur_ari_2018.measures import (
    Mode,
    build,
    cheap,
    exchanged,
    f_top,
    half_square,
    images,
    mean_overlap,
    of_all_labels,
    of_test,
    overlap_of,
    whole_hessian,
)
from benchmarks.papers.networks import fully_connected, made
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, column, performance, train

_MANY: Final = 64  # random vectors, where the network is small


def table_row(
    job: Job,
    *,
    case: str,
    data: str,
    width: int,
    examples: int,
    test: int,
    factor: int,
    steps: int,
    last: int,
    every: int,
    f_top_at: Sequence[int] = (),
    start: str = "torch",
    mode: Mode | None = None,
    unlabelled: bool = False,
) -> Raw:
    """Measures a row of Table 1 on images, and f_top along the way (Figure 12).

    Where labels are random, those for testing are permuted as well, and the overlap with their own
    is measured beside; and if ``unlabelled`` that of the test set with every label for each image.

    Returns:
        The overlaps on both sets, their means, and f_top.
    """
    row_of = CASES[case]
    part = images(job, data, examples, test, factor)
    true = part
    if row_of["random_labels"]:
        part = exchanged(problems.randomly_labelled(part, job))
        part = exchanged(problems.randomly_labelled(part, job))
    network = build(job, row_of["model"], part, width, start)
    problem = Problem(network, cross_entropy, part.x_train, part.y_train)
    hessian, tested = whole_hessian(problem, mode), of_test(network, part, mode)
    own = of_test(network, true, mode) if row_of["random_labels"] else None
    none = of_test(network, part, mode, of_all_labels) if unlabelled else None

    def record(step: int) -> Row:
        row: Row = {}
        if step % every == 0:
            row |= {"at": step} | cheap(hessian, tested)
            row |= {} if own is None else {"overlap_own": overlap_of(own)}
            row |= {} if none is None else {"overlap_unlabelled": overlap_of(none)}
        if step in f_top_at:
            row |= {"saved": step, "f_top": f_top(hessian, part.num_classes)}
        return row

    due = {*range(0, steps + 1, every), *f_top_at}.__contains__
    rows = _trained(job, case, problem, steps, record, due)
    raw = _means(case, rows, steps - last)
    return raw | {"accuracy": performance(network, problem.x, problem.y)["accuracy"]}


def regression(
    job: Job,
    *,
    width: int,
    hidden: int,
    examples: int,
    test: int,
    steps: int,
    last: int,
    every: int,
) -> Raw:
    """Measures the row of the regression, or the same of a network without hidden layers.

    Returns:
        As of the other rows; and the mean overlap of random vectors of the whole space at the end.
    """
    case = "regression"
    network = made(job, lambda: fully_connected((1, *[width] * hidden, 1)))
    problem = Problem(network, half_square, *problems.sine(examples, noise=0.1, job=job))
    unseen = problems.sine(test, noise=0.1, job=replace(job, seed=job.seed + 1_000_000))
    hessian = whole_hessian(problem)
    tested = whole_hessian(Problem(network, half_square, *unseen))

    def record(step: int) -> Row:
        return {"at": step} | cheap(hessian, tested)

    rows = _trained(job, case, problem, steps, record, lambda step: step % every == 0)
    vectors = torch.randn(_MANY, hessian.size, generator=job.generator())
    raw = _means(case, rows, steps - last) | {"accuracy": math.nan}
    return raw | {"random": mean_overlap(hessian, vectors.to(job.device))}


def _trained(
    job: Job,
    case: str,
    problem: Problem,
    steps: int,
    record: Callable[[int], Row],
    every: Callable[[int], bool],
) -> list[Row]:
    """Trains as a row of the table says."""
    row_of = CASES[case]
    kind = torch.optim.Adam if row_of["adam"] else torch.optim.SGD
    optimizer, size = kind(problem.model.parameters(), lr=row_of["lr"]), row_of["batch_size"]
    return train(
        job, case, problem, optimizer, steps=steps, batch_size=size, record=record, every=every
    )


def _means(case: str, rows: Sequence[Row], first: int) -> Raw:
    """The series, and means of the overlaps from a step on."""
    overlaps = ("overlap", "overlap_test", "overlap_own", "overlap_unlabelled")
    names = ("at", "loss", *overlaps, "saved", "f_top")
    raw: Raw = {"case": case} | {name: column(rows, name) for name in names}
    late = [i for i, step in enumerate(raw["at"]) if step >= first]
    for name in overlaps:
        if raw[name]:
            raw[f"mean_{name}"] = float(np.mean([raw[name][i] for i in late]))
    return raw
