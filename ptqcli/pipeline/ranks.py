"""The processes that share one run.

Each makes the same plan and goes through the same loop, with windows of its own. What they have seen is added up, so that all have the same
statistics; the linears of a stage are divided among them, the longest first, and every solution goes to all. The first process is the only
one that writes, and it decides whatever depends on a machine. ``Ranks`` itself is one process alone, for which all of this is nothing to
do, so the loop has one path; ``Group`` are several, over torch.distributed, which as ever trusts its network.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from ptqcli.pipeline.alive import Alive

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")

# A rank that has died is found by ``Alive``; one that works honestly may take long.
TIMEOUT = timedelta(days=7)
PIECE = 64 << 20  # bytes of hidden states that are sent at a time
ALIGNED = 16  # bytes, to which tensors are aligned in what is sent


class Ranks:
    """One process alone. rank: its number. size: how many there are."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and decides."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes into each tensor."""

    def largest(self, tensors: Sequence[Tensor]) -> None:
        """Put the largest of all processes into each place of each tensor."""

    def everyone(self, value: T) -> list[T]:
        """The ``value`` of each process, in order. Tensors in it come to the device of whoever receives them."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the first process, where alone it is called."""
        return make()

    def wait(self) -> None:
        """Until all processes have come here."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Hand a tensor on the CPU to process ``to``, which receives as much."""
        raise NotImplementedError

    def receive(self, tensor: Tensor, source: int) -> None:
        """Put what process ``source`` sends into ``tensor``, contiguous and on the CPU."""
        raise NotImplementedError

    def divided(self, costs: Sequence[float], work: Callable[[int], T]) -> Iterator[T]:
        """``work(piece)`` of each piece, in order. Each is done by one process, those of the largest costs first."""
        if self.size == 1:
            yield from map(work, range(len(costs)))
            return
        owners = assigned(costs, self.size)
        done = self.everyone({piece: work(piece) for piece, owner in enumerate(owners) if owner == self.rank})
        yield from (done[owner].pop(piece) for piece, owner in enumerate(owners))


class Group(Ranks):
    """Process ``rank`` of ``size``. store: where they meet. alive: tells what became of the others. device: of this one's work."""

    def __init__(self, rank: int, size: int, store: Store, alive: Alive, device: torch.device) -> None:
        self.rank, self.size, self.alive, self.device = rank, size, alive, device
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with self._named():
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)

    def close(self) -> None:
        """Leave the group; whoever waits for this process is told so."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """See ``Ranks``."""
        with self._named():
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def largest(self, tensors: Sequence[Tensor]) -> None:
        """See ``Ranks``."""
        for tensor, others in zip(tensors, zip(*self.everyone(list(tensors)), strict=True), strict=True):
            tensor.copy_(torch.stack(others).amax(dim=0))  # NaN stays NaN, which a reduction to the maximum may lose

    def everyone(self, value: T) -> list[T]:
        """See ``Ranks``."""
        return self._from(range(self.size), value)

    def from_first(self, make: Callable[[], T]) -> T:
        """See ``Ranks``."""
        value: Any = make() if self.first else None
        return self._from([0], value)[0]

    def wait(self) -> None:
        """See ``Ranks``."""
        with self._named():
            distributed.all_reduce(torch.zeros(1))

    def send(self, tensor: Tensor, to: int) -> None:
        """See ``Ranks``."""
        with self._named():
            for piece in _pieces(tensor.contiguous()):
                distributed.send(piece, to)

    def receive(self, tensor: Tensor, source: int) -> None:
        """See ``Ranks``."""
        with self._named():
            for piece in _pieces(tensor):
                distributed.recv(piece, source)

    def _from(self, sources: Sequence[int], value: Any) -> list[Any]:
        own = packed(value) if self.rank in sources else torch.empty(0, dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        self.add([sizes])
        values = []
        with self._named():
            for source in sources:
                sent = own if source == self.rank else torch.empty(int(sizes[source]), dtype=torch.uint8)
                distributed.broadcast(sent, source)
                values.append(value if source == self.rank else unpacked(sent, self.device))
        return values

    @contextmanager
    def _named(self) -> Iterator[None]:
        """torch's errors as what has become of the others."""
        try:
            yield
        except RuntimeError as error:
            raise self.alive.reason(error) from error


def assigned(costs: Sequence[float], size: int) -> list[int]:
    """Which of ``size`` processes does each piece of work, such that they come to an end at about the same time."""
    owners, loads = [0] * len(costs), [0.0] * size
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owner = loads.index(min(loads))
        owners[piece] = owner
        loads[owner] += costs[piece]
    return owners


class _Pickler(pickle.Pickler):
    """Sets tensors aside, which are sent as they lie in memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return value.dtype, tuple(value.shape), value.device.type == "cpu"


class _Unpickler(pickle.Unpickler):
    """Takes the tensors from ``data``, uint8, in their order. device: of those that were on an accelerator."""

    def __init__(self, file: io.BytesIO, data: Tensor, device: torch.device) -> None:
        super().__init__(file)
        self._data, self._device, self._at = data, device, 0

    def persistent_load(self, known: Any) -> Tensor:
        dtype, shape, on_cpu = known
        size = torch.Size(shape).numel() * dtype.itemsize
        tensor = self._data[self._at : self._at + size].clone().view(dtype).view(shape)
        self._at += size + -size % ALIGNED
        return tensor if on_cpu else tensor.to(self._device)


def packed(value: Any) -> Tensor:
    """``value`` as bytes, uint8 on the CPU: the length of its pickle, that, and the tensors in it."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    text = file.getvalue()
    head = len(text).to_bytes(8, "little") + text
    parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8), torch.zeros(-len(head) % ALIGNED, dtype=torch.uint8)]
    for tensor in pickler.tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        parts += [flat, torch.zeros(-len(flat) % ALIGNED, dtype=torch.uint8)]
    return torch.cat(parts)


def unpacked(data: Tensor, device: torch.device) -> Any:
    """What ``packed`` was given. device: where tensors come that were on an accelerator."""
    length = int.from_bytes(bytes(data[:8].tolist()), "little")
    begin = 8 + length
    return _Unpickler(io.BytesIO(data[8:begin].numpy().tobytes()), data[begin + -begin % ALIGNED :], device).load()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), PIECE):
        yield flat[start : start + PIECE]
