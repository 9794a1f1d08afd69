"""The rows of Table 1 of `gur_ari_2018`: what is trained, and what the paper found."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True)
class Case:
    """A row of Table 1.

    Attributes:
        dataset: as the table has it.
        network: as the table has it.
        comment: as the table has it.
        paper: its mean overlap.
        model: as of ``build``.
        random_labels: whether the labels of the training data are permuted.
        lr: η.
        batch_size: of the minibatches.
        adam: in the place of SGD.
    """

    dataset: str
    network: str
    comment: str
    paper: float
    model: str = "fc"
    random_labels: bool = False
    lr: float = 0.1
    batch_size: int = 64
    adam: bool = False


CASES: Final = {
    name: Case(**row)
    for name, row in tomllib.loads(
        Path(__file__).with_name("cases.toml").read_text("utf-8")
    ).items()
}
"""By the names of their runs."""
