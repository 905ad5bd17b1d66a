"""What happens when memory runs out: the work is done once more with half as many windows in a batch, as far as that is possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ptqcli.errors import MachineError
from ptqcli.pipeline.loaded import Run
from ptqcli.pipeline.memory import return_freed_memory
from ptqcli.resources import ran_out
from ptqcli.untrusted import one_line


class Batches:
    """How many windows are in a batch. size: now. halved_at: how many blocks were finished each time that it was halved.

    calibrated: whether anything runs in batches.
    """

    def __init__(self, run: Run, size: int, calibrated: bool) -> None:
        self.size, self.halved_at = size, list[int]()
        self._run, self._calibrated = run, calibrated

    def halve_as(self, halved_at: Sequence[int]) -> None:
        """Be what an earlier run has come to."""
        for finished in halved_at[len(self.halved_at) :]:
            self.halved_at.append(finished)
            self.size = max(1, self.size // 2)

    def work(self, work: Callable[[], None], record: Callable[[], None], finished: int, fixed: bool = False) -> None:
        """Do ``work`` behind so many ``finished`` blocks, and again with smaller batches when memory runs out.

        record: records the calls of the blocks for the new batches. fixed: some of what ``work`` starts from is only in memory, in the old
        ones. Raises MachineError if memory does not do for a single window, or the batches cannot change.
        """
        run, recorded = self._run, True
        layers, folds = len(run.layers), len(run.folds)
        while True:
            try:
                if not recorded:
                    record()
                work()
                return
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                said = one_line(error)
                error.__traceback__ = None  # whose frames hold what there was no more room for
            del run.layers[layers:], run.folds[folds:]
            self._halve(said, finished, fixed)
            recorded = run.streams is None  # then that is the work

    def _halve(self, said: str, finished: int, fixed: bool) -> None:
        skeleton, device = self._run.skeleton, self._run.resources.device
        where = f"out of memory on {device} behind {finished} of {len(skeleton.blocks)} blocks ({said})"
        left_behind = finished > 0 and any(shape.exchanged for shape in skeleton.shapes)
        if not self._calibrated or self.size == 1 or fixed or left_behind:
            first = "--batch-size, " if self._calibrated and self.size > 1 else ""
            raise MachineError(f"{where}; lower {first}--seqlen or --nsamples, or take another --device or a solver that needs less")
        for unit in skeleton.units:
            skeleton.release(unit)
        return_freed_memory(device)
        torch.set_grad_enabled(False)  # passes that were suspended have ended, and each has left that as it found it
        self.halve_as([*self.halved_at, finished])
        self._run.progress.remark(f"{where}: going on with batches of {self.size}, which gives other sums in the last digits")
