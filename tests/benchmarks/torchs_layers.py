"""Torch's own transformer layers with the weights of ours."""

from __future__ import annotations

from torch import nn

from benchmarks.models import EncoderLayer

_NAMES = {
    "self_attn.in_proj_": "project_in.",
    "self_attn.out_proj.": "project_out.",
    "linear1.": "feed_forward.0.",
    "linear2.": "feed_forward.2.",
    "norm1.": "attention_norm.",
    "norm2.": "feed_forward_norm.",
}


def torchs_layer(ours: EncoderLayer) -> nn.TransformerEncoderLayer:
    """A pre-norm layer of torch's, in float64, of the same width, heads and weights."""
    width = ours.project_out.in_features
    layer = nn.TransformerEncoderLayer(
        width,
        ours.heads,
        4 * width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    ).double()
    state = ours.state_dict()
    layer.load_state_dict(
        {a + kind: state[b + kind] for a, b in _NAMES.items() for kind in ("weight", "bias")}
    )
    return layer
