"""Text to token ids: which text a source names, and how it is cut for calibration and for evaluation.

A source is ``builtin``, the name of a corpus that the field measures with, or a path. The names win over paths of the same name
(``./c4`` is the folder), and a path never touches the network. What ``auto`` and ``self`` stand for is decided elsewhere (``sources.py``).

    builtin     the corpus that every Python installation carries, see ``builtin.py``
    wikitext2   train split for calibration, test split for evaluation: the rows joined with blank lines
    c4          a train shard for calibration, the first 1,100 documents of a validation shard for evaluation
    pile        the Pile's validation split, for calibration only, as in AWQ
    PATH        a file or folder, see ``files.py``; of a table, PATH:COLUMN reads the column of that name

Evaluation joins the documents with blank lines, whatever the source. For WikiText-2 that is the published protocol; the
published C4 evaluation joins the same 1,100 documents with a space.

Windows begin with the beginning-of-sequence token where ``bos.py`` says so; the text itself is tokenized without special tokens.

Calibration joins documents with the end-of-text token and draws windows from a fixed grid, so that no two overlap and short
documents count too. GPTQ's published calibration on C4 instead draws stretches at random places of random documents that are
longer than a window.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptqcli.calibration import builtin, corpora, files
from ptqcli.calibration.builtin import Part
from ptqcli.calibration.chat import chat_writer
from ptqcli.calibration.rows import Rows
from ptqcli.calibration.sources import AUTO, BUILTIN, SELF
from ptqcli.calibration.tokens import read_tokens
from ptqcli.errors import UsageError
from ptqcli.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Calibration tokenizes this many times the tokens that it keeps, so that there is something to choose from.
CALIBRATION_SLACK = 2
# Longer documents are cut, so that a few windows of a 100 MB file do not cost tokenizing all of it.
PIECE_CHARACTERS = 65_536
PIECES_PER_CALL = 32


def documents(source: str, part: Part, data_dir: Path | None = None, rows: Rows | None = None) -> list[str]:
    """The documents of a source, in its own order.

    part: which of its texts. A path with splits gives ``train`` for calibration, ``test`` or else ``validation`` for
    evaluation, and its only split for both. data_dir: the folder in which the files of known corpora are looked for first.
    rows: how tables are read; it counts their rows without text, which are left out.

    Raises UsageError for a source, file kind, column or part that does not exist; PTQError for text that cannot be had or read.
    """
    if source == BUILTIN:
        return builtin.documents(part)
    if source in corpora.CORPORA:
        return corpora.read_corpus(source, part, data_dir)
    path = source_path(source)
    if path is None:
        raise UsageError(_unknown_source(source, [BUILTIN, *corpora.CORPORA]))
    rows = rows or Rows()
    if str(path) != source and not os.path.exists(source):
        rows.column = source.rpartition(":")[2]
    texts = files.read_path(path, part, rows)
    if part == "evaluation" or len(texts) == 1:
        return texts  # blank rows are part of a text whose rows are joined
    written = [text for text in texts if text.strip()]
    rows.skipped += len(texts) - len(written)
    return written


def source_path(source: str) -> Path | None:
    """The file or folder that ``source`` names, a column behind it left out; None for a name, and for a path that does not exist."""
    if source in (AUTO, SELF, BUILTIN) or source in corpora.CORPORA:
        return None
    return next((Path(path) for path in (source, source.rpartition(":")[0]) if path and os.path.exists(path)), None)


def calibration_windows(
    docs: Sequence[str], tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int, bos: int | None = None
) -> Tensor:
    """A seeded random choice of full windows without overlap, int64 [nsamples, seqlen], in random order.

    Documents are tokenized as they are, without special tokens, in a seeded order, and joined with the end-of-text token where
    the tokenizer has one. The row of tokens is cut into windows, of which nsamples are drawn without replacement. Tokenizing
    stops when there are CALIBRATION_SLACK times the tokens needed. Documents of more than PIECE_CHARACTERS count as several,
    cut after a line where possible; blank ones do not count. The same arguments give the same windows.
    bos: a token that every window begins with, of ``bos.window_bos``.

    Raises UsageError if the text has fewer than nsamples windows.
    """
    room = seqlen - (bos is not None)  # tokens of the text in a window
    if nsamples < 1 or room < 1:
        raise UsageError(f"{nsamples} windows of {seqlen} tokens cannot be cut; both numbers must be 1 or more")
    generator = torch.Generator().manual_seed(seed)
    tokens = _shuffled_tokens(docs, tokenizer, CALIBRATION_SLACK * nsamples * room, generator)
    windows = len(tokens) // room
    if windows < nsamples:
        raise UsageError(
            f"the calibration text has {len(tokens)} tokens, enough for {windows} windows of {seqlen}, "
            f"and {nsamples} are asked for; lower that number or --seqlen, or give more text"
        )
    grid = torch.tensor(tokens[: windows * room]).view(windows, room)  # [windows, room]
    chosen = grid[torch.randperm(windows, generator=generator)[:nsamples]]  # [nsamples, room]
    return chosen if bos is None else torch.cat([torch.full((nsamples, 1), bos), chosen], dim=1)


def evaluation_ids(source: str, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None = None, rows: Rows | None = None) -> Tensor:
    """The evaluation text of a source as one row of token ids, int64 [tokens].

    The documents are joined with blank lines and tokenized at once, without special tokens, which windows have (``bos.py``).
    rows: as in ``documents``, whose errors are raised here, too.
    """
    text = evaluation_text(source, data_dir, rows or Rows(write_chat=chat_writer(tokenizer)))
    # Not verbose: the text is longer than the model's context by intent, and the tokenizer would warn about it.
    return torch.tensor(read_tokens(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def evaluation_text(source: str, data_dir: Path | None, rows: Rows) -> str:
    """The evaluation text of a source, its documents joined with blank lines. Raises what ``documents`` raises."""
    return "\n\n".join(documents(source, "evaluation", data_dir, rows))


def _unknown_source(source: str, names: list[str]) -> str:
    known = f"{', '.join(names)}, or the path of a file or folder"
    if len(Path(source).parts) > 1 or Path(source).suffix:
        return f"text {source} does not exist; give {known}"
    return f"no text is called {source!r}; give {known}{did_you_mean(source, names)}"


def _shuffled_tokens(docs: Sequence[str], tokenizer: PreTrainedTokenizerBase, wanted: int, generator: torch.Generator) -> list[int]:
    pieces = [piece for text in docs for piece in _pieces(text) if piece.strip()]
    order = torch.randperm(len(pieces), generator=generator).tolist()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for start in range(0, len(order), PIECES_PER_CALL):
        batch = [pieces[index] for index in order[start : start + PIECES_PER_CALL]]
        for ids in read_tokens(tokenizer, batch, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += ids + end
        if len(tokens) >= wanted:
            break
    return tokens


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        after_newline = text.rfind("\n", start + PIECE_CHARACTERS // 2, limit) + 1
        stop = after_newline or limit
        yield text[start:stop]
        start = stop
    yield text[start:]
