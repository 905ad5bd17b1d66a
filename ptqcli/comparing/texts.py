"""What models are measured on: texts by name, as the same token ids for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.calibration.chat import chat_writer
from ptqcli.calibration.corpora import CORPORA, found_here
from ptqcli.calibration.fingerprint import Fingerprint
from ptqcli.calibration.rows import Rows
from ptqcli.calibration.shingles import Overlap, overlap
from ptqcli.calibration.sources import BUILTIN
from ptqcli.calibration.text import evaluation_text
from ptqcli.calibration.tokens import read_tokens
from ptqcli.comparing.identity import ids_digest, text_digest
from ptqcli.errors import PTQError
from ptqcli.pipeline.report import REPORT_NAME
from ptqcli.runtime.models import load_tokenizer

USUAL_TOKENS = 1 << 17  # of each text, where nobody named one
COMPARED_TOKENS = 1_000  # of each text, to learn whether two tokenizers are one


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text as token ids, int64 [tokens]; total: how many it has as a whole. sha256: of all of it; ids_sha256: of these ids."""

    name: str
    ids: Tensor
    total: int
    sha256: str
    ids_sha256: str

    def facts(self) -> dict[str, Any]:
        """As a report states it."""
        return {"text": self.name, "tokens": len(self.ids), "of": self.total, "sha256": self.sha256, "ids_sha256": self.ids_sha256}


def texts_here(data_dir: Path | None) -> tuple[str, ...]:
    """The texts that are measured where none is named: the built-in one, and the known corpora that this machine has.

    Nothing is asked of the network. Raises UsageError for a data folder that does not exist.
    """
    return (BUILTIN, *(name for name, parts in CORPORA.items() if "evaluation" in parts and found_here(name, "evaluation", data_dir)))


def read_texts(names: Iterable[str], tokenizer: Any, data_dir: Path | None, tokens: int | None, say: Callable[[str], None]) -> list[Text]:
    """The texts ``names``, each once; of each the first ``tokens``. say: is told of rows that are left out.

    Raises UsageError and PTQError for texts that are not there or cannot be read.
    """
    found = []
    for name in dict.fromkeys(names):
        rows = Rows(write_chat=chat_writer(tokenizer))
        text = evaluation_text(name, data_dir, rows)
        ids = torch.tensor(read_tokens(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        if rows.skipped:
            say(f"{name}: {rows.skipped:,} rows without text are left out")
        kept = ids[:tokens].clone()
        found.append(Text(name=name, ids=kept, total=len(ids), sha256=text_digest(text), ids_sha256=ids_digest(kept)))
    return found


def reads_otherwise(folder: Path, tokenizer: Any, texts: Iterable[Text]) -> bool:
    """Whether the tokenizer in ``folder`` makes other tokens than ``tokenizer`` of the beginnings of ``texts``."""
    try:
        other = load_tokenizer(folder)
    except PTQError:  # it needs none
        return False
    beginnings = [str(tokenizer.decode(text.ids[:COMPARED_TOKENS])) for text in texts]
    if not beginnings:
        return False
    own, its = (read_tokens(each, beginnings, add_special_tokens=False, verbose=False)["input_ids"] for each in (tokenizer, other))
    return bool(own != its)


def overlaps(checkpoint: Path, report: Mapping[str, Any] | None, texts: Iterable[Text]) -> dict[str, Overlap]:
    """How much of each text stood in what a checkpoint was calibrated or tuned on, as the fingerprints in its report tell; the texts of
    which they tell nothing are left out. What was made without a text has none of any.

    Raises PTQError for a fingerprint that is damaged.
    """
    if report is not None and report.get("error_kind") == "weight" and not report.get("tuning"):
        return {text.name: Overlap(0.0, 0.0, 0) for text in texts}
    marks = list(_fingerprints(report or {}))
    try:
        found = {text.name: [each for mark in marks if (each := overlap(mark, text.ids)) is not None] for text in texts}
    except PTQError as error:
        raise PTQError(f"{checkpoint}: {error}; delete {REPORT_NAME}, or quantize again") from error
    return {name: max(each, key=lambda overlap: overlap.share) for name, each in found.items() if each}


def _fingerprints(report: Mapping[str, Any]) -> Iterator[Fingerprint]:
    for section in ("calibration", "tuning"):
        stored = (report.get(section) or {}).get("fingerprint")
        if stored is not None:
            yield Fingerprint(**{name: stored[name] for name in Fingerprint.__dataclass_fields__})
