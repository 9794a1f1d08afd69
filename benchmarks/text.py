"""Running text for language models: windows of tokens, and the tokens that follow them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from benchmarks.data import (
    PADDING,
    ROOT_VARIABLE,
    UNKNOWN,
    DataUnavailableError,
    sentences_of,
    splits_of,
    vocabulary_of,
)

END: Final = PADDING
"""The token after each sentence: there is no padding in running text."""


class Windows(NamedTuple):
    """Text cut into windows of one length.

    Attributes:
        tokens: ids, ``(N, T)``.
        following: the id after each, ``(N, T)``.
        vocabulary: how many ids there are.
        source: where the text is from, in words.
    """

    tokens: Tensor
    following: Tensor
    vocabulary: int
    source: str


def windows(
    root: str | None = None, *, count: int, length: int = 32, vocabulary: int = 4000
) -> Windows:
    """Returns the first windows of SST-2's training sentences, or of drawn text without them.

    Sentences are lower-cased, split at whitespace and joined, an end after each. The ids of words
    are in the order of their first appearance; those that come too late for an id are unknown.

    Args:
        root: folder of the data sets, as ``benchmarks.data.load`` has it.
        count: windows wanted; fewer where the text ends before.
        length: tokens of a window.
        vocabulary: ids, that of the end and that of unknown words included.

    Returns:
        The windows.
    """
    root = root if root is not None else os.environ.get(ROOT_VARIABLE) or None
    try:
        splits = splits_of("sst2-1k", None if root is None else Path(root))
        sentences, _ = sentences_of("sst2-1k", splits["train"])
    except (DataUnavailableError, ImportError):
        text, source = _drawn(count * length + 1, vocabulary), "drawn text, no data at hand"
    else:
        text, source = _joined(sentences, vocabulary), "SST-2, training sentences"
    whole = min(count, (len(text) - 1) // length)
    used = whole * length
    return Windows(
        text[:used].view(whole, length),
        text[1 : used + 1].view(whole, length),
        vocabulary,
        source,
    )


def _joined(sentences: Sequence[Sequence[str]], vocabulary: int) -> Tensor:
    """One text of all sentences, as ids."""
    known = {word: n for word, n in vocabulary_of(sentences).items() if n < vocabulary}
    ids: list[int] = []
    for sentence in sentences:
        ids += [*(known.get(word, UNKNOWN) for word in sentence), END]
    return torch.tensor(ids, dtype=torch.int64)


def _drawn(tokens: int, vocabulary: int) -> Tensor:
    """Text of Zipf's law in which half of the words decide the next: there is something to learn.

    The same text at each call.
    """
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    ids = torch.multinomial(1 / ranks, tokens, replacement=True, generator=generator)
    decided = torch.rand(tokens, generator=generator) < 0.5
    # 31 is odd, and so prime to any power of two; what matters is one word after each.
    for i in range(1, tokens):
        if decided[i]:
            ids[i] = (31 * ids[i - 1] + 7) % vocabulary
    return ids
