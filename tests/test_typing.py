"""What type checkers accept is what works: the sample that ``make types`` checks also runs."""

import runpy
from pathlib import Path


def test_the_sample_of_a_typed_user_runs():
    names = runpy.run_path(str(Path(__file__).parent / "typing" / "user.py"))
    assert names["monitor"].history["step"]
