"""How far a model has moved from its original, window by window, with the original run once for each text.

What is kept of the original is the input of its output head, float [windows, seqlen, hidden]: its logits are made again of it, in the
model's own dtype, by the product that the model would do, at a fifth of a forward pass for a small model. They themselves would take 3 GB
for 30,000 tokens of a vocabulary of 49,152.

The standard error of the mean divergence is that of the windows' means: tokens of one window are not independent of each other.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ptqcli.evaluation.perplexity import token_losses

TOKENS_PER_PASS = 2048


@dataclass(frozen=True, kw_only=True)
class Text:
    """Windows of a held-out text and what the original's head is given for them.

    windows: int64 [windows, seqlen]. hidden: floating [windows, seqlen, hidden]. head: the original's. perplexity: the original's.
    """

    windows: Tensor
    hidden: Tensor
    head: nn.Module
    perplexity: float


def windows_of(ids: Tensor, tokens: int, seqlen: int, bos: int | None) -> Tensor:
    """The first ``tokens`` of a text in windows that follow each other, int64 [windows, seqlen]; what fills none is dropped.

    bos: a token that every window begins with; it counts in seqlen. Raises SystemExit for a text shorter than one window.
    """
    room = seqlen - (bos is not None)
    count = min(tokens, len(ids)) // room
    if count < 1:
        raise SystemExit(f"the text has {len(ids)} tokens, {tokens} are asked for, and a window has {seqlen}")
    cut = ids[: count * room].view(count, room)
    return cut if bos is None else torch.cat([torch.full((count, 1), bos), cut], dim=1)


@torch.no_grad()
def remember(model: Any, windows: Tensor, folder: Path, key: str) -> Text:
    """Run the original over ``windows``, or read from ``folder`` what an earlier call wrote for the same model and windows.

    key: names the model's weights. Raises SystemExit for a model whose logits are not its head's product of what its body gives.
    """
    digest = hashlib.sha256(key.encode() + windows.numpy().tobytes() + str(windows.shape).encode()).hexdigest()[:16]
    file = folder / f"hidden-{digest}.safetensors"
    model.eval()
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        growing = file.with_suffix(".partial")
        save_file({"hidden": torch.cat([_body(model, batch) for batch in _batches(windows)])}, growing)
        growing.replace(file)
    hidden, head = load_file(file)["hidden"], model.get_output_embeddings()
    first = windows[:1]
    if not torch.allclose(model(input_ids=first, use_cache=False).logits, head(_body(model, first)), rtol=1e-2, atol=1e-3):
        raise SystemExit(f"{type(model).__name__} does more to its logits than its head does")
    losses = [token_losses(window[1:], _log_probs(head(states))).mean() for window, states in zip(windows, hidden, strict=True)]
    return Text(windows=windows, hidden=hidden, head=head, perplexity=math.exp(torch.stack(losses).mean().item()))


@torch.no_grad()
def divergence(model: Any, text: Text) -> dict[str, Any]:
    """``model`` on the windows: original, perplexity, rise, kl, kl_error, top1, and kl_windows, the mean KL of each window.

    KL is KL(original || model) in nats and top1 the share of tokens for which both find the same one most likely.
    """
    sums = []
    model.eval()
    for batch, hidden in zip(_batches(text.windows), _batches(text.hidden), strict=True):
        logits = model(input_ids=batch, use_cache=False).logits
        for window, of_model, of_original in zip(batch, logits, text.head(hidden), strict=True):
            sums.append(_compare(window[1:], _log_probs(of_model), _log_probs(of_original)))
    loss, kl, agreeing = torch.stack(sums).T  # each float64 [windows], a mean over the tokens of a window
    perplexity = math.exp(loss.mean().item())
    return {
        "original": text.perplexity,
        "perplexity": perplexity,
        "rise": perplexity - text.perplexity,
        "kl": kl.mean().item(),
        "kl_error": standard_error(kl.tolist()),
        "top1": agreeing.mean().item(),
        "kl_windows": [round(value, 7) for value in kl.tolist()],
    }


def standard_error(values: list[float]) -> float | None:
    """Of the mean of independent ``values``; None of a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def ratio_error(above: list[float], below: list[float]) -> float | None:
    """Standard error of ``mean(above) / mean(below)``, pairs of one window each, to first order; None of a single pair.

    What both have in common, windows that are hard for every model, is not part of it.
    """
    share = statistics.fmean(above) / statistics.fmean(below)
    error = standard_error([a - share * b for a, b in zip(above, below, strict=True)])
    return None if error is None else error / statistics.fmean(below)


def _batches(windows: Tensor) -> tuple[Tensor, ...]:
    """In parts of about TOKENS_PER_PASS tokens. windows: [windows, seqlen, ...]."""
    return windows.split(max(1, TOKENS_PER_PASS // windows.shape[1]))


def _body(model: Any, windows: Tensor) -> Tensor:
    return model.base_model(input_ids=windows, use_cache=False).last_hidden_state


def _log_probs(logits: Tensor) -> Tensor:
    """Of one window [seqlen, vocabulary], float32, without the last, which has no token behind it."""
    return F.log_softmax(logits[:-1].float(), dim=-1)


def _compare(targets: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Loss of the model, KL and agreement, means over the tokens of one window: float64 [3]."""
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1, dtype=torch.float64)
    agreeing = (log_q.argmax(-1) == log_p.argmax(-1)).double()
    return torch.stack([token_losses(targets, log_q), kl, agreeing]).mean(1)
