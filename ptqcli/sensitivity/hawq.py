"""Mean trace of the Hessian times squared error: HAWQ-V2 (Dong et al. 2020, arXiv 1911.03852).

    loss = sum over the group's matrices of  Tr(H) / n * |W - W'|^2        H of the cross entropy with the text, n weights

the sensitivity with which the paper orders layers, in which every weight of a matrix counts the same. The trace is estimated as
Hutchinson does, mean of z' H z over vectors z of random signs; H z comes from a second backward pass through the first one's gradients, for
all matrices at once: what the signs of one matrix bring about in another has mean zero. A trace that comes out below zero, which only noise
does where the loss is near a minimum, counts as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptqcli.sensitivity.groups import Work
from ptqcli.sensitivity.squared_errors import SquaredErrors
from ptqcli.untrusted import foreign

DRAWS = 2  # of signs for each window
TOKENS = 128  # of a window that are looked at, at most: all that is between input and loss is held twice


class HAWQ(SquaredErrors):
    """See the module."""

    name: ClassVar[str] = "hawq"
    unit: ClassVar[str] = "mean trace times squared error"
    kept: ClassVar[int] = 6
    logits_copies: ClassVar[int] = 12
    tokens: ClassVar[int | None] = TOKENS

    def bytes_of_weight(self, work: Work) -> int:
        """A gradient, a sign, and products with the Hessian."""
        return 4 * work.dtype.itemsize

    def loss(self, found: float, error: Tensor) -> float:
        """Of the trace of the linear's part of the Hessian."""
        return found / error.numel() * float(error.square().sum(dtype=torch.float64))

    def found(self, work: Work, model: nn.Module) -> dict[str, float]:
        """Of each linear's part of the Hessian, by its path."""
        sites = [site for group in work.groups for site in group.sites]
        weights = [work.module(site).get_parameter("weight") for site in sites]
        sums = torch.zeros(len(sites), dtype=torch.float64)
        generator = torch.Generator(work.device).manual_seed(work.seed)
        windows = work.windows[:, :TOKENS]
        for weight in weights:
            weight.requires_grad_(True)
        failing = foreign(f"{work.skeleton.where}: the model cannot be differentiated twice", "; use --sensitivity gradient")
        try:
            with failing, sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
                for number, ids in enumerate(windows):
                    sums += self._products(work, model, weights, ids[None].to(work.device), generator)
                    work.tell(number + 1, len(windows))
        finally:
            model.requires_grad_(False)
        traces = (sums / (len(windows) * DRAWS)).clamp(min=0).tolist()
        return {site.name: trace for site, trace in zip(sites, traces, strict=True)}

    @staticmethod
    def _products(work: Work, model: nn.Module, weights: Sequence[Tensor], ids: Tensor, generator: torch.Generator) -> Tensor:
        """Sum over the draws of z' H z of each of ``weights``, of the mean loss of one window [1, tokens]."""
        with torch.enable_grad():
            logits = work.skeleton.kind.call(model, ids).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, ids[0, 1:])
            gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            total = torch.zeros(len(weights), dtype=torch.float64)
            for draw in range(DRAWS):
                signs = [_signs(weight, generator) for weight in weights]
                product = sum((gradient * z).sum() for gradient, z in zip(gradients, signs, strict=True))
                behind = torch.autograd.grad(product, weights, retain_graph=draw + 1 < DRAWS, materialize_grads=True)  # type: ignore[arg-type]
                total += torch.tensor(
                    [float((z * h).sum(dtype=torch.float64)) for z, h in zip(signs, behind, strict=True)], dtype=total.dtype
                )
        return total


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs (Rademacher) of the shape of ``weight``."""
    drawn = torch.randint(0, 2, weight.shape, generator=generator, device=weight.device, dtype=torch.int8)
    return (2 * drawn - 1).to(weight.dtype)
