"""End-to-end tuning: the scales of all linears at once, with their codes as they are.

The second phase of EfficientQAT (Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", arXiv
2407.11062, section 3.2, E2E-QP). Only scales are trained, one number a group, so memory is that of running the model, and the result
is a checkpoint like any other. Two things differ from the paper:

    loss     KL(P || Q) between the original's next-token distribution P and the quantized model's Q, mean over all tokens of the windows.
             The paper's cross entropy with the text also teaches the text, which shifts a model that was tuned to follow instructions.
    vectors  gains and biases are trained along (``student.py``); they are stored in full precision anyway.

Adam with betas (.9, .99) on relative changes, a rate that falls to 0 along a cosine, WINDOWS windows a step. Half of the windows are never
trained on. On them the loss is taken before the first step and EVALUATIONS times on the way, with every scale rounded to the dtype in which
it is stored; the best of these is the result. If none is better than the start, the start is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from ptqcli.errors import PTQError, UsageError
from ptqcli.finishing.student import LARGEST_CHANGE, Student
from ptqcli.finishing.teacher import Teacher
from ptqcli.options import option
from ptqcli.resources import Resources

WINDOWS = 4  # a step
EVALUATIONS = 10
BETAS = (0.9, 0.99)

# (steps done, all steps, the last loss on the windows held out)
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class TuneScales:
    """What there is to choose. Raises UsageError for values that cannot be."""

    steps: int = option(150, f"steps of {WINDOWS} windows")
    lr: float = option(3e-3, "largest relative change of a scale in one step, about")
    norms: bool = option(True, "tune the gains of norms and all biases, too")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps {self.steps} is not valid; give at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr {self.lr} is not valid; give a positive number such as 0.003")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the loss on the windows held out. best_step: 0 if no step was better than the start, which then stands."""

    before: float
    after: float
    best_step: int
    trained: int
    held_out: int


def check_windows(count: int) -> None:
    """Raise UsageError for fewer windows than can be parted in two."""
    if count < 2:
        raise UsageError(f"tuning takes 2 windows or more, half of which are held out, and {count} is asked for; raise --nsamples")


def windows_at_once(resources: Resources, seqlen: int) -> int:
    """Windows of ``seqlen`` tokens that are run together."""
    return min(WINDOWS, resources.windows_per_batch(seqlen))


def summed_kl(logits: Tensor, target: Tensor) -> Tensor:
    """KL(P || Q) in nats, float64 sum over the tokens. logits: of Q, target: of P, floating [windows, tokens, vocabulary]."""
    rows = [recomputed(_kl_of_one, q, p, use_reentrant=False) for q, p in zip(logits, target, strict=True)]
    return torch.stack(rows).sum()


def _kl_of_one(logits: Tensor, target: Tensor) -> Tensor:
    log_q, log_p = (each.log_softmax(-1, dtype=torch.float32) for each in (logits, target))
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).double().sum()


class Tuning:
    """One run. batch: windows run at once; the result does not depend on it but for last digits. seed: of the order of the windows."""

    def __init__(self, student: Student, teacher: Teacher, options: TuneScales, batch: int, seed: int) -> None:
        self.student, self.teacher, self.options, self.batch = student, teacher, options, batch
        windows, self.tokens = teacher.windows.shape
        check_windows(windows)
        half = windows // 2
        self.trained, self.held_out = torch.arange(half), torch.arange(half, windows)
        self._generator = torch.Generator().manual_seed(seed)

    def run(self, on_step: OnStep) -> Outcome:
        """Tune the student; afterwards it is at its best. Raises PTQError if it is not finite from the start."""
        changes = [tuned.change for tuned in self.student.tuned]
        optimizer = torch.optim.Adam(changes, lr=self.options.lr, betas=BETAS)
        before = best = loss = self.held_out_loss()
        if not math.isfinite(before):
            raise PTQError("the quantized model's logits, or the original's, are not finite; nothing can be tuned")
        kept, best_step, steps = [change.detach().clone() for change in changes], 0, self.options.steps
        on_step(0, steps, before)
        order = self._order()
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = self.options.lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
            optimizer.zero_grad()
            self.add_gradients(next(order))
            optimizer.step()
            for change in changes:
                change.detach().clamp_(-LARGEST_CHANGE, LARGEST_CHANGE)
            if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
                loss = self.held_out_loss()
                if loss < best:
                    best, best_step, kept = loss, step, [change.detach().clone() for change in changes]
            on_step(step, steps, loss)
            if not math.isfinite(loss):  # it does not come back from there
                break
        for change, value in zip(changes, kept, strict=True):
            change.detach().copy_(value)
        return Outcome(before=before, after=best, best_step=best_step, trained=len(self.trained), held_out=len(self.held_out))

    @torch.enable_grad()
    def add_gradients(self, chosen: Tensor) -> None:
        """Add those of the mean loss over the windows ``chosen``."""
        for part in chosen.split(self.batch):
            loss = summed_kl(self._logits(part, rounded=False), self.teacher.logits(part)) / (len(chosen) * self.tokens)
            loss.backward()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean over the tokens of the windows held out, of the model as it would be stored."""
        parts = self.held_out.split(self.batch)
        total = sum(float(summed_kl(self._logits(part, rounded=True), self.teacher.logits(part))) for part in parts)
        return total / (len(self.held_out) * self.tokens)

    def _logits(self, chosen: Tensor, rounded: bool) -> Tensor:
        return self.student.logits(self.teacher.windows[chosen].to(self.teacher.device), rounded)

    def _order(self) -> Iterator[Tensor]:
        """The windows of each step: all of them in random order, then all again."""
        while True:
            shuffled = self.trained[torch.randperm(len(self.trained), generator=self._generator)]
            yield from (part for part in shuffled.split(WINDOWS) if len(part) == min(WINDOWS, len(shuffled)))
