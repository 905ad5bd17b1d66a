"""Text files and folders to documents.

    .txt                              one document
    .raw                              WikiText's raw form: one document, its lines joined with blank lines (see ``corpora.py``)
    .jsonl .jsonl.gz .jsonl.zst .json.gz   one document a line
    .parquet .arrow                   one document a row
    folder                            all files of one of these kinds, by name; or a data set saved by ``datasets``

Files of rows need a column ``text``, or have exactly one column of strings. When the name of every file in a folder says its
split (``test-00000-of-00001.parquet``), only the files of one split are read. All text is UTF-8; line ends become "\\n".
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from ptqcli.calibration.builtin import Part
from ptqcli.errors import PTQError, UsageError

SPLIT_WORDS = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def read_path(path: Path, part: Part) -> list[str]:
    """The documents of an existing file or folder, from its split for this part if it has several.

    Raises UsageError for a kind that is not read, a folder without text or without a split for this part; PTQError for a file
    that is damaged, empty, not UTF-8, or has rows without text.
    """
    if not path.is_dir():
        return read_file(path)
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _not_empty(_saved_dataset(path, part), path)
    return [text for file in _files_of_part(path, part) for text in read_file(file)]


def read_file(path: Path, limit: int | None = None) -> list[str]:
    """The first ``limit`` documents of a file, by default all. Raises what ``read_path`` raises."""
    reader = _reader(path)
    if reader is None:
        raise UsageError(f"{path} is of a kind that is not read; give one of {' '.join(_READERS)}")
    try:
        texts = list(itertools.islice(reader(path), limit))
    except (OSError, pa.ArrowException) as error:
        raise PTQError(f"{path} cannot be read ({first_line(error)}); copy or download it again") from error
    return _not_empty(texts, path)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name if it has none, to stand inside a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# Folders


def _files_of_part(folder: Path, part: Part) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and _reader(file))
    if not files:
        raise UsageError(f"folder {folder} has no text: no file of the kinds {' '.join(_READERS)}, no saved data set")
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


def _saved_dataset(folder: Path, part: Part) -> list[str]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise PTQError(f"the data set in {folder} cannot be read ({first_line(error)}); save it again") from error
    if isinstance(dataset, datasets.DatasetDict):
        dataset = dataset[_choose_split(set(dataset), part, folder)]
    column = _column_of_schema(dataset.features.arrow_schema, folder)
    return list(_texts(dataset[column][:], column, folder))


# Files


def _plain_text(path: Path) -> Iterator[str]:
    yield _decode(path.read_bytes(), str(path))


def _raw_wikitext(path: Path) -> Iterator[str]:
    rows = io.StringIO(_decode(path.read_bytes(), str(path)))
    yield "\n\n".join(row if row.strip() else "" for row in rows)


def _json_lines(path: Path) -> Iterator[str]:
    column = None
    with pa.input_stream(str(path), compression="detect") as stream:
        for number, line in enumerate(io.BufferedReader(stream), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = _json_row(_decode(line, where), where)
            if column is None:
                column = _choose_column({name: isinstance(value, str) for name, value in row.items()}, where)
            yield _text(row.get(column), column, where)


def _json_row(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PTQError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); correct or remove it") from error
    if not isinstance(row, dict):
        raise PTQError(f'{where}: not a JSON object; a line must look like {{"text": "..."}}')
    return row


def _parquet(path: Path) -> Iterator[str]:
    with pa.parquet.ParquetFile(path) as file:
        column = _column_of_schema(file.schema_arrow, path)
        batches = file.iter_batches(columns=[column])
        yield from _texts((value for batch in batches for value in batch.column(0).to_pylist()), column, path)


def _arrow(path: Path) -> Iterator[str]:
    with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
        column = _column_of_schema(stream.schema, path)
        yield from _texts((value for batch in stream for value in batch.column(column).to_pylist()), column, path)


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _plain_text,
    ".raw": _raw_wikitext,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".jsonl.zst": _json_lines,
    ".json.gz": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def _reader(path: Path) -> Callable[[Path], Iterator[str]] | None:
    return next((reader for ending, reader in _READERS.items() if path.name.endswith(ending)), None)


# Columns and values


def _column_of_schema(schema: pa.Schema, path: Path) -> str:
    is_text = {field.name: pa.types.is_string(field.type) or pa.types.is_large_string(field.type) for field in schema}
    return _choose_column(is_text, str(path))


def _choose_column(is_text: dict[str, bool], where: str) -> str:
    texts = [name for name, text in is_text.items() if text]
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        columns = ", ".join(is_text) or "none"
        raise PTQError(f"{where}: which column holds the text is not clear (columns: {columns}); name it 'text'")
    return texts[0]


def _texts(values: Iterable[object], column: str, path: Path) -> Iterator[str]:
    for number, value in enumerate(values, start=1):
        yield _text(value, column, f"{path}, row {number}")


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise PTQError(f"{where}: no text in column {column!r}; correct or remove it")
    return value


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"{data[error.start]:#04x} at byte {error.start}"
        raise PTQError(f"{where}: not UTF-8 ({found}); convert it to UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_empty(texts: list[str], path: Path) -> list[str]:
    if not any(text.strip() for text in texts):
        raise PTQError(f"{path}: the text is empty; give one with words in it")
    return texts
