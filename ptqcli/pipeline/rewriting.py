"""The model as its transforms have rewritten it, and the proof that it computes what it computed.

The proof runs the whole model twice on a few random tokens, as the file has it and rewritten, with a block's weights in memory at a time:
in float64, and as if the file stored float32, so that what a narrower dtype rounds is no fault of a rewrite. The logits must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqcli.errors import PTQError, UsageError
from ptqcli.model.rewritten import Rewrite, RewrittenSource, WidenedSource
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelSource
from ptqcli.model.whole import walked
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.report import RewriteReport
from ptqcli.plan import Plan
from ptqcli.recipe import Recipe
from ptqcli.transforms import UnsuitedError

PROOF_WINDOWS, PROOF_TOKENS = 2, 12
PROOF_DTYPE = torch.float64
# Largest relative difference of the logits. Code that computes norms and softmax in float32 moves them by about 1e-6 in a deep model.
BOUND = 1e-4


@dataclass(frozen=True)
class Rewritten:
    """A model behind its model transforms. rewrites: what they do. left_out: those that did not suit it, a line each."""

    skeleton: Skeleton
    rewrites: tuple[Rewrite, ...]
    left_out: tuple[str, ...]


def rewritten(original: Skeleton, recipe: Recipe) -> Rewritten:
    """The model behind all model transforms of the recipe. Raises UsageError where one does not suit that is not optional."""
    skeleton, rewrites, left_out = original, [], []
    for transform in recipe.model_transforms():
        try:
            rewrite = transform.prepare(skeleton)
            behind = Skeleton(RewrittenSource(skeleton.source, rewrite), recipe.blocks)
            _check_untied(behind, rewrite)
        except UnsuitedError as reason:
            if not transform.optional:
                raise UsageError(f"{original.where}: {transform.name} does not suit this model: {reason}; {transform.advice}") from reason
            left_out.append(f"{transform.name} is left out, as it does not suit this model: {reason}")
        else:
            skeleton = behind
            rewrites.append(rewrite)
    return Rewritten(skeleton, tuple(rewrites), tuple(left_out))


def _check_untied(skeleton: Skeleton, rewrite: Rewrite) -> None:
    """A class may tie its head to its embedding whatever its configuration says."""
    tied = getattr(skeleton.model, "all_tied_weights_keys", {})
    if "tie_word_embeddings" in rewrite.config and tied:
        raise UnsuitedError(f"{next(iter(tied))} is tied in every model of its class, so it cannot get values of its own")


def proof_bytes(skeleton: Skeleton) -> int:
    """Memory that the proof takes: what is outside the blocks, and the largest of them in two copies."""
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in skeleton.blocks]
    outside = sum(parameter.numel() for parameter in skeleton.model.parameters()) - sum(blocks)
    return (outside + 2 * max(blocks)) * PROOF_DTYPE.itemsize


def proved(skeleton: Skeleton, plan: Plan, device: torch.device, progress: Progress) -> RewriteReport | None:
    """The proof for a report; None for a model that is as its file has it. Raises PTQError if the logits differ."""
    if not plan.rewrites:
        return None
    progress.phase("running the model on a few tokens, as it is and rewritten, to see that it computes the same")
    difference = logits_moved(skeleton.source, plan.recipe.blocks, device)
    if not difference <= BOUND:
        names = "+".join(transform.name for transform in plan.recipe.model_transforms())
        raise PTQError(f"{skeleton.where}: behind {names} the model's logits differ by {difference:.1e} of themselves; leave {names} out")
    return RewriteReport(done=list(plan.rewrites), difference=difference)


@torch.no_grad()
def logits_moved(source: ModelSource, blocks: str | None, device: torch.device) -> float:
    """How far the logits of a rewritten model are from those of the model that it was made of, relative to these.

    blocks: name of the list of blocks, see ``Skeleton``.
    """
    rewrites: list[Rewrite] = []
    while isinstance(source, RewrittenSource):
        rewrites.insert(0, source.rewrite)
        source = source.original
    wide: ModelSource = WidenedSource(source)
    original = Skeleton(wide, blocks)
    for rewrite in rewrites:
        wide = RewrittenSource(wide, rewrite)
    vocabulary = original.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(vocabulary, (PROOF_WINDOWS, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    expected = logits(original, ids, device)
    return float((logits(Skeleton(wide, blocks), ids, device) - expected).norm() / expected.norm())


def logits(skeleton: Skeleton, ids: Tensor, device: torch.device) -> Tensor:
    """What the model says to ``ids``, int64 [windows, tokens], with one block's weights in memory at a time; in the dtype of the proof."""
    with walked(skeleton, device, PROOF_DTYPE) as model:
        return skeleton.kind.answer(model, ids.to(device))
