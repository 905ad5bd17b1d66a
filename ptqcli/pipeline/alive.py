"""What has become of the other processes of a run.

Each writes into a store, which all of them reach, that it is alive: once a second, from a thread of its own, however long its work takes.
One that ends writes why. A process that has fallen silent without a word has died, or its machine has. So a collective operation may
take as long as it likes, and a death is known nevertheless.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptqcli.errors import PTQError, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # behind which a process is taken for dead
ASKED_SECONDS = 5.0  # the same, when there is a reason to ask: an interruption, or a connection that has broken
DONE, INTERRUPTED, FAILED, FOLLOWED = "done", "interrupted", "failed", "followed"


@dataclass(frozen=True)
class Trouble:
    """Why the run cannot go on. rank: whose fault it is. text: what there is to say. code: the exit code. dead: it cannot say so itself."""

    rank: int
    text: str
    code: int = 1
    dead: bool = False
    ours: bool = False  # a PTQError, after which the same command would not come further

    def as_error(self) -> Exception:
        """To be raised in the other processes."""
        if not self.ours:
            return ConnectionError(self.text)
        return (UsageError if self.code == UsageError.exit_code else PTQError)(self.text)


class Alive:
    """The life of process ``rank`` of ``size``, and what it knows of the others'.

    store: a connection of its own, since a call that waits keeps others out. ended: numbers of processes that are known to have ended, for
    whoever has started them. on_trouble: called in another thread, once, when another process has ended or died.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        on_trouble: Callable[[Trouble], None],
        ended: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._store, self.rank, self._others = store, rank, [other for other in range(size) if other != rank]
        self._size, self._on_trouble, self._ended = size, on_trouble, ended
        self._known, self._left, self._lock, self._count = threading.Event(), threading.Event(), threading.Lock(), 0
        self._seen: dict[int, tuple[str, float]] = {}  # other process -> its last beat, and when it was first seen
        self.found: Trouble | None = None  # what has been found out so far
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="alive", daemon=True)

    def begin(self, seconds: float) -> None:
        """Wait for a sign of life of each other process, and watch them from then on. Raises PTQError if one does not come."""
        keys = [f"beat/{other}" for other in self._others]
        if not self._within(seconds, lambda: bool(self._ended()) or bool(self._store.check(keys))) or self._ended():
            missing = [other for other, beat in self._beats().items() if not beat or other in self._ended()]
            raise PTQError(f"process {missing[0]} of 0 to {self._size - 1} does not come; look at what it says, and start all again")
        self._seen = {other: ("", time.monotonic()) for other in self._others}
        self._thread.start()

    def note(self, how: str, text: str = "", code: int = 0, ours: bool = False) -> None:
        """Write how this process ends."""
        self._set(f"end/{self.rank}", json.dumps({"how": how, "text": text, "code": code, "ours": ours}))

    def stop(self) -> None:
        """Watch the others no more; that this process is alive is still told, until it leaves."""
        self._known.set()

    def tell(self) -> None:
        """Let the others know that this process says what has happened."""
        self._set("told", "")

    def told(self, seconds: float) -> bool:
        """Whether the first process says, within that time, what has happened."""
        return self._within(seconds, lambda: bool(self._store.check(["told"])), gone=True)

    def lives(self, other: int) -> bool:
        """Whether another process gives a sign of life."""
        try:
            before = self._beats()[other]
        except RuntimeError:
            return False
        return self._within(ASKED_SECONDS, lambda: self._store.get(f"beat/{other}").decode() != before)

    def leave(self, seconds: float) -> None:
        """The end: nothing is asked of the store from here on. The first process, with which it may go, waits for the others so long."""
        self._left.set()
        self._set(f"gone/{self.rank}", "")
        if self.rank == 0:
            keys = [f"gone/{other}" for other in self._others if other not in self._ended()]
            self._within(seconds, lambda: not keys or bool(self._store.check(keys)))

    def reason(self, error: BaseException) -> Exception:
        """What is behind a collective operation that has failed."""
        self.found = found = self.trouble()
        self.stop()
        return ConnectionError(f"the other processes cannot be reached ({error})") if found is None else found.as_error()

    def trouble(self, seconds: float = ASKED_SECONDS) -> Trouble | None:
        """What is wrong with another process, None if all of them work, were interrupted, or are done; asked for so long."""
        if self.found is not None:
            return self.found
        try:
            unknown, before = set(self._others), self._beats()
            until = time.monotonic() + seconds
            while True:
                ends = self._ends()
                failed = self._failed(ends)
                if failed is not None:
                    return failed
                beats = self._beats()
                unknown -= {other for other in unknown if other in ends or beats[other] != before[other]}
                gone = unknown & set(self._ended())
                if not unknown or gone or time.monotonic() > until:
                    break
                time.sleep(BEAT_SECONDS / 5)
        except RuntimeError:
            return self._dead(0)
        return self._dead(min(gone or unknown)) if unknown else None

    def _dead(self, rank: int) -> Trouble:
        return Trouble(rank, f"process {rank} of 0 to {self._size - 1} has died, or cannot be reached any more", dead=True)

    def _failed(self, ends: dict[int, Any]) -> Trouble | None:
        for other, end in ends.items():
            if end["how"] == FAILED:
                return Trouble(other, str(end["text"]), int(end["code"]), ours=bool(end["ours"]))
        return None

    def _set(self, key: str, value: str) -> None:
        with self._lock, suppress(RuntimeError):  # of a store that has gone, and which nobody reads any more
            self._store.set(key, value)

    def _beat(self) -> None:
        self._count += 1
        with self._lock:
            self._store.set(f"beat/{self.rank}", str(self._count))

    def _beats(self) -> dict[int, str]:
        with self._lock:
            known = [other for other in self._others if self._store.check([f"beat/{other}"])]
            beats = self._store.multi_get([f"beat/{other}" for other in known]) if known else []
        return dict.fromkeys(self._others, "") | {other: beat.decode() for other, beat in zip(known, beats, strict=True)}

    def _ends(self) -> dict[int, Any]:
        with self._lock:
            return {other: json.loads(self._store.get(f"end/{other}")) for other in self._others if self._store.check([f"end/{other}"])}

    def _within(self, seconds: float, true: Callable[[], bool], gone: bool = False) -> bool:
        """Whether it becomes true within that time. gone: what holds when the store has gone."""
        until = time.monotonic() + seconds
        try:
            while True:
                with self._lock:
                    if true():
                        return True
                if time.monotonic() > until:
                    return False
                time.sleep(BEAT_SECONDS / 10)
        except RuntimeError:
            return gone

    def _watch(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            try:
                self._beat()
                found = None if self._known.is_set() else self._look()
            except RuntimeError:
                found = self._dead(0)  # whose store it is, or the store of the program that has started all
            if found is not None and not self._known.is_set():
                self._known.set()
                self.found = found if found.text else None
                threading.Thread(target=self._on_trouble, args=[found], name="trouble", daemon=True).start()

    def _look(self) -> Trouble | None:
        ends, now = self._ends(), time.monotonic()
        failed = self._failed(ends)
        if failed is not None:
            return failed
        beats = self._beats()
        for other in self._others:
            if other in ends:
                if ends[other]["how"] == INTERRUPTED:
                    return Trouble(other, "")
                continue
            if beats[other] != self._seen[other][0]:
                self._seen[other] = beats[other], now
            elif now - self._seen[other][1] > SILENT_SECONDS:
                return self._dead(other)
        return next((self._dead(other) for other in self._ended() if other not in self._ends()), None)
