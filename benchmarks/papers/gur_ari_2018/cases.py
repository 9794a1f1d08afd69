"""The rows of Table 1 of `gur_ari_2018`: what is trained, and what the paper found."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

CASES: Final[dict[str, dict[str, Any]]] = tomllib.loads(
    Path(__file__).with_name("cases.toml").read_text("utf-8")
)
"""By the names of their runs."""
