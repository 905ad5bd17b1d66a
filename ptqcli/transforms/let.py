"""OmniQuant's learnable equivalent transformation (Shao et al. 2024, arXiv 2308.13137, section 3.3).

What a linear with bias b reads, X, is shifted by delta and divided by s, channel by channel, and the linear takes both up (equation 3):

    X W^T + b  =  [(X - delta) / s] [W diag(s)]^T  +  [b + W delta]

so that inputs and weights share what is difficult to quantize. SmoothQuant has a formula for s; here s and delta are learned, by descent on
the squared change of the output of the whole block on the excerpt when the first two brackets are rounded, over all folds at once. round()
has the gradient of the identity; but gradients go through the step of every grid, which follows the largest magnitude, since it is by the
step that a scale helps. The ranges of the weights are learned beside it, as OmniQuant's clipping (``solvers.omniquant``), so that s suits
ranges that are clipped; that clipping is then forgotten, and a solver that learns it does so again, on all of the text.

Inputs are shifted where the scheme rounds them, with scales that follow them, and where there are biases to take it up, as in models with
LayerNorm: delta starts in the middle between the least and the largest of each channel. Learned is log s, from

    s_c = max|X_c - delta_c|^(1/2) / max|W_c|^(1/2)        or        s_c = 1

whichever has the lesser loss: the first is the paper's, which suits rounded activations. AdamW without weight decay, rate 5e-3, of the
clipping 1e-2. The paper takes 20 epochs of 128 windows; here are fewer steps, each on the whole excerpt, so that losses compare.
What the best step has is taken, and left out again if it is no better for the block than nothing, with all its matrices rounded on ranges
of least squared error, which stand for those that a solver finds.

Left out: the scale between q and k, which changes nothing that is quantized here. A channel that calibration never reached, or whose
weights are all zero, keeps the scale 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.errors import UsageError
from ptqcli.numerics.activations import activation_scale, static_scale
from ptqcli.numerics.fake_quant import FakeQuantLinear
from ptqcli.numerics.ranges import SquaredError
from ptqcli.numerics.scheme import ActivationScheme, Scheme
from ptqcli.options import option
from ptqcli.solvers.omniquant import RATE as CLIPPING_RATE
from ptqcli.solvers.omniquant import Clipping
from ptqcli.solvers.rounding import through
from ptqcli.transforms import BlockTransform
from ptqcli.transforms.folded import FoldedBlock, FoldNote
from ptqcli.transforms.folds import Fold
from ptqcli.transforms.smoothquant import smoothing_scales

RATE = 5e-3
ALPHA = 0.5  # of the start


@dataclass(frozen=True)
class LET(BlockTransform):
    """The transformation with its one option. iters: steps of learning for each block."""

    name: ClassVar[str] = "let"
    summary: ClassVar[str] = "OmniQuant's equivalent transformation: scales of channels learned from the output of blocks"
    needs: ClassVar[StatisticsRequest] = StatisticsRequest(magnitudes=True, samples=True, sums=True)
    iters: int = option(100, "steps in which the scales of a block are learned", flag="let-iters")

    def __post_init__(self) -> None:
        if self.iters < 1:
            raise UsageError(f"let iters {self.iters} is not valid; give a whole number from 1 on")

    def refusal(self, scheme: Scheme) -> str | None:
        """Its clipping is that of integers."""
        if scheme.codebook is None and scheme.blocks is None:
            return None
        return f"let learns beside the clipping of integers, not of scheme {scheme}; choose awq"

    def learning_bytes(self, weights: int, largest: int, features: int, tokens: int) -> int:
        """See ``BlockTransform``: a rounded copy of each weight and its gradient, the graph of one, what a pass keeps for the gradients."""
        return 3 * weights * 4 + 8 * largest * 4 + 4 * features * tokens * 4

    def apply(self, block: FoldedBlock) -> list[FoldNote]:
        """Learn the scales and shifts of all folds that have a linear to quantize, together."""
        folds = [fold for fold in block.folds if block.readers(fold)]
        if not folds:
            return []
        ranges, shifted = SquaredError(block.search.signed), [_shifts(block, fold) for fold in folds]
        before, without = block.state(), block.error(ranges)
        _transform(block, folds, shifted, self.iters)
        error = block.error(ranges)
        if not error < without:
            block.undo(before)
            return [_note(fold, "nothing, which is no worse for the block", 1.0) for fold in folds]
        return [_note(fold, "scales and shifts" if each else "scales", error / without) for fold, each in zip(folds, shifted, strict=True)]


def _transform(block: FoldedBlock, folds: Sequence[Fold], shifted: Sequence[bool], iters: int) -> None:
    """Shift ``folds`` to the middle, those that are to be ``shifted``, learn from there, and apply what is learned."""
    for fold in itertools.compress(folds, shifted):
        block.shift(fold, _centre(block, fold))
    for fold, shifts, (s, delta) in zip(folds, shifted, _learned(block, folds, shifted, iters), strict=True):
        block.scale(fold, s)
        if shifts:  # after the scale, which would round the bias once more, and this time for nobody to make up for
            block.shift(fold, delta / s)


def _note(fold: Fold, choice: str, error: float) -> FoldNote:
    return FoldNote(producer=fold.producer, readers=fold.readers, choice=choice, error=error)


def _shifts(block: FoldedBlock, fold: Fold) -> bool:
    """Whether shifts are of use to ``fold``, and exact: its readers round inputs by what they are, not by what calibration has seen."""
    if fold.shift is None:
        return False
    schemes = [block.specs[local].scheme for local in block.readers(fold)]
    return all(each.activations is not None and each.activations.dynamic and each.outliers is None for each in schemes)


def _centre(block: FoldedBlock, fold: Fold) -> Tensor:
    """The middle between the least and the largest input of each channel of the fold's producer, [fold.width]; 0 where none is read."""
    samples = block.inputs(block.readers(fold)[0]).sampled()
    channel = fold.channel.to(samples.device)
    read, low, high = channel >= 0, samples.new_full((fold.width,), torch.inf), samples.new_full((fold.width,), -torch.inf)
    low = low.scatter_reduce(0, channel[read], samples.amin(dim=0)[read], "amin")
    high = high.scatter_reduce(0, channel[read], samples.amax(dim=0)[read], "amax")
    return torch.where(fold.folded().to(samples.device), (low + high) / 2, 0.0)


def _learned(block: FoldedBlock, folds: Sequence[Fold], shifted: Sequence[bool], iters: int) -> list[tuple[Tensor, Tensor]]:
    """s and delta of each fold, float32 [width], of the step with the least loss."""
    with torch.enable_grad():
        student, target = _Student(block, folds, shifted), block.target()
        student.begin(target)
        optimizer = torch.optim.AdamW(student.groups(), weight_decay=0.0)
        best, kept = float("inf"), student.now()
        for step in range(iters):
            block.tell(f"let learns scales, step {step + 1} of {iters}")
            loss = student.loss(target)
            if loss.item() < best:
                best, kept = loss.item(), student.now()
            student.descend(loss, optimizer)
    return kept


class _Student:
    """The block on the excerpt as its linears compute with what is learned."""

    def __init__(self, block: FoldedBlock, folds: Sequence[Fold], shifted: Sequence[bool]) -> None:
        self.block = block
        self.channels = [_Channels(block, fold, shifts) for fold, shifts in zip(folds, shifted, strict=True)]
        behind = {local: each for each in self.channels for local in each.fold.readers}
        self.readers = {
            local: _Reader(block, local, behind.get(local), [each for each in self.channels if each.fold.producer == local])
            for local in block.specs
        }

    @torch.no_grad()
    def begin(self, target: Tensor) -> None:
        """Take the better start."""
        smoothed, started = self.loss(target), [each.log_s.clone() for each in self.channels]
        for each in self.channels:
            each.log_s.zero_()
        if smoothed < self.loss(target):
            for each, start in zip(self.channels, started, strict=True):
                each.log_s.copy_(start)

    def groups(self) -> list[dict[str, object]]:
        """What is learned, for an optimizer."""
        clipping = [parameter for reader in self.readers.values() for parameter in reader.clipping.parameters()]
        channels = [parameter for each in self.channels for parameter in (each.log_s, each.delta)]
        return [{"params": channels, "lr": RATE}, {"params": clipping, "lr": CLIPPING_RATE}]

    def now(self) -> list[tuple[Tensor, Tensor]]:
        """s and delta of each fold as they are."""
        return [each.now() for each in self.channels]

    def loss(self, target: Tensor) -> Tensor:
        """Squared change of the output, summed over features so that gradients keep clear of Adam's epsilon."""
        for reader in self.readers.values():
            reader.refresh()
        return (self.block.output(self.readers) - target).square().sum(dim=-1).mean()

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step; the graphs of the weights are made one after the other, so that memory holds one at a time."""
        loss.backward()
        for reader in self.readers.values():
            reader.backward()
        optimizer.step()
        optimizer.zero_grad()


class _Channels:
    """The scales, and where there are any the shifts, of the channels of one fold."""

    def __init__(self, block: FoldedBlock, fold: Fold, shifts: bool) -> None:
        self.fold, self.shifts = fold, shifts
        start = smoothing_scales(block, fold, ALPHA).log()
        self.learned = fold.folded().to(start.device) & (start != 0)  # a channel that is not usable starts, and stays, at 1
        self.log_s = nn.Parameter(torch.where(self.learned, start, 0.0))
        self.delta = nn.Parameter(torch.zeros_like(start), requires_grad=shifts)

    def s(self) -> Tensor:
        """The scales, [width]."""
        return torch.where(self.learned, self.log_s, 0.0).exp()

    def now(self) -> tuple[Tensor, Tensor]:
        """s and delta as they are, [width] each."""
        return self.s().detach(), self.delta.detach().clone()


class _Reader(FakeQuantLinear):
    """A linear to quantize that computes with what is learned.

    behind: the channels that its inputs are, None if no fold scales them. ahead: those that its outputs are.
    """

    def __init__(self, block: FoldedBlock, local: str, behind: _Channels | None, ahead: Sequence[_Channels]) -> None:
        spec, given, bias = block.specs[local], block.weight(local).detach(), block.bias(local)
        super().__init__(given, bias, activations=spec.scheme.activations)
        self.spec, self.given, self.given_bias = spec, given, bias
        self.block, self.local, self.behind, self.ahead = block, local, behind, ahead
        self.delta: Tensor | None = None
        self.clipping = Clipping.of(given, spec.scheme, spec.scale_dtype, block.search.signed)

    def refresh(self) -> None:
        """Take the values that hold now; of all of them but the weight gradients flow to what is learned."""
        self.divisor = self._columns()
        if self.behind is not None and self.behind.shifts and self.given_bias is not None:
            self.delta = self.behind.fold.spread(self.behind.delta, 0.0)
            self.bias = self.given_bias + self.given @ self.delta
        with torch.no_grad():
            self.outliers = self.block.outliers(self.local, self.divisor)
            self.weight = self._rounded_weight(self.divisor).requires_grad_()

    def backward(self) -> None:
        """Hand the gradient of the weight on to what is learned."""
        if self.weight.grad is not None:  # else nothing reads its output
            self._rounded_weight(self._columns()).backward(self.weight.grad)

    def forward(self, inputs: Tensor) -> Tensor:
        """As the base class, with inputs that are yet to be shifted and divided."""
        return super().forward(inputs if self.delta is None else inputs - self.delta)

    def _columns(self) -> Tensor:
        """By what its columns are multiplied, [in]."""
        return torch.ones_like(self.given[0]) if self.behind is None else self.behind.fold.spread(self.behind.s())

    def _rounded_weight(self, columns: Tensor) -> Tensor:
        """The scaled weight, rounded, its rows multiplied back: the linears that read them are not to know of it."""
        scaled, rows = self.given * columns, torch.ones_like(self.given[:, :1])
        for each in self.ahead:
            rows = rows * each.s().unsqueeze(1)
        self.clipping.hold(scaled / rows)
        rounded = self.clipping() * rows
        return rounded if self.outliers is None else torch.where(self.outliers, scaled, rounded)

    def _rounded(self, x: Tensor, activations: ActivationScheme, above: Tensor | None) -> Tensor:
        """As the base class rounds, but with gradients through the step, which follows the largest magnitude."""
        even = x if above is None else x.masked_fill(above, 0)
        step, middle = self._step(even, activations), 1 << (activations.bits - 1)
        rounded = through(even / step, torch.round).clamp(-middle, middle - 1) * step
        return rounded if above is None else torch.where(above, x, rounded)

    def _step(self, x: Tensor, activations: ActivationScheme) -> Tensor:
        if activations.dynamic:
            return activation_scale(x, activations)
        largest = self.block.inputs(self.local).largest
        assert largest is not None
        assert self.divisor is not None
        return static_scale(largest / self.divisor, self.spec.scale_dtype).float()
