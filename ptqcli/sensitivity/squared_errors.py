"""What the methods have in common that weigh squared errors of the weights by what gradients of the whole model tell of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ptqcli.formats import LinearSpec
from ptqcli.model.linears import LinearSite, linear_weight
from ptqcli.model.whole import whole
from ptqcli.sensitivity.groups import Losses, Method, Work, largest_weight_bytes, logits_bytes, model_bytes


class SquaredErrors(Method):
    """A method of this kind.

    kept: tensors that going back needs for each input and output of a linear. logits_copies: the same for the logits, in float32. tokens:
    of a window that are looked at, at most; None for all.
    """

    at_once: ClassVar[bool] = True
    kept: ClassVar[int]
    logits_copies: ClassVar[int]
    tokens: ClassVar[int | None] = None

    @abstractmethod
    def bytes_of_weight(self, work: Work) -> int:
        """Beside the model, for each weight on trial."""

    @abstractmethod
    def found(self, work: Work, model: nn.Module) -> Mapping[str, Any]:
        """What the loaded model tells of each linear, by its path."""

    @abstractmethod
    def loss(self, found: Any, error: Tensor) -> float:
        """What ``error``, float32 [out, in], costs a linear of which ``found`` is told."""

    def needed_bytes(self, work: Work) -> int:
        """See ``Method``."""
        length = work.windows.shape[1]
        tokens = length if self.tokens is None else min(self.tokens, length)
        features = sum(self.kept * (site.in_features + site.out_features) for site in work.skeleton.linears)
        inside = tokens * features * work.dtype.itemsize + logits_bytes(work, tokens, self.logits_copies)
        weights = sum(group.weights for group in work.groups) * self.bytes_of_weight(work)
        return model_bytes(work) + weights + largest_weight_bytes(work) + inside

    def losses(self, work: Work, known: Collection[int]) -> Iterator[tuple[int, Losses]]:
        """All groups at the end."""
        with whole(work.skeleton, work.device, work.dtype) as model:
            found = self.found(work, model)
            for number, group in enumerate(work.groups):
                yield number, [None if specs is None else self._of_group(work, group.sites, specs, found) for specs in group.options]

    def _of_group(self, work: Work, sites: Sequence[LinearSite], specs: Sequence[LinearSpec], found: Mapping[str, Any]) -> float:
        total = 0.0
        for site, spec in zip(sites, specs, strict=True):
            error = work.rounded(site, spec).float() - linear_weight(work.module(site)).detach().float()
            total += self.loss(found[site.name], error)
        return total
