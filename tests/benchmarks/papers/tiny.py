"""Every run of every paper at a size that takes a second or less."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.data import Dataset
from benchmarks.papers import problems
from benchmarks.papers.catalogue import PAPERS
from benchmarks.papers.gur_ari_2018.cases import CASES
from benchmarks.papers.raw_files import RawFiles, measure
from benchmarks.papers.reading import _size, _toml
from benchmarks.papers.reproduction import Job

TINY = _toml(Path(__file__).with_name("tiny.toml"))


def size(key, name):
    """The arguments of a run at its tiny size."""
    small, of_paper = PAPERS[key].run(name).size("small"), TINY[key]
    tiny = _size(name if name in of_paper else "usual", of_paper)
    return small | {n: v for n, v in tiny.items() if key != "song_2024" or n in small}


def claim_of(paper, name):
    """A claim by its name."""
    return next(claim for claim in paper.claims if claim.name == name)


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
        for case in CASES.values():  # a ConvNet takes seconds, and an FC network does not
            patch.setitem(case, "model", "fc" if "convnet" in case["model"] else case["model"])
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
