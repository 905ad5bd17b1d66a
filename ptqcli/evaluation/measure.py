"""A model measured on texts, by itself or beside the one that it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ptqcli.evaluation.divergence import TokenScores, compare
from ptqcli.evaluation.perplexity import PerplexityResult, measure_tokens, only_losses, result
from ptqcli.evaluation.uncertainty import Clusters, Estimate
from ptqcli.evaluation.windows import plan_windows
from ptqcli.model.positions import most_tokens

PUBLISHED_SEQLEN = 2048  # window of the published WikiText-2 tables

# Called with the text, the windows done, and all windows.
OnWindow = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model on one text.

    perplexity: exp of mean_nll, which is in nats a token, over ``tokens`` scored tokens in ``windows`` windows of ``seqlen`` tokens, each
    ``stride`` tokens of the text behind the one before it. bos: every window begins with the beginning-of-sequence token.
    baseline_perplexity and all that follows: beside the baseline, see ``divergence``; None without one. loss_rise: mean of the differences
    of log loss, token by token, in nats; perplexity_ratio: its exponential, the ratio of the two perplexities. kl_median, kl_99, kl_max:
    quantiles over the tokens.
    ..._error: the standard error of a number, see ``uncertainty``; None where there is one window only.
    """

    text: str
    perplexity: float
    mean_nll: float
    tokens: int
    windows: int
    seqlen: int
    stride: int
    bos: bool
    perplexity_error: float | None = None
    mean_nll_error: float | None = None
    baseline_perplexity: float | None = None
    baseline_perplexity_error: float | None = None
    loss_rise: float | None = None
    loss_rise_error: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    mean_kl: float | None = None
    mean_kl_error: float | None = None
    kl_median: float | None = None
    kl_median_error: float | None = None
    kl_99: float | None = None
    kl_99_error: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    top1_agreement_error: float | None = None
    top5_agreement: float | None = None
    top5_agreement_error: float | None = None


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
    return (found for found, _ in score(model, rows, baseline, seqlen, stride, on_window, bos))


def score(
    model: Any,
    rows: Mapping[str, Tensor],
    baseline: Any = None,
    seqlen: int | None = None,
    stride: int | None = None,
    on_window: OnWindow | None = None,
    bos: int | None = None,
) -> Iterator[tuple[Evaluation, TokenScores]]:
    """As ``measure``, with the numbers of each token that the means are of."""
    window = default_seqlen(model) if seqlen is None else seqlen
    for text, ids in rows.items():

        def step(done: int, total: int, text: str = text) -> None:
            if on_window:
                on_window(text, done, total)

        if baseline is None:
            windows = plan_windows(len(ids), window, stride, bos is not None)
            [losses] = measure_tokens(only_losses, [model], ids, windows, None, step, bos)
            alone = result(float(losses.double().sum()), windows, window, stride, bos)
            scores = TokenScores(clusters=Clusters.of(windows), losses=losses)
            yield Evaluation(text=text, **asdict(alone), **_errors(alone, scores)), scores
            continue
        both = compare(model, baseline, ids, window, stride, on_progress=step, bos=bos)
        numbers = {**_errors(both.model, both.scores), **_beside(both.baseline, both.scores)}
        yield Evaluation(text=text, **asdict(both.model), **numbers), both.scores


def _errors(alone: PerplexityResult, scores: TokenScores) -> dict[str, Any]:
    error = scores.clusters.mean(scores.losses).error
    return {"mean_nll_error": error, "perplexity_error": None if error is None else alone.perplexity * error}


def _beside(baseline: PerplexityResult, scores: TokenScores) -> dict[str, Any]:
    """What a comparison says of the two models, by the names of ``Evaluation``."""
    assert scores.baseline_losses is not None
    assert scores.kl is not None
    assert scores.same_top is not None
    assert scores.shared_top is not None
    clusters = scores.clusters
    rise = clusters.mean(scores.losses.double() - scores.baseline_losses.double())
    of_baseline = clusters.mean(scores.baseline_losses).error
    return {
        "baseline_perplexity": baseline.perplexity,
        "baseline_perplexity_error": None if of_baseline is None else baseline.perplexity * of_baseline,
        **_named("loss_rise", rise),
        **_named("perplexity_ratio", rise.exp()),
        **_named("mean_kl", clusters.mean(scores.kl)),
        **_named("kl_median", clusters.quantile(scores.kl, 0.5)),
        **_named("kl_99", clusters.quantile(scores.kl, 0.99)),
        "kl_max": float(scores.kl.max()),
        **_named("top1_agreement", clusters.mean(scores.same_top)),
        **_named("top5_agreement", clusters.mean(scores.shared_top)),
    }


def _named(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_error": estimate.error}


def default_seqlen(model: Any) -> int:
    """The published window, or all positions of a model that has fewer."""
    return min(PUBLISHED_SEQLEN, most_tokens(model) or PUBLISHED_SEQLEN)
