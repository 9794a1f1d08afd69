"""The architectures: their sizes from the literature, and that they train twice differentiably."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks.papers import networks
from benchmarks.papers.reproduction import Job


def size(net):
    return sum(p.numel() for p in net.parameters())


def convolution(inputs, outputs, kernel=3, *, bias=True, norm=False):
    return inputs * outputs * kernel**2 + bias * outputs + norm * 2 * outputs


def test_fully_connected_counts_its_layers():
    net = networks.fully_connected((784, 100, 100, 10), nn.Tanh)
    assert size(net) == 785 * 100 + 101 * 100 + 101 * 10
    assert [type(layer) for layer in net[1:]] == [nn.Linear, nn.Tanh] * 2 + [nn.Linear]


def test_lenet_halves_its_images_and_with_padding_no_more():
    net = networks.lenet(14, 1, (4, 8), (10,), padding=2)
    assert net(torch.zeros(3, 1, 14, 14)).shape == (3, 10)
    assert size(net) == convolution(1, 4, 5) + convolution(4, 8, 5) + 10 * (8 * 3 * 3 + 1)
    # The small CNN of `class_gradient_2020`, of which the paper counts 60k.
    assert size(networks.lenet(32, 3, (6, 16), (120, 84, 10), padding=0)) == 62_006


def test_simple_convnet_is_keras_example():
    # 1,250,858 parameters, as Keras reports for its CIFAR-10 example.
    assert size(networks.simple_convnet(32, 10)) == 1_250_858
    plain = networks.simple_convnet(16, 10, width=4, dense=8)
    kinds = {type(layer) for layer in plain}
    assert nn.Dropout not in kinds
    assert nn.BatchNorm2d not in kinds
    more = networks.simple_convnet(16, 10, width=4, dense=8, more=True)
    # Two numbers for each of 4 + 4 + 8 + 8 channels, and a dense layer of 8.
    assert size(more) == size(plain) + 2 * 24 + 9 * 8
    assert sum(isinstance(layer, nn.Dropout) for layer in more) == 4


def test_vgg11_has_eight_convolutions():
    net = networks.vgg11(10)
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    pairs = pairwise(widths)
    assert size(net) == sum(convolution(*pair) for pair in pairs) + 513 * 10


def test_resnets_have_the_sizes_of_the_literature():
    # ResNet-18 for CIFAR: 11.17M; its layers one by one would be the code again.
    assert size(networks.resnet(10, (64, 128, 256, 512), 2)) == 11_173_962
    # ResNet8: six convolutions in blocks, the first, two shortcuts, the head.
    eight = networks.resnet(10, (16, 32, 64), 1)
    convolutions = [m for m in eight.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 6 + 2
    assert size(networks.resnet9(10)) == 6_573_130


@pytest.mark.parametrize(
    "make",
    [
        lambda: networks.fully_connected((48, 5, 3)),
        lambda: networks.vgg11(3, width=2),
        lambda: networks.resnet(3, (2, 4), 1),
        lambda: networks.resnet9(3, width=2),
    ],
)
def test_models_are_drawn_from_the_seed_and_leave_the_random_state(make):
    before = torch.get_rng_state()
    first, same, other = (networks.made(Job(seed), make) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(first.parameters(), other.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_sentences_by_length_have_the_scores_of_the_model_and_less_padding():
    class Seen(nn.Module):
        shapes = ()

        def forward(self, tokens):
            self.shapes += (tuple(tokens.shape),)
            return torch.stack([tokens.sum(1), (tokens != 0).sum(1)], dim=1)

    lengths = torch.tensor([3, 1, 6, 0, 2])
    tokens = torch.randint(1, 9, (5, 6)) * (torch.arange(6) < lengths[:, None])
    model = Seen()
    scores = networks.ByLength(model, together=2)(tokens)
    assert torch.equal(scores, Seen()(tokens))
    assert model.shapes == ((2, 1), (2, 3), (1, 6))


def test_a_network_without_norm_has_the_same_other_layers():
    whole, plain = (
        networks.resnet9(10, width=1),
        networks.without_norm(networks.resnet9(10, width=1)),
    )
    kinds = [[type(layer) for layer in model.modules()] for model in (whole, plain)]
    assert nn.BatchNorm2d not in kinds[1]
    assert kinds[1] == [nn.Identity if kind is nn.BatchNorm2d else kind for kind in kinds[0]]
    assert plain(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
