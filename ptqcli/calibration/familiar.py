"""Whether a model knows the kind of a text, by its own loss.

    loss = mean_t  -log p(x_t | x_<t),      expected = mean_t  -sum_x p(x | x_<t) log p(x | x_<t)

On text that the model writes itself the next token is drawn from p, so both have one expectation, at every place: nothing need be written
to know the loss there. On text of a kind that it was trained on the two are close, however hard the text is. A loss far above what the
model expects says that it is sure of things that do not come: the text is foreign, and what its inner layers see of it is not what they
see in use. The bare loss says less: code is easier than prose for any model, and text of many languages, cut into bytes, easier still.

Measured, loss - expected in nats, windows of 64 tokens, standard error 0.1: the demo model on the text that it was trained on -0.3, on
code 1.7, C4 1.7, WikiText-2 2.1, other languages 3.1; SmolLM2-135M-Instruct on code 0.1, Python's documentation 0.3, other languages
0.3, WikiText-2 0.5, C4 0.6 (the best text for it); on their own text 0.0 both; a model of microbes on English 16. So the rule tells what a
model has never seen from what it has; it does not rank texts that it knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptqcli.model.kinds import ModelKind

WINDOWS, TOKENS = 32, 64  # that are looked at: beginnings of windows
FOREIGN = 1.0  # nats above what is expected; e times as surprised as it takes itself to be
SURE = 2.0  # standard errors


@dataclass(frozen=True, kw_only=True)
class Familiarity:
    """How well a model knows a text. loss, expected: in nats a token, as above. error: the standard error of their difference."""

    loss: float
    expected: float
    error: float

    @property
    def foreign(self) -> bool:
        """Whether the text is of a kind that the model has not seen."""
        return self.loss - self.expected > FOREIGN + SURE * self.error

    @property
    def at_home(self) -> bool:
        """Whether the model does no worse on the text than on its own."""
        return self.loss <= self.expected

    def __str__(self) -> str:
        return f"its loss is {self.loss:.2f} nats a token, and would be {self.expected:.2f} were the text its own"


def looked_at(windows: Tensor, most: int) -> Tensor:
    """The part of ``windows`` [windows, tokens] that is measured, at most about ``most`` tokens of it."""
    tokens = min(TOKENS, windows.shape[1])
    return windows[: min(WINDOWS, max(2, most // tokens)), :tokens]


@torch.no_grad()
def familiarity(model: nn.Module, kind: ModelKind, windows: Tensor) -> Familiarity | None:
    """How well ``model`` knows ``windows``, int64 [windows, tokens] on its device, in one pass; None for fewer than two.

    A window's first quarter is not counted: there the model still finds out what it reads.
    """
    if len(windows) < 2 or windows.shape[1] < 2:
        return None
    logits = kind.call(model, windows).logits  # [windows, tokens, vocabulary]
    skipped = windows.shape[1] // 4
    loss, expected = torch.stack([_sums(row[skipped:-1].float(), ids[skipped + 1 :]) for row, ids in zip(logits, windows, strict=True)]).T
    error = (loss - expected).std() / len(windows) ** 0.5
    return Familiarity(loss=loss.mean().item(), expected=expected.mean().item(), error=error.item())


def _sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss and mean expected loss of one window, float64 [2]. logits: [places, vocabulary]. targets: [places]."""
    log_p = logits.log_softmax(-1)
    loss = -log_p.gather(-1, targets[:, None])
    entropy = -(log_p.exp() * log_p).nan_to_num(0).sum(-1)  # 0 log 0 = 0
    return torch.stack([loss.mean(dtype=torch.float64), entropy.mean(dtype=torch.float64)])
