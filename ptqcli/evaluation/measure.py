"""A model measured on texts, by itself or beside the one that it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ptqcli.evaluation.divergence import compare
from ptqcli.evaluation.perplexity import perplexity
from ptqcli.model.positions import most_tokens

PUBLISHED_SEQLEN = 2048  # window of the published WikiText-2 tables

# Called with the text, the windows done, and all windows.
OnWindow = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model on one text.

    perplexity: exp of mean_nll, which is in nats a token, over ``tokens`` scored tokens in ``windows`` windows of ``seqlen`` tokens, each
    ``stride`` tokens of the text behind the one before it. bos: every window begins with the beginning-of-sequence token.
    baseline_perplexity, mean_kl, top1_agreement: beside the baseline, see ``divergence``; None without one.
    """

    text: str
    perplexity: float
    mean_nll: float
    tokens: int
    windows: int
    seqlen: int
    stride: int
    bos: bool
    baseline_perplexity: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None


def measure(
    model: Any,
    rows: Mapping[str, Tensor],
    baseline: Any = None,
    seqlen: int | None = None,
    stride: int | None = None,
    on_window: OnWindow | None = None,
    bos: int | None = None,
) -> Iterator[Evaluation]:
    """``model`` (of transformers) on each text of ``rows``, one after the other.

    rows: name -> token ids, int64 [tokens], of ``calibration.text.evaluation_ids``.
    baseline: the original model, to be run on the same windows. seqlen: tokens in a window, by default PUBLISHED_SEQLEN, or the model's
    positions if it has fewer. bos: the token that every window begins with, of ``calibration.bos``.
    Raises what ``perplexity`` and ``compare`` raise.
    """
    window = default_seqlen(model) if seqlen is None else seqlen
    for text, ids in rows.items():

        def step(done: int, total: int, text: str = text) -> None:
            if on_window:
                on_window(text, done, total)

        if baseline is None:
            yield Evaluation(text=text, **asdict(perplexity(model, ids, window, stride, on_progress=step, bos=bos)))
            continue
        both = compare(model, baseline, ids, window, stride, on_progress=step, bos=bos)
        yield Evaluation(
            text=text,
            **asdict(both.model),
            baseline_perplexity=both.baseline.perplexity,
            mean_kl=both.mean_kl,
            top1_agreement=both.top1_agreement,
        )


def default_seqlen(model: Any) -> int:
    """The published window, or all positions of a model that has fewer."""
    return min(PUBLISHED_SEQLEN, most_tokens(model) or PUBLISHED_SEQLEN)
