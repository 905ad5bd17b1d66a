"""How the model calls its blocks.

``record_calls`` runs the model once with every block replaced by a recorder that notes its arguments and passes its input on: so
masks, rotary embeddings and per-layer differences are exactly those that the model itself makes. What remains is the hidden states
before the first block and one recorded call per block and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.calibration.share import Share
from ptqcli.errors import PTQError
from ptqcli.model.discovery import BlockShape, StopForward, first_output
from ptqcli.model.kinds import PADDING
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.states import handed, kept
from ptqcli.resources import ran_out
from ptqcli.untrusted import one_line

WAY_OUT = "use --algo rtn, which needs no calibration"


@dataclass(frozen=True)
class BlockCall:
    """Arguments with which the model called a block, the hidden states left out.

    hidden_key: position or name under which the hidden states were passed. where: the block's path in the model. stack: of how many hidden
    states it takes a stack, see ``model.states``. exchanged: names of arguments that are tables in which blocks leave tensors for later
    ones: ``run`` leaves there what the block does, so the last run of each block counts.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_key: int | str
    where: str = "a block"
    stack: tuple[int, ...] = ()
    exchanged: tuple[str, ...] = ()

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for ``hidden`` [batch, tokens, features], as they are kept, with this call's other arguments.

        Raises PTQError for whatever the block's own code raises.
        """
        hidden, args, kwargs = handed(hidden, self.stack), list(self.args), dict(self.kwargs)
        if isinstance(self.hidden_key, int):
            args[self.hidden_key] = hidden
        else:
            kwargs[self.hidden_key] = hidden
        with _named_errors(f"{self.where}: does not run by itself as the model has called it"):
            behind: Any = first_output(block(*args, **kwargs))
        if not isinstance(behind, Tensor) or behind.shape != hidden.shape:
            found = list(behind.shape) if isinstance(behind, Tensor) else type(behind).__name__
            raise PTQError(f"{self.where}: gives {found} for hidden states {list(hidden.shape)}, which cannot be handed on; {WAY_OUT}")
        return kept(behind)

    def cast(self, dtype: torch.dtype) -> BlockCall:
        """The same call with every floating tensor among the arguments in ``dtype``, and tables of its own to leave tensors in."""
        kwargs = _cast({key: dict(value) if key in self.exchanged else value for key, value in self.kwargs.items()}, dtype)
        return replace(self, args=_cast(self.args, dtype), kwargs=self._with_tables(kwargs))

    def in_other_model(self, tables: dict[int, Any]) -> BlockCall:
        """The same call for another model's blocks. tables: those for it, by the identities of those here; new ones are added."""
        for key in self.exchanged:
            tables.setdefault(id(self.kwargs[key]), type(self.kwargs[key])())
        return replace(self, kwargs={key: tables.get(id(value), value) for key, value in self.kwargs.items()}) if self.exchanged else self

    def _with_tables(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs | {key: type(self.kwargs[key])(kwargs[key]) for key in self.exchanged}


@dataclass(frozen=True)
class Excerpt:
    """A few windows, or their beginnings, on which a block can be run on its own, again and again.

    windows: their numbers. tokens: how many of each. calls: how the model calls each of its blocks on them. real: bool [windows, tokens],
    the places that hold a token, None where all do.
    """

    windows: tuple[int, ...]
    tokens: int
    calls: list[BlockCall]
    real: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Hidden states before the first block, [windows, tokens, features], and the calls of every block: calls[block][batch].

    batches: windows [start, stop) of each. excerpts: by the names under which they were asked for. real: as in ``Excerpt``, on the CPU.
    share: which windows these are of all; batches and real count from its first.
    """

    hidden: Tensor
    calls: list[list[BlockCall]]
    batches: list[tuple[int, int]]
    share: Share
    excerpts: dict[str, Excerpt] = field(default_factory=dict)
    real: Tensor | None = None


def record_calls(
    skeleton: Skeleton,
    windows: Tensor,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    make_buffer: Callable[[tuple[int, ...], torch.dtype], Tensor],
    excerpts: Mapping[str, tuple[Sequence[int], int]] | None = None,
    share: Share | None = None,
) -> Recording:
    """Run the model up to its blocks on ``windows``, int64 [windows, tokens], and record how it calls each of them.

    An encoder's windows may end in PADDING.
    make_buffer: gives the tensor that takes the hidden states. excerpts: name -> (numbers of the windows, tokens of each) of the excerpts
    to record as well. share: the windows of this process, all where None; excerpts are of all windows.
    """
    share = share or Share.of(windows, batch_size, 0, 1)
    own, batches = windows[share.first : share.stop], share.batches(batch_size)
    calls: list[list[BlockCall]] = [[] for _ in skeleton.blocks]
    states: Tensor | None = None
    with skeleton.loaded_before(device, dtype) as model, torch.no_grad():
        for number, (start, stop) in enumerate(batches):
            alike = next((other for other in range(number) if batches[other][1] - batches[other][0] == stop - start), 0)
            hidden, batch_calls = _record_batch(skeleton, model, own[start:stop].to(device))
            if states is None:
                states = make_buffer((len(own), *hidden.shape[1:]), hidden.dtype)
            states[start:stop] = hidden.cpu()
            for block_calls, call in zip(calls, batch_calls, strict=True):
                block_calls.append(_shared(block_calls[alike], call) if block_calls else call)
        recorded = {}
        for name, (numbers, tokens) in (excerpts or {}).items():
            part = windows[list(numbers), :tokens]
            _, excerpt_calls = _record_batch(skeleton, model, part.to(device))
            recorded[name] = Excerpt(tuple(numbers), tokens, excerpt_calls, _real(part))
    assert states is not None
    return Recording(hidden=states, calls=calls, batches=batches, share=share, excerpts=recorded, real=_real(own))


def _real(windows: Tensor) -> Tensor | None:
    """The places that hold a token, bool [windows, tokens]; None where all do."""
    real = windows != PADDING
    return None if bool(real.all()) else real


def without_padding(states: Tensor, real: Tensor | None) -> Tensor:
    """``states`` [windows, tokens, features] with zeros in the places that hold no token, so that they count in no difference."""
    return states if real is None else states.where(real.unsqueeze(-1).to(states.device), 0)


def _record_batch(skeleton: Skeleton, model: nn.Module, ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def recorder(index: int, shape: BlockShape) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = hidden_key(args, kwargs)
            hidden = args[key] if isinstance(key, int) else kwargs[key]
            if len(calls) != index or (first and not _same(hidden, first[0])):
                raise PTQError(
                    f"{skeleton.block_prefix(index)}: the model does not hand each block's output straight to the next, "
                    "which block-by-block quantization needs"
                )
            if not first:
                first.append(hidden)
            stripped = tuple(None if position == key else value for position, value in enumerate(args))
            rest = {k: v for k, v in kwargs.items() if k != key}
            calls.append(BlockCall(stripped, rest, key, skeleton.block_prefix(index), shape.stack, shape.exchanged))
            if len(calls) == len(skeleton.blocks):
                raise StopForward
            return hidden if shape.container is None else shape.container([hidden, *[None] * shape.extra_outputs])

        return forward

    for index, (block, shape) in enumerate(zip(skeleton.blocks, skeleton.shapes, strict=True)):
        block.forward = recorder(index, shape)
    try:
        with _named_errors(f"{skeleton.where}: the model does not run up to its blocks"), suppress(StopForward):
            skeleton.kind.call(model, ids)
    finally:
        for block in skeleton.blocks:
            del block.forward
    if len(calls) != len(skeleton.blocks):
        raise PTQError(f"the model ran {len(calls)} of its {len(skeleton.blocks)} blocks; name the list of blocks with --blocks")
    return kept(first[0]), calls


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or the same view of one."""
    return one is other or (one.shape, one.stride(), one.dtype, one.data_ptr()) == (
        other.shape,
        other.stride(),
        other.dtype,
        other.data_ptr(),
    )


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """The code of a model raises whatever it likes; a user is told what was tried, and what does not need it."""
    try:
        yield
    except (PTQError, StopForward):
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise PTQError(f"{what} ({type(error).__name__}: {one_line(error)}); {WAY_OUT}") from error


def hidden_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    """Position or name under which a block is called with hidden states. Raises PTQError if it is not."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    for position, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return position
    raise PTQError("a block is called without hidden states as its first tensor argument, which is not supported")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(entry, dtype) for entry in value)
    if isinstance(value, dict):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    return value


def _shared(first: BlockCall, other: BlockCall) -> BlockCall:
    """``first`` if ``other`` holds equal values, so that a hundred batches do not keep a hundred equal masks.

    Tables in which blocks leave something are each batch's own; beside them equal values are shared one by one.
    """
    if other.exchanged:
        shared = {key: value for key, value in first.kwargs.items() if key not in other.exchanged and _equal(value, other.kwargs.get(key))}
        return replace(other, args=first.args if _equal(first.args, other.args) else other.args, kwargs={**other.kwargs, **shared})
    same = _equal(first.args, other.args) and _equal(dict(first.kwargs), dict(other.kwargs)) and first.hidden_key == other.hidden_key
    return first if same else other


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one is other or one == other)
