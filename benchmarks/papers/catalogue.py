"""The papers that are reproduced, by their keys."""

from __future__ import annotations

from typing import Final

from benchmarks.papers import class_gradient_2020, gur_ari_2018, sagun_2017, song_2024
from benchmarks.papers.reproduction import Paper

PAPERS: Final[dict[str, Paper]] = {
    paper.key: paper
    for paper in (
        song_2024.PAPER,
        gur_ari_2018.PAPER,
        sagun_2017.PAPER,
        class_gradient_2020.PAPER,
    )
}
