"""The networks of the benchmarks pass the proof that operators make at their first use."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.losses import LOSSES
from benchmarks.models import CNN, Transformer, mlp
from benchmarks.papers import networks

_WORDS = 9
MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(20, 10, width=16), (20,)),
    "cnn": (lambda: CNN((3, 8, 8), 10, width=4), (3, 8, 8)),
    "transformer": (lambda: Transformer(_WORDS, 6, 10, width=16, heads=2), (6,)),
    "fully_connected": (lambda: networks.fully_connected((20, 16, 10)), (20,)),
    "convnet": (lambda: networks.simple_convnet(16, 10, width=4, dense=8), (3, 16, 16)),
    "convnet, dropout and batch norm": (
        lambda: networks.simple_convnet(16, 10, width=4, dense=8, more=True),
        (3, 16, 16),
    ),
    "vgg11": (lambda: networks.vgg11(10, width=2), (3, 32, 32)),
    "resnet": (lambda: networks.resnet(10, (4, 8), 1), (3, 16, 16)),
    "resnet9": (lambda: networks.resnet9(10, width=2), (3, 32, 32)),
}


def batches(name: str, seed: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator, shape = torch.Generator().manual_seed(seed), (42, *MAKERS[name][1])
    x = torch.randn(shape, generator=generator, dtype=dtype)
    if name == "transformer":
        x = torch.randint(_WORDS, shape, generator=generator)
    x[:5] = 0  # blank images, on which units lie exactly at their kinks, or sentences
    y = torch.randint(10, (42,), generator=generator)
    return [(x[:26], y[:26]), (x[26:], y[26:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MAKERS)
def test_every_network_and_loss_is_proved_without_an_alarm(name, loss, dtype):
    make, _ = MAKERS[name]
    seed = sorted(MAKERS).index(name)
    torch.manual_seed(seed)
    net = make().to(dtype)
    operator = so.HessianOperator(net, LOSSES[loss], batches(name, seed, dtype))
    operator.matvec(torch.ones(operator.size, dtype=dtype))
    report = operator.check()
    assert report.passed, report
    assert report.product_error >= 0  # it was looked at
