"""Which scales may move from one module of a block into the linears that read it: folds, found by behaviour alone.

A fold is a module P (a norm or a linear) and linears R whose input channels are P's output channels p times something that does not
depend on them. Then for any positive s, one number for each channel of P,

    P' = P / s,    R' = R diag(s)    compute what P and R computed.

Found without a name of an architecture, on a twin of the block that needs no weights:

1. *Cut.* Every module that owns parameters returns, in place of its result, a leaf tensor of random numbers of the same shape, and its
   input is noted. The block falls apart into small networks without parameters (attention, activations, products, residuals) that
   lie between the leaves p and the noted inputs y, and a pass costs next to nothing however large the model is.
2. *Degree.* By Euler's theorem a function y that is homogeneous of degree 1 in (p_tj) over all tokens t, everything else fixed, has
   Σ_t p_tj ∂y/∂p_tj = y. With cotangents w_c y_tc / |y_c|² and integers w_c >= 1 that sum is Σ w_c over the input channels c that p_j
   feeds: an integer, in one backward pass for all channels of all modules. For the channels of q, of k or of a gate it is not. So the v
   slice of a fused qkv or the up slice of a fused gate_up is found wherever it lies, and so are grouped heads.
3. *Check.* A second pass with these channels multiplied by distinct numbers: every noted input of a linear must come out multiplied by
   one of the numbers in each channel, which tells whose channel it is, and all else must not change. So a router, a second norm or the
   residual stream that also reads P forbids the fold. Input channels that are zero throughout (ReLU) stay out of it.
4. *Parameters.* How P takes the scale: a linear by its rows and bias; anything else by trying which of its parameters, as they are
   or with 1 added (Gemma's norms multiply by 1 + weight), have to be divided.
5. *Shift.* Where P has a parameter that is added to its output and every reader has a bias, a number for each channel may move, too,

       p' = p - δ,    b' = b + R δ

   if on a third pass, with numbers added to the leaf, the readers' inputs grow by just those and all else stays: behind a norm, and behind
   the values of an attention, whose weights sum to 1; not behind a gate or an activation.
6. *Proof.* ``folded.verified`` applies each fold with random scales, and shifts, to the real block in float32 and compares the outputs.

The idea of folding: SmoothQuant (Xiao et al. 2022, section 4) and AWQ (Lin et al. 2023, section 3.2), with tables per architecture; of
shifts: Outlier Suppression+ (Wei et al. 2023).
Left out: scales that enter squared (ReLU² between fc1 and fc2), and folds across blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptqcli.transforms.cut import TOLERANCE, CutError, CutModule, Run, distinct_numbers, multiplied_by, random_numbers, without_weights


@dataclass(frozen=True, eq=False, kw_only=True)
class Fold:
    """Output channels of ``producer`` that are factors of the inputs of ``readers`` (local names in the block, in running order).

    channel: int64 [in], the producer's output channel behind each input channel of the readers, -1 where there is none.
    width: number of output channels of the producer. offsets: its parameters [width] that take the scale, as
    (p + offset) / s - offset; empty for a linear, which takes it by its rows and its bias. shift: its parameter [width] that takes a shift,
    None where none can be.
    """

    producer: str
    readers: tuple[str, ...]
    channel: Tensor
    width: int
    offsets: tuple[tuple[str, float], ...] = ()
    shift: str | None = None

    def spread(self, values: Tensor, elsewhere: float = 1.0) -> Tensor:
        """``values`` [width] of the producer's channels for the input channels of the readers, [in]; ``elsewhere`` where there is none.

        Of the scales by which the producer is divided it is what multiplies the readers' columns.
        """
        channel = self.channel.to(values.device)
        return torch.where(channel >= 0, values[channel.clamp_min(0)], torch.full_like(values[:1], elsewhere))

    def largest(self, values: Tensor) -> Tensor:
        """The largest of non-negative ``values`` [in] over the input channels behind each producer channel, [width]; 0 where none."""
        channel = self.channel.to(values.device)
        read = channel >= 0
        return values.new_zeros(self.width).scatter_reduce(0, channel[read], values[read], "amax")

    def folded(self) -> Tensor:
        """Bool [width]: the producer's channels that the readers see, which are those that can be scaled."""
        return self.largest(torch.ones(len(self.channel))) > 0


@dataclass(frozen=True)
class FoldSearch:
    """Folds in the order in which their producers run, and (producer, reason) of each that was considered and left out."""

    folds: tuple[Fold, ...]
    rejected: tuple[tuple[str, str], ...]


def find_folds(block: nn.Module, run: Run) -> FoldSearch:
    """All folds inside ``block``, whose weights may be on the meta device: nothing but its code and its shapes matters.

    ``run`` brings its tensors to the device of the block, or to the CPU when that is the meta device.
    """
    try:
        cut = _CutBlock(block, run)
    except (RuntimeError, CutError) as error:  # the former from code that the cuts or float64 do not suit
        return FoldSearch((), (("block", f"cannot be run in pieces, so no fold can be looked for: {str(error).splitlines()[0]}"),))
    idle = sorted(cut.linears.difference(cut.names))
    if idle:  # such as an expert that no token was sent to
        return FoldSearch((), (("block", f"{idle[0]} did not run on the probe, so it is unknown what it reads"),))
    folds: list[Fold] = []
    rejected: list[tuple[str, str]] = []
    for index in reversed(range(len(cut.names))):  # of several producers of one input the one that ran last is kept
        try:
            new = cut.folds(index)
            _refuse_taken(new, folds)
        except CutError as reason:
            rejected.insert(0, (cut.names[index], str(reason)))
        else:
            folds[:0] = new
    return FoldSearch(tuple(folds), tuple(rejected))


def divide(parameters: Mapping[str, Tensor], offsets: tuple[tuple[str, float], ...], scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Parameters [n] divided by ``scale`` [n] in the dtypes they have, and the scale float64 [n] by which they are then divided.

    The first parameter of a channel that is not zero sets its scale, and the others follow: a norm without bias is folded exactly, a bias
    is rounded. A channel keeps the scale 1 where all parameters are zero or one would leave the range of the dtype.
    """
    scale = scale.double().to(next(iter(parameters.values())).device)
    for name, offset in offsets:
        old, new = _quotient(parameters[name], offset, scale)
        scale = torch.where(new.isfinite() & ((old == 0) == (new == 0)), scale, 1.0)
    settled = torch.zeros_like(scale, dtype=torch.bool)
    divided = {}
    for name, offset in offsets:
        old, new = _quotient(parameters[name], offset, scale)
        divided[name] = (new - offset).to(parameters[name].dtype)
        scale = torch.where(settled | (new == 0), scale, old / new)
        settled |= new != 0
    return divided, torch.where(settled, scale, 1.0)


def _quotient(parameter: Tensor, offset: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    old = parameter.double() + offset
    return old, (old / scale - offset).to(parameter.dtype).double() + offset


class _NoFoldError(CutError):
    """Why a module cannot be folded although some of its channels are factors of a linear's input."""


class _CutBlock(CutModule):
    """A cut block, and the channels of its leaves that are factors of the inputs of linears."""

    def __init__(self, block: nn.Module, run: Run) -> None:
        super().__init__(block, run)
        called = zip(self.names, self.before, strict=False)
        self.channels = self.factors([before[0] for name, before in called if name in self.linears])

    def folds(self, index: int) -> list[Fold]:
        """Folds that start from cut module ``index``: one for all readers that lay its channels out alike. Raises _NoFoldError."""
        factors, producer = self.channels[index], self.names[index]
        if not factors.any():
            return []
        if self.names.count(producer) > 1:
            raise _NoFoldError("runs more than once")
        offsets = self._offsets(index)
        layouts: dict[tuple[int, ...], list[str]] = {}
        for reader, channel in self._readers(index):
            layouts.setdefault(tuple(channel.tolist()), []).append(reader)
        folds = [
            Fold(producer=producer, readers=tuple(readers), channel=torch.tensor(layout), width=len(factors), offsets=offsets)
            for layout, readers in layouts.items()
        ]
        if torch.stack([fold.folded() for fold in folds]).sum(0).max() > 1:
            raise _NoFoldError(f"{', '.join(fold.readers[0] for fold in folds)} read the same channels in different orders")
        shift = self._shift(index, {reader: fold for fold in folds for reader in fold.readers})
        return [replace(fold, shift=shift) for fold in folds]

    def _readers(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """(linear, int64 [in]: the channel of cut module ``index`` behind each of its inputs, or -1) for each linear that reads it."""
        scale = distinct_numbers(self.channels[index])
        names = [*self.names, "what the block returns"]
        for name, before, after in zip(names, self.before, self.passed({index: lambda leaf: leaf * scale}), strict=True):
            for old, new in zip(before, after, strict=True):
                channel = multiplied_by(old.detach(), new.detach(), scale)
                if channel is None:
                    raise _NoFoldError(f"{name} depends on it in another way than by a factor")
                if not (channel >= 0).any():
                    continue
                if name not in self.linears or names.count(name) > 1:
                    raise _NoFoldError(f"{name} depends on it and is not a linear that runs once")
                yield name, channel.cpu()

    def _shift(self, index: int, readers: Mapping[str, Fold]) -> str | None:
        """The parameter of cut module ``index`` that moves its output, if the inputs of its ``readers`` move along, and nothing else."""
        parameter = self._added(index)
        if parameter is None or any(self.module.get_submodule(reader).bias is None for reader in readers):
            return None
        folded = torch.stack([fold.folded() for fold in readers.values()]).any(dim=0)
        by = folded.to(self.leaves[index].device) * random_numbers(folded.shape, self.generator, self.leaves[index].device)
        try:
            passed = self.passed({index: lambda leaf: leaf + by})
        except CutError:
            return None
        for name, before, after in zip([*self.names, ""], self.before, passed, strict=True):
            moved = readers[name].spread(by, 0.0) if name in readers else 0.0
            for old, new in zip(before, after, strict=True):
                if (new - old.detach() - moved).norm() > TOLERANCE * old.detach().norm():
                    return None
        return parameter

    def _added(self, index: int) -> str | None:
        """The parameter of cut module ``index`` that is added to its output."""
        if self.names[index] in self.linears:
            return None if self.module.get_submodule(self.names[index]).bias is None else "bias"
        module, result, names = self._tried(index)
        args, kwargs = self.arguments[index]
        by = random_numbers(result.shape[-1:], self.generator, result.device)
        for name in names:
            moved = functional_call(module, {name: module.get_parameter(name) + by}, args, kwargs).detach() - by
            if (moved - result).norm() <= TOLERANCE * result.norm():
                return name
        return None

    def _tried(self, index: int) -> tuple[nn.Module, Tensor, list[str]]:
        """Cut module ``index`` with random parameters, what it then returns, and those of them that have a number for each channel."""
        module = without_weights(self.module.get_submodule(self.names[index]), self.generator)
        args, kwargs = self.arguments[index]
        result = module(*args, **kwargs).detach()
        return module, result, [name for name, parameter in module.named_parameters() if parameter.shape == result.shape[-1:]]

    def _offsets(self, index: int) -> tuple[tuple[str, float], ...]:
        """The parameters of cut module ``index`` to divide, found by trying them on random ones. Raises _NoFoldError if none will do."""
        if self.names[index] in self.linears:
            return ()
        module, result, names = self._tried(index)
        args, kwargs = self.arguments[index]
        scale = 1 + torch.rand(result.shape[-1], generator=self.generator, dtype=torch.float64).to(result.device)
        for choice in itertools.product((0.0, 1.0, None), repeat=len(names)):
            offsets = tuple((name, offset) for name, offset in zip(names, choice, strict=True) if offset is not None)
            divided = {name: (module.get_parameter(name) + offset) / scale - offset for name, offset in offsets}
            error = functional_call(module, divided, args, kwargs).detach() * scale - result
            if error.norm() <= TOLERANCE * result.norm():
                return offsets
        raise _NoFoldError("dividing its parameters does not divide its output")


def _refuse_taken(new: list[Fold], folds: list[Fold]) -> None:
    takers = {reader: fold.producer for fold in folds for reader in fold.readers}
    for fold in new:
        for reader in fold.readers:
            if reader in takers:
                raise _NoFoldError(f"{reader} has its inputs scaled by {takers[reader]}")
