"""OmniQuant's learnable equivalent transformation (Shao et al. 2024, arXiv 2308.13137, section 3.3).

As SmoothQuant does, the channels of what a linear reads are divided by s, and the columns of its weight multiplied by it (equation 3), so
that the two share what is difficult to quantize. But s comes from no formula: it is learned, with X the inputs of the block F on the
excerpt, by descent on

    |F(X; W) - F(Q(X / s); Q(W diag(s)))|^2

over all folds and all matrices of the block at once. Weights and, where the scheme has them, activations are rounded in the middle of it,
with gradients as if round() were the identity; they do go through the step of each grid, which follows the largest magnitude, since it is
by the step that a scale helps. The ranges of the weights are learned beside it, as OmniQuant's clipping (``solvers.omniquant``), so that
s suits ranges that are clipped; that clipping is then forgotten, and a solver that learns it does so again, on all of the text.

Learned is log s, from

    s_c = max|X_c|^(1/2) / max|W_c|^(1/2)        or        s_c = 1

whichever has the lesser loss: the first is the paper's, which suits rounded activations. AdamW without weight decay, rate 5e-3, of the
clipping 1e-2. Every step sees the whole excerpt, so losses compare: the scales of the best step are taken, and left out again if the block
with all its matrices rounded to nearest, as ``FoldedBlock.error`` has it, is no better for them.

Left out: the scale between q and k, which changes nothing that is quantized here. A channel that calibration never reached, or whose
weights are all zero, keeps the scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.errors import UsageError
from ptqcli.numerics.activations import activation_scale, static_scale
from ptqcli.numerics.fake_quant import FakeQuantLinear
from ptqcli.numerics.scheme import ActivationScheme
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
    needs: ClassVar[StatisticsRequest] = StatisticsRequest(magnitudes=True)
    iters: int = option(100, "steps in which the scales of a block are learned", flag="let-iters")

    def __post_init__(self) -> None:
        if self.iters < 1:
            raise UsageError(f"let iters {self.iters} is not valid; give a whole number from 1 on")

    def learning_bytes(self, weights: int, largest: int, features: int, tokens: int) -> int:
        """See ``BlockTransform``: a rounded copy of each weight and its gradient, the graph of one, what a pass keeps for the gradients."""
        return 3 * weights * 4 + 8 * largest * 4 + 6 * features * tokens * 4

    def apply(self, block: FoldedBlock) -> list[FoldNote]:
        """Learn the scales of all folds that have a linear to quantize, together."""
        folds = [fold for fold in block.folds if block.readers(fold)]
        if not folds:
            return []
        scales = _learned(block, folds, self.iters)
        before, without = block.state(), block.error()
        for fold, each in zip(folds, scales, strict=True):
            block.scale(fold, each)
        error = block.error()
        choice = "learned"
        if not error < without:
            block.undo(before)
            choice, error = "no scaling, which is no worse for the block", without
        share = error / without if without > 0 else 1.0
        return [FoldNote(producer=fold.producer, readers=fold.readers, choice=choice, error=share) for fold in folds]


def _learned(block: FoldedBlock, folds: Sequence[Fold], iters: int) -> list[Tensor]:
    """The scales of each fold, float32 [width], of the step with the least loss."""
    with torch.enable_grad():
        student, target = _Student(block, folds), block.target()
        student.begin(target)
        optimizer = torch.optim.AdamW(student.groups(), weight_decay=0.0)
        best, kept = float("inf"), student.scales()
        for step in range(iters):
            block.tell(f"let learns scales, step {step + 1} of {iters}")
            loss = student.loss(target)
            if loss.item() < best:
                best, kept = loss.item(), student.scales()
            student.descend(loss, optimizer)
    return kept


class _Student:
    """The block on the excerpt as its linears compute with what is learned."""

    def __init__(self, block: FoldedBlock, folds: Sequence[Fold]) -> None:
        self.block = block
        self.channels = [_Channels(block, fold) for fold in folds]
        behind = {local: each for each in self.channels for local in each.fold.readers}
        self.readers = {
            local: _Reader(block, local, behind.get(local), [each for each in self.channels if each.fold.producer == local])
            for local in block.specs
        }

    def begin(self, target: Tensor) -> None:
        """Take the better start."""
        with torch.no_grad():
            smoothed = float(self.loss(target))
            started = [each.log_s.detach().clone() for each in self.channels]
            for each in self.channels:
                each.log_s.zero_()
            if smoothed < float(self.loss(target)):
                for each, start in zip(self.channels, started, strict=True):
                    each.log_s.copy_(start)

    def groups(self) -> list[dict[str, object]]:
        """What is learned, for an optimizer."""
        clipping = [parameter for reader in self.readers.values() for parameter in reader.clipping.parameters()]
        return [{"params": [each.log_s for each in self.channels], "lr": RATE}, {"params": clipping, "lr": CLIPPING_RATE}]

    def scales(self) -> list[Tensor]:
        """s of each fold as it is now."""
        return [each.scales().detach() for each in self.channels]

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
    """The scales of one fold."""

    def __init__(self, block: FoldedBlock, fold: Fold) -> None:
        self.fold = fold
        start = smoothing_scales(block, fold, ALPHA).log()
        self.learned = fold.folded().to(start.device) & (start != 0)  # a channel that is not usable starts, and stays, at 1
        self.log_s = nn.Parameter(torch.where(self.learned, start, 0.0))

    def scales(self) -> Tensor:
        """s, [width]."""
        return torch.where(self.learned, self.log_s, 0.0).exp()


class _Reader(FakeQuantLinear):
    """A linear to quantize that computes with what is learned.

    behind: the channels that its inputs are, None if no fold scales them. ahead: those that its outputs are.
    """

    def __init__(self, block: FoldedBlock, local: str, behind: _Channels | None, ahead: Sequence[_Channels]) -> None:
        spec, given = block.specs[local], block.weight(local).detach()
        super().__init__(given, block.bias(local), activations=spec.scheme.activations)
        self.spec, self.given = spec, given
        self.block, self.local, self.behind, self.ahead = block, local, behind, ahead
        self.clipping = Clipping.of(given, spec.scheme, spec.scale_dtype, block.search.signed)

    def refresh(self) -> None:
        """Take the values that hold now."""
        with torch.no_grad():
            columns = self._columns()
            self.outliers = self.block.outliers(self.local, columns)
            weight = self._rounded_weight(columns)
        self.weight, self.divisor = weight.requires_grad_(), columns.requires_grad_()

    def backward(self) -> None:
        """Hand the gradients on to what is learned."""
        if self.weight.grad is None:
            return  # nothing reads its output
        columns = self._columns()
        made, grads = [self._rounded_weight(columns)], [self.weight.grad]
        if columns.requires_grad and self.divisor is not None and self.divisor.grad is not None:
            made, grads = [*made, columns], [*grads, self.divisor.grad]
        torch.autograd.backward(made, grads)

    def _columns(self) -> Tensor:
        """By what its columns are multiplied, [in]."""
        return torch.ones_like(self.given[0]) if self.behind is None else self.behind.fold.spread(self.behind.scales())

    def _rounded_weight(self, columns: Tensor) -> Tensor:
        """The scaled weight, rounded, its rows multiplied back: the linears that read them are not to know of it."""
        scaled, rows = self.given * columns, torch.ones_like(self.given[:, :1])
        for each in self.ahead:
            rows = rows * each.scales().unsqueeze(1)
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
