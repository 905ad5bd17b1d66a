"""Text that a model writes itself, as LLM-QAT has it (Liu et al. 2023, section 3.1): calibration text that needs no corpus.

    x_1 ~ uniform over the words of the vocabulary,    x_t ~ softmax(logits(x_1 ... x_{t-1}) / T)

At temperature T = 1, without top-k, this draws from the very distribution that the weights hold, so it suits any model, whatever it was
trained on. A first token that is drawn uniformly, where the model itself would begin as texts begin, brings in the vocabulary's rare
parts. LLM-QAT takes the likeliest token for the next 3 to 5 places; here every place is drawn. A model with a chat template writes a part
of the pieces as chats: the template up to where a user's message begins stands in front (as in Magpie, Xu et al. 2024), and the model goes
on with the message, and with the answer to it.

Decoding reads all weights once for a token of every row, so hundreds of short pieces at once cost little more than one. Nothing stops at
an end-of-text token: what follows it is another text, as in training. The numbers that decide a draw come of a generator on the CPU, so
devices differ by the digits of their logits only.

Measured on the demo model (gptq, 4 bits, groups of 64, 32 windows of 256, KL on four kinds of text): pieces of 32 or 128 tokens instead of
64, temperature 1.3 instead of 1, or another seed move KL by 9, 4, 9 and 4 % at most. So none of these is chosen finely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from ptqcli.calibration.chat import written_out
from ptqcli.calibration.tokens import read_tokens
from ptqcli.errors import PTQError
from ptqcli.model.kinds import ModelKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER_WORDS = "What the user says"  # stands where a message would, to see what a template puts in front of one

# (tokens done of each piece, all of them): called after every token.
OnToken = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pieces are written.

    length: tokens of a piece. rows: pieces at once. temperature: T. chats: share of the pieces that are chats, if there is a template.
    """

    length: int = 64
    rows: int = 256
    temperature: float = 1.0
    chats: float = 0.25

    def stored(self) -> dict[str, float]:
        """As a report keeps it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What pieces begin with: one of the tokens ``first`` [words], or all of ``chat`` [tokens], behind ``bos`` where windows have it.

    end: the end-of-text token that joins pieces, None for none.
    """

    first: Tensor
    chat: Tensor
    bos: int | None
    end: int | None

    def drawn(self, pieces: int, chats: float, generator: torch.Generator) -> Iterator[Tensor]:
        """The beginnings of ``pieces`` plain pieces and chats, int64 [pieces, tokens] each; a plain one's last token is its first."""
        of_chats = int(pieces * chats) if len(self.chat) else 0
        front = torch.tensor([] if self.bos is None else [self.bos], dtype=torch.long)
        words = self.first[torch.randint(len(self.first), (pieces - of_chats, 1), generator=generator)]
        yield torch.cat([front.expand(len(words), -1), words], dim=1)
        if of_chats:
            yield torch.cat([front, self.chat]).expand(of_chats, -1)


def prompts(tokenizer: PreTrainedTokenizerBase, vocabulary: int, bos: int | None) -> Prompts:
    """What a model of ``vocabulary`` tokens begins its pieces with. Raises PTQError for a tokenizer that has none of its words."""
    special = {*tokenizer.all_special_ids, *(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)}
    words = sorted(token for token in set(tokenizer.get_vocab().values()) - special if 0 <= token < vocabulary)
    if not words:
        raise PTQError(f"{tokenizer.name_or_path or 'the model in memory'}: the tokenizer has no words that the model knows; copy its own")
    return Prompts(
        first=torch.tensor(words, dtype=torch.long),
        chat=torch.tensor(_before_message(tokenizer), dtype=torch.long),
        bos=bos,
        end=tokenizer.eos_token_id,
    )


def _before_message(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template puts before a user's first message, none where it has no such place."""
    if not tokenizer.chat_template:
        return []
    try:
        text = written_out(tokenizer, [{"role": "user", "content": USER_WORDS}])
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError):
        return []  # a template that wants more than a user's message
    before, found, _ = text.removeprefix(tokenizer.bos_token or "").partition(USER_WORDS)
    tokens: list[int] = read_tokens(tokenizer, before, add_special_tokens=False)["input_ids"] if found and before else []
    return tokens


@torch.no_grad()
def write_tokens(
    model: nn.Module, kind: ModelKind, start: Prompts, count: int, how: Sampling, seed: int, device: torch.device, on_token: OnToken
) -> Tensor:
    """``count`` tokens that ``model`` writes, int64 [count]: pieces in random order, each with the end-of-text token behind it.

    The same arguments give the same tokens on the same machine. A chat's prompt is part of its piece.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = -(-count // (how.length + (start.end is not None)))
    cached = cache_works(model, kind, start.first[:2].to(device))
    written: list[Tensor] = []
    beginnings = [batch for begun in start.drawn(pieces, how.chats, generator) for batch in begun.split(how.rows)]
    for number, batch in enumerate(beginnings):
        front = 0 if start.bos is None else 1
        new = max(1, how.length - (batch.shape[1] - front))
        done = number * how.length

        def told(step: int, done: int = done) -> None:
            on_token(done + step, len(beginnings) * how.length)

        rows = go_on(model, kind, batch.to(device), new, how.temperature, generator, cached, told)
        written += rows[:, front:].cpu().unbind()
    end = torch.tensor([] if start.end is None else [start.end], dtype=torch.long)
    order = torch.randperm(len(written), generator=generator).tolist()
    return torch.cat([part for index in order for part in (written[index], end)])[:count]


def go_on(
    model: nn.Module,
    kind: ModelKind,
    rows: Tensor,
    new: int,
    temperature: float,
    generator: torch.Generator,
    cached: bool = True,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """``rows`` [pieces, tokens] with ``new`` drawn tokens behind each, int64 [pieces, tokens + new].

    cached: keys and values of earlier tokens are kept; otherwise all tokens are run again for each new one.
    """
    keeps = None
    for step in range(new):
        if cached:
            answer: Any = model(input_ids=rows if keeps is None else rows[:, -1:], past_key_values=keeps, use_cache=True)
            keeps = answer.past_key_values
        else:
            answer = kind.call(model, rows)
        rows = torch.cat([rows, draw(answer.logits[:, -1], temperature, generator)[:, None]], dim=1)
        on_step(step + 1)
    return rows


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token a row, int64 [rows], with the probabilities softmax(logits / temperature) of ``logits`` [rows, vocabulary].

    The token whose part of the cumulative distribution holds a uniform number; sums are float64, as 100,000 float32 terms lose the rare.
    """
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)  # [rows, vocabulary]
    places = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator).to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, places, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def cache_works(model: nn.Module, kind: ModelKind, tokens: Tensor) -> bool:
    """Whether ``model`` keeps what it needs of earlier tokens in ``past_key_values``, as most do; others are run without.

    Shown by the logits behind each of ``tokens`` [tokens] twice, at once and in two steps.
    """
    rows = tokens[:, None].expand(-1, 2)
    whole = kind.call(model, rows).logits[:, -1].float()
    begun: Any = model(input_ids=rows[:, :-1], use_cache=True)
    keeps = getattr(begun, "past_key_values", None)
    if keeps is None:
        return False
    stepped = model(input_ids=rows[:, -1:], past_key_values=keeps, use_cache=True).logits[:, -1].float()
    return bool((stepped - whole).norm() <= torch.finfo(begun.logits.dtype).eps ** 0.5 * whole.norm())
