"""The architectures against other implementations and closed-form counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.data import DATASETS, Dataset
from benchmarks.losses import LOSSES
from benchmarks.models import CNN, DEFAULT_MODEL, FITS, MODELS, Transformer, build, default_lr, mlp
from tests.benchmarks.torchs_layers import torchs_layer

SHAPES = {
    "mnist-5k": (784,),
    "mnist": (784,),
    "digits": (64,),
    "cifar10-5k": (3, 32, 32),
    "cifar10": (3, 32, 32),
    "sst2-1k": (9,),
}
VOCABULARY = 23


def make_data(name: str, rows: int = 4) -> Dataset:
    """A few random examples in the shape of a data set; the sentences have different lengths."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, *SHAPES[name])
    text = name == "sst2-1k"
    inputs = torch.randn(shape, generator=generator)
    if text:
        inputs = torch.randint(1, VOCABULARY, shape, generator=generator)
        for row in range(rows):
            inputs[row, SHAPES[name][0] - 2 * row :] = 0
    labels = torch.randint(0, 2, (rows,), generator=generator)
    vocabulary = VOCABULARY if text else None
    return Dataset(name, inputs, labels, None, None, 2, "random", vocabulary)


PAIRS = [(model, data) for model in MODELS for data in DATASETS]
FITTING = [(model, data) for model, data in PAIRS if data in FITS[model]]
MISFITS = [pair for pair in PAIRS if pair not in FITTING]


# --- sizes and pairings ------------------------------------------------------------------------


def mlp_size(inputs: int, outputs: int) -> int:
    """in-200-200-out, each layer with a bias."""
    return (inputs + 1) * 200 + 201 * 200 + 201 * outputs


def cnn_size(channels: int, pixels: int, outputs: int) -> int:
    """Two 3x3 convolutions of 32, and a linear layer on 32 maps of a sixteenth of the pixels."""
    return (9 * channels + 1) * 32 + (9 * 32 + 1) * 32 + (32 * pixels // 16 + 1) * outputs


def transformer_size(vocabulary: int, length: int, outputs: int) -> int:
    """Embeddings; a layer: 4 d^2 of attention, 8 d^2 of feed-forward, biases, two norms."""
    d = 64
    layer = (4 * d * d + 4 * d) + (8 * d * d + 4 * d + d) + 2 * 2 * d
    return (vocabulary + length) * d + 2 * layer + 2 * d + (d + 1) * outputs


SIZES = {
    ("mlp", "digits"): mlp_size(64, 7),
    ("mlp", "cifar10-5k"): mlp_size(3 * 32 * 32, 7),
    ("cnn", "cifar10-5k"): cnn_size(3, 32 * 32, 7),
    ("cnn", "mnist-5k"): cnn_size(1, 784 - 784 % 16, 7),
    ("transformer", "sst2-1k"): transformer_size(VOCABULARY, 9, 7),
}


@pytest.mark.parametrize(("model", "data"), SIZES)
def test_parameters_and_output_shape(model: str, data: str) -> None:
    """A model has the parameters of its architecture and one row an example."""
    dataset = make_data(data)
    module = build(model, dataset, num_outputs=7, seed=0)
    assert sum(p.numel() for p in module.parameters()) == SIZES[model, data]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())
    assert module(dataset.x_train).shape == (4, 7)


@pytest.mark.parametrize(("model", "data"), MISFITS)
def test_wrong_pairing(model: str, data: str) -> None:
    """A pairing that does not fit names both, what the model fits, and a model that does."""
    with pytest.raises(ValueError, match=f"{model!r} does not take {data!r}") as info:
        build(model, make_data(data), num_outputs=2, seed=0)
    assert f"it fits {', '.join(FITS[model])};" in str(info.value)
    assert str(info.value).endswith(f"fits {', '.join(m for m in MODELS if data in FITS[m])}")


def test_every_data_set_has_a_default_model_that_fits() -> None:
    """The defaults cover the data sets, and none of them is a wrong pairing."""
    assert sorted(DEFAULT_MODEL) == sorted(DATASETS)
    assert all((model, data) in FITTING for data, model in DEFAULT_MODEL.items())


def test_an_unknown_model_is_told() -> None:
    """It is named, with what is allowed."""
    with pytest.raises(ValueError, match="unknown model 'resnet': allowed are mlp, cnn, trans"):
        build("resnet", make_data("digits"), num_outputs=2, seed=0)


def test_learning_rates_of_the_paper() -> None:
    """Appendix E.3: only the MLP on MNIST has another rate under cross-entropy."""
    papers = ("mnist-5k", "cifar10-5k", "sst2-1k")
    assert [default_lr(data, "mse") for data in papers] == [0.01, 0.001, 0.001]
    assert [default_lr(data, "ce") for data in papers] == [0.1, 0.001, 0.001]
    for data in DATASETS:
        for loss in LOSSES:
            assert default_lr(data, loss) > 0


# --- initialisation ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_seed_alone_decides(model: str) -> None:
    """Same seed, same parameters, whatever was drawn before; and no random state moves."""
    dataset = make_data(FITS[model][0])
    before = torch.get_rng_state()
    first = build(model, dataset, num_outputs=3, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(17)
    again = build(model, dataset, num_outputs=3, seed=5).state_dict()
    other = build(model, dataset, num_outputs=3, seed=6).state_dict()
    assert list(first) == list(again)
    assert all(torch.equal(first[key], again[key]) for key in first)
    weights = [key for key in first if first[key].unique().numel() > 1]  # not a norm's ones
    assert weights
    assert not any(torch.equal(first[key], other[key]) for key in weights)


def test_initialisation_is_what_manual_seed_gives() -> None:
    """The seed means what it means to torch: the layers built in order after `manual_seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Linear(64, 200), nn.Linear(200, 200), nn.Linear(200, 10)]
    expected = [p for layer in layers for p in layer.parameters()]
    actual = list(build("mlp", make_data("digits"), num_outputs=10, seed=3).parameters())
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# --- what they compute -------------------------------------------------------------------------


def test_mlp_formula() -> None:
    """The MLP of flattened inputs, written out with its own weights."""
    module = mlp(12, 3).double()
    w1, b1, w2, b2, w3, b3 = module.parameters()
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    hidden = (torch.tanh(x.reshape(5, 12) @ w1.T + b1) @ w2.T + b2).tanh()
    torch.testing.assert_close(module(x), hidden @ w3.T + b3)


def convolve(images: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with padding 1 as a sum of nine shifted products."""
    height, width = images.shape[-2:]
    padded = torch.zeros(*images.shape[:2], height + 2, width + 2, dtype=images.dtype)
    padded[..., 1:-1, 1:-1] = images
    total = bias[:, None, None]
    for i in range(3):
        for j in range(3):
            shifted = padded[..., i : i + height, j : j + width]
            total = total + torch.einsum("nchw,oc->nohw", shifted, kernel[..., i, j])
    return total


def pool(maps: Tensor) -> Tensor:
    """2x2 max pooling that drops an odd last row or column."""
    height, width = maps.shape[-2] // 2, maps.shape[-1] // 2
    blocks = maps[..., : 2 * height, : 2 * width]
    return blocks.reshape(*maps.shape[:2], height, 2, width, 2).amax(dim=(-3, -1))


@pytest.mark.parametrize("flat", [False, True])
def test_cnn_formula(flat: bool) -> None:
    """The CNN written out with its own weights, on odd sizes, flat or not."""
    module = CNN((2, 9, 6), 3).double()
    k1, b1, k2, b2, w, b = module.parameters()
    x = torch.randn(4, 2, 9, 6, dtype=torch.float64)
    hidden = pool(convolve(x, k1, b1).clamp(min=0))
    hidden = pool(convolve(hidden, k2, b2).clamp(min=0))
    torch.testing.assert_close(module(x.flatten(1) if flat else x), hidden.flatten(1) @ w.T + b)


def test_transformer_against_torchs_encoder() -> None:
    """The transformer equals torch's pre-norm encoder layers, then a norm, a mean, the head."""
    torch.manual_seed(0)
    module = Transformer(VOCABULARY, 9, 3).double()
    for parameter in module.parameters():  # norms and biases start at 1 and 0: hide no mistake
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens = make_data("sst2-1k").x_train
    hidden = module.tokens.weight[tokens] + module.positions.weight[: tokens.shape[1]]
    for ours in module.layers:
        hidden = torchs_layer(ours)(hidden, src_key_padding_mask=tokens == 0)
    hidden = module.norm(hidden)
    means = [row[: int((t != 0).sum())].mean(0) for row, t in zip(hidden, tokens, strict=True)]
    torch.testing.assert_close(module(tokens), module.head(torch.stack(means)))


def test_a_sentence_of_padding() -> None:
    """Nothing to read gives the head's bias, finite gradients, and no trace in other rows."""
    module = Transformer(VOCABULARY, 9, 3)
    tokens = make_data("sst2-1k").x_train
    blank = torch.cat([tokens, torch.zeros(1, 9, dtype=torch.int64)])
    with sdpa_kernel(SDPBackend.MATH):
        scores = module(blank)
        torch.testing.assert_close(scores[-1], module.head.bias)
        torch.testing.assert_close(scores[:-1], module(tokens))
        gradients = torch.autograd.grad(scores.square().sum(), list(module.parameters()))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0].any(dim=1).nonzero().flatten().tolist() == sorted(
        set(tokens.unique().tolist()) - {0}  # every word that occurs has a gradient, padding none
    )


def test_every_sentence_has_a_key_to_attend_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some kernels give NaN to a query without keys: none is asked for one, in either layer."""
    masks: list[Tensor] = []
    attention = functional.scaled_dot_product_attention

    def record(
        query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, is_causal: bool
    ) -> Tensor:
        masks.append(attn_mask)
        return attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    tokens = torch.tensor([[3, 4, 0], [0, 0, 0]])
    Transformer(VOCABULARY, 9, 3)(tokens)
    wanted = [[True, True, False], [True, True, True]]
    assert [mask.reshape(2, 3).tolist() for mask in masks] == [wanted, wanted]
