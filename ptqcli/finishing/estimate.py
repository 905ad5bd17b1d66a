"""The memory that tuning takes."""

from __future__ import annotations

from collections.abc import Sequence

from ptqcli.formats import LinearSpec
from ptqcli.model.skeleton import Skeleton

SCALE_COPIES = 7  # in float32: as stored, its change, the best one, what the model computes with, its gradient, and two of Adam
LOGITS_COPIES = 6  # in float32, of one window: both models' logarithms of probabilities and what their gradients take


def tuning_bytes(specs: Sequence[LinearSpec], skeleton: Skeleton, windows: int, seqlen: int, batch: int, itemsize: int, budget: int) -> int:
    """Peak of all tensors, without what libraries hold.

    specs: the quantized linears. batch: windows run at once. itemsize: of the dtype in which it runs. budget: bytes of hidden states that
    are held in memory.
    """
    weights = [spec.out_features * spec.in_features for spec in specs]
    scales = sum(spec.out_features * spec.scheme.group_count(spec.in_features) for spec in specs)
    blocks = len(skeleton.blocks)
    rest = sum(parameter.numel() for parameter in skeleton.model.parameters()) - sum(weights)
    features = min(spec.in_features for spec in specs)
    tokens = batch * seqlen
    hidden = min(2 * windows * seqlen * features * itemsize, budget) + blocks * tokens * features * itemsize
    decoded = sum(weights) // blocks * (4 + itemsize) + 4 * max(weights) * 4
    inside = tokens * sum(spec.out_features + 2 * spec.in_features for spec in specs) // blocks * itemsize
    vocabulary = skeleton.config.get_text_config().vocab_size
    logits = tokens * vocabulary * 3 * itemsize + LOGITS_COPIES * seqlen * vocabulary * 4
    # Both models have what is not quantized, the original whatever is tied in the other's file.
    return sum(weights) + SCALE_COPIES * 4 * scales + 2 * rest * itemsize + hidden + max(decoded + inside, logits)
