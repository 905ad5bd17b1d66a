"""Rotations folded into the weights (QuaRot, Ashkboos et al. 2024, section 4; SpinQuant, Liu et al. 2024, section 3.1).

A few channels of the residual stream are far larger than the rest, and so are the columns of the weights that read them and the rows of
those that write them: they set the scale of every group they lie in. Turned by a Hadamard matrix with random signs, all channels are
alike. Two rotations need no code when the model runs, and the result is an ordinary model of the same class:

    R1, over the residual stream:  E' = E R1,   W_in' = W_in diag(g) R1,   W_out' = R1^T W_out,   b_out' = b_out R1,   g' = 1
    R2, in each head of values:    W_v' = R2^T W_v,   b_v' = b_v R2,   W_o' = W_o R2

with g the gains of the norms, which go into the linears that read them. What is a stream and what a head, ``residual_stream.py`` finds.
All products are in float64 and rounded once, to the dtype of the file. Where one matrix serves as embedding and as output head, each gets
its own from here on: the head has taken up the gain of the last norm.

It pays with error feedback. With rounding to nearest it does harm where a few large columns in a group of their own were no loss.
Left out: R3 and R4, which turn queries, keys and the inputs of the down projection while the model runs, so that no other program could run
it; learned rotations (SpinQuant's section 3.2); and LayerNorm, whose mean would have to be moved into the weights, which makes a model of
another class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ptqcli.checkpoint.tensors import NewTensor
from ptqcli.errors import UsageError
from ptqcli.model.linears import rows_first
from ptqcli.model.rewritten import Rewrite
from ptqcli.model.skeleton import Skeleton
from ptqcli.options import check_choices, option
from ptqcli.transforms import ModelTransform, UnsuitedError
from ptqcli.transforms.cut import CutError
from ptqcli.transforms.hadamard import Rotation, random_rotation
from ptqcli.transforms.residual_stream import Gain, ModelInPieces, ResidualStream, ValueHeads

Turn: TypeAlias = Callable[[Tensor], Tensor]  # of rows [..., n]

PROBE_TOKENS = 4  # the networks between all modules of the model are in memory at once
PIECE = 1 << 22  # numbers of a matrix that are turned at once

UNSUITED = ("refuse", "skip")

HARM = "rotate makes rounding to nearest worse as a rule; take a solver with error feedback, such as rotate+gptq"


@dataclass(frozen=True)
class Rotate(ModelTransform):
    """Rotations with their options.

    stream: R1. heads: R2. seed: of the random signs, and of the matrix where no Hadamard matrix fits. unsuited: what becomes of a run on a
    model that cannot be rotated.
    """

    name: ClassVar[str] = "rotate"
    summary: ClassVar[str] = "rotations: outlier channels spread over all, folded into the weights"
    stream: bool = option(True, "rotate the residual stream (R1)", flag="rotate-stream")
    heads: bool = option(True, "rotate the values in each head (R2)", flag="rotate-heads")
    seed: int = option(0, "which of the random rotations", flag="rotate-seed")
    unsuited: str = option(
        "refuse", "a model that cannot be rotated is refused, or quantized as it is", flag="rotate-unsuited", choices=UNSUITED
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if abs(self.seed) >= 2**63:
            raise UsageError(f"rotate seed {self.seed} is too large; give one of at most 18 digits")
        if not (self.stream or self.heads):
            raise UsageError("rotate has nothing to rotate; leave it out, or one of --no-rotate-stream and --no-rotate-heads")

    def notes(self, solver: str) -> list[str]:
        """That rounding to nearest is harmed."""
        return [HARM] if solver == "rtn" else []

    @property
    def optional(self) -> bool:
        """See ``unsuited``."""
        return self.unsuited == "skip"

    @property
    def advice(self) -> str:
        """What else there is."""
        return "use equalize in its place" + (", or --no-rotate-stream for the heads alone" if self.stream and self.heads else "")

    def prepare(self, skeleton: Skeleton) -> Rewrite:
        """Find what can be rotated. Raises UnsuitedError if that is not all that is asked for."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = _TurnedWeights(skeleton)
        done = []
        try:
            pieces = ModelInPieces(skeleton.model, _probe(skeleton))
            if self.stream:
                _refuse_other_parts(skeleton)
                stream = pieces.stream(weights.head)
                weights.turn_stream(stream, random_rotation(stream.width, generator).apply)
                done.append(f"the residual stream of {stream.width} channels")
            if self.heads:
                found = pieces.heads()
                for heads in found:
                    weights.turn_heads(heads, random_rotation(heads.size, generator))
                sizes = ", ".join(str(size) for size in sorted({heads.size for heads in found}))
                done.append(f"the values of {len(found)} attentions in heads of {sizes}" if found else "no values: no heads were found")
        except CutError as reason:
            raise UnsuitedError(str(reason)) from reason
        return Rewrite(
            tensors=weights.tensors(),
            config={"tie_word_embeddings": False} if self.stream else {},
            notes=weights.notes(),
            done=f"rotated {' and '.join(done)} (seed {self.seed})",
        )


def _probe(skeleton: Skeleton) -> Callable[[nn.Module, torch.dtype], Tensor]:
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)

    def run(twin: nn.Module, _dtype: torch.dtype) -> Tensor:
        return skeleton.kind.answer(twin, ids)

    return run


def _refuse_other_parts(skeleton: Skeleton) -> None:
    """What writes into the stream from outside the model that was looked at, as images do, would not be rotated."""
    known = {stored for _, stored in skeleton.names.items()}
    for model, names in skeleton.classes[1:]:
        for name, stored in names.items():
            if stored not in known:
                raise CutError(f"{name} belongs to a part of {type(model).__name__} that may write into the residual stream")
    if skeleton.unbuilt and skeleton.names.unmatched:
        raise CutError(f"{skeleton.names.unmatched[0]} belongs to a part of the model that may write into the residual stream")


@dataclass(kw_only=True)
class _Turns:
    """What is done to one module with a matrix [out, in]: ``gain`` and ``columns`` to its rows, ``rows`` to its columns and its bias."""

    gain: Gain | None = None
    columns: list[Turn] = field(default_factory=list)
    rows: list[Turn] = field(default_factory=list)


class _TurnedWeights:
    """The weights of a model with rotations folded into them, each made when it is read."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._turns: dict[str, _Turns] = {}  # by module
        self._gains: list[Gain] = []
        head = skeleton.model.get_output_embeddings()  # type: ignore[operator]
        self.head = next(name for name, module in skeleton.model.named_modules() if module is head)
        self.unties = False

    def _of(self, module: str) -> _Turns:
        return self._turns.setdefault(module, _Turns())

    def turn_stream(self, stream: ResidualStream, turn: Turn) -> None:
        """Fold R1."""
        for writer in stream.writers:
            embedding = isinstance(self._skeleton.model.get_submodule(writer), nn.Embedding)
            (self._of(writer).columns if embedding else self._of(writer).rows).append(turn)
        for reader, norm in stream.readers.items():
            self._of(reader).gain = None if norm is None else stream.norms[norm]
            self._of(reader).columns.append(turn)
        self._gains = [gain for gain in stream.norms.values() if gain is not None]
        head = self._stored(self.head, "weight")
        self.unties = any(self._stored(writer, "weight") == head for writer in stream.writers)

    def turn_heads(self, heads: ValueHeads, rotation: Rotation) -> None:
        """Fold one R2."""
        self._of(heads.producer).rows.append(partial(heads.turn_values, rotation=rotation))
        self._of(heads.reader).columns.append(partial(heads.turn_inputs, rotation=rotation))

    def notes(self) -> tuple[str, ...]:
        """What untying costs."""
        if not self.unties:
            return ()
        size = self._skeleton.nbytes(f"{self.head}.weight") / 2**20
        return (f"rotate gives embedding and output head, which share one matrix, one each: {size:.1f} MiB more",)

    def tensors(self) -> dict[str, NewTensor]:
        """Every tensor that changes, by its stored name. Raises UnsuitedError for one that is used in two places."""
        new: dict[str, NewTensor] = {}
        owners: dict[str, str] = {}
        for module, turns in self._turns.items():
            for leaf, made in self._made(module, turns).items():
                stored = f"{self.head}.weight" if module == self.head and self.unties else self._stored(module, leaf)
                if stored in new:
                    raise UnsuitedError(f"{module} and {owners[stored]} share their weight, which cannot be turned for both")
                new[stored], owners[stored] = made, module
        for gain in self._gains:
            stored = self._skeleton.stored_name(gain.parameter)
            new[stored] = NewTensor(stored, partial(_ones, stored, gain.offset))
        return new

    def _made(self, module: str, turns: _Turns) -> dict[str, NewTensor]:
        """The new parameters of one module."""
        skeleton, turned = self._skeleton, self._skeleton.model.get_submodule(module)
        stored = self._stored(module, "weight")
        gain = None if turns.gain is None else (skeleton.stored_name(turns.gain.parameter), turns.gain.offset)
        made = {"weight": NewTensor(stored, partial(_matrix, turned, stored, gain, turns.columns, turns.rows))}
        if turns.rows and getattr(turned, "bias", None) is not None:
            bias = self._stored(module, "bias")
            made["bias"] = NewTensor(bias, partial(_bias, bias, turns.rows))
        return made

    def _stored(self, module: str, leaf: str) -> str:
        return self._skeleton.stored_name(f"{module}.{leaf}")


Read: TypeAlias = Callable[[str], Tensor]


def _ones(stored: str, offset: float, read: Read) -> Tensor:
    """The gain of a norm that multiplies by 1."""
    return torch.full_like(read(stored), 1 - offset)


def _bias(stored: str, rows: Sequence[Turn], read: Read) -> Tensor:
    return _in_turn(rows, read(stored).double())


def _matrix(
    module: nn.Module, stored: str, gain: tuple[str, float] | None, columns: Sequence[Turn], rows: Sequence[Turn], read: Read
) -> Tensor:
    """The matrix of ``module``, as it stores it, with the gain of a norm (stored name, offset) and the turns."""
    weight = rows_first(module, read(stored))  # [out, in]
    if columns:
        factor = 1.0 if gain is None else read(gain[0]).double() + gain[1]  # [in]
        exact = weight.double() if rows else weight  # what is turned twice is rounded once
        weight = _in_pieces(exact, lambda piece: _in_turn(columns, piece.double() * factor))
    if rows:
        weight = _in_pieces(weight.t(), partial(_in_turn, rows)).t()
    return rows_first(module, weight)


def _in_pieces(matrix: Tensor, turn: Turn) -> Tensor:
    """The rows of ``matrix`` turned, a few at a time, in its dtype."""
    turned = torch.empty_like(matrix)
    height = max(1, PIECE // matrix.shape[1])
    for start in range(0, len(matrix), height):
        turned[start : start + height] = turn(matrix[start : start + height])
    return turned


def _in_turn(turns: Sequence[Turn], rows: Tensor) -> Tensor:
    for turn in turns:
        rows = turn(rows)
    return rows
