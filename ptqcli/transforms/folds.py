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
5. *Proof.* ``folded.verified`` applies each fold with random scales to the real block in float32 and compares the outputs.

The idea of folding: SmoothQuant (Xiao et al. 2022, section 4) and AWQ (Lin et al. 2023, section 3.2), with tables per architecture.
Left out: scales that enter squared (ReLU² between fc1 and fc2), and folds across blocks.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptqcli.model.linears import is_linear, linear_weight

# Runs a twin of the block on the probe, a few tokens of hidden states and the recorded arguments, floating ones cast to the dtype.
Run: TypeAlias = Callable[[nn.Module, torch.dtype], Tensor]

# Of the search in float64; above the noise of attention code that computes its softmax in float32.
TOLERANCE = 1e-5
DRAWS = 4  # of the integers w: one would do, but for a chance of about TOLERANCE per channel
LARGEST_WEIGHT = 4

OTHER_PATH = "the block takes another path when its output is scaled"


@dataclass(frozen=True, eq=False, kw_only=True)
class Fold:
    """Output channels of ``producer`` that are factors of the inputs of ``readers`` (local names in the block, in running order).

    channel: int64 [in], the producer's output channel behind each input channel of the readers, -1 where there is none.
    width: number of output channels of the producer. offsets: its parameters [width] that take the scale, as
    (p + offset) / s - offset; empty for a linear, which takes it by its rows and its bias.
    """

    producer: str
    readers: tuple[str, ...]
    channel: Tensor
    width: int
    offsets: tuple[tuple[str, float], ...] = ()

    def spread(self, scale: Tensor) -> Tensor:
        """What multiplies the readers' columns, [in], when the producer's channels are divided by ``scale`` [width]: 1 where none."""
        channel = self.channel.to(scale.device)
        return torch.where(channel >= 0, scale[channel.clamp_min(0)], torch.ones_like(scale[:1]))

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
        cut = CutBlock(block, run)
    except (RuntimeError, NoFoldError) as error:  # the former from code that the cuts or float64 do not suit
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
        except NoFoldError as reason:
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


class NoFoldError(Exception):
    """Why a module cannot be folded although some of its channels are factors of a linear's input, or why none of the block can."""


class CutBlock:
    """A twin of the block in float64, cut at its modules with parameters.

    names: the cut modules, one entry a call, in running order. leaves: what they return in place of their results. linears: names of
    those that are linears. arguments: what each was called with. before: the floating tensors among these, and last the block's output.
    """

    def __init__(self, block: nn.Module, run: Run) -> None:
        self.block, self.run = block, run
        self.names: list[str] = []
        self.leaves: list[Tensor] = []
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.generator = torch.Generator().manual_seed(0)
        self.twin = _without_weights(block, self.generator)
        self.linears = {name for name, module in self.twin.named_modules() if is_linear(module)}
        for name, module in self.twin.named_modules():
            if name in self.linears:
                module.forward = partial(_empty_result, linear_weight(module).shape[0])
            if name in self.linears or _is_leaf(module):
                module.register_forward_hook(partial(self._cut, name), with_kwargs=True)
        self.before = self.outputs()
        self.factors = self._factors()

    def _cut(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Tensor | None:
        if not (isinstance(result, Tensor) and result.is_floating_point()):
            return None  # not one tensor of channels: the module stays part of the network, with random parameters
        call = len(self.seen)
        if self.scaled is None:  # the first pass
            self.names.append(name)
            self.arguments.append((args, kwargs))
            self.leaves.append(_random(result.shape, self.generator, result.device).requires_grad_())
        elif self.names[call : call + 1] != [name] or self.leaves[call].shape != result.shape:
            raise NoFoldError(OTHER_PATH)
        # clones, here and in what is returned, because code may change its tensors in place
        self.seen.append([value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()])
        leaf = self.leaves[call]
        return leaf.clone() if call != self.scaled else leaf * self.scale

    def outputs(self, scaled: int | None = None, scale: Tensor | float = 1.0) -> list[list[Tensor]]:
        """What the cut modules receive, and last what the block returns; after the first pass with leaf ``scaled`` times ``scale``."""
        self.scaled, self.scale = scaled, scale
        self.seen: list[list[Tensor]] = []
        with torch.enable_grad():
            output = self.run(self.twin, torch.float64)
        if len(self.seen) != len(self.names):
            raise NoFoldError(OTHER_PATH)
        passed = [*self.seen, [output]]
        if any(value.isnan().any() for values in passed for value in values):
            raise NoFoldError("it uses the weight of a linear without calling the linear")
        return passed

    def _factors(self) -> list[Tensor]:
        """Bool [channels] for each leaf: of which channels the inputs of linears are homogeneous of degree 1."""
        inputs = [before[0] for name, before in zip(self.names, self.before, strict=False) if name in self.linears]
        inputs = [x for x in inputs if x.requires_grad]
        found = [torch.ones(leaf.shape[-1], dtype=torch.bool, device=leaf.device) for leaf in self.leaves]
        for _ in range(DRAWS if inputs else 0):
            cotangents = [self._cotangent(x.detach()) for x in inputs]
            gradients = torch.autograd.grad(inputs, self.leaves, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True)
            for factors, leaf, gradient in zip(found, self.leaves, gradients, strict=True):
                degree = _over_tokens(leaf.detach() * gradient)
                whole = degree.round()
                factors &= (whole >= 1) & ((degree - whole).abs() <= TOLERANCE * whole)
        return found

    def _cotangent(self, x: Tensor) -> Tensor:
        weights = torch.randint(1, LARGEST_WEIGHT + 1, x.shape[-1:], generator=self.generator).to(x.device)
        return weights * x / _over_tokens(x * x).clamp_min(torch.finfo(x.dtype).tiny)

    def folds(self, index: int) -> list[Fold]:
        """Folds that start from cut module ``index``: one for all readers that lay its channels out alike. Raises NoFoldError."""
        factors, producer = self.factors[index], self.names[index]
        if not factors.any():
            return []
        if self.names.count(producer) > 1:
            raise NoFoldError("runs more than once")
        offsets = self._offsets(index)
        layouts: dict[tuple[int, ...], list[str]] = {}
        for reader, channel in self._readers(index):
            layouts.setdefault(tuple(channel.tolist()), []).append(reader)
        folds = [
            Fold(producer=producer, readers=tuple(readers), channel=torch.tensor(layout), width=len(factors), offsets=offsets)
            for layout, readers in layouts.items()
        ]
        if torch.stack([fold.folded() for fold in folds]).sum(0).max() > 1:
            raise NoFoldError(f"{', '.join(fold.readers[0] for fold in folds)} read the same channels in different orders")
        return folds

    def _readers(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """(linear, int64 [in]: the channel of cut module ``index`` behind each of its inputs, or -1) for each linear that reads it."""
        factors = self.factors[index]
        # large, so that a clamp shows
        numbers = torch.logspace(1, 3, int(factors.sum()), dtype=torch.float64, device=factors.device)
        scale = torch.ones(len(factors), dtype=torch.float64, device=factors.device).masked_scatter(factors, numbers)
        names = [*self.names, "what the block returns"]
        for name, before, after in zip(names, self.before, self.outputs(index, scale), strict=True):
            for old, new in zip(before, after, strict=True):
                channel = _multiplied_by(old.detach(), new.detach(), scale)
                if channel is None:
                    raise NoFoldError(f"{name} depends on it in another way than by a factor")
                if not (channel >= 0).any():
                    continue
                if name not in self.linears or names.count(name) > 1:
                    raise NoFoldError(f"{name} depends on it and is not a linear that runs once")
                yield name, channel.cpu()

    def _offsets(self, index: int) -> tuple[tuple[str, float], ...]:
        """The parameters of cut module ``index`` to divide, found by trying them on random ones. Raises NoFoldError if none will do."""
        if self.names[index] in self.linears:
            return ()
        module = _without_weights(self.block.get_submodule(self.names[index]), self.generator)
        args, kwargs = self.arguments[index]
        result = module(*args, **kwargs).detach()
        scale = 1 + torch.rand(result.shape[-1], generator=self.generator, dtype=torch.float64).to(result.device)
        names = [name for name, parameter in module.named_parameters() if parameter.shape == scale.shape]
        for choice in itertools.product((0.0, 1.0, None), repeat=len(names)):
            offsets = tuple((name, offset) for name, offset in zip(names, choice, strict=True) if offset is not None)
            divided = {name: (module.get_parameter(name) + offset) / scale - offset for name, offset in offsets}
            error = functional_call(module, divided, args, kwargs).detach() * scale - result
            if error.norm() <= TOLERANCE * result.norm():
                return offsets
        raise NoFoldError("dividing its parameters does not divide its output")


def _refuse_taken(new: list[Fold], folds: list[Fold]) -> None:
    takers = {reader: fold.producer for fold in folds for reader in fold.readers}
    for fold in new:
        for reader in fold.readers:
            if reader in takers:
                raise NoFoldError(f"{reader} has its inputs scaled by {takers[reader]}")


def _without_weights(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in float64 whose linears hold NaN, without memory, and whose other parameters are random."""
    matrices = {id(parameter) for inner in module.modules() if is_linear(inner) for parameter in inner.parameters()}
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        if id(parameter) in matrices:  # not on the meta device: a product with it on the CPU would be garbage instead of an error
            value = torch.full((), torch.nan, dtype=torch.float64, device=device).expand(parameter.shape)
        else:
            value = _random(parameter.shape, generator, device)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(module, memo).double()


def _random(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def _is_leaf(module: nn.Module) -> bool:
    """Whether all parameters below ``module`` are its own, and there are some."""
    own = len(list(module.parameters(recurse=False)))
    return own > 0 and own == len(list(module.parameters()))


def _empty_result(out_features: int, *args: Tensor, **kwargs: Tensor) -> Tensor:
    (x,) = (*args, *kwargs.values())
    return x.new_empty(*x.shape[:-1], out_features)


def _over_tokens(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0)


def _multiplied_by(old: Tensor, new: Tensor, numbers: Tensor) -> Tensor | None:
    """Which of ``numbers``, each 1 or one of a kind, the channels of ``old`` were multiplied by: int64, -1 for 1; None if by no number."""
    values, index = torch.cat([numbers.new_ones(1), numbers[numbers != 1]]), (numbers != 1).nonzero().flatten()
    energy = _over_tokens(old * old)
    ratio = torch.where(energy > 0, _over_tokens(old * new) / energy, 1.0)
    nearest = torch.bucketize(ratio, (values[1:] + values[:-1]) / 2)
    difference = new - values[nearest] * old
    if (_over_tokens(difference * difference) > TOLERANCE**2 * energy).any():
        return None
    return torch.cat([index.new_full((1,), -1), index])[nearest]
