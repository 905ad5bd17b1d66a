"""How far a quantized model has moved from the original, on the scored tokens of the perplexity windows.

Perplexity asks only for the token that came next in the text, so gains on some tokens hide losses on others. Two numbers that
hide nothing, with P the original's distribution over the next token and Q the quantized model's:

    KL divergence      KL(P || Q) = sum over the vocabulary of p (log p - log q), in nats, 0 where nothing changed
    top-1 agreement    the share of tokens for which both find the same one most likely

Both models run over each batch of windows once; nothing is kept between batches. Log probabilities are float32 and sums over
tokens float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ptqcli.errors import UsageError
from ptqcli.evaluation.perplexity import PerplexityResult, Progress, result, sum_over_windows, token_losses
from ptqcli.evaluation.windows import plan_windows


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model beside its baseline on the same windows.

    mean_kl: KL(baseline || model) in nats, mean over the scored tokens. top1_agreement: share of the scored tokens, 0 to 1.
    """

    model: PerplexityResult
    baseline: PerplexityResult
    mean_kl: float
    top1_agreement: float


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
    """Perplexity of both models, KL divergence and top-1 agreement, in one pass over the text.

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
    sums = sum_over_windows(_measure, [model, baseline], ids, windows, batch_size, on_progress, bos)
    loss, baseline_loss, divergence, agreeing = sums
    of_model = result(loss, windows, seqlen, stride, bos)
    of_baseline = result(baseline_loss, windows, seqlen, stride, bos)
    return Comparison(model=of_model, baseline=of_baseline, mean_kl=divergence / of_model.tokens, top1_agreement=agreeing / of_model.tokens)


def _measure(targets: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Loss of the model, loss of the baseline, KL and agreements, summed over the rows: float64 [4]."""
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1, dtype=torch.float64)
    agreeing = (log_q.argmax(-1) == log_p.argmax(-1)).double()
    rows = [token_losses(targets, log_q), token_losses(targets, log_p), divergence, agreeing]
    return torch.stack(rows).sum(1)  # [4]
