"""How good a quantized encoder is: on masked words, by its embeddings beside the original's, and on a labelled task.

    masked perplexity   exp( mean over the masked places of  -log p(token | the text with all masked places hidden) )
    embedding cosine    cos(e, e'), e the mean of the last hidden states over the tokens of a text, e' the original's; mean over texts
    accuracy            the share of labelled texts to which the head of the model gives their label

Devlin et al. 2019 ("BERT", section 3.1) train on 15 % of the tokens, hidden in 80 % of these places, replaced by a random word in 10 %,
left alone in 10 %. The last two are there for training; here all 15 % are hidden, the same places in every model, and at least one in a
text. The mean of the last hidden states is what most sentence encoders take for the embedding of a text (Reimers and Gurevych 2019,
section 3); a model that takes its first token instead is not measured by its own embedding.

Texts are not joined: each stands in a window of its own, between its tokenizer's marks, longer ones in several (``calibration.padded``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptqcli.calibration.chat import chat_writer
from ptqcli.calibration.files import json_rows
from ptqcli.calibration.padded import marks, padded, text_windows
from ptqcli.calibration.rows import Rows
from ptqcli.calibration.text import documents
from ptqcli.calibration.tokens import read_tokens
from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.perplexity import TOKENS_PER_BATCH, check_fits, evaluating
from ptqcli.model.kinds import PADDING, kind_of
from ptqcli.model.positions import most_tokens
from ptqcli.runtime.layers import mixes_tokens
from ptqcli.untrusted import shown

MASKED = 0.15  # of the tokens of a text
USUAL_SEQLEN = 512  # the positions of most encoders

# Called with the text, the windows done, and all windows.
OnWindow = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class EncoderEvaluation:
    """An encoder on one text, or on one file of labelled texts.

    tokens: in ``windows`` windows of at most ``seqlen``. masked_perplexity: over ``masked`` hidden tokens; None for a model without a head
    for words. embedding_cosine, lowest_cosine: mean and least over the windows, beside the baseline. accuracy: on labelled texts alone.
    baseline_...: the baseline's; None without one.
    """

    text: str
    tokens: int
    windows: int
    seqlen: int
    masked: int | None = None
    masked_perplexity: float | None = None
    baseline_masked_perplexity: float | None = None
    embedding_cosine: float | None = None
    lowest_cosine: float | None = None
    accuracy: float | None = None
    baseline_accuracy: float | None = None


@dataclass(frozen=True)
class Labelled:
    """Texts as token ids with the numbers of their labels."""

    rows: Sequence[Sequence[int]]
    labels: Sequence[int]


def measure_encoder(
    model: Any,
    texts: Mapping[str, Sequence[Sequence[int]]],
    tokenizer: Any,
    seqlen: int,
    baseline: Any = None,
    tasks: Mapping[str, Labelled] | None = None,
    on_window: OnWindow | None = None,
) -> Iterator[EncoderEvaluation]:
    """``model`` on each of ``texts``, whose windows are rows of token ids, of ``calibration.padded.text_windows``; then on each task.

    Raises UsageError for windows that are too long and for a task that the model has no head for; PTQError for ids that it does not have
    and for what is not finite.
    """
    models = [model] if baseline is None else [model, baseline]
    for rows in [*texts.values(), *(task.rows for task in (tasks or {}).values())]:
        for each in models:
            check_fits(each, torch.tensor([token for row in rows for token in row]), max(map(len, rows)))
    for text, rows in texts.items():
        hidden = _hidden_places(rows, tokenizer) if _has_words(model) and tokenizer.mask_token_id is not None else None
        step = partial(on_window, text) if on_window else None
        yield _evaluation(text, rows, seqlen, hidden, *_sums(models, rows, hidden, tokenizer.mask_token_id, step))
    for name, task in (tasks or {}).items():
        shares = [_accuracy(each, task, name) for each in models]
        yield EncoderEvaluation(
            text=name,
            tokens=sum(map(len, task.rows)),
            windows=len(task.rows),
            seqlen=seqlen,
            accuracy=shares[0],
            baseline_accuracy=None if baseline is None else shares[1],
        )


def _evaluation(
    text: str, rows: Sequence[Sequence[int]], seqlen: int, hidden: Sequence[Tensor] | None, losses: Tensor, cosines: Tensor
) -> EncoderEvaluation:
    masked = None if hidden is None else sum(int(places.sum()) for places in hidden)
    perplexities = [None, None] if not masked else [_exp(loss / masked) for loss in losses.tolist()]
    return EncoderEvaluation(
        text=text,
        tokens=sum(map(len, rows)),
        windows=len(rows),
        seqlen=seqlen,
        masked=masked,
        masked_perplexity=perplexities[0],
        baseline_masked_perplexity=perplexities[1] if len(perplexities) > 1 else None,
        embedding_cosine=float(cosines.mean()) if len(cosines) else None,
        lowest_cosine=float(cosines.min()) if len(cosines) else None,
    )


def _exp(loss: float) -> float:
    if not loss < math.log(float.fromhex("0x1p1023")):
        raise PTQError(f"masked perplexity is not finite: the mean loss is {loss:.4g} nats; quantize with more bits")
    return math.exp(loss)


def default_windows(model: Any) -> int:
    """Tokens in a window: USUAL_SEQLEN, or all that a model takes if these are fewer."""
    return min(USUAL_SEQLEN, most_tokens(model) or USUAL_SEQLEN)


def encoder_windows(source: str, tokenizer: Any, seqlen: int, data_dir: Path | None = None) -> list[list[int]]:
    """The evaluation text of a source as windows, each a text or a piece of one. Raises what ``documents`` and ``text_windows`` do."""
    rows = Rows(write_chat=chat_writer(tokenizer))
    found = list(text_windows(documents(source, "evaluation", data_dir, rows), tokenizer, seqlen))
    if not found:
        raise UsageError(f"{source}: holds no text; give one with words in it")
    return found


def measured_encoder(
    model: Any, sources: Sequence[str], tokenizer: Any, seqlen: int | None, baseline: Any, data_dir: Path | None
) -> list[EncoderEvaluation]:
    """As ``measure_encoder``, of texts by their names; seqlen: None for the usual one."""
    window = seqlen or default_windows(model)
    texts = {source: encoder_windows(source, tokenizer, window, data_dir) for source in sources}
    return list(measure_encoder(model, texts, tokenizer, window, baseline))


def _has_words(model: Any) -> bool:
    return model.get_output_embeddings() is not None


def _hidden_places(rows: Sequence[Sequence[int]], tokenizer: Any) -> list[Tensor]:
    """Bool [tokens] of each row: the places that are hidden, none of them a mark. The same rows give the same places."""
    generator, (before, behind) = torch.Generator().manual_seed(0), marks(tokenizer)
    places = []
    for row in rows:
        drawn = torch.rand(len(row), generator=generator)
        drawn[: len(before)] = 2
        drawn[len(row) - len(behind) :] = 2
        places.append(drawn <= max(MASKED, float(drawn.min())))
    return places


@torch.no_grad()
def _sums(
    models: Sequence[Any],
    rows: Sequence[Sequence[int]],
    hidden: Sequence[Tensor] | None,
    mask: int | None,
    step: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Losses of each model over the hidden places, float64 [models], and the cosine of each row, float64 [rows], of two models."""
    losses, cosines = torch.zeros(len(models), dtype=torch.float64), [torch.empty(0, dtype=torch.float64)]
    with evaluating(list(models)):
        for start, stop in _batches(models, rows):
            ids = padded(rows[start:stop])
            if hidden is not None and mask is not None:
                places = torch.nn.utils.rnn.pad_sequence(list(hidden[start:stop]), batch_first=True)
                losses += torch.stack([_masked_loss(model, ids, places, mask) for model in models])
            if len(models) > 1:
                one, other = (_embeddings(model, ids) for model in models)
                cosines.append(F.cosine_similarity(one, other, dim=-1))
            if step:
                step(stop, len(rows))
    if not all(bool(torch.isfinite(found).all()) for found in (losses, *cosines)):
        raise PTQError("the model gives nan or infinity; its weights are damaged or overflow their dtype")
    return losses, torch.cat(cosines)


def _batches(models: Sequence[Any], rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    longest = max(map(len, rows))
    size = 1 if any(map(mixes_tokens, models)) else max(1, TOKENS_PER_BATCH // longest)
    return ((start, min(start + size, len(rows))) for start in range(0, len(rows), size))


def _call(model: Any, ids: Tensor, whole: Any) -> Tensor:
    """What ``model``, a part of ``whole`` or all of it, gives first."""
    return kind_of(whole.config).answer(model, ids.to(whole.get_input_embeddings().weight.device))


def _masked_loss(model: Any, ids: Tensor, places: Tensor, mask: int) -> Tensor:
    logits = _call(model, ids.masked_fill(places, mask), model)  # [windows, tokens, vocabulary]
    log_p = logits[places.to(logits.device)].log_softmax(-1, dtype=torch.float32)
    return -log_p.gather(1, ids[places].to(logits.device)[:, None]).double().sum().cpu()


def _embeddings(model: Any, ids: Tensor) -> Tensor:
    """The mean of the last hidden states over the tokens of each window, float64 [windows, features]."""
    states = _call(model.base_model, ids, model).cpu().double()
    real = (ids != PADDING).unsqueeze(-1)
    return states.where(real, 0).sum(1) / real.sum(1)


@torch.no_grad()
def _accuracy(model: Any, task: Labelled, name: str) -> float:
    right = 0
    with evaluating([model]):
        for start, stop in _batches([model], task.rows):
            logits = _call(model, padded(task.rows[start:stop]), model)
            if logits.ndim != 2:
                raise UsageError(f"task {name}: {type(model).__name__} has no head that gives a text a label; leave --task out")
            right += int((logits.argmax(-1).cpu() == torch.tensor(task.labels[start:stop])).sum())
    return right / len(task.rows)


def read_task(path: Path, tokenizer: Any, config: Any, seqlen: int) -> Labelled:
    """The rows ``{"text": ..., "label": ...}`` of a JSON lines file; a label is a number, or a name that the model's configuration has.

    Longer texts are cut at ``seqlen`` tokens. Raises UsageError for a file that does not exist, PTQError, naming the line, for a row that
    is none.
    """
    if not path.is_file():
        raise UsageError(f"--task {path}: no such file; give one of JSON lines with text and label")
    before, behind = marks(tokenizer)
    found = [_labelled(row, config, where) for where, row in json_rows(path)]
    if not found:
        raise PTQError(f"{path}: holds no rows; give JSON lines with text and label")
    texts, labels = zip(*found, strict=True)
    ids = read_tokens(tokenizer, list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return Labelled([[*before, *row[: seqlen - len(before) - len(behind)], *behind] for row in ids], labels)


def _labelled(row: Any, config: Any, where: str) -> tuple[str, int]:
    text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
    label = config.label2id.get(label, label) if isinstance(label, str) else label
    if not isinstance(text, str) or type(label) is not int or not 0 <= label < config.num_labels:
        known = f"0 to {config.num_labels - 1} or a name such as {next(iter(config.label2id), None)}"
        raise PTQError(f'{where}: is not {{"text": ..., "label": ...}} with a label of {known} but {shown(row)}')
    return text, label
