"""What a claim takes from raw figures, and decides: cases made up by hand, one file a paper."""

from pathlib import Path

import pytest

from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.reading import _size, _toml
from tests.benchmarks.papers.tiny import claim_of

CASES = [
    (key, name, case)
    for key in PAPERS
    for name, cases in _toml(Path(__file__).parent / "cases" / f"{key}.toml")["cases"].items()
    for case in cases
]


@pytest.mark.parametrize(("key", "name", "case"), CASES)
def test_a_claim_takes_its_figure_and_decides(key, name, case):
    claim = claim_of(PAPERS[key], name)
    figure = claim.measure(_size(case["raw"], {}))
    assert figure == pytest.approx(case["figure"], abs=1e-6, nan_ok=True)
    assert claim.holds(figure) is case["holds"]
