"""KL divergence at the logits, with one group rounded at a time: what is asked for, measured directly.

    loss = mean over tokens of KL(P || Q)        P of the model as it is, Q with the weights of one group rounded

A forward pass for each group and candidate. What runs before the group's block is as it was, so those blocks give the hidden states that
they gave, and half of the work is saved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptqcli.calibration.record import hidden_key
from ptqcli.model.discovery import first_output
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.states import kept
from ptqcli.model.whole import given_hidden, whole
from ptqcli.sensitivity.groups import Group, Losses, Method, Work, largest_weight_bytes, logits_bytes, model_bytes, replaced
from ptqcli.untrusted import foreign

LOGITS_COPIES = 4  # of one batch: logits and logarithms of probabilities of both models


class KL(Method):
    """See the module."""

    name: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats a token"

    def needed_bytes(self, work: Work) -> int:
        """The model, the hidden states before each block, the logits of a batch in both models, and the rounded weights of a group."""
        tokens = max(stop - start for start, stop in work.batches) * work.windows.shape[1]
        features = work.skeleton.config.get_text_config().hidden_size
        hidden = len(work.skeleton.blocks) * work.windows.numel() * features * work.dtype.itemsize
        group = max(group.weights for group in work.groups) * work.dtype.itemsize
        return model_bytes(work) + hidden + logits_bytes(work, tokens, LOGITS_COPIES) + group + largest_weight_bytes(work)

    def losses(self, work: Work, known: Collection[int]) -> Iterator[tuple[int, Losses]]:
        """Group by group, in the order of the blocks."""
        done, total = 0, sum(len(group.options) for number, group in enumerate(work.groups) if number not in known)
        if not total:
            return
        with whole(work.skeleton, work.device, work.dtype) as model, torch.no_grad():
            with foreign(f"{work.skeleton.where}: the model does not run", "; use --sensitivity output"):
                original = _Original(work, model)
            for number, group in enumerate(work.groups):
                if number in known:
                    continue
                found: Losses = []
                for specs in group.options:
                    found.append(None if specs is None else self._loss(work, model, original, group, specs))
                    done += 1
                    work.tell(done, total)
                yield number, found

    @staticmethod
    def _loss(work: Work, model: nn.Module, original: _Original, group: Group, specs: Any) -> float:
        weights = {site.name: work.rounded(site, spec) for site, spec in zip(group.sites, specs, strict=True)}
        with replaced(model, weights):
            return sum(original.divergence(batch, group.block) for batch in range(len(work.batches))) / work.windows.numel()


class _Original:
    """The model as it is on the windows: hidden states before each block, and behind the last."""

    def __init__(self, work: Work, model: nn.Module) -> None:
        self.work, self.model = work, model
        # Where blocks leave something for later ones, all of them have to run.
        self.skips = not any(shape.exchanged for shape in work.skeleton.shapes)
        self.states = [hidden_states(work.skeleton, model, self._ids(batch)) for batch in range(len(work.batches))]

    def divergence(self, batch: int, first: int) -> float:
        """Sum over the tokens of a batch of KL(P || Q), Q of the model as it is now; the blocks before ``first`` are as they were."""
        skeleton, states = self.work.skeleton, self.states[batch]
        with given_hidden(skeleton, states[-1].to(self.work.device)):
            log_p = self._logits(batch)
        if self.skips and first:
            with given_hidden(skeleton, states[first].to(self.work.device), first):
                log_q = self._logits(batch)
        else:
            log_q = self._logits(batch)
        return divergence(log_p, log_q)

    def _logits(self, batch: int) -> Tensor:
        logits: Tensor = self.work.skeleton.kind.call(self.model, self._ids(batch)).logits
        return logits

    def _ids(self, batch: int) -> Tensor:
        return self.work.windows[slice(*self.work.batches[batch])].to(self.work.device)


def divergence(p: Tensor, q: Tensor) -> float:
    """Sum of KL(P || Q) over the places of logits ``p`` and ``q`` [windows, tokens, vocabulary], a window at a time."""
    total = 0.0
    for ours, theirs in zip(p, q, strict=True):
        log_p, log_q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        total += float(nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dtype=torch.float64))
    return max(total, 0.0)


def hidden_states(skeleton: Skeleton, model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Before each block, and behind the last: [windows, tokens, features] each, on the CPU."""
    found: list[Tensor] = []

    def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = hidden_key(args, kwargs)
        found.append(kept(args[key] if isinstance(key, int) else kwargs[key]).cpu())

    def behind(_block: nn.Module, _inputs: Any, outputs: Any) -> None:
        found.append(kept(first_output(outputs)).cpu())

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in skeleton.blocks]
    handles.append(skeleton.blocks[-1].register_forward_hook(behind))
    try:
        skeleton.kind.call(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return found
