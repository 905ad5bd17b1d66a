"""Multiple choice: the answer of a model is the continuation that it finds the likeliest.

    acc        argmax over the choices of  log p(continuation | context)
    acc_norm   argmax of the same, divided by the number of characters of the choice

as lm-evaluation-harness scores a task of output type multiple_choice (Gao et al., github.com/EleutherAI/lm-evaluation-harness), down to how
the two are cut into tokens: white space at the end of the context belongs to the continuation; context and continuation are encoded
together, and what stands behind as many tokens as the context alone has is the continuation. What the tokenizer writes in front of every
text is written here, too. A context without tokens is the beginning-of-sequence token, or that for the end. What is too long for the model
loses tokens at its left end.

Continuations of one token behind the same context are read off one pass. Rows that run together end in filler, which no token of a causal
model sees. Log probabilities are float32 and their sums float64, whatever the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptqcli.calibration.padded import marks
from ptqcli.calibration.tokens import read_tokens
from ptqcli.errors import PTQError
from ptqcli.evaluation.answers import TaskResult, share
from ptqcli.evaluation.perplexity import TOKENS_PER_BATCH, check_fits, evaluating, placed
from ptqcli.model.positions import most_tokens
from ptqcli.runtime.layers import mixes_tokens

KIND = "multiple choice"

Progress = Callable[[int, int], None]
Pair = tuple[list[int], list[int]]  # token ids of a context and of what goes on behind it


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """context: what the model reads. choices: none is empty. continuations: of the context, one a choice, with the blank in front if there
    is one. right: the number of the right choice. where: for errors."""

    context: str
    choices: Sequence[str]
    continuations: Sequence[str]
    right: int
    where: str


def answer_choices(
    name: str, questions: Sequence[ChoiceQuestion], model: Any, tokenizer: Any, marked: bool = True, on_progress: Progress | None = None
) -> TaskResult:
    """What ``model`` answers. marked: what the tokenizer writes in front of a text is written; a chat template has it already.

    Raises PTQError for a choice that adds no token, or more than the model has positions, and for probabilities that are not finite.
    """
    pairs = [(question.context, more) for question in questions for more in question.continuations]
    encoded = encode_pairs(tokenizer, pairs, marked)
    places = [question.where for question in questions for _ in question.choices]
    found = iter(log_likelihoods(model, encoded, places, on_progress))
    plain, normed = [], []
    for question in questions:
        sums = [next(found) for _ in question.choices]
        plain.append(_likeliest(sums))
        normed.append(_likeliest([each / len(choice) for each, choice in zip(sums, question.choices, strict=True)]))
    right = [given == question.right for given, question in zip(plain, questions, strict=True)]
    right_normed = [given == question.right for given, question in zip(normed, questions, strict=True)]
    return TaskResult(
        task=name,
        kind=KIND,
        answers=[question.choices[given] for given, question in zip(plain, questions, strict=True)],
        expected=[question.choices[question.right] for question in questions],
        right=right,
        scores={"acc": share(right), "acc_norm": share(right_normed)},
    )


def _likeliest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]], marked: bool = True) -> list[Pair]:
    """Each context with its continuation as token ids, by the rules above."""
    split = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in pairs]
    contexts = _encode(tokenizer, [context for context, _ in split])
    wholes = _encode(tokenizer, [context + continuation for context, continuation in split])
    before = marks(tokenizer)[0] if marked else []
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [
        (([] if context[:1] == [start] else before) + context or [start], whole[len(context) :])
        for context, whole in zip(contexts, wholes, strict=True)
    ]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = read_tokens(tokenizer, texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def log_likelihoods(model: Any, pairs: Sequence[Pair], places: Sequence[str], on_progress: Progress | None = None) -> list[float]:
    """log p(continuation | context) of each pair, in nats. places: what errors call it."""
    if not pairs:
        return []
    rows = _rows(pairs, places, most_tokens(model))
    longest = max(map(len, rows))
    check_fits(model, torch.tensor([token for context, more in pairs for token in (*context, *more)]), longest)
    found = [0.0] * len(pairs)
    done = 0
    with evaluating([model]):
        for batch in _batches(list(rows), mixes_tokens(model)):
            logits = _logits(model, batch)
            for row, of_row in zip(batch, logits, strict=True):
                for index in rows[row]:
                    found[index] = _sum(of_row[: len(row)], pairs[index][1], places[index])
            done += sum(len(rows[row]) for row in batch)
            if on_progress:
                on_progress(done, len(pairs))
    return found


def _rows(pairs: Sequence[Pair], places: Sequence[str], positions: int | None) -> dict[tuple[int, ...], list[int]]:
    """What the model reads, all but the last token, with the numbers of the pairs that are read off it."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, ((context, continuation), where) in enumerate(zip(pairs, places, strict=True)):
        if not continuation:
            raise PTQError(f"{where}: a choice adds no token to the context; correct it")
        if positions is not None and len(continuation) > positions:
            raise PTQError(f"{where}: a choice has {len(continuation)} tokens and the model {positions} positions; shorten it")
        whole = [*context, *continuation]
        kept = whole if positions is None else whole[-(positions + 1) :]
        rows.setdefault(tuple(kept[:-1]), []).append(index)
    return rows


def _batches(rows: list[tuple[int, ...]], alone: bool) -> Iterator[list[tuple[int, ...]]]:
    """Rows that run together, the longest first, so that what does not fit into memory shows at once."""
    rows.sort(key=len, reverse=True)
    start = 0
    while start < len(rows):
        size = 1 if alone else max(1, TOKENS_PER_BATCH // len(rows[start]))
        yield rows[start : start + size]
        start += size


def _logits(model: Any, batch: Sequence[Sequence[int]]) -> Tensor:
    """[rows, tokens of the longest, vocabulary], in the model's dtype."""
    longest = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
    logits: Tensor = model(input_ids=placed(model, ids), use_cache=False).logits
    return logits


def _sum(logits: Tensor, continuation: Sequence[int], where: str) -> float:
    """logits: [tokens, vocabulary], the last of which say what the continuation is."""
    targets = torch.tensor(continuation, device=logits.device)
    log_probs = logits[-len(continuation) :].log_softmax(-1, dtype=torch.float32)
    total = float(log_probs.gather(1, targets[:, None]).double().sum())
    if not total > float("-inf"):
        raise PTQError(f"{where}: the probability of a choice is not finite; the weights are damaged or overflow their dtype")
    return total
