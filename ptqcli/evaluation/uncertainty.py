"""How sure a number is that was taken over the tokens of a text.

Tokens of one window are not independent: what is hard to predict in it is hard for many of its tokens. So windows are the units here, as in
cluster sampling. With N tokens in G windows, of which window g has n_g tokens whose values add up to T_g, the mean is a ratio of sums,

    m = (T_1 + ... + T_G) / (n_1 + ... + n_G)

and to first order  m - mu = sum_g (T_g - mu n_g) / N,  a sum of G independent terms with mean zero. Their variance is estimated from
themselves:

    se(m)^2 = G / (G - 1) * sum_g (T_g - m n_g)^2 / N^2

This is the error of a ratio estimator (Cochran 1977, Sampling Techniques, chapter 6) and what Miller 2024 ("Adding error bars to evals",
arXiv:2411.00640) calls the clustered standard error; with equal n_g it is the deviation of the windows' means over the root of G.

**Paired.** Two models on the same tokens are compared by the differences of their values, token by token. What is hard for both of them
cancels, and the error of the difference is often ten times smaller than those of the two means.

**Quantiles.** Let F be the share of tokens up to the quantile Q(p), a mean with the error se(F) from above. Woodruff 1952 reads the error
of the quantile off the quantiles themselves: se(Q) = (Q(p + se(F)) - Q(p - se(F))) / 2. A maximum has none.

**Exponentials** such as perplexity: to first order se(exp(m)) = exp(m) se(m).

What is left out: neighbouring windows of one document belong together, too, and one text is one sample of what people write. Overlapping
windows score few tokens each; as many neighbours as score what a whole window does count as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqcli.evaluation.windows import Window


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, None where one window alone tells nothing of it."""

    value: float
    error: float | None

    def exp(self) -> Estimate:
        """The exponential. Raises OverflowError where it is no float."""
        value = math.exp(self.value)
        return Estimate(value, None if self.error is None else value * self.error)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Tokens that belong together. labels: the number of each token's cluster, int64 [tokens], from 0. count: of clusters."""

    labels: Tensor
    count: int

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Clusters:
        """Of the scored tokens of ``windows``: each window, or as many neighbours as score what the first does."""
        sizes = list(_sizes([window.scored for window in windows]))
        return cls(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), len(sizes))

    def mean(self, values: Tensor) -> Estimate:
        """Of ``values`` [tokens]."""
        numbers = values.double()
        mean = numbers.sum() / len(numbers)
        if self.count < 2:
            return Estimate(float(mean), None)
        residuals = torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.labels, numbers - mean)  # T_g - m n_g
        variance = residuals.square().sum() * self.count / (self.count - 1) / len(numbers) ** 2
        return Estimate(float(mean), float(variance.sqrt()))

    def quantile(self, values: Tensor, p: float) -> Estimate:
        """The value that a share ``p`` of ``values`` [tokens] does not exceed, between two of them on the line that joins them."""
        numbers = values.double().sort().values
        found = quantile(numbers, p)
        error = self.mean(values.double() <= found).error
        if error is None:
            return Estimate(found, None)
        low, high = (quantile(numbers, min(max(p + step, 0.0), 1.0)) for step in (-error, error))
        return Estimate(found, (high - low) / 2)


def _sizes(scored: Sequence[int]) -> Iterator[int]:
    size = 0
    for count in scored:
        size += count
        if size >= scored[0]:
            yield size
            size = 0
    if size:
        yield size


def quantile(numbers: Tensor, p: float) -> float:
    """Of sorted ``numbers``, float64 [n]: at place p (n - 1), on the line between its neighbours, as numpy's."""
    place = p * (len(numbers) - 1)
    below = math.floor(place)
    low, high = float(numbers[below]), float(numbers[min(below + 1, len(numbers) - 1)])
    share, apart = place - below, high - low
    return high - apart * (1 - share) if share >= 0.5 else low + apart * share
