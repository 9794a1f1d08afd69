"""The gallery measures what its pictures show; one that fails does not take others along."""

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import gallery
from benchmarks.data import Dataset


@pytest.fixture(scope="module")
def made():
    """Three classes that lie apart, so that there are directions of large curvature."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat_interleave(8)
    x = torch.randn(24, 6, generator=generator) + 3 * torch.eye(3, 6)[y]
    data = Dataset("small", x, y, None, None, 3, "three clouds")
    return gallery.Measurements(data, rows=3)


@pytest.mark.slow
def test_every_picture_is_measured_and_drawn_in_both_themes(made, tmp_path):
    drawn = dict(gallery.draw(made, list(gallery.PICTURES), tmp_path / "new", ["png"]))
    assert list(drawn) == list(gallery.PICTURES)
    for name, files in drawn.items():
        assert not isinstance(files, Exception), files
        assert [file.name for file in files] == [f"{name}.png", f"{name}-dark.png"]
        light, dark = (file.read_bytes() for file in files)
        assert light.startswith(b"\x89PNG")
        assert dark.startswith(b"\x89PNG")
        assert light != dark


@pytest.mark.slow
def test_runs_are_recorded_at_equal_distances(made):
    assert made.sgd.history["step"] == [0, 25, 50]
    assert len(made.sgd.bases) == 3
    # The bases are those of the rows: of the parameters before the step.
    values = [basis.eigenvalues.tolist() for basis in made.sgd.bases]
    # (Those of the rows are of the solve that finds the next k too.)
    assert values == [pytest.approx(row, rel=1e-4) for row in made.sgd.history["eigenvalues"]]
    assert [len(row) for row in made.sgd.history["next_eigenvalues"]] == [1, 1, 1]
    for history in made.rates.values():
        assert history["step"] == [0, 6]
    # On the full gradient both effective rates of gradient descent are its rate.
    for column in ("dom_lr", "bulk_lr"):
        assert made.rates["GD"][column] == pytest.approx([0.02] * 2, rel=1e-2)


def test_a_picture_that_fails_is_reported_and_the_others_are_drawn(monkeypatch, tmp_path, capfd):
    def broken(_):
        raise ZeroDivisionError("no gap")

    def simple(_):
        return lambda theme: Figure(facecolor={"light": "white", "dark": "black"}[theme])

    pictures = {"first": simple, "second": broken, "third": simple}
    monkeypatch.setattr(gallery, "PICTURES", pictures)
    arguments = ["--data", "digits", "--output", str(tmp_path), "--format", "svg", "pdf"]
    assert gallery.main(arguments) == 1
    shown = capfd.readouterr()
    assert "second failed" in shown.out
    assert "no gap" in shown.err
    stems = ("first", "first-dark", "third", "third-dark")
    expected = {f"{stem}.{ending}" for stem in stems for ending in ("svg", "pdf")}
    assert {file.name for file in tmp_path.iterdir()} == expected
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert gallery.main(["third", *arguments]) == 0
    assert "Date" not in (tmp_path / "third.svg").read_text()
    assert (tmp_path / "third.pdf").read_bytes() == before["third.pdf"]


@pytest.mark.parametrize("arguments", [["nothing"], ["--rows", "0"], ["--format", "gif"]])
def test_what_cannot_be_drawn_is_refused(arguments, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        gallery.main([*arguments, "--output", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert not (tmp_path / "none").exists()
