"""The papers that are reproduced, by their keys."""

from __future__ import annotations

from typing import Final

from benchmarks.papers.reading import read
from benchmarks.papers.reproduction import Paper

PAPERS: Final[dict[str, Paper]] = {
    key: read(key) for key in ("song_2024", "gur_ari_2018", "sagun_2017", "class_gradient_2020")
}
