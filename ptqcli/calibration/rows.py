"""Rows of tables to documents: which column holds the text, and what a value in it is.

The column is the one that was named (``FILE:COLUMN``), or ``text``, or one of CHAT_COLUMNS, or the only one of strings. Its values are
texts or chats (``chat.py``). Rows whose value is null, missing or an empty chat have no text: they are left out and counted. Any other
value is an error that names the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqcli.calibration.chat import WriteChat
from ptqcli.errors import PTQError, UsageError
from ptqcli.suggest import did_you_mean

CHAT_COLUMNS = ("messages", "conversations", "conversation")
SHOWN_COLUMNS = 20


@dataclass(kw_only=True)
class Rows:
    """How rows become documents, and how many have no text.

    column: that holds the text, None for the one that is evident. write_chat: writes chats out; None where there is no tokenizer to do
    it. skipped: rows without text so far.
    """

    column: str | None = None
    write_chat: WriteChat | None = None
    skipped: int = 0

    def column_of(self, is_text: Mapping[str, bool], path: Path, where: str) -> str:
        """The column to read, of a table whose columns are texts or something else. Raises UsageError or PTQError where it is not clear."""
        columns = ", ".join([*is_text][:SHOWN_COLUMNS]) or "none"
        if self.column is not None:
            if self.column not in is_text:
                known = f"(columns: {columns}){did_you_mean(self.column, is_text)}"
                raise UsageError(f"{where}: has no column '{self.column}' {known}{self.counted()}")
            return self.column
        evident = evident_column(is_text)
        texts = [name for name, text in is_text.items() if text]
        if evident is None and len(texts) != 1:
            if "text" in is_text:
                raise PTQError(f"{where}: its column 'text' holds no strings (columns: {columns}); name the one to read behind the file")
            example = next(iter([*texts, *is_text]), "COLUMN")
            raise PTQError(
                f"{where}: which column holds the text is not clear (columns: {columns}); name it 'text', or name the one to read behind "
                f"the file, as in {path.name}:{example}"
            )
        return evident or texts[0]

    def counted(self) -> str:
        """What to do where the name of a column was meant as a number of windows, as the end of a message."""
        number = self.column or ""
        return f"; of one text alone, --nsamples {number} says how many windows" if number.isdecimal() else ""

    def texts(self, values: Iterable[tuple[str, object]], column: str) -> Iterator[str]:
        """The texts of (place for errors, value in ``column``) pairs, those without text left out."""
        for where, value in values:
            text = self._text(value, column, where)
            if text is None:
                self.skipped += 1
            else:
                yield text

    def _text(self, value: Any, column: str, where: str) -> str | None:
        if value is None:
            return None
        chat = isinstance(value, (list, Mapping)) or (column in CHAT_COLUMNS and isinstance(value, str))
        if chat:
            if self.write_chat is None:
                raise PTQError(f"{where}: column {column!r} holds chats, which are written out by a tokenizer, and there is none")
            value = self.write_chat(value, f"{where}, column {column!r}") if value else None
        elif not isinstance(value, str):
            raise PTQError(f"{where}: no text in column {column!r} but {type(value).__name__}; correct or remove it")
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:  # JSON may escape one
            raise PTQError(f"{where}: half a surrogate pair in column {column!r}, which is no character; correct or remove it") from error
        return value


def evident_column(is_text: Mapping[str, bool]) -> str | None:
    """The column that is read because of its name, or None."""
    if is_text.get("text"):
        return "text"
    return next((name for name in CHAT_COLUMNS if name in is_text), None)
