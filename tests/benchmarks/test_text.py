"""Windows of running text: what follows what, and where it is from."""

import pytest
import torch
from datasets import Dataset

from benchmarks import text
from benchmarks.data import DataUnavailableError


@pytest.fixture
def sentences(monkeypatch):
    """Two sentences, which are eight tokens with their ends."""
    table = {"sentence": ["A b A c", "d b"], "label": [0, 1]}
    monkeypatch.setattr(text, "splits_of", lambda *_: {"train": Dataset.from_dict(table)})


def test_windows_are_cut_from_sentences_one_after_the_other(sentences):
    found = text.windows("here", count=9, length=3, vocabulary=5)
    # a b a c END d b END, with ids from 2 on in the order of appearance: d comes too late.
    assert found.tokens.tolist() == [[2, 3, 2], [4, 0, 1]]
    assert found.following.tolist() == [[3, 2, 4], [0, 1, 3]]
    assert found.source == "SST-2, training sentences"
    assert len(text.windows("here", count=1, length=3, vocabulary=5).tokens) == 1


def test_text_is_drawn_where_there_are_no_data(monkeypatch):
    def nothing(*_):
        raise DataUnavailableError("none here")

    monkeypatch.setattr(text, "splits_of", nothing)
    found, again = (text.windows(count=40, length=10, vocabulary=50) for _ in range(2))
    assert "drawn" in found.source
    assert torch.equal(found.tokens, again.tokens)
    assert found.tokens.shape == (40, 10)
    assert torch.equal(found.tokens.flatten()[1:], found.following.flatten()[:-1])
    assert 0 <= found.tokens.min() <= found.tokens.max() < 50
    # Half of the tokens follow from those before: more than chance by far.
    follows = (31 * found.tokens + 7) % 50 == found.following
    assert 0.4 < follows.double().mean() < 0.7
