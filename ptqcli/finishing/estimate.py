"""The memory and the work that tuning takes."""

from __future__ import annotations

from collections.abc import Sequence

from ptqcli.finishing.tune_scales import EVALUATIONS, WINDOWS, TuneScales, windows_at_once
from ptqcli.formats import LinearSpec
from ptqcli.model.skeleton import Skeleton
from ptqcli.resources import Resources

SCALE_COPIES = 7  # in float32: as stored, its change, the best one, what the model computes with, its gradient, and two of Adam
LOGITS_COPIES = 6  # in float32, of one window: both models' logarithms of probabilities and what their gradients take


def tuning_bytes(specs: Sequence[LinearSpec], skeleton: Skeleton, windows: int, seqlen: int, resources: Resources) -> int:
    """Peak of all tensors, without what libraries hold. specs: the quantized linears of the original ``skeleton``."""
    itemsize = resources.calibration_dtype(skeleton.dtype(f"{specs[0].name}.weight")).itemsize
    weights = [spec.out_features * spec.in_features for spec in specs]
    scales = sum(spec.out_features * spec.scheme.group_count(spec.in_features) for spec in specs)
    blocks = len(skeleton.blocks)
    rest = sum(parameter.numel() for parameter in skeleton.model.parameters()) - sum(weights)
    features = min(spec.in_features for spec in specs)
    tokens = windows_at_once(resources, seqlen) * seqlen
    hidden = min(2 * windows * seqlen * features * itemsize, resources.budget) + blocks * tokens * features * itemsize
    decoded = sum(weights) // blocks * (4 + itemsize) + 4 * max(weights) * 4
    inside = tokens * sum(spec.out_features + 2 * spec.in_features for spec in specs) // blocks * itemsize
    vocabulary = skeleton.config.get_text_config().vocab_size
    # The output head is once there in float32, too: as such CPUs multiply 16-bit matrices for which they have no products of their own.
    logits = (tokens * 3 * itemsize + LOGITS_COPIES * seqlen * 4 + features * 4) * vocabulary
    # Both models have what is not quantized, the original whatever is tied in the other's file.
    return sum(weights) + SCALE_COPIES * 4 * scales + 2 * rest * itemsize + hidden + max(decoded + inside, logits)


def tuning_work(options: TuneScales, skeleton: Skeleton, windows: int, seqlen: int) -> float:
    """Floating operations that tuning takes.

    A step runs the quantized model forward twice, as its blocks are run again for the gradients, and backward, which is twice the work. The
    loss on the windows held out takes a pass, and the original runs once over all of them.
    """
    steps = options.steps * min(WINDOWS, windows // 2) * 4
    evaluations = (1 + min(EVALUATIONS, options.steps)) * (windows - windows // 2)
    return (steps + evaluations + windows) * skeleton.pass_work(seqlen)
