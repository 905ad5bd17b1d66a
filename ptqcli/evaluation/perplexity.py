"""Perplexity on one long text, by the protocol of the published tables.

    perplexity = exp( mean over the scored tokens of  -log p(token | the tokens before it in its window) )

Which tokens are scored is decided in ``windows.py``. Without a stride all windows score equally many, so the mean over tokens is
also the mean of the windows' mean losses.

The layers of a packed model run as they do on many tokens, however many run at once, so that a batch of another size gives the same but
for the order of sums. Schemes that take a number from all tokens of a call (a scale for the tensor, outlier columns) are run window by
window.

Losses are computed and kept in float32, whatever the dtype of the model, and summed in float64. The float32 copy of the logits is made
for some rows at a time: for one window of 2,048 tokens and a vocabulary of 128,000 it would take 1 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.windows import Batch, Window, batches, plan_windows
from ptqcli.model.positions import most_tokens
from ptqcli.runtime.layers import expanding, mixes_tokens

Progress = Callable[[int, int], None]

# Enough to keep two cores busy; the logits of a batch are kept whole, in the model's dtype.
TOKENS_PER_BATCH = 4096
# Logits in float32 at a time: 16 MB.
LOGITS_PER_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """perplexity = exp(mean_nll); mean_nll: nats per token, over ``tokens`` scored tokens in ``windows`` windows.

    stride: tokens of the text from one window to the next; where windows do not overlap, those in one. bos: windows begin with the
    beginning-of-sequence token.
    """

    perplexity: float
    mean_nll: float
    tokens: int
    windows: int
    seqlen: int
    stride: int
    bos: bool


def perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    seqlen: int,
    stride: int | None = None,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
    bos: int | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model on a text.

    ids: int64 [tokens], the whole text. seqlen: tokens in a window. stride: tokens from one window to the next, by default
    seqlen. batch_size: windows in one forward pass, by default as many as make TOKENS_PER_BATCH tokens, or one where windows that run
    together would change each other. on_progress: called with the number of windows done and of all windows. bos: a token that every
    window begins with, see ``windows``. The model's train or eval mode is restored.

    Raises UsageError for a text shorter than a window, a window longer than the model's positions, a stride or batch size that
    does not work; PTQError for ids that the model does not have and for a loss that is not finite.
    """
    windows = plan_windows(len(ids), seqlen, stride, bos is not None)
    [losses] = measure_tokens(only_losses, [model], ids, windows, batch_size, on_progress, bos)
    return result(float(losses.double().sum()), windows, seqlen, stride, bos)


def only_losses(targets: Tensor, log_probs: Tensor) -> Tensor:
    """The numbers that ``measure_tokens`` takes of one model: its losses, [1, rows]."""
    return token_losses(targets, log_probs)[None]


def token_losses(targets: Tensor, log_probs: Tensor) -> Tensor:
    """-log p(target) in nats, float64 [rows]. targets: int64 [rows]; log_probs: [rows, vocabulary]."""
    return -log_probs.gather(1, targets[:, None])[:, 0].double()


def measure_tokens(
    measure: Callable[..., Tensor],
    models: list[PreTrainedModel],
    ids: Tensor,
    windows: list[Window],
    batch_size: int | None,
    on_progress: Progress | None,
    bos: int | None,
) -> Tensor:
    """Numbers of each scored token, float32 [numbers, tokens], with all models run over the same batch.

    measure: gets targets, int64 [rows], and for each model log probabilities, float32 [rows, vocabulary]; gives [numbers, rows]. A batch's
    logits are gone when the next begins, so what is kept does not grow with the vocabulary.

    Raises UsageError and PTQError as ``perplexity`` does.
    """
    longest = max(window.length for window in windows) + (bos is not None)
    for model in models:
        check_fits(model, ids, longest)
    if batch_size is None:  # windows that run together must not change each other
        batch_size = 1 if any(map(mixes_tokens, models)) else max(1, TOKENS_PER_BATCH // longest)
    elif batch_size < 1:
        raise UsageError(f"a batch of {batch_size} windows does not work; give 1 or more")
    found: list[Tensor] = []
    done = 0
    with evaluating(models):
        for batch in batches(ids, windows, batch_size, bos):
            logits = [_scored_logits(model, batch) for model in models]
            found.append(_finite(torch.cat([measure(*rows).float() for rows in _row_chunks(batch, logits)], dim=1), batch).cpu())
            done += len(batch.windows)
            if on_progress:
                on_progress(done, len(windows))
    return torch.cat(found, dim=1)


def result(loss: float, windows: list[Window], seqlen: int, stride: int | None, bos: int | None = None) -> PerplexityResult:
    """loss: of all scored tokens of the windows, summed, in nats. Raises PTQError if exp of the mean overflows."""
    tokens = sum(window.scored for window in windows)
    mean = loss / tokens
    try:
        value = math.exp(mean)
    except OverflowError as error:
        raise PTQError(f"perplexity is not finite: the mean loss is {mean:.4g} nats; quantize with more bits") from error
    apart = min(stride or seqlen, windows[0].length)
    return PerplexityResult(
        perplexity=value, mean_nll=mean, tokens=tokens, windows=len(windows), seqlen=seqlen, stride=apart, bos=bos is not None
    )


def check_fits(model: PreTrainedModel, ids: Tensor, seqlen: int) -> None:
    """Raise UsageError for windows that are too long, PTQError for ids that the model does not have."""
    positions = most_tokens(model)
    if positions is not None and seqlen > positions:
        raise UsageError(f"a window of {seqlen} tokens is longer than the model's {positions} positions; lower --seqlen")
    vocabulary = model.get_input_embeddings().num_embeddings
    lowest, highest = int(ids.min()), int(ids.max())
    if not 0 <= lowest <= highest < vocabulary:
        raise PTQError(
            f"the token ids of the text are {lowest} to {highest}, and the model has {vocabulary} embeddings; "
            "use the tokenizer that belongs to the model"
        )


@contextmanager
def evaluating(models: list[PreTrainedModel]) -> Iterator[None]:
    """No gradients and no dropout, and one kernel for any number of tokens; each model's mode comes back at the end."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            for model in models:
                stack.enter_context(expanding(model))
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def placed(model: Any, ids: Tensor) -> Tensor:
    """``ids`` where the model looks up its words."""
    table: Any = model.get_input_embeddings()
    embeddings: Tensor = next(chain(table.parameters(), table.buffers()))
    return ids if embeddings.is_meta else ids.to(embeddings.device)  # on the disk, accelerate brings the two together


def _scored_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits that predict the batch's targets, [windows, scored, vocabulary], in the model's dtype."""
    logits = model(input_ids=placed(model, batch.inputs), use_cache=False).logits  # [windows, length, vocabulary]
    return logits[:, -batch.targets.shape[1] - 1 : -1]


def _row_chunks(batch: Batch, logits: list[Tensor]) -> Iterator[list[Tensor]]:
    """Targets [rows] and each model's log probabilities for them, float32 [rows, vocabulary], on the first model's device."""
    device = logits[0].device
    size = max(1, LOGITS_PER_CHUNK // logits[0].shape[-1])
    for window, targets in enumerate(batch.targets):
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            log_probs = [each[window, rows].to(device).log_softmax(-1, dtype=torch.float32) for each in logits]
            yield [targets[rows].to(device), *log_probs]


def _finite(numbers: Tensor, batch: Batch) -> Tensor:
    if not numbers.isfinite().all():
        first, last = batch.windows[0].start, batch.windows[-1].start + batch.windows[-1].length - 1
        raise PTQError(
            f"perplexity is not finite: for tokens {first} to {last} of the text the logits hold nan or infinity; "
            "the weights are damaged or overflow their dtype, so quantize again or load the model in another dtype"
        )
    return numbers
