"""How far a quantized model has moved from the original, on the scored tokens of the perplexity windows.

Perplexity asks only for the token that came next in the text, so gains on some tokens hide losses on others. Numbers that hide nothing,
with P the original's distribution over the next token and Q the quantized model's:

    KL divergence      KL(P || Q) = sum over the vocabulary of p (log p - log q), in nats, 0 where nothing changed
    top-1 agreement    the share of tokens for which both find the same one most likely
    top-5 agreement    how many of the original's TOP likeliest tokens are among the model's, as a share of TOP, mean over the tokens

Both models run over each batch of windows once. Five numbers of each token are kept, float32: 20 bytes, whatever the vocabulary; so
quantiles are exact, errors are those of ``uncertainty``, and two models that were measured one after the other can be compared token by
token. Log probabilities are float32, sums over the vocabulary and over tokens float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ptqcli.errors import UsageError
from ptqcli.evaluation.perplexity import PerplexityResult, Progress, measure_tokens, result, token_losses
from ptqcli.evaluation.uncertainty import Clusters
from ptqcli.evaluation.windows import plan_windows

TOP = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenScores:
    """What is kept of each scored token of a text, in the order of the text: float32 [tokens].

    losses: -log p of the model, in nats. baseline_losses, kl, same_top, shared_top: beside the baseline, None without one; same_top is 1
    where both find the same token most likely, shared_top the share of the baseline's TOP likeliest that are among the model's.
    """

    clusters: Clusters
    losses: Tensor
    baseline_losses: Tensor | None = None
    kl: Tensor | None = None
    same_top: Tensor | None = None
    shared_top: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model beside its baseline on the same windows.

    mean_kl: KL(baseline || model) in nats, mean over the scored tokens. top1_agreement: share of the scored tokens, 0 to 1. scores: what
    the means are of.
    """

    model: PerplexityResult
    baseline: PerplexityResult
    mean_kl: float
    top1_agreement: float
    scores: TokenScores = field(compare=False, repr=False)


def compare(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    ids: Tensor,
    seqlen: int,
    stride: int | None = None,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
    bos: int | None = None,
) -> Comparison:
    """Perplexity of both models, KL divergence and agreements, in one pass over the text.

    The arguments are those of ``perplexity``, and so are the two perplexities. The models may differ in device and dtype.

    Raises what ``perplexity`` raises, and UsageError if the vocabularies differ in size.
    """
    ours, theirs = (each.config.get_text_config().vocab_size for each in (model, baseline))
    if ours != theirs:
        raise UsageError(
            f"the model has a vocabulary of {ours} tokens and the baseline one of {theirs}, so they cannot be compared; "
            "give the baseline that the model was made from"
        )
    windows = plan_windows(len(ids), seqlen, stride, bos is not None)
    losses, baseline_losses, kl, same, shared = measure_tokens(_measure, [model, baseline], ids, windows, batch_size, on_progress, bos)
    clusters = Clusters.of(windows)
    return Comparison(
        model=result(float(losses.double().sum()), windows, seqlen, stride, bos),
        baseline=result(float(baseline_losses.double().sum()), windows, seqlen, stride, bos),
        mean_kl=clusters.mean(kl).value,
        top1_agreement=clusters.mean(same).value,
        scores=TokenScores(clusters=clusters, losses=losses, baseline_losses=baseline_losses, kl=kl, same_top=same, shared_top=shared),
    )


def _measure(targets: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Loss of the model, loss of the baseline, KL and both agreements: float64 [5, rows]."""
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1, dtype=torch.float64)
    agreeing = (log_q.argmax(-1) == log_p.argmax(-1)).double()
    top_q, top_p = (each.topk(min(TOP, each.shape[-1])).indices for each in (log_q, log_p))  # [rows, TOP]
    shared = (top_p[:, :, None] == top_q[:, None, :]).any(-1).double().mean(-1)
    return torch.stack([token_losses(targets, log_q), token_losses(targets, log_p), divergence, agreeing, shared])
