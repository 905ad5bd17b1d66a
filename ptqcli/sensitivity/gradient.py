"""Second-order loss from the Fisher information, of which the diagonal is taken in one forward and backward pass for all candidates.

To second order, rounding the weights w to w + d moves the distribution p of the next token by

    KL(p_w || p_(w+d)) = 1/2 d' F d        F = E_x E_(y ~ p_w)  g g'        g = grad_w log p_w(y | x)

at the unquantized point, where the gradient of KL itself is zero (Amari 1998). F is the Fisher information of the model's own predictions,
so the words y are drawn from the model: the *empirical* Fisher, which takes those of the text, is another matrix (Kunstner et al. 2019,
"Limitations of the Empirical Fisher Approximation", arXiv 1905.12558). One backward pass of a window gives the sum of the gradients of
its tokens; given the text, each has mean zero, so products of two tokens' gradients cancel in the mean and the square of the sum stands
for the sum of the squares. Errors of rounding hardly correlate from weight to weight, which leaves the diagonal, as in SqueezeLLM (Kim
et al. 2023):

    loss = 1/2 sum_ij F_ij (w_ij - w'_ij)^2        F_ij = mean over tokens of (sum over the window's tokens of g_ij)^2, in nats a token

It ranks as well as NVIDIA ModelOpt's per-sample squares of grad_z (z_q - z) at outputs z: on the demo model the rank correlation with KL
one at a time was .998 for both, within one width .962 to .997 here and .959 to .985 there; and it needs no memory for the candidates.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptqcli.model.linears import rows_first
from ptqcli.sensitivity.groups import Work
from ptqcli.sensitivity.squared_errors import SquaredErrors
from ptqcli.untrusted import foreign


class Gradient(SquaredErrors):
    """See the module."""

    name: ClassVar[str] = "gradient"
    unit: ClassVar[str] = "nats a token"
    kept: ClassVar[int] = 2
    logits_copies: ClassVar[int] = 5  # logits, logarithms of probabilities, probabilities, and their gradients

    def bytes_of_weight(self, work: Work) -> int:
        """A number in float32."""
        return 4

    def loss(self, found: Tensor, error: Tensor) -> float:
        """In nats a token."""
        return float((found * error.square()).sum(dtype=torch.float64)) / 2

    def found(self, work: Work, model: nn.Module) -> dict[str, Tensor]:
        """The diagonal for each weight on trial, float32 [out, in], by the linear's path: mean over the tokens."""
        sums: dict[str, Tensor] = {}
        handles: list[Any] = []
        for site in (site for group in work.groups for site in group.sites):
            module = work.module(site)
            sums[site.name] = torch.zeros(site.out_features, site.in_features, device=work.device)
            handles.append(_collect(module, sums[site.name]))
        generator = torch.Generator(work.device).manual_seed(work.seed)
        try:
            with foreign(f"{work.skeleton.where}: the model fails while it is differentiated", "; use --sensitivity output"):
                for number, window in enumerate(work.windows):
                    self._back(work, model, window[None].to(work.device), generator)
                    work.tell(number + 1, len(work.windows))
        finally:
            for handle in handles:
                handle.remove()
            model.requires_grad_(False)
        return {name: total / work.windows.numel() for name, total in sums.items()}

    @staticmethod
    def _back(work: Work, model: nn.Module, ids: Tensor, generator: torch.Generator) -> None:
        """Send back the log-likelihood of words that the model draws behind each token of one window, [1, tokens]."""
        with torch.enable_grad():
            log_p = work.skeleton.kind.call(model, ids).logits[0].float().log_softmax(-1)  # [tokens, vocabulary]
            words = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            log_p.gather(1, words).sum().backward()


def _collect(module: nn.Module, total: Tensor) -> Any:
    """Have the squares of the gradients of a linear's weight added to ``total`` [out, in]; gives what takes that back."""
    weight = module.get_parameter("weight")
    weight.requires_grad_(True)

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = rows_first(module, parameter.grad).float()
        total.addcmul_(gradient, gradient)
        parameter.grad = None

    return weight.register_post_accumulate_grad_hook(add)
