"""Architectures that the papers do not have: published sizes, torch's own layers, and causality."""

import pytest
import torch
from torch import nn

from benchmarks.architectures import (
    LanguageModel,
    ResNet18,
    VisionTransformer,
    next_token_loss,
    vit_tiny,
)
from benchmarks.models import EncoderLayer
from tests.benchmarks.torchs_layers import torchs_layer


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_sizes_are_those_that_were_published():
    """GPT-2 small; ViT-Ti/16 of timm; torchvision's ResNet-18 with 1,000 and 10 classes."""
    with torch.device("meta"):
        gpt2 = LanguageModel(50_257, 1024, width=768, heads=12, layers=12)
        vit = VisionTransformer(224, 1000, patch=16, width=192, heads=3, layers=12)
        assert size(gpt2) == 124_439_808
        assert size(vit) == 5_717_416
        assert size(ResNet18(1000)) == 11_689_512
        assert size(ResNet18(10)) == 11_181_642
        assert "layer2.0.downsample.1.running_mean" in ResNet18(10).state_dict()


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_is_torchs_encoder_layer(causal):
    torch.manual_seed(0)
    block = EncoderLayer(16, 4).double()
    for p in block.parameters():  # norms and biases start at 1 and 0: hide no mistake
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(3, 5, 16).double()
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype) if causal else None
    expected = torchs_layer(block)(x, src_mask=mask)
    torch.testing.assert_close(block(x, causal=causal), expected)


def test_a_decoder_does_not_look_ahead_and_ties_its_embeddings():
    torch.manual_seed(0)
    model = LanguageModel(20, 6, width=8, heads=2, layers=2)
    tokens = torch.randint(20, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % 20
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 6, 20)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-6)
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=(0, 2)).min() > 1e-4
    assert not [name for name, _ in model.named_parameters() if "head" in name]
    with torch.no_grad():
        scaled = LanguageModel(20, 6, width=8, heads=2, layers=0)
        logits = scaled(tokens)
        hidden = scaled.norm(scaled.tokens(tokens) + scaled.positions(torch.arange(6)))
        torch.testing.assert_close(logits, hidden @ scaled.tokens.weight.T)


def test_next_token_loss_is_a_mean_over_sequences():
    """As an operator takes it: the mean of two halves is that of the whole."""
    logits, targets = torch.randn(4, 3, 7), torch.randint(7, (4, 3))
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(next_token_loss(logits, targets), -picked.mean())
    halves = [next_token_loss(logits[s], targets[s]) for s in (slice(2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, next_token_loss(logits, targets))


@pytest.mark.parametrize("model", [ResNet18(10, width=2), vit_tiny(10)], ids=["resnet", "vit"])
def test_image_models_score_each_image_by_itself(model):
    model.eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        scores = model(images)
        assert scores.shape == (3, 10)
        torch.testing.assert_close(model(images[1:2]), scores[1:2], rtol=1e-4, atol=1e-5)
