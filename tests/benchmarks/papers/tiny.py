"""Every run of every paper at a size that takes a second or less."""

import functools
from dataclasses import replace

import pytest
import torch

from benchmarks.data import Dataset
from benchmarks.papers import problems
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.gur_ari_2018.cases import CASES
from benchmarks.papers.raw_files import RawFiles, measure
from benchmarks.papers.reproduction import Job

# Networks are trained for 100 steps before claims look at them; k is 10, as dimensions go to 20.
_FC = {"data": "digits", "model": "fc", "width": 3, "examples": 60, "test": 20, "factor": 2}
_FC |= {"bases_at": (0, 100, 101), "steps": 101, "every": 101, "tol": 1e-2}
_FC_ALL = _FC | {"dimensions": (2, 5, 9, 10, 11, 15, 20)}
_ROW = {"data": "digits", "width": 6, "examples": 40, "test": 20, "factor": 1}
_ROW |= {"steps": 6, "last": 4, "every": 2, "f_top_at": (0, 6)}
_SPECTRUM = {"data": "digits", "factor": 2, "width": 5, "examples": 200, "epochs": 2}
_MIXTURE = {"classes": (2, 3), "dimension": 12, "per_class": 4, "steps": 50, "records": 4}
_EDGE = {"classes": 4, "dimension": 8, "examples": 64, "width": 5, "steps": 10, "pairs": 12}
_GUR_ARI = {
    "fc": _FC_ALL | {"bases_at": (0, 50, 100, 101), "anatomy_at": (0, 50, 100, 101)},
    "fc-five": _FC,
    "convnet": _FC,
    "resnet": _FC_ALL,
    "convnet-random": _ROW | {"f_top_at": ()},
    "convnet-dropout": _ROW | {"f_top_at": ()},
    "regression": {n: v for n, v in _ROW.items() if n != "f_top_at"} | {"data": "sine"},
    "right-edge": _EDGE | {"realisations": 2},
    "two-samples": {"dimension": 10, "steps": 300},
    "mixture": _MIXTURE,
    "newton": {"data": "digits", "width": 6, "examples": 90, "factor": 1, "warmup": 5, "steps": 4},
}

_CLUSTERS = {"examples": 60, "inputs": 10, "hidden": 5, "clusters": (2, 3, 4, 5, 6), "steps": 10}
_DIGITS = {"data": "digits", "pool": 2, "examples": 40}
_PARTS = _DIGITS | {"hidden": 2, "at": (0, 10), "tol": 1e-2}
_IMAGES = _DIGITS | {"pool": 1, "widths": (2,), "large": 20, "small": 5, "steps": 10}
_SAGUN = {
    "gd-tanh": _CLUSTERS,
    "gd-relu": _CLUSTERS,
    "sgd-relu": _CLUSTERS,
    "growth": _DIGITS | {"widths": (4, 6, 9), "exact": 250, "target": 1.0, "most": 200},
    "batches": _IMAGES,
    "phases": _IMAGES | {"test": 20, "dense": (8,), "every": 5},
    "parts-mnist": _PARTS,
    "parts-clusters": _PARTS | {"data": None},
    "trivial": _DIGITS | {"examples": (8,), "hidden": 5, "steps": 20},
    "white": {"parameters": 60},
    "spiked": {"parameters": 60, "draws": 2},
}

_PART = {"data": "mnist-5k", "examples": 40, "validation": 20}
_RATES = _PART | {"width": 1, "batch_size": 20, "rates": (0.1,), "epochs": 2}
_SIZES = _PART | {"batch_sizes": (20, 99), "steps": 6, "records": 3}
_CLASSES = _PART | {"batch_size": 20, "epochs": 2, "snapshots": 2, "curvatures": 2, "probes": 2}
_CLASS_GRADIENTS = {
    "class-gradients": _CLASSES | {"eigenvalues": 12, "tol": 0.1},
    "cost-cnn": {"batch_size": 10},
    "cost-resnet9": {"width": 1, "batch_size": 10},
}

_SONG = {"examples": 24, "last_switch": 4, "look": 2, "measure": 2, "spectrum": 2, "pool": 1}
_SONG |= {"sgd_first": 10, "gd_first": 10, "after": 3, "every": 2, "switch": 8, "steps": 4}
_SONG |= {"chunk": 12, "width": 4, "model": "mlp"}  # those that differ in the model are one


def size(key, name):
    """The arguments of a run at its tiny size."""
    small = PAPERS[key].run(name).size("small")
    if key == "song_2024":
        return small if name == "toy" else small | {n: v for n, v in _SONG.items() if n in small}
    usual = {"gur_ari_2018": _ROW, "sagun_2017": {}, "class_gradient_2020": _RATES}[key]
    if name.startswith("spectrum"):
        usual = _SPECTRUM
    if name.startswith("batch-sizes"):
        usual = _SIZES
    tiny = _GUR_ARI | _SAGUN | _CLASS_GRADIENTS
    return small | tiny.get(name, usual)


def clouds(name, _job, examples, test=None):
    """Three classes that lie apart, in the shape of the data set of that name."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(examples) % 3
    if name == "sst2-1k":
        x = torch.randint(2, 9, (examples, 5), generator=generator)
        return Dataset(name, x, y % 2, None, None, 2, "words", vocabulary=9)
    shape = (36,) if name == "mnist-5k" else (3, 32, 32)
    x = torch.randn(examples, *shape, generator=generator) + y.view(-1, *[1] * len(shape))
    return Dataset(name, x, y, None, None, 3, "clouds")


def measured(key, name, folder, seed=0, **other):
    """The raw figures of a run, as they come back from their file."""
    run = replace(PAPERS[key].run(name), small=size(key, name) | other)
    files = RawFiles(folder)
    with pytest.MonkeyPatch.context() as patch:
        if key == "song_2024":
            patch.setattr(problems, "real", clouds)
        for case, of in CASES.items():  # a ConvNet takes seconds, and an FC network does not
            patch.setitem(
                CASES, case, replace(of, model="fc" if "convnet" in of.model else of.model)
            )
        files.write(measure(PAPERS[key], run, "small", Job(seed)))
    return files.read(key, run, "small", seed).raw


def measurer(folder):
    """A function of paper and run that measures once what is measured alike."""

    @functools.cache
    def once(key, name):
        return measured(key, name, folder)

    def of(key, name):
        run = PAPERS[key].run(name)
        same = (each.name for each in PAPERS[key].runs if each.measure is run.measure)
        return once(key, next(each for each in same if kind(key, each) == kind(key, name)))

    return of


def kind(key, name):
    """What tells a tiny run from others: how exactly and how fast does not."""
    alike = ("tol", "lr", "adam_lr", "pool", "chunk") if key == "song_2024" else ()
    return {name: value for name, value in size(key, name).items() if name not in alike}
