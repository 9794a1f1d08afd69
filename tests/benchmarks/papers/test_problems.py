"""The data of the reproductions: parts, labels and drawn clouds."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.data import Dataset, DataUnavailableError, load
from benchmarks.papers import problems
from benchmarks.papers.reproduction import Job


def made(per_class=(5, 3, 4)):
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(per_class)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    x = torch.arange(len(y), dtype=torch.float32)[:, None]
    return Dataset("made", x, y, x.clone(), y.clone(), len(per_class), "numbered")


def test_a_subset_has_the_first_of_each_class_in_order():
    data = made()
    part = problems.subset(data, 7, test=3)
    assert torch.bincount(part.y_train).tolist() == [3, 2, 2]
    assert torch.bincount(part.y_test).tolist() == [1, 1, 1]
    numbers = part.x_train.flatten().long()
    assert numbers.tolist() == sorted(numbers.tolist())
    assert data.y_train[numbers].tolist() == part.y_train.tolist()
    for c, count in enumerate((3, 2, 2)):
        first = torch.nonzero(data.y_train == c).flatten()[:count]
        assert set(first.tolist()) <= set(numbers.tolist())
    assert len(problems.subset(data, 100).y_train) == 12
    assert len(problems.subset(data, 7).y_test) == 12


def test_pooling_averages_and_keeps_flat_images_flat():
    digits = load("digits")
    small = problems.pooled(digits, 2)
    assert small.x_train.shape == (len(digits.x_train), 16)
    image, less = digits.x_train[3].view(8, 8), small.x_train[3].view(4, 4)
    assert float(less[1, 2]) == pytest.approx(float(image[2:4, 4:6].mean()), rel=1e-5)
    assert problems.pooled(digits, 1).x_train is digits.x_train


def test_centred_pixels_are_those_of_the_files_less_a_half():
    pixels = torch.randint(0, 256, (20, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    pixels[0, :, 0, 0], pixels[1, :, 0, 0] = 0, 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([90.0, 120, 60], [60.0, 30, 90]))
    standard = replace(made(), x_train=(pixels - mean) / deviation, x_test=None, y_test=None)
    torch.testing.assert_close(problems.centred(standard).x_train, pixels / 255 - 0.5)
    assert tuple(problems.centred(load("digits")).x_train.aminmax()) == (-0.5, 0.5)


def test_labels_can_be_joined_and_permuted():
    data = made()
    joined = problems.relabelled(data, torch.tensor([0, 1, 0]))
    assert joined.num_classes == 2
    assert joined.y_train.tolist() == [0 if c == 2 else int(c) for c in data.y_train]
    random = problems.randomly_labelled(data, Job(1))
    assert random.y_train.sort().values.tolist() == data.y_train.sort().values.tolist()
    assert random.y_train.tolist() != data.y_train.tolist()
    other = problems.randomly_labelled(data, Job(2))
    assert random.y_train.tolist() != other.y_train.tolist()
    assert random.y_test.tolist() == data.y_test.tolist()


def test_blobs_have_their_covariance_around_their_centres():
    clusters, examples = 4, 4000
    x, y = problems.blobs(clusters, examples, 50, covariance=0.25, job=Job(0))
    assert torch.bincount(y).tolist() == [1000] * 4
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, rel=1e-5)
    centres = torch.stack([x[y == c].mean(0) for c in range(clusters)])
    within = (x - centres[y]).var(unbiased=False)
    between = centres.var(unbiased=False)
    # Before the normalisation 0.25 and 1, the latter of 200 numbers: within 3 deviations.
    assert float(within / between) == pytest.approx(0.25, rel=3 * math.sqrt(2 / 200))


def test_the_sine_has_one_period_and_its_noise():
    x, y = problems.sine(4000, noise=0.1, job=Job(0))
    assert float(x.min()) == pytest.approx(-math.pi, abs=0.02)
    assert float(x.max()) == pytest.approx(math.pi, abs=0.02)
    noise = y - x.sin()
    assert float(noise.mean()) == pytest.approx(0, abs=3 * 0.1 / math.sqrt(4000))
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)


def test_real_data_are_parts_of_the_projects_data():
    data = problems.real("mnist-5k", Job(), 40)
    assert torch.bincount(data.y_train).tolist() == [4] * 10
    whole = load("mnist-5k")
    for row in data.x_train[:3]:
        assert (whole.x_train == row).all(dim=1).any()


def test_more_examples_than_there_are_are_refused():
    with pytest.raises(DataUnavailableError, match="6000 examples of 'mnist-5k' were asked for"):
        problems.real("mnist-5k", Job(), 6000)
