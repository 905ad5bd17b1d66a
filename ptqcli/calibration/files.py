"""Text files and folders to documents.

    .txt .md             one document
    .raw                 WikiText's raw form: one document, its lines joined with blank lines (see ``corpora.py``)
    .jsonl .json         one document a line; or the whole file is one array of objects
    .csv                 one document a row, below a row of column names
    .parquet .arrow      one document a row
    folder               all files of one of these kinds, by name; or a data set saved by ``datasets``

All but the last two kinds may be packed: .gz, .bz2, .xz, and .zst but for CSV. A .json or .csv file often describes the files
beside it, so in a folder it counts only where there is no other kind, and so does .md. Which column of rows is read, and what it may
hold, stands in ``rows.py``. When the name of every file in a folder says its split (``test-00000-of-00001.parquet``), only the files of one
split are read. All text is UTF-8; line ends become "\\n".

Files are streamed: only what the documents asked for need is read, nothing is cached and nobody is asked over the network. CSV is read
by the builder of the ``datasets`` library; its ``load_dataset`` would count every call at its server. Its other builders are not used:
that for JSON turns texts that look like dates into dates, refuses rows with a column that the first 10 MB lack, and does not say which
line is damaged; that for text reads packed files in the encoding of the locale; those for tables validate nothing (``tables.py``).

A file may be broken, or meant to do harm: packed, a few MB can stand for a TB. What is unpacked is measured against the file.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import IO, TYPE_CHECKING, Any

from ptqcli.calibration import tables
from ptqcli.calibration.builtin import Part
from ptqcli.calibration.rows import Rows, evident_column
from ptqcli.errors import PTQError, UsageError
from ptqcli.temporary import temporary_folder
from ptqcli.untrusted import foreign, shown

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

SPLIT_WORDS = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}

KINDS = ".txt .md .raw .jsonl .json .csv (also packed: .gz .bz2 .xz, but for .csv .zst) .parquet .arrow"
BESIDE = (".json", ".csv", ".md")  # kinds that often describe the other files of a folder
# Text becomes 3 to 6 times as large when it is unpacked, repetitive text perhaps 50 times; a file that is made to fill the memory, 1,000
# times and more.
LARGEST_RATIO = 200
SMALL_BYTES = 64 << 20  # what may come out of any file, whatever its size
MOST_NAMES_BYTES = 1 << 16  # of the first line of a CSV file that are looked at
MOST_BYTES_AT_ONCE = 1 << 30  # of a line, or of a file that is one document


def read_path(path: Path, part: Part, rows: Rows) -> list[str]:
    """The documents of an existing file or folder, from its split for this part if it has several. rows: how those of tables are read.

    Raises UsageError for a kind that is not read, a folder without text or without a split for this part; PTQError for a file
    that is damaged, empty, not UTF-8, or has rows without text.
    """
    if not path.is_dir():
        return read_file(path, rows=rows)
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _not_empty(_saved_dataset(path, part, rows), path)
    return [text for file in _files_of_part(path, part) for text in read_file(file, rows=rows)]


def read_file(path: Path, limit: int | None = None, rows: Rows | None = None) -> list[str]:
    """The first ``limit`` documents of a file, by default all. Raises what ``read_path`` raises."""
    reader = _reader(path)
    if reader is None:
        raise UsageError(f"{path} is of a kind that is not read; give one of {KINDS}")
    if rows is not None and rows.column is not None and reader in (_plain_text, _raw_wikitext):
        raise UsageError(f"{path}: is no table and has no column '{rows.column}'; leave it out{rows.counted()}")
    return _not_empty(_file_texts(path, reader, rows or Rows(), limit), path)


def _file_texts(path: Path, reader: Callable[[Path, Rows], Iterator[str]], rows: Rows, limit: int | None = None) -> list[str]:
    if not os.path.isfile(path):  # where Path would raise if no file can have that name
        raise UsageError(f"{path} does not exist or is no file but a pipe, a device or the like")
    with foreign(f"{path} cannot be read", "; correct it, or copy or download it again"):
        try:
            return list(itertools.islice(reader(path, rows), limit))
        except UnicodeDecodeError as error:
            raise PTQError(f"{path}: not UTF-8 ({_wrong_byte(error)}); convert it to UTF-8") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name if it has none, to stand inside a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# Folders


def _files_of_part(folder: Path, part: Part) -> list[Path]:
    texts = sorted(file for file in folder.iterdir() if file.is_file() and _reader(file))
    files = [file for file in texts if file.suffix not in BESIDE] or [file for file in texts if file.suffix != ".md"] or texts
    if not files:
        raise UsageError(f"folder {folder} has no text: no file of the kinds {KINDS}, and no saved data set")
    if len({_reader(file) for file in files}) > 1:
        raise UsageError(f"folder {folder} has text files of several kinds ({files[0].name}, ...); name one file")
    split_of = {file: _split_in_name(file) for file in files}
    if None in split_of.values():
        return files
    chosen = _choose_split({split for split in split_of.values() if split}, part, folder)
    return [file for file in files if split_of[file] == chosen]


def _split_in_name(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", file.name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _choose_split(splits: set[str], part: Part, folder: Path) -> str:
    wanted = ["train"] if part == "calibration" else ["test", "validation"]
    fitting = [split for split in wanted if split in splits]
    if not fitting and len(splits) > 1:
        raise UsageError(f"{folder} has the splits {', '.join(sorted(splits))}, none for {part}; name one file of it")
    return fitting[0] if fitting else min(splits)


def _saved_dataset(folder: Path, part: Part, rows: Rows) -> list[str]:
    splits = tables.saved_splits(folder)
    place = folder if splits is None else folder / _choose_split(set(splits), part, folder)
    return [text for file in tables.saved_files(place) for text in _file_texts(file, _table, rows)]


# Files


def _stream(builder: type[DatasetBuilder], path: Path, **options: object) -> IterableDataset:
    """The rows of one local file, read as they are asked for. options: of the builder."""
    from datasets.data_files import DataFilesDict, DataFilesList

    # Given as a list that is resolved already, because a builder would take the path for a pattern.
    files = DataFilesDict(train=DataFilesList([str(path.absolute())], [()]))
    # A builder makes its cache folder and locks it, although nothing that is streamed comes into it.
    with temporary_folder() as cache:
        return builder(cache_dir=str(cache), data_files=files, **options).as_streaming_dataset(split="train")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars of ``datasets`` and its log of errors, which are raised besides; its settings come back after."""
    from datasets import config
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.utils.logging import get_verbosity, set_verbosity

    # Where the environment asks for the bars, the library lets nobody turn them off.
    shown = not are_progress_bars_disabled() and config.HF_DATASETS_DISABLE_PROGRESS_BARS is None
    verbosity = get_verbosity()
    if shown:
        disable_progress_bars()
    set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if shown:
            enable_progress_bars()


class _Unpacked(io.RawIOBase):
    """The bytes that ``file`` unpacks from ``path``. Reading raises PTQError where they are out of proportion."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path, self._count = file, path, 0
        self._most = max(SMALL_BYTES, LARGEST_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._count += len(data)
        if self._count > self._most:
            raise PTQError(f"{self._path}: unpacks to more than {LARGEST_RATIO} times its size, as no text does; unpack it if it is one")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked while they are read."""
    unpackers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
    if path.suffix not in unpackers:
        return path.open("rb")
    return io.BufferedReader(_Unpacked(unpackers[path.suffix](path), path), 1 << 20)


def _open_zstd(path: Path) -> IO[bytes]:
    # What Python itself has from 3.14 on.
    from pyarrow import input_stream

    return input_stream(str(path), compression="zstd")


def _lines(file: IO[bytes], where: str) -> Iterator[bytes]:
    while line := file.readline(MOST_BYTES_AT_ONCE + 1):
        yield _bounded(line, where)


def _bounded(piece: bytes, where: str) -> bytes:
    if len(piece) > MOST_BYTES_AT_ONCE:
        raise PTQError(f"{where}: holds more than {MOST_BYTES_AT_ONCE >> 30} GiB in one piece; cut it into several documents")
    return piece


def _plain_text(path: Path, _rows: Rows) -> Iterator[str]:
    with _open(path) as file:
        yield _decode(_bounded(file.read(MOST_BYTES_AT_ONCE + 1), str(path)), str(path))


def _raw_wikitext(path: Path, rows: Rows) -> Iterator[str]:
    for text in _plain_text(path, rows):
        yield "\n\n".join(row if row.strip() else "" for row in io.StringIO(text))


def _json(path: Path, rows: Rows) -> Iterator[str]:
    column, undecided = None, []
    for where, row in json_rows(path):
        if not isinstance(row, (dict, NoneType)):
            raise PTQError(f'{where}: not a JSON object; it must look like {{"text": "..."}}')
        if column is None:
            undecided.append((where, row or {}))
            if not row or not _tells_columns(row, rows.column):
                continue
            column = rows.column_of(_holding_text(row), path, where)
            yield from _json_texts(undecided, column, rows)
        else:
            yield from _json_texts([(where, row or {})], column, rows)
    if column is None and undecided:
        everything = {name: value for _, row in undecided for name, value in row.items() if value is not None}
        yield from _json_texts(undecided, rows.column_of(_holding_text(everything), path, str(path)), rows) if everything else ()


def _tells_columns(row: Mapping[str, object], wanted: str | None) -> bool:
    """Whether a row says which column to read: where it holds null, there may be text in another row."""
    if wanted is not None:
        return wanted in row
    return evident_column(_holding_text(row)) is not None or None not in row.values()


def _json_texts(found: Iterable[tuple[str, Mapping[str, object]]], column: str, rows: Rows) -> Iterator[str]:
    return rows.texts(((where, row.get(column)) for where, row in found), column)


def _holding_text(row: Mapping[str, object]) -> dict[str, bool]:
    """Whether each column of a row holds text; a null in the column of that name counts."""
    return {name: isinstance(value, str) or (name == "text" and value is None) for name, value in row.items()}


def json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Pairs of a place in the file and the value there: a line, or a row of the array that the file is."""
    with _open(path) as file:
        lines = _lines(file, str(path))
        blank, first = 0, next(lines, b"")
        while first and not first.removeprefix(codecs.BOM_UTF8).strip():
            blank, first = blank + 1, next(lines, b"")
        if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            # With the blank lines, the parser counts as an editor does.
            array = _decode(_bounded(first + file.read(MOST_BYTES_AT_ONCE), str(path)), str(path))
            yield from ((f"{path}, row {row}", value) for row, value in enumerate(_parsed("\n" * blank + array, str(path)), start=1))
            return
        for number, line in enumerate(itertools.chain([first], lines), start=blank + 1):
            where = f"{path}, line {number}"
            if line.strip():
                yield where, _parsed(_decode(line, where).rstrip("\n"), where)


def _csv(path: Path, rows: Rows) -> Iterator[str]:
    from datasets.packaged_modules.csv.csv import Csv

    if "::" in str(path.absolute()):
        raise UsageError(f"{path} cannot be opened, as datasets takes '::' for a file inside another one; rename it")
    with _open(path) as file:  # the library unpacks without a limit, so it gets nothing that has none
        _check_separator(file.readline(MOST_NAMES_BYTES), path)
        while file.read(1 << 20):
            pass
    column = None
    with _quietly():
        # Without the filter, texts like "NA" and "null" would not count as text.
        for number, row in enumerate(_stream(Csv, path, na_filter=False, chunksize=tables.CHUNK_ROWS), start=1):
            if any(name.startswith("__index_level_") for name in row):  # the reader takes cells without a name for an index
                raise PTQError(f"{path}: rows have more cells than there are column names; put texts with commas into quotes")
            if column is None:
                column = rows.column_of(_holding_text(row), path, str(path))
            yield from map(_unix_line_ends, rows.texts([(f"{path}, row {number}", row[column])], column))


def _check_separator(names: bytes, path: Path) -> None:
    if b"," not in names and any(separator in names for separator in (b";", b"\t", b"|")):
        raise PTQError(f"{path}: its first line is {shown(names)}, whose cells are not separated by commas; write it with commas")


def _table(path: Path, rows: Rows) -> Iterator[str]:
    column = rows.column_of(tables.text_columns(path), path, str(path))
    return rows.texts(_numbered(tables.column_values(path, column), path), column)


def _numbered(values: Iterable[object], path: Path) -> Iterator[tuple[str, object]]:
    return ((f"{path}, row {number}", value) for number, value in enumerate(values, start=1))


_PACKINGS = ("", ".gz", ".bz2", ".xz")
_READERS: dict[str, Callable[[Path, Rows], Iterator[str]]] = {
    **{f".{kind}{packing}": _plain_text for kind in ("txt", "md") for packing in (*_PACKINGS, ".zst")},
    **{f".raw{packing}": _raw_wikitext for packing in (*_PACKINGS, ".zst")},
    **{f".{kind}{packing}": _json for kind in ("jsonl", "json") for packing in (*_PACKINGS, ".zst")},
    **{f".csv{packing}": _csv for packing in _PACKINGS},
    ".parquet": _table,
    ".arrow": _table,
}


def is_text_file(name: str) -> bool:
    """Whether a file of this name is of one of the kinds that are read."""
    return name.endswith(tuple(_READERS))


def _reader(path: Path) -> Callable[[Path, Rows], Iterator[str]] | None:
    return next((reader for ending, reader in _READERS.items() if path.name.endswith(ending)), None)


# Contents


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise PTQError(f"{where}: not valid JSON ({error.msg}, {line}column {error.colno}); correct or remove it") from error
    except RecursionError as error:
        raise PTQError(f"{where}: too many brackets inside each other; correct or remove it") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise PTQError(f"{where}: not valid JSON ({first_line(error)}); correct or remove it") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return _unix_line_ends(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PTQError(f"{where}: not UTF-8 ({_wrong_byte(error)} at byte {error.start}); convert it to UTF-8") from error


def _wrong_byte(error: UnicodeDecodeError) -> str:
    return f"{error.object[error.start]:#04x}"


def _unix_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_empty(texts: list[str], path: Path) -> list[str]:
    if not any(text.strip() for text in texts):
        raise PTQError(f"{path}: the text is empty; give one with words in it")
    return texts
