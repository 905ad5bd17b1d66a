"""What calibration keeps of a linear's inputs.

``InputStatistics`` holds what one pass over the calibration tokens is asked for (``StatisticsRequest``): magnitudes of each channel, a
sample of the tokens, the Hessian. All transforms and solvers share it, so the number of passes does not depend on how many there are; when
a transform divides the channels by its scales, the statistics are divided with them.

``Hessian`` is the second moment ``H = sum_t x_t x_t^T`` of an input tensor over all calibration tokens ``t``, streamed batch by batch.
The layer-wise objective ``sum_t |(W - W') x_t|^2 = tr((W - W') H (W - W')^T)`` needs nothing else (Frantar et al. 2022, section 3.1; the
paper's factor 2 drops out). One is kept for each distinct tensor, not for each linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ptqcli.errors import PTQError

# Width of the strips in which the lower triangle is summed: H is symmetric, and n strips need (n + 1) / 2n of the full product.
# Below 256 columns the products become too thin to run at full speed.
STRIP = 256

# Tokens kept as a sample of each input, taken at even distances: enough that the Gram matrix of a group of 128 columns is well determined.
SAMPLED_TOKENS = 1024

NOT_FINITE = "{where}: calibration inputs are not finite (NaN or infinity); the model overflows in this dtype or its weights are broken"


@dataclass
class Hessian:
    """Running ``sum x x^T``, float32 or float64 [in, in], and the tokens seen so far.

    ``add`` fills ``sums`` in the strips on and below the diagonal only; ``matrix`` is the whole. dtype: of the products of a batch and of
    the matrix, None for that of ``sums``. Where it is float32, batches are added up in float64: so the matrix is the same, to the last bit
    but for one in some hundred million, in whatever order and in however many processes they come, and so are the codes, which a last
    bit can change everywhere behind it.
    """

    sums: Tensor
    tokens: int = 0
    dtype: torch.dtype | None = None

    @classmethod
    def zeros(cls, features: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Hessian:
        return cls(torch.zeros(features, features, device=device, dtype=torch.float64), dtype=dtype)

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs, floating [..., in]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.dtype or self.sums.dtype)  # [tokens, in]
        for start, stop in self._strips():
            if self.sums.dtype == rows.dtype:
                self.sums[start:stop, :stop].addmm_(rows[:, start:stop].t(), rows[:, :stop])
            else:
                self.sums[start:stop, :stop] += rows[:, start:stop].t() @ rows[:, :stop]
        self.tokens += rows.shape[0]

    def settle(self) -> None:
        """Nothing comes any more: the sums take the room of the matrix."""
        if self.dtype == torch.float32:
            self.sums = self.sums.float()

    @property
    def matrix(self) -> Tensor:
        """The symmetric matrix [in, in]; the storage of ``sums``, whose part above the strips is filled in."""
        self.settle()
        for start, stop in self._strips():
            self.sums[:start, start:stop] = self.sums[start:stop, :start].t()
        return self.sums

    def divided(self, scales: Tensor) -> Hessian:
        """The Hessian of the inputs divided, channel by channel, by ``scales`` [in]."""
        matrix = self.matrix
        scales = scales.to(matrix)
        return Hessian(matrix / scales.unsqueeze(1) / scales, self.tokens)

    def shifted(self, by: Tensor, sums: Tensor) -> Hessian:
        """The Hessian of the inputs less ``by`` [in]; sums: of the inputs, [in]."""
        matrix = self.matrix
        by, sums = by.to(matrix), sums.to(matrix)
        crossed = torch.outer(by, sums - self.tokens / 2 * by)
        return Hessian(matrix - crossed - crossed.t(), self.tokens)

    def without(self, columns: Tensor) -> Hessian:
        """The Hessian of the inputs without the ``columns`` that are True in a bool [in]."""
        kept = torch.nonzero(~columns).squeeze(1)
        return Hessian(self.matrix.index_select(0, kept).index_select(1, kept), self.tokens)

    def _strips(self) -> list[tuple[int, int]]:
        features = self.sums.shape[0]
        return [(start, min(start + STRIP, features)) for start in range(0, features, STRIP)]

    def check_finite(self, where: str) -> None:
        """Raise PTQError if the statistics hold NaN or infinity. The diagonal tells: an infinite entry always reaches it."""
        self.settle()
        if not torch.isfinite(self.sums.diagonal()).all():
            raise PTQError(NOT_FINITE.format(where=where))

    def output_energy(self, weight: Tensor) -> float:
        """``sum_t |W x_t|^2`` for a matrix [out, in]."""
        matrix = self.matrix
        weight = weight.to(matrix.dtype)
        return float(((weight @ matrix) * weight).sum().clamp(min=0))


@dataclass(frozen=True, kw_only=True)
class StatisticsRequest:
    """What a part wants to know of the inputs; ``|`` joins the wants of several parts.

    hessian, magnitudes, samples, sums, pairs: see ``InputStatistics``. original: the original model's hidden states are to be kept beside
    the quantized model's, so that both are at hand before and behind every block; pairs are taken from them.
    """

    hessian: bool = False
    magnitudes: bool = False
    samples: bool = False
    sums: bool = False
    pairs: bool = False
    original: bool = False

    def __or__(self, other: StatisticsRequest) -> StatisticsRequest:
        return StatisticsRequest(
            hessian=self.hessian or other.hessian,
            magnitudes=self.magnitudes or other.magnitudes,
            samples=self.samples or other.samples,
            sums=self.sums or other.sums,
            pairs=self.pairs or other.pairs,
            original=self.original or other.original,
        )

    def __bool__(self) -> bool:
        return self.hessian or self.magnitudes or self.samples or self.sums or self.pairs or self.original


@dataclass(kw_only=True)
class Pairs:
    """What the original model has in the place of a linear's inputs, over the same tokens as ``InputStatistics``.

    With x the input in the quantized model, f that in the original model, and d what the original's residual stream has over the
    quantized one's where linears that read x write into it:

        cross = sum f x^T  [in, in]      drift = sum d x^T  [hidden, in]      sums of f  [in] and of d  [hidden]

    drift and its sum are None where no such linear reads x. held: the same over held-out windows alone, with their Hessian and the sum of
    their inputs; None in those themselves.
    """

    cross: Tensor
    sums: Tensor
    drift: Tensor | None
    drift_sums: Tensor | None
    held: Held | None

    @classmethod
    def empty(cls, features: int, hidden: int | None, device: torch.device, held: bool = True, dtype: torch.dtype = torch.float32) -> Pairs:
        """Those of no token. hidden: channels of the residual stream, None where the drift is not wanted. dtype: as of the statistics."""
        zeros = partial(torch.zeros, device=device, dtype=dtype)
        return cls(
            cross=zeros(features, features),
            sums=zeros(features),
            drift=None if hidden is None else zeros(hidden, features),
            drift_sums=None if hidden is None else zeros(hidden),
            held=Held.empty(features, hidden, device, dtype) if held else None,
        )

    def add(self, x: Tensor, f: Tensor, d: Tensor | None, held: Tensor) -> None:
        """Add tokens; x, f: [tokens, in], d: [tokens, hidden]. held: bool [tokens], those of held-out windows."""
        self._add(x, f, d)
        if self.held is not None and held.any():
            self.held.hessian.add(x[held])
            self.held.sums += x[held].float().sum(dim=0)
            self.held.pairs._add(x[held], f[held], None if d is None else d[held])

    def _add(self, x: Tensor, f: Tensor, d: Tensor | None) -> None:
        x, f = x.float(), f.float()
        self.cross += f.t() @ x
        self.sums += f.sum(dim=0)
        if self.drift is not None and self.drift_sums is not None and d is not None:
            self.drift += d.float().t() @ x
            self.drift_sums += d.float().sum(dim=0)

    def settle(self) -> None:
        """Nothing comes any more: what was added up in float64 is float32 from here on."""
        self.cross, self.sums = self.cross.float(), self.sums.float()
        self.drift = None if self.drift is None else self.drift.float()
        self.drift_sums = None if self.drift_sums is None else self.drift_sums.float()
        if self.held is not None:
            self.held.sums = self.held.sums.float()
            self.held.hessian.settle()
            self.held.pairs.settle()


@dataclass
class Held:
    """Hessian and sum of the inputs, and ``Pairs``, of held-out windows."""

    hessian: Hessian
    sums: Tensor
    pairs: Pairs

    @classmethod
    def empty(cls, features: int, hidden: int | None, device: torch.device, dtype: torch.dtype) -> Held:
        """Those of no token."""
        pairs = Pairs.empty(features, hidden, device, held=False, dtype=dtype)
        return cls(Hessian.zeros(features, device), torch.zeros(features, device=device, dtype=dtype), pairs)


class Others(Protocol):
    """Processes that have seen other tokens of the same inputs; in each, every call is answered at once."""

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes into each tensor."""

    def largest(self, tensors: Sequence[Tensor]) -> None:
        """Put the largest of all processes into each place of each tensor."""

    def everyone(self, value: Any) -> list[Any]:
        """What each process has as ``value``, in the order of their windows."""


@dataclass(kw_only=True)
class InputStatistics:
    """What is known of one input tensor, float32 throughout; what was not asked for is None (samples: empty).

    largest: [in], the largest magnitude of each channel. summed: [in], the sum of magnitudes. samples: every ``stride``-th token, in
    pieces [tokens, in]. hessian: see ``Hessian``. sums: [in], the sum of the inputs. pairs: what the original model has in their place.
    tokens: how many were seen. before: how many other processes see before these, where they are known.
    """

    largest: Tensor | None
    summed: Tensor | None
    hessian: Hessian | None
    stride: int
    sums: Tensor | None = None
    pairs: Pairs | None = None
    samples: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    before: int = 0

    @classmethod
    def empty(
        cls,
        features: int,
        needs: StatisticsRequest,
        tokens: int,
        device: torch.device,
        before: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> InputStatistics:
        """Statistics of nothing yet, of a pass that will see ``tokens`` tokens, in other processes, too; ``before`` ours so many.

        dtype: in which sums are added up, float64 for such as do not depend on the order; ``settle`` then makes them float32.
        """
        return cls(
            largest=torch.zeros(features, device=device) if needs.magnitudes else None,
            summed=torch.zeros(features, device=device, dtype=dtype) if needs.magnitudes else None,
            hessian=Hessian.zeros(features, device) if needs.hessian else None,
            stride=-(-tokens // SAMPLED_TOKENS) if needs.samples else 0,
            sums=torch.zeros(features, device=device, dtype=dtype) if needs.sums else None,
            samples=[torch.empty(0, features, device=device)] if needs.samples else [],
            before=before,
        )

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs, floating [..., in]."""
        rows = inputs.reshape(-1, inputs.shape[-1])  # [tokens, in]
        if not len(rows):  # an expert to which no token is routed
            return
        if self.largest is not None and self.summed is not None:
            magnitudes = rows.abs().float()
            torch.maximum(self.largest, magnitudes.amax(dim=0), out=self.largest)
            self.summed += magnitudes.sum(dim=0)
        if self.stride:
            self.samples.append(rows[-(self.before + self.tokens) % self.stride :: self.stride].float())
        if self.sums is not None:
            self.sums += rows.float().sum(dim=0)
        if self.hessian is not None:
            self.hessian.add(rows)
        self.tokens += rows.shape[0]

    def settle(self) -> None:
        """Nothing comes any more: what was added up in float64 is float32 from here on."""
        self.summed = None if self.summed is None else self.summed.float()
        self.sums = None if self.sums is None else self.sums.float()
        if self.hessian is not None:
            self.hessian.settle()
        if self.pairs is not None:
            self.pairs.settle()

    def merge(self, others: Others) -> None:
        """Make it what all processes together have seen; each calls this at once, and then has the same."""
        added, hessians = [self.summed, self.sums], [self.hessian]
        for pairs in () if self.pairs is None else (self.pairs, *([self.pairs.held.pairs] if self.pairs.held else ())):
            added += [pairs.cross, pairs.sums, pairs.drift, pairs.drift_sums]
        if self.pairs is not None and self.pairs.held is not None:
            added.append(self.pairs.held.sums)
            hessians.append(self.pairs.held.hessian)
        kept = [hessian for hessian in hessians if hessian is not None]
        counts = torch.tensor([self.tokens, *(hessian.tokens for hessian in kept)])
        others.add([counts, *(tensor for tensor in added if tensor is not None), *(hessian.sums for hessian in kept)])
        self.tokens, *seen = counts.tolist()
        for hessian, tokens in zip(kept, seen, strict=True):
            hessian.tokens = tokens
        if self.largest is not None:
            others.largest([self.largest])
        if self.stride:
            self.samples = others.everyone(torch.cat(self.samples))

    def sampled(self) -> Tensor:
        """The sampled tokens, [tokens, in]."""
        return torch.cat(self.samples)

    def mean_magnitude(self) -> Tensor:
        """The mean magnitude of each channel, [in]."""
        assert self.summed is not None
        return self.summed / max(self.tokens, 1)

    def divided(self, scales: Tensor) -> InputStatistics:
        """The statistics of the inputs divided, channel by channel, by the positive ``scales`` [in]."""
        return InputStatistics(
            largest=None if self.largest is None else self.largest / scales,
            summed=None if self.summed is None else self.summed / scales,
            hessian=None if self.hessian is None else self.hessian.divided(scales),
            sums=None if self.sums is None else self.sums / scales,
            stride=self.stride,
            samples=[piece / scales for piece in self.samples],
            tokens=self.tokens,
        )

    def shifted(self, by: Tensor) -> InputStatistics:
        """The statistics of the inputs less ``by`` [in]; magnitudes are those of the sampled tokens, and a Hessian asks for the sums."""
        samples, hessian = [piece - by for piece in self.samples], self.hessian
        magnitudes = torch.cat(samples).abs()
        if hessian is not None:
            assert self.sums is not None
            hessian = hessian.shifted(by, self.sums)
        return InputStatistics(
            largest=magnitudes.amax(dim=0),
            summed=magnitudes.mean(dim=0) * self.tokens,
            hessian=hessian,
            sums=None if self.sums is None else self.sums - self.tokens * by,
            stride=self.stride,
            samples=samples,
            tokens=self.tokens,
        )

    @property
    def all_zero(self) -> bool:
        """Whether no input other than zero was seen, as far as what was kept tells."""
        kept = [*self.samples] if self.largest is None else [self.largest]
        if self.hessian is not None:
            kept.append(self.hessian.sums.diagonal())
        return bool(kept) and not any(bool(piece.any()) for piece in kept)

    def check_finite(self, where: str) -> None:
        """Raise PTQError if the inputs held NaN or infinity."""
        if self.hessian is not None:
            self.hessian.check_finite(where)
        elif not all(bool(torch.isfinite(piece).all()) for piece in (self.largest, *self.samples) if piece is not None):
            raise PTQError(NOT_FINITE.format(where=where))
