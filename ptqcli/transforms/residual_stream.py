"""What can be rotated in a model: its residual stream as a whole, and the values inside each head of attention. Found by behaviour.

The stream is the sum ``x`` that embedding and blocks add to and norms read. With any orthogonal Q, ``x Q`` in its place changes nothing if

- every *writer*, a linear or an embedding, adds its output times Q: ``W' = Q^T W``, ``b' = b Q``, ``E' = E Q``;
- every *norm* that reads the stream is an RMS norm, ``n(x) = g * x / |x|``, whose gain g is first moved into the linears that read it:
  ``n(x Q) = n(x) Q`` without its gain, but not with it, and not with LayerNorm's mean;
- every *reader*, a linear behind such a norm or on the stream itself, takes the rotation back: ``W' = W diag(g) Q``.

(SliceGPT, Ashkboos et al. 2024, section 3.1; QuaRot, Ashkboos et al. 2024, section 4.) Without a name of an architecture, on the whole
model taken apart without its weights (``cut.py``):

1. The norm that the output head reads is one of the stream's; what its input is a sum of are the writers, and every module whose input
   depends on a writer reads the stream. A norm among the writers, as in blocks whose outputs are normed before they are added, has a gain
   that nothing can take up: the model is refused.
2. Each norm is tried on random numbers: which parameter is its gain, as it is or with 1 added, and does it rotate without it?
3. All leaves of writers are rotated, all of norms rotated behind the division by random gains, in one pass. Every input of a norm of the
   stream must come out rotated, that of a reader divided and rotated, and everything else as it was. So constant factors on the way are
   found harmless, and any other code between the modules forbids the rotation.

Values: where the input of a linear has the channels of another linear as factors (v and o), it is tried in which sizes pieces of them can
be rotated; the largest that the code lets through unchanged is a head. Query heads that share a head of values share its rotation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptqcli.model.linears import linear_input
from ptqcli.transforms.cut import TOLERANCE, CutError, CutModule, Run, distinct_numbers, multiplied_by, without_weights
from ptqcli.transforms.hadamard import Rotation, random_rotation

OFFSETS = (0.0, 1.0)  # of gains: a norm multiplies by its weight, or by 1 + weight
LARGEST_HEAD = 512  # channels


@dataclass(frozen=True)
class Gain:
    """What a norm multiplies by: ``parameter`` (a path in the model) plus ``offset``."""

    parameter: str
    offset: float


@dataclass(frozen=True, kw_only=True)
class ResidualStream:
    """The modules of a stream of ``width`` channels, by their paths.

    writers: linears and embeddings. norms: with their gains, None for one that has none. readers: linears, with the norm between the stream
    and them, None where there is none.
    """

    width: int
    writers: tuple[str, ...]
    norms: Mapping[str, Gain | None]
    readers: Mapping[str, str | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class ValueHeads:
    """Output channels of linear ``producer`` that linear ``reader`` reads through attention, head by head.

    channels: int64 [heads, size], those of the producer. The reader's inputs are pieces of ``size`` channels, each from one head.
    """

    producer: str
    reader: str
    channels: Tensor

    @property
    def size(self) -> int:
        """Channels in a head."""
        return self.channels.shape[1]

    def turn_values(self, values: Tensor, rotation: Rotation) -> Tensor:
        """What the producer gives, [..., out], with every head rotated; float64."""
        turned = values.double().clone()
        turned[..., self.channels] = rotation.apply(values[..., self.channels])
        return turned

    def turn_inputs(self, inputs: Tensor, rotation: Rotation) -> Tensor:
        """What the reader is given, [..., in], with every head rotated; float64."""
        return rotation.apply(inputs.unflatten(-1, (-1, self.size))).flatten(-2)


class ModelInPieces:
    """A model, whose weights may be on the meta device, taken apart. run: its logits on a few tokens. Raises CutError if it cannot be."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        try:
            self._cut = CutModule(model, run)
        except RuntimeError as error:  # from code that the cuts or float64 do not suit
            raise CutError(f"it cannot be run in pieces ({str(error).splitlines()[0]})") from error
        self._names = [*self._cut.names, "the model"]
        self._generator = torch.Generator().manual_seed(1)

    @cached_property
    def _sources(self) -> list[frozenset[int]]:
        """For each cut module, and last the model, the leaves on which its inputs depend."""
        return [frozenset().union(*map(self._leaves_behind, values)) for values in self._cut.before]

    def _leaves_behind(self, value: Tensor) -> frozenset[int]:
        if not value.requires_grad:
            return frozenset()
        gradients = torch.autograd.grad(value, self._cut.leaves, torch.ones_like(value), retain_graph=True, allow_unused=True)
        return frozenset(index for index, gradient in enumerate(gradients) if gradient is not None)

    def _is_norm(self, call: int) -> bool:
        return not self._is_linear(call) and not isinstance(self._module(call), nn.Embedding)

    def _is_linear(self, call: int) -> bool:
        return self._cut.names[call] in self._cut.linears

    def _module(self, call: int) -> nn.Module:
        return self._cut.module.get_submodule(self._cut.names[call])

    def _called(self, call: int) -> str:
        return f"{self._cut.names[call]} ({type(self._module(call)).__name__})"

    # The stream

    def stream(self, head: str) -> ResidualStream:
        """The residual stream that ends in the linear ``head``. Raises CutError, naming the module, for one that cannot be rotated."""
        cut = self._cut
        idle = sorted(cut.linears.difference(cut.names))
        if idle:  # such as an expert that no token was sent to
            raise CutError(f"{idle[0]} did not run on the probe, so it is unknown what it reads")
        if cut.names.count(head) != 1:
            raise CutError(f"{head} does not run once")
        last = self._sources[cut.names.index(head)]
        writers = last
        if len(last) == 1 and self._is_norm(min(last)):
            writers = self._sources[min(last)]
        norms = {call: self._gain(call) for call in range(len(cut.names)) if self._sources[call] & writers and self._is_norm(call)}
        self._check_writers(writers)
        readers = dict(self._readers(writers, frozenset(norms)))
        for call in (*writers, *norms, *readers):
            if cut.names.count(cut.names[call]) > 1:
                raise CutError(f"{cut.names[call]} runs more than once")
        self._check_rotation(writers, norms, readers)
        named = {norm: cut.names[norm] for norm in norms}
        return ResidualStream(
            width=cut.leaves[min(writers)].shape[-1],
            writers=tuple(cut.names[call] for call in sorted(writers)),
            norms={named[norm]: gain for norm, gain in norms.items()},
            readers={cut.names[call]: None if norm is None else named[norm] for call, norm in readers.items()},
        )

    def _check_writers(self, writers: frozenset[int]) -> None:
        if not writers:
            raise CutError("no residual stream leads to its output head")
        for call in sorted(writers):
            if self._is_norm(call):
                what = f"what {self._called(call)} gives is added to the residual stream"
                raise CutError(f"{what}, and only what linears and embeddings give can be rotated")
        if len({self._cut.leaves[call].shape[-1] for call in writers}) > 1:
            raise CutError("its residual stream changes its width")

    def _readers(self, writers: frozenset[int], norms: frozenset[int]) -> Iterator[tuple[int, int | None]]:
        """(linear, norm before it or None) for each linear that reads the stream."""
        for call in range(len(self._cut.names)):
            behind = self._sources[call] & (writers | norms)
            if not self._is_linear(call) or not behind:
                continue
            if behind <= writers:
                yield call, None
            elif len(behind) == 1:
                yield call, min(behind)
            else:
                raise CutError(f"{self._called(call)} reads several norms of the residual stream at once")

    def _gain(self, call: int) -> Gain | None:
        """The gain of a norm, found by trying. Raises CutError unless it turns with its input once that is 1."""
        module = without_weights(self._module(call), self._generator)
        args, kwargs = self._cut.arguments[call]
        x = linear_input(args, kwargs).detach()

        def run(inputs: Tensor, **values: Tensor) -> Tensor:
            called = ((inputs, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): inputs})
            return functional_call(module, values, *called).detach()

        rotation = random_rotation(x.shape[-1], self._generator)
        for gain, ones in _possible_gains(module):
            factor: Tensor | float = 1.0 if gain is None else module.get_parameter(gain.parameter) + gain.offset
            plain = run(x, **ones)
            if _equal(run(x), plain * factor) and _equal(run(rotation.apply(x), **ones), rotation.apply(plain)):
                return None if gain is None else Gain(f"{self._cut.names[call]}.{gain.parameter}", gain.offset)
        if _equal(run(x + 1), run(x)):
            raise CutError(f"{self._called(call)} subtracts the mean of the channels, which a rotation changes")
        raise CutError(f"{self._called(call)}, which reads the residual stream, is no RMS norm with a gain alone")

    def _check_rotation(self, writers: frozenset[int], norms: Mapping[int, Gain | None], readers: Mapping[int, int | None]) -> None:
        """Rotate the stream wherever it is written to. Raises CutError, naming it, for a module that does not see what it should."""
        cut = self._cut
        rotation = random_rotation(cut.leaves[min(writers)].shape[-1], self._generator)
        gains = {norm: torch.rand(rotation.size, generator=self._generator, dtype=torch.float64) + 0.5 for norm in norms}
        divided = {norm: partial(_divided, rotation=rotation, gain=gain) for norm, gain in gains.items()}
        after = cut.passed({**dict.fromkeys(writers, rotation.apply), **divided})
        for call, (name, old, new) in enumerate(zip(self._names, cut.before, after, strict=True)):
            expected = list(old)
            norm = readers.get(call)
            if norm is not None:
                expected[0] = divided[norm](old[0])
            elif call in norms or call in readers:
                expected[0] = rotation.apply(old[0])
            if not all(map(_equal, new, expected)):
                raise CutError(f"{name} reads the residual stream in another way than as it is or through a norm")

    # Heads

    def heads(self) -> list[ValueHeads]:
        """The heads of values that can be rotated, in running order."""
        pairs, found = self._value_pairs(), []
        for size in sorted({size for pair in pairs for size in pair.sizes()}, reverse=True):
            tried = [heads for pair in pairs if (heads := pair.heads(size)) is not None]
            found += self._turning(tried, random_rotation(size, self._generator))
            taken = {heads.reader for heads in found}
            pairs = [pair for pair in pairs if pair.reader not in taken]
        return sorted(found, key=lambda heads: self._cut.names.index(heads.reader))

    def _value_pairs(self) -> list[_ValuePair]:
        """Each linear all of whose inputs have channels of one other linear as factors."""
        cut = self._cut
        linears = [call for call, name in enumerate(cut.names) if self._is_linear(call) and cut.names.count(name) == 1]
        factors = cut.factors([cut.before[call][0] for call in linears])
        candidates = {}
        for reader in linears:
            producers = [call for call in linears if call in self._sources[reader] and factors[call].any()]
            if len(producers) == 1:
                candidates[reader] = producers[0]
        numbers = {producer: distinct_numbers(factors[producer]) for producer in candidates.values()}
        after = cut.passed({producer: partial(torch.mul, scale) for producer, scale in numbers.items()})
        pairs = []
        for reader, producer in candidates.items():
            channel = multiplied_by(cut.before[reader][0].detach(), after[reader][0].detach(), numbers[producer])
            if channel is not None and (channel >= 0).all():
                pairs.append(_ValuePair(cut.names[producer], cut.names[reader], channel.cpu()))
        return pairs

    def _turning(self, tried: list[ValueHeads], rotation: Rotation) -> list[ValueHeads]:
        """Those of ``tried`` whose readers see the rotation of the producers, and nothing else does."""
        cut = self._cut
        readers = {heads.reader: heads for heads in tried}
        turned = {cut.names.index(heads.producer): partial(heads.turn_values, rotation=rotation) for heads in tried}
        wrong: set[int] = set()
        for call, (name, old, new) in enumerate(zip(self._names, cut.before, cut.passed(turned), strict=True)):
            expected = [readers[name].turn_inputs(old[0], rotation), *old[1:]] if name in readers else old
            if not all(map(_equal, new, expected)):
                wrong |= self._sources[call]
        return [heads for heads in tried if cut.names.index(heads.producer) not in wrong]


@dataclass(frozen=True, eq=False)
class _ValuePair:
    """Linears, and int64 [in]: the output channel of ``producer`` behind each input of ``reader``."""

    producer: str
    reader: str
    channel: Tensor

    def sizes(self) -> Iterator[int]:
        """How many inputs of the reader could be one head."""
        return (size for size in range(2, min(len(self.channel), LARGEST_HEAD) + 1) if len(self.channel) % size == 0)

    def heads(self, size: int) -> ValueHeads | None:
        """The heads if they have ``size`` channels; None where such pieces of the input overlap in the producer."""
        if len(self.channel) % size:
            return None
        channels = self.channel.view(-1, size).unique(dim=0)
        overlap = len(channels.unique()) < channels.numel()
        return None if overlap else ValueHeads(producer=self.producer, reader=self.reader, channels=channels)


def _possible_gains(module: nn.Module) -> Iterator[tuple[Gain | None, dict[str, Tensor]]]:
    """What the gain of a norm could be, by the parameter's local name, and the values with which it would be 1."""
    for name, parameter in module.named_parameters():
        for offset in OFFSETS:
            yield Gain(name, offset), {name: torch.full_like(parameter, 1 - offset)}
    yield None, {}


def _divided(leaf: Tensor, rotation: Rotation, gain: Tensor) -> Tensor:
    return rotation.apply(leaf / gain.to(leaf.device))


def _equal(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.detach(), expected.detach()
    return found.shape == expected.shape and float((found - expected).norm()) <= TOLERANCE * float(expected.norm())
