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

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptqcli.formats import LinearSpec
from ptqcli.model.linears import linear_weight, rows_first
from ptqcli.model.whole import whole
from ptqcli.sensitivity.groups import Group, Losses, Method, Work, largest_weight_bytes, logits_bytes, model_bytes
from ptqcli.untrusted import foreign

LOGITS_COPIES = 5  # logits, logarithms of probabilities, probabilities, and their gradients


class Gradient(Method):
    """See the module."""

    name: ClassVar[str] = "gradient"
    unit: ClassVar[str] = "nats a token"
    at_once: ClassVar[bool] = True

    def needed_bytes(self, work: Work) -> int:
        """The model, a number in float32 for each weight on trial, the gradient of one, and what one window leaves for going back."""
        weights = sum(group.weights for group in work.groups)
        tokens = work.windows.shape[1]
        features = sum(2 * (site.in_features + site.out_features) for site in work.skeleton.linears)
        inside = tokens * features * work.dtype.itemsize + logits_bytes(work, tokens, LOGITS_COPIES)
        return model_bytes(work) + 4 * weights + largest_weight_bytes(work) + inside

    def losses(self, work: Work, known: Collection[int]) -> Iterator[tuple[int, Losses]]:
        """All groups at the end."""
        with whole(work.skeleton, work.device, work.dtype) as model:
            fisher = self._fisher(work, model)
            for number, group in enumerate(work.groups):
                yield number, [None if specs is None else self._loss(work, group, specs, fisher) for specs in group.options]

    @staticmethod
    def _loss(work: Work, group: Group, specs: Sequence[LinearSpec], fisher: Mapping[str, Tensor]) -> float:
        total = 0.0
        for site, spec in zip(group.sites, specs, strict=True):
            error = work.rounded(site, spec).float() - linear_weight(work.module(site)).detach().float()
            total += float((fisher[site.name] * error.square()).sum(dtype=torch.float64))
        return total / 2

    def _fisher(self, work: Work, model: nn.Module) -> dict[str, Tensor]:
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
