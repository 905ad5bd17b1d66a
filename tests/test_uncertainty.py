"""Standard errors against a bootstrap over windows, and against textbook cases; quantiles against numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_evaluate import random_llama
from torch import Tensor

from ptqcli.evaluation.divergence import TOP, compare
from ptqcli.evaluation.measure import score
from ptqcli.evaluation.uncertainty import Clusters, quantile
from ptqcli.evaluation.windows import plan_windows

RESAMPLED = 4000


def correlated(windows: int, tokens: int, seed: int, skewed: bool = False) -> Tensor:
    """Values of which those of one window share half of their variance, float32 [windows * tokens]."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(windows, 1, generator=generator)
    values = shared + torch.randn(windows, tokens, generator=generator)
    return (values.exp() if skewed else values).flatten()


def bootstrap(values: Tensor, clusters: Clusters, statistic: Callable[[np.ndarray], float]) -> float:
    """The deviation of ``statistic`` over texts whose windows are drawn from these, with replacement."""
    groups = [values[clusters.labels == label].numpy() for label in range(clusters.count)]
    generator = np.random.default_rng(0)
    drawn = (generator.integers(len(groups), size=len(groups)) for _ in range(RESAMPLED))
    return float(np.std([statistic(np.concatenate([groups[index] for index in chosen])) for chosen in drawn]))


def equal_clusters(windows: int, tokens: int) -> Clusters:
    return Clusters(torch.arange(windows).repeat_interleave(tokens), windows)


def test_the_error_of_a_mean_is_that_of_the_windows_means() -> None:
    values = correlated(50, 20, seed=1)
    found = equal_clusters(50, 20).mean(values)
    means = values.view(50, 20).double().mean(1)
    assert found.value == pytest.approx(float(means.mean()), rel=1e-12)
    assert found.error == pytest.approx(float(means.std() / math.sqrt(50)), rel=1e-9)


def test_the_error_of_a_mean_is_that_of_a_bootstrap_over_windows() -> None:
    """Windows of several lengths, too. The twin: as if the tokens were independent, it would be less than half."""
    values = correlated(80, 20, seed=2)
    lengths = torch.tensor([10, 30] * 40)
    for clusters in (equal_clusters(80, 20), Clusters(torch.arange(80).repeat_interleave(lengths), 80)):
        found = clusters.mean(values).error
        assert found is not None
        assert found == pytest.approx(bootstrap(values, clusters, np.mean), rel=0.06)
    independent = float(values.std()) / math.sqrt(len(values))
    assert independent < 0.5 * bootstrap(values, equal_clusters(80, 20), np.mean)


@pytest.mark.parametrize(("p", "near"), [(0.5, 0.12), (0.9, 0.2)])
def test_the_error_of_a_quantile_is_that_of_a_bootstrap_over_windows(p: float, near: float) -> None:
    values, clusters = correlated(200, 20, seed=3, skewed=True), equal_clusters(200, 20)
    found = clusters.quantile(values, p)
    assert found.value == np.quantile(values.double().numpy(), p)
    assert found.error == pytest.approx(bootstrap(values, clusters, lambda drawn: float(np.quantile(drawn, p))), rel=near)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_quantiles_are_those_of_numpy(count: int) -> None:
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).sort().values
    for p in (0.0, 0.01, 0.25, 1 / 3, 0.5, 0.77, 0.99, 0.999, 1.0):
        assert quantile(numbers, p) == np.quantile(numbers.numpy(), p)


def test_one_window_tells_nothing_of_its_error() -> None:
    clusters = equal_clusters(1, 5)
    assert clusters.mean(torch.arange(5.0)).error is None
    assert clusters.quantile(torch.arange(5.0), 0.5).error is None


def test_overlapping_windows_are_joined_to_what_a_whole_one_scores() -> None:
    windows = plan_windows(40, 8, 2)
    clusters = Clusters.of(windows)
    sizes = torch.bincount(clusters.labels).tolist()
    assert sum(sizes) == sum(window.scored for window in windows)
    assert all(7 <= size <= 8 for size in sizes[:-1])
    assert Clusters.of(plan_windows(40, 8)).count == 5


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(0, 97, (40 * 16,), generator=torch.Generator().manual_seed(7))


def test_a_paired_difference_is_surer_than_two_means(text: Tensor) -> None:
    """On real models: the error of the rise against a bootstrap of windows, and far below that of each perplexity."""
    model, baseline = random_llama(), random_llama()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * weight.abs().mean() * torch.randn_like(weight)
    [(found, scores)] = score(model, {"text": text}, baseline, 16)
    assert scores.baseline_losses is not None
    assert scores.kl is not None
    differences = scores.losses.double() - scores.baseline_losses.double()
    assert found.loss_rise == pytest.approx(float(differences.mean()), abs=1e-12)
    assert found.loss_rise_error == pytest.approx(bootstrap(differences, scores.clusters, np.mean), rel=0.1)
    assert found.mean_kl_error == pytest.approx(bootstrap(scores.kl.double(), scores.clusters, np.mean), rel=0.1)
    assert found.baseline_perplexity is not None
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.baseline_perplexity, rel=1e-9)
    ratio = bootstrap(differences, scores.clusters, lambda drawn: float(np.exp(np.mean(drawn))))
    assert found.perplexity_ratio_error == pytest.approx(ratio, rel=0.1)
    assert found.perplexity_error == pytest.approx(
        bootstrap(scores.losses.double(), scores.clusters, lambda drawn: float(np.exp(np.mean(drawn)))), rel=0.15
    )
    assert found.loss_rise_error is not None
    assert found.mean_nll_error is not None
    assert found.loss_rise_error < 0.2 * found.mean_nll_error
    for p, name in ((0.5, found.kl_median), (0.99, found.kl_99), (1.0, found.kl_max)):
        assert name == np.quantile(scores.kl.double().numpy(), p)


def test_agreement_of_the_likeliest_tokens(text: Tensor) -> None:
    """Against sets of Python, and 1 for a model beside itself."""
    model, baseline = random_llama(seed=1), random_llama()
    [(found, _)] = score(model, {"text": text}, baseline, 16)
    with torch.no_grad():
        q, p = (each(input_ids=text.view(-1, 16)).logits[:, :-1].flatten(0, 1) for each in (model, baseline))
    shares = [len({*a.topk(TOP).indices.tolist()} & {*b.topk(TOP).indices.tolist()}) / TOP for a, b in zip(q, p, strict=True)]
    assert found.top5_agreement == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    same = compare(model, model, text, 16).scores
    assert same.shared_top is not None
    assert same.shared_top.min() == 1


def test_what_is_kept_does_not_grow_with_the_vocabulary(text: Tensor) -> None:
    scores = compare(random_llama(vocab_size=500), random_llama(vocab_size=500), text, 16).scores
    kept = [scores.losses, scores.baseline_losses, scores.kl, scores.same_top, scores.shared_top]
    assert all(each is not None and each.shape == (40 * 15,) and each.dtype == torch.float32 for each in kept)
